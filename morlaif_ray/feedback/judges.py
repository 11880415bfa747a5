"""Which judges there are: one explicit dict, one builder, one identity per judge.

build_feedback_client(config.feedback, seed=...) -> FeedbackClient with the config's template, examples, truncation
recipe_for(config.feedback, seed)               -> hash that goes into every ledger key
build_client(judge, seed=...), recipe_of(judge, seed): the same with the shipped template alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from morlaif_ray.artifacts import canonical_json
from morlaif_ray.config.judging import (
    FeedbackConfig,
    JudgeConfig,
    LocalJudge,
    OpenAIBatchJudge,
    OpenAIJudge,
    RulesJudge,
)
from morlaif_ray.errors import PrincipleError
from morlaif_ray.feedback.client import FeedbackClient, Question
from morlaif_ray.feedback.local_weights import model_version
from morlaif_ray.feedback.prompting import Prompter, build_prompter, prompter_for
from morlaif_ray.feedback.questions import GENERAL
from morlaif_ray.seeding import stable_hash

RULES_VERSION = 1
"""Raised whenever the rules judge would answer differently, so that old answers are not reused."""
LOCAL_VERSION = 1
"""The same for the local judge: its answer cue, its letters, its chat options."""


def _build_rules(judge: Any, seed: int, prompter: Prompter) -> FeedbackClient:
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


def _build_openai(judge: Any, seed: int, prompter: Prompter) -> FeedbackClient:
    assert isinstance(judge, OpenAIJudge | OpenAIBatchJudge)
    from morlaif_ray.feedback.openai_client import OpenAIClient

    return OpenAIClient(judge, prompter, seed)


def _build_local(judge: Any, seed: int, prompter: Prompter) -> FeedbackClient:
    assert isinstance(judge, LocalJudge)
    from morlaif_ray.feedback.local_client import LocalClient

    return LocalClient(judge, prompter)


JUDGES: dict[str, Callable[[Any, int, Prompter], FeedbackClient]] = {
    "rules": _build_rules,
    "openai": _build_openai,
    # The few questions of an evaluation are asked one by one; stage 2 goes through `openai_batch.BatchCollector`.
    "openai_batch": _build_openai,
    "local": _build_local,
}


def build_client(judge: JudgeConfig, *, seed: int, template: str | None = None) -> FeedbackClient:
    """The judge alone. FeedbackError where its key is missing, ConfigError where the template is wrong."""
    return JUDGES[judge.kind](judge, seed, build_prompter(judge, template))


def build_feedback_client(feedback: FeedbackConfig, *, seed: int) -> FeedbackClient:
    """The judge as section `feedback` wants it asked. Errors as in `build_client`."""
    return JUDGES[feedback.judge.kind](feedback.judge, seed, prompter_for(feedback))


_OPERATIONAL = ("api_key_env", "request_timeout_s", "endpoints", "max_tokens_field")
_LOCAL_ANSWERS = ("kind", "dtype", "max_length")
_BATCHING = (
    "max_requests_per_file",
    "max_file_mb",
    "max_open_batches",
    "poll_s",
    "price_factor",
    "delete_files",
)
_LATER_FIELDS = ("reasoning", "answer", "temperature")
"""Left out at their defaults, so that answers paid before these fields existed are found again."""


def judge_identity(judge: JudgeConfig, seed: int) -> dict[str, Any]:
    """Everything about a judge that can change its answers; never a key, never a time-out.

    `openai` and `openai_batch` of one model are one judge: a run begun with one may end with the other.
    """
    if isinstance(judge, RulesJudge):
        return {**judge.model_dump(mode="json"), "seed": seed, "version": RULES_VERSION}
    if isinstance(judge, LocalJudge):
        # By content, not by path: weights trained anew in the same folder are another judge.
        answers = {"model": model_version(judge), "version": LOCAL_VERSION}
        return {**judge.model_dump(mode="json", include=set(_LOCAL_ANSWERS)), **answers}
    identity = judge.model_dump(mode="json", exclude={*_OPERATIONAL, *_BATCHING})
    if not isinstance(judge, OpenAIJudge | OpenAIBatchJudge):
        return identity
    identity["kind"] = "openai"
    for name in _LATER_FIELDS:
        if identity[name] == type(judge).model_fields[name].default:
            del identity[name]
    if isinstance(judge, OpenAIJudge) and judge.endpoints:
        identity["base_url"] = judge.endpoints[0].base_url
    return identity


def recipe_of(judge: JudgeConfig, seed: int, template: str | None = None) -> str:
    return _recipe(judge, seed, build_prompter(judge, template))


def recipe_for(feedback: FeedbackConfig, seed: int) -> str:
    return _recipe(feedback.judge, seed, prompter_for(feedback))


def _recipe(judge: JudgeConfig, seed: int, prompter: Prompter) -> str:
    return stable_hash(canonical_json(judge_identity(judge, seed)), prompter.describe())


def key_names(judge: JudgeConfig) -> list[str]:
    """The environment variables that must hold a key."""
    if isinstance(judge, OpenAIJudge) and judge.endpoints:
        return [endpoint.api_key_env for endpoint in judge.endpoints]
    return [judge.api_key_env] if isinstance(judge, OpenAIJudge | OpenAIBatchJudge) else []


def answer_tokens(judge: JudgeConfig, question: Question) -> float:
    """The most tokens that the answer may have, for a budget that must not be overspent."""
    if not isinstance(judge, OpenAIJudge | OpenAIBatchJudge):
        return 1.0
    from morlaif_ray.feedback.openai_requests import max_answer_tokens

    return float(max_answer_tokens(judge, question))


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
