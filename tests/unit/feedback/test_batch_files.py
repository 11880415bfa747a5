"""Input and output files of the Batch API: limits, order, doubles, half lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morlaif_ray.config.judging import OpenAIBatchJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_files import (
    BatchRequest,
    Entry,
    affordable,
    merge,
    question_of,
    read_lines,
    split_requests,
)
from morlaif_ray.feedback.batch_journal import BatchJournal
from tests.fake_openai.answers import one_token_answer

pytestmark = pytest.mark.unit


def request(name: str, length: int = 10, usd: float = 0.0) -> BatchRequest:
    return BatchRequest(name, b"x" * length, (), usd)


def names(groups: list[list[BatchRequest]]) -> list[str]:
    return ["".join(entry.custom_id for entry in group) for group in groups]


def test_groups_keep_to_the_number_of_requests() -> None:
    assert names(list(split_requests(map(request, "abcde"), 2, 1000))) == ["ab", "cd", "e"]


def test_groups_keep_to_the_bytes_line_feeds_included() -> None:
    # 10 + 1 bytes each: three lines are 33 bytes.
    assert names(list(split_requests(map(request, "abcde"), 100, 33))) == ["abc", "de"]
    assert names(list(split_requests(map(request, "abcde"), 100, 32))) == ["ab", "cd", "e"]


def test_a_line_longer_than_a_file_is_an_error_and_nothing_gives_no_file() -> None:
    with pytest.raises(FeedbackError, match=r"more than feedback\.judge\.max_file_mb"):
        list(split_requests([request("a", 50)], 10, 50))
    assert list(split_requests([], 10, 50)) == []


def test_as_many_requests_as_the_budget_allows_go_from_the_front() -> None:
    requests = [request(name, usd=0.25) for name in "abcd"]
    assert [affordable(requests, usd) for usd in (0.2, 0.25, 0.9, 1.0, float("inf"))] == [
        0,
        1,
        3,
        4,
        4,
    ]


def line(name: str, status: int) -> bytes:
    body = one_token_answer({"messages": []}, 1.0, "m") if status == 200 else {}
    response = {"status_code": status, "body": body}
    return json.dumps({"custom_id": name, "response": response}).encode()


def test_lines_are_found_by_id_and_an_answer_wins_over_an_error() -> None:
    entry = Entry(b"k" * 16, "pair", "detail", "ab")
    requests = {name: BatchRequest(name, b"", (entry,), 0.0) for name in "abcd"}
    files = [line("b", 200), b'{"custom_id": "c", "resp', b"[]", line("a", 500), line("x", 200)]
    files += [line("a", 200), line("b", 500), line("b", 200), line("d", 500)]
    taken: list[str] = []
    failed = merge(
        requests,
        read_lines(files),
        OpenAIBatchJudge(model="m"),
        lambda request, _: taken.append(request.custom_id),
    )
    assert taken == ["b", "a"]  # each once, in the order of the files
    assert {name: error.message for name, error in failed.items()} == {
        "c": "the batch brought no line for this request",
        "d": "HTTP 500 in the batch: no message",
    }


def test_whether_numbers_were_asked_for_outlives_the_driver(tmp_path: Path) -> None:
    entries = tuple(Entry(bytes([i] * 16), "pair", f"p{i}", "ab") for i in range(2))
    asked = [BatchRequest(name, b"{}", entries, 0.0, strength=name == "s") for name in "sl"]
    journal = BatchJournal(tmp_path / "l.sqlite")
    found = journal.index(journal.write("recipe", asked))
    assert {name: question_of(request).strength for name, request in found.items()} == {
        "s": True,
        "l": False,
    }
