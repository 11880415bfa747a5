"""The table of sample responses in the tracker: any text stays within its cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.tracking import TensorBoardTracker, markdown_table

pytestmark = [pytest.mark.unit]


def test_text_cannot_leave_its_cell() -> None:
    table = markdown_table(["prompt", "reward"], [["a|b\nc", "0.10"], ["<img src=x>", "-1.00"]])
    assert table.splitlines() == [
        "| prompt | reward |",
        "| --- | --- |",
        "| a&#124;b<br>c | 0.10 |",
        "| &lt;img src=x&gt; | -1.00 |",
    ]


def test_tensorboard_gets_the_table_at_its_step(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorBoardTracker(tmp_path)
    tracker.log_table(25, "samples", ["prompt"], [["what is a lamp?"]])
    tracker.close()
    events = loader.EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 25
    assert b"what is a lamp?" in event.tensor_proto.string_val[0]
