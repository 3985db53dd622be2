"""Real servers, started once per run, on free loopback ports in a temporary directory."""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from nats.aio.client import Client

from infra.embedded import servers
from libs.common import tracing
from libs.common.clock import SystemClock
from libs.common.subjects import SERVICES
from libs.common.tracing import PerSecond, Recorder
from tests.fuzz.budget import SHORT

OPERATOR = "operator"
"""A NATS user without restrictions, for tests that play somebody."""

# No test fails because the machine is slow. The ordinary run draws the same examples every time: what it says is about the
# change that is tested; `./run fuzz` draws others.
settings.register_profile("portcullis", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=SHORT)
settings.load_profile("portcullis")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float = 20.0, what: str = "the condition") -> None:
    """Poll a condition; fail loudly when it does not come."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_seconds} s in vain for {what}")
        time.sleep(0.02)


async def arrived(*clients: Client) -> None:
    """Wait until the server has taken everything that these have sent it, subscriptions too.

    One `flush` is not enough: nats-py writes its PING past its own buffer, so that it overtakes what still lies there.
    """
    for _ in range(2):
        for client in clients:
            await client.flush()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(server: servers.Server) -> Iterator[servers.Server]:
    """The server as a process, ready to accept, until the end of the block."""
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _accepts(server.port), what=f"{server.name} on port {server.port}")
        yield server
    finally:
        process.send_signal(getattr(signal, f"SIG{server.stop_signal}"))
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Records the traces of this process; keeps what a caller asks for, and failures."""
    recorder = Recorder(PerSecond(0, SystemClock()), slow_ms=60_000, ring_spans=1000)
    tracing.use(recorder)
    yield recorder
    tracing.use(None)


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    # In memory where there is room: a slow disk makes PostgreSQL and an append-only Redis stand still for seconds, which the
    # services take for an outage, and rightly so.
    in_memory = Path("/dev/shm")
    roomy = in_memory.is_dir() and shutil.disk_usage(in_memory).free > 4 * 2**30
    with tempfile.TemporaryDirectory(prefix="portcullis-test-", dir=in_memory if roomy else None) as home:
        yield Path(home)


@pytest.fixture(scope="session")
def nats_passwords() -> dict[str, str]:
    return {name: secrets.token_urlsafe(12) for name in (*SERVICES, OPERATOR)}


@pytest.fixture(scope="session")
def nats_issuer() -> str:
    """The seed with which auth signs whom it lets in."""
    return servers.new_issuer()


@pytest.fixture(scope="session")
def nats_server(server_home: Path, nats_passwords: dict[str, str], nats_issuer: str) -> Iterator[servers.Server]:
    with running(servers.nats(server_home / "nats", free_port(), nats_passwords, nats_issuer)) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(server_home: Path) -> Iterator[servers.Server]:
    home = server_home / "redis"
    home.mkdir()
    with running(servers.redis(home, free_port(), secrets.token_urlsafe(12))) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(server_home: Path) -> Iterator[servers.Server]:
    with running(servers.postgres(server_home / "pg", free_port(), secrets.token_urlsafe(12))) as server:
        yield server
