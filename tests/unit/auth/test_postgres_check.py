"""Whom the health check blames."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from services.auth import adapters
from services.auth.adapters import PostgresCheck
from services.auth.core import StoreUnavailableError


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> PostgresCheck:
    monkeypatch.setattr(adapters, "CHECK_TIMEOUT_SECONDS", 0.1)
    return PostgresCheck(create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none"))


async def test_a_process_that_stands_still_does_not_blame_postgres(check: PostgresCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answered() -> None:
        await asyncio.sleep(0.01)

    monkeypatch.setattr(check, "_ask", answered)
    checking = asyncio.create_task(check.check())
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251  # longer than all of the check's time, and the answer has come meanwhile
    await checking


async def test_no_answer_in_time_is_an_outage(check: PostgresCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ask", asyncio.Event().wait)
    with pytest.raises(StoreUnavailableError):
        await check.check()
    assert check._asking is not None
    check._asking.cancel()
