"""Sections `preference`, `reward`, `policy`: preference models, scalarizers and PPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from morlaif_ray.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.judging import Baseline

ScalarizerName = Literal[
    "linear",
    "worst_case",
    "soft_max_min",
    "uncertainty_weighted",
    "lower_quantile",
    "max_median",
    "bernoulli_nash",
]
ALL_SCALARIZERS: tuple[ScalarizerName, ...] = (
    "linear",
    "worst_case",
    "soft_max_min",
    "uncertainty_weighted",
    "lower_quantile",
    "max_median",
    "bernoulli_nash",
)


Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class PreferenceConfig(Section):
    """One preference model per principle, and the single-objective baselines on the same pairs."""

    operational: ClassVar[frozenset[str]] = frozenset({"concurrent_trials", "max_failures"})

    topology: Literal["separate", "shared_trunk"] = "separate"
    """separate: K models (the paper); shared_trunk: one trunk with K heads."""
    backbone: str | None = None
    """A folder or hub id for the PMs' backbone; None: the SFT model."""
    baselines: list[Baseline] = [
        "random_principle",
        "general_principle",
        "mean_log_odds",
        "human_labels",
    ]
    loss: Literal["soft_label", "margin"] = "soft_label"
    """soft_label: cross-entropy against the judge's probability; margin: hard label, margin |log-odds| (paper)."""
    centering: NonNegativeFloat = 0.01
    """Coefficient of (r_a + r_b)^2, which fixes the free constant of a reward."""
    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 5e-5
    warmup_steps: NonNegativeInt = 250
    max_length: PositiveInt = 512
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    concurrent_trials: PositiveInt = 2
    """Trainings at the same time."""
    workers_per_trial: Annotated[int, Field(ge=0, le=1)] = 1
    """Ray Train workers of one training: 1: a process of its own, 0: inside the Tune trial (saves a process)."""
    panel_placement: Literal["per_model", "one_actor"] = "per_model"
    """per_model: an actor for every saved model; one_actor: all of them in one process (small machines)."""
    max_failures: NonNegativeInt = 1
    """Restarts of a lost training before the stage ends with an error."""
    score_batch_size: PositiveInt = 64


class RewardConfig(Section):
    """From K scores to one reward."""

    weights: Literal["fitted"] | dict[str, float] = "fitted"
    """fitted: logistic regression on the `weights` split; or a weight per principle (missing ones are 0)."""
    weighting: Literal["multiply", "orient"] = "multiply"
    """multiply: v = w*z; orient: v = sign(w)*z."""
    soft_max_min_temperature: PositiveFloat = 1.0
    uncertainty_lambda: NonNegativeFloat = 0.5
    lower_quantile: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0 / 3.0
    """Share of the principles that the lower quantile averages."""
    missing: Literal["error", "renormalise"] = "error"
    """What a missing score does to its response: error, or scalarize over the present principles (counted)."""
    max_missing_share: Share = 0.02
    num_bootstrap: PositiveInt = 200
    """Resamples behind the intervals of the fitted weights."""
    num_ablation_orders: PositiveInt = 20
    """Random removal orders averaged in the principle ablation."""


class ArmConfig(Section):
    """One policy to train: a scalarizer over the PMs, or a single-objective baseline's PM."""

    name: str = Field(pattern=r"^[a-z0-9_]{1,40}$")
    scalarizer: ScalarizerName | None = None
    baseline: Baseline | None = None
    num_steps: PositiveInt | None = None
    """Overrides `policy.num_steps` for this arm."""

    @model_validator(mode="after")
    def _one_of(self) -> ArmConfig:
        if (self.scalarizer is None) == (self.baseline is None):
            raise ValueError(f"arm '{self.name}' needs exactly one of 'scalarizer' and 'baseline'")
        return self


class VllmConfig(Section):
    """Memory and speed of a vLLM engine (`policy.engine: vllm`)."""

    max_num_seqs: PositiveInt = 64
    """Responses that one engine samples at the same time."""
    kv_cache_mb: PositiveInt | None = None
    """Keys and values of sequences in flight; None: 256 on a CPU, what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    """Share of a GPU's memory that the engine takes; counts where `kv_cache_mb` is not set."""
    enforce_eager: bool = True
    """True: starts in seconds; False: compiles and captures graphs first, then samples faster."""


