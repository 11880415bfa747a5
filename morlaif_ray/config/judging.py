"""Section `feedback`: who judges, what is asked, how fast, for how much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from morlaif_ray.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)
from morlaif_ray.config.selecting import SelectAll, SelectionConfig


class RulesJudge(Section):
    """The embedded judge: no network, no weights."""

    kind: Literal["rules"] = "rules"
    measures: Literal["lexical", "testbed"] = "lexical"
    """lexical: documented lexical and structural measures; testbed: the oracle that reads latent attributes."""
    noise: NonNegativeFloat = 0.3
    """Standard deviation (nats) of the judge's noise on the log-odds."""
    position_bias: float = 0.4
    """Nats in favour of the first-given response, before debiasing."""
    scale: PositiveFloat = 4.0
    """Nats per unit of measured difference (lexical measures)."""
    fault_share: Share = 0.002
    """Share of answers without an A/B token, as real judges give now and then."""


class Reasoning(Section):
    """The judge thinks aloud first; only its final A or B counts."""

    max_tokens: PositiveInt = 256
    """Longest reasoning and answer together, in tokens."""


class Endpoint(Section):
    """One of several servers of the same model."""

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    weight: PositiveFloat = 1.0
    """Its share of the questions is weight / (sum of weights)."""


class _OpenAIOptions(Section):
    """What `openai` and `openai_batch` have in common: the model and how it is asked."""

    model: str
    base_url: str | None = None
    """None: the client's default."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself never stands in a config."""
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 20
    system_prompt: str | None = None
    request_timeout_s: PositiveFloat = 30.0
    reasoning: Reasoning | None = None
    """None: the answer is the first and only token."""
    answer: Literal["logprobs", "structured"] = "logprobs"
    """structured: for models without log-probabilities; a JSON schema admits A or B, which count as log-odds of
    +2 and -2 nats (`parsing.HARD_LOG_ODDS`), so two orders that contradict each other are a tie."""
    temperature: NonNegativeFloat | None = 0.0
    """None: not sent, for models that refuse it."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Reasoning models of some providers want the second name."""


class OpenAIJudge(_OpenAIOptions):
    """Any OpenAI-compatible chat completions endpoint."""

    kind: Literal["openai"] = "openai"
    endpoints: list[Endpoint] = []
    """Several servers of one and the same model; they replace base_url and api_key_env. Which one is asked depends on
    the question's content; one that cannot be reached is passed over. The first one names the judge in the ledger."""

    @model_validator(mode="after")
    def _one_way_to_say_where(self) -> OpenAIJudge:
        if self.endpoints and self.base_url is not None:
            raise ValueError("give base_url or endpoints, not both; move base_url into endpoints")
        urls = [endpoint.base_url for endpoint in self.endpoints]
        for url in urls:
            if urls.count(url) > 1:
                raise ValueError(f"endpoints names {url} twice; give it once with a larger weight")
        return self


class OpenAIBatchJudge(_OpenAIOptions):
    """The same questions and ledger keys as `openai`, answered within a day by the Batch API at a lower price."""

    kind: Literal["openai_batch"] = "openai_batch"
    max_requests_per_file: Annotated[int, Field(ge=1, le=50_000)] = 50_000
    max_file_mb: Annotated[float, Field(gt=0.0, le=200.0)] = 200.0
    """Megabytes (10^6 bytes) of one input file."""
    max_open_batches: PositiveInt = 20
    """Batches at the provider at a time; it limits the tokens that may wait there."""
    poll_s: PositiveFloat = 30.0
    """Seconds between two looks at the open batches."""
    price_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Batch price over list price."""
    delete_files: bool = False
    """Deletes a batch's files at the provider once its answers are in the ledger; else they stay until they expire."""


class LocalJudge(Section):
    """A causal LM in the feedback workers themselves: one prefill per pair and order, nothing sampled, no server."""

    kind: Literal["local"] = "local"
    model: str
    """A folder saved by save_pretrained, or a hub id."""
    revision: str | None = None
    """Of a hub id; name one, so that a model which changes there is another judge."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vLLM where it is installed, else transformers. Their answers agree up to rounding and share ledger keys."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: PositiveInt | None = None
    """Tokens of a prompt; None: what the model can read. A longer pair loses its oldest turns first, then the ends of
    both responses, and is counted."""
    batch_size: PositiveInt = 26
    """Most questions in one forward pass: two pairs at 13 questions. Bounds the memory of the expanded caches."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each of feedback.num_workers reserves; 0: CPU. Above 1: a whole number, and vLLM slices the model over
    them."""
    tensor_parallel_size: PositiveInt | None = None
    """Processes that each hold a slice of every layer, a GPU each (vLLM); None: `gpus_per_worker` where that is above
    1, else 1."""

    @property
    def slices(self) -> int:
        """Processes that hold one worker's model between them."""
        return self.tensor_parallel_size or max(1, int(self.gpus_per_worker))

    @model_validator(mode="after")
    def _slices_have_a_gpu_each(self) -> LocalJudge:
        gpus, asked = self.gpus_per_worker, self.tensor_parallel_size
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"gpus_per_worker {gpus:g} is neither a part of a GPU nor a whole number; write {math.ceil(gpus)}"
            )
        if self.slices > 1 and self.engine == "transformers":
            raise ValueError(
                f"engine transformers uses one GPU or none, and {self.slices} slices are asked for; write engine: vllm"
            )
        if gpus and asked is not None and max(1, gpus) != asked:
            raise ValueError(
                f"tensor_parallel_size is {asked}, and gpus_per_worker {gpus:g}; leave the first one out"
            )
        return self


