"""Which processes a config needs, with what CPUs, GPUs and memory; and whether a cluster can hold them.

    plan_bundles(config) -> Plan          pure: printed by `morlaif plan`
    check_plan(plan, available) -> None   pure: ResourceError with what is required, what is there, what to reduce

Phases do not overlap, so a cluster must hold the largest phase, not their sum. Within a phase all processes live at
once, except Tune's trials, which wait for one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.feedback_worker import worker_cpus, worker_gpus
from actors.memory import (
    Load,
    ModelShape,
    generation_gb,
    judging_gb,
    learner_gb,
    scoring_gb,
    shape_of,
    shape_of_hub_id,
    training_gb,
)
from morlaif_ray.config import Config
from morlaif_ray.errors import ResourceError
from morlaif_ray.principles import load_principles

ROLLOUT_CPUS = 0.4
LEARNER_CPUS = 0.4
"""Generation and learning of an arm take turns: two arms and the panel fit on two cores (4 x 0.4 + 0.3)."""
PANEL_CPUS = 0.3
SFT_CPUS = 1.0
OFFLINE_SWEEP_CPUS = 1.0
KV_SEQUENCES = 16
"""Sequences whose KV cache must fit; a generation engine queues the rest."""
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Bundle:
    """`count` processes of one kind."""

    phase: str
    """The stage folder that this process works for."""
    role: str
    count: int
    cpus: float
    """CPUs of each."""
    gpus: float
    """GPUs of each; a fraction shares one."""
    memory_gb: float
    """Estimate for each: memory per GPU where `gpus` > 0, else host memory; NaN where the model's shape is unknown."""
    reduce: str
    """The settings that make this smaller."""
    waits: bool = False
    """Tune runs as many as fit: one at a time is enough."""

    @property
    def least(self) -> int:
        """How many must live at once."""
        return min(self.count, 1) if self.waits else self.count

    def describe(self) -> str:
        return f"{self.least} x {self.role}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that runs, by phase."""

    bundles: tuple[Bundle, ...]

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(bundle.phase for bundle in self.bundles))

    def of(self, phase: str) -> list[Bundle]:
        return [bundle for bundle in self.bundles if bundle.phase == phase]

    def cpus(self, phase: str) -> float:
        """CPUs that the phase needs at least."""
        return sum(bundle.least * bundle.cpus for bundle in self.of(phase))

    def gpus(self, phase: str) -> int:
        """GPUs that the phase needs at least."""
        return pack_gpus([bundle.gpus for bundle in self.of(phase) for _ in range(bundle.least)])

    @property
    def peak_cpus(self) -> float:
        return max(self.cpus(phase) for phase in self.phases)

    @property
    def peak_gpus(self) -> int:
        return max(self.gpus(phase) for phase in self.phases)


@dataclass(frozen=True, slots=True)
class Available:
    """What a cluster offers. None: not known, not checked."""

    cpus: float | None
    gpus: float
    gpus_per_node: int | None = None
    gpu_memory_gb: float | None = None


def pack_gpus(wanted: list[float]) -> int:
    """GPUs that hold all processes: whole ones take their own, fractions share one (first fit, largest first)."""
    whole = sum(math.ceil(gpus - _ROUNDING) for gpus in wanted if gpus >= 1)
    free: list[float] = []
    for gpus in sorted((gpus for gpus in wanted if 0 < gpus < 1), reverse=True):
        place = next((i for i, left in enumerate(free) if left + _ROUNDING >= gpus), None)
        if place is None:
            free.append(1.0 - gpus)
        else:
            free[place] -= gpus
    return whole + len(free)


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


