"""The records: frozen, and their derived values by hand."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest

from morlaif_ray import types
from morlaif_ray.types import SPLITS, Judgement, Prompt, RolloutBatch

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

RECORDS = [
    value
    for value in vars(types).values()
    if dataclasses.is_dataclass(value) and value.__module__ == types.__name__
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_is_frozen_and_says_what_it_is(record: type) -> None:
    assert record.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert record.__doc__
    assert not record.__doc__.startswith(f"{record.__name__}(")  # what dataclass writes by itself


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Prompt("id", "text", "sft").text = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("log_odds", "label"),
    [(0.0, 0.5), (math.log(3.0), 0.75), (-math.log(3.0), 0.25), (1e6, 1.0), (-1e6, 0.0)],
)
def test_a_soft_label_is_the_sigmoid_of_the_log_odds(log_odds: float, label: float) -> None:
    judgement = Judgement("p", "bias", "ok", log_odds, 0.0, "", "rules")
    assert judgement.label == pytest.approx(label, abs=1e-12)


def test_an_unusable_judgement_has_no_label() -> None:
    nan = float("nan")
    assert math.isnan(Judgement("p", "bias", "unusable", nan, nan, "no token", "rules").label)


def test_the_length_of_a_batch_is_its_number_of_responses_and_it_survives_pickling() -> None:
    batch = RolloutBatch(
        ("a", "b"),
        (" x", " y"),
        np.zeros((2, 4), dtype=np.int64),
        np.array([2, 2]),
        np.array([2, 1]),
        np.zeros((2, 2), dtype=np.float32),
        np.array([True, False]),
        3,
    )
    assert len(batch) == 2
    back = pickle.loads(pickle.dumps(batch))
    assert back.responses == batch.responses
    np.testing.assert_array_equal(back.tokens_BL, batch.tokens_BL)


def test_the_five_splits_are_those_of_the_config() -> None:
    from morlaif_ray.config.inputs import SplitShares

    assert set(SPLITS) == set(SplitShares.model_fields)
