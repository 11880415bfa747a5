"""Jobs `fit_weights` and `sweep_scalarizers` on a small run folder made by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import fit_weights, sweep_scalarizers
from jobs.context import JobContext
from jobs.progress import Reporter
from morlaif_ray.artifacts import StageFolder, write_csv, write_json, write_records, write_table
from morlaif_ray.config import parse_config
from morlaif_ray.config.learning import ALL_SCALARIZERS, ArmConfig
from morlaif_ray.errors import MorlaifError, ResourceError
from morlaif_ray.types import Judgement, ResponsePair
from tests.local_ray import local_ray

PRINCIPLES = ["helpfulness", "detail", "sycophancy"]
BASELINES = ["random_principle"]
TRUE_WEIGHTS = np.array([1.0, 0.5, -0.7])
SPLITS = {"weights": 120, "test": 200}


class OwnRayContext(JobContext):
    """A context whose Ray belongs to the fixture."""

    def connect(self) -> None:
        return


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


def make_context(run_dir: Path, **sections: dict[str, Any]) -> OwnRayContext:
    raw: dict[str, Any] = {"reward": {"num_bootstrap": 20}, **sections}
    return OwnRayContext(parse_config(raw, "test"), run_dir, Reporter(quiet=True))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Stages 1-3, published, with synthetic scores."""
    rng = np.random.default_rng(0)
    pairs: list[ResponsePair] = []
    judgements: list[Judgement] = []
    scores: dict[str, dict[str, list[Any]]] = {}
    for split, num in SPLITS.items():
        a, b = rng.normal(size=(num, 3)), rng.normal(size=(num, 3))
        labels = (rng.random(num) < 1 / (1 + np.exp(-(a - b) @ TRUE_WEIGHTS))).astype(float)
        ids = [f"{split}{row}" for row in range(num)]
        table: dict[str, list[Any]] = {"pair_id": ids, "human_label": labels.tolist()}
        for column, name in enumerate([*PRINCIPLES, "baseline_random_principle"]):
            table[f"a_{name}"] = a[:, column % 3].tolist()
            table[f"b_{name}"] = b[:, column % 3].tolist()
        scores[split] = table
        for row, pair_id in enumerate(ids):
            prompt = "\n\nHuman: what is it?\n\nAssistant:"
            pairs.append(
                ResponsePair(
                    pair_id,
                    f"prompt-{pair_id}",
                    prompt,
                    " it is so.",
                    f" no {row}.",
                    split,
                    labels[row],
                )
            )
            judgements += [
                Judgement(pair_id, name, "ok", float(a[row, k] - b[row, k]), 0.0, "", "rules")
                for k, name in enumerate(PRINCIPLES)
            ]
    with publishing(tmp_path, "1_pairs") as folder:
        write_records(folder / "pairs.parquet", pairs, ResponsePair)
    with publishing(tmp_path, "2_feedback") as folder:
        write_records(folder / "judgements.parquet", judgements, Judgement)
    with publishing(tmp_path, "3_preference_models") as folder:
        for split, table in scores.items():
            write_table(folder / f"scores_{split}.parquet", table)
        unit = {"mean": 0.0, "std": 1.0, "num": 512}
        write_json(
            folder / "panel.json",
            {
                "topology": "separate",
                "principles": PRINCIPLES,
                "baselines": {name: {} for name in BASELINES},
                "normaliser": dict.fromkeys(PRINCIPLES, unit),
                "baseline_normaliser": dict.fromkeys(BASELINES, unit),
            },
        )
        models = [*PRINCIPLES, *BASELINES]
        write_csv(
            folder / "accuracy.csv", [{"model": name, "num_judgements": 50} for name in models]
        )
    return tmp_path


def publishing(run_dir: Path, name: str) -> Any:
    return StageFolder(run_dir, name, config_part={}, inputs={}, seed=0).writing()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_fit_weights_publishes_the_stage_and_skips_it_the_second_time(run_dir, monkeypatch):
    context = make_context(run_dir)
    fit_weights.run(context)
    stage = run_dir / "4_reward"
    weights = json.loads((stage / "weights.json").read_text(encoding="utf-8"))
    assert weights["fitted"] is True
    assert weights["weights"]["sycophancy"]["high"] < 0.0
    rows = {row["name"]: row for row in read_csv(stage / "scalarizers.csv")}
    assert set(rows) == {*ALL_SCALARIZERS, "random_principle", "ceiling", "bayes"}
    assert 0.5 <= float(rows["bayes"]["accuracy"]) <= 1.0  # the default config is the test-bed's
    monkeypatch.setattr(fit_weights, "read_reward_inputs", lambda path: pytest.fail("ran again"))
    fit_weights.run(context)


