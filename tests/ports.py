"""Ports of 127.0.0.1 that nothing listens on, for servers that must be told theirs."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """Different ones: all are held until the last is found."""
    with ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for item in found:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in found]


def free_port() -> int:
    return free_ports(1)[0]
