"""Section `preference`: how preference models are trained and scored."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from morlaif_ray.config.base import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.judging import Baseline


class PanelVllmConfig(Section):
    """Memory and speed of a vLLM engine that scores (`preference.engine: vllm`)."""

    operational: ClassVar[frozenset[str]] = frozenset({"kv_cache_mb"})

    kv_cache_mb: PositiveInt | None = None
    """Keys and values of the texts of a pass, per saved model; None: 256 on a CPU, 2048 on a GPU, more where a single
    text of `max_length` needs it."""
    enforce_eager: bool = True
    """True: starts in seconds; False: compiles first."""


class PreferenceConfig(Section):
    """One preference model per principle, and the single-objective baselines on the same pairs."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"concurrent_trials", "cpus_per_trial", "scoring_actors", "max_failures"}
    )

    topology: Literal["separate", "shared_trunk", "late_branching", "adapters"] = "separate"
    """separate: K models (the paper); shared_trunk: one trunk with K heads; late_branching: one trunk whose last
    `branch_blocks` blocks exist once per principle; adapters: K LoRA adapters (`lora`) on one frozen backbone, scored
    in one batched pass."""
    branch_blocks: PositiveInt | None = None
    """late_branching: blocks of each branch; None: a quarter of the backbone's. Without `lora` the branches are full
    copies above a trunk trained with them; with `lora` adapters above a frozen trunk."""
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
    trainer: Literal["own", "trl"] = "own"
    """own: soft labels, margins, any number of heads; trl: TRL's `RewardTrainer`, the paper's recipe (loss margin, one
    head per model)."""
    centering: NonNegativeFloat = 0.01
    """Coefficient of (r_a + r_b)^2, which fixes the free constant of a reward."""
    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    train_tokens_per_batch: PositiveInt | None = None
    """Most tokens, padding included, of one forward of a step, whose texts are then grouped by length; None: all texts
    of a step are padded to the longest."""
    microbatch_size: PositiveInt | None = None
    """Pairs per forward; gradients are accumulated over a batch. None: the whole batch. It halves when memory runs
    out."""
    learning_rate: PositiveFloat = 5e-5
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's memory of gradients and of their squares. Twelve heads in one pass over 2,400 pairs: 0.8, 0.95."""
    warmup_steps: NonNegativeInt = 250
    max_length: PositiveInt = 512
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of training's matrix products beside float32 weights; auto: bfloat16 on a GPU, float32 on CPU."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints from which a lost training resumes."""
    concurrent_trials: PositiveInt = 2
    """Trainings at the same time."""
    cpus_per_trial: PositiveFloat = 0.9
    """CPUs that one training reserves. Just under one, so that a small machine keeps room for supervisors."""
    workers_per_trial: NonNegativeInt = 1
    """Ray Train workers of one training: 1: a process of its own; 0: inside the Tune trial (saves a process); more: the
    model is sharded over them (FSDP2), each with a GPU where there are any."""
    panel_placement: Literal["per_model", "one_actor"] = "per_model"
    """per_model: an actor for every saved model; one_actor: all of them in one process (small machines)."""
    scoring_actors: PositiveInt = 1
    """one_actor: processes that share the models while stage 3 scores, when nothing else runs."""
    max_failures: NonNegativeInt = 1
    """Restarts of a lost training before the stage ends with an error."""
    score_batch_size: PositiveInt = 64
    """Most texts of one forward."""
    score_tokens_per_batch: PositiveInt | None = None
    """Most tokens, padding included, of one forward; None: only `score_batch_size` counts."""
    last_block_at_end: bool = False
    """True: training and scoring compute the last block for the last token alone, which is all a score reads: equal
    within rounding, faster the fewer blocks there are (GPT-2, Llama, Gemma). Branches and adapter banks always do."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What the panel scores with; vllm: its pooling runner, for whole decoders (topology separate or shared_trunk
    without `lora`): equal within rounding, faster on texts of mixed lengths and larger models. It never trains."""
    vllm: PanelVllmConfig = PanelVllmConfig()

    @model_validator(mode="after")
    def _topology_fits(self) -> PreferenceConfig:
        if self.topology == "adapters" and self.lora is None:
            raise ValueError(
                "topology 'adapters' needs 'lora'; write lora: {} for the paper's rank 8, alpha 32"
            )
        if self.branch_blocks is not None and self.topology != "late_branching":
            raise ValueError(
                f"branch_blocks belongs to topology 'late_branching', not '{self.topology}'; remove it"
            )
        return self

    @model_validator(mode="after")
    def _vllm_scores_whole_models(self) -> PreferenceConfig:
        if self.engine == "transformers":
            return self
        if self.topology not in ("separate", "shared_trunk"):
            raise ValueError(
                f"engine is 'vllm', which scores whole models, but topology is '{self.topology}'; write "
                f"engine: transformers, or topology: shared_trunk"
            )
        if self.lora is not None:
            raise ValueError(
                "engine is 'vllm', which scores whole models, and with 'lora' adapters are saved; write "
                "engine: transformers, or remove lora"
            )
        return self

    @property
    def trains_together(self) -> bool:
        """Whether all principles are heads of one saved model, trained together."""
        return self.topology == "shared_trunk" or (
            self.topology == "late_branching" and self.lora is None
        )

    @property
    def scores_as_bank(self) -> bool:
        """Whether the saved adapters are loaded as one `AdapterBank`."""
        return self.topology in ("adapters", "late_branching") and self.lora is not None

    @model_validator(mode="after")
    def _several_workers_shard_a_plain_trunk(self) -> PreferenceConfig:
        if self.workers_per_trial > 1 and self.topology not in (
            "separate",
            "shared_trunk",
            "adapters",
        ):
            raise ValueError(
                f"workers_per_trial above 1 shards trunk and head, which topology '{self.topology}' does not allow; "
                f"write workers_per_trial: 1, or topology: shared_trunk"
            )
        return self

    @model_validator(mode="after")
    def _several_workers_compute_in_step(self) -> PreferenceConfig:
        """Sharded ranks gather weights in each forward: all must run as many, and through the whole trunk."""
        if self.workers_per_trial > 1 and self.train_tokens_per_batch is not None:
            raise ValueError(
                f"workers_per_trial is {self.workers_per_trial}, and train_tokens_per_batch gives its workers unequal "
                f"numbers of forwards, so they would wait for each other; leave it out, or write workers_per_trial: 1"
            )
        if self.workers_per_trial > 1 and self.last_block_at_end:
            raise ValueError(
                f"workers_per_trial is {self.workers_per_trial}, and last_block_at_end passes by the blocks that are "
                f"sharded over its workers; write last_block_at_end: false, or workers_per_trial: 1"
            )
        return self

    @model_validator(mode="after")
    def _trl_has_hard_labels_and_one_head(self) -> PreferenceConfig:
        if self.trainer == "own":
            return self
        if self.loss != "margin":
            raise ValueError(
                "trainer is 'trl', which has no soft labels; write loss: margin, or trainer: own"
            )
        if self.topology not in ("separate", "adapters"):
            raise ValueError(
                f"trainer is 'trl', which trains one head, but topology is '{self.topology}'; write "
                f"topology: separate, or trainer: own"
            )
        if self.workers_per_trial > 1:
            raise ValueError(
                f"trainer is 'trl', which trains in one process, but workers_per_trial is "
                f"{self.workers_per_trial}; write 1, or trainer: own"
            )
        for key, value in (
            ("train_tokens_per_batch", self.train_tokens_per_batch),
            ("last_block_at_end", self.last_block_at_end or None),
        ):
            if value is not None:
                raise ValueError(
                    f"trainer is 'trl', which knows no {key}; remove {key}, or write trainer: own"
                )
        if self.batch_size % (self.microbatch_size or self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of microbatch_size {self.microbatch_size}, as "
                f"trainer 'trl' needs"
            )
        return self
