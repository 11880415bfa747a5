"""Sections `data`, `model`, `sft`, `pairs`: where dialogues come from and what is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from morlaif_ray.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class TestbedSource(Section):
    """Self-written dialogues whose true score on every principle is known (ALGORITHMS.md section 8)."""

    __test__ = False  # the name begins with "Test": keep pytest from collecting it

    kind: Literal["testbed"] = "testbed"
    num_prompts: PositiveInt = 12_000
    """Unique prompts over all splits."""


class FileSource(Section):
    """Local files: .jsonl, .jsonl.gz, .json, .parquet. Their rows are split by prompt hash."""

    kind: Literal["files"] = "files"
    paths: list[Path] = Field(min_length=1)
    """Files, or folders whose data files are taken in name order."""
    format: Literal["hh", "pairs", "conversational"] = "hh"
    """hh: `chosen`/`rejected` dialogues; pairs: `prompt`, `response_a`, `response_b`, optional `label`;
    conversational: TRL's `chosen`/`rejected` message lists with an optional `prompt` list."""
    limit: PositiveInt | None = None
    """Take only the first rows."""


class HubSource(Section):
    """A data set id for `datasets.load_dataset` (a hub id or a local folder)."""

    kind: Literal["hub"] = "hub"
    id: str
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    format: Literal["hh", "pairs", "conversational"] = "hh"
    limit: PositiveInt | None = None


DataSource = Annotated[TestbedSource | FileSource | HubSource, Field(discriminator="kind")]


class SplitShares(Section):
    """Share of prompts per split; assigned by prompt hash, so no prompt stands in two splits."""

    sft: Share = 0.35
    preference: Share = 0.30
    weights: Share = 0.10
    test: Share = 0.15
    policy: Share = 0.10

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitShares:
        total = self.sft + self.preference + self.weights + self.test + self.policy
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the five shares sum to {total:g}; make them sum to 1")
        return self


class DataConfig(Section):
    source: DataSource = TestbedSource()
    splits: SplitShares = SplitShares()
    on_bad_row: Literal["error", "skip"] = "error"
    """error: stop at the first malformed row; skip: count and list them in 1_pairs/bad_rows.jsonl."""
    max_prompt_chars: PositiveInt = 20_000
    """Longer prompts lose their oldest turns."""


class ScratchModel(Section):
    """A small GPT-2 trained on the spot, with a word-level tokenizer fitted on the data."""

    kind: Literal["scratch"] = "scratch"
    width: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    max_length: PositiveInt = 256
    vocabulary_size: PositiveInt = 4_000
    """Upper bound; rarer words become the unknown token."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ScratchModel:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        return self


class PretrainedModel(Section):
    """A causal LM from a local folder or a hub id, loaded by `AutoModelForCausalLM` (safetensors only)."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    revision: str | None = None
    max_length: PositiveInt = 512
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    num_parameters: PositiveFloat | None = None
    """For `morlaif plan` only, where the weights are not at hand: parameters, e.g. 6.74e9."""
    num_layers: PositiveInt | None = None
    """For `morlaif plan` only."""
    width: PositiveInt | None = None
    """For `morlaif plan` only."""
    vocabulary_size: PositiveInt | None = None
    """For `morlaif plan` only."""


ModelConfig = Annotated[ScratchModel | PretrainedModel, Field(discriminator="kind")]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021); the paper's values are the defaults."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 32.0
    dropout: Share = 0.1
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class SftConfig(Section):
    """Supervised fine-tuning of the target model (TRL `SFTTrainer` inside Ray Train)."""

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})

    enabled: bool = True
    """False: the target model is taken as it is."""
    num_steps: PositiveInt = 800
    batch_size: PositiveInt = 48
    """Dialogues per optimizer step, over all workers."""
    learning_rate: PositiveFloat = 4e-3
    warmup_steps: NonNegativeInt = 50
    weight_decay: float = Field(0.0, ge=0.0)
    num_workers: PositiveInt = 1
    """Ray Train workers (data parallel)."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints from which a lost worker resumes."""
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _divisible(self) -> SftConfig:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}"
            )
        return self


class PairsConfig(Section):
    """How response pairs come about."""

    kind: Literal["sample", "dataset"] = "sample"
    """sample: two responses of the target model per prompt; dataset: the pairs of the data set."""
    max_new_tokens: PositiveInt = 40
    temperature: PositiveFloat = 1.0
    num_workers: PositiveInt = 1
    """Rollout actors."""
    batch_size: PositiveInt = 256
    """Responses per generation call."""
    num_reference: PositiveInt = 512
    """SFT responses to `policy` prompts on which mean and standard deviation of every PM are fitted; 500 or more for a
    real run."""
