"""Packed texts and stacked adapters: the arithmetic of padded rows and of one adapter, in another order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from morlaif_ray.backbone.packing import KINDS, Packing, can_pack, packed, use_packing
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.preference import AdapterBank, PreferenceModel
from morlaif_ray.preference.stacked import Chosen, StackedLora

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

LENGTHS = (3, 1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_the_states_of_each_text_alone(kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    extra = {"num_key_value_heads": 1} if kind != "gpt2" else {}
    settings = AutoConfig.for_model(
        kind, vocab_size=20, intermediate_size=24, pad_token_id=0, **sizes, **extra
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(settings).eval()
    assert can_pack(model.config, max_length=8)
    ids = [torch.randint(1, 20, (length,)).tolist() for length in LENGTHS]
    with torch.no_grad():
        alone = [model(torch.tensor([row])).last_hidden_state[0] for row in ids]
        use_packing(model)
        tokens, positions, packing = packed(ids, "cpu")
        row = model(tokens, position_ids=positions, packing=packing).last_hidden_state[0]
    torch.testing.assert_close(row, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["text_by_text", "side_by_side"])
@pytest.mark.parametrize("at_end", [False, True])
def test_attention_stays_inside_each_text_of_each_copy(way: str, at_end: bool) -> None:
    torch.manual_seed(0)
    packing = Packing((0, 3, 4, 8), times=2)
    query, key, value = (torch.randn(1, heads, 16, 4) for heads in (4, 2, 2))
    expected = []
    for start, end in ((0, 3), (3, 4), (4, 8), (8, 11), (11, 12), (12, 16)):
        mine = [states[:, :, start:end] for states in (query, key, value)]
        whole = F.scaled_dot_product_attention(*mine, is_causal=True, scale=0.3, enable_gqa=True)
        expected.append(whole.transpose(1, 2)[:, -1:] if at_end else whole.transpose(1, 2))
    assert packing.last.tolist() == [2, 3, 7, 10, 11, 15]
    if at_end:
        query = query[:, :, packing.last]
    found = getattr(packing, way)(query, key, value, 0.3, at_end)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", [nn.Linear(6, 10), nn.Linear(6, 10, bias=False), Conv1D(10, 6)])
@pytest.mark.parametrize("tokens", [2, 40])
def test_merged_weights_give_what_the_low_rank_terms_give(base: nn.Module, tokens: int) -> None:
    torch.manual_seed(0)
    down, up, rows = torch.randn(4, 6, 2), torch.randn(4, 2, 10), torch.randn(2, tokens, 6)
    chosen = Chosen(4)
    layer = StackedLora(base, down, up, chosen)
    assert layer._worth_merging(rows) == (tokens == 40)
    for wanted in ([1, 2], [3, 0]):
        chosen.rows = wanted
        with torch.no_grad():
            found = layer(rows.reshape(1, -1, 6)).reshape(2, tokens, 10)
            expected = base(rows) + rows @ down[wanted] @ up[wanted]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "bloom"}, False),
        ({"model_type": "mistral", "sliding_window": 31}, False),
        ({"model_type": "mistral", "sliding_window": 32}, True),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, False),
    ],
)
def test_only_plain_causal_attention_is_packed(settings: dict[str, Any], expected: bool) -> None:
    assert can_pack(SimpleNamespace(**settings), max_length=32) == expected


@pytest.mark.parametrize("how", ["one adapter at a time", "padded"])
def test_every_way_through_a_bank_gives_the_same_scores(
    backbone: Callable[..., str], tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["red sun moon star", "green", "blue sun " * 10]
    for seed in (1, 2, 3):
        model = PreferenceModel.from_backbone(
            backbone(), ["good"], max_length=24, seed=seed, lora=LoraConfig(rank=2)
        )
        torch.manual_seed(seed)
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.save(tmp_path / str(seed))
    folders = sorted(map(str, tmp_path.iterdir()))
    whole = AdapterBank.load(folders).score_folders(texts)
    if how == "padded":  # a backbone whose attention is not known
        monkeypatch.setattr("morlaif_ray.backbone.packing.KINDS", ())
    monkeypatch.setattr("morlaif_ray.preference.stacked.CPU_TOKENS", 1)
    bank = AdapterBank.load(folders)
    assert (bank._tail is None) == (how == "padded")
    for folder, scores in bank.score_folders(texts).items():
        np.testing.assert_allclose(scores, whole[folder], atol=1e-5)
