"""`PreferenceModel`: scores that depend on the text alone, and folders that load anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from morlaif_ray.backbone import encode_scored_text
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.preference import PreferenceModel

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

COLOURS = ("red", "green", "blue", "sun", "moon", "star")
TEXTS = [
    f"\n\nHuman: {' '.join(COLOURS[i % 6] for i in range(n))}\n\nAssistant: {COLOURS[n % 6]} good"
    for n in (1, 9, 3, 14, 5, 2, 7)
]
HEADS = ("empathy", "detail", "bias")
LORA = LoraConfig(rank=2)
KINDS = ("gpt2", "llama")


def make(path: str, heads: tuple[str, ...] = HEADS, **options: Any) -> PreferenceModel:
    """A model whose head has opinions, and whose adapters have an effect."""
    model = PreferenceModel.from_backbone(path, heads, max_length=24, seed=5, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "score" in name:
                parameter.mul_(5.0)
            if "lora_B" in name:
                parameter.normal_(std=0.3)  # zero at the start: an adapter without effect
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_batch_order_or_padding(
    backbone: Callable[..., str], kind: str
) -> None:
    model = make(backbone(kind))
    scores = model.score_heads(TEXTS)
    assert scores.shape == (7, 3)
    assert scores.dtype == np.float64
    assert float(scores.std(axis=0).min()) > 0.05
    for size in (1, 2, 3):
        np.testing.assert_allclose(model.score_heads(TEXTS, batch_size=size), scores, atol=1e-5)
    np.testing.assert_allclose(model.score_heads(TEXTS[::-1])[::-1], scores, atol=1e-5)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(model.score_heads([text])[0], scores[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_matter_which_token_pads(backbone: Callable[..., str], kind: str) -> None:
    model = make(backbone(kind))
    scores = model.score_heads(TEXTS)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    np.testing.assert_allclose(model.score_heads(TEXTS), scores, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_the_plain_model_at_eos(
    backbone: Callable[..., str], kind: str
) -> None:
    model = make(backbone(kind))
    ids = [*model.tokenizer(TEXTS[2])["input_ids"], model.tokenizer.eos_token_id]
    assert model.encode([TEXTS[2]]) == [ids]
    with torch.no_grad():
        state = model.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = model.model.score(state).numpy()
    np.testing.assert_allclose(model.score_heads([TEXTS[2]])[0], expected, atol=1e-5)


def test_a_long_text_keeps_its_end_and_its_eos(tokenizer: Any) -> None:
    ids = encode_scored_text(tokenizer, "red green blue sun", 3)
    assert tokenizer.convert_ids_to_tokens(ids) == ["blue", "sun", "<eos>"]
    assert encode_scored_text(tokenizer, "red green", 1) == [tokenizer.eos_token_id]


def test_max_length_never_exceeds_the_backbones_positions(backbone: Callable[..., str]) -> None:
    model = PreferenceModel.from_backbone(backbone(), ["a"], max_length=512, seed=0)
    assert model.max_length == 24
    assert len(model.encode(["red " * 600])[0]) == 24
    assert np.isfinite(model.score(["red " * 600])).all()


def test_a_new_head_begins_with_scores_of_the_size_of_1(backbone: Callable[..., str]) -> None:
    heads = tuple(f"h{number}" for number in range(200))
    first, again = (
        PreferenceModel.from_backbone(backbone(), heads, max_length=24, seed=5) for _ in range(2)
    )
    weight_HD = first.model.score.weight
    assert torch.equal(weight_HD, again.model.score.weight)
    expected = (weight_HD.shape[1] + 1) ** -0.5
    assert float(weight_HD.detach().std()) == pytest.approx(expected, rel=0.05)


def test_a_trained_head_of_the_backbone_is_kept(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    trained = make(backbone(), HEADS)
    trained.model.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    model = PreferenceModel.from_backbone(str(tmp_path), HEADS, max_length=24, seed=6)
    assert torch.equal(model.model.score.weight, trained.model.score.weight)


def test_a_score_of_one_head_is_a_vector(backbone: Callable[..., str]) -> None:
    model = make(backbone(), ("empathy",))
    np.testing.assert_array_equal(model.score(TEXTS), model.score_heads(TEXTS)[:, 0])
    assert model.score([]).shape == (0,)
    with pytest.raises(ValueError, match="3 heads; use score_heads"):
        make(backbone()).score(TEXTS)


def test_the_seed_alone_decides_the_head(backbone: Callable[..., str]) -> None:
    first = PreferenceModel.from_backbone(backbone(), ["a"], max_length=24, seed=1)
    before = torch.get_rng_state()
    second = PreferenceModel.from_backbone(backbone(), ["a"], max_length=24, seed=1)
    third = PreferenceModel.from_backbone(backbone(), ["a"], max_length=24, seed=2)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws are disturbed
    assert torch.equal(first.model.score.weight, second.model.score.weight)
    assert not torch.equal(first.model.score.weight, third.model.score.weight)


def test_a_score_that_is_not_finite_names_head_and_text(backbone: Callable[..., str]) -> None:
    model = make(backbone())
    with torch.no_grad():
        model.model.score.weight[1] = float("nan")
    with pytest.raises(NumericalError, match="'detail' gave a non-finite score for text 0"):
        model.score_heads(TEXTS)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_bits(
    backbone: Callable[..., str], tmp_path: Path, kind: str, lora: LoraConfig | None
) -> None:
    model = make(backbone(kind), lora=lora)
    model.save(tmp_path)
    loaded = PreferenceModel.load(tmp_path)
    np.testing.assert_array_equal(loaded.score_heads(TEXTS), model.score_heads(TEXTS))
    assert (loaded.heads, loaded.max_length) == (model.heads, model.max_length)


def test_adapters_change_the_scores(backbone: Callable[..., str]) -> None:
    plain, adapted = make(backbone()), make(backbone(), lora=LORA)
    assert not np.allclose(plain.score_heads(TEXTS), adapted.score_heads(TEXTS), atol=1e-2)


def plain_scores(model: Any, folder: Path, text: str) -> np.ndarray:
    """The way a stranger scores: transformers' own tokenizer, EOS at the end, the classifier's logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_the_folder(
    backbone: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    model = make(backbone(kind))
    model.save(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.id2label == dict(enumerate(HEADS))
    assert plain.config.num_labels == 3
    scores = model.score_heads(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(plain_scores(plain, tmp_path, text), scores[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_the_adapter_folder(
    backbone: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    model = make(backbone(kind), lora=LORA)
    model.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    scores = model.score_heads(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(plain_scores(plain, tmp_path, text), scores[row], atol=1e-5)


def test_nothing_on_disk_is_a_pickle(backbone: Callable[..., str], tmp_path: Path) -> None:
    make(backbone()).save(tmp_path / "full")
    make(backbone(), lora=LORA).save(tmp_path / "lora")
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


class TestDamagedFolder:
    """What is missing is named in one line, and never made up."""

    @pytest.fixture
    def folder(self, backbone: Callable[..., str], tmp_path: Path) -> Path:
        make(backbone()).save(tmp_path / "pm")
        return tmp_path / "pm"

    @pytest.fixture
    def adapter(self, backbone: Callable[..., str], tmp_path: Path) -> Path:
        shutil.copytree(backbone(), tmp_path / "backbone")
        make(str(tmp_path / "backbone"), lora=LORA).save(tmp_path / "adapter")
        return tmp_path / "adapter"

    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            PreferenceModel.load(folder)
        assert "\n" not in str(caught.value)

    def drop(self, path: Path, name: str) -> None:
        tensors = load_file(path)
        assert any(name in key for key in tensors)
        kept = {key: value for key, value in tensors.items() if name not in key}
        save_file(kept, path, metadata={"format": "pt"})

    def test_no_folder(self, tmp_path: Path) -> None:
        self.refused(
            tmp_path / "none", r"not a preference model \(preference_model.json is missing"
        )

    def test_no_card(self, folder: Path) -> None:
        (folder / "preference_model.json").unlink()
        self.refused(folder, r"not a preference model \(preference_model.json is missing\)")

    @pytest.mark.parametrize("text", ["{", "[]", '{"heads": ["a"]}'])
    def test_a_card_of_another_shape(self, folder: Path, text: str) -> None:
        (folder / "preference_model.json").write_text(text, encoding="utf-8")
        self.refused(folder, "preference_model.json: damaged; train the model again")

    def test_another_template(self, folder: Path) -> None:
        card = json.loads((folder / "preference_model.json").read_text(encoding="utf-8"))
        card["template"] = "chat-v9"
        (folder / "preference_model.json").write_text(json.dumps(card), encoding="utf-8")
        self.refused(folder, "made with template 'chat-v9', this version uses 'dialogue-eos-v1'")

    def test_no_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        self.refused(folder, "no tokenizer could be loaded")
        (folder / "tokenizer_config.json").unlink()
        self.refused(folder, "the tokenizer is missing; save it beside the model")

    def test_no_score_head(self, folder: Path) -> None:
        self.drop(folder / "model.safetensors", "score.weight")
        self.refused(folder, r"weight 'score.weight' of the preference model is missing")

    def test_no_trunk_tensor(self, folder: Path) -> None:
        self.drop(folder / "model.safetensors", "h.1.mlp.c_fc.weight")
        self.refused(folder, r"weight 'transformer.h.1.mlp.c_fc.weight' of the preference model is")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.refused(folder, "no preference model could be loaded")

    def test_weights_cut_short(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        self.refused(folder, "no preference model could be loaded")

    def test_no_adapter_weights(self, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        self.refused(adapter, "adapter_model.safetensors is missing; train the model again")

    def test_adapter_cut_short(self, adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        self.refused(adapter, "adapter_model.safetensors: damaged")

    def test_no_score_head_beside_the_adapter(self, adapter: Path) -> None:
        self.drop(adapter / "adapter_model.safetensors", "score")
        self.refused(adapter, "the score head is missing beside the adapter")

    def test_no_backbone_under_the_adapter(self, adapter: Path) -> None:
        shutil.rmtree(adapter.parent / "backbone")
        self.refused(adapter, r"backbone: no backbone could be loaded")

    def test_no_backbone_to_start_from(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"none: no tokenizer could be loaded"):
            PreferenceModel.from_backbone(str(tmp_path / "none"), ["a"], max_length=8, seed=0)