class PolicyConfig(Section):
    """PPO (Schulman et al. 2017; ALGORITHMS.md section 5). Defaults are the paper's."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {
            "concurrent_arms",
            "weight_bucket_mb",
            "parity_every",
            "parity_threshold",
            "samples_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_restarts",
            "call_timeout_s",
        }
    )

    arms: list[ArmConfig] = [
        ArmConfig(name="linear", scalarizer="linear"),
        ArmConfig(name="single_pm", baseline="random_principle"),
    ]
    concurrent_arms: PositiveInt = 1
    num_steps: PositiveInt = 100
    """PPO steps; each samples `batch_size` responses."""
    batch_size: PositiveInt = 64
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt of a step: the batch holds batch_size / samples_per_prompt prompts."""
    num_epochs: PositiveInt = 4
    num_minibatches: PositiveInt = 1
    microbatch_size: PositiveInt = 64
    """Sequences per forward; gradients are accumulated over a minibatch."""
    learning_rate: PositiveFloat = 4e-6
    warmup_steps: NonNegativeInt = 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    stop: list[str] = ["\n\nHuman:", "\n\nAssistant:"]
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    clip_range: PositiveFloat = 0.2
    value_clip_range: PositiveFloat = 0.2
    value_coefficient: NonNegativeFloat = 1.0
    separate_critic: bool = False
    """False: a value head on the policy's trunk; True: a critic of its own."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_coefficient: NonNegativeFloat = 0.05
    """beta_0."""
    adaptive_kl: bool = True
    kl_target: PositiveFloat = 6.0
    """Nats per response."""
    kl_horizon: PositiveFloat = 10_000.0
    """Samples."""
    reward_clip: PositiveFloat = 10.0
    scale_reward: bool = True
    """Divide rewards by their running standard deviation (no mean shift)."""
    truncation_penalty: NonNegativeFloat = 0.0
    """Subtracted from the scalar reward of a response without EOS, in units of the reward."""
    lora: LoraConfig | None = None
    engine: Literal["transformers", "vllm", "auto"] = "transformers"
    """The generation engine of the rollout workers; auto: vLLM where the driver finds it installed."""
    vllm: VllmConfig = VllmConfig()
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: the next step's responses are sampled, with the weights at hand, while the learner works on this one."""
    rollout_chunk: PositiveInt | None = None
    """Responses that are sampled and then scored together, while others are still sampled; None: the whole batch is
    split evenly over the workers and scored at once."""
    weight_bucket_mb: PositiveInt = 256
    """Largest piece in which new weights travel to the rollout workers."""
    parity_every: NonNegativeInt = 50
    """Steps between comparisons of the engine's and the learner's log-probabilities, from step 0 on; 0: none."""
    parity_threshold: PositiveFloat = 0.5
    """Largest difference of a token's log-probabilities (nats) that passes without an alarm."""
    samples_every: NonNegativeInt = 25
    """Steps between tables of sample responses in the tracker; 0: none."""
    num_rollout_workers: PositiveInt = 1
    rollout_gpus_per_worker: NonNegativeFloat = 0.0
    learner_ranks: PositiveInt = 1
    learner_gpus_per_rank: NonNegativeFloat = 0.0
    panel_gpus_per_model: NonNegativeFloat = 0.0
    checkpoint_every: PositiveInt = 25
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    max_restarts: NonNegativeInt = 2
    """Restart budget of each supervised actor."""
    call_timeout_s: PositiveFloat = 600.0
    """Longest wait for one remote call."""

    @field_validator("arms")
    @classmethod
    def _unique_arms(cls, arms: list[ArmConfig]) -> list[ArmConfig]:
        names = [arm.name for arm in arms]
        if not names:
            raise ValueError("at least one arm is needed")
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must differ; got {', '.join(names)}")
        return arms

    @model_validator(mode="after")
    def _divisible(self) -> PolicyConfig:
        if self.batch_size % self.num_minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_minibatches {self.num_minibatches}"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of samples_per_prompt {self.samples_per_prompt}"
            )
        return self


class SweepConfig(Section):
    """Ray Tune over scalarizers and weights."""

    operational: ClassVar[frozenset[str]] = frozenset({"concurrent_trials"})

    enabled: bool = True
    """Whether `morlaif run` includes the sweep."""
    num_offline_samples: NonNegativeInt = 64
    """Weight and parameter draws per scalarizer, scored on cached PM scores."""
    weight_spread: PositiveFloat = 0.5
    """Log-normal spread of the drawn weights around the fitted ones (signs kept)."""
    online_steps: NonNegativeInt = 0
    """PPO steps of each online trial; 0: offline only."""
    online_scalarizers: list[ScalarizerName] = ["linear", "worst_case", "soft_max_min"]
    concurrent_trials: PositiveInt = 2


class EvaluationConfig(Section):
    num_prompts: PositiveInt = 256
    """Held-out prompts answered by every policy."""
    num_bootstrap: PositiveInt = 10_000
    """Resamples over prompts behind each 95% interval."""
    matrix_arms: list[str] | Literal["all"] = "all"
    """Arms of the scalarizer-by-scalarizer win-rate matrix."""
    num_samples_shown: PositiveInt = 12
    """Sample responses, before and after, in the report."""
    judge: Literal["training", "oracle"] = "training"
    """oracle: the test-bed's truth (test-bed data only); training: the judge of `feedback`."""
    temperature: PositiveFloat = 1.0


Confidence = Annotated[float, Field(gt=0.5, lt=1.0)]
