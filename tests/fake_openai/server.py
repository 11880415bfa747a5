"""A small OpenAI-compatible server on 127.0.0.1 that answers by a known rule and misbehaves on request.

    with FakeOpenAI() as server:
        server.faults.extend(["429", "ok", "hang"])   # one per request, then "ok" for ever
        server.hold_after = 40                         # what comes then waits for server.release()
        ... OpenAIJudge(base_url=server.url) ...

Its answer is a function of the pair: log-odds of A = TASTE * (words of A - words of B) + POSITION_BIAS.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fake_openai.answers import shaped_answer

KEY = "sk-test-0123456789"
MODEL = "fake-judge-2026-01-01"
TASTE = 0.5
POSITION_BIAS = 0.7
HANG_S = 5.0
_RESPONSES = re.compile(
    r"<response_A>\n(.*?)\n</response_A>\s*<response_B>\n(.*?)\n</response_B>", re.DOTALL
)

STATUS_FAULTS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "429": (429, {"retry-after": "0.2"}, {"message": "slow down"}),
    "429-bare": (429, {}, {"message": "slow down"}),
    "429-quota": (429, {}, {"message": "no quota", "code": "insufficient_quota"}),
    "500": (500, {}, {"message": "oops"}),
    "503": (503, {"retry-after": "0.1"}, {"message": "queue full"}),
    "400": (400, {}, {"message": "too long"}),
    "404": (404, {}, {"message": "no such model"}),
}


def true_log_odds(first: str, second: str) -> float:
    """What the server thinks of the response shown first, position bias included."""
    return TASTE * (len(first.split()) - len(second.split())) + POSITION_BIAS


class PatientServer(ThreadingHTTPServer):
    """Lets many clients wait to be accepted: Python's five are soon reached where this process gets little CPU."""

    request_queue_size = 128
    daemon_threads = True


@dataclass
class FakeOpenAI:
    port: int = 0
    faults: deque[str] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Every request's JSON body, in the order of arrival."""
    num_answered: int = 0
    tokens_billed: int = 0
    default_fault: str = "ok"
    delay_s: float = 0.0
    """Every answer takes this long."""
    hold_after: int | None = None
    """So many requests are answered; those after them wait for `release`, so that a test can act meanwhile."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._num_admitted = 0
        self._released = threading.Event()
        self._stopping = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.handle(self)

            def log_message(self, *_: object) -> None:
                return None

        self._server = PatientServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def release(self) -> None:
        """Answers what was held, and all that is to come."""
        self._released.set()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        with self._lock:
            self.bodies.append(body)
            fault = self.faults.popleft() if self.faults else self.default_fault
        if request.headers.get("authorization") != f"Bearer {KEY}":
            message = f"Incorrect API key provided: {request.headers.get('authorization')}"
            _send(request, 401, {"error": {"message": message}})
        elif fault in STATUS_FAULTS:
            status, headers, error = STATUS_FAULTS[fault]
            _send(request, status, {"error": error}, headers)
        elif fault == "hang":
            self._stopping.wait(HANG_S)
            request.close_connection = True
        elif fault == "reset":
            request.close_connection = True
        elif fault == "invalid_json":
            _send_raw(request, 200, b'{"choices": [{"mess')
        elif fault == "not_a_completion":
            _send(request, 200, {"hello": "world"})
        else:
            self._answer(request, body, fault)

    def _answer(self, request: BaseHTTPRequestHandler, body: dict[str, Any], fault: str) -> None:
        self._stopping.wait(self.delay_s)
        with self._lock:
            self._num_admitted += 1
            held = self.hold_after is not None and self._num_admitted > self.hold_after
        if held:
            self._released.wait()
        text = body["messages"][-1]["content"]
        match = _RESPONSES.search(text)
        assert match is not None, text
        log_odds = true_log_odds(*match.groups())
        completion = None if fault != "ok" else shaped_answer(body, log_odds, MODEL)
        completion = completion or _completion(log_odds, fault, len(text.split()))
        with self._lock:
            self.num_answered += 1
            self.tokens_billed += completion["usage"]["total_tokens"]
        _send(request, 200, completion)


def _completion(log_odds: float, fault: str, prompt_tokens: int) -> dict[str, Any]:
    log_a = -math.log1p(math.exp(-log_odds)) + math.log(0.9)
    log_b = log_a - log_odds
    letters = ("a", " b") if fault == "lower_case" else ("A", " B")
    top = [(letters[0], log_a), (letters[1], log_b), ("The", math.log(0.1))]
    if fault == "no_letters":
        top = [("The", -0.1), ("I", -3.0)]
    logprobs: dict[str, Any] | None = {
        "content": [
            {
                "token": top[0][0],
                "logprob": top[0][1],
                "bytes": None,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top],
            }
        ],
        "refusal": None,
    }
    message: dict[str, Any] = {"role": "assistant", "content": top[0][0], "refusal": None}
    if fault == "no_logprobs":
        logprobs = None
    if fault == "refusal":
        message |= {"content": None, "refusal": "I cannot compare these."}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 1,
            "total_tokens": prompt_tokens + 1,
        },
    }


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
) -> None:
    _send_raw(request, status, json.dumps(body).encode(), headers)


def _send_raw(
    request: BaseHTTPRequestHandler,
    status: int,
    payload: bytes,
    headers: dict[str, str] | None = None,
) -> None:
    request.send_response(status)
    request.send_header("content-type", "application/json")
    request.send_header("content-length", str(len(payload)))
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(payload)
