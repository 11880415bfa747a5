"""Files and batches endpoints of an OpenAI-compatible server, on 127.0.0.1; answers by the same rule as `server`.

    with FakeBatchAPI() as api:
        api.polls_until_done = 1          # looks before a batch ends
        api.line_faults["500"] = 2        # so many lines of each attempt end in this way
        api.swallow_create = True         # creates the next batch but drops the connection instead of answering

Every request that was executed is counted in `executed` (custom_id -> times): a client must never pay for one twice.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.fake_openai.answers import one_token_answer, shaped_answer
from tests.fake_openai.server import KEY, MODEL, PatientServer, true_log_odds

_RESPONSES = re.compile(
    r"<response_A>\n(.*?)\n</response_A>\s*<response_B>\n(.*?)\n</response_B>", re.DOTALL
)
_FILE_PART = re.compile(rb'name="file".*?\r\n\r\n(.*)\r\n--', re.DOTALL)


@dataclass
class FakeBatchAPI:
    polls_until_done: int = 0
    line_faults: dict[str, int] = field(default_factory=dict)
    """"500", "429", "400", "missing", "garbled" -> lines of the first batches that still end so."""
    final_status: deque[str] = field(default_factory=deque)
    """Statuses of the next batches, then "completed" for ever."""
    refuse_with: deque[tuple[str, str]] = field(default_factory=deque)
    """(code, message): the next batches fail validation."""
    http_faults: deque[int] = field(default_factory=deque)
    """HTTP statuses of the next requests of any kind; 0: served."""
    swallow_create: bool = False
    cut_downloads: int = 0
    """So many of the next downloads end in the middle of the last line, the connection with them."""
    max_enqueued: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    deleted: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: Counter[str] = field(default_factory=Counter)
    tokens_billed: int = 0
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.handle(self, "POST")

            def do_GET(self) -> None:
                owner.handle(self, "GET")

            def do_DELETE(self) -> None:
                owner.handle(self, "DELETE")

            def log_message(self, *_: object) -> None:
                return None

        self._server = PatientServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeBatchAPI:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def handle(self, request: BaseHTTPRequestHandler, method: str) -> None:
        payload = request.rfile.read(int(request.headers.get("content-length") or 0))
        path = request.path.split("?")[0].removeprefix("/v1/")
        with self._lock:
            self.requests.append(f"{method} {path}")
            fault = self.http_faults.popleft() if self.http_faults else 0
            if request.headers.get("authorization") != f"Bearer {KEY}":
                text = f"Incorrect API key provided: {request.headers.get('authorization')}"
                reply(request, 401, {"error": {"message": text}})
            elif fault:
                reply(request, fault, {"error": {"message": "told to fail"}})
            elif (method, path) == ("POST", "files"):
                reply(request, 200, self._upload(payload))
            elif (method, path) == ("POST", "batches"):
                self._create(request, json.loads(payload))
            elif (method, path) == ("GET", "batches"):
                newest = list(self.batches.values())[::-1]
                reply(request, 200, {"object": "list", "data": newest, "has_more": False})
            elif path.startswith("batches/") and path[8:] in self.batches:
                reply(request, 200, self._advance(self.batches[path[8:]]))
            elif method == "DELETE" and path.removeprefix("files/") in self.files:
                name = path.removeprefix("files/")
                self.deleted[name] = self.files.pop(name)
                reply(request, 200, {"id": name, "object": "file", "deleted": True})
            elif path.endswith("/content") and path.split("/")[1] in self.files:
                cut, self.cut_downloads = self.cut_downloads > 0, max(0, self.cut_downloads - 1)
                reply_raw(request, 200, self.files[path.split("/")[1]], cut=cut)
            else:
                reply(request, 404, {"error": {"message": "not found"}})

    def _upload(self, payload: bytes) -> dict[str, Any]:
        found = _FILE_PART.search(payload)
        assert found is not None, payload[:300]
        name = f"file-{len(self.files) + len(self.deleted)}"
        self.files[name] = found.group(1)
        return {
            "id": name,
            "object": "file",
            "bytes": len(found.group(1)),
            "created_at": int(time.time()),
            "filename": "input.jsonl",
            "purpose": "batch",
            "status": "processed",
        }

    def _create(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        name = f"batch-{len(self.batches)}"
        batch: dict[str, Any] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "validating",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "polls": 0,
        }
        self.batches[name] = batch
        if self.swallow_create:
            self.swallow_create = False
            request.close_connection = True
        else:
            reply(request, 200, batch)

    def _advance(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        batch["polls"] += 1
        batch["status"] = "in_progress"
        if self._too_many(batch):
            self.refuse_with.appendleft(("token_limit_exceeded", "Enqueued token limit reached"))
        if self.refuse_with:
            code, message = self.refuse_with.popleft()
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": code, "message": message}]}
        elif batch["polls"] > self.polls_until_done:
            self._finish(batch)
        return batch

    def _too_many(self, batch: dict[str, Any]) -> bool:
        if self.max_enqueued is None or batch["polls"] > 1:
            return False
        others = [
            b for b in self.batches.values() if b["status"] == "in_progress" and b is not batch
        ]
        return len(others) >= self.max_enqueued

    def _finish(self, batch: dict[str, Any]) -> None:
        """Executes the requests; the output is in reverse order, as its order means nothing."""
        status = self.final_status.popleft() if self.final_status else "completed"
        lines = self.files[batch["input_file_id"]].splitlines()
        if status in ("expired", "cancelled"):
            lines, unexecuted = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        else:
            unexecuted = []
        good: list[bytes] = []
        bad = [_error_line(json.loads(line), None, "batch_expired") for line in unexecuted]
        for line in lines:
            entry = json.loads(line)
            fault = next((name for name, left in self.line_faults.items() if left > 0), "")
            if fault:
                self.line_faults[fault] -= 1
            if fault in ("429", "500", "400", "401"):
                bad.append(_error_line(entry, int(fault), "told_to_fail"))
            elif fault == "garbled":
                good.append(line[: len(line) // 2])
            elif fault != "missing":
                good.append(self._execute(entry))
        batch["status"] = status
        for kind, found in (("output", good), ("error", bad)):
            if found:
                name = f"file-{len(self.files) + len(self.deleted)}"
                self.files[name] = b"\n".join(reversed(found)) + b"\n"
                batch[f"{kind}_file_id"] = name

    def _execute(self, entry: dict[str, Any]) -> bytes:
        body = entry["body"]
        match = _RESPONSES.search(body["messages"][-1]["content"])
        assert match is not None
        log_odds = true_log_odds(*match.groups())
        completion = shaped_answer(body, log_odds, MODEL) or one_token_answer(body, log_odds, MODEL)
        self.executed[entry["custom_id"]] += 1
        self.tokens_billed += completion["usage"]["total_tokens"]
        response = {"status_code": 200, "request_id": "r", "body": completion}
        line = {"id": "l", "custom_id": entry["custom_id"], "response": response, "error": None}
        return json.dumps(line).encode()


def _error_line(entry: dict[str, Any], status: int | None, code: str) -> bytes:
    error = {"code": code, "message": "told to fail"}
    line: dict[str, Any] = {
        "id": "l",
        "custom_id": entry["custom_id"],
        "response": None,
        "error": error,
    }
    if status is not None:
        line["response"] = {"status_code": status, "request_id": "r", "body": {"error": error}}
        line["error"] = None
    return json.dumps(line).encode()


def reply(request: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
    reply_raw(request, status, json.dumps(body).encode())


def reply_raw(
    request: BaseHTTPRequestHandler, status: int, payload: bytes, *, cut: bool = False
) -> None:
    request.send_response(status)
    request.send_header("content-type", "application/json")
    request.send_header("content-length", str(len(payload)))
    request.end_headers()
    request.wfile.write(payload[:-50] if cut else payload)
    request.close_connection = request.close_connection or cut
