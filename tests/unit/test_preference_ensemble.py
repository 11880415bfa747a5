"""The ensemble behind active selection, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from actors.preference_ensemble import _one_trunk
from morlaif_ray.config import Config, parse_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "preference",
    [
        {"trainer": "trl", "loss": "margin"},
        {"trainer": "trl", "loss": "margin", "topology": "adapters", "lora": {}},
        {"topology": "late_branching", "branch_blocks": 1},
        {"workers_per_trial": 2},
    ],
)
def test_an_ensemble_has_a_config_that_its_trials_accept(preference: dict[str, Any]) -> None:
    config = _one_trunk(parse_config({"preference": preference}, "test"))
    accepted = Config.model_validate(config.model_dump(mode="json"))  # as a trial does
    assert accepted.preference.topology == "shared_trunk"
    assert accepted.preference.trainer == "own"
