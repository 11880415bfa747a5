"""Ranks of a test, each a fresh interpreter."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def run(
    target: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    logs: Sequence[Path],
    timeout_s: float,
) -> None:
    """Calls `target`, which stands at the top of an importable module, once per rank; stderr goes to the rank's log."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(target, own, str(log)), daemon=True)
        for own, log in zip(arguments, logs, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        _wait(processes, logs, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(target: Callable[..., None], arguments: tuple[Any, ...], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    target(*arguments)
    # What it found is on the disk. After FSDP2 gloo threads outlive the process group (torch 2.13) and now and then
    # abort the interpreter's exit; actors never come there, Ray ends them.
    os._exit(0)


def _wait(processes: Sequence[BaseProcess], logs: Sequence[Path], timeout_s: float) -> None:
    """Until all have ended; AssertionError with the log of the first that failed otherwise."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            log = logs[failed[0]]
            said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise AssertionError(f"process {failed[0]}: exit code {codes[failed[0]]}: {said}")
        if None not in codes:
            return
        time.sleep(0.02)
    raise AssertionError(f"{processes} have not ended within {timeout_s:.0f} s")
