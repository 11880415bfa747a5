"""Processes behind Ray's actors, ended as the system ends them, and acts that wait for an event, not for a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

WAIT_S = 240.0
"""For what comes at once on a free machine: a limit for a broken test, not for a slow one."""


def pid_of(handle: Any) -> int:
    import ray

    return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=WAIT_S))


def kill(handle: Any) -> None:
    """SIGKILL, as the kernel does when memory runs out; returns when the process is gone."""
    pid = pid_of(handle)
    psutil.Process(pid).kill()
    wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {WAIT_S:.0f} s"
        time.sleep(0.02)


def once(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Acts beside the caller as soon as the condition holds. Where it never does, nothing happens."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread
