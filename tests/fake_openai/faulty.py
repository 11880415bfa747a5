"""A fast OpenAI-compatible server that misbehaves by chance, keeps a rate limit, and counts what it was asked and paid.

    with FaultyServer(ServerOptions(fault_share=0.2)) as server:   # a process of its own
        ... base_url=server.url ...
        server.stats()["answered"], server.stats()["billed_usd"]

Its answers are a known function of the pair and the phrase (`true_log_odds`): a label that went astray shows. It
bills an answer when the whole body was written. asyncio without a framework, so that the client under
test is the slower one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "sk-faulty-0123456789abcdef"
MODEL = "faulty-judge-2026-01-01"
POSITION_BIAS = 0.4
PROMPT_USD, COMPLETION_USD = 0.15, 0.60  # per million tokens
FAULTS = (
    *("429", "429-bare", "500", "503", "hang", "reset", "reset_mid_body", "truncated"),
    *("invalid_json", "slow", "no_logprobs", "refusal", "duplicated", "lower_case"),
)
ANSWERED = {"ok", "slow", "no_logprobs", "refusal", "duplicated", "lower_case"}
_TEXTS = re.compile(
    r"<response_A>\n(.*?)\n</response_A>\s*<response_B>\n(.*?)\n</response_B>\s*(.*)$", re.DOTALL
)


@dataclass(frozen=True)
class ServerOptions:
    fault_share: float = 0.0
    """Share of requests that meet one of `faults`, all equally likely, drawn by `seed`."""
    faults: tuple[str, ...] = FAULTS
    seed: int = 0
    requests_per_minute: float = 0.0
    """0: no limit. A bucket of one second's worth; what exceeds it is answered 429."""
    send_headers: bool = False
    """x-ratelimit-* with every answer."""
    delay_s: float = 0.0
    slow_s: float = 0.5
    hang_s: float = 60.0


