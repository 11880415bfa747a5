"""Which processes a config needs, with what CPUs, GPUs and memory.

plan_bundles(config) -> Plan          pure: printed by `morlaif plan`, held against a cluster by `bundles.check_plan`
"""

from __future__ import annotations

import math
from dataclasses import replace

from actors.bundles import Available, Bundle, Plan
from actors.feedback_worker import worker_cpus, worker_gpus
from actors.memory import (
    Load,
    ModelShape,
    branched,
    generation_gb,
    judging_gb,
    learner_gb,
    pooling_gb,
    scoring_gb,
    shape_of,
    shape_of_hub_id,
    training_gb,
)
from morlaif_ray.config import Config
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.principles import load_principles

ROLLOUT_CPUS = 0.4
LEARNER_CPUS = 0.4
"""Of each torch thread of a learner. Generation and learning of an arm take turns, so that two arms and the panel fit
on two cores (4 x 0.4 + 0.3)."""
PANEL_CPUS = 0.3
SFT_CPUS = 1.0
OFFLINE_SWEEP_CPUS = 1.0
KV_SEQUENCES = 16
"""Sequences whose KV cache must fit; a generation engine queues the rest."""


def plan_bundles(config: Config) -> Plan:
    """All processes of a run, in the order of the method."""
    bundles = [
        *_sft(config),
        *_pairs(config),
        *_feedback(config),
        *_preference(config),
        *_sweep(config),
        *_arms(config, "5_policy", min(config.policy.concurrent_arms, len(config.policy.arms))),
        *_evaluation(config),
    ]
    return Plan(tuple(bundles))


def learner_cpus(policy: PolicyConfig) -> float:
    """CPUs that a learner rank reserves: a share of each thread that it computes with; on a GPU one thread feeds it."""
    threads = 1 if policy.learner_gpus_per_rank > 0 else policy.learner_threads
    return round(LEARNER_CPUS * threads, 4)  # Ray counts in steps of 1/10,000


def training_gpus(config: Config) -> float:
    """GPUs of each SFT and preference training: one where the policy trains on GPUs, else none."""
    return 1.0 if config.policy.learner_gpus_per_rank > 0 else 0.0


def intended_cluster(config: Config) -> Available | None:
    """The cluster that the config says it is for; None where it says nothing."""
    cluster = config.cluster
    if cluster.num_gpus_per_node is None:
        return None
    # A plan may take several nodes: their number follows from the plan, so only what one node holds can be checked.
    return Available(None, math.inf, cluster.num_gpus_per_node, cluster.gpu_memory_gb)


def _target(config: Config) -> ModelShape | None:
    return shape_of(config.model)


def _pm_shape(config: Config) -> ModelShape | None:
    backbone = config.preference.backbone
    if backbone is None:
        return shape_of(config.model)
    dtype = "float32" if config.model.kind == "scratch" else config.model.dtype
    return shape_of_hub_id(backbone, dtype)


def _trunk_shape(config: Config) -> ModelShape | None:
    """The largest preference model: with all branches where they are full copies in one model."""
    preference, shape = config.preference, _pm_shape(config)
    if shape is None or preference.topology != "late_branching" or preference.lora is not None:
        return shape
    return branched(shape, num_principles(config), preference.branch_blocks)


