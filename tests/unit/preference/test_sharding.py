"""Preference training on two CPU ranks (gloo, FSDP2): the result of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config import parse_config
from morlaif_ray.errors import ConfigError
from morlaif_ray.preference.sharding import current_ranks
from morlaif_ray.preference.stepping import _share_of
from tests import rank_processes
from tests.ports import free_port
from tests.unit.preference.rank_worker import rank_process, train

pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_end_with_the_weights_of_one(
    backbone: Callable[..., str], tmp_path: Path, lora: bool
) -> None:
    assert current_ranks().size == 1
    model, losses = train(backbone(), tmp_path / "one", lora)
    arguments = (free_port(), backbone(), str(tmp_path), lora)
    logs = [tmp_path / f"rank_{rank}.log" for rank in (0, 1)]
    rank_processes.run(rank_process, [(rank, *arguments) for rank in (0, 1)], logs, 300.0)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    np.testing.assert_allclose(result["losses"][0], losses, rtol=1e-5)
    assert result["losses"][1] == result["losses"][0]
    expected = model.model.state_dict()
    assert set(result["weights"]) == set(expected)
    for name, value in expected.items():
        found = result["weights"][name]
        assert torch.equal(result["resumed"][name], found), name
        if name.endswith("attn.c_attn.bias"):
            # Softmax ignores what all keys share: the gradient of their bias is rounding alone, and AdamW, which
            # divides by its size, steps by it as by any other.
            found, value = [torch.stack(each.chunk(3))[[0, 2]] for each in (found, value)]
        torch.testing.assert_close(found, value, atol=2e-4, rtol=1e-3)


def test_shares_of_ranks_are_equally_long_and_hold_every_row_once() -> None:
    rows = np.array([5, 3, 9])
    assert _share_of(rows, 0, 2).tolist() == [5, 9]
    assert _share_of(rows, 1, 2).tolist() == [3, -1]  # -1: no pair
    assert _share_of(rows, 0, 1).tolist() == [5, 3, 9]


def test_trl_trains_in_one_process() -> None:
    settings = {"trainer": "trl", "loss": "margin", "workers_per_trial": 2}
    with pytest.raises(
        ConfigError, match="trains in one process, but workers_per_trial is 2; write 1"
    ):
        parse_config({"preference": settings}, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_tokens_per_batch": 4096},
            "train_tokens_per_batch gives its workers unequal numbers of forwards, so they would wait for each other; "
            "leave it out, or write workers_per_trial: 1",
        ),
        (
            {"last_block_at_end": True},
            "last_block_at_end passes by the blocks that are sharded over its workers; write last_block_at_end: false",
        ),
    ],
)
def test_several_workers_must_compute_in_step(settings: dict[str, Any], message: str) -> None:
    assert parse_config({"preference": settings}, "here").preference.workers_per_trial == 1
    with pytest.raises(ConfigError) as caught:
        parse_config({"preference": {**settings, "workers_per_trial": 2}}, "here")
    assert f"workers_per_trial is 2, and {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
