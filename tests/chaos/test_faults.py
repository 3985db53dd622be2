"""Faults in a running stack: what callers see, and how soon all is well again."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.chaos.hostile_engine import MODES, NAME, hostile_engine
from tests.chaos.kit import ATTACK, RECOVERY_SECONDS, SERVERS, Load, Stack, callers, wait_for_detection
from tests.conftest import wait_until

SERVICES = ("auth", "limiter", "detector_proxy", "fallback_model", "edge")


async def _seen(load: Load, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(load.seen) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert len(load.seen) >= count


@pytest.mark.parametrize("name", [*SERVICES, *SERVERS])
async def test_killed_and_recovered(stack: Stack, name: str) -> None:
    wait_for_detection(stack, 30)
    async with callers(stack) as session:
        load = Load(session, stack.key, rate=20)
        async with load.running():
            await _seen(load, 10)
            pid = stack.pids(name)[0]
            stack.signal(pid, signal.SIGKILL)
            killed_at = time.monotonic() - load.started
            await asyncio.to_thread(wait_until, lambda: pid not in stack.pids(name) and bool(stack.pids(name)), what=name)
            recovery = await asyncio.to_thread(wait_for_detection, stack, RECOVERY_SECONDS)
            await _seen(load, len(load.seen) + 20)
    load.assert_invariants(lost_connections=name == "edge")
    print(f"{name}: answered again after {recovery:.1f} s; {load.summary()}")
    failures = [seen for seen in load.seen if seen.status != 200]
    # What could not be answered was refused at once, not at its deadline (10 s). The promise is 250 ms; the rest is for a
    # machine that is busy with everything else.
    assert all(seen.latency < 1.0 for seen in failures if seen.status != 0), load.summary()
    last_failure = max((seen.at for seen in failures), default=killed_at)
    assert last_failure - killed_at <= RECOVERY_SECONDS, load.summary()
    if name in ("redis", "postgres"):
        assert not failures, load.summary()  # the limiter goes on by itself; a verified key needs no database


async def test_a_hung_redis_degrades_and_comes_back(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    async with callers(stack) as session:
        load = Load(session, stack.key, rate=20)

        async def until(degraded: bool) -> None:
            deadline = time.monotonic() + 20
            while (not load.seen or load.seen[-1].degraded is not degraded) and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            assert load.seen[-1].degraded is degraded, load.summary()

        async with load.running():
            await until(False)
            pid = stack.pids("redis")[0]
            stack.signal(pid, signal.SIGSTOP)
            try:
                await until(True)
            finally:
                stack.signal(pid, signal.SIGCONT)
            await until(False)
    load.assert_invariants()
    assert set(load.statuses()) == {200}, load.summary()


# An edge that is killed takes its callers' connections with it; everything else that is lost is sent again to the other replica.
@pytest.mark.parametrize(
    ("name", "number"),
    [
        (name, number)
        for number in (signal.SIGTERM, signal.SIGKILL)
        for name in SERVICES
        if (name, number) != ("edge", signal.SIGKILL)
    ],
)
async def test_a_replica_goes_and_nobody_notices(pairs: Stack, name: str, number: signal.Signals) -> None:
    wait_for_detection(pairs, 30)
    async with callers(pairs) as session:
        load = Load(session, pairs.key, rate=40)
        async with load.running():
            await _seen(load, 20)
            pid = pairs.pids(name)[0]
            pairs.signal(pid, number)
            await asyncio.to_thread(
                wait_until, lambda: pid not in pairs.pids(name) and len(pairs.pids(name)) == 2, what=f"a new {name}"
            )
            await _seen(load, len(load.seen) + 40)
    load.assert_invariants()
    assert set(load.statuses()) == {200}, load.summary()


@pytest.mark.parametrize("mode", MODES)
async def test_a_primary_engine_that_fails_is_replaced_inside_the_deadline(
    engine_stack: Stack, engine_port: int, mode: str
) -> None:
    token = {"X-Admin-Token": engine_stack.secret("PORTCULLIS_ADMIN_TOKEN")}
    async with hostile_engine(engine_port) as engine, callers(engine_stack) as session:

        async def detect() -> dict[str, object]:
            async with session.post(
                "/v1/detect", json={"text": ATTACK}, headers={"X-API-Key": engine_stack.key, "X-Request-Timeout": "4"}
            ) as response:
                assert response.status == 200, await response.text()
                document: dict[str, object] = await response.json()
                return document

        async def reset() -> None:
            async with session.post("/v1/circuit-breakers/primary/reset", headers=token) as response:
                assert response.status == 200, await response.text()

        await reset()
        well = await detect()
        assert (well["endpoint"], well["degraded"]) == (NAME, False)
        engine.mode = mode
        ill = await asyncio.gather(*(detect() for _ in range(12)))
        assert all(verdict["degraded"] and verdict["endpoint"] != NAME and verdict["is_malicious"] for verdict in ill)
        async with session.get("/v1/circuit-breakers", headers={"X-API-Key": engine_stack.key}) as response:
            document = await response.json()
        assert "open" in str(document)
        calls = engine.detections
        assert (await detect())["degraded"] is True
        assert engine.detections == calls  # the breaker is open: the engine is left alone
        engine.mode = "ok"
        await reset()
        assert (await detect())["degraded"] is False
