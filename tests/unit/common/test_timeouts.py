from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from libs.common.timeouts import GRAIN_SECONDS, within


async def test_what_ends_in_time_is_left_alone() -> None:
    with within(60):
        await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("seconds", [0.05, 0.0, -1.0])
async def test_what_takes_longer_is_ended(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError), within(seconds):
        await asyncio.Event().wait()
    assert loop.time() - began >= max(0.0, seconds)  # never early
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # the task can go on waiting for other things


async def test_many_limits_end_each_at_its_own_time() -> None:
    loop = asyncio.get_running_loop()
    ended: dict[float, float] = {}

    async def one(seconds: float) -> None:
        began = loop.time()
        try:
            with within(seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            ended[seconds] = loop.time() - began

    limits = [number * GRAIN_SECONDS / 3 for number in range(30)]
    await asyncio.gather(*map(one, limits))
    assert all(ended[seconds] >= seconds for seconds in limits)
    order = list(ended)
    assert order[0] < order[-1]


async def test_the_inner_of_two_limits_raises_inside_of_the_outer() -> None:
    with within(60):
        with pytest.raises(TimeoutError), within(0):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError), within(0), within(60):
        await asyncio.Event().wait()


async def test_a_cancellation_from_outside_stays_one() -> None:
    begun = asyncio.Event()

    async def wait(seconds: float) -> None:
        with within(seconds):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait(60))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_from_outside_at_the_same_moment_stays_one() -> None:
    limit = within(60)

    async def wait() -> None:
        with limit:
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    limit.expire()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_in_the_moment_of_the_end_is_not_covered_up() -> None:
    async def fail() -> None:
        with within(0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("its own") from None

    with pytest.raises(ValueError, match="its own"):
        await fail()


async def test_what_has_ended_in_time_is_not_kept() -> None:
    class Work:
        pass

    async def do(work: Work) -> None:
        with within(60):
            await asyncio.sleep(0)

    work = Work()
    gone = weakref.ref(work)
    await asyncio.create_task(do(work))
    del work
    gc.collect()
    assert gone() is None


def test_each_event_loop_has_its_own() -> None:
    async def late() -> None:
        with pytest.raises(TimeoutError), within(0):
            await asyncio.Event().wait()

    for _ in range(2):
        asyncio.run(late())
