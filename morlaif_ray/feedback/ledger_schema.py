"""The ledger's tables, their version, and the way from an older version to this one.

Rows are appended in the order of arrival and found through a small index of 16-byte keys: with a million answers the
file grows at its end and the index fits into memory. The sums stand in a row of their own, in the same transaction as
the answers, so that opening a ledger costs the same at any size.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

from morlaif_ray.errors import FeedbackError

SCHEMA_VERSION = 3
CACHE_KB = 4_096
"""SQLite's page cache: small, since the system caches the key index anyway."""

_ANSWERS = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, pair_id TEXT NOT NULL, principle TEXT NOT NULL,
    slot TEXT NOT NULL, log_odds REAL, mass REAL NOT NULL, reason TEXT NOT NULL, logprobs TEXT NOT NULL,
    model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL,
    latency_s REAL NOT NULL, attempts INTEGER NOT NULL, cached_tokens INTEGER NOT NULL DEFAULT 0,
    cache_discount_usd REAL NOT NULL DEFAULT 0, batch_discount_usd REAL NOT NULL DEFAULT 0,
    recipe INTEGER NOT NULL, created_s REAL NOT NULL)
"""
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS recipes (
    id INTEGER PRIMARY KEY, recipe TEXT UNIQUE NOT NULL, judge TEXT NOT NULL, template TEXT NOT NULL);
{_ANSWERS};
CREATE TABLE IF NOT EXISTS failures (
    key BLOB PRIMARY KEY, pair_id TEXT NOT NULL, principle TEXT NOT NULL, slot TEXT NOT NULL,
    error TEXT NOT NULL, attempts INTEGER NOT NULL, created_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (
    answers INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL, cache_discount_usd REAL NOT NULL,
    batch_discount_usd REAL NOT NULL);
CREATE TABLE IF NOT EXISTS intents (
    ticket INTEGER PRIMARY KEY, key BLOB NOT NULL, usd REAL NOT NULL, run TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS unconfirmed (
    ticket INTEGER PRIMARY KEY, key BLOB NOT NULL, usd REAL NOT NULL, doubt TEXT NOT NULL, created_s REAL NOT NULL);
"""
_SUMS = (
    "SELECT count(*), ifnull(sum(prompt_tokens), 0), ifnull(sum(completion_tokens), 0), "
    "ifnull(sum(cached_tokens), 0), total(cost_usd), total(cache_discount_usd), total(batch_discount_usd) FROM answers"
)
_FROM_1 = """
key, pair_id, principle, slot, log_odds, mass, reason, logprobs, model, prompt_tokens, completion_tokens, cost_usd,
latency_s, attempts, recipe, created_s
"""


class Totals(NamedTuple):
    """Sums over all answers of a ledger; dollars after discounts, the discounts beside them."""

    answers: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost_usd: float
    cache_discount_usd: float
    batch_discount_usd: float

    @property
    def list_usd(self) -> float:
        """What it would have cost without discounts."""
        return self.cost_usd + self.cache_discount_usd + self.batch_discount_usd

    def plus(self, answers: int, *amounts: float) -> Totals:
        """With some more answers; `amounts` in the order of the fields, none where there are no answers."""
        if not answers:
            return self
        return Totals(*(old + new for old, new in zip(self, (answers, *amounts), strict=True)))  # type: ignore[arg-type]


class Unconfirmed(NamedTuple):
    """Requests that may have been billed although no answer came, for one reason."""

    doubt: str
    requests: int
    usd: float
    """Their estimates: the most that they may have cost."""


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Sets the connection up for one writer and brings the tables to this version. FeedbackError if they are newer."""
    version = check_version(db, path)
    db.execute("PRAGMA journal_mode=WAL")
    # A commit survives a power cut: the rows have been paid for.
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"PRAGMA cache_size=-{CACHE_KB}")
    if version == 1:
        _migrate_from_1(db)
    db.executescript(_SCHEMA)
    with db:
        if db.execute("SELECT count(*) FROM totals").fetchone()[0] == 0:
            db.execute(f"INSERT INTO totals {_SUMS}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def check_version(db: sqlite3.Connection, path: Path) -> int:
    """The version on disk; 0 for an empty file."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise FeedbackError(
            f"{path}: ledger of a newer version ({version}, this program knows {SCHEMA_VERSION}); "
            f"update morlaif-ray or choose another feedback.ledger_path"
        )
    return version


def read_totals(db: sqlite3.Connection) -> Totals:
    return Totals(*db.execute(f"SELECT {', '.join(Totals._fields)} FROM totals").fetchone())


def read_unconfirmed(db: sqlite3.Connection) -> tuple[Unconfirmed, ...]:
    """By reason, the dearest first."""
    rows = db.execute(
        "SELECT doubt, count(*), total(usd) FROM unconfirmed GROUP BY doubt ORDER BY 3 DESC, 1"
    )
    return tuple(Unconfirmed(str(doubt), int(count), float(usd)) for doubt, count, usd in rows)


def _migrate_from_1(db: sqlite3.Connection) -> None:
    """All or nothing: a crash in between leaves version 1 as it was."""
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("ALTER TABLE answers RENAME TO answers_1")
        db.execute(_ANSWERS)
        db.execute(
            f"INSERT INTO answers ({_FROM_1}) SELECT {_FROM_1} FROM answers_1 ORDER BY created_s"
        )
        db.execute("DROP TABLE answers_1")
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
