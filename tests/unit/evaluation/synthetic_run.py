"""Writes a plausible run folder that obeys docs/artifacts.md, in a second and without any training.

Every figure is drawn from a seed; the shapes are those of a run on the test-bed: PMs between 0.62 and 0.97, a negative
weight on sycophancy, `worst_case` that hacks its reward. `testbed=False` leaves out what only the test-bed knows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from morlaif_ray.artifacts import StageFolder
from morlaif_ray.config import parse_config
from tests.unit.evaluation.synthetic_feedback import (
    write_feedback,
    write_learning_curve,
    write_pairs,
    write_preference_models,
    write_sft,
)
from tests.unit.evaluation.synthetic_figures import ARM_SHAPES, UNSAFE
from tests.unit.evaluation.synthetic_policies import write_evaluation, write_policies
from tests.unit.evaluation.synthetic_reward import write_reward, write_sweep


def write_synthetic_run(
    run_dir: Path,
    *,
    arms: tuple[str, ...] = tuple(ARM_SHAPES),
    testbed: bool = True,
    num_prompts: int = 96,
    num_steps: int = 60,
    unsafe_text: bool = False,
) -> Path:
    """Writes stages 0 to 5 (with manifests) and `6_evaluation` without its report; returns the evaluation folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    config = _config(arms, testbed)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    parse_config(config, "synthetic")
    write_learning_curve(run_dir)
    hashes: dict[str, str] = {}
    for name, write in (
        ("0_sft", write_sft),
        ("1_pairs", write_pairs),
        ("2_feedback", write_feedback),
        ("3_preference_models", write_preference_models),
        ("4_reward", write_reward),
        ("4_sweep", write_sweep),
    ):
        hashes[name] = _publish(
            run_dir, name, hashes, lambda folder, w=write: w(folder, rng, testbed)
        )
    hashes["5_policy"] = _publish(
        run_dir,
        "5_policy",
        hashes,
        lambda folder: write_policies(folder, rng, testbed, arms, num_steps),
    )
    text = UNSAFE if unsafe_text else None
    _publish(
        run_dir,
        "6_evaluation",
        hashes,
        lambda folder: write_evaluation(folder, rng, testbed, arms, num_prompts, text),
    )
    return run_dir / "6_evaluation"


def _publish(run_dir, name, hashes, write) -> str:
    stage = StageFolder(run_dir, name, config_part={"name": name}, inputs=dict(hashes), seed=0)
    rows: dict[str, int] = {"rows": 96}
    with stage.writing(rows) as folder:
        write(folder)
    return stage.content_hash()


def _config(arms, testbed) -> dict:
    entries = [
        {"name": arm, "baseline": "random_principle"}
        if arm == "single_pm"
        else {"name": arm, "scalarizer": arm}
        for arm in arms
    ]
    config = {"name": "synthetic", "seed": 0}
    if entries:
        config["policy"] = {"arms": entries, "kl_target": 6.0}
    if not testbed:
        config["data"] = {"source": {"kind": "files", "paths": ["hh.jsonl"]}}
        config["pairs"] = {"kind": "dataset"}
    return config
