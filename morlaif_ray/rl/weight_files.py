"""Weights on their way to an engine of several processes: safetensors files in shared memory, read by each of them.

    with shared_files(tensors, num_bytes) as paths:    # in the process that has the weights
        ...                                            # read_files(paths) in each of the others

A remote call to such processes would pickle every tensor once per process. A file in shared memory is written once, and
each process maps it and takes its own slice.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

SHARED_MEMORY = Path("/dev/shm")
FILE_BYTES = 1 << 30
"""So much is collected before a file is written: what the writer holds beside the files."""
SPARE = 1.1
"""Shared memory must have room for so many times the weights; a container's may be 64 MB small."""


@contextlib.contextmanager
def shared_files(
    tensors: Iterable[tuple[str, torch.Tensor]], num_bytes: int, *, file_bytes: int = FILE_BYTES
) -> Iterator[list[str]]:
    """Paths of safetensors files with all `tensors`; gone after the block.

    Args:
        tensors: consumed once, in order; on any device.
        num_bytes: how much they are in all, to choose between shared memory and the system's temporary folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="morlaif-weights-", dir=_roomy_folder(num_bytes)))
    try:
        yield [str(path) for path in _write(tensors, folder, file_bytes)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_files(paths: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the order in which they were written."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.metadata()["names"].split("\n"):
                yield name, file.get_tensor(name)


def _roomy_folder(num_bytes: int) -> Path | None:
    """None: the system's temporary folder."""
    if not SHARED_MEMORY.is_dir():
        return None
    roomy = shutil.disk_usage(SHARED_MEMORY).free > SPARE * num_bytes
    return SHARED_MEMORY if roomy else None


def _write(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, file_bytes: int
) -> Iterator[Path]:
    waiting: dict[str, torch.Tensor] = {}
    size, count = 0, 0
    for name, tensor in tensors:
        waiting[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        if size >= file_bytes:
            yield _write_one(waiting, folder / f"{count}.safetensors")
            waiting, size, count = {}, 0, count + 1
    if waiting:
        yield _write_one(waiting, folder / f"{count}.safetensors")


def _write_one(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"names": "\n".join(tensors)})
    return path
