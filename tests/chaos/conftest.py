"""Whole stacks. Each is started once and shared; a test leaves it running as it found it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.kit import SERVERS, Stack, callers, register
from tests.conftest import free_port

# Everybody registers from one address here, and the defaults would be in the way.
ROOMY = {
    "PORTCULLIS_REGISTER_PER_HOUR": "100000",
    "PORTCULLIS_REGISTER_MAX_PER_MINUTE": "1000000",
    "PORTCULLIS_REGISTER_MAX_PER_DAY": "1000000000",
}


@contextmanager
def running_stack(**fields: object) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="pc-") as home, stack_in(Path(home), **fields) as stack:
        yield stack


@contextmanager
def stack_in(home: Path, **fields: object) -> Iterator[Stack]:
    """A stack in a folder that is there already, perhaps with disks of its own."""
    stack = Stack(home=home, **fields)  # type: ignore[arg-type]
    try:
        stack.up()
        with ThreadPoolExecutor(1) as pool:  # a test's own event loop may be running in this thread
            stack.key = pool.submit(lambda: asyncio.run(_key(stack))).result()
        yield stack
    finally:
        stack.run("down", check=False)


async def _key(stack: Stack) -> str:
    async with callers(stack) as session:
        return await register(session, rate_limit_per_minute=1_000_000, rate_limit_per_day=1_000_000_000)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One of each, with the fallback pool as the engine."""
    with running_stack(environment=ROOMY) as stack:
        yield stack


@pytest.fixture(scope="session")
def together() -> Iterator[Stack]:
    """Two edges, in each of which are the other stages of a request, and one of all else."""
    with running_stack(environment=ROOMY, scale={"edge": 2}, together=True) as stack:
        for name in ("edge", "auth", "limiter", "detector_proxy"):
            assert len(stack.pids(name)) == 2
        assert not set(stack.pids("edge")) & set(stack.pids("fallback_model"))
        yield stack


@pytest.fixture(scope="session")
def single() -> Iterator[Stack]:
    """One process in which is all that a request passes, the model included."""
    with running_stack(environment=ROOMY, together=True) as stack:
        (edge,) = stack.pids("edge")
        for name in ("auth", "limiter", "detector_proxy", "fallback_model"):
            assert stack.pids(name) == [edge]
        yield stack


@pytest.fixture(params=["stack", "together", "single"])
def either(request: pytest.FixtureRequest) -> Stack:
    chosen: Stack = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="session")
def pairs() -> Iterator[Stack]:
    """Two of each service."""
    services = ("edge", "auth", "limiter", "detector_proxy", "fallback_model")
    with running_stack(environment=ROOMY, scale=dict.fromkeys(services, 2)) as stack:
        for name in services:
            assert len(stack.pids(name)) == 2
        for name in SERVERS:
            assert len(stack.pids(name)) == 1
        yield stack


@pytest.fixture(scope="session")
def engine_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def engine_stack(engine_port: int) -> Iterator[Stack]:
    """One of each, with a primary engine expected on `engine_port`."""
    environment = ROOMY | {
        "PORTCULLIS_ENGINE_URL": f"http://127.0.0.1:{engine_port}",
        "PORTCULLIS_ENGINE_KIND": "detect",
        "PORTCULLIS_ENGINE_NAME": "hostile-engine",
        "PORTCULLIS_ENGINE_TIMEOUT_SECONDS": "1",
    }
    with running_stack(environment=environment) as stack:
        yield stack


@pytest.fixture
def closed_stack() -> Iterator[Stack]:
    """One of each, whose console wants the admin token."""
    with running_stack(environment=ROOMY | {"PORTCULLIS_CONSOLE_OPEN": "false"}) as stack:
        yield stack