def _sft(config: Config) -> list[Bundle]:
    if not config.sft.enabled:
        return []
    shape, sft, gpus = _target(config), config.sft, training_gpus(config)
    length = config.model.max_length
    memory = math.nan
    if shape is not None:
        load = Load(sft.batch_size // sft.num_workers, length, scored=length)
        memory = training_gb(shape, load, lora=sft.lora, on_gpu=gpus > 0)
    reduce = "sft.batch_size or raise sft.num_workers" if gpus else "sft.num_workers"
    return [Bundle("0_sft", "SFT worker", sft.num_workers, SFT_CPUS, gpus, memory, reduce)]


def _rollouts(
    config: Config, phase: str, count: int, setting: str, new_tokens: int, *, learns: bool = False
) -> Bundle:
    """`learns`: the workers get new weights after every step."""
    shape, gpus = _target(config), config.policy.rollout_gpus_per_worker
    slices = config.policy.engine_slices
    memory = math.nan
    if shape is not None:
        load = Load(KV_SEQUENCES, config.model.max_length + new_tokens)
        # Adapters are merged into a base that stays on the host: beside the weights where those lie there, too.
        copies = 2 if learns and config.policy.lora is not None and not gpus else 1
        memory = generation_gb(
            shape, load, copies=copies, shards=slices if gpus else 1, on_gpu=gpus > 0
        )
    reduce = f"{setting} or policy.rollout_gpus_per_worker" if gpus else setting
    return Bundle(phase, "rollout worker", count, slices * ROLLOUT_CPUS, gpus, memory, reduce)


def _pairs(config: Config) -> list[Bundle]:
    """Also with pairs of a data set: the reference responses that fit the score normalisers are sampled here."""
    pairs = config.pairs
    return [
        _rollouts(config, "1_pairs", pairs.num_workers, "pairs.num_workers", pairs.max_new_tokens)
    ]


def _feedback(config: Config) -> list[Bundle]:
    feedback = config.feedback
    gpus = worker_gpus(feedback)
    workers = Bundle(
        "2_feedback",
        "feedback worker",
        feedback.num_workers,
        worker_cpus(feedback),
        gpus,
        judging_gb(feedback.judge),
        "feedback.num_workers" if not gpus else "feedback.num_workers or judge.gpus_per_worker",
    )
    bundles = [
        workers,
        Bundle("2_feedback", "ledger writer", 1, 0.0, 0.0, 0.1, "feedback.num_workers"),
    ]
    if feedback.requests_per_minute or feedback.tokens_per_minute or feedback.budget_usd:
        bundles.append(
            Bundle("2_feedback", "rate limiter", 1, 0.0, 0.0, 0.1, "feedback.num_workers")
        )
    return bundles


def num_principles(config: Config) -> int:
    return len(load_principles(config.feedback.principles, config.feedback.principles_dir))


def trained_models(config: Config) -> int:
    """Preference models that stage 3 trains: one per principle or one trunk, and the baselines that need their own."""
    principles = 1 if config.preference.trains_together else num_principles(config)
    return principles + sum(name != "best_principle" for name in config.preference.baselines)


def _preference(config: Config) -> list[Bundle]:
    preference, shape, gpus = config.preference, _trunk_shape(config), training_gpus(config)
    num_trained = trained_models(config)
    memory = math.nan
    if shape is not None:
        load = Load(2 * preference.batch_size, preference.max_length)
        memory = training_gb(
            shape,
            load,
            lora=preference.lora,
            checkpointing=preference.gradient_checkpointing,
            on_gpu=gpus > 0,
        )
    count = min(preference.concurrent_trials, num_trained)
    reduce = "preference.concurrent_trials"
    if gpus:
        reduce += ", preference.batch_size (or set preference.gradient_checkpointing)"
    workers = max(
        1, preference.workers_per_trial
    )  # of one training; the model is sharded over them
    training = Bundle(
        "3_preference_models",
        "preference training",
        count * workers,
        preference.cpus_per_trial,
        gpus,
        memory,
        reduce,
        waits=True,
    )
    # All saved models score when the last training has ended.
    scoring = _panel(config, "3_preference_models", num_trained, preference.scoring_actors)
    return [training, replace(scoring, turn=1)]


def _panel(config: Config, phase: str, num_models: int, num_actors: int = 1) -> Bundle:
    """The actors behind the panel: one per saved model, or all of them in one (`num_actors` that share them)."""
    preference, plain, shape = config.preference, _pm_shape(config), _trunk_shape(config)
    bank = preference.scores_as_bank  # adapters: one backbone, a row per text and adapter
    together = 1  # saved models of the largest actor
    if bank:
        together = num_models
    elif preference.panel_placement == "one_actor":
        together = -(-num_models // num_actors)
    gpus = config.policy.panel_gpus_per_model * (1 if bank else together)
    memory = math.nan
    if plain is not None and shape is not None:
        # Of models in one actor one at most has branches: its surplus, spread over them.
        surplus = (shape.num_parameters - plain.num_parameters) / together
        shape = replace(plain, num_parameters=plain.num_parameters + surplus)
        rows = preference.score_batch_size * (num_models if bank else 1)
        load = Load(rows, preference.max_length)
        held, on_gpu = 1 if bank else together, gpus > 0
        memory = scoring_gb(shape, load, num_models=held, on_gpu=on_gpu)
        if preference.engine == "vllm":
            cache_mb = preference.vllm.kv_cache_mb
            memory = pooling_gb(shape, load, cache_mb=cache_mb, num_models=held, on_gpu=on_gpu)
    reduce = "policy.panel_gpus_per_model or preference.score_batch_size" if gpus else ""
    reduce = reduce or "the panel (preference.panel_placement: one_actor)"
    count = num_models // together
    if num_actors > 1 and not bank and preference.panel_placement == "one_actor":
        count, reduce = min(num_actors, num_models), "preference.scoring_actors"
    return Bundle(phase, "preference model", count, PANEL_CPUS, gpus, memory, reduce)


def _panel_models(config: Config) -> int:
    """Saved models that rewards are read from: the principles' and the arms' baselines'."""
    principles = 1 if config.preference.trains_together else num_principles(config)
    baselines = {arm.baseline for arm in config.policy.arms} - {None, "best_principle"}
    return principles + len(baselines)


def _arms(config: Config, phase: str, num_concurrent: int) -> list[Bundle]:
    policy, shape = config.policy, _target(config)
    memory = math.nan
    gpus = policy.learner_gpus_per_rank
    if shape is not None:
        memory = learner_gb(shape, policy, config.model.max_length)
    reduce = "policy.concurrent_arms"
    if policy.learner_threads > 1:
        reduce += " or policy.learner_threads"
    if gpus:
        reduce = "policy.microbatch_size or policy.learner_ranks (with policy.fsdp)"
    learner = Bundle(
        phase,
        "PPO learner",
        num_concurrent * policy.learner_ranks,
        learner_cpus(policy),
        gpus,
        memory,
        reduce,
    )
    rollouts = _rollouts(
        config,
        phase,
        num_concurrent * policy.num_rollout_workers,
        "policy.num_rollout_workers",
        policy.max_new_tokens,
        learns=True,
    )
    return [learner, rollouts, _panel(config, phase, _panel_models(config))]


def _sweep(config: Config) -> list[Bundle]:
    sweep = config.sweep
    if not sweep.enabled:
        return []
    if sweep.online_steps:
        return _arms(
            config, "4_reward", min(sweep.concurrent_trials, len(sweep.online_scalarizers))
        )
    return [
        Bundle(
            "4_reward",
            "sweep trial",
            sweep.concurrent_trials,
            OFFLINE_SWEEP_CPUS,
            0.0,
            0.2,
            "sweep.concurrent_trials",
            waits=True,
        )
    ]


def _evaluation(config: Config) -> list[Bundle]:
    policy = config.policy
    return [
        _rollouts(
            config,
            "6_evaluation",
            policy.num_rollout_workers,
            "policy.num_rollout_workers",
            policy.max_new_tokens,
        ),
        _panel(config, "6_evaluation", _panel_models(config)),
    ]
