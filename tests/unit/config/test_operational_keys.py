"""Keys that change no result: another value makes no stage stale and needs no --accept-config-change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.context import config_differences, open_run
from jobs.progress import Reporter
from morlaif_ray.artifacts import MANIFEST
from morlaif_ray.config.loading import parse_config
from morlaif_ray.config.root import OPERATIONAL_KEYS, Config
from morlaif_ray.errors import ArtifactError, ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
MOVED: dict[str, Any] = {
    "policy": {
        "call_timeout_s": 7.0,
        "max_restarts": 9,
        "checkpoint_every": 3,
        "parity_every": 0,
        "samples_every": 1,
    },
    "preference": {"max_failures": 4},
    "sft": {"checkpoint_every": 7},
    "cluster": {"num_cpus": 3},
}


def config(values: dict[str, Any]) -> Config:
    return parse_config(values, "x")


def test_every_operational_key_exists() -> None:
    for path in OPERATIONAL_KEYS:
        section, key = path.split(".")
        assert key in type(getattr(Config(), section)).model_fields, path


def test_operational_keys_count_neither_as_results_nor_as_differences() -> None:
    base, moved = config({}), config(MOVED)
    assert moved.result_sections() == base.result_sections()
    assert moved.policy.call_timeout_s == 7.0
    assert config_differences(base.model_dump(mode="json"), moved.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 32), ("staleness", 1), ("engine", "vllm"), ("stop", ["x"])]
)
def test_keys_that_change_results_still_count(key: str, value: Any) -> None:
    rest = {"importance_cap": 2.0}  # staleness needs it
    base, moved = config({"policy": rest}), config({"policy": {**rest, key: value}})
    assert moved.result_sections() != base.result_sections()
    (difference,) = config_differences(base.model_dump(mode="json"), moved.model_dump(mode="json"))
    assert difference.startswith(f"policy.{key}: ")


def test_a_raised_time_out_continues_a_run_that_has_published_and_keeps_its_stage(
    tmp_path: Path,
) -> None:
    quiet = Reporter(quiet=True)
    first = open_run(config({}), tmp_path / "run", quiet)
    stage = first.stage("5_policy", sections=["policy", "reward"], inputs=[])
    with stage.writing() as folder:
        (folder / "x").write_text("x")
    work = stage.resumable_work_dir()
    (work / "half").write_text("x")
    assert (first.path("5_policy") / MANIFEST).is_file()

    second = open_run(config(MOVED), tmp_path / "run", quiet)
    again = second.stage("5_policy", sections=["policy", "reward"], inputs=[])
    assert again.is_current()
    assert (again.resumable_work_dir() / "half").is_file()
    assert "call_timeout_s: 7.0" in (tmp_path / "run" / "config.yaml").read_text()

    with pytest.raises(ArtifactError, match=r"another config \(policy\.num_epochs: 4 -> 1\)"):
        open_run(config({"policy": {"num_epochs": 1}}), tmp_path / "run", quiet)


def test_samples_of_a_prompt_fill_the_batch_evenly() -> None:
    with pytest.raises(
        ConfigError, match="batch_size 64 is not a multiple of samples_per_prompt 5"
    ):
        config({"policy": {"samples_per_prompt": 5}})
