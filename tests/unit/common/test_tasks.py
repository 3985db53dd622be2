"""Ending background tasks."""

from __future__ import annotations

import asyncio
import logging

import pytest

from libs.common import tasks


async def test_a_task_that_loses_its_cancellation_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_SECONDS", 0.01)
    asked = 0

    async def deaf() -> None:
        nonlocal asked
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asked += 1
                if asked == 3:
                    raise

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.cancelled()
    assert asked == 3


async def test_a_failure_is_logged_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    with caplog.at_level(logging.WARNING):
        await tasks.end(task)
    assert "ZeroDivisionError" in caplog.text
