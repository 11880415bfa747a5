"""Which judges there are: one explicit dict, one builder, one identity per judge.

build_client(config.feedback.judge, seed=...) -> FeedbackClient
recipe_of(judge, seed, template) -> hash that goes into every ledger key
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from morlaif_ray.artifacts import canonical_json
from morlaif_ray.config.judging import JudgeConfig, OpenAIJudge, RulesJudge
from morlaif_ray.errors import PrincipleError
from morlaif_ray.feedback.client import FeedbackClient
from morlaif_ray.feedback.questions import GENERAL
from morlaif_ray.feedback.template import DEFAULT_TEMPLATE, check_template
from morlaif_ray.seeding import stable_hash

RULES_VERSION = 1
"""Raised whenever the rules judge would answer differently, so that old answers are not reused."""


def _build_rules(judge: Any, seed: int, template: str) -> FeedbackClient:
    assert isinstance(judge, RulesJudge)
    from morlaif_ray.feedback.rules_client import LogOdds, RulesClient, pair_noise

    noise, scale = judge.noise, judge.scale
    log_odds: LogOdds
    if judge.measures == "testbed":
        from morlaif_ray.testbed import oracle_log_odds

        def log_odds(prompt: str, first: str, second: str, principle: str) -> float:
            return oracle_log_odds(prompt, first, second, principle, noise=noise, seed=seed)
    else:
        from morlaif_ray.feedback.measures import measure

        def log_odds(prompt: str, first: str, second: str, principle: str) -> float:
            difference = measure(prompt, first)[principle] - measure(prompt, second)[principle]
            error = noise * pair_noise(seed, principle, prompt, first, second) if noise else 0.0
            return scale * difference + error

    return RulesClient(
        log_odds,
        position_bias=judge.position_bias,
        fault_share=judge.fault_share,
        model=f"rules/{judge.measures}-{RULES_VERSION}",
    )


def _build_openai(judge: Any, seed: int, template: str) -> FeedbackClient:
    assert isinstance(judge, OpenAIJudge)
    from morlaif_ray.feedback.openai_client import OpenAIClient

    return OpenAIClient(judge, template)


JUDGES: dict[str, Callable[[Any, int, str], FeedbackClient]] = {
    "rules": _build_rules,
    "openai": _build_openai,
}


def build_client(
    judge: JudgeConfig, *, seed: int, template: str = DEFAULT_TEMPLATE
) -> FeedbackClient:
    """The judge of a config. FeedbackError where its key is missing, ConfigError where the template is wrong."""
    check_template(template)
    return JUDGES[judge.kind](judge, seed, template)


def judge_identity(judge: JudgeConfig, seed: int) -> dict[str, Any]:
    """Everything about a judge that can change its answers; never a key, never a time-out."""
    if isinstance(judge, RulesJudge):
        return {**judge.model_dump(mode="json"), "seed": seed, "version": RULES_VERSION}
    return judge.model_dump(mode="json", exclude={"api_key_env", "request_timeout_s"})


def recipe_of(judge: JudgeConfig, seed: int, template: str = DEFAULT_TEMPLATE) -> str:
    return stable_hash(canonical_json(judge_identity(judge, seed)), template)


def check_principles(judge: JudgeConfig, names: Iterable[str]) -> None:
    """PrincipleError where the embedded judge has no measure for a principle (any other judge reads its phrase)."""
    if not isinstance(judge, RulesJudge):
        return
    if judge.measures == "testbed":
        from morlaif_ray.testbed import PRINCIPLES

        known = set(PRINCIPLES)
    else:
        from morlaif_ray.feedback.measures import MEASURES

        known = set(MEASURES)
    for name in names:
        if name not in known and name != GENERAL:
            raise PrincipleError(
                f"the embedded rules judge ({judge.measures}) has no measure for principle '{name}'; it knows "
                f"{', '.join(sorted(known))}; leave it out, or use feedback.judge.kind: openai"
            )
