"""vLLM's own OpenAI-compatible server in a process group of its own, on 127.0.0.1, with an API key."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    """The name that it serves the model under."""
    started_s: float
    """How long it took until it was ready."""


@contextlib.contextmanager
def serve(folder: Path, log: Path, *, key: str, max_length: int) -> Iterator[Server]:
    """Serves the model in `folder`. RuntimeError with the log's end where it dies or is not ready in time."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "judge"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_length)]
    # An untrained model would fill its answer with the blanks that JSON allows.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    command += ["--structured-outputs-config", json.dumps(compact)]
    command += ["--max-num-seqs", "64", "--kv-cache-memory-bytes", "64M"]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=_environment(key), start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield Server(f"http://127.0.0.1:{port}/v1", "judge", time.monotonic() - started)
        finally:
            _stop(process)


def _environment(key: str) -> dict[str, str]:
    """The key goes through the environment: a command line is there for every user of the machine to read."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    # One thread: more are many times slower on a busy machine. No compilation: it takes longer than the tests.
    fast = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **quiet, **fast, "VLLM_API_KEY": key}


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with {process.returncode}:\n{_end(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=2.0):
            return
        time.sleep(0.25)
    raise RuntimeError(f"vLLM's server was not ready within {START_TIMEOUT_S:g} s:\n{_end(log)}")


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, then SIGKILL to what is left of its own group: its engine would live on."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
