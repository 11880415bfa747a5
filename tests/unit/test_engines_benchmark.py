"""The engines' benchmark: equal lengths are equal in every engine, and its figures are those of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ppo_engines
from benchmarks.ppo_workload import TINY, make_workload

pytestmark = pytest.mark.unit


def test_where_eos_is_impossible_every_response_fills_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BATCH", 6), ("ROUNDS", 1), ("NEW_TOKENS", 12)):
        monkeypatch.setattr(ppo_engines, name, value)
    make_workload(tmp_path, TINY, topology="shared_trunk", mean_response_tokens=3.0)
    varying = ppo_engines.measure("ours", tmp_path, "float32")
    assert 1.0 <= varying["tokens_each"] < 12.0
    ppo_engines._make_endless(tmp_path / "0_sft" / "model", "float32")
    for engine in ppo_engines.ENGINES[:2]:
        row = ppo_engines.measure(engine, tmp_path, "float32")
        assert row["tokens_each"] == 12.0, engine
        assert row["tokens_per_s"] > 0.0


@pytest.mark.parametrize("with_vllm", [True, False])
def test_the_ratio_is_that_of_lengths_that_vary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_vllm: bool,
) -> None:
    rates = {"ours": 300.0, "transformers.generate": 200.0, "vllm": 250.0}

    def fake(engine: str, folder: Path, dtype: str) -> dict[str, float]:
        factor = 2.0 if folder.name == "equal" else 1.0
        made = factor * rates[engine]
        return {
            "tokens_per_s": made,
            "tokens_per_cpu_s": made,
            "tokens_each": 9.0,
            "threads": 1.0,
        }

    monkeypatch.setattr(ppo_engines, "_in_own_process", fake)
    figures: dict[str, Any] = ppo_engines.compare_engines(tmp_path, TINY, with_vllm=with_vllm)
    engines = ppo_engines.ENGINES if with_vllm else ppo_engines.ENGINES[:2]
    assert figures["rollout_tokens_per_s"] == {
        "equal": {name: round(2 * rates[name]) for name in engines},
        "varying": {name: round(rates[name]) for name in engines},
    }
    assert figures["rollout_ratio_vllm_vs_generate"] == (1.25 if with_vllm else None)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 2 * len(engines) + int(with_vllm)
    if with_vllm:
        assert shown[-1].endswith("transformers is 1.20 times as fast as vllm")
