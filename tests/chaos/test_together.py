"""Stacks whose stages share the edge's processes: everything that others ask of the stages, and what happens when one goes.

What callers see of such a stack is played in `test_stack.py` (`either`), its traces in `test_tracing.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import aiohttp
import pytest

from tests.chaos.kit import ATTACK, BENIGN, Caller, Load, Stack, callers, register
from tests.conftest import wait_until

EVERYBODY = dict.fromkeys(("edge", "auth", "limiter", "detector_proxy"), 2) | {"fallback_model": 1, "jobs": 1, "console": 1}
ONE_OF_EACH = dict.fromkeys(EVERYBODY, 1)


@pytest.fixture(params=["together", "single"])
def shared(request: pytest.FixtureRequest) -> Stack:
    chosen: Stack = request.getfixturevalue(request.param)
    return chosen


async def everybody(session: aiohttp.ClientSession, expected: dict[str, int] = EVERYBODY) -> dict[str, Any]:
    """What /health says once each service is there as often as its process."""
    async with asyncio.timeout(30):
        while True:
            async with session.get("/health") as response:
                health: dict[str, Any] = await response.json()
            if {name: service["replicas"] for name, service in health["services"].items()} == expected:
                return health
            await asyncio.sleep(0.2)


async def test_every_service_is_there_as_often_as_its_process(shared: Stack) -> None:
    async with callers(shared) as session:
        health = await everybody(session, EVERYBODY if shared.scale else ONE_OF_EACH)
    assert health["status"] == "healthy"
    assert health["stores"] == {"redis": "up", "postgres": "up", "nats": "up"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_one_of_two_goes_and_comes_back(together: Stack, number: signal.Signals) -> None:
    async with callers(together) as session:
        await everybody(session)  # also one that was killed before
        load = Load(session, together.key, rate=25)
        async with load.running():
            await load.answered(20)
            pid = together.pids("edge")[0]
            together.signal(pid, number)
            await asyncio.to_thread(
                wait_until, lambda: pid not in together.pids("edge") and len(together.pids("edge")) == 2, what="a new edge"
            )
            await load.answered(40)
    # Who dies takes the connections of its callers along, and nothing else.
    load.assert_invariants(lost_connections=number == signal.SIGKILL)
    crowded = max(seen.latency for seen in load.seen) > 1.0
    allowed = {200} | ({0} if number == signal.SIGKILL else set()) | ({429} if crowded else set())
    assert set(load.statuses()) <= allowed, load.summary()
    assert load.statuses()[200] >= 50, load.summary()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_only_one_goes_and_comes_back(single: Stack, number: signal.Signals) -> None:
    async with callers(single) as session:
        await everybody(session, ONE_OF_EACH)
        load = Load(session, single.key, rate=25, timeout_seconds=30)
        async with load.running():
            await load.answered(20)
            await asyncio.to_thread(single.end, "edge", number)
            await load.answered(40)
    # Who calls in the meantime waits in the socket, which outlives it, until all that a request passes is there again.
    load.assert_invariants(lost_connections=number == signal.SIGKILL)
    assert not load.statuses()[503], load.summary()
    assert load.statuses()[200] >= 50, load.summary()


async def test_its_model_is_exchanged_while_it_answers(single: Stack) -> None:
    (pid,) = single.pids("fallback_model")
    async with callers(single) as session:
        await everybody(session, ONE_OF_EACH)
        load = Load(session, single.key, rate=25)
        loaded = single.log_text().count("is loaded, ")
        async with load.running():
            await load.answered(20)
            single.signal(pid, signal.SIGHUP)
            await asyncio.to_thread(
                wait_until, lambda: single.log_text().count("is loaded, ") > loaded, what="the model, read again"
            )
            await load.answered(20)
    load.assert_invariants()
    assert single.pids("edge") == [pid]
    assert load.statuses()[200] >= 40, load.summary()


async def test_a_change_of_a_key_reaches_every_process(together: Stack) -> None:
    async with callers(together) as session:
        await everybody(session)
        headers = {"X-API-Key": await register(session, rate_limit_per_minute=100_000)}

        async def status() -> int:
            async with session.post("/v1/detect", json={"text": "x"}, headers=headers) as response:
                return response.status

        assert set(await asyncio.gather(*(status() for _ in range(40)))) == {200}  # in the cache of both
        async with session.delete("/auth/key", headers=headers) as response:
            assert response.status == 204
        await asyncio.sleep(0.25)  # the promise
        assert set(await asyncio.gather(*(status() for _ in range(40)))) == {401}


async def test_breakers_of_all_processes_are_shown_and_reset(together: Stack) -> None:
    token = {"X-Admin-Token": together.secret("PORTCULLIS_ADMIN_TOKEN")}
    async with callers(together) as session:
        await everybody(session)
        async with session.get("/v1/circuit-breakers", headers={"X-API-Key": together.key}) as response:
            shown = await response.json()
        assert [(each["name"], len(each["replicas"])) for each in shown["circuit_breakers"]] == [("fallback", 2)]
        async with session.post("/v1/circuit-breakers/fallback/reset", headers=token) as response:
            assert response.status == 200


async def test_lists_and_jobs_come_to_their_end_and_are_counted_once(shared: Stack) -> None:
    texts = [ATTACK if number % 4 == 0 else BENIGN for number in range(200)]
    async with callers(shared) as session:
        key = await register(session, rate_limit_per_minute=100_000)
        body = {"requests": [{"text": text} for text in texts]}
        async with session.post("/v1/detect/batch", json=body, headers={"X-API-Key": key}) as response:
            lines = [json.loads(line) async for line in response.content]
        assert (lines[-1]["summary"]["total"], lines[-1]["summary"]["failed"]) == (200, 0)
        assert all(line["is_malicious"] is (line["index"] % 4 == 0) for line in lines[:-1])
        caller = Caller(session, key, patience_seconds=60)
        job_id = await caller.submit(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts), "once")
        assert (await caller.wait(job_id))["state"] == "done"
        results = await caller.results(job_id)
        assert sorted(result["index"] for result in results) == list(range(200))
        assert all(result["is_malicious"] is (result["index"] % 4 == 0) for result in results)

        async def total() -> int:
            async with session.get("/auth/profile", headers={"X-API-Key": key}) as response:
                return int((await response.json())["total_requests"])

        async with asyncio.timeout(20):
            while await total() < 400:
                await asyncio.sleep(0.2)
        assert await total() == 400
