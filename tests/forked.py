"""Fresh processes that need not import torch: forked from one that has, once per process of a test session."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "peft",
    "pyarrow.parquet",
)
"""Nothing of ours: the child imports that, from where its parent has it."""


def start(target: Callable[..., None], *arguments: Any, log: Path) -> BaseProcess:
    """A process that calls `target`, which stands at the top of an importable module; its stderr goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_run, args=(target, arguments, str(log)), daemon=True)
    process.start()
    return process


def _run(target: Callable[..., None], arguments: tuple[Any, ...], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    target(*arguments)
    # What it found is on the disk. After FSDP2 gloo threads outlive the process group (torch 2.13) and now and then
    # abort the interpreter's exit; actors never come there, Ray ends them.
    os._exit(0)


def end_well(processes: list[BaseProcess], logs: list[Path], timeout_s: float) -> None:
    """Waits until all have ended; AssertionError with the log of the first that failed. Leaves none behind."""
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            codes = [process.exitcode for process in processes]
            failed = [index for index, code in enumerate(codes) if code]
            if failed:
                code, log = codes[failed[0]], logs[failed[0]]
                said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
                raise AssertionError(f"process {failed[0]}: exit code {code}: {said}")
            if None not in codes:
                return
            time.sleep(0.02)
        raise AssertionError(f"{processes} have not ended within {timeout_s:.0f} s")
    finally:
        for process in processes:
            process.kill()