def opinion(text: str, phrase: str) -> float:
    """In [-2, 2], by content alone."""
    digest = hashlib.sha256(f"{text.strip()}\0{phrase}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**62 - 2.0


def true_log_odds(first: str, second: str, phrase: str) -> float:
    """What the server says of the response shown first, position bias included."""
    return opinion(first, phrase) - opinion(second, phrase) + POSITION_BIAS


class FaultyServer:
    """Starts the process on entry and ends it on exit."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options

    def __enter__(self) -> FaultyServer:
        text = json.dumps(dataclasses.asdict(self._options))
        root = Path(__file__).parents[2]
        command = [sys.executable, str(Path(__file__).resolve()), "--options", text]
        # The pipe ends with this process, however it ends: a killed benchmark leaves no server behind.
        self._process = subprocess.Popen(
            [*command, "--until-stdin-ends"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


class _Server:
    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._draw = random.Random(options.seed)
        self.faults: Counter[str] = Counter()
        self.arrivals_s: list[float] = []
        self.requests = self.rejected = self.refused_keys = 0
        self.prompt_tokens = self.completion_tokens = 0
        self._level = options.requests_per_minute / 60.0
        self._filled_s = time.monotonic()

    def stats(self) -> dict[str, Any]:
        billed = (self.prompt_tokens * PROMPT_USD + self.completion_tokens * COMPLETION_USD) / 1e6
        return {
            "requests": self.requests,
            "answered": sum(self.faults[name] for name in ANSWERED),
            "rejected_429": self.rejected,
            "refused_keys": self.refused_keys,
            "billed_prompt_tokens": self.prompt_tokens,
            "billed_completion_tokens": self.completion_tokens,
            "billed_usd": billed,
            "faults": dict(self.faults),
            "arrivals_s": self.arrivals_s,
        }

    def over_limit(self) -> bool:
        """Takes one request from the bucket, unless it is empty."""
        rate = self.options.requests_per_minute / 60.0
        if not rate:
            return False
        now_s = time.monotonic()
        self._level = min(rate, self._level + (now_s - self._filled_s) * rate)
        self._filled_s = now_s
        if self._level < 1.0:
            return True
        self._level -= 1.0
        return False

    def headers(self) -> str:
        if not self.options.send_headers:
            return ""
        rate = self.options.requests_per_minute
        reset_s = (rate / 60.0 - self._level) / max(rate / 60.0, 1e-9)
        return (
            f"x-ratelimit-limit-requests: {rate:.0f}\r\nx-ratelimit-remaining-requests: {max(0, int(self._level))}\r\n"
            f"x-ratelimit-reset-requests: {reset_s * 1000:.0f}ms\r\n"
        )

    def draw(self) -> str:
        options = self.options
        return (
            self._draw.choice(options.faults) if self._draw.random() < options.fault_share else "ok"
        )


class _Connection(asyncio.Protocol):
    """One client connection: requests one after the other, each answered before the next is read."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        while self._task is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).decode("latin-1")
            found = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
            stop = end + 4 + (int(found.group(1)) if found else 0)
            if len(self._buffer) < stop:
                return
            body = bytes(self._buffer[end + 4 : stop])
            del self._buffer[:stop]
            self._handle(head, body)

    def _handle(self, head: str, body: bytes) -> None:
        server = self._server
        if head.startswith("GET /stats"):
            self._send(200, json.dumps(server.stats()).encode())
            return
        server.requests += 1
        if f"Bearer {KEY}" not in head:
            server.refused_keys += 1
            self._error(401, "Incorrect API key provided: " + head[-60:])
            return
        if server.over_limit():
            server.rejected += 1
            self._error(429, "slow down", "retry-after: 1\r\n")
            return
        server.arrivals_s.append(time.time())
        fault = server.draw()
        server.faults[fault] += 1
        wait_s = {"slow": server.options.slow_s, "hang": server.options.hang_s}.get(fault, 0.0)
        wait_s += server.options.delay_s
        if wait_s:
            self._task = asyncio.get_running_loop().create_task(self._later(wait_s, fault, body))
        else:
            self._answer(fault, body)

    async def _later(self, wait_s: float, fault: str, body: bytes) -> None:
        await asyncio.sleep(wait_s)
        self._task = None
        self._answer(fault, body)
        self._next()

    def _answer(self, fault: str, body: bytes) -> None:
        if fault in ("429", "429-bare"):
            self._error(429, "slow down", "retry-after: 0.2\r\n" if fault == "429" else "")
        elif fault in ("500", "503"):
            self._error(int(fault), "overloaded")
        elif fault in ("hang", "reset"):
            self._transport.abort()
        elif fault == "invalid_json":
            self._send(200, b'{"choices": [{"mess]]')
        else:
            self._complete(fault, json.loads(body))

    def _complete(self, fault: str, request: dict[str, Any]) -> None:
        text = request["messages"][-1]["content"]
        match = _TEXTS.search(text)
        assert match is not None, text
        first, second, phrase = match.groups()
        prompt_tokens = len(text) // 4
        payload = completion(true_log_odds(first, second, phrase), fault, prompt_tokens)
        if fault == "truncated":
            self._send(200, payload[: len(payload) // 2])
        elif fault == "reset_mid_body":
            self._write_head(200, len(payload), "")
            self._transport.write(payload[: len(payload) // 2])
            self._transport.close()
        elif not self._transport.is_closing():
            self._send(200, payload)
            self._server.prompt_tokens += prompt_tokens
            self._server.completion_tokens += 1

    def _error(self, status: int, message: str, headers: str = "") -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def _send(self, status: int, payload: bytes, headers: str = "") -> None:
        self._write_head(status, len(payload), headers)
        self._transport.write(payload)

    def _write_head(self, status: int, length: int, headers: str) -> None:
        self._transport.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n"
            f"{headers}{self._server.headers()}\r\n".encode()
        )


def completion(log_odds: float, fault: str, prompt_tokens: int) -> bytes:
    """A chat completion whose first token has these log-odds of A over B."""
    log_a = -math.log1p(math.exp(-log_odds)) + math.log(0.9)
    letters = ("a", " b") if fault == "lower_case" else ("A", " B")
    top = [(letters[0], log_a), (letters[1], log_a - log_odds), ("The", math.log(0.1))]
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
    logprobs: Any = {"content": [entries[0] | {"top_logprobs": entries}], "refusal": None}
    message: dict[str, Any] = {"role": "assistant", "content": top[0][0], "refusal": None}
    if fault == "no_logprobs":
        logprobs = None
    if fault == "refusal":
        message |= {"content": None, "refusal": "I cannot compare these."}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length"}
    choices = [choice, choice | {"index": 1}] if fault == "duplicated" else [choice]
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 1,
        "total_tokens": prompt_tokens + 1,
    }
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": choices,
    }
    return json.dumps(body | {"usage": usage}).encode()


async def serve(options: ServerOptions) -> None:
    state = _Server(options)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Connection(state), "127.0.0.1", 0, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", required=True, help="JSON of ServerOptions")
    parser.add_argument("--until-stdin-ends", action="store_true")
    options = parser.parse_args()
    if options.until_stdin_ends:
        end_with_stdin()
    asyncio.run(serve(ServerOptions(**json.loads(options.options))))


def end_with_stdin() -> None:
    """Ends this process when whoever holds the other end of its standard input is gone."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would outlive the interpreter's end
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
