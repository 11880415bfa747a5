"""A Ray that its caller owns: started in this process, ended with the block."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def local_ray(num_cpus: int = 4, *, log_to_driver: bool = False) -> Iterator[Path]:
    """Its folder, which holds every log that its processes write. Its workers inherit the environment of the moment."""
    import ray

    from actors.session import start_ray

    folder = tempfile.mkdtemp(
        prefix="mt-", dir="/tmp"
    )  # Ray's socket paths are limited to 107 bytes
    start_ray(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=log_to_driver,
        object_store_memory=200 * 1024**2,
        _temp_dir=folder,
        logging_level="ERROR",
    )
    yield Path(folder)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
