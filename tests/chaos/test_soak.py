"""Half an hour of mixed use, after which no process has grown. The long form: `just soak`.

`PORTCULLIS_TEST_SOAK_SECONDS` (1800 by `just soak`; unset: only what measures is tried), `PORTCULLIS_TEST_SOAK_CSV` names a file
for every sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from libs.common.subjects import SERVICES
from tests.chaos.kit import SERVERS, Stack, callers, wait_for_detection
from tests.chaos.soak import Mixture, Sampler, slope

SECONDS = float(os.environ.get("PORTCULLIS_TEST_SOAK_SECONDS", "0"))
CSV = os.environ.get("PORTCULLIS_TEST_SOAK_CSV", "")
MOST_MB_PER_MINUTE = 1.0
SAMPLES = 360
"""In the whole time, where that is not more than one every two seconds."""
FAILED_SHARE = 0.001
"""Of all calls, which a machine that others use as well may refuse or answer late."""


def _series(grown_by_mb: list[float]) -> list[tuple[float, float]]:
    """A sample every 5 s of a process that begins with 100 MB, with some noise."""
    rng = random.Random(5)
    return [(5.0 * number, 100.0 + grown + rng.uniform(-1, 1)) for number, grown in enumerate(grown_by_mb)]


def test_a_leak_is_seen_and_what_fills_to_its_bound_is_none() -> None:
    count = 360  # half an hour
    assert slope(_series([1.5 * number / 12 for number in range(count)])) == pytest.approx(1.5, abs=0.05)
    # In steps, as an allocator takes it: 5 MB every five minutes.
    assert slope(_series([5.0 * (number // 60) for number in range(count)])) == pytest.approx(1.0, abs=0.2)
    assert abs(slope(_series([0.0] * count))) < 0.05
    # A cache that is full after ten minutes.
    assert abs(slope(_series([min(80.0, number / 1.5) for number in range(count)]))) < 0.05
    # Once 10 MB more, for good, and once 200 MB for a moment.
    assert slope(_series([10.0 if number > 250 else 0.0 for number in range(count)])) < 1.0
    assert slope(_series([200.0 if number in (300, 301) else 0.0 for number in range(count)])) < 0.1
    assert slope([]) == slope([(0.0, 1.0)]) == 0.0


def test_every_process_is_read(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    sampler = Sampler(stack)
    sampler.sample()
    sampler.sample()
    assert sampler.names() == {*SERVICES, *SERVERS, "supervisor"}
    alive = {process.pid for process in stack.processes()}
    lasting = {memory.pid: memory for memory in sampler.lasting()}
    for name in (*SERVICES, *SERVERS):
        for pid in stack.pids(name):
            assert pid in alive & lasting.keys(), name
            assert lasting[pid].name == name
            assert all(size > 1 for _, size in lasting[pid].points), name
            assert all(count > 0 for count in lasting[pid].files), name
    for name in sampler.names():
        assert name in sampler.table()


@asynccontextmanager
async def _sampled(sampler: Sampler, every_seconds: float) -> AsyncIterator[None]:
    async def sample() -> None:
        while True:
            await asyncio.to_thread(sampler.sample)
            await asyncio.sleep(every_seconds)

    sampling = asyncio.create_task(sample())
    try:
        yield
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
    await asyncio.to_thread(sampler.sample)


@pytest.mark.skipif(not SECONDS, reason="the long form: just soak, or PORTCULLIS_TEST_SOAK_SECONDS")
async def test_no_process_grows_in_half_an_hour_of_mixed_use(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    before = {name: stack.pids(name) for name in (*SERVICES, *SERVERS)}
    sampler = Sampler(stack)
    async with callers(stack) as session:
        mixture = Mixture(stack, session)
        async with _sampled(sampler, max(2.0, SECONDS / SAMPLES)):
            await mixture.run(SECONDS)
    print(f"\n{sampler.table()}\n{dict(sorted(mixture.done.items()))}; unexpected: {mixture.unexpected[:5]}")
    if CSV:
        sampler.write(Path(CSV))
    assert {name: stack.pids(name) for name in (*SERVICES, *SERVERS)} == before, "a process has ended"
    assert len(mixture.unexpected) <= FAILED_SHARE * mixture.done.total(), mixture.unexpected
    growing = {f"{memory.name} {memory.pid}": slope(memory.points) for memory in sampler.lasting()}
    assert {name: grown for name, grown in growing.items() if grown >= MOST_MB_PER_MINUTE} == {}
