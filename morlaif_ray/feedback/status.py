"""How a collection of feedback stands, read beside its writer: `morlaif feedback status --run-dir DIR`.

    ledger (read-only) + the driver's note -> read_status -> Status -> describe -> lines for people

SQLite in WAL mode lets readers in while the writer writes. Loads neither Ray nor the judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morlaif_ray.errors import ArtifactError, FeedbackError
from morlaif_ray.feedback.intervals import wilson_interval
from morlaif_ray.feedback.ledger_schema import (
    SCHEMA_VERSION,
    Totals,
    Unconfirmed,
    check_version,
    read_totals,
    read_unconfirmed,
)
from morlaif_ray.types import Interval

RATE_WINDOW_S = 60.0
NEWEST_ROWS = 200_000
"""Agreement and bias are read from so many of the newest answers: a second's work at any ledger size."""
STALE_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The driver's note on a run under way. Produced by `actors.feedback_dispatch`, consumed here."""

    recipe: str
    total: int
    """Questions of the run."""
    done: int
    """Answered or given up."""
    failed: int
    recorded_before: int
    """Answers that the ledger held when the run started."""
    started_s: float
    """Unix time, as is `updated_s`."""
    updated_s: float
    running: bool
    last_error: str
    condition: str
    """One line where the circuit breaker is open; else empty."""


@dataclass(frozen=True, slots=True)
class PrincipleStatus:
    name: str
    answers: int
    mean_position_bias: float
    """Nats in favour of the first-given response; NaN before a pair was answered in both orders."""
    human_agreement: Interval
    """The judge's sign against people's, over pairs answered in both orders."""


@dataclass(frozen=True, slots=True)
class Status:
    progress: Progress | None
    totals: Totals
    rate_per_min: float
    """Answers of the last minute."""
    principles: tuple[PrincipleStatus, ...]
    errors: tuple[tuple[str, int], ...]
    """(error in words, how often) of the questions without an answer, the newest first."""
    unconfirmed: tuple[Unconfirmed, ...] = ()
    """Requests that may have been billed although no answer came, by reason."""

    @property
    def left(self) -> int | None:
        return None if self.progress is None else max(0, self.progress.total - self.progress.done)

    @property
    def eta_s(self) -> float:
        """Seconds to the end at the last minute's rate; NaN where that is not known."""
        if self.left is None or self.rate_per_min <= 0.0:
            return math.nan
        return self.left / self.rate_per_min * 60.0


def read_status(
    ledger_path: Path,
    progress_path: Path,
    labels: Mapping[str, float],
    now_s: float | None = None,
) -> Status:
    """ArtifactError where there is no ledger, FeedbackError where it cannot be read.

    Args:
        labels: pair_id -> human label (1.0 for response_a), NaN or absent where no one was asked.
    """
    now_s = time.time() if now_s is None else now_s
    if not ledger_path.is_file():
        raise ArtifactError(f"{ledger_path}: no ledger here; has stage 2_feedback begun?")
    progress = read_progress(progress_path)
    with _opened(ledger_path) as db:
        recipe = _recipe_id(db, progress)
        return Status(
            progress,
            read_totals(db),
            _rate_per_min(db, now_s),
            _principles(db, recipe, labels),
            _errors(db),
            read_unconfirmed(db),
        )


def read_progress(path: Path) -> Progress | None:
    """The driver's note; None where there is none yet or it is of another version."""
    from morlaif_ray.artifacts import read_json

    try:
        raw: Any = read_json(path)
    except ArtifactError:
        return None
    names = {field.name for field in dataclasses.fields(Progress)}
    return Progress(**raw) if isinstance(raw, dict) and set(raw) == names else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)
        ) as db:
            version = check_version(db, path)
            if version < SCHEMA_VERSION:
                raise FeedbackError(
                    f"{path}: ledger of version {version}; the next run brings it to {SCHEMA_VERSION}"
                )
            yield db
    except sqlite3.Error as error:
        raise FeedbackError(f"{path}: cannot be read ({error})") from error


def _recipe_id(db: sqlite3.Connection, progress: Progress | None) -> int:
    """The recipe of the run, or the newest of the ledger; 0 where there is none."""
    wanted = progress.recipe if progress is not None else None
    row = db.execute(
        "SELECT id FROM recipes WHERE recipe = ? OR ? IS NULL ORDER BY id DESC", (wanted, wanted)
    ).fetchone()
    return int(row[0]) if row else 0


def _rate_per_min(db: sqlite3.Connection, now_s: float) -> float:
    # Rows stand in the order of arrival, so the newest are the last ids.
    newest = f"SELECT created_s FROM answers ORDER BY id DESC LIMIT {NEWEST_ROWS}"
    count, oldest = db.execute(
        f"SELECT count(*), min(created_s) FROM ({newest}) WHERE created_s > ?",
        (now_s - RATE_WINDOW_S,),
    ).fetchone()
    if not count:
        return 0.0
    # A run that began seconds ago is not slow: count from its first answer, but no less than a second.
    window_s = max(1.0, min(RATE_WINDOW_S, now_s - oldest))
    return int(count) * 60.0 / float(window_s)


