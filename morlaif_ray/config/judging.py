"""Section `feedback`: who judges, what is asked, how fast, for how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from morlaif_ray.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)


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


class OpenAIJudge(Section):
    """Any OpenAI-compatible chat completions endpoint that returns log-probabilities."""

    kind: Literal["openai"] = "openai"
    model: str
    base_url: str | None = None
    """None: the client's default."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself never stands in a config."""
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 20
    system_prompt: str | None = None
    request_timeout_s: PositiveFloat = 30.0


JudgeConfig = Annotated[RulesJudge | OpenAIJudge, Field(discriminator="kind")]

Baseline = Literal[
    "random_principle", "general_principle", "best_principle", "mean_log_odds", "human_labels"
]


class FeedbackConfig(Section):
    judge: JudgeConfig = RulesJudge()
    principles: list[str] | Literal["all"] = "all"
    """Names of principle files, or all that there are."""
    principles_dir: Path | None = None
    """A folder of further principle files; they win over the shipped ones of the same name."""
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
    ledger_path: Path | None = None
    """None: `<run>/ledger/feedback.sqlite`. Share one between runs to pay for each judgement once."""
    retry_failed: NonNegativeInt = 1
    """Extra rounds over failed questions before they count as missing."""
