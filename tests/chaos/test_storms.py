"""Two replicas of each service under a steady load while something happens all the time. The long form: `just chaos`.

`PORTCULLIS_TEST_STORM_SECONDS` (600 by `just chaos`; unset: a short one alone) for each storm, `PORTCULLIS_TEST_STORM_RATE` (50 a
second), `PORTCULLIS_TEST_STORM_EVERY_SECONDS` (5) from one harm to the next. That is strictly so, unless
`PORTCULLIS_TEST_STORM_WAIT_FOR_WHOLE=1` has each harm wait until there are two of each again, for a machine that takes longer
to start a process than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from libs.common import keys
from tests.chaos.conftest import ROOMY, stack_in
from tests.chaos.hostile_engine import hostile_engine
from tests.chaos.kit import BENIGN, LATE_SECONDS, Load, Stack, callers, wait_for_detection
from tests.chaos.questions import DISTINCT, engines_verdict
from tests.chaos.rig import Rig
from tests.chaos.scenario import recovery_limit
from tests.chaos.storm import SERVICES, Harm, Harmed, Storm, blow, kill, pause
from tests.conftest import free_port

SECONDS = float(os.environ.get("PORTCULLIS_TEST_STORM_SECONDS", "0"))
RATE = float(os.environ.get("PORTCULLIS_TEST_STORM_RATE", "50"))
EVERY_SECONDS = float(os.environ.get("PORTCULLIS_TEST_STORM_EVERY_SECONDS", "5"))
WAIT_FOR_WHOLE = os.environ.get("PORTCULLIS_TEST_STORM_WAIT_FOR_WHOLE", "") == "1"
KILLED_FAILURES, PAUSED_FAILURES = 0.01, 0.02
"""The part of all calls that may fail."""
SHORT_SECONDS, SHORT_RATE, SHORT_FAILURES = 8.0, 20.0, 0.05

long = pytest.mark.skipif(not SECONDS, reason="the long form: just chaos, or PORTCULLIS_TEST_STORM_SECONDS")


@pytest.fixture(scope="module")
async def fleet() -> AsyncIterator[Rig]:
    """Two of each, with a primary engine that remembers when it was asked what."""
    async with hostile_engine(free_port(), engines_verdict) as engine:
        with tempfile.TemporaryDirectory(prefix="pc-") as home:
            scale = dict.fromkeys(SERVICES, 2)
            with stack_in(Path(home), environment=ROOMY, scale=scale) as stack:
                rig = Rig(stack, engine)
                rig.wire()
                yield rig
                rig.close()


async def _whole(stack: Stack) -> None:
    """Two of each again, and a detection answered."""

    def counted() -> bool:
        return all(len(stack.pids(name)) == 2 for name in SERVICES)

    async with asyncio.timeout(60):
        while not await asyncio.to_thread(counted):
            await asyncio.sleep(0.1)
    await asyncio.to_thread(wait_for_detection, stack, 60)


@contextlib.asynccontextmanager
async def _under_load(rig: Rig, *, engine: bool, **load: Any) -> AsyncIterator[Load]:
    """A whole fleet, and a load on it that has had its first answers; it ends with the block. `load`: as of `Load`."""
    await asyncio.to_thread(rig.use_engine, engine)
    await _whole(rig.stack)
    rig.engine.asked.clear()
    async with callers(rig.stack) as session:
        running = Load(session, rig.stack.key, RATE, **load)
        async with running.running():
            await running.answered(50)
            yield running


async def _storm(rig: Rig, harm: Harm, *, engine: bool, failures: float) -> None:
    await asyncio.to_thread(rig.use_engine, engine)
    await _whole(rig.stack)
    rig.engine.asked.clear()
    async with callers(rig.stack) as session:
        load = Load(session, rig.stack.key, RATE, distinct=None if engine else DISTINCT)
        storm = await blow(rig.stack, load, harm, seconds=SECONDS, every_seconds=EVERY_SECONDS, wait_for_whole=WAIT_FOR_WHOLE)
    print(f"\n{storm.summary()}\nthe engine was asked {len(rig.engine.asked)} times")
    storm.assert_stood(failures)
    _assert_nothing_after_its_deadline(rig, load)


def _assert_nothing_after_its_deadline(rig: Rig, load: Load) -> None:
    late = [at - load.deadlines[text] for at, text in rig.engine.asked if at > load.deadlines.get(text, at) + LATE_SECONDS]
    assert not late, f"{len(late)} executed after their deadlines, by up to {max(late):.2f} s"


async def test_a_service_is_killed_now_and_then(pairs: Stack) -> None:
    """The short form, for any machine."""
    await _whole(pairs)
    async with callers(pairs) as session:
        load = Load(session, pairs.key, SHORT_RATE)
        storm = await blow(pairs, load, kill, seconds=SHORT_SECONDS, every_seconds=EVERY_SECONDS, wait_for_whole=True)
    print(f"\n{storm.summary()}")
    await _whole(pairs)
    assert len(storm.harms) >= 2
    storm.assert_stood(SHORT_FAILURES)


@long
async def test_a_random_service_is_killed_all_the_time(fleet: Rig) -> None:
    await _storm(fleet, kill, engine=False, failures=KILLED_FAILURES)


@long
async def test_a_random_service_is_paused_all_the_time(fleet: Rig) -> None:
    await _storm(fleet, pause, engine=True, failures=PAUSED_FAILURES)


@long
async def test_everything_is_restarted_one_after_the_other_and_nobody_notices(fleet: Rig) -> None:
    async with _under_load(fleet, engine=False) as load:
        for name in (*SERVICES, "jobs", "redis", "postgres"):
            for pid in await asyncio.to_thread(fleet.stack.pids, name):
                fleet.stack.signal(pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
                await _replaced(fleet, name, pid)
                await load.answered(50)
    print(f"\n{load.summary()}")
    load.assert_invariants()
    assert set(load.statuses()) == {200}, load.summary()


async def _replaced(rig: Rig, name: str, pid: int) -> None:
    """Another is there, and takes messages: as whoever restarts replicas one by one would wait for."""
    count = rig.stack.scale.get(name, 1)

    def replaced() -> bool:
        pids = rig.stack.pids(name)
        return pid not in pids and len(pids) == count

    async with asyncio.timeout(60):
        while not await asyncio.to_thread(replaced):
            await asyncio.sleep(0.05)
        if name not in SERVICES and name != "jobs":
            return
        async with callers(rig.stack) as session:
            while await _replicas(session, name) != count:
                await asyncio.sleep(0.2)


async def _replicas(session: aiohttp.ClientSession, name: str) -> int:
    async with session.get("/health") as response:
        return int((await response.json())["services"][name]["replicas"])


async def _status(session: aiohttp.ClientSession, key: str) -> int:
    async with session.post("/v1/detect", json={"text": BENIGN}, headers={"X-API-Key": key}) as response:
        return response.status


@long
async def test_the_database_is_away_for_20_seconds_and_then_for_longer_than_keys_are_believed(fleet: Rig) -> None:
    async with _under_load(fleet, engine=False) as load:
        with fleet.cut("postgres"):
            began = time.monotonic()
            while time.monotonic() - began < 20:
                assert await _status(load.session, keys.generate()) == 503
                await asyncio.sleep(0.5)
            within = load.now
            async with asyncio.timeout(40):
                while not (recent := load.since(load.now - 1)) or any(seen.status != 503 for seen in recent):
                    await asyncio.sleep(0.1)
            refused_after = time.monotonic() - began
            over = load.now
        await asyncio.to_thread(wait_for_detection, fleet.stack, 30)
        await load.answered(50)
    print(f"\n{load.summary()}; a known key was refused after {refused_after:.1f} s")
    load.assert_invariants()
    assert all(seen.status == 200 for seen in load.seen if seen.at < within), load.summary()
    assert set(load.statuses()) == {200, 503}, load.summary()
    assert refused_after <= 30 + 3, "a verified key works for at most 30 s"
    recovery = max((seen.at - over for seen in load.seen if seen.status != 200), default=0.0)
    assert recovery <= recovery_limit(), recovery


@long
async def test_nats_is_restarted_and_nothing_is_executed_late(fleet: Rig) -> None:
    moments = []
    async with _under_load(fleet, engine=True, timeout_seconds=2.0, distinct=None) as load:
        for number in (signal.SIGTERM, signal.SIGKILL):
            moments.append(Harmed("nats", load.now))
            await asyncio.to_thread(fleet.stack.end, "nats", number)
            await asyncio.to_thread(wait_for_detection, fleet.stack, 30)
            await load.answered(100)
    recovery = max(recovery.seconds for recovery in Storm(load, moments).recoveries())
    print(f"\n{load.summary()}; recovered after {recovery:.1f} s")
    load.assert_invariants()
    assert set(load.statuses()) <= {200, 503}, load.summary()
    assert recovery <= recovery_limit()
    _assert_nothing_after_its_deadline(fleet, load)
