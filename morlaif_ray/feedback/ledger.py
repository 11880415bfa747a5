"""The durable ledger: every answer of the judge, keyed by content, so nothing is paid twice.

    Ledger(path) -> lookup(keys) -> announce(intents) -> append(rows, failures, settled)

SQLite in WAL mode with one writer. A file lock beside it refuses a second writer in one line; the lock ends with the
process that holds it, so a crash leaves nothing to clean up. Appending the same key twice keeps the first answer.
Questions that failed are listed apart and never count as answered: the next run asks them again.
Requests are announced before they are sent (`intents`): what a killed process left open is listed as unconfirmed.
The log-probabilities are kept as they came, so answers can be read anew under other thresholds without paying.
The path must be on a local disk of the machine that opens it (SQLite's WAL does not work over network file systems).
"""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.ledger_schema import (
    Totals,
    Unconfirmed,
    prepare,
    read_totals,
    read_unconfirmed,
)

LOOKUP_CHUNK = 1000
KILLED = "in flight when a process died"


class LedgerRow(NamedTuple):
    """One answer. Produced by the answering loop, stored as it stands."""

    key: bytes
    pair_id: str
    principle: str
    slot: str
    log_odds: float
    """NaN (NULL on disk) when the answer is unreadable."""
    mass: float
    reason: str
    logprobs: str
    """JSON object token -> log-probability."""
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_s: float
    attempts: int
    cached_tokens: int = 0
    """Prompt tokens that the provider served from its prefix cache."""
    cache_discount_usd: float = 0.0
    """What the prompt cache took off the list price; `cost_usd` is after both discounts."""
    batch_discount_usd: float = 0.0


class FailureRow(NamedTuple):
    """One question that got no answer."""

    key: bytes
    pair_id: str
    principle: str
    slot: str
    error: str
    attempts: int


class StoredAnswer(NamedTuple):
    """What a run needs of a recorded answer."""

    log_odds: float
    mass: float
    reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    cached_tokens: int = 0
    cache_discount_usd: float = 0.0
    batch_discount_usd: float = 0.0


