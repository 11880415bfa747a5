"""Which engine a run uses, and what is said where it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from actors import engines
from morlaif_ray.config import Config
from morlaif_ray.config.loading import parse_config
from morlaif_ray.errors import ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def config(**policy: Any) -> Config:
    return parse_config({"policy": policy, "model": {"kind": "scratch", "num_heads": 3}}, "x")


@pytest.mark.parametrize(
    ("wanted", "installed", "engine"),
    [
        ("transformers", True, "transformers"),
        ("vllm", False, "vllm"),
        ("auto", True, "vllm"),
        ("auto", False, "transformers"),
    ],
)
def test_auto_takes_vllm_where_it_is_installed_and_the_recipe_says_so(
    monkeypatch: pytest.MonkeyPatch, wanted: str, installed: bool, engine: str
) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: installed)
    chosen = config(engine=wanted)
    assert engines.engine_of(chosen.policy) == engine
    assert engines.engine_extra(chosen) == ({"engine": "vllm"} if engine == "vllm" else {})


def test_vllm_that_is_not_installed_is_one_line_unless_workers_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; .*policy\.engine: transformers"):
        engines.check_engine(config(engine="vllm"), here=True)
    engines.check_engine(config(engine="vllm"), here=False)
    engines.check_engine(config(), here=True)


def test_heads_that_vllm_has_no_cpu_kernel_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    model = {"kind": "scratch", "width": 96, "num_heads": 4}
    odd = parse_config({"policy": {"engine": "vllm"}, "model": model}, "x")
    with pytest.raises(ConfigError, match=r"no attention for heads of 24 \(model\.width 96 / "):
        engines.check_engine(odd, here=True)
    on_gpu = {"engine": "vllm", "rollout_gpus_per_worker": 1}
    engines.check_engine(parse_config({"policy": on_gpu, "model": model}, "x"), here=True)
