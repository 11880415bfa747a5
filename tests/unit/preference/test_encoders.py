"""Encoders as preference models: scored by their own classification class, nothing made up when loaded."""

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
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from morlaif_ray.backbone import save_pretrained
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.preference import AdapterBank, PreferenceModel
from morlaif_ray.preference.training import TrainingData, train_preference_model
from morlaif_ray.preference.trl_training import train_with_trl

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

COLOURS = ("red", "green", "blue", "sun", "moon", "star")
HEADS = ("empathy", "detail", "bias")
LORA = LoraConfig(rank=2)
KINDS = ("bert", "roberta", "modernbert")
Backbone = Callable[..., str]
TEXTS = [
    f"\n\nHuman: {' '.join(COLOURS[i % 6] for i in range(n))}\n\nAssistant: {COLOURS[n % 6]} good"
    for n in (1, 9, 3, 14, 5, 2, 7)
]
CLASSES: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertForMaskedLM),  # whose files hold no pooler
    "roberta": (RobertaConfig, RobertaModel),
    "modernbert": (ModernBertConfig, ModernBertModel),
    "deberta": (DebertaV2Config, DebertaV2Model),
    "bart": (BartConfig, BartModel),
}


@pytest.fixture(scope="session")
def framing_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Human:", "Assistant:", "good", *COLOURS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **names
    )


