"""bfloat16 weights that AdamW would have to change in place are refused before a model loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobs.train_policy import check_supported
from morlaif_ray.config import parse_config
from morlaif_ray.errors import ConfigError

pytestmark = pytest.mark.unit


def check(model: dict[str, Any], policy: dict[str, Any]) -> None:
    config = parse_config({"model": model, "policy": policy}, "test")
    check_supported(SimpleNamespace(config=config))  # type: ignore[arg-type]


def test_trainable_bfloat16_weights_are_refused() -> None:
    model = {"kind": "pretrained", "path": "gpt2", "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"too coarse for AdamW; write model\.dtype: float32"):
        check(model, {})
    with pytest.raises(ConfigError, match="too coarse"):
        check(model, {"bf16_autocast": True})


def test_a_frozen_bfloat16_base_and_float32_weights_are_taken() -> None:
    model = {"kind": "pretrained", "path": "gpt2"}
    check({**model, "dtype": "bfloat16"}, {"lora": {"rank": 4}})
    check({**model, "dtype": "float32"}, {"bf16_autocast": True})
    check({"kind": "scratch"}, {})
