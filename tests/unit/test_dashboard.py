"""The Grafana dashboard shows only what a PPO step exports, in panels that do not lie on one another."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jobs.metric_names import DESCRIPTIONS, is_known
from jobs.tracking import PrometheusGauges
from morlaif_ray.principles import load_principles

pytestmark = pytest.mark.unit
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "morlaif.json"
PRINCIPLES = tuple(principle.name for principle in load_principles())


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def expressions() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [*found, *(v["query"] for v in dashboard()["templating"]["list"] if v["name"] == "arm")]


def shown_metrics() -> set[str]:
    names = re.findall(r"ray_morlaif_([a-z0-9_]+)(?!\.)\b", " ".join(expressions()))
    return {name for name in names if not name.endswith("_")}


def test_every_metric_of_the_dashboard_is_one_that_a_step_exports() -> None:
    names = shown_metrics()
    assert len(names) > 20
    assert [name for name in sorted(names) if not is_known(name, PRINCIPLES)] == []


def test_a_name_that_no_step_exports_is_noticed() -> None:
    assert not is_known("reward_meen", PRINCIPLES)
    assert not is_known("norm_kindness", PRINCIPLES)
    assert is_known("norm_sycophancy", PRINCIPLES)


def test_the_pattern_for_all_principles_matches_each_of_them() -> None:
    patterns = re.findall(r'__name__=~"([^"]+)"', " ".join(expressions()))
    assert len(patterns) == 1
    for name in PRINCIPLES:
        assert re.fullmatch(patterns[0], f"ray_morlaif_norm_{name}"), name


def test_every_expression_filters_by_arm() -> None:
    assert [e for e in expressions() if "label_values" not in e and 'arm=~"$arm"' not in e] == []


def test_phases_rewards_kl_speed_and_queues_are_shown() -> None:
    wanted = {
        "seconds_generate",
        "seconds_score",
        "seconds_update",
        "seconds_refresh",
        "generated_tokens_per_second",
        "reward_mean",
        "kl_mean",
        "staleness",
        "rollouts_ready",
        "learner_idle_share",
    }
    assert wanted <= shown_metrics()


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_gauges_are_exported_under_the_names_of_the_dashboard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ray_` is put in front by Ray itself; the rest of the name and the label are ours."""
    made: dict[str, Any] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            made[name] = self
            self.description = description
            self.values: dict[str, float] = {}
            assert tag_keys == ("arm",)

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values[tags["arm"]] = value

    metrics = types.ModuleType("ray.util.metrics")
    metrics.Gauge = Gauge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.util.metrics", metrics)
    gauges = PrometheusGauges()
    gauges.log("linear", {"seconds_update": 2.5, "reward_mean": float("nan")})
    gauges.log("worst", {"seconds_update": 3.5})
    assert set(made) == {"morlaif_seconds_update"}
    assert made["morlaif_seconds_update"].values == {"linear": 2.5, "worst": 3.5}
    assert DESCRIPTIONS["seconds_update"] in made["morlaif_seconds_update"].description
