"""A bootstrap ensemble of preference models for active selection: one trunk, members x principles heads.

Trained by the same Tune trial as any preference model (a member's missing pairs are labels of NaN), scored by the same
panel. A finished training is not repeated: same work folder, same call goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from actors.preference_panel import Column, PreferencePanel
from actors.preference_trials import fit_preference_models
from morlaif_ray.artifacts import write_table
from morlaif_ray.config import Config
from morlaif_ray.types import FloatArray

NAME = "ensemble"
SCORE_CHUNK = 2048

TextPair = tuple[str, str]


def fit_and_score_ensemble(
    config: Config,
    work: Path,
    *,
    judged: Sequence[TextPair],
    pair_ids: Sequence[str],
    columns: Sequence[str],
    log_odds_NH: FloatArray,
    candidates: Sequence[TextPair],
    backbone: str,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> tuple[FloatArray, FloatArray]:
    """Scores [candidates, heads] of both responses, by the heads `columns` trained on the judged pairs.

    The recipe is section `preference`. `work` is removed at the end: the caller keeps what it chose.
    """
    config = _one_trunk(config)
    work.mkdir(parents=True, exist_ok=True)
    texts_a, texts_b = zip(*judged, strict=True)
    labels = {name: log_odds_NH[:, index] for index, name in enumerate(columns)}
    write_table(
        work / "train.parquet",
        {"pair_id": list(pair_ids), "text_a": list(texts_a), "text_b": list(texts_b), **labels},
    )
    fit_preference_models(config, work, {NAME: columns}, backbone, advance)
    folder = str(work / "models" / NAME)
    heads = [Column(name, folder, index) for index, name in enumerate(columns)]
    panel = PreferencePanel(config, heads, say)
    try:
        sides = [_score(panel, [pair[side] for pair in candidates]) for side in (0, 1)]
    finally:
        panel.close()
    shutil.rmtree(work)
    return sides[0], sides[1]


def _one_trunk(config: Config) -> Config:
    """Members are heads on one trunk whatever the topology: a branch per head costs members x principles.

    Only our own trainer trains several heads, so it does even where section `preference` says `trl`.
    """
    update = {"topology": "shared_trunk", "branch_blocks": None, "trainer": "own"}
    preference = config.preference.model_copy(update=update)
    return config.model_copy(update={"preference": preference})


def _score(panel: PreferencePanel, texts: Sequence[str]) -> FloatArray:
    chunks = range(0, len(texts), SCORE_CHUNK)
    parts = [panel.score(texts[start : start + SCORE_CHUNK]).scores_BK for start in chunks]
    return np.concatenate(parts)
