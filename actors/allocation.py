"""What a process that computes on a CPU asks of the C library's malloc."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's malloc.h."""
NEVER = 2**31 - 1
LARGEST_KEPT = 2**30
NUM_ARENAS = 2


def keep_freed_memory() -> None:
    """Memory that this process frees stays with it for its next tensors (glibc; elsewhere nothing happens).

    By default glibc gives blocks of more than 32 MB back at once, and smaller ones at the top of its heap. The same
    activations are then asked for again a moment later, and the kernel clears every page of them anew.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    _mallopt(M_TRIM_THRESHOLD, NEVER)


def limit_arenas() -> None:
    """Few malloc arenas for this process (glibc; elsewhere nothing happens).

    glibc gives threads heaps of their own, eight per core, and each keeps the most that it ever held. A driver has some
    30 threads of Ray that take turns with messages, so its memory would creep up for hundreds of steps until every heap
    has met its largest message.
    """
    _mallopt(M_ARENA_MAX, NUM_ARENAS)


def _mallopt(parameter: int, value: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(parameter, value)
