"""Section `preference`: which settings go with which topology."""

from __future__ import annotations

from typing import Any

import pytest

from morlaif_ray.config import parse_config
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def preference(**settings: Any) -> PreferenceConfig:
    return parse_config({"preference": settings}, "test").preference


@pytest.mark.parametrize(
    ("settings", "together", "bank"),
    [
        ({}, False, False),
        ({"lora": {}}, False, False),
        ({"topology": "shared_trunk"}, True, False),
        ({"topology": "late_branching"}, True, False),
        ({"topology": "late_branching", "lora": {}, "branch_blocks": 2}, False, True),
        ({"topology": "adapters", "lora": {}}, False, True),
    ],
)
def test_what_is_trained_together_and_what_is_scored_as_a_bank(
    settings: dict[str, Any], together: bool, bank: bool
) -> None:
    section = preference(**settings)
    assert (section.trains_together, section.scores_as_bank) == (together, bank)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "adapters"}, r"topology 'adapters' needs 'lora'; write lora: \{\}"),
        (
            {"branch_blocks": 2},
            "branch_blocks belongs to topology 'late_branching', not 'separate'",
        ),
        ({"topology": "trunk"}, "topology"),
        ({"topology": "late_branching", "branch_blocks": 0}, "branch_blocks"),
        (
            {"engine": "vllm", "topology": "adapters", "lora": {}},
            "engine is 'vllm', which scores whole models, but topology is 'adapters'; write engine: tr",
        ),
        ({"engine": "vllm", "topology": "late_branching"}, "but topology is 'late_branching'"),
        ({"engine": "vllm", "lora": {}}, "with 'lora' adapters are saved; write engine: transf"),
        ({"engine": "auto"}, "engine"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preference(**settings)


def test_our_own_models_score_unless_vllm_is_asked_for() -> None:
    assert preference().engine == "transformers"
    trunk = preference(engine="vllm", topology="shared_trunk", vllm={"kv_cache_mb": 64})
    assert (trunk.engine, trunk.vllm.kv_cache_mb) == ("vllm", 64)
    larger = preference(engine="vllm", topology="shared_trunk", vllm={"kv_cache_mb": 128})
    assert larger.result_part() == trunk.result_part()  # no stage is done again
