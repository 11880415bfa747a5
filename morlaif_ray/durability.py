"""What a rename publishes must be on the disk before it: one call for files and folders."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Returns when a file's bytes, or a folder's entries, would survive a power cut. OSError where that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
