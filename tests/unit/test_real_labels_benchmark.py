"""The real-label benchmark's choice of a recipe, and its accuracies, without any model."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from benchmarks.real_label_pairs import LabelledPair, is_test, is_validation, mean_accuracy
from benchmarks.real_labels import Bench, Recipe
from morlaif_ray.errors import ConfigError, NumericalError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def some_pairs() -> list[LabelledPair]:
    """Of 40 prompts; head `rare` has labels in training alone, `late` in test prompts and outside of validation."""
    found = []
    for number in range(40):
        prompt = f"prompt {number}"
        pair = LabelledPair(prompt, "a b", "a", {"human": 1.0, "late": 0.0, "rare": 1.0})
        if is_test(pair):
            del pair.labels["rare"]
        elif is_validation(pair):
            del pair.labels["late"]
        found.append(pair)
    return found


def bench(monkeypatch: pytest.MonkeyPatch, gap_by_rate: dict[float, float]) -> Bench:
    """A bench whose models give every pair the gap of their learning rate; without one, training diverges."""
    options = argparse.Namespace(limit=100, rates=[1e-3, 1e-2, 1e-1], epochs=[1])
    made = Bench("mine", some_pairs(), "nowhere", options)

    def trained(topology: str, recipe: Recipe, train: Any, other: Any) -> Any:
        if recipe.learning_rate not in gap_by_rate:
            raise NumericalError("the loss of step 3 is nan")
        gap = np.full(len(other), gap_by_rate[recipe.learning_rate])
        return dict.fromkeys(made.heads, gap), 0.0

    monkeypatch.setattr(made, "_train", trained)
    return made


def test_a_recipe_that_diverges_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = bench(monkeypatch, {1e-2: -1.0, 1e-1: 1.0})
    recipe, accuracy = made._choose("separate", said.append)
    assert recipe == Recipe(1e-1, 1)
    assert accuracy == 1.0  # of `human`; `late` has no validation pair and does not count
    assert said[0] == "  separate 1e-03 x 1: the loss of step 3 is nan"


def test_where_every_recipe_diverges_the_topology_is_left_out_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    records = list(bench(monkeypatch, {}).records(["separate"], said.append))
    assert "no recipe of separate has an accuracy on validation prompts" in said[-1]
    assert {record["topology"] for record in records} == {
        "longer_response",
        "length_as_in_training",
        "majority_slot",
    }
    with pytest.raises(ConfigError, match="give a higher --limit, or one rate"):
        bench(monkeypatch, {})._choose("separate", said.append)


def test_a_head_without_test_pairs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench(monkeypatch, {}).heads == ["human", "late"]


def test_heads_without_labels_do_not_count() -> None:
    nan = np.nan
    labels = np.array([[1.0, nan, 0.0], [0.0, nan, nan]])
    gaps = {"x": np.array([2.0, 1.0]), "y": np.array([nan, nan]), "z": np.array([0.0, nan])}
    assert mean_accuracy(gaps, labels, ["x", "y", "z"]) == 0.5  # x: one of two; z: a tie
    assert np.isnan(mean_accuracy(gaps, np.full((2, 3), nan), ["x", "y", "z"]))
