"""An engine's end of vLLM's weight transfers: four backends behind one life cycle.

    host   weights that are in this process, or in files of shared memory that all slices read (`weight_files`)
    gloo   from the learner through the host's memory (`weight_broadcast`)
    nccl   vLLM's own, from the learner's GPU          ipc   vLLM's own, from the learner on the same GPU

vLLM imports this module in every process that holds a slice (`worker_extension_cls`) and then makes the engine that
the config names: so they register when it is imported. Only a process with a vLLM engine imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from morlaif_ray.rl.weight_broadcast import (
    Announcement,
    CheckedLoader,
    GlooGroup,
    Rendezvous,
    receive_by_gloo,
)
from morlaif_ray.rl.weight_files import read_files

PREFIX = "morlaif_"
"""Of our backends' names in vLLM's registry."""


def backend_name(backend: str) -> str:
    """In `WeightTransferConfig`; a process has the backend that it started with."""
    return PREFIX + backend


def init_info(where: Rendezvous) -> dict[str, Any]:
    """What `init_weight_transfer_engine` is to be told."""
    if where.backend == "ipc":
        return {"packed": False}
    if where.backend == "gloo":
        return {"where": where}
    host, port = where.host_and_port
    return {
        "master_address": host,
        "master_port": port,
        "rank_offset": where.first_rank,
        "world_size": where.size,
        "packed": True,
        "packed_buffer_size_bytes": where.max_bytes,
    }


def update_info(backend: str, announcement: Announcement) -> dict[str, Any]:
    """What `update_weights` is to be told."""
    if backend == "gloo":
        return {"announcement": announcement}
    told: dict[str, Any] = {
        "names": list(announcement.names),
        "dtype_names": list(announcement.dtype_names),
        "shapes": [list(shape) for shape in announcement.shapes],
        "version": announcement.version,
    }
    return told if announcement.handles is None else told | {"ipc_handles": announcement.handles}


class TransferExtension:
    """Joins vLLM's worker class (`worker_extension_cls`); `self` is the worker."""

    def take_transfer_failure(self) -> str | None:
        """Why the group could not be joined, or the last weights from the learner are unfit; None where all is well."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        failure: str | None = engine.failure
        engine.failure = None
        return failure

    def gpu_uuid(self) -> str:
        """Of the GPU that holds this slice; '' without one."""
        if not torch.cuda.is_available():
            return ""
        return str(torch.cuda.get_device_properties(self.device).uuid)  # type: ignore[attr-defined]

    def repack_heads(self, sent: Sequence[str]) -> int:
        """Packs output layers anew whose own weight was not in an update; returns how many.

        On CPU a packed copy serves the logits. A tied output layer is never sent: its copy would keep the old weights.
        """
        if "lm_head.weight" in sent:
            return 0
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        heads = [
            module
            for name, module in model.named_modules()
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear")
        ]
        for head in heads:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
        return len(heads)


class _Reloading(WeightTransferEngine):  # type: ignore[misc]
    """The life cycle that vLLM's own NCCL engine has: layers are loaded, packed and copied one by one."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Verified weights (`WeightBucket.verified`), as they are or in files."""

    weights: Iterable[tuple[str, torch.Tensor]] | None = None
    paths: Sequence[str] = ()


class _FromHost:
    """Before every engine: whatever its backend, it also takes weights that are on this host already.

    What fails between here and the learner is kept for `take_transfer_failure`. Raised, it would leave vLLM's other
    slices with answers that nobody fetched, and its next call would take those for its own (vLLM 0.32).
    """

    model: Any
    failure: str | None = None

    def parse_update_info(self, told: dict[str, Any]) -> Any:
        if told.keys() & {"weights", "paths"}:
            return HostUpdate(**told)
        return super().parse_update_info(told)  # type: ignore[misc]

    def init_transfer_engine(self, info: Any) -> None:
        try:
            super().init_transfer_engine(info)  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the weights have another way
            self.failure = _line(error)

    def receive_weights(self, update_info: Any) -> None:
        if isinstance(update_info, HostUpdate):
            weights = update_info.weights
            self.model.load_weights(read_files(update_info.paths) if weights is None else weights)
            return
        # Sums what the model is given, and verifies it at the end.
        model = self.model
        loader = self.model = CheckedLoader(model.load_weights)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
            loader.verify(update_info.version)
        except Exception as error:  # noqa: BLE001 - see above
            self.failure = _line(error)
        finally:
            self.model = model


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Nothing(_Reloading):
    init_info_cls = NoInit
    update_info_cls = HostUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nobody else takes part."""

    def receive_weights(self, update_info: HostUpdate) -> None:
        raise AssertionError("weights of this host are taken before")


class HostEngine(_FromHost, _Nothing):
    """Weights that are on this host already, and no others."""


@dataclass
class GlooInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the group meets."""

    where: Rendezvous


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What comes."""

    announcement: Announcement

    @property
    def version(self) -> int:
        return self.announcement.version


class _Gloo(_Reloading):
    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        self._max_bytes = init_info.where.max_bytes
        rank = init_info.where.first_rank + self.parallel_config.rank
        self._group = GlooGroup(init_info.where, rank)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        assert self._group is not None, "init_transfer_engine comes first"
        receive_by_gloo(self._group, update_info.announcement, self._max_bytes, self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class GlooEngine(_FromHost, _Gloo):
    """From the learner through the host's memory."""


@dataclass
class NcclUpdate(NCCLWeightTransferUpdateInfo):  # type: ignore[misc]
    """vLLM's, and the version that the seal must have."""

    version: int = 0


class NcclEngine(_FromHost, NCCLWeightTransferEngine):  # type: ignore[misc]
    """From the learner's GPU. Not run on a GPU yet."""

    update_info_cls = NcclUpdate


@dataclass
class IpcUpdate(IPCWeightTransferUpdateInfo):  # type: ignore[misc]
    """vLLM's, and the version that the seal must have."""

    version: int = 0


class IpcEngine(_FromHost, IPCWeightTransferEngine):  # type: ignore[misc]
    """From the learner on the same GPU. Not run on a GPU yet."""

    update_info_cls = IpcUpdate


ENGINES = {"host": HostEngine, "gloo": GlooEngine, "nccl": NcclEngine, "ipc": IpcEngine}
for _name, _engine in ENGINES.items():
    WeightTransferEngineFactory.register_engine(backend_name(_name), _engine)
