"""What is sent to a chat completions endpoint and how its body is read; the live and the batch judge share it.

    Question -> request_body(judge, messages, question) -> ... -> read_completion(...) -> RawAnswer

Pure functions of their arguments; nothing here opens a connection. Four ways to answer (`template.AnswerStyle`):

    letter         one token, its top log-probabilities
    reasoned       free text; the log-probabilities at the letter of the last "Answer: A"
    json           a JSON object under a schema that admits A or B: hard labels (`parsing.HARD_LOG_ODDS`)
    joint          the same with one field per principle, each a letter or a strength from 0 to 100 (soft labels)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from morlaif_ray.config.judging import OpenAIBatchJudge, OpenAIJudge
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.parsing import final_answer_token, read_choices
from morlaif_ray.feedback.prompting import style_of

JSON_TOKENS = 16
"""Room for a JSON object with one field; so much again for every further field."""


def max_answer_tokens(judge: OpenAIJudge | OpenAIBatchJudge, question: Question) -> int:
    """Most tokens that the answer may have: the request's limit, and what a budget counts with."""
    reasoning = judge.reasoning.max_tokens if judge.reasoning is not None else 0
    if question.members:
        return reasoning + JSON_TOKENS * (1 + len(question.members))
    if judge.answer == "structured":
        return reasoning + JSON_TOKENS
    return reasoning or 1


def request_body(
    judge: OpenAIJudge | OpenAIBatchJudge, messages: Sequence[dict[str, str]], question: Question
) -> dict[str, Any]:
    """The JSON body of one request."""
    body: dict[str, Any] = {
        "model": judge.model,
        "messages": list(messages),
        judge.max_tokens_field: max_answer_tokens(judge, question),
    }
    if judge.temperature is not None:
        body["temperature"] = judge.temperature
    fields = _fields(judge, question)
    if fields:
        reasoned = judge.reasoning is not None
        body["response_format"] = _schema(fields, reasoned, _strengths(question))
    else:
        body |= {"logprobs": True, "top_logprobs": judge.top_logprobs}
    return body


def _fields(judge: OpenAIJudge | OpenAIBatchJudge, question: Question) -> tuple[str, ...]:
    """Names of the fields that hold A or B; empty where the answer is no JSON object."""
    if question.members:
        return tuple(member.principle for member in question.members)
    return ("answer",) if judge.answer == "structured" else ()


def _strengths(question: Question) -> bool:
    """Whether its fields hold numbers; a question that is asked alone holds a letter."""
    return bool(question.members) and question.strength


def _schema(fields: Sequence[str], reasoned: bool, strengths: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {"reasoning": {"type": "string"}} if reasoned else {}
    kind: dict[str, Any] = {"type": "string", "enum": ["A", "B"]}
    if strengths:
        kind = {"type": "integer", "minimum": 0, "maximum": 100}
    properties |= {name: dict(kind) for name in fields}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "preference", "strict": True, "schema": schema},
    }


def read_completion(
    completion: Any, judge: OpenAIJudge | OpenAIBatchJudge, question: Question, where: str
) -> RawAnswer:
    """The SDK's ChatCompletion as a RawAnswer. AttemptError("malformed") where it is no chat completion."""
    try:
        message = completion.choices[0].message
        refusal, content = message.refusal or "", message.content or ""
        fields = _fields(judge, question)
        if refusal:
            found = _answer(completion, refusal=refusal)
            parts = (found, *[_answer(None, found.model, refusal) for _ in fields[1:]])
        elif fields:
            parts = _json_answers(completion, content, fields, _strengths(question))
        else:
            return _soft_answer(completion, style_of(judge) == "reasoned")
    except (AttributeError, IndexError, TypeError):
        raise AttemptError("malformed", f"{where}: the body is not a chat completion") from None
    if not question.members:
        return parts[0]
    first = parts[0]
    return RawAnswer(
        {},
        first.model,
        first.prompt_tokens,
        first.completion_tokens,
        cached_tokens=first.cached_tokens,
        parts=parts,
    )


def _soft_answer(completion: Any, reasoned: bool) -> RawAnswer:
    choice = completion.choices[0]
    tokens = (choice.logprobs.content if choice.logprobs is not None else None) or []
    place: int | None = 0
    if reasoned and tokens:
        place = final_answer_token([entry.token for entry in tokens])
        if place is None:
            problem = "no 'Answer: A' or 'Answer: B' after the reasoning"
            if choice.finish_reason == "length":
                problem = (
                    "the reasoning was cut off before an answer: raise judge.reasoning.max_tokens"
                )
            return _answer(completion, problem=problem)
    top: dict[str, float] = {}
    for entry in tokens[place].top_logprobs if tokens and place is not None else ():
        # Two token ids may share one text: their probabilities add up.
        known = top.get(entry.token)
        top[entry.token] = entry.logprob if known is None else _log_add(known, entry.logprob)
    return _answer(completion, top=top)


def _json_answers(
    completion: Any, content: str, fields: Sequence[str], strengths: bool
) -> tuple[RawAnswer, ...]:
    choices, problem = read_choices(content, fields, strengths)
    if problem and completion.choices[0].finish_reason == "length":
        problem = "the JSON answer was cut off"
    wanted = "number" if strengths else "A or B"
    found = []
    for number, name in enumerate(fields):
        top = choices.get(name, {})
        reason = "" if top else problem or f"the JSON answer has no {wanted} for '{name}'"
        # The request is paid once: its tokens stand on the first answer.
        paid = completion if number == 0 else None
        found.append(_answer(paid, str(completion.model or ""), top=top, problem=reason))
    return tuple(found)


def _answer(
    completion: Any,
    model: str = "",
    refusal: str = "",
    *,
    top: dict[str, float] | None = None,
    problem: str = "",
) -> RawAnswer:
    usage = completion.usage if completion is not None else None
    cached = 0
    if usage is not None and usage.prompt_tokens_details is not None:
        cached = usage.prompt_tokens_details.cached_tokens or 0
    return RawAnswer(
        top_logprobs=top or {},
        model=model or (str(completion.model or "") if completion is not None else ""),
        prompt_tokens=usage.prompt_tokens if usage is not None else 0,
        completion_tokens=usage.completion_tokens if usage is not None else 0,
        refusal=refusal,
        cached_tokens=cached,
        problem=problem,
    )


def _log_add(left: float, right: float) -> float:
    high, low = max(left, right), min(left, right)
    return high + math.log1p(math.exp(low - high))
