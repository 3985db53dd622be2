"""A limiter on a real store, and stores that are started for one test file."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from infra.embedded import servers
from libs.common.clock import SystemClock
from services.limiter import adapters
from services.limiter.core import PER_KEY, Policy
from services.limiter.failover import Health, Limiter
from tests.conftest import wait_until


@asynccontextmanager
async def limiter(url: str, policy: Policy = PER_KEY, instance: str = "one") -> AsyncIterator[tuple[Limiter, Health]]:
    """With its health, which is watched for as long as the block runs."""
    client = adapters.connect(url)
    heartbeat = adapters.RedisHeartbeat(client, instance)
    health = Health(heartbeat, lambda up: None, beat_seconds=0.05, retry_seconds=0.01)
    await health.check()
    watching = asyncio.create_task(health.watch())
    try:
        yield Limiter(policy, adapters.RedisStore(client, policy, "rl:"), health, SystemClock(), 1000), health
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await heartbeat.leave()
        await client.aclose()


@dataclass
class Started:
    """A Redis of some kind. `kill` may be called again."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    password: str

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password, socket_timeout=1)

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        """Start it again after it was killed."""
        self.process = subprocess.Popen(self.process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers, what="Redis")


def start(home: Path, port: int, password: str, more: str = "", *flags: str) -> Started:
    home.mkdir()
    server = servers.redis(home, port, password)
    program, path = server.command
    lines = [
        line for line in Path(path).read_text().splitlines() if not (flags and line.startswith(("append", "save", "maxmem")))
    ]
    Path(path).write_text("\n".join((*lines, more)) + "\n")
    process = subprocess.Popen([program, path, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = Started(home, port, process, password)
    try:
        wait_until(lambda: process.poll() is not None or started.answers(), what="Redis")
        assert process.poll() is None, "Redis does not take its configuration"
    except BaseException:
        started.kill()
        raise
    return started
