"""The samples behind a step that became NaN or infinite, on disk for a person to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morlaif_ray.errors import explain_os_errors
from morlaif_ray.types import FloatArray, RolloutBatch


def describe_rows(
    batch: RolloutBatch,
    reward_B: FloatArray,
    scores: Mapping[str, FloatArray] | None,
    rows: Sequence[int],
) -> list[dict[str, Any]]:
    """`{row, prompt, response, truncated, reward, scores: {name: value}}` of the chosen responses."""
    return [
        {
            "row": row,
            "prompt": batch.prompts[row],
            "response": batch.responses[row],
            "truncated": bool(batch.truncated_B[row]),
            "reward": float(reward_B[row]),
            "scores": {name: float(values[row]) for name, values in (scores or {}).items()},
        }
        for row in rows
    ]


def write_failure(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line; NaN and infinities as Python's json writes them."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")
