"""What can be known to be wrong before anything starts: principles, weights, data files, keys, CPUs.

check_before_start(context)   in `run_all`, before the first stage: a fraction of a second, no model, no Ray
"""

from __future__ import annotations

import os

from actors.placement import Available, check_plan, intended_cluster, plan_bundles
from jobs.context import JobContext
from jobs.plan import available_for
from morlaif_ray.artifacts import MANIFEST
from morlaif_ray.config import Config
from morlaif_ray.config.inputs import FileSource
from morlaif_ray.principles import load_principles


def check_before_start(context: JobContext) -> None:
    """Raises the error that a later stage would raise after hours."""
    config = context.config
    _check_principles(config)
    _check_prompt(config)
    if not context.path("0_sft", MANIFEST).is_file():
        _check_data_files(config)
    if not context.path("2_feedback", MANIFEST).is_file():
        _check_judge(config)
    if not remote_address(config):
        check_plan(plan_bundles(config), available_for(config))


def remote_address(config: Config) -> str | None:
    """The Ray cluster that this run attaches to; None: a local Ray of its own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def check_cluster(config: Config) -> None:
    """Holds the plan against the cluster attached to, or the one that the config says will be scaled up."""
    import ray

    available = intended_cluster(config)
    if available is None:
        resources = ray.cluster_resources()
        available = Available(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
    check_plan(plan_bundles(config), available)


def _check_principles(config: Config) -> None:
    from morlaif_ray.feedback.judges import check_principles

    chosen = load_principles(config.feedback.principles, config.feedback.principles_dir)
    names = [principle.name for principle in chosen]
    check_principles(config.feedback.judge, names)
    if config.reward.weights != "fitted":
        from morlaif_ray.reward.weighting import configured_weights

        configured_weights(config.reward.weights, names)


def _check_prompt(config: Config) -> None:
    """Template, few-shot examples, tokenizer."""
    from morlaif_ray.feedback.prompting import prompter_for

    prompter_for(config.feedback)


def _check_data_files(config: Config) -> None:
    from morlaif_ray.data.files import expand_paths

    if isinstance(config.data.source, FileSource):
        expand_paths(config.data.source.paths)


def _check_judge(config: Config) -> None:
    """A local run needs the key here; on a cluster it stands in the cluster's environment, unseen from here."""
    from morlaif_ray.feedback.prices import price_for_budget

    judge = config.feedback.judge
    price_for_budget(judge, config.feedback.budget_usd, config.feedback.prices_file)
    if judge.kind == "local" and not remote_address(config):
        from morlaif_ray.feedback.local_weights import model_version

        model_version(judge)  # the folder is there and holds a model
    # The batch judge asks from this process; the others ask from actors, on a cluster with its environment.
    if judge.kind == "openai_batch" or (judge.kind == "openai" and not remote_address(config)):
        from morlaif_ray.feedback.judges import key_names
        from morlaif_ray.feedback.openai_client import key_from_environment

        for name in key_names(judge):
            key_from_environment(name)
