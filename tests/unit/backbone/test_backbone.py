"""Tokenizers, models from scratch or from disk, and the one dialogue template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from morlaif_ray.backbone import (
    build_scratch_model,
    build_word_tokenizer,
    dialogue_text,
    encode_prompt,
    load_causal_lm,
    load_tokenizer,
    save_pretrained,
    with_leading_space,
)
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.errors import ArtifactError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

SIZE = ScratchModel(width=8, num_layers=1, num_heads=2, max_length=16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_word_tokenizer(["b a a c", "c a"], vocabulary_size=50, max_length=16)


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    save_pretrained(build_scratch_model(SIZE, tokenizer, 0), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def refused(load: Callable[[str], Any], path: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        load(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_words_are_ranked_by_count_then_by_name(tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "c": 4, "b": 5}
    assert tokenizer("a\n\nb  zebra")["input_ids"] == [3, 5, 2]
    assert tokenizer.decode([3, 5, 1], skip_special_tokens=True) == "a b"


def test_the_vocabulary_has_an_upper_bound() -> None:
    small = build_word_tokenizer(["b a a c", "c a"], vocabulary_size=5, max_length=16)
    assert len(small) == 5
    assert small("b")["input_ids"] == [small.unk_token_id]


def test_texts_without_words_make_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="no word to build a vocabulary from"):
        build_word_tokenizer(["", " \n"], vocabulary_size=5, max_length=16)


def test_a_tokenizer_survives_the_disk(tokenizer: Any, folder: Path) -> None:
    loaded = load_tokenizer(str(folder))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    assert loaded("b a zebra")["input_ids"] == [5, 3, 2]


def test_pad_falls_back_to_eos(tokenizer: Any, folder: Path) -> None:
    import json

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["pad_token"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(str(folder)).pad_token_id == 1


def test_a_tokenizer_without_eos_is_refused(folder: Path) -> None:
    import json

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["eos_token"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    refused(load_tokenizer, folder, "the tokenizer has no EOS token; add one and save it again")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refused(load_tokenizer, folder, "the tokenizer is missing; save it beside the model")


def test_weights_from_scratch_depend_on_the_seed_alone(tokenizer: Any) -> None:
    first = build_scratch_model(SIZE, tokenizer, 7).state_dict()
    before = torch.get_rng_state()
    second = build_scratch_model(SIZE, tokenizer, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build_scratch_model(SIZE, tokenizer, 8).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_model_from_scratch_has_the_size_that_was_asked_for(tokenizer: Any) -> None:
    config = build_scratch_model(SIZE, tokenizer, 0).config
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (8, 1, 2, 16)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (6, 0, 1)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)


def test_a_saved_model_comes_back_in_the_wanted_dtype(tokenizer: Any, folder: Path) -> None:
    original = build_scratch_model(SIZE, tokenizer, 0).state_dict()
    for name, value in load_causal_lm(str(folder)).state_dict().items():
        assert torch.equal(value, original[name]), name
    assert load_causal_lm(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(load_causal_lm, tmp_path / "none", "no causal language model could be loaded")
    refused(load_tokenizer, tmp_path / "none", "no tokenizer could be loaded")


def test_weights_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(load_causal_lm, folder, "no causal language model could be loaded")


def test_absent_weights_are_never_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.0.ln_1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(load_causal_lm, folder, "weight 'transformer.h.0.ln_1.weight' of the causal language m")


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(load_causal_lm, folder, "no causal language model could be loaded")


def test_a_response_is_parted_from_its_turn_marker_by_one_space() -> None:
    assert with_leading_space("yes") == with_leading_space(" yes") == " yes"
    assert with_leading_space("") == " "
    assert dialogue_text("\n\nHuman: a\n\nAssistant:", "b") == "\n\nHuman: a\n\nAssistant: b"


@pytest.mark.parametrize(("limit", "kept"), [(9, [3, 4, 5]), (3, [3, 4, 5]), (2, [4, 5]), (0, [])])
def test_a_long_prompt_keeps_its_end(tokenizer: Any, limit: int, kept: list[int]) -> None:
    assert encode_prompt(tokenizer, "a c b", limit) == kept


def test_loaded_weights_lie_where_torch_puts_its_own(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(["red green"], vocabulary_size=20, max_length=16)
    size = ScratchModel(width=32, num_layers=1, num_heads=2, max_length=16)
    save_pretrained(build_scratch_model(size, tokenizer, seed=0), tokenizer, tmp_path)
    model = load_causal_lm(str(tmp_path))
    assert {tensor.data_ptr() % 64 for tensor in model.state_dict().values()} == {0}
    assert model.lm_head.weight is model.transformer.wte.weight
