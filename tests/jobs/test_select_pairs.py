"""The rounds of active selection, with an ensemble and a judge that the test makes up; no Ray, no model."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from jobs.select_pairs import select_pairs, selection_recipe
from morlaif_ray.artifacts import StageFolder, read_table
from morlaif_ray.config import parse_config
from morlaif_ray.types import Judgement, ResponsePair

pytestmark = pytest.mark.jobs
NAMES = ["detail", "empathy"]


def make_pairs(num: int) -> list[ResponsePair]:
    """Pair i: response_a has i words. Every fifth pair belongs to `test`."""
    return [
        ResponsePair(
            f"pair{i:02d}",
            f"prompt{i}",
            "\n\nHuman: q\n\nAssistant:",
            " w" * i,
            " no",
            "test" if i % 5 == 0 else "preference",
            1.0,
        )
        for i in range(num)
    ]


class World:
    """A context, a judge that counts what it is asked, and an ensemble that disagrees about long responses."""

    def __init__(self, tmp_path, monkeypatch, select: dict) -> None:
        config = parse_config({"feedback": {"select": select}}, "test")
        reporter = SimpleNamespace(line=lambda _: None, task=self._task)
        self.context = SimpleNamespace(
            config=config, reporter=reporter, connect=lambda: None, path=tmp_path.joinpath
        )
        self.stage = StageFolder(tmp_path, "2_feedback", config_part={}, inputs={}, seed=0)
        self.asked: list[set[str]] = []
        self.trained: list[int] = []
        self.crash_before_training = False
        (tmp_path / "0_sft" / "model").mkdir(parents=True)
        stub = ModuleType("actors.preference_ensemble")
        stub.fit_and_score_ensemble = self._ensemble
        monkeypatch.setitem(sys.modules, "actors.preference_ensemble", stub)

    def _task(self, *_, **__):
        import contextlib

        return contextlib.nullcontext(SimpleNamespace(advance=lambda _: None))

    def _ensemble(self, config, work, *, judged, columns, log_odds_NH, candidates, **_):
        if self.crash_before_training:
            raise KeyboardInterrupt
        assert columns == [f"{name}#{member}" for member in range(4) for name in NAMES]
        assert log_odds_NH.shape == (len(judged), 8)
        present = ~np.isnan(log_odds_NH)
        assert (present[:, 0] == present[:, 1]).all(), "a member sees all principles of a pair"
        assert present.any(axis=1).all()
        self.trained.append(len(judged))
        # Members 0 and 1 say +d, 2 and 3 say -d, where d grows with the words of response_a.
        d = np.array([[0.01 * a.count(" w")] * 2 for a, _ in candidates])
        return np.concatenate([d, d, -d, -d], axis=1), np.zeros((len(candidates), 8))

    def judge(self, pairs) -> list[Judgement]:
        self.asked.append({pair.pair_id for pair in pairs})
        return [
            Judgement(p.pair_id, name, "ok", 1.0, 0.0, "", "j") for p in pairs for name in NAMES
        ]

    def run(self, pairs):
        return select_pairs(self.context, self.stage, pairs, NAMES, self.judge)


ACTIVE = {"kind": "ensemble_disagreement", "num_pairs": 9, "rounds": 3, "ensemble_size": 4}


def test_every_pair_is_asked_by_default(tmp_path, monkeypatch):
    world, pairs = World(tmp_path, monkeypatch, {"kind": "all"}), make_pairs(20)
    selection = world.run(pairs)
    assert selection.pairs == pairs
    assert world.asked == []
    selection.write(tmp_path)
    assert not (tmp_path / "selection.parquet").exists()


def test_a_random_sample_keeps_the_other_splits_whole(tmp_path, monkeypatch):
    world, pairs = World(tmp_path, monkeypatch, {"kind": "random", "num_pairs": 6}), make_pairs(20)
    selection = world.run(pairs)
    assert sum(pair.split == "preference" for pair in selection.pairs) == 6
    assert [p for p in selection.pairs if p.split == "test"] == [
        p for p in pairs if p.split == "test"
    ]
    assert world.run(pairs[::-1]).rounds.keys() == selection.rounds.keys()
    assert world.asked == []


def test_active_rounds_ask_the_seed_set_and_then_where_the_members_disagree(tmp_path, monkeypatch):
    world, pairs = World(tmp_path, monkeypatch, ACTIVE), make_pairs(40)
    selection = world.run(pairs)
    # Three rounds of three: asked about after the first and after the second, trained on 3 and on 6.
    assert [len(asked) for asked in world.asked] == [3, 6]
    assert world.trained == [3, 6]
    seeds = {name for name, number in selection.rounds.items() if number == 0}
    longest = [p.pair_id for p in pairs[::-1] if p.split == "preference" and p.pair_id not in seeds]
    assert {name for name, number in selection.rounds.items() if number == 1} == set(longest[:3])
    assert {name for name, number in selection.rounds.items() if number == 2} == set(longest[3:6])
    assert set(selection.disagreement) == set(longest[:6])
    assert len(selection.pairs) == 9 + 8
    selection.write(tmp_path)
    table = read_table(tmp_path / "selection.parquet")
    assert sorted(table["round"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.isnan(table["disagreement"]).sum() == 3


def test_a_run_that_was_killed_between_rounds_repeats_no_choice(tmp_path, monkeypatch):
    world, pairs = World(tmp_path / "whole", monkeypatch, ACTIVE), make_pairs(40)
    whole = world.run(pairs)
    world = World(tmp_path / "killed", monkeypatch, ACTIVE)
    world.crash_before_training = True
    with pytest.raises(KeyboardInterrupt):
        world.run(pairs)
    world.crash_before_training = False
    assert world.run(pairs) == whole
    assert world.run(pairs) == whole  # after the last round: nothing is trained or asked again
    assert world.trained == [3, 6]


def test_asking_about_more_than_there_is_asks_about_everything(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, {**ACTIVE, "num_pairs": 1000})
    assert world.run(make_pairs(10)).pairs == make_pairs(10)


def test_only_active_selection_depends_on_the_recipe_of_the_ensemble():
    assert selection_recipe(parse_config({}, "test")) == {}
    active = parse_config({"feedback": {"select": ACTIVE}}, "test")
    assert selection_recipe(active)["ensemble"]["batch_size"] == 32