@pytest.fixture(scope="session")
def encoder(framing_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """`encoder("bert")`: folder of a saved model without a score head."""
    root = tmp_path_factory.mktemp("encoders")

    def make(kind: str = "bert") -> str:
        folder: Path = root / kind
        if folder.exists():
            return str(folder)
        config_class, model_class = CLASSES[kind]
        positions = 26 if kind == "roberta" else 24  # its positions begin at 1 + padding index
        special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        if kind == "deberta":  # its projections also see the table of relative positions
            special |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
            special |= {"share_att_key": True, "position_buckets": 4}
        if kind == "modernbert":
            special |= {"cls_token_id": 2, "sep_token_id": 3}
        sizes = dict.fromkeys(("hidden_size", "d_model"), 16) | dict.fromkeys(
            ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 24
        )
        layers = dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers"), 2)
        torch.manual_seed(1)
        model = model_class(
            config_class(
                vocab_size=len(framing_tokenizer),
                num_attention_heads=2,
                max_position_embeddings=positions,
                **sizes,
                **layers,
                **special,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
        save_pretrained(model, framing_tokenizer, folder)
        return str(folder)

    return make


def make(
    path: str, heads: tuple[str, ...] = HEADS, seed: int = 1, **options: Any
) -> PreferenceModel:
    """A model whose head and adapters have opinions."""
    model = PreferenceModel.from_backbone(path, heads, max_length=24, seed=5, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if any(part in name for part in ("lora_", "classifier", "pooler", "head.")):
                scale = 0.05 if "lora_" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.model.eval()
    return model


def plain_scores(model: Any, folder: Path, text: str) -> np.ndarray:
    """The way a stranger scores: transformers' own tokenizer and logits."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**tokens).logits[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_the_text_alone(encoder: Backbone, kind: str) -> None:
    model = make(encoder(kind))
    scores = model.score_heads(TEXTS)
    assert scores.shape == (7, 3)
    assert float(scores.std(axis=0).min()) > 0.002  # far above the tolerance
    for size in (1, 3):
        np.testing.assert_allclose(model.score_heads(TEXTS, batch_size=size), scores, atol=1e-5)
    np.testing.assert_allclose(model.score_heads(TEXTS[::-1])[::-1], scores, atol=1e-5)
    np.testing.assert_array_equal(model.raw_scores(TEXTS, [2, 0]), scores[:, [2, 0]])


def test_a_long_dialogue_keeps_its_end_between_cls_and_sep(
    encoder: Backbone, framing_tokenizer: Any
) -> None:
    model = PreferenceModel.from_backbone(encoder(), ["a"], max_length=5, seed=0)
    ids = model.encode(["red green blue sun moon", "red"])
    words = [framing_tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert words == [["[CLS]", "blue", "sun", "moon", "[SEP]"], ["[CLS]", "red", "[SEP]"]]


@pytest.mark.parametrize(("kind", "positions"), [("bert", 24), ("roberta", 25)])
def test_a_text_never_exceeds_the_positions(encoder: Backbone, kind: str, positions: int) -> None:
    model = PreferenceModel.from_backbone(encoder(kind), ["a"], max_length=512, seed=0)
    assert len(model.encode(["red " * 600])[0]) == model.max_length == positions
    assert np.isfinite(model.score(["red " * 600])).all()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_gives_the_same_bits_and_plain_libraries_load_it(
    encoder: Backbone, tmp_path: Path, kind: str, lora: LoraConfig | None
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    model = make(encoder(kind), lora=lora)
    scores = model.score_heads(TEXTS)
    model.save(tmp_path)
    loaded = PreferenceModel.load(tmp_path)
    np.testing.assert_array_equal(loaded.score_heads(TEXTS), scores)
    assert (loaded.heads, loaded.max_length) == (model.heads, model.max_length)
    if lora is None:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert plain.config.id2label == dict(enumerate(HEADS))
    else:
        assert not (tmp_path / "model.safetensors").exists()
        plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    for row in (0, 1, 3):
        np.testing.assert_allclose(
            plain_scores(plain, tmp_path, TEXTS[row]), scores[row], atol=1e-5
        )


@pytest.mark.parametrize("kind", [*KINDS, "deberta"])
def test_a_bank_scores_every_adapter_as_it_scores_alone(
    encoder: Backbone, tmp_path: Path, kind: str
) -> None:
    folders = [str(tmp_path / name) for name in HEADS]
    for seed, (name, folder) in enumerate(zip(HEADS, folders, strict=True)):
        make(encoder(kind), (name,), seed, lora=LORA).save(folder)
    alone = {folder: PreferenceModel.load(folder).score_heads(TEXTS) for folder in folders}
    assert float(np.abs(alone[folders[0]] - alone[folders[1]]).max()) > 0.01
    bank = AdapterBank.load(folders)
    for wanted in (folders, [folders[2], folders[0]]):
        scores = bank.score_folders(TEXTS, wanted)
        assert list(scores) == wanted
        for folder in wanted:
            np.testing.assert_allclose(scores[folder], alone[folder], atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.0)], ids=["full", "lora"])
def test_it_learns_which_word_is_better(
    encoder: Backbone, tmp_path: Path, lora: LoraConfig | None
) -> None:
    first = [f"Human: {word}\n\nAssistant: red" for word in COLOURS] * 4
    second = [text.replace("Assistant: red", "Assistant: moon") for text in first]
    log_odds = np.column_stack([np.full(24, 3.0), np.full(24, -3.0)])
    model = PreferenceModel.from_backbone(encoder(), ["a", "b"], max_length=24, seed=0, lora=lora)
    data = TrainingData(first, second, log_odds, [str(i) for i in range(24)])
    recipe = PreferenceConfig(
        topology="shared_trunk", num_epochs=12, batch_size=8, learning_rate=1e-2, warmup_steps=2
    )
    history = train_preference_model(model, data, recipe, seed=0, checkpoint_dir=tmp_path)
    assert history[-1].loss < 0.5 * history[0].loss
    gap = model.score_heads(first) - model.score_heads(second)
    assert (gap[:, 0] > 0).all()
    assert (gap[:, 1] < 0).all()


class TestRefused:
    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            PreferenceModel.load(folder)
        assert "\n" not in str(caught.value)

    def drop(self, path: Path, name: str) -> None:
        tensors = load_file(path)
        kept = {key: value for key, value in tensors.items() if name not in key}
        assert len(kept) < len(tensors)
        save_file(kept, path, metadata={"format": "pt"})

    @pytest.mark.parametrize("name", ["classifier.weight", "bert.pooler.dense.bias"])
    def test_a_folder_without_its_score_head(
        self, encoder: Backbone, tmp_path: Path, name: str
    ) -> None:
        make(encoder()).save(tmp_path)
        self.drop(tmp_path / "model.safetensors", name)
        self.refused(tmp_path, f"weight '{name}' of the preference model is missing")

    @pytest.mark.parametrize("name", ["classifier.bias", "bert.pooler.dense.weight"])
    def test_an_adapter_without_its_score_head(
        self, encoder: Backbone, tmp_path: Path, name: str
    ) -> None:
        make(encoder(), ("a",), lora=LORA).save(tmp_path)
        self.drop(tmp_path / "adapter_model.safetensors", name)
        self.refused(tmp_path, "the score head is missing beside the adapter")
        with pytest.raises(ArtifactError, match="the score head is missing beside the adapter"):
            AdapterBank.load([tmp_path])

    def test_another_number_of_heads(self, encoder: Backbone, tmp_path: Path) -> None:
        make(encoder()).save(tmp_path)
        path = tmp_path / "preference_model.json"
        card = json.loads(path.read_text(encoding="utf-8")) | {"heads": ["a"]}
        path.write_text(json.dumps(card), encoding="utf-8")
        self.refused(tmp_path, r"names 1 heads \(a\), the weights hold 3")

    def test_late_branching(self, encoder: Backbone) -> None:
        with pytest.raises(
            ConfigError, match=r"late_branching knows GPT-2.* not BertModel; use sh"
        ):
            make(encoder(), topology="late_branching")

    def test_an_encoder_decoder(self, encoder: Backbone) -> None:
        with pytest.raises(ConfigError, match="BartForSequenceClassification cannot be a pref"):
            PreferenceModel.from_backbone(encoder("bart"), ["a"], max_length=24, seed=0)

    def test_a_tokenizer_of_a_decoder(
        self, encoder: Backbone, tokenizer: Any, tmp_path: Path
    ) -> None:
        shutil.copytree(encoder("modernbert"), tmp_path, dirs_exist_ok=True)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ArtifactError, match=r"must begin a text with its \[CLS\] and end it"):
            PreferenceModel.from_backbone(str(tmp_path), ["a"], max_length=24, seed=0)

    def test_trl_whose_score_is_that_of_the_last_token(
        self, encoder: Backbone, tmp_path: Path
    ) -> None:
        data = TrainingData(["red"], ["moon"], np.array([[1.0]]), ["a"])
        recipe = PreferenceConfig(trainer="trl", loss="margin")
        with pytest.raises(ConfigError, match="backbone is an encoder; write trainer: own"):
            train_with_trl(
                lambda: make(encoder(), ("a",)), data, recipe, seed=0, checkpoint_dir=tmp_path
            )
