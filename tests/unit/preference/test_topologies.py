"""Late branching and banks of adapters: the same scores as K models on their own, and nothing else is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.preference import AdapterBank, PreferenceModel
from morlaif_ray.preference.branching import num_branch_blocks, tail_of

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

COLOURS = ("red", "green", "blue", "sun", "moon", "star")
HEADS = ("empathy", "detail", "bias")
LORA = LoraConfig(rank=2)
KINDS = ("gpt2", "llama", "gemma")
Backbone = Callable[..., str]


def text_of(num_words: int) -> str:
    words = " ".join(COLOURS[i % 6] for i in range(num_words))
    return f"\n\nHuman: {words}\n\nAssistant: {COLOURS[num_words % 6]} good"


TEXTS = [text_of(n) for n in (1, 9, 3, 14, 5, 2, 7, 40)]


def opinionated(model: PreferenceModel, seed: int) -> PreferenceModel:
    """Moves everything that trains: fresh heads and adapters have next to no effect, fresh branches are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.requires_grad:
                scale = 1.0 if "score" in name else 0.05 if "lora_" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.model.eval()
    return model


def branched(path: str, heads: tuple[str, ...] = HEADS, blocks: int = 1) -> PreferenceModel:
    model = PreferenceModel.from_backbone(
        path, heads, max_length=24, seed=5, topology="late_branching", branch_blocks=blocks
    )
    return opinionated(model, 1)


def adapter_folders(path: str, root: Path, topology: str = "adapters") -> list[str]:
    folders = []
    for index, name in enumerate(HEADS):
        model = PreferenceModel.from_backbone(
            path, [name], max_length=24, seed=5, lora=LORA, topology=topology, branch_blocks=None
        )
        opinionated(model, index).save(root / name)
        folders.append(str(root / name))
    return folders


