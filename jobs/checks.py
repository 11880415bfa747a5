"""What can be known to be wrong before anything starts: principles, weights, data files, keys, CPUs.

check_before_start(context)   in `run_all`, before the first stage: a fraction of a second, no model, no Ray
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from actors.bundles import Available, check_plan
from actors.engines import check_engine
from actors.placement import intended_cluster, plan_bundles
from jobs.context import JobContext
from jobs.plan import available_for
from jobs.prompt_schedule import PromptSchedule
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import MANIFEST
from morlaif_ray.config import Config
from morlaif_ray.config.inputs import FileSource, PretrainedModel
from morlaif_ray.errors import ArtifactError, ConfigError
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
    check_engine(config, here=not remote_address(config))
    _check_tokenizer(config)
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


def check_policy_prompts(context: JobContext) -> None:
    """Before PPO starts: says how many prompts lose their beginning; ConfigError where no prompt would have room."""
    config = context.config
    model_path = sft_model_path(context)
    limit = _positions(model_path) or config.model.max_length
    room = limit - config.policy.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"policy.max_new_tokens {config.policy.max_new_tokens} leaves no room for a prompt within the {limit} "
            f"positions of {model_path}; lower it"
        )
    prompts = PromptSchedule(context).prompts
    # A token is at least a byte, so only these can be too long.
    long = [prompt for prompt in prompts if len(prompt.encode()) >= room]
    if not long:
        return
    from morlaif_ray.backbone import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    num = sum(len(ids) > room for ids in tokenizer(long, verbose=False)["input_ids"])
    if num:
        context.reporter.line(
            f"{num} of {len(prompts)} policy prompts are longer than the {room} tokens that policy.max_new_tokens "
            f"leaves of the model's {limit} positions; they lose their beginning (data.max_prompt_chars drops whole "
            f"turns instead)"
        )


def _positions(model_path: str) -> int | None:
    """Positions of a saved model; None where its config does not say."""
    path = Path(model_path, "config.json")
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return int(positions) if positions else None


def _check_tokenizer(config: Config) -> None:
    """The target model's tokenizer has an EOS token, as far as its files say so without loading it."""
    if not isinstance(config.model, PretrainedModel):
        return
    known = [
        json.loads(path.read_text(encoding="utf-8"))
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if (path := Path(config.model.path, name)).is_file()
    ]
    if known and not any(settings.get("eos_token") for settings in known):
        raise ArtifactError(
            f"{config.model.path}: the tokenizer has no EOS token; add one and save it again"
        )


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
