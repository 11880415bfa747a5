"""What a judge costs, where that is known. US dollars per million tokens, public list prices read in November 2026.

A forecast, not an invoice: discounts for cached prompts or batches are not counted, so real spending is at most this.
"""

from __future__ import annotations

from dataclasses import dataclass

from morlaif_ray.config.judging import JudgeConfig
from morlaif_ray.errors import FeedbackError


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


FREE = Price(0.0, 0.0)

LIST_PRICES: dict[str, Price] = {
    "gpt-3.5-turbo": Price(0.50, 1.50),
    "gpt-4-turbo": Price(10.0, 30.0),
    "gpt-4.1": Price(2.0, 8.0),
    "gpt-4.1-mini": Price(0.40, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.40),
    "gpt-4o": Price(2.50, 10.0),
    "gpt-4o-mini": Price(0.15, 0.60),
}
"""By model name without its date suffix."""

CHARS_PER_TOKEN = 3.0
"""Low for English (about 4), so that an estimate before the request is rather too high than too low."""
TEMPLATE_TOKENS = 150
"""Template, phrase and chat overhead, rounded up."""


def price_of(judge: JudgeConfig) -> Price | None:
    """The judge's price; None where it is not known (own servers, unlisted models)."""
    if judge.kind == "rules":
        return FREE
    if judge.base_url is not None and "api.openai.com" not in judge.base_url:
        return None
    names = [
        name for name in LIST_PRICES if judge.model == name or judge.model.startswith(f"{name}-20")
    ]
    return LIST_PRICES[names[0]] if names else None


def price_for_budget(judge: JudgeConfig, budget_usd: float | None) -> Price:
    """The price to count with; FeedbackError where a budget is set that could not be kept."""
    price = price_of(judge)
    if price is not None:
        return price
    if budget_usd is not None and judge.kind == "openai":
        raise FeedbackError(
            f"feedback.budget_usd is {budget_usd:g} but the price of model '{judge.model}' is not known, so the "
            f"budget could not be kept; remove budget_usd or use one of {', '.join(sorted(LIST_PRICES))}"
        )
    return FREE


def estimate_tokens(*texts: str) -> float:
    """Prompt tokens of one question about these texts, rather too many than too few."""
    return sum(map(len, texts)) / CHARS_PER_TOKEN + TEMPLATE_TOKENS
