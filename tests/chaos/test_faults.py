"""What nobody notices when there are two of each, and every way in which a primary engine fails. The rest: `test_matrix.py`."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.chaos.hostile_engine import MODES, NAME, hostile_engine
from tests.chaos.kit import ATTACK, Load, Stack, callers, wait_for_detection
from tests.conftest import wait_until

SERVICES = ("auth", "limiter", "detector_proxy", "fallback_model", "edge")


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
        load = Load(session, pairs.key, rate=25)
        async with load.running():
            await load.answered(20)
            pid = pairs.pids(name)[0]
            pairs.signal(pid, number)
            await asyncio.to_thread(
                wait_until, lambda: pid not in pairs.pids(name) and len(pairs.pids(name)) == 2, what=f"a new {name}"
            )
            await load.answered(40)
    load.assert_invariants()
    # A machine that takes a second for a text has no room for so many of them, whoever goes: that is told, and nothing is lost.
    crowded = max(seen.latency for seen in load.seen) > 1.0
    assert set(load.statuses()) - ({429} if crowded else set()) == {200}, load.summary()


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
