"""Weights through files: the same names, order and bits, in as many files as asked for, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from morlaif_ray.rl import weight_files
from morlaif_ray.rl.weight_files import read_files, shared_files

pytestmark = pytest.mark.unit


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [(f"z{9 - i}.weight", torch.randn(8, 4, generator=generator)) for i in range(5)]
    made.append(("half", torch.randn(3, 5, generator=generator).bfloat16()))
    made.append(("turned", made[0][1].T))  # not contiguous
    return made


@pytest.mark.parametrize(("file_bytes", "num_files"), [(1, 7), (250, 3), (1 << 20, 1)])
def test_every_tensor_comes_back_in_order_to_the_bit(file_bytes: int, num_files: int) -> None:
    with shared_files(tensors(), 1000, file_bytes=file_bytes) as paths:
        assert len(paths) == num_files
        found = list(read_files(paths))
    assert [name for name, _ in found] == [name for name, _ in tensors()]
    for (_, one), (_, other) in zip(found, tensors(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_files_are_gone_after_the_block_and_after_an_error_in_it() -> None:
    with shared_files(tensors(), 1000) as paths:
        pass
    assert not Path(paths[0]).parent.exists()
    with pytest.raises(RuntimeError), shared_files(tensors(), 1000) as paths:
        raise RuntimeError
    assert not Path(paths[0]).parent.exists()


@pytest.mark.parametrize(("room", "shared"), [(1101, True), (1099, False)])
def test_small_shared_memory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, shared: bool
) -> None:
    monkeypatch.setattr(weight_files, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(
        weight_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": room})
    )
    with shared_files(tensors(), 1000) as paths:
        assert (Path(paths[0]).parent.parent == tmp_path) == shared


def test_a_machine_without_shared_memory_uses_its_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weight_files, "SHARED_MEMORY", tmp_path / "none")
    with shared_files(tensors(), 1000) as paths:
        assert len(list(read_files(paths))) == 7