class Ledger:
    """Open it in one process; FeedbackError where another holds it, or it is damaged or from a newer version.

    Args:
        run: names the run whose requests may still be in flight, where the writer alone was restarted.
    """

    def __init__(self, path: Path, *, lock_wait_s: float = 10.0, run: str = "") -> None:
        self.path = path
        self._run = run
        with _explain(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(path, lock_wait_s)
            try:
                self._db = _connect(path)
            except BaseException:
                os.close(self._lock)
                raise
        self._recipes: dict[str, int] = dict(self._db.execute("SELECT recipe, id FROM recipes"))
        self._totals = read_totals(self._db)
        self._doubt_all_but(run)

    def close(self) -> None:
        """Folds the write-ahead log into the file and lets the next run in."""
        self._doubt_all_but("")
        with _explain(self.path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()
        os.close(self._lock)

    def register(self, recipe: str, judge: str, template: str) -> None:
        """Notes which judge and template a recipe hash stands for; needed before appending under it."""
        with _explain(self.path), self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO recipes (recipe, judge, template) VALUES (?, ?, ?)",
                (recipe, judge, template),
            )
        self._recipes = dict(self._db.execute("SELECT recipe, id FROM recipes"))

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]:
        """The recorded answers among `keys`; absent keys are simply not in the result."""
        found: dict[bytes, StoredAnswer] = {}
        nan = float("nan")
        with _explain(self.path):
            for start in range(0, len(keys), LOOKUP_CHUNK):
                chunk = keys[start : start + LOOKUP_CHUNK]
                marks = ",".join("?" * len(chunk))
                cursor = self._db.execute(
                    f"SELECT key, {', '.join(StoredAnswer._fields)} FROM answers WHERE key IN ({marks})",
                    chunk,
                )
                for key, log_odds, *rest in cursor:
                    found[key] = StoredAnswer(nan if log_odds is None else log_odds, *rest)
        return found

    def recorded(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each of `keys` has an answer."""
        known: set[bytes] = set()
        with _explain(self.path):
            for start in range(0, len(keys), LOOKUP_CHUNK):
                chunk = keys[start : start + LOOKUP_CHUNK]
                marks = ",".join("?" * len(chunk))
                found = self._db.execute(f"SELECT key FROM answers WHERE key IN ({marks})", chunk)
                known.update(key for (key,) in found)
        return [key in known for key in keys]

    def announce(self, intents: Sequence[Intent]) -> None:
        """Notes requests that are about to be sent; on the disk when this returns. Repeating it changes nothing."""
        with _explain(self.path), self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO intents VALUES (?, ?, ?, ?)",
                [(*intent, self._run) for intent in intents],
            )

    def append(
        self,
        recipe: str,
        rows: Sequence[LedgerRow],
        failures: Sequence[FailureRow] = (),
        settled: Sequence[Settled] = (),
    ) -> None:
        """Commits all of it or nothing. Repeating a call changes nothing (a re-sent batch is harmless)."""
        recipe_id = self._recipes[recipe]
        now = time.time()
        with _explain(self.path):
            with self._db:
                self._settle(settled)
                fresh = self._unrecorded(rows)
                self._db.executemany(_INSERT, [(*row, recipe_id, now) for row in fresh])
                totals = self._totals.plus(
                    len(fresh), *(sum(column) for column in zip(*map(_amounts, fresh), strict=True))
                )
                if fresh:
                    self._db.execute(_UPDATE_TOTALS, totals)
                self._db.executemany(
                    f"INSERT OR REPLACE INTO failures VALUES ({','.join('?' * 6)},{now!r})",
                    failures,
                )
                if rows and self._has_failures():
                    self._db.executemany(
                        "DELETE FROM failures WHERE key = ?", [(row.key,) for row in rows]
                    )
            self._totals = totals

    @property
    def totals(self) -> Totals:
        """Sums over everything that this ledger has ever recorded, over all runs that shared it."""
        return self._totals

    @property
    def spent_usd(self) -> float:
        return self._totals.cost_usd

    @property
    def unconfirmed(self) -> tuple[Unconfirmed, ...]:
        """Requests that may have been billed although no answer came, by reason."""
        return read_unconfirmed(self._db)

    @property
    def possibly_spent_usd(self) -> float:
        """The most that the provider may have billed, as far as estimates are high: what a budget must count with."""
        return self.spent_usd + sum(entry.usd for entry in self.unconfirmed)

    @property
    def open_usd(self) -> float:
        """The estimates of the requests that are announced and not settled: what is in flight, or waits to be."""
        return float(self._db.execute("SELECT total(usd) FROM intents").fetchone()[0])

    def num_answers(self) -> int:
        return self._totals.answers

    def failures(self) -> list[tuple[str, int]]:
        """(error, how often) of the questions without an answer, most frequent first."""
        cursor = self._db.execute(
            "SELECT error, count(*) FROM failures GROUP BY error ORDER BY 2 DESC, 1"
        )
        return [(str(error), int(count)) for error, count in cursor]

    def _settle(self, settled: Sequence[Settled]) -> None:
        doubtful = [(entry.doubt, time.time(), entry.ticket) for entry in settled if entry.doubt]
        if doubtful:
            self._db.executemany(
                "INSERT OR IGNORE INTO unconfirmed SELECT ticket, key, usd, ?, ? FROM intents WHERE ticket = ?",
                doubtful,
            )
        if settled:
            tickets = [(entry.ticket,) for entry in settled]
            self._db.executemany("DELETE FROM intents WHERE ticket = ?", tickets)

    def _doubt_all_but(self, run: str) -> None:
        """Requests that nobody is left to settle may have been billed."""
        with _explain(self.path), self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO unconfirmed SELECT ticket, key, usd, ?, ? FROM intents "
                "WHERE run <> ? OR run = ''",
                (KILLED, time.time(), run),
            )
            self._db.execute("DELETE FROM intents WHERE run <> ? OR run = ''", (run,))

    def _has_failures(self) -> bool:
        return self._db.execute("SELECT 1 FROM failures LIMIT 1").fetchone() is not None

    def _unrecorded(self, rows: Sequence[LedgerRow]) -> list[LedgerRow]:
        """The rows whose keys are new, each key once: a batch sent again is neither stored nor paid again."""
        by_key = {row.key: row for row in reversed(rows)}
        keys = list(by_key)
        for key, known in zip(keys, self.recorded(keys), strict=True):
            if known:
                del by_key[key]
        return [by_key[row.key] for row in rows if by_key.get(row.key) is row]


_COLUMNS = (*LedgerRow._fields, "recipe", "created_s")
_INSERT = f"INSERT INTO answers ({','.join(_COLUMNS)}) VALUES ({','.join('?' * len(_COLUMNS))})"
_UPDATE_TOTALS = f"UPDATE totals SET {', '.join(f'{name} = ?' for name in Totals._fields)}"


def _amounts(row: LedgerRow) -> tuple[float, ...]:
    """What of a row goes into the totals, in the order of `Totals` after `answers`."""
    return (
        row.prompt_tokens,
        row.completion_tokens,
        row.cached_tokens,
        row.cost_usd,
        row.cache_discount_usd,
        row.batch_discount_usd,
    )


def _connect(path: Path) -> sqlite3.Connection:
    # The writer actor's methods may run on another thread than its constructor; calls never overlap.
    db = sqlite3.connect(path, check_same_thread=False, timeout=30.0)
    try:
        prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _take_lock(path: Path, wait_s: float) -> int:
    """Descriptor of the locked file. Waits a little: a killed run's actors need a moment to go away."""
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "unknown"
                os.close(descriptor)
                raise FeedbackError(
                    f"{path}: in use by another run ({holder}); wait for it to end, or give this run its own "
                    f"feedback.ledger_path"
                ) from None
            time.sleep(min(0.2, max(0.01, wait_s / 20.0)))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        advice = (
            "free some space and run the same command again"
            if "full" in text
            else "check the path and its rights"
        )
        raise FeedbackError(f"{path}: ledger cannot be used ({text}); {advice}") from error
    except sqlite3.DatabaseError as error:
        raise FeedbackError(
            f"{path}: not a readable ledger ({error}); move it away or choose another feedback.ledger_path"
        ) from error
    except OSError as error:
        raise FeedbackError(
            f"{path}: ledger cannot be used ({error.strerror}); choose another feedback.ledger_path"
        ) from error
