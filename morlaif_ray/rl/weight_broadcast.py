"""Policy weights straight from the learner into the engines: one group of processes, one message, packed buckets.

    learner (rank 0)        sender = make_sender(rendezvous)       each process of an engine   receiver of its engine
                            message = sender.offer(announcement, weights)      -> the one control message ->
                            sender.send(message, weights)                      -> buckets of bytes ->  load, verify

Beside the weights travels, last of all, `SEAL`: the version and a sum over the bits of every weight. A receiver that
sums the same bits holds what was sent; if not, it raises and keeps its old version number.
Backends: `gloo` (torch alone, through the host's memory), `nccl` and `ipc` (vLLM's own, `vllm_senders`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from morlaif_ray.errors import NumericalError

SEAL = "morlaif.seal"
"""The pseudo-weight that comes last, bytes: they need no alignment, wherever a backend packs them."""
BLOCK = 4096
"""Elements that are summed before their place counts."""
PRIME = 2**31 - 1
ALIGNMENT = 16
END_S = 5.0
"""What a thread that was given up gets to end."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Rendezvous:
    """Where a group meets. Made by the rollout pool, consumed by the learner and every engine."""

    backend: str
    """`gloo`, `nccl` or `ipc`."""
    address: str
    """host:port on the learner's node."""
    first_rank: int
    """Of this engine's processes; 0 is the learner."""
    size: int
    """The learner and all processes of all engines."""
    max_bytes: int
    """Of a bucket; a larger weight has one of its own."""
    timeout_s: float
    """Longest wait for the others: for the store, then for the group, and within a transfer, whose last bucket may wait
    once more."""

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)


@dataclass(frozen=True)
class Announcement:
    """What comes, in order: the one control message of a refresh. Made by the learner, consumed by every engine."""

    version: int
    """Number of learner steps behind the weights."""
    names: tuple[str, ...]
    """Plain parameter names, `SEAL` last."""
    dtype_names: tuple[str, ...]
    """As torch has them, such as 'bfloat16'."""
    shapes: tuple[tuple[int, ...], ...]
    handles: Any = None
    """Of memory on the GPU that both share (`ipc`); None elsewhere."""

    @classmethod
    def of(cls, version: int, weights: Iterable[tuple[str, Tensor]]) -> Announcement:
        """Reads names, types and (whole) shapes; no weight is gathered or copied."""
        listed = [(n, str(w.dtype).removeprefix("torch."), tuple(w.shape)) for n, w in weights]
        listed.append((SEAL, "uint8", (8 * (1 + len(listed)),)))
        names = tuple(name for name, _, _ in listed)
        dtype_names = tuple(dtype_name for _, dtype_name, _ in listed)
        return cls(version, names, dtype_names, tuple(shape for _, _, shape in listed))

    @property
    def weight_names(self) -> tuple[str, ...]:
        return self.names[:-1]

    def num_bytes(self, index: int) -> int:
        return math.prod(self.shapes[index]) * self.dtype(index).itemsize

    def dtype(self, index: int) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype_names[index])
        return found

    def with_handles(self, handles: Any) -> Announcement:
        return dataclasses.replace(self, handles=handles)

    def parts(self, max_bytes: int) -> Iterator[range]:
        """Consecutive weights that travel in one bucket; the same on both sides."""
        start, size = 0, 0
        for index in range(len(self.names)):
            padded = _padded(self.num_bytes(index))
            if index > start and size + padded > max_bytes:
                yield range(start, index)
                start, size = index, 0
            size += padded
        yield range(start, len(self.names))


def bit_sum(weight: Tensor) -> Tensor:
    """A number that depends on all bits of the weight and on the order of its blocks; int64 without dimensions, on the
    weight's device. It finds damage, not malice; an exchange within a block of 4,096 elements goes unseen."""
    flat = weight.detach().contiguous().reshape(-1)
    bits_N = flat.view(_BITS[flat.element_size()])
    num_whole = len(bits_N) // BLOCK * BLOCK
    whole = bits_N[:num_whole].view(-1, BLOCK).sum(dim=1, dtype=torch.int64)
    rest = bits_N[num_whole:].sum(dtype=torch.int64).reshape(1)
    blocks = torch.cat([whole, rest]).remainder(PRIME)
    places = torch.arange(1, len(blocks) + 1, device=blocks.device).remainder(PRIME)
    return (blocks * places).remainder(PRIME).sum()  # no product or sum reaches 2^63


