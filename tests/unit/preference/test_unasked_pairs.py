"""What becomes of pairs that the judge was never asked about."""

from __future__ import annotations

import numpy as np
import pytest

from morlaif_ray.preference.labels import log_odds_table
from morlaif_ray.types import Judgement, ResponsePair

pytestmark = pytest.mark.unit


def test_a_pair_without_judgements_trains_no_model_and_no_baseline() -> None:
    pairs = [
        ResponsePair(name, name, "p", "a", "b", "preference", 1.0)
        for name in ("asked", "not asked")
    ]
    judgements = [Judgement("asked", "detail", "ok", 1.5, 0.4, "", "j")]
    table = log_odds_table(pairs, judgements, ["detail"], ["mean_log_odds", "human_labels"])
    assert table.columns == ("detail", "baseline_mean_log_odds", "baseline_human_labels")
    assert table.values_NC[0].tolist() == [1.5, 1.5, np.inf]
    assert np.isnan(table.values_NC[1]).all()
