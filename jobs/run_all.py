"""The whole method, in order. The shortest description of MORLAIF that runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from jobs.checks import check_before_start, check_cluster, remote_address
from jobs.context import JobContext
from morlaif_ray.artifacts import MANIFEST, read_json, write_json


def run(context: JobContext) -> None:
    """Runs every stage that is not up to date; publishes `report.html` and `timings.json` in the run folder."""
    started = time.monotonic()
    check_before_start(context)
    if remote_address(
        context.config
    ):  # a local Ray is started by the first stage that has work to do
        context.connect()
        check_cluster(context.config)
    from jobs import (
        collect_feedback,
        evaluate,
        fit_weights,
        sample_pairs,
        sweep_scalarizers,
        train_policy,
        train_preference_models,
        train_sft,
    )

    stages: list[tuple[str, Callable[[JobContext], None]]] = [
        ("0_sft", train_sft.run),
        ("1_pairs", sample_pairs.run),
        ("2_feedback", collect_feedback.run),
        ("3_preference_models", train_preference_models.run),
        ("4_reward", fit_weights.run),
        ("4_sweep", sweep_scalarizers.run),
        ("5_policy", train_policy.run),
        ("6_evaluation", evaluate.run),
    ]
    if not context.config.sweep.enabled:
        stages = [stage for stage in stages if stage[0] != "4_sweep"]
    timings: dict[str, float] = {}
    for name, run_stage in stages:
        stage_started, published = time.monotonic(), _published(context, name)
        run_stage(context)
        if _published(context, name) != published:
            timings[name] = round(time.monotonic() - stage_started, 1)
    timings["total"] = round(time.monotonic() - started, 1)
    if (
        len(timings) > 1
    ):  # a run that skipped everything says nothing about how long the stages take
        write_json(context.path("timings.json"), {**_known_timings(context), **timings})
    shutil.rmtree(context.path("work"), ignore_errors=True)
    shown = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items())
    context.reporter.line(f"done: {shown}")
    context.reporter.result(str(context.path("report.html")))


def _published(context: JobContext, stage: str) -> int:
    """Identity of the publication of a stage: changes when it is published anew."""
    manifest = context.path(stage, MANIFEST)
    return manifest.stat().st_ino if manifest.is_file() else 0


def _known_timings(context: JobContext) -> dict[str, float]:
    path = context.path("timings.json")
    return dict(read_json(path)) if path.is_file() else {}