def sealed(
    announcement: Announcement, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they are sent, one at a time, and then their seal. ValueError where they are not as announced."""
    sums: list[Tensor] = []
    expected = zip(
        announcement.weight_names, announcement.dtype_names, announcement.shapes, strict=False
    )
    for (name, weight), told in zip(weights, expected, strict=True):
        found = (name, str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
        if found != told:
            raise ValueError(f"weight refresh: announced {told}, got {found}")
        sums.append(bit_sum(weight))
        yield name, weight
    device = sums[0].device if sums else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the sums were begun on the streams of earlier buckets
    version = torch.tensor(announcement.version, device=device)
    yield SEAL, torch.stack([version, *sums]).view(torch.uint8)


class CheckedLoader:
    """Passes weights on to `load`, summing their bits, and holds them against the seal; for one version."""

    def __init__(self, load: Callable[[list[tuple[str, Tensor]]], Any]) -> None:
        self._load = load
        self._names: list[str] = []
        self._sums: list[Tensor] = []
        self._seal: Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Some weights, in the order in which they were announced."""
        kept = []
        for name, weight in weights:
            if name == SEAL:
                self._seal = weight.clone().view(torch.int64)
                continue
            self._names.append(name)
            self._sums.append(bit_sum(weight))
            kept.append((name, weight))
        if kept:
            self._load(kept)

    def verify(self, version: int) -> None:
        """NumericalError where a weight is not what was sent, or not of this version; what was loaded is then unfit."""
        if self._seal is None:
            raise NumericalError(
                f"weight refresh: version {version} came without its check-sums after {len(self._names)} weights"
            )
        sent_version, *sent = self._seal.tolist()
        if sent_version != version:
            raise NumericalError(
                f"weight refresh: got weights of version {sent_version}, expected version {version}"
            )
        found = [int(each) for each in self._sums]
        if len(found) != len(sent):
            raise NumericalError(
                f"weight refresh: {len(found)} weights of version {version} came, {len(sent)} were sent"
            )
        for name, ours, theirs in zip(self._names, found, sent, strict=True):
            if ours != theirs:
                raise NumericalError(
                    f"weight refresh: '{name}' of version {version} does not match its check-sum; it was damaged on "
                    f"the way"
                )


class WeightSender(Protocol):
    """The learner's end of a group. Made by `make_sender` once all others are on their way to the rendezvous."""

    def offer(
        self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]
    ) -> Announcement:
        """What the engines are to be told; weights are looked at by `ipc` alone."""
        ...

    def send(self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Returns when all weights are out; raises within the time-out where an engine is gone."""
        ...

    def close(self) -> None: ...


class GlooGroup:
    """A group of its own beside torch's default one, over TCP."""

    def __init__(self, where: Rendezvous, rank: int) -> None:
        """Waits for all members; RuntimeError after the time-out."""
        distributed: Any = torch.distributed  # its stores are no part of its typed interface
        host, port = where.host_and_port
        timeout = timedelta(seconds=where.timeout_s)
        self._store: Any = distributed.TCPStore(host, port, where.size, rank == 0, timeout)
        store = distributed.PrefixStore("weights", self._store)
        self._group: Any = distributed.ProcessGroupGloo(store, rank, where.size, timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's bytes into everyone's tensor (on the CPU); RuntimeError where a member is gone."""
        self._group.broadcast(tensor, 0).wait()

    def close(self) -> None:
        """The others' pending broadcasts fail."""
        self._group = self._store = None


class GlooSender:
    """A `WeightSender` through the host's memory."""

    def __init__(self, where: Rendezvous) -> None:
        self._max_bytes, self._timeout_s = where.max_bytes, where.timeout_s
        self._group = GlooGroup(where, 0)

    def offer(
        self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]
    ) -> Announcement:
        return announcement

    def send(self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]) -> None:
        coming = sealed(announcement, weights)
        deadline = time.monotonic() + self._timeout_s
        for part in announcement.parts(self._max_bytes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all weights were out after {self._timeout_s:.0f} s")
            bucket = _empty_bucket(announcement, part)
            for place in _places(announcement, part, bucket):
                _, weight = next(coming)
                place.copy_(weight.contiguous().reshape(-1).view(torch.uint8))
            self._group.broadcast(bucket)
        # Past its end, so that a weight too many is noticed as well.
        assert next(coming, None) is None, "more weights than announced"

    def close(self) -> None:
        self._group.close()


def receive_by_gloo(
    group: GlooGroup, announcement: Announcement, max_bytes: int, loader: CheckedLoader
) -> None:
    """An engine's side of `GlooSender.send`; weights reach the loader bucket by bucket. Not verified yet."""
    for part in announcement.parts(max_bytes):
        bucket = _empty_bucket(announcement, part)
        group.broadcast(bucket)
        loader.load_weights(
            [
                (
                    announcement.names[index],
                    place.view(announcement.dtype(index)).view(announcement.shapes[index]),
                )
                for index, place in zip(part, _places(announcement, part, bucket), strict=True)
            ]
        )


def make_sender(where: Rendezvous) -> WeightSender:
    """The learner's end; blocks until all are there."""
    if where.backend == "gloo":
        return GlooSender(where)
    from morlaif_ray.rl.vllm_senders import IpcSender, NcclSender

    return NcclSender(where) if where.backend == "nccl" else IpcSender(where)


def within(timeout_s: float, work: Callable[[], None], give_up: Callable[[], None]) -> None:
    """Work that knows no time-out, in a thread. Where it takes longer: `give_up`, which should end it (some seconds are
    left for that), and TimeoutError."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failure.append(error)

    thread = threading.Thread(target=run, name="weight transfer", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        give_up()
        thread.join(END_S)
        raise TimeoutError(
            f"not done in {timeout_s:.0f} s; another process of the group hangs or is gone"
        )
    if failure:
        raise failure[0]


def _empty_bucket(announcement: Announcement, part: range) -> Tensor:
    """New each time: an engine may go on to use what it was given."""
    size = sum(_padded(announcement.num_bytes(index)) for index in part)
    return torch.empty(size, dtype=torch.uint8)


def _places(announcement: Announcement, part: range, bucket: Tensor) -> Iterator[Tensor]:
    """Where each weight of a bucket lies, as bytes."""
    start = 0
    for index in part:
        size = announcement.num_bytes(index)
        yield bucket[start : start + size]
        start += _padded(size)


def _padded(num_bytes: int) -> int:
    """Every weight begins where any type may be read."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
