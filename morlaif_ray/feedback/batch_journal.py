"""Which batches are at the provider: written down before and after each step, so that a killed driver finds them again.

    <ledger>.batches/<name>.json            state of one submission: written -> uploaded -> submitted -> done
    <ledger>.batches/<name>.input.jsonl     what is uploaded; removed when done
    <ledger>.batches/<name>.requests.jsonl  which questions stand behind its lines; removed when done
    <ledger>.batches/<name>.*.fetched       what came back, while it is read

A submission's name is random and goes to the provider as the batch's metadata. So a driver that was killed between
creating a batch and writing down its id finds that batch by name instead of paying for a second one.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from morlaif_ray.durability import sync_path
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_files import BatchRequest, Entry

State = Literal["written", "uploaded", "submitted", "done"]


@dataclass(frozen=True, slots=True)
class Submission:
    """One batch, from the file on our disk to the answers in the ledger. Holds no key and no text."""

    name: str
    recipe: str
    """Only a run of the same recipe (judge and template) may read its answers."""
    state: State
    num_requests: int
    estimated_usd: float
    attempt: int
    created_s: float
    """Seconds since 1970."""
    file_id: str = ""
    batch_id: str = ""
    outcome: str = ""
    """In words, when done."""


class BatchJournal:
    def __init__(self, ledger_path: Path) -> None:
        self.folder = ledger_path.with_name(ledger_path.name + ".batches")

    def write(self, recipe: str, requests: Sequence[BatchRequest]) -> Submission:
        """Both files and the record of a new submission, on the disk before anything is sent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"morlaif-{uuid.uuid4().hex}"
        _write(self.input_path(name), (request.line + b"\n" for request in requests))
        _write(self._requests_path(name), (_dump(request) for request in requests))
        submission = Submission(
            name,
            recipe,
            "written",
            len(requests),
            sum(request.estimated_usd for request in requests),
            max(request.attempt for request in requests),
            time.time(),
        )
        self.save(submission)
        return submission

    def save(self, submission: Submission) -> None:
        payload = json.dumps(asdict(submission), indent=1).encode()
        _write(self.folder / f"{submission.name}.json", [payload])

    def advance(
        self,
        submission: Submission,
        state: State,
        *,
        file_id: str = "",
        batch_id: str = "",
        outcome: str = "",
    ) -> Submission:
        """The submission in its next state, on the disk when this returns."""
        changed = replace(
            submission,
            state=state,
            file_id=file_id or submission.file_id,
            batch_id=batch_id or submission.batch_id,
            outcome=outcome,
        )
        self.save(changed)
        if state == "done":
            self.input_path(submission.name).unlink(missing_ok=True)
            self._requests_path(submission.name).unlink(missing_ok=True)
            for path in self.folder.glob(f"{submission.name}.*.fetched"):
                path.unlink(missing_ok=True)
        return changed

    def unfinished(self, recipe: str) -> list[Submission]:
        """In the order of their creation; those of other recipes are left for a run that has theirs."""
        found = [entry for entry in self._all() if entry.state != "done" and entry.recipe == recipe]
        return sorted(found, key=lambda entry: entry.created_s)

    def num_foreign(self, recipe: str) -> int:
        """Unfinished submissions of other judges or templates."""
        return sum(entry.state != "done" and entry.recipe != recipe for entry in self._all())

    def requests(
        self, submission: Submission, wanted: Container[str] | None = None
    ) -> Iterator[BatchRequest]:
        """Those with a `custom_id` that is wanted, their lines included, one by one."""
        with (
            self.input_path(submission.name).open("rb") as lines,
            self._requests_path(submission.name).open("rb") as records,
        ):
            for line, record in zip(lines, records, strict=True):
                request = _load(line.rstrip(b"\n"), record)
                if wanted is None or request.custom_id in wanted:
                    yield request

    def index(self, submission: Submission) -> dict[str, BatchRequest]:
        """By custom_id and without their lines: what reading the answers needs."""
        with self._requests_path(submission.name).open("rb") as records:
            found = (_load(b"", record) for record in records)
            return {request.custom_id: request for request in found}

    def fetched_path(self, submission: Submission, kind: str) -> Path:
        """Where an output or error file of the provider lies while it is read."""
        return self.folder / f"{submission.name}.{kind}.fetched"

    def input_path(self, name: str) -> Path:
        return self.folder / f"{name}.input.jsonl"

    def _requests_path(self, name: str) -> Path:
        return self.folder / f"{name}.requests.jsonl"

    def _all(self) -> list[Submission]:
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append(Submission(**json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, TypeError) as error:
                raise FeedbackError(
                    f"{path}: not a readable record of a batch ({error}); move it away, its answers would be asked anew"
                ) from None
        return found


def _dump(request: BatchRequest) -> bytes:
    entries = [[e.key.hex(), e.pair_id, e.principle, e.order] for e in request.entries]
    record = [request.custom_id, request.attempt, request.estimated_usd, entries, request.strength]
    return json.dumps(record).encode() + b"\n"


def _load(line: bytes, record: bytes) -> BatchRequest:
    custom_id, attempt, estimated_usd, entries, *rest = json.loads(record)
    strength = bool(rest and rest[0])  # absent in a record of an older version
    found = tuple(
        Entry(bytes.fromhex(key), pair_id, principle, order)
        for key, pair_id, principle, order in entries
    )
    return BatchRequest(custom_id, line, found, estimated_usd, attempt, strength)


def _write(path: Path, payload: Iterable[bytes]) -> None:
    """Whole or not at all, and on the disk when this returns. FeedbackError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise FeedbackError(
            f"{path}: cannot be written ({error.strerror}); free some space or mend its rights and run the same "
            f"command again"
        ) from error
