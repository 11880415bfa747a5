"""New weights by vLLM's own weight-transfer interface: its engine receives them from a learner's end in this process.

`nccl` runs vLLM's NCCL engines, its packing and its seal as they are, but for the communicator and CUDA's streams, in
whose place stands a gloo group: what a GPU would add was not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.rl.vllm_engine import VllmEngine, VllmSettings
from morlaif_ray.rl.weight_broadcast import (
    Announcement,
    GlooGroup,
    GlooSender,
    Rendezvous,
    WeightSender,
    make_sender,
)
from tests.ports import free_port
from tests.vllm.tiny_models import largest_gap, make_model, requests, weights_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETTINGS = SamplingSettings(max_new_tokens=12, temperature=0.9)
MAX_BYTES = 20_000
"""Many buckets, some of which begin within a layer."""


class CpuCommunicator:
    """In the place of vLLM's `PyNcclCommunicator`."""

    def __init__(self, host: str, port: int, rank: int, size: int, device: Any) -> None:
        del device
        self._group = GlooGroup(Rendezvous("gloo", f"{host}:{port}", 1, size, 0, 60.0), rank)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        self._group.broadcast(tensor)

    def destroy(self) -> None:
        self._group.close()


@pytest.fixture(scope="module", autouse=True)
def no_cuda() -> Iterator[None]:
    """What vLLM's NCCL engines ask of CUDA."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_common, "stateless_init_process_group", CpuCommunicator)
        patch.setattr(packed_tensor, "_get_streams", lambda device, num: (stream,) * num)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield


@dataclasses.dataclass
class Pair:
    """An engine and the learner's end of its group."""

    engine: VllmEngine
    model: Any
    where: Rendezvous
    sender: WeightSender
    kind: str

    def meet(self, timeout_s: float = 60.0) -> None:
        self.where = dataclasses.replace(
            self.where, address=f"127.0.0.1:{free_port()}", timeout_s=timeout_s
        )
        self.sender = both(
            lambda: make_sender(self.where), lambda: self.engine.join_transfer(self.where)
        )


