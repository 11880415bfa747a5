"""Prices come from a dated file that the user may replace; discounts are counted apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from morlaif_ray.config.judging import OpenAIBatchJudge, OpenAIJudge, RulesJudge
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.prices import (
    FREE,
    Price,
    load_prices,
    price_for_budget,
    price_of,
    prices_as_of,
)

pytestmark = pytest.mark.unit


def own(folder: Path, text: str) -> Path:
    path = folder / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_list_is_dated_and_positive() -> None:
    assert prices_as_of().startswith("2026-")
    assert price_of(OpenAIJudge(model="gpt-4o")) == Price(2.5, 10.0, 1.25)


def test_the_user_s_file_wins_and_prices_an_own_server(tmp_path: Path) -> None:
    path = own(tmp_path, "as_of: 2027-01-01\nmodels:\n  gpt-4o: {prompt: 1, completion: 2}\n")
    server = OpenAIJudge(model="gpt-4o", base_url="http://localhost:1/v1")
    assert price_of(server, path) == Price(1.0, 2.0)
    assert price_for_budget(server, 5.0, path) == Price(1.0, 2.0)
    assert price_of(OpenAIJudge(model="gpt-4.1"), path) == Price(2.0, 8.0, 0.5)
    assert prices_as_of(path) == "2027-01-01"


def test_the_batch_api_costs_its_share_and_says_what_it_saved() -> None:
    price = price_of(OpenAIBatchJudge(model="gpt-4o", price_factor=0.5))
    assert price is not None
    bill = price.bill(1_000_000, 0)
    assert (bill.usd, bill.list_usd, bill.batch_discount_usd) == (1.25, 2.5, 1.25)


def test_cached_prompt_tokens_are_cheaper_and_stated_apart() -> None:
    # 800,000 at 2.50 and 200,000 at 1.25 $/M: 2.25 instead of 2.50.
    bill = Price(2.5, 10.0, 1.25).bill(1_000_000, 0, cached_tokens=200_000)
    assert (bill.usd, bill.cache_discount_usd) == (pytest.approx(2.25), pytest.approx(0.25))


def test_embedded_judges_are_free() -> None:
    assert price_of(RulesJudge()) == FREE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {}", "needs 'as_of'"),
        ("as_of: x\nmodels: {m: {prompt: 1}}", "model 'm' needs prompt and completion"),
        ("as_of: x\nmodels: {m: {prompt: -1, completion: 1}}", "prompt is -1; write a number"),
        ("as_of: x\nmodels: {m: {prompt: 1, completion: 1, cache: 1}}", "unknown field 'cache'"),
        ("[", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prices(own(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_prices(tmp_path / "none.yaml")