def test_the_offline_sweep_publishes_its_own_stage(run_dir, two_cpus, capfd):
    context = make_context(run_dir, sweep={"num_offline_samples": 5})
    fit_weights.run(context)
    before = (run_dir / "4_reward" / "manifest.json").read_bytes()
    sweep_scalarizers.run(context)
    stage = run_dir / "4_sweep"
    rows = read_csv(stage / "sweep_offline.csv")
    assert [row["scalarizer"] for row in rows] == [
        name for name in ALL_SCALARIZERS for _ in range(5)
    ]
    configured = {
        row["name"]: row["accuracy"] for row in read_csv(run_dir / "4_reward/scalarizers.csv")
    }
    for row in rows:
        if row["trial"] == "0":
            assert row["accuracy"] == configured[row["scalarizer"]]
            assert row["weight_scale"] == "1"
    best = json.loads((stage / "best.json").read_text(encoding="utf-8"))
    assert best["best"] in ALL_SCALARIZERS
    assert best["selected_on"] == "weights"
    assert set(best["scalarizers"]) == set(ALL_SCALARIZERS)
    assert (run_dir / "4_reward" / "manifest.json").read_bytes() == before
    assert not (run_dir / "work" / "4_sweep").exists()
    assert "Trial" not in "".join(capfd.readouterr())  # no Tune tables
    sweep_scalarizers.run(context)  # up to date: nothing to do
    assert not (run_dir / "superseded").exists()


def make_short_run() -> sweep_scalarizers.RunOne:
    """Stands for `train_policy.run_arm_inline`. A closure travels to the trial by value (nobody can
    import this file there)."""

    def short_run(context: JobContext, arm: ArmConfig, num_steps: int) -> dict[str, float]:
        assert arm.name == f"sweep_{arm.scalarizer}"
        marker = context.run_dir / "fail_once"
        if arm.scalarizer == "worst_case" and marker.exists():
            marker.unlink()
            raise MorlaifError("the rollout worker died")
        with (context.run_dir / "runs.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{arm.scalarizer}\n")
        return {"reward_gain": 0.5 * num_steps, "kl": 1.5, "win_rate": 0.6}

    return short_run


def test_online_trials_call_the_hook_and_an_interrupted_sweep_goes_on(run_dir, two_cpus):
    context = make_context(
        run_dir, sweep={"online_steps": 3, "online_scalarizers": ["linear", "worst_case"]}
    )
    (run_dir / "fail_once").touch()
    with pytest.raises(MorlaifError, match=r"1 of 2 sweep trials failed.*the rollout worker died"):
        sweep_scalarizers.run_online_trials(context, make_short_run())
    rows = sweep_scalarizers.run_online_trials(context, make_short_run())
    assert rows == [
        {
            "trial": trial,
            "scalarizer": name,
            "steps": 3,
            "reward_gain": 1.5,
            "kl": 1.5,
            "oracle_gain": "",
            "win_rate": 0.6,
        }
        for trial, name in enumerate(["linear", "worst_case"])
    ]
    runs = (run_dir / "runs.txt").read_text(encoding="utf-8").split()
    assert sorted(runs) == ["linear", "worst_case"]  # what had succeeded was not repeated


def test_a_sweep_that_no_cpu_is_free_for_ends_with_advice_and_can_be_repeated(tmp_path, two_cpus):
    import ray
    from ray import tune

    @ray.remote(num_cpus=2)
    class Hog:
        def ready(self) -> bool:
            return True

    def sweep(timeout_s: float) -> dict[str, Any]:
        with Reporter(quiet=True).task("sweep") as task:
            return sweep_scalarizers.run_trials(
                tune.with_resources(lambda setting: tune.report({"rows": []}), {"cpu": 1}),
                ["linear"],
                storage=tmp_path,
                name="offline",
                concurrent=1,
                timeout_s=timeout_s,
                reuse_processes=True,
                task=task,
            )

    hog = Hog.remote()
    assert ray.get(hog.ready.remote(), timeout=240)
    with pytest.raises(
        ResourceError, match=r"1 of 1 sweep trials \(linear\) did not end within 2\.0 s"
    ):
        sweep(2.0)
    ray.kill(hog)
    assert sweep(240.0)["linear"]["rows"] == []


def test_a_sweep_without_labels_or_draws_is_empty_and_says_so(run_dir):
    context = make_context(run_dir, sweep={"num_offline_samples": 0})
    fit_weights.run(context)
    sweep_scalarizers.run(context)
    assert (run_dir / "4_sweep" / "sweep_offline.csv").read_text(encoding="utf-8") == ""
    best = json.loads((run_dir / "4_sweep" / "best.json").read_text(encoding="utf-8"))
    assert best["best"] is None
