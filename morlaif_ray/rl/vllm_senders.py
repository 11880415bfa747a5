"""The learner's end of vLLM's own weight transfers: NCCL between GPUs, CUDA IPC on one GPU.

vLLM's trainer engines drive the engines' control plane through a client. Here the rollout pool does that, for it
supervises the engines, so the clients below only take note. Neither class has been run on a GPU; a test compares the
calls with the signatures of the installed vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from morlaif_ray.rl.weight_broadcast import Announcement, Rendezvous, sealed, within


class NotedClient:
    """vLLM's `VLLMWeightSyncClient`: keeps what the engines are to be told, for someone else to tell them."""

    def __init__(self) -> None:
        self.update: Any = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The rollout pool has sent it."""

    def start_weight_update(self) -> None:
        """The engine does it when it gets the announcement."""

    def update_weights(self, update_info: Any) -> None:
        self.update = update_info

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The engine does it when it has received all."""


class AnnouncedSource(WeightSource):  # type: ignore[misc]
    """vLLM's view of the weights of one refresh."""

    def __init__(self) -> None:
        self._announcement: Announcement | None = None
        self._weights: Iterable[tuple[str, Tensor]] = ()

    def load(self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`weights`: sealed, as announced; iterated once."""
        self._announcement, self._weights = announcement, weights

    def metadata(self) -> list[ParamMeta]:
        told = self._announcement
        assert told is not None, "load comes first"
        return [
            ParamMeta(name, told.dtype(index), told.shapes[index])
            for index, name in enumerate(told.names)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)


class NcclSender:
    """A `WeightSender` from this process's GPU to those of the engines. Not run on a GPU yet."""

    def __init__(self, where: Rendezvous) -> None:
        host, port = where.host_and_port
        self._timeout_s = where.timeout_s
        self._source = AnnouncedSource()
        self._engine: Any = None
        told = NCCLTrainerInitInfo(
            master_address=host,
            master_port=port,
            world_size=where.size,
            packed=True,
            packed_buffer_size_bytes=where.max_bytes,
            rank=0,
        )

        given_up = threading.Event()

        def meet() -> None:
            engine = WeightTransferTrainerFactory.trainer_init(
                told, client=NotedClient(), source=self._source
            )
            if given_up.is_set():  # nobody waits for it any more
                engine.shutdown()
            self._engine = engine

        within(where.timeout_s, meet, given_up.set)

    def offer(
        self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]
    ) -> Announcement:
        return announcement

    def send(self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._source.load(announcement, sealed(announcement, weights))
        # NCCL waits for ever for a peer that is gone; aborting the communicator ends its kernels.
        within(self._timeout_s, self._engine.send_weights, self._engine.shutdown)

    def close(self) -> None:
        self._engine.shutdown()


class IpcSender:
    """A `WeightSender` to engines on this process's own GPU, which read its memory. Not run on a GPU yet."""

    def __init__(self, where: Rendezvous) -> None:
        self._client = NotedClient()
        self._source = AnnouncedSource()
        self._kept: list[tuple[str, Tensor]] = []
        self._engine = WeightTransferTrainerFactory.trainer_init(
            IPCTrainerInitInfo(rank=0), client=self._client, source=self._source
        )

    def offer(
        self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]
    ) -> Announcement:
        # Handles do not keep memory alive: what is not the model's own stays here until the engines are done.
        self._kept = [(n, w.detach().contiguous()) for n, w in sealed(announcement, weights)]
        self._source.load(announcement, self._kept)
        self._engine.send_weights()
        return announcement.with_handles(self._client.update["ipc_handles"])

    def send(self, announcement: Announcement, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The engines read by themselves."""

    def close(self) -> None:
        self._kept = []
        self._engine.shutdown()
