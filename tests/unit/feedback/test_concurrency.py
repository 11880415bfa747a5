"""Slow start, additive increase, multiplicative decrease; and the gate that keeps to it."""

from __future__ import annotations

import asyncio

import pytest

from morlaif_ray.feedback.concurrency import (
    Concurrency,
    Gate,
    after_overload,
    after_success,
    start_concurrency,
)

pytestmark = pytest.mark.unit


def test_it_starts_with_four_and_doubles_per_round_trip_up_to_the_ceiling() -> None:
    state = start_concurrency(64)
    for _ in range(4):
        state = after_success(state)
    assert state.limit == 8.0
    for _ in range(100):
        state = after_success(state)
    assert state.limit == 64.0


def test_an_overload_cuts_by_three_tenths_once_per_second() -> None:
    state = after_overload(Concurrency(40.0, 64), now_s=10.0)
    assert state.limit == pytest.approx(28.0)
    assert after_overload(state, 10.5) == state
    assert after_overload(state, 11.0).limit == pytest.approx(19.6)


def test_after_the_first_overload_it_grows_by_one_per_round_trip() -> None:
    state = Concurrency(10.0, 64, starting=False)
    for _ in range(10):
        state = after_success(state)
    assert state.limit == pytest.approx(10.96, abs=0.01)


def test_it_never_falls_below_one() -> None:
    state = Concurrency(1.2, 64)
    for second in range(5):
        state = after_overload(state, float(second))
    assert state.limit == 1.0


def test_the_gate_lets_in_as_many_as_the_limit_and_more_when_it_grows() -> None:
    async def scene() -> list[int]:
        gate, seen, done = Gate(Concurrency(2.0, 8)), [], asyncio.Event()

        async def work() -> None:
            async with gate:
                seen.append(gate.held)
                await done.wait()

        async def until_all_wait() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(work()) for _ in range(6)]
        await until_all_wait()
        assert len(seen) == 2
        gate.succeeded()  # 3
        await until_all_wait()
        assert len(seen) == 3
        done.set()
        await asyncio.gather(*tasks)
        assert gate.held == 0
        return seen

    assert max(asyncio.run(scene())) <= 3


def test_a_waiter_that_is_cancelled_takes_no_place_with_it() -> None:
    async def scene() -> int:
        gate = Gate(Concurrency(1.0, 1))
        async with gate:
            waiting = asyncio.create_task(gate.__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        async with gate:
            return gate.held

    assert asyncio.run(scene()) == 1
