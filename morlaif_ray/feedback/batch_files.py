"""Input and output files of the Batch API, as pure functions of their contents.

    BatchRequest -> split_requests (provider's limits) -> JSONL -> ... -> read_lines -> merge -> answers, failures

One line of an input file is one request; its `custom_id` is the question's key in hex, so an answer finds its question
whatever the order of the output. What cannot be read in an output file is a line that is missing, and is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.chat import ChatCompletion

from morlaif_ray.config.judging import OpenAIBatchJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, AttemptKind, Question, RawAnswer
from morlaif_ray.feedback.openai_requests import read_completion
from morlaif_ray.types import Order

ENDPOINT = "/v1/chat/completions"
NO_LINE = "the batch brought no line for this request"


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of a request: what the ledger needs beside the answer."""

    key: bytes
    pair_id: str
    principle: str
    order: Order


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of an input file. A joint request has an entry for each member whose answer is missing."""

    custom_id: str
    line: bytes
    """JSON without the line feed; empty where only the answer is read (`BatchJournal.index`)."""
    entries: tuple[Entry, ...]
    estimated_usd: float
    attempt: int = 1
    strength: bool = False
    """Joint mode: numbers are asked for instead of letters."""


def request_line(custom_id: str, body: dict[str, Any]) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}
    return json.dumps(line, separators=(",", ":")).encode()


def split_requests(
    requests: Iterable[BatchRequest], max_requests: int, max_bytes: int
) -> Iterator[list[BatchRequest]]:
    """Consecutive requests, each group within both limits. FeedbackError where one line alone is too long."""
    group: list[BatchRequest] = []
    size = 0
    for request in requests:
        length = len(request.line) + 1
        if length > max_bytes:
            raise FeedbackError(
                f"one request takes {length / 1e6:.3g} MB, more than feedback.judge.max_file_mb "
                f"({max_bytes / 1e6:g}); raise it or set feedback.max_prompt_tokens"
            )
        if group and (len(group) == max_requests or size + length > max_bytes):
            yield group
            group, size = [], 0
        group.append(request)
        size += length
    if group:
        yield group


def affordable(requests: Sequence[BatchRequest], usd_left: float) -> int:
    """How many requests, from the front, fit into what is left of the budget."""
    for number, request in enumerate(requests):
        usd_left -= request.estimated_usd
        if usd_left < 0.0:
            return number
    return len(requests)


def read_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of output and error files that can be read; the others count as missing."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("custom_id"), str):
            yield entry


def merge(
    requests: Mapping[str, BatchRequest],
    lines: Iterable[dict[str, Any]],
    judge: OpenAIBatchJudge,
    take: Callable[[BatchRequest, RawAnswer], None],
) -> dict[str, AttemptError]:
    """Gives each answer to `take`, once, as it comes; for every other request of the batch: why it has none.

    Args:
        requests: by custom_id. An answer wins over an error of the same request, the first of doubles counts.
    """
    left = dict(requests)
    failed: dict[str, AttemptError] = {}
    for line in lines:
        request = left.get(line["custom_id"])
        if request is None:
            continue
        try:
            answer = _answer(request, line, judge)
        except AttemptError as error:
            failed.setdefault(request.custom_id, error)
        else:
            del left[request.custom_id]
            take(request, answer)
    missing = AttemptError("server", NO_LINE)
    return {custom_id: failed.get(custom_id, missing) for custom_id in left}


def _answer(request: BatchRequest, line: dict[str, Any], judge: OpenAIBatchJudge) -> RawAnswer:
    status = _status(line)
    if status != 200:
        raise _line_error(line, status)
    body = line["response"].get("body")
    if not isinstance(body, dict):
        raise AttemptError("malformed", "the batch line has no body")
    completion = ChatCompletion.construct(**body)
    return read_completion(completion, judge, question_of(request), "the Batch API")


def question_of(request: BatchRequest) -> Question:
    """As much of the question as reading its answer needs: names, not texts."""
    members = tuple(
        Question("", "", "", entry.principle, "", entry.order, entry.key)
        for entry in request.entries
    )
    first = request.entries[0]
    if request.custom_id == first.key.hex():
        return members[0]
    return Question("", "", "", "joint", "", first.order, first.key, members, request.strength)


def _status(line: dict[str, Any]) -> int:
    """HTTP status of a line; 0 where the request was never executed."""
    response = line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return status if isinstance(status, int) else 0


def _line_error(line: dict[str, Any], status: int) -> AttemptError:
    error = line.get("error")
    if not isinstance(error, dict):
        body = (line.get("response") or {}).get("body")
        error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    code, text = str(error.get("code") or ""), str(error.get("message") or "")[:160]
    kind: AttemptKind = "bad_request"
    if status in (401, 403):
        kind, text = "auth", f"the Batch API refused the key (HTTP {status})"
    elif status == 404:
        kind = "not_found"
    elif code == "insufficient_quota":
        kind = "quota"
    elif status == 429:
        kind = "rate_limit"
    elif status in (0, 408) or status >= 500:
        kind = "server"
    return AttemptError(kind, f"HTTP {status} in the batch: {text or code or 'no message'}")
