"""The ledger's answers of one run as Parquet: `ledger/answers.parquet`, one row per question, streamed.

Memory stays at one chunk, however large the ledger is. The reader sees the writer's committed rows.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Container
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from morlaif_ray.seeding import stable_hash

CHUNK_ROWS = 20_000
_TEXT, _REAL, _INT = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    [
        ("key", _TEXT),
        ("pair_id", _TEXT),
        ("principle", _TEXT),
        ("slot", _TEXT),
        ("log_odds", _REAL),
        ("mass", _REAL),
        ("reason", _TEXT),
        ("model", _TEXT),
        ("prompt_tokens", _INT),
        ("completion_tokens", _INT),
        ("cached_tokens", _INT),
        ("cost_usd", _REAL),
        ("cache_discount_usd", _REAL),
        ("batch_discount_usd", _REAL),
        ("latency_s", _REAL),
        ("attempts", _INT),
        ("recipe", _TEXT),
        ("template_hash", _TEXT),
    ]
)
_FROM_LEDGER = [name for name in SCHEMA.names if name not in ("recipe", "template_hash")]


def export_answers(ledger_path: Path, target: Path, pair_ids: Container[str], recipe: str) -> int:
    """Writes the answers under `recipe` about these pairs, in the order of arrival; the number of rows."""
    count = 0
    with (
        contextlib.closing(sqlite3.connect(f"file:{ledger_path}?mode=ro", uri=True)) as db,
        pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer,
    ):
        found = db.execute(
            "SELECT id, template FROM recipes WHERE recipe = ?", (recipe,)
        ).fetchone()
        if found is None:
            return 0
        recipe_id, template = found
        cursor = db.execute(
            f"SELECT {', '.join(_FROM_LEDGER)} FROM answers WHERE recipe = ? ORDER BY id",
            (recipe_id,),
        )
        constants = {"recipe": recipe, "template_hash": stable_hash(template)}
        while rows := cursor.fetchmany(CHUNK_ROWS):
            kept = [row for row in rows if row[1] in pair_ids]
            if not kept:
                continue
            columns = dict(zip(_FROM_LEDGER, map(list, zip(*kept, strict=True)), strict=True))
            columns["key"] = [key.hex() for key in columns["key"]]
            columns |= {name: [value] * len(kept) for name, value in constants.items()}
            writer.write_table(pa.Table.from_pydict(columns, schema=SCHEMA))
            count += len(kept)
    return count
