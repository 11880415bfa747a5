"""What a process that computes on a CPU asks of the C library's malloc."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
NEVER = 2**31 - 1
LARGEST_KEPT = 2**30


def keep_freed_memory() -> None:
    """Memory that this process frees stays with it for its next tensors (glibc; elsewhere nothing happens).

    By default glibc gives blocks of more than 32 MB back at once, and smaller ones at the top of its heap. The same
    activations are then asked for again a moment later, and the kernel clears every page of them anew.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, NEVER)