def _principles(
    db: sqlite3.Connection, recipe: int, labels: Mapping[str, float]
) -> tuple[PrincipleStatus, ...]:
    rows = db.execute(
        f"SELECT principle, pair_id, slot, log_odds FROM answers WHERE recipe = ? ORDER BY id DESC LIMIT {NEWEST_ROWS}",
        (recipe,),
    )
    half: dict[tuple[str, str], tuple[str, float]] = {}
    found: dict[
        str, list[float]
    ] = {}  # name -> [answers, pairs, sum of biases, agreeing, labelled]
    for principle, pair_id, slot, log_odds in rows:
        sums = found.setdefault(principle, [0, 0, 0.0, 0, 0])
        sums[0] += 1
        if log_odds is None:
            continue
        other = half.pop((principle, pair_id), None)
        if other is None or other[0] == slot:
            half[principle, pair_id] = slot, log_odds
            continue
        ab, ba = (log_odds, other[1]) if slot == "ab" else (other[1], log_odds)
        sums[1] += 1
        sums[2] += (ab + ba) / 2.0
        label = labels.get(pair_id, math.nan)
        if not math.isnan(label) and label != 0.5 and ab != ba:
            sums[3] += (ab > ba) == (label > 0.5)
            sums[4] += 1
    return tuple(
        PrincipleStatus(
            name,
            int(answers),
            bias / pairs if pairs else math.nan,
            wilson_interval(int(agreeing), int(labelled)),
        )
        for name, (answers, pairs, bias, agreeing, labelled) in sorted(found.items())
    )


def _errors(db: sqlite3.Connection) -> tuple[tuple[str, int], ...]:
    rows = db.execute(
        "SELECT error, count(*) FROM failures GROUP BY error ORDER BY max(created_s) DESC LIMIT 5"
    )
    return tuple((str(error), int(count)) for error, count in rows)


# ---------------------------------------------------------------- in words


def describe(status: Status, now_s: float | None = None) -> list[str]:
    """The status as lines for people."""
    now_s = time.time() if now_s is None else now_s
    lines = [*_progress_lines(status, now_s), _money_line(status.totals)]
    lines += _doubt_lines(status.unconfirmed)
    if status.principles:
        lines.append("principle              answers   position bias   agreement with people (95%)")
    for entry in status.principles:
        bias, human = entry.mean_position_bias, entry.human_agreement
        bias_text = "-" if math.isnan(bias) else f"{bias:+.3f} nats"
        human_text = (
            f"{human.value:.1%} ({human.low:.1%} to {human.high:.1%}, {human.num} pairs)"
            if human.num
            else "-"
        )
        lines.append(f"{entry.name:22s} {entry.answers:7d}   {bias_text:13s}   {human_text}")
    if status.errors:
        lines.append("without an answer so far (asked again by the next round or run):")
    lines += [f"  {count} x {error}" for error, count in status.errors]
    return lines


def _progress_lines(status: Status, now_s: float) -> list[str]:
    progress = status.progress
    if progress is None:
        return [f"{status.totals.answers} answers in the ledger; no run has noted its progress yet"]
    age_s = now_s - progress.updated_s
    if not progress.running:
        state = "ended" if status.left == 0 else "stopped; the same command goes on"
    elif age_s > STALE_AFTER_S:
        state = f"no sign of life for {duration(age_s)}; if it died, the same command goes on"
    else:
        state = "running"
    share = progress.done / progress.total if progress.total else 1.0
    lines = [
        f"{state}: {progress.done} of {progress.total} questions done ({share:.1%}), {status.left} left, "
        f"{progress.failed} failed"
    ]
    if state == "running":
        eta = "unknown" if math.isnan(status.eta_s) else f"about {duration(status.eta_s)}"
        lines.append(
            f"{status.rate_per_min:,.0f} answers/min over the last minute; time left: {eta}"
        )
    if progress.condition:
        lines.append(progress.condition)
    if progress.last_error:
        lines.append(f"last failed attempt: {progress.last_error}")
    return lines


def _money_line(totals: Totals) -> str:
    line = (
        f"spent ${totals.cost_usd:,.4f} on {totals.answers} answers in this ledger "
        f"({totals.prompt_tokens:,} prompt and {totals.completion_tokens:,} completion tokens)"
    )
    if totals.cache_discount_usd or totals.batch_discount_usd:
        line += (
            f"; list price ${totals.list_usd:,.4f}, less ${totals.cache_discount_usd:,.4f} for the prompt cache "
            f"and ${totals.batch_discount_usd:,.4f} for the Batch API"
        )
    return line


def doubts_in_words(ledger_path: Path) -> list[str]:
    """What may have been billed beside what is known, in one line; none where there is no doubt."""
    with _opened(ledger_path) as db:
        return _doubt_lines(read_unconfirmed(db))


def _doubt_lines(unconfirmed: Sequence[Unconfirmed]) -> list[str]:
    requests = sum(entry.requests for entry in unconfirmed)
    if not requests:
        return []
    usd = sum(entry.usd for entry in unconfirmed)
    reasons = "; ".join(f"{entry.requests} x {entry.doubt}" for entry in unconfirmed)
    return [
        f"possibly ${usd:,.4f} more, at most: {requests} requests were sent and no answer came, so whether they were "
        f"billed is not known ({reasons}); budget_usd counts them"
    ]


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60.0)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