class FewShotExample(Section):
    """One answered question, shown to the judge before the real one."""

    conversation: str
    response_a: str
    response_b: str
    question: str
    """The phrase, e.g. "Which response is more concise?"."""
    answer: Literal["A", "B"]
    reasoning: str = ""
    """Shown where the judge is asked to reason first."""


JudgeConfig = Annotated[
    RulesJudge | OpenAIJudge | OpenAIBatchJudge | LocalJudge, Field(discriminator="kind")
]

Baseline = Literal[
    "random_principle", "general_principle", "best_principle", "mean_log_odds", "human_labels"
]


class FeedbackConfig(Section):
    judge: JudgeConfig = RulesJudge()
    principles: list[str] | Literal["all"] = "all"
    """Names of principle files, or all that there are."""
    template: str | None = None
    """The user message with {conversation}, {response_a}, {response_b}, and {question} last. None: the shipped one."""
    few_shot: list[FewShotExample] | Path = []
    """Examples, or a YAML file that holds a list of them."""
    max_prompt_tokens: PositiveInt | None = None
    """A longer pair is truncated: its oldest turns go first, then both responses are cut to one length. None: never."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to count `max_prompt_tokens` with; None: characters / 4."""
    joint: PositiveInt = 1
    """Principles per request. Above 1 (`openai`, `openai_batch`): one JSON answer for several, with hard labels."""
    joint_check_share: Share = 0.02
    """Share of the pairs that are asked separately too, to measure the agreement of joint with separate questions."""
    joint_answer: Literal["letter", "strength"] = "letter"
    """strength: a joint answer gives each principle a number from 0 (surely B) to 100 (surely A), read as a soft
    preference, instead of a letter. Answers of the two kinds have different ledger keys."""
    principles_dir: Path | None = None
    """A folder of further principle files; they win over the shipped ones of the same name."""
    select: SelectionConfig = SelectAll()
    """Which pairs of the split `preference` are asked about."""
    orders: Literal["both", "random"] = "both"
    """both: each question in both orders, position bias removed exactly; random: one seeded slot per question."""
    num_workers: PositiveInt = 1
    """Async client actors."""
    max_in_flight: PositiveInt = 64
    """Requests in flight per worker."""
    requests_per_minute: PositiveFloat | None = None
    """Cluster-wide; None: no limit."""
    tokens_per_minute: PositiveFloat | None = None
    max_attempts: PositiveInt = 6
    tie_threshold: NonNegativeFloat = 0.05
    """|log-odds| below this is a tie."""
    min_answer_mass: Share = 0.5
    """A/B probability mass below this makes an answer unusable."""
    max_missing_share: Share = 0.05
    """More unusable or failed judgements than this end the stage with an error."""
    budget_usd: PositiveFloat | None = None
    """Hard stop, requests in flight counted; exit code 8. The same command with a higher budget goes on."""
    prices_file: Path | None = None
    """Prices that win over the shipped `morlaif_ray/feedback/prices.yaml`; the same shape."""
    ledger_path: Path | None = None
    """None: `<run>/ledger/feedback.sqlite`. Share one between runs to pay for each judgement once."""
    retry_failed: NonNegativeInt = 1
    """Extra rounds over failed questions before they count as missing."""

    @model_validator(mode="after")
    def _examples_are_letters(self) -> FeedbackConfig:
        if self.joint_answer == "strength" and self.few_shot:
            raise ValueError(
                "feedback.few_shot shows answers that are letters, but joint_answer is strength; leave out few_shot, "
                "or write joint_answer: letter"
            )
        return self

    @model_validator(mode="after")
    def _joint_needs_a_judge_that_writes(self) -> FeedbackConfig:
        if self.joint > 1 and self.judge.kind not in ("openai", "openai_batch"):
            raise ValueError(
                f"feedback.joint is {self.joint} but judge.kind '{self.judge.kind}' answers one question at a time; "
                f"write joint: 1, or use judge.kind: openai"
            )
        return self