def plain_scores(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """The way a stranger scores: transformers' own tokenizer, EOS at the end, the classifier's logits."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


class TestLateBranching:
    @pytest.mark.parametrize("kind", KINDS)
    def test_before_training_every_branch_is_the_shared_trunk(
        self, backbone: Backbone, kind: str
    ) -> None:
        options: dict[str, Any] = {"max_length": 24, "seed": 5}
        trunk = PreferenceModel.from_backbone(backbone(kind), HEADS, **options)
        late = PreferenceModel.from_backbone(
            backbone(kind), HEADS, topology="late_branching", **options
        )
        np.testing.assert_allclose(late.score_heads(TEXTS), trunk.score_heads(TEXTS), atol=1e-5)

    @pytest.mark.parametrize("blocks", [1, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_it_gives_the_same_bits_and_plain_transformers_loads_every_principle(
        self, backbone: Backbone, tmp_path: Path, kind: str, blocks: int
    ) -> None:
        model = branched(backbone(kind), blocks=blocks)
        scores = model.score_heads(TEXTS)
        assert float(np.abs(scores[:, 0] - scores[:, 1]).max()) > 0.05
        model.save(tmp_path)
        loaded = PreferenceModel.load(tmp_path)
        np.testing.assert_array_equal(loaded.score_heads(TEXTS), scores)
        assert (loaded.heads, loaded.max_length) == (model.heads, model.max_length)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for head, name in enumerate(HEADS):
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "heads" / name)
            assert plain.config.id2label == {0: name}
            for row, text in enumerate(TEXTS[:-1]):  # the last one would be truncated
                expected = plain_scores(plain, tokenizer, text)[0]
                np.testing.assert_allclose(scores[row, head], expected, atol=1e-5)

    def test_the_shared_blocks_are_saved_once(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        trunk = load_file(tmp_path / "trunk.safetensors")
        one = load_file(tmp_path / "heads" / "detail" / "branch.safetensors")
        assert not set(trunk) & set(one)
        assert {name.split(".")[2] for name in trunk if ".h." in name} == {"0"}
        assert {name.split(".")[2] for name in one if ".h." in name} == {"1"}

    def test_wanted_heads_alone_are_computed(self, backbone: Backbone) -> None:
        model = branched(backbone())
        whole = model.raw_scores(TEXTS)
        np.testing.assert_array_equal(model.raw_scores(TEXTS, [2, 0]), whole[:, [2, 0]])
        tail: Any = tail_of(model.model)
        tail.branches[1] = None  # would fail if it were evaluated
        np.testing.assert_array_equal(model.raw_scores(TEXTS, [2]), whole[:, [2]])

    @pytest.mark.parametrize(
        ("blocks", "wanted", "found"), [(12, None, 3), (3, None, 1), (3, 2, 2)]
    )
    def test_a_quarter_of_the_blocks_by_default(
        self, blocks: int, wanted: int | None, found: int
    ) -> None:
        assert num_branch_blocks(blocks, wanted) == found

    def test_more_blocks_than_there_are_is_refused(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match=r"branch_blocks 3: the backbone has 2 blocks; write"):
            branched(backbone(), blocks=3)

    def test_mixed_attention_is_refused(self, backbone: Backbone) -> None:
        from morlaif_ray.preference.branching import branch

        model = PreferenceModel.from_backbone(backbone("llama"), ["a"], max_length=24, seed=5).model
        model.config.layer_types = ["full_attention", "sliding_attention"]
        with pytest.raises(ConfigError, match=r"mixed attention \(full_attention, sliding_"):
            branch(model, 2, 1)

    def test_a_missing_branch_is_named(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        shutil.rmtree(tmp_path / "heads" / "detail")
        with pytest.raises(ArtifactError, match=r"heads: the branch of 'detail' is missing; train"):
            PreferenceModel.load(tmp_path)

    @pytest.mark.parametrize("name", ["score.weight", "h.1.mlp.c_fc.weight", "ln_f.bias"])
    def test_a_missing_weight_of_a_branch_is_named(
        self, backbone: Backbone, tmp_path: Path, name: str
    ) -> None:
        branched(backbone()).save(tmp_path)
        path = tmp_path / "heads" / "detail" / "branch.safetensors"
        kept = {key: value for key, value in load_file(path).items() if not key.endswith(name)}
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=rf"detail/branch.*{name}' is missing; train"):
            PreferenceModel.load(tmp_path)

    def test_a_branch_cut_short_is_named(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        path = tmp_path / "heads" / "bias" / "branch.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ArtifactError, match=r"the branch of 'bias' cannot be read"):
            PreferenceModel.load(tmp_path)


class TestBank:
    @pytest.mark.parametrize("topology", ["adapters", "late_branching"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_pass_gives_the_scores_of_each_adapter_on_its_own(
        self, backbone: Backbone, tmp_path: Path, kind: str, topology: str
    ) -> None:
        folders = adapter_folders(backbone(kind), tmp_path, topology)
        bank = AdapterBank.load(folders)
        assert bank._tail is not None
        assert bank._tail.first == (topology == "late_branching")  # the block below: once
        scores = bank.score_folders(TEXTS)
        alone = {folder: PreferenceModel.load(folder).score_heads(TEXTS) for folder in folders}
        assert float(np.abs(alone[folders[0]] - alone[folders[1]]).max()) > 0.05
        for folder in folders:
            np.testing.assert_allclose(scores[folder], alone[folder], atol=1e-5)
            one = bank.score_folders([TEXTS[1]])[folder]
            np.testing.assert_allclose(one, alone[folder][[1]], atol=1e-5)

    @pytest.mark.parametrize("topology", ["adapters", "late_branching"])
    def test_wanted_adapters_alone_in_any_order(
        self, backbone: Backbone, tmp_path: Path, topology: str
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path, topology)
        bank = AdapterBank.load(folders)
        whole = bank.score_folders(TEXTS)
        for wanted in ([folders[2], folders[0]], [folders[1], folders[2], folders[0]]):
            some = bank.score_folders(TEXTS, wanted)
            assert list(some) == wanted
            for folder, scores in some.items():
                np.testing.assert_allclose(scores, whole[folder], atol=1e-5)

    def test_adapters_of_late_branching_touch_the_last_block_alone(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path, "late_branching")
        names = load_file(Path(folders[0]) / "adapter_model.safetensors")
        assert {name.split(".")[4] for name in names if ".h." in name} == {"1"}

    def test_plain_peft_loads_every_adapter(self, backbone: Backbone, tmp_path: Path) -> None:
        from peft import AutoPeftModelForSequenceClassification

        folders = adapter_folders(backbone("llama"), tmp_path, "late_branching")
        scores = AdapterBank.load(folders).score_folders(TEXTS[:-1])
        for folder in folders:
            plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            for row, text in enumerate(TEXTS[:-1]):
                expected = plain_scores(plain, tokenizer, text)
                np.testing.assert_allclose(scores[folder][row], expected, atol=1e-5)

    def test_adapters_of_different_ranks_share_a_pass(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        model = PreferenceModel.from_backbone(
            backbone(), ["wide"], max_length=24, seed=5, lora=LoraConfig(rank=5)
        )
        opinionated(model, 9).save(tmp_path / "wide")
        scores = AdapterBank.load([*folders, tmp_path / "wide"]).score_folders(TEXTS)
        for folder, found in scores.items():
            alone = PreferenceModel.load(folder).score_heads(TEXTS)
            np.testing.assert_allclose(found, alone, atol=1e-5)

    def refused(self, folders: list[str], match: str) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            AdapterBank.load(folders)
        assert "\n" not in str(caught.value)

    def test_adapters_of_two_backbones_are_refused(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        first = adapter_folders(backbone(), tmp_path / "a")
        second = adapter_folders(backbone("llama"), tmp_path / "b")
        self.refused([first[0], second[0]], "b/empathy: adapter of backbone .*llama.* one backbone")

    def test_full_weights_in_a_bank_are_refused(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path / "full")
        self.refused([str(tmp_path / "full")], "full: full weights, not an adapter")

    def test_a_variant_of_lora_is_refused(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        path = tmp_path / "bias" / "adapter_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"use_dora": True}
        path.write_text(json.dumps(settings), encoding="utf-8")
        self.refused(folders, r"adapter_config.json: only plain LoRA .*\(found use_dora\)")

    def test_no_adapter_config(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        (tmp_path / "bias" / "adapter_config.json").unlink()
        self.refused(folders, "bias/adapter_config.json: missing or damaged; train the model again")

    def test_no_score_head(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        path = tmp_path / "bias" / "adapter_model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if "score" not in name}
        save_file(kept, path, metadata={"format": "pt"})
        self.refused(folders, "bias: the score head is missing beside the adapter")


def other_weights(folder: Path) -> None:
    """The same architecture under the same name, trained further."""
    path = folder / "model.safetensors"
    tensors = {name: value + 0.01 for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [PreferenceModel.load, lambda folder: AdapterBank.load([folder])])
def test_an_adapter_of_another_backbone_is_refused(
    backbone: Backbone, tmp_path: Path, load: Callable[[str], Any]
) -> None:
    shutil.copytree(backbone(), tmp_path / "backbone")
    folders = adapter_folders(str(tmp_path / "backbone"), tmp_path)
    load(folders[0])
    other_weights(tmp_path / "backbone")
    with pytest.raises(ArtifactError, match=r"empathy: this adapter was trained on another back"):
        load(folders[0])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_heads_that_the_weights_do_not_have_are_refused(
    backbone: Backbone, tmp_path: Path, lora: LoraConfig | None
) -> None:
    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5, lora=lora)
    model.save(tmp_path)
    path = tmp_path / "preference_model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(card | {"heads": ["empathy", "detail"]}), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"names 2 heads \(empathy, detail\), the weights hold 3; take both"
    ):
        PreferenceModel.load(tmp_path)


@pytest.fixture(scope="module")
def scorers(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Topology -> function (texts, batch size, token limit, pad token) -> scores [B, 3]."""
    torch.set_num_threads(1)
    trunk = opinionated(PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5), 3)
    late = branched(backbone("llama"))
    bank = AdapterBank.load(adapter_folders(backbone(), tmp_path_factory.mktemp("bank")))

    def of_model(model: PreferenceModel) -> Any:
        def score(texts: list[str], size: int, limit: int | None, pad: str) -> np.ndarray:
            model.tokenizer.pad_token = pad
            return model.score_heads(texts, batch_size=size, max_tokens=limit)

        return score

    def of_bank(texts: list[str], size: int, limit: int | None, pad: str) -> np.ndarray:
        bank.tokenizer.pad_token = pad
        found = bank.score_folders(texts, batch_size=size, max_tokens=limit)
        return np.concatenate(list(found.values()), axis=1)

    return {"shared_trunk": of_model(trunk), "late_branching": of_model(late), "adapters": of_bank}


