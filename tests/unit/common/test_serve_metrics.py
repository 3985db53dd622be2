"""Metrics on a port of their own, which may be taken."""

from __future__ import annotations

import asyncio
import socket
import urllib.request

import pytest

from libs.common import tasks, telemetry
from libs.common.settings import CommonSettings


async def test_a_port_that_is_taken_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "METRICS_RETRY_SECONDS", 0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serving = asyncio.create_task(telemetry.serve_metrics(CommonSettings(metrics_port=port)))
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
    monkeypatch.setattr(telemetry, "start_http_server", lambda port, addr: started.append(port))
    await telemetry.serve_metrics(CommonSettings(metrics_port=0))
    assert started == []
    await telemetry.serve_metrics(CommonSettings(metrics_port=9100))
    assert started == [9100]


async def test_a_loop_that_is_held_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "LAG_EVERY_SECONDS", 0.01)
    seen: list[float] = []
    monkeypatch.setattr(telemetry.LOOP_LAG, "observe", seen.append)
    watching = asyncio.create_task(telemetry.watch_loop())
    await asyncio.sleep(0)
    held = asyncio.get_running_loop().time() + 0.2
    while asyncio.get_running_loop().time() < held:
        pass
    async with asyncio.timeout(10):
        while not seen:
            await asyncio.sleep(0.01)
    await tasks.end(watching)
    assert max(seen) > 0.15
