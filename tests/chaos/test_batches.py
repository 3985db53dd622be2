"""Batches while processes die: every text has its verdict, and is counted once."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import aiohttp

from tests.chaos.kit import ATTACK, BENIGN, Load, Stack, callers, register, wait_for_detection


async def _lines(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    assert response.status == 200, await response.text()
    return [json.loads(line) async for line in response.content]


async def _total(session: aiohttp.ClientSession, key: str) -> int:
    async with session.get("/auth/profile", headers={"X-API-Key": key}) as response:
        return int((await response.json())["total_requests"])


async def test_a_batch_survives_the_death_of_a_worker_and_a_proxy_and_is_counted_once(pairs: Stack) -> None:
    await asyncio.to_thread(wait_for_detection, pairs, 30)
    texts = [ATTACK if number % 2 == 0 else BENIGN for number in range(1000)]
    async with callers(pairs) as session:
        key = await register(session, rate_limit_per_minute=100_000)
        body = {"requests": [{"text": text} for text in texts]}
        async with session.post("/v1/detect/batch", json=body, headers={"X-API-Key": key}) as response:
            await response.content.readline()
            for name in ("fallback_model", "detector_proxy"):
                pairs.signal(pairs.pids(name)[0], signal.SIGKILL)
                await asyncio.sleep(0.2)
            rest = await _lines(response)
        summary = rest[-1]["summary"]
        assert (summary["total"], summary["failed"], summary["complete"]) == (1000, 0, True), summary
        assert summary["malicious"] == 500
        assert all(line["is_malicious"] is (line["index"] % 2 == 0) for line in rest[:-1])
        async with asyncio.timeout(20):
            while await _total(session, key) < 1000:
                await asyncio.sleep(0.2)
        await asyncio.sleep(2.0)  # a second count would come now
        assert await _total(session, key) == 1000
    await asyncio.to_thread(wait_for_detection, pairs, 30)


async def test_single_texts_are_answered_as_ever_beside_a_batch(stack: Stack) -> None:
    await asyncio.to_thread(wait_for_detection, stack, 30)
    async with callers(stack) as session:
        body = {"requests": [{"text": f"{BENIGN} {number}"} for number in range(1000)]}
        batch = asyncio.create_task(
            session.post("/v1/detect/batch", json=body, headers={"X-API-Key": stack.key, "Accept": "application/json"})
        )
        load = Load(session, stack.key, rate=20)
        async with load.running():
            response = await batch
            document = await response.json()
        load.assert_invariants()
        assert set(load.statuses()) == {200}, load.summary()
        assert [line["index"] for line in document["results"]] == list(range(1000))
        assert document["summary"]["failed"] == 0