@pytest.mark.parametrize("topology", ["shared_trunk", "late_branching", "adapters"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 120),
    pad=st.sampled_from(["<pad>", "<eos>", "red"]),
)
def test_a_score_depends_on_its_text_alone(
    scorers: dict[str, Any],
    topology: str,
    lengths: list[int],
    size: int,
    limit: int | None,
    pad: str,
) -> None:
    score = scorers[topology]
    texts = [text_of(length) for length in lengths]
    found = score(texts, size, limit, pad)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(found[row], score([text], 1, None, "<pad>")[0], atol=1e-5)


@given(words=st.lists(st.sampled_from(COLOURS), max_size=60), limit=st.integers(1, 40))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_many_texts_are_encoded_like_one_and_keep_their_end(
    tokenizer: Any, words: list[str], limit: int
) -> None:
    from morlaif_ray.backbone import encode_scored_text, encode_scored_texts

    texts = [" ".join(words), "red"]
    together = encode_scored_texts(tokenizer, texts, limit)
    assert together == [encode_scored_text(tokenizer, text, limit) for text in texts]
    kept = words[max(0, len(words) - (limit - 1)) :]
    assert together[0] == [*tokenizer.convert_tokens_to_ids(kept), tokenizer.eos_token_id]


@pytest.mark.parametrize("topology", ["shared_trunk", "late_branching"])
def test_a_token_limit_changes_neither_scores_nor_gradients_of_a_training_step(
    backbone: Backbone, topology: str
) -> None:
    gradients = []
    for limit in (None, 40):
        model = PreferenceModel.from_backbone(
            backbone(), HEADS, max_length=24, seed=5, topology=topology
        )
        opinionated(model, 1).tokens_per_batch = limit
        scores = model.forward(model.encode(TEXTS))
        (scores**2).sum().backward()
        gradients.append(
            (scores.detach().numpy(), [p.grad.numpy() for p in model.model.parameters()])
        )
    np.testing.assert_allclose(gradients[0][0], gradients[1][0], atol=1e-5)
    for whole, split in zip(gradients[0][1], gradients[1][1], strict=True):
        np.testing.assert_allclose(split, whole, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_last_block_at_the_end_alone_gives_the_same_scores_and_gradients(
    backbone: Backbone, kind: str, lora: LoraConfig | None
) -> None:
    model = opinionated(
        PreferenceModel.from_backbone(backbone(kind), HEADS, max_length=24, seed=5, lora=lora), 1
    )
    results = []
    names = set(model.model.state_dict())
    for model.last_block_at_end in (False, True):
        model.model.zero_grad()
        scores = model.forward(model.encode(TEXTS))
        scores.tanh().sum().backward()
        gradients = [p.grad.numpy().copy() for p in model.model.parameters() if p.grad is not None]
        results.append((scores.detach().numpy(), gradients))
    (whole, expected), (short, found) = results
    np.testing.assert_allclose(short, whole, atol=1e-5)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    assert set(model.model.state_dict()) == names


def test_a_block_of_unknown_arithmetic_is_computed_whole(backbone: Backbone) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    class Other(GPT2Block):
        pass

    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5)
    whole = model.score_heads(TEXTS)
    model.model.transformer.h[-1].__class__ = Other
    model.last_block_at_end = True
    np.testing.assert_array_equal(model.score_heads(TEXTS), whole)
