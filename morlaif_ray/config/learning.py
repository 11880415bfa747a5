"""Sections `reward`, `policy`, `sweep` and `evaluation`: scalarizers, PPO and what is measured after it."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from morlaif_ray.config.base import (
    Decay,
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


class RewardConfig(Section):
    """From K scores to one reward."""

    weights: Literal["fitted"] | dict[str, float] = "fitted"
    """fitted: logistic regression on the `weights` split; or a weight per principle (missing ones are 0)."""
    ridge: PositiveFloat = 1e-3
    """Penalty of the fit: 0.5*ridge*|beta|^2 beside the summed log-loss, beta per standard deviation of differences.
    Larger values pull the weights towards 0 (for few labels, or principles that say much the same)."""
    nonnegative: bool = False
    """No fitted weight below 0: a principle against which people choose is dropped instead of reversed."""
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
    tensor_parallel_size: PositiveInt | None = None
    """Processes that each hold a slice of every layer, a GPU each; None: `policy.rollout_gpus_per_worker` where that is
    above 1, else 1."""


class PolicyConfig(Section):
    """PPO (Schulman et al. 2017; ALGORITHMS.md section 5). Defaults are the paper's."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {
            "concurrent_arms",
            "weight_bucket_mb",
            "weight_transfer",
            "weight_transfer_timeout_s",
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
    microbatch_tokens: PositiveInt | None = None
    """At most this many tokens per forward, padding included; None: `microbatch_size` alone bounds it."""
    logprob_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits over the vocabulary exist at once; None: those of a micro-batch (faster, more memory)."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: about a third more time, a fraction of the activations' memory."""
    bf16_autocast: bool = False
    """Compute in bfloat16 while weights and Adam's moments stay as loaded; for GPUs, with float32 weights."""
    learning_rate: PositiveFloat = 4e-6
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: as it is, or falling to 0 at the last step."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    stop: list[str] = ["\n\nHuman:", "\n\nAssistant:"]
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: a value function; rloo, grpo: the prompt's other samples are the baseline (samples_per_prompt >= 2)."""
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    clip_range: PositiveFloat = 0.2
    importance_cap: PositiveFloat | None = None
    """Weigh each token's policy loss by min(learner / engine probability, this cap); None: no weights."""
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
    engine: Literal["transformers", "vllm", "auto"] = "auto"
    """The generation engine of the rollout workers; auto: vLLM where the driver finds it installed for the workers'
    device and they have a GPU of their own each or, on CPU, it has a kernel for the model; else transformers."""
    vllm: VllmConfig = VllmConfig()
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: the next step's responses are sampled, with the weights at hand, while the learner works on this one; needs
    `importance_cap`, which corrects for their age."""
    rollout_chunk: PositiveInt | None = None
    """Responses that are sampled and then scored together, while others are still sampled; None: the whole batch is
    split evenly over the workers and scored at once."""
    weight_bucket_mb: PositiveInt = 256
    """Largest piece in which new weights travel to the rollout workers."""
    weight_transfer: Literal["auto", "object_store", "gloo", "nccl", "ipc"] = "auto"
    """How new weights reach the rollout workers. object_store: Ray's, through the host's memory; gloo: one broadcast to
    all of them, likewise; nccl: broadcast between GPUs; ipc: read on the GPU that learner and workers share. auto is
    object_store: nccl and ipc have not been run on a GPU. What fails is done again by the object store."""
    weight_transfer_timeout_s: PositiveFloat = 120.0
    """Longest wait for the others in a direct transfer (gloo, nccl, ipc), and for its group to form."""
    parity_every: NonNegativeInt = 50
    """Steps between comparisons of the engine's and the learner's log-probabilities, from step 0 on; 0: none."""
    parity_threshold: PositiveFloat = 0.5
    """Largest difference of a token's log-probabilities (nats) that passes without an alarm."""
    samples_every: NonNegativeInt = 25
    """Steps between tables of sample responses in the tracker; 0: none."""
    num_rollout_workers: PositiveInt = 1
    rollout_gpus_per_worker: NonNegativeFloat = 0.0
    """Above 1: a whole number, and vLLM slices the model over them."""
    learner_ranks: PositiveInt = 1
    """Processes that share each update: every rank takes its part of the rows."""
    fsdp: bool = False
    """Each rank holds a slice of weights and moments instead of all of them (FSDP2); for models that need it."""
    learner_threads: PositiveInt = 1
    """torch threads of each learner rank on CPU; each reserves 0.4 CPUs, as the other actors wait in the meantime."""
    learner_gpus_per_rank: NonNegativeFloat = 0.0
    panel_gpus_per_model: NonNegativeFloat = 0.0
    checkpoint_every: PositiveInt = 25
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep, and beside them the one with the highest reward."""
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

    @property
    def engine_slices(self) -> int:
        """Processes that hold the model of one vLLM engine between them."""
        return self.vllm.tensor_parallel_size or max(1, int(self.rollout_gpus_per_worker))

    @model_validator(mode="after")
    def _slices_have_a_gpu_each(self) -> PolicyConfig:
        gpus, asked = self.rollout_gpus_per_worker, self.vllm.tensor_parallel_size
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"rollout_gpus_per_worker {gpus:g} is neither a part of a GPU nor a whole number; write "
                f"{math.ceil(gpus)}"
            )
        if gpus > 1 and self.engine == "transformers":
            raise ValueError(
                f"engine transformers uses one GPU, and rollout_gpus_per_worker is {gpus:g}; write engine: vllm, or "
                f"rollout_gpus_per_worker: 1"
            )
        if gpus and asked is not None and max(1, gpus) != asked:
            raise ValueError(
                f"vllm.tensor_parallel_size is {asked}, and rollout_gpus_per_worker {gpus:g}; leave the first one out"
            )
        return self

    @property
    def direct_transfer(self) -> Literal["gloo", "nccl", "ipc"] | None:
        """What carries weights from the learner to the engines without the object store; None: nothing does."""
        if self.weight_transfer in ("auto", "object_store"):
            return None
        return self.weight_transfer  # type: ignore[return-value]

    @model_validator(mode="after")
    def _weights_can_travel_so(self) -> PolicyConfig:
        problem = weight_transfer_problem(self) if self.direct_transfer is not None else None
        if problem is not None:
            raise ValueError(f"weight_transfer {self.weight_transfer} {problem}")
        return self

    @model_validator(mode="after")
    def _old_responses_are_weighed(self) -> PolicyConfig:
        if self.staleness and self.importance_cap is None:
            raise ValueError("staleness 1 needs importance weights; write importance_cap: 2.0")
        return self

    @model_validator(mode="after")
    def _advantage_has_what_it_needs(self) -> PolicyConfig:
        if self.advantage == "gae":
            return self
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage {self.advantage} compares samples of one prompt, and samples_per_prompt is "
                f"{self.samples_per_prompt}; write samples_per_prompt: 2 or more, or advantage: gae"
            )
        if self.separate_critic:
            raise ValueError(
                f"advantage {self.advantage} has no value function; leave separate_critic out"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_work(self) -> PolicyConfig:
        rows = self.batch_size // self.num_minibatches
        if rows < self.learner_ranks:
            raise ValueError(
                f"a minibatch of {rows} responses is too small for learner_ranks {self.learner_ranks}; raise "
                f"batch_size or lower num_minibatches or learner_ranks"
            )
        if self.learner_ranks > 1 and 0 < self.learner_gpus_per_rank < 1:
            raise ValueError(
                f"learner_ranks {self.learner_ranks} need a whole GPU each (NCCL takes no two ranks on one GPU), and "
                f"learner_gpus_per_rank is {self.learner_gpus_per_rank:g}; write learner_gpus_per_rank: 1"
            )
        if self.fsdp and self.learner_ranks < 2:
            raise ValueError(
                "fsdp slices the model over learner_ranks, which is 1; write learner_ranks: 2 or more"
            )
        return self


def weight_transfer_problem(policy: PolicyConfig) -> str | None:
    """Why weights cannot travel directly under these settings, and what to write instead; None where they can."""
    way, learner, worker = (
        policy.weight_transfer,
        policy.learner_gpus_per_rank,
        policy.rollout_gpus_per_worker,
    )
    if policy.lora is not None:
        return (
            "sends whole weights, and with lora the adapters alone travel, through the object store; leave "
            "weight_transfer out"
        )
    if 2 * policy.weight_transfer_timeout_s >= policy.call_timeout_s:
        return (
            f"needs weight_transfer_timeout_s ({policy.weight_transfer_timeout_s:g}) below half of call_timeout_s "
            f"({policy.call_timeout_s:g}), or the learner counts as lost first; write weight_transfer_timeout_s: "
            f"{policy.call_timeout_s / 4:g}"
        )
    if way == "gloo":
        return None
    if policy.engine == "transformers":
        return "is vLLM's, and engine is transformers; write engine: vllm, or weight_transfer: object_store"
    if not learner or not worker:
        return (
            f"moves weights between GPUs, and learner_gpus_per_rank is {learner:g}, rollout_gpus_per_worker "
            f"{worker:g}; give both a GPU, or write weight_transfer: object_store"
        )
    if way == "nccl" and (learner < 1 or worker < 1):
        return (
            f"takes no two processes on one GPU, and learner_gpus_per_rank is {learner:g}, rollout_gpus_per_worker "
            f"{worker:g}; write whole numbers, or weight_transfer: ipc"
        )
    together = learner + worker * policy.num_rollout_workers
    if way == "ipc" and (policy.learner_ranks > 1 or together > 1):
        return (
            f"needs the learner and all rollout workers on one GPU, and they ask for "
            f"{learner * policy.learner_ranks + worker * policy.num_rollout_workers:g}; write shares that add up to 1 "
            f"(0.5 and 0.5), or weight_transfer: nccl"
        )
    return None


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
