"""What a batch may have cost although no answer came is counted, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from morlaif_ray.feedback.batch_doubt import record_doubt
from morlaif_ray.feedback.batch_files import NO_LINE, BatchRequest, Entry
from morlaif_ray.feedback.client import AttemptError
from morlaif_ray.feedback.ledger import Ledger

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def request(number: int) -> BatchRequest:
    key = number.to_bytes(16, "big")
    return BatchRequest(key.hex(), b"", (Entry(key, "pair", "detail", "ab"),), 0.5)


@pytest.mark.parametrize(("completed", "usd"), [(True, 1.0), (False, 0.5)])
def test_unreadable_lines_count_once_and_refused_or_expired_ones_not_at_all(
    tmp_path: Path, completed: bool, usd: float
) -> None:
    requests = {one.custom_id: one for one in map(request, range(4))}
    unreadable, absent, refused, _ = requests
    failed = {
        unreadable: AttemptError("malformed", "the batch line has no body"),
        absent: AttemptError("server", NO_LINE),
        refused: AttemptError("server", "told to fail"),
    }
    ledger = Ledger(tmp_path / "feedback.sqlite")
    ledger.register("recipe", "{}", "template")
    for _ in range(2):  # a driver that dies before it has noted the batch as done reads it again
        record_doubt(ledger, "recipe", "batch-1", requests, failed, completed=completed)
        assert sum(entry.usd for entry in ledger.unconfirmed) == usd
    assert ledger.possibly_spent_usd == usd
    assert ledger.spent_usd == 0.0
    ledger.close()
