"""What a judge costs, where that is known: a dated YAML (`prices.yaml`), which `feedback.prices_file` overrides.

    price_of(judge, prices_file) -> Price -> bill(tokens) -> Bill (list price, cache discount, batch discount)

A forecast and a budget count the list price less the batch discount; a prompt cache's discount is counted only where
the provider reports cached tokens, so a budget is never overspent by hoping for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from morlaif_ray.config.judging import JudgeConfig
from morlaif_ray.errors import ConfigError, FeedbackError

SHIPPED = Path(__file__).with_name("prices.yaml")
FIELDS = ("prompt", "completion", "cached_prompt")


@dataclass(frozen=True, slots=True)
class Bill:
    """US dollars of some requests. Discounts are counted apart, so that a reader sees what earned them."""

    list_usd: float
    cache_discount_usd: float = 0.0
    batch_discount_usd: float = 0.0

    @property
    def usd(self) -> float:
        return self.list_usd - self.cache_discount_usd - self.batch_discount_usd


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float
    cached_prompt: float | None = None
    """Prompt tokens served from the provider's prefix cache; None: no discount."""
    batch_factor: float = 1.0
    """What this judge pays over the list price: below 1 for the Batch API."""

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What these tokens cost without a prompt cache: never less than the invoice."""
        return self.bill(prompt_tokens, completion_tokens).usd

    def bill(
        self, prompt_tokens: float, completion_tokens: float, cached_tokens: float = 0.0
    ) -> Bill:
        """`cached_tokens` are those of the prompt tokens that the provider reports as cached."""
        list_usd = (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6
        cheaper = 0.0 if self.cached_prompt is None else self.prompt - self.cached_prompt
        cache_usd = min(cached_tokens, prompt_tokens) * cheaper / 1e6
        return Bill(list_usd, cache_usd, (list_usd - cache_usd) * (1.0 - self.batch_factor))


FREE = Price(0.0, 0.0)

CHARS_PER_TOKEN = 3.0
"""Low for English (about 4), so that an estimate before the request is rather too high than too low."""
TEMPLATE_TOKENS = 150
"""Template, phrase and chat overhead, rounded up."""


@dataclass(frozen=True, slots=True)
class PriceList:
    as_of: str
    """The day on which the prices were read."""
    models: Mapping[str, Price]
    """By model name without its date suffix."""

    def find(self, model: str) -> Price | None:
        """The price of `model` or of `model-2026-01-01`."""
        names = [name for name in self.models if model == name or model.startswith(f"{name}-20")]
        return self.models[max(names, key=len)] if names else None


@lru_cache(maxsize=16)
def load_prices(path: Path) -> PriceList:
    """ConfigError in one line where the file is missing or wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not valid YAML"
        raise ConfigError(
            f"feedback.prices_file {path}: {problem}; see {SHIPPED.name} of the package for its shape"
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict) or "as_of" not in raw:
        raise ConfigError(f"feedback.prices_file {path}: needs 'as_of' (a date) and 'models'")
    models = {str(name): _price(path, str(name), entry) for name, entry in raw["models"].items()}
    return PriceList(str(raw["as_of"]), models)


def _price(path: Path, name: str, entry: Any) -> Price:
    where = f"feedback.prices_file {path}: model '{name}'"
    if not isinstance(entry, dict) or not {"prompt", "completion"} <= set(entry):
        raise ConfigError(f"{where} needs prompt and completion, US dollars per million tokens")
    for field, value in entry.items():
        if field not in FIELDS:
            raise ConfigError(f"{where} has an unknown field '{field}'; write {', '.join(FIELDS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0.0 <= value < math.inf:
            raise ConfigError(f"{where}: {field} is {value!r}; write a number of at least 0")
    return Price(**{field: float(value) for field, value in entry.items()})


def price_of(judge: JudgeConfig, prices_file: Path | None = None) -> Price | None:
    """The judge's price; None where it is not known (own servers, unlisted models)."""
    if judge.kind != "openai" and judge.kind != "openai_batch":
        return FREE
    found = load_prices(prices_file).find(judge.model) if prices_file is not None else None
    if found is None and _is_openai(judge):
        found = load_prices(SHIPPED).find(judge.model)
    if found is None:
        return None
    factor = judge.price_factor if judge.kind == "openai_batch" else 1.0
    return Price(found.prompt, found.completion, found.cached_prompt, factor)


def _is_openai(judge: JudgeConfig) -> bool:
    """True where the shipped list prices hold: OpenAI's own endpoint."""
    if judge.kind == "openai" and judge.endpoints:
        return all("api.openai.com" in endpoint.base_url for endpoint in judge.endpoints)
    if judge.kind == "openai" or judge.kind == "openai_batch":
        return judge.base_url is None or "api.openai.com" in judge.base_url
    return False


def price_for_budget(
    judge: JudgeConfig, budget_usd: float | None, prices_file: Path | None = None
) -> Price:
    """The price to count with; FeedbackError where a budget is set that could not be kept."""
    price = price_of(judge, prices_file)
    if price is not None:
        return price
    if budget_usd is not None and (judge.kind == "openai" or judge.kind == "openai_batch"):
        raise FeedbackError(
            f"feedback.budget_usd is {budget_usd:g} but the price of model '{judge.model}' is not known, so the "
            f"budget could not be kept; state it in feedback.prices_file, remove budget_usd, or use one of "
            f"{', '.join(sorted(load_prices(SHIPPED).models))}"
        )
    return FREE


def prices_as_of(prices_file: Path | None = None) -> str:
    """The day of the prices in use, for forecasts."""
    return load_prices(prices_file or SHIPPED).as_of


def estimate_tokens(*texts: str) -> float:
    """Prompt tokens of one question about these texts, rather too many than too few."""
    return sum(map(len, texts)) / CHARS_PER_TOKEN + TEMPLATE_TOKENS