def both(here: Callable[[], Any], there: Callable[[], None]) -> Any:
    """Runs the two ends, the engine's in another thread; the result, or error, of the learner's, then the engine's."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            there()
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        made = here()
    finally:
        thread.join(120.0)
    if failure:
        raise failure[0]
    return made


@pytest.fixture(scope="module", params=["gpt2-gloo", "llama-nccl", "llama-gloo-sliced"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    kind, backend, *sliced = request.param.split("-")
    folder = tmp_path_factory.mktemp("transfer") / request.param
    model = make_model(kind, folder)
    slices = 2 if sliced else 1
    settings = VllmSettings(kv_cache_mb=32, tensor_parallel_size=slices, weight_transfer=backend)
    engine = VllmEngine(folder, settings=settings)
    where = Rendezvous(backend, "", 1, 1 + slices, MAX_BYTES, 60.0)
    made = Pair(engine, model, where, SimpleNamespace(), kind)  # type: ignore[arg-type]
    made.meet()
    yield made
    made.sender.close()
    engine.close()


def send(pair: Pair, model: Any, version: int) -> None:
    weights = [(name, p.detach()) for name, p in model.named_parameters()]
    announcement = Announcement.of(version, weights)
    assert len(list(announcement.parts(MAX_BYTES))) > 3
    message = pair.sender.offer(announcement, weights)
    both(
        lambda: pair.sender.send(message, weights),
        lambda: pair.engine.receive_weights(message),
    )


def assert_holds(pair: Pair, model: Any, version: int) -> None:
    """The same bits as by the other way, the packed output layer and cached prefixes included."""
    long = ("\n\nHuman: " + "red sun moon green " * 40 + "\n\nAssistant:",)
    asked = requests(12) + requests(6, long)
    batch = pair.engine.generate(asked, SETTINGS)
    assert batch.policy_version == version
    assert largest_gap(model, batch, 0.9) < 1e-4
    pair.engine.load_weights(weights_of(model), version)
    again = pair.engine.generate(asked, SETTINGS)
    assert batch.responses == again.responses
    np.testing.assert_array_equal(batch.logprobs_BT, again.logprobs_BT)


def test_a_transfer_leaves_what_the_other_way_leaves_and_the_group_serves_the_next(
    pair: Pair, tmp_path: Path
) -> None:
    assert_holds(pair, pair.model, 0)
    for version in (3, 4):
        other = make_model(pair.kind, tmp_path / str(version), seed=version)
        send(pair, other, version)
        assert pair.engine._llm.get_weight_version() == str(version)
        assert_holds(pair, other, version)


def test_a_part_of_the_weights_is_refused_before_anything_is_waited_for(pair: Pair) -> None:
    weights = list(pair.model.named_parameters())
    with pytest.raises(KeyError, match=f"weight '{weights[0][0]}' is missing; vLLM takes all"):
        pair.engine.receive_weights(Announcement.of(9, weights[1:]))


def test_weights_damaged_on_the_way_are_named_and_the_other_way_repairs_them(
    pair: Pair, tmp_path: Path
) -> None:
    from morlaif_ray.rl import weight_broadcast

    version = pair.engine.policy_version
    other = make_model(pair.kind, tmp_path / "other", seed=6)
    weights = [(name, p.detach()) for name, p in other.named_parameters()]
    message = Announcement.of(6, weights)
    name = message.names[1]
    true_sum = weight_broadcast.bit_sum
    sender = threading.current_thread()

    def wrong_there(weight: torch.Tensor) -> torch.Tensor:
        off = threading.current_thread() is sender and weight.shape == message.shapes[1]
        return true_sum(weight) + int(off)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_broadcast, "bit_sum", wrong_there)
        if pair.where.backend == "nccl":  # sends from a thread of its own
            patch.setattr(
                "morlaif_ray.rl.vllm_senders.within", lambda timeout_s, work, give_up: work()
            )
        with pytest.raises(
            RuntimeError, match=f"'{name}' of version 6 does not match its check-sum"
        ):
            both(
                lambda: pair.sender.send(message, weights),
                lambda: pair.engine.receive_weights(message),
            )
    assert pair.engine.policy_version == version
    pair.engine.load_weights(weights_of(other), 6)
    assert_holds(pair, other, 6)


def test_a_learner_that_is_lost_within_a_transfer_leaves_an_engine_that_can_be_loaded(
    pair: Pair, tmp_path: Path
) -> None:
    """Some layers have come then, one of them in part."""
    if pair.where.backend == "nccl":
        pytest.skip("NCCL waits for ever: such a worker is killed and started again")
    version = pair.engine.policy_version
    pair.sender.close()
    pair.meet(timeout_s=2.0)
    other = make_model(pair.kind, tmp_path / "other", seed=7)
    weights = [(name, p.detach()) for name, p in other.named_parameters()]
    message = Announcement.of(7, weights)
    sender = pair.sender
    assert isinstance(sender, GlooSender)
    whole, left = sender._group.broadcast, [3]

    def some(bucket: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            sender.close()
            raise RuntimeError("killed")
        whole(bucket)

    sender._group.broadcast = some  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        both(lambda: sender.send(message, weights), lambda: pair.engine.receive_weights(message))
    assert pair.engine.policy_version == version
    pair.engine.load_weights(weights_of(other), 7)
    assert_holds(pair, other, 7)
    pair.meet()
    send(pair, pair.model, 8)
    assert_holds(pair, pair.model, 8)


def test_what_is_called_for_nccl_and_ipc_exists_in_the_installed_vllm() -> None:
    """Parameters of what no CPU can run; the messages are really built and read."""
    from vllm.distributed.weight_transfer import (
        VLLMWeightSyncClient,
        WeightTransferTrainerFactory,
    )
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
    )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine
    from vllm.entrypoints.llm import LLM

    from morlaif_ray.rl import vllm_senders, vllm_transfer

    told = Announcement.of(5, [("w", torch.zeros(2, 3, dtype=torch.bfloat16))])
    where = Rendezvous("nccl", "10.0.0.1:4711", 3, 5, 1 << 20, 60.0)
    made = vllm_transfer.NcclEngine.init_info_cls(**vllm_transfer.init_info(where))
    assert (made.master_address, made.master_port) == ("10.0.0.1", 4711)
    assert (made.rank_offset, made.world_size) == (3, 5)
    assert (made.packed, made.packed_buffer_size_bytes) == (True, 1 << 20)
    update = vllm_transfer.NcclUpdate(**vllm_transfer.update_info("nccl", told))
    assert (update.dtype_names, update.shapes) == (["bfloat16", "uint8"], [[2, 3], [16]])
    assert update.version == 5

    ipc = dataclasses.replace(where, backend="ipc")
    assert not vllm_transfer.IpcEngine.init_info_cls(**vllm_transfer.init_info(ipc)).packed
    handles = told.with_handles([{"GPU-0": ()}, {"GPU-0": ()}])
    read = vllm_transfer.IpcUpdate(**vllm_transfer.update_info("ipc", handles))
    assert (read.ipc_handles, read.version) == (handles.handles, 5)
    assert IPCTrainerInitInfo(rank=0).is_sender
    with pytest.raises(ValueError, match="same size as `names`"):
        vllm_transfer.IpcUpdate(
            **vllm_transfer.update_info("ipc", told.with_handles([{"GPU-0": ()}]))
        )

    assert isinstance(vllm_senders.NotedClient(), VLLMWeightSyncClient)
    accepted = inspect.signature(WeightTransferTrainerFactory.trainer_init)
    accepted.bind(made, client=None, source=None)
    for engine in (NCCLTrainerWeightTransferEngine, IPCTrainerWeightTransferEngine):
        inspect.signature(engine.send_weights).bind(None)
        inspect.signature(engine.shutdown).bind(None)
    inspect.signature(LLM.init_weight_transfer_engine).bind(None, {"init_info": {}})
    inspect.signature(LLM.update_weights).bind(None, {"update_info": {}})
    inspect.signature(LLM.finish_weight_update).bind(None, weight_version="1")