def check_plan(plan: Plan, available: Available) -> None:
    """Raises ResourceError where a phase can never fit; says what is required, what is there, what to reduce."""
    for phase in plan.phases:
        bundles = plan.of(phase)
        shown = ", ".join(f"{b.describe()} at {b.cpus:g} CPU" for b in bundles if b.cpus)
        needed = plan.cpus(phase)
        if available.cpus is not None and needed > available.cpus + _ROUNDING:
            raise ResourceError(
                f"{phase} needs {needed:g} CPUs ({shown}), there are {available.cpus:g}; "
                f"reduce {_reduce(bundles)}, or add CPUs (a local Ray: cluster.num_cpus)"
            )
        if plan.gpus(phase) > available.gpus + _ROUNDING:
            shown = ", ".join(f"{b.describe()} at {b.gpus:.3g} GPU" for b in bundles if b.gpus)
            raise ResourceError(
                f"{phase} needs {plan.gpus(phase)} GPUs ({shown}), there are {available.gpus:g}; "
                f"reduce {_reduce([b for b in bundles if b.gpus])}, or add nodes"
            )
        for bundle in bundles:
            _check_bundle(bundle, available)


def _check_bundle(bundle: Bundle, available: Available) -> None:
    """One process must fit on one node, and into its share of a GPU."""
    per_node = available.gpus_per_node
    if per_node is not None and bundle.gpus > per_node:
        raise ResourceError(
            f"{bundle.phase}: one {bundle.role} needs {bundle.gpus:g} GPUs, a node has {per_node}; "
            f"reduce {bundle.reduce}"
        )
    if available.gpu_memory_gb is None or bundle.gpus <= 0:
        return
    share_gb = available.gpu_memory_gb * min(bundle.gpus, 1.0)
    if bundle.memory_gb > share_gb:  # False for NaN: an unknown model is not judged
        raise ResourceError(
            f"{bundle.phase}: one {bundle.role} needs about {bundle.memory_gb:.1f} GB, its share of a GPU "
            f"({min(bundle.gpus, 1.0):.3g} of {available.gpu_memory_gb:g} GB) is {share_gb:.1f} GB; "
            f"change {bundle.reduce}"
        )


def _reduce(bundles: list[Bundle]) -> str:
    return " or ".join(dict.fromkeys(bundle.reduce for bundle in bundles))


def _target(config: Config) -> ModelShape | None:
    return shape_of(config.model)


def _pm_shape(config: Config) -> ModelShape | None:
    backbone = config.preference.backbone
    if backbone is None:
        return shape_of(config.model)
    dtype = "float32" if config.model.kind == "scratch" else config.model.dtype
    return shape_of_hub_id(backbone, dtype)


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


def _rollouts(config: Config, phase: str, count: int, setting: str, new_tokens: int) -> Bundle:
    shape, gpus = _target(config), config.policy.rollout_gpus_per_worker
    memory = math.nan
    if shape is not None:
        load = Load(KV_SEQUENCES, config.model.max_length + new_tokens)
        memory = generation_gb(shape, load, shards=max(1, round(gpus)), on_gpu=gpus > 0)
    reduce = f"{setting} or policy.rollout_gpus_per_worker" if gpus else setting
    return Bundle(phase, "rollout worker", count, ROLLOUT_CPUS, gpus, memory, reduce)


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
    preference, shape, gpus = config.preference, _pm_shape(config), training_gpus(config)
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
    return [training]


def _panel(config: Config, phase: str, num_models: int) -> Bundle:
    """The actors behind the panel: one per saved model, or all of them in one."""
    preference, shape = config.preference, _pm_shape(config)
    bank = preference.scores_as_bank  # adapters: one backbone, a row per text and adapter
    together = num_models if bank or preference.panel_placement == "one_actor" else 1
    gpus = config.policy.panel_gpus_per_model * (1 if bank else together)
    memory = math.nan
    if shape is not None:
        rows = preference.score_batch_size * (num_models if bank else 1)
        load = Load(rows, preference.max_length)
        memory = scoring_gb(shape, load, num_models=1 if bank else together, on_gpu=gpus > 0)
    reduce = "policy.panel_gpus_per_model or preference.score_batch_size" if gpus else ""
    reduce = reduce or "the panel (preference.panel_placement: one_actor)"
    return Bundle(
        phase, "preference model", num_models // together, PANEL_CPUS, gpus, memory, reduce
    )


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
    if gpus:
        reduce = "policy.microbatch_size or policy.learner_ranks (with policy.fsdp)"
    learner = Bundle(
        phase,
        "PPO learner",
        num_concurrent * policy.learner_ranks,
        LEARNER_CPUS,
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
