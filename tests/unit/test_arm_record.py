"""The log of an arm: what a kill may cost, and what is not published."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.arm_record import METRICS_LOG, ArmRecord
from morlaif_ray.errors import ArtifactError

pytestmark = pytest.mark.unit
METRICS = {"reward_mean": 1.0, "kl_mean": 0.5}


def record_in(work: Path, num_steps: int = 3) -> ArmRecord:
    context: Any = SimpleNamespace(
        config=SimpleNamespace(policy=SimpleNamespace(batch_size=4)),
        path=lambda *parts: work.joinpath(*parts),
    )
    arm: Any = SimpleNamespace(name="linear", scalarizer="linear", baseline=None)
    return ArmRecord(context, arm, work, num_steps)


def test_a_disk_that_is_full_while_the_log_is_shortened_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_in(tmp_path)
    for step in (1, 2, 3):
        record.add(step, METRICS, {})
    before = (tmp_path / METRICS_LOG).read_text()

    def full(path: Path, text: str, **_: Any) -> int:
        path.open("w").close()  # opened, and so emptied, before the first byte fails
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(Exception, match=r"[Ss]pace"):
            record_in(tmp_path).go_back(2)
    assert (tmp_path / METRICS_LOG).read_text() == before
    record_in(tmp_path).go_back(2)
    assert (tmp_path / METRICS_LOG).read_text() == "".join(before.splitlines(True)[:2])
    assert not list(tmp_path.glob("*.partial"))


def test_a_log_with_a_gap_is_not_published(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    for step in (1, 3):
        record.add(step, METRICS, {})
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl: no row of step 2; remove "):
        record.publish(np.array([0.0, 1.0]))
    assert not (tmp_path / "metrics.parquet").exists()
    record.go_back(1)
    record.add(2, METRICS, {})
    record.add(3, METRICS, {})
    assert record.publish(np.array([0.0, 1.0]))["num_steps"] == 3
