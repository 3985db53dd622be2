"""Metrics on a port of their own, which may be taken."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from libs.common import tasks, telemetry
from libs.common.probes import LIVE_PATH, READY_PATH, STALE_SECONDS, ProcessHealth
from libs.common.settings import CommonSettings


def status(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_a_port_that_is_taken_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "METRICS_RETRY_SECONDS", 0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serving = asyncio.create_task(telemetry.serve_metrics(CommonSettings(metrics_port=port), ProcessHealth()))
        await asyncio.sleep(0.1)
        assert not serving.done()
    try:
        async with asyncio.timeout(10):
            await serving
    finally:
        await tasks.end(serving)
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read())
    assert b"portcullis_build_info" in page


async def test_without_a_port_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def start(port: int, addr: str) -> tuple[SimpleNamespace, None]:
        started.append(port)
        return SimpleNamespace(get_app=lambda: None, set_app=lambda _: None), None

    monkeypatch.setattr(telemetry, "start_http_server", start)
    await telemetry.serve_metrics(CommonSettings(metrics_port=0), ProcessHealth())
    assert started == []
    await telemetry.serve_metrics(CommonSettings(metrics_port=9100), ProcessHealth())
    assert started == [9100]


async def test_probes_are_answered_beside_the_metrics() -> None:
    now = 0.0
    health = ProcessHealth(lambda: now)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await telemetry.serve_metrics(CommonSettings(metrics_port=port), health)

    async def probed() -> list[int]:
        return [await asyncio.to_thread(status, port, path) for path in (LIVE_PATH, READY_PATH)]

    assert await probed() == [200, 503]  # it has begun, and takes no work yet
    health.takes_work = lambda: True
    assert await probed() == [200, 200]
    now = STALE_SECONDS
    assert await probed() == [503, 503]  # the loop stands still, whatever it says of itself
    health.beat()
    assert await probed() == [200, 200]
    assert await asyncio.to_thread(status, port, "/metrics") == 200


async def test_a_loop_that_turns_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "LAG_EVERY_SECONDS", 0.01)
    beaten = asyncio.Event()
    health = ProcessHealth()
    monkeypatch.setattr(health, "beat", beaten.set)
    watching = asyncio.create_task(telemetry.watch_loop(health))
    async with asyncio.timeout(10):
        await beaten.wait()
    await tasks.end(watching)


async def test_a_loop_that_is_held_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "LAG_EVERY_SECONDS", 0.01)
    seen: list[float] = []
    monkeypatch.setattr(telemetry.LOOP_LAG, "observe", seen.append)
    watching = asyncio.create_task(telemetry.watch_loop(ProcessHealth()))
    await asyncio.sleep(0)
    held = asyncio.get_running_loop().time() + 0.2
    while asyncio.get_running_loop().time() < held:
        pass
    async with asyncio.timeout(10):
        while not seen:
            await asyncio.sleep(0.01)
    await tasks.end(watching)
    assert max(seen) > 0.15
