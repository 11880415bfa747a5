"""Weights by broadcast: what arrives is what was sent, bit for bit, or an error; a lost member ends the wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from morlaif_ray.backbone import load_causal_lm
from morlaif_ray.errors import NumericalError
from morlaif_ray.rl.generation import TransformersEngine
from morlaif_ray.rl.policy_model import PolicyModel
from morlaif_ray.rl.weight_broadcast import (
    SEAL,
    Announcement,
    CheckedLoader,
    GlooGroup,
    GlooSender,
    Rendezvous,
    _empty_bucket,
    bit_sum,
    receive_by_gloo,
    sealed,
    within,
)
from tests.ports import free_port

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
TIMEOUT_S = 60.0
Weights = list[tuple[str, Tensor]]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Members of a group, each in a thread of this process."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def meeting(size: int, max_bytes: int = 64, timeout_s: float = TIMEOUT_S) -> Rendezvous:
    return Rendezvous("gloo", f"127.0.0.1:{free_port()}", 1, size, max_bytes, timeout_s)


def odd_weights() -> Weights:
    """Types and sizes that end nowhere near an even address, a NaN, and nothing at all."""
    torch.manual_seed(0)
    return [
        ("half", torch.randn(3).to(torch.bfloat16)),
        ("wide", torch.randn(5, 7)),
        ("bytes", torch.arange(-3, 4, dtype=torch.int8)),
        ("one", torch.tensor(float("nan"))),
        ("turned", torch.randn(4, 6).T),
        ("empty", torch.empty(0, 3)),
        ("exact", torch.randn(2, 2, dtype=torch.float64)),
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("max_bytes", [1, 64, 1 << 20])
def test_every_receiver_gets_the_bits_types_and_shapes_that_were_sent(
    pool: ThreadPoolExecutor, max_bytes: int
) -> None:
    weights = odd_weights()
    message = Announcement.of(3, weights)
    where = meeting(3, max_bytes)

    def receive(rank: int) -> Weights:
        got: Weights = []
        loader = CheckedLoader(got.extend)
        group = GlooGroup(where, rank)
        for _ in range(2):  # the group stays for the next refresh
            got.clear()
            receive_by_gloo(group, message, max_bytes, loader)
        with pytest.raises(NumericalError, match="14 weights of version 3 came, 7 were sent"):
            loader.verify(3)
        return got

    receivers = [pool.submit(receive, rank) for rank in (1, 2)]
    sender = GlooSender(where)
    for _ in range(2):
        sender.send(sender.offer(message, weights), weights)
    for receiver in receivers:
        got = receiver.result(TIMEOUT_S)
        assert [name for name, _ in got] == [name for name, _ in weights]
        for (name, found), (_, expected) in zip(got, weights, strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert bits(found) == bits(expected), name


def test_buckets_are_cut_alike_on_both_sides_and_a_large_weight_has_its_own() -> None:
    weights = [(f"w{i}", torch.zeros(size)) for i, size in enumerate([4, 4, 100, 1, 1])]
    message = Announcement.of(1, weights)
    assert message.names == ("w0", "w1", "w2", "w3", "w4", SEAL)
    assert message.shapes[-1] == (8 * 6,)
    # 16, 16, 400, 16, 16 and 48 bytes, each rounded up to 16
    assert list(message.parts(64)) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert list(message.parts(1 << 20)) == [range(6)]


def test_a_sum_sees_every_bit_and_the_order_of_blocks() -> None:
    torch.manual_seed(1)
    weight = torch.randn(3, 4096)
    expected = int(bit_sum(weight))
    assert int(bit_sum(weight.reshape(-1).clone())) == expected
    assert int(bit_sum(weight[[1, 0, 2]])) != expected
    for place in (0, 4096, 12287):
        for bit in range(32):
            damaged = weight.clone()
            damaged.view(torch.int32).reshape(-1)[place] ^= -(2**31) if bit == 31 else 1 << bit
            assert int(bit_sum(damaged)) != expected
    assert int(bit_sum(torch.tensor([1, 2, 3], dtype=torch.int16))) == 6  # block 1 is the rest
    two = torch.ones(4097, dtype=torch.int32)
    assert int(bit_sum(two)) == 4096 * 1 + 1 * 2


def loaded(change: Callable[[Weights], None]) -> CheckedLoader:
    """A loader that was given the odd weights, changed on their way."""
    weights = odd_weights()
    coming = [(n, w.clone()) for n, w in sealed(Announcement.of(3, weights), weights)]
    change(coming)
    loader = CheckedLoader(lambda some: None)
    loader.load_weights(coming[:2])
    loader.load_weights(coming[2:])
    return loader


def test_what_is_sound_passes_and_what_is_not_is_named() -> None:
    loaded(lambda coming: None).verify(3)
    with pytest.raises(NumericalError, match="got weights of version 3, expected version 4"):
        loaded(lambda coming: None).verify(4)
    with pytest.raises(NumericalError, match=r"'wide' of version 3 does not match its check-sum"):
        loaded(lambda coming: coming[1][1].view(torch.int32)[4, 6].bitwise_xor_(1)).verify(3)
    with pytest.raises(NumericalError, match="6 weights of version 3 came, 7 were sent"):
        loaded(lambda coming: coming.__delitem__(2)).verify(3)
    with pytest.raises(NumericalError, match="came without its check-sums after 7 weights"):
        loaded(lambda coming: coming.__delitem__(-1)).verify(3)


def test_weights_that_were_not_announced_are_not_sent() -> None:
    weights = odd_weights()
    message = Announcement.of(3, weights)
    with pytest.raises(ValueError, match=r"announced \('wide', 'float32', \(5, 7\)\), got"):
        list(sealed(message, [weights[0], ("wide", torch.zeros(5, 8)), *weights[2:]]))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        list(sealed(message, weights[:-1]))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        list(sealed(message, [*weights, ("more", torch.zeros(1))]))


def test_an_engine_adopts_the_learners_weights_and_version(
    pool: ThreadPoolExecutor, gpt2: str
) -> None:
    policy = PolicyModel(load_causal_lm(gpt2), separate_critic=False, temperature=1.0)
    torch.manual_seed(2)
    for parameter in policy.model.parameters():
        torch.nn.init.normal_(parameter)
    engine = TransformersEngine.from_path(gpt2)
    where = meeting(2, 2048)

    def receive(message: Announcement) -> None:
        engine.join_transfer(where)
        engine.receive_weights(message)

    message = policy.announce(7)
    assert len(list(message.parts(2048))) > 3
    receiver = pool.submit(receive, message)
    sender = GlooSender(where)
    sender.send(message, policy.merged_weights())
    receiver.result(TIMEOUT_S)
    assert engine.policy_version == 7
    expected = dict(policy.model.named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with pytest.raises(KeyError, match=r"'no\.such' is not a parameter of the rollout model"):
        engine.receive_weights(Announcement.of(8, [("no.such", torch.zeros(1))]))


def test_a_member_that_leaves_ends_the_others_wait_with_an_error(
    pool: ThreadPoolExecutor, gpt2: str
) -> None:
    policy = PolicyModel(load_causal_lm(gpt2), separate_critic=False, temperature=1.0)
    where = meeting(3, 256, timeout_s=2.0)
    message = policy.announce(1)
    engine = TransformersEngine.from_path(gpt2)

    def leave() -> None:
        group = GlooGroup(where, 2)
        first = next(message.parts(256))
        group.broadcast(_empty_bucket(message, first))  # and then no other
        group.close()

    def receive() -> None:
        engine.join_transfer(Rendezvous("gloo", where.address, 1, 3, 256, 2.0))
        engine.receive_weights(message)

    left, receiver = pool.submit(leave), pool.submit(receive)
    sender = GlooSender(where)
    with pytest.raises(RuntimeError):
        sender.send(message, policy.merged_weights())
    sender.close()
    with pytest.raises(RuntimeError):
        receiver.result(TIMEOUT_S)
    assert left.exception(TIMEOUT_S) is None or isinstance(left.exception(), RuntimeError)
    assert engine.policy_version == 0


def test_work_without_a_time_out_of_its_own_is_given_up_and_its_errors_are_raised() -> None:
    stuck, given_up = threading.Event(), threading.Event()

    def give_up() -> None:
        given_up.set()
        stuck.set()

    with pytest.raises(TimeoutError, match="not done in 0 s; another process of the group hangs"):
        within(0.01, stuck.wait, give_up)
    assert given_up.is_set()
    done: list[Any] = []
    within(TIMEOUT_S, lambda: done.append(1), pytest.fail)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        within(TIMEOUT_S, lambda: done.append(1 // 0), pytest.fail)
