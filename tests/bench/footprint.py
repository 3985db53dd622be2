"""`./run bench footprint`: what one detection costs each stage, for docs/operations/sizing.md: processor time, NATS messages and
Redis commands, on a stack of its own under a closed loop. Busy stages are cheaper for each request than idle ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import nats
import psutil
import redis
from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.control import Supervisor
from infra.embedded.home import Home
from infra.embedded.stack import OPERATOR
from libs.common.subjects import CONNECTIONS, service_of
from tests.bench.load import BenchError, issued_key, texts
from tests.chaos.kit import Stack, callers

WARM_UP_SECONDS = 3.0
SETTLING_SECONDS = 2.0
"""Until usage is counted, which belongs to the requests before."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Totals since the start. By service: seconds of processor time, messages to and from NATS, bytes of both."""

    cpu: dict[str, float]
    sent: Counter[str]
    received: Counter[str]
    moved: Counter[str]
    redis: Counter[str]


async def look(stack: Stack) -> Seen:
    cpu: dict[str, float] = {}
    for state in Supervisor(Home(stack.home)).processes():
        name = state.name.rpartition("_")[0]
        cpu[name] = cpu.get(name, 0.0) + _seconds_of(state.pid)
    sent, received, moved = Counter[str](), Counter[str](), Counter[str]()
    for each in await _connections(stack):
        known = service_of(each.get("name", ""))
        if known is not None:
            sent[known[0]] += each["in_msgs"]
            received[known[0]] += each["out_msgs"]
            moved[known[0]] += each["in_bytes"] + each["out_bytes"]
    return Seen(cpu, sent, received, moved, _commands(stack))


def _seconds_of(pid: int) -> float:
    process = psutil.Process(pid)
    used = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(times.user + times.system for times in used)


async def _connections(stack: Stack) -> list[dict[str, Any]]:
    url = stack.environment_of("edge")["PORTCULLIS_NATS_URL"]
    password = (stack.home / "secrets" / f"nats-{OPERATOR}").read_text().strip()
    connection = await nats.connect(url, user=OPERATOR, password=password)
    try:
        answer = await connection.request(CONNECTIONS, b"{}", timeout=5)
    finally:
        await connection.close()
    found: list[dict[str, Any]] = json.loads(answer.data)["data"]["connections"]
    return found


def _commands(stack: Stack) -> Counter[str]:
    client = redis.Redis.from_url(stack.environment_of("limiter")["PORTCULLIS_REDIS_URL"])
    stats: Any = client.info("commandstats")
    client.close()
    return Counter({name.removeprefix("cmdstat_"): int(one["calls"]) for name, one in stats.items()})


async def load(session: aiohttp.ClientSession, key: str, count: int, seconds: float) -> int:
    """How many were answered with a verdict."""
    supply = texts()
    answered = 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal answered
        while time.perf_counter() < end:
            body = {"text": f"{next(supply)} {secrets.token_hex(4)}"}
            async with session.post("/v1/detect", json=body, headers={"X-API-Key": key}) as response:
                await response.read()
            if response.status != 200:
                raise BenchError(f"answered {response.status}")
            answered += 1

    await asyncio.gather(*(caller() for _ in range(count)))
    return answered


async def measure(stack: Stack, count: int, seconds: float, table: Table) -> str:
    token = (stack.home / "secrets" / "admin-token").read_text().strip()
    async with callers(stack) as session, issued_key(session, token) as key:
        await load(session, key, count, WARM_UP_SECONDS)
        await asyncio.sleep(SETTLING_SECONDS)
        before = await look(stack)
        began = time.perf_counter()
        answered = await load(session, key, count, seconds)
        spent = time.perf_counter() - began
        await asyncio.sleep(SETTLING_SECONDS)
        after = await look(stack)
    for name in after.cpu:
        cpu = (after.cpu[name] - before.cpu[name]) * 1000 / answered
        pairs = ((before.sent, after.sent), (before.received, after.received))
        numbers = [(late[name] - early[name]) / answered for early, late in pairs]
        kilobytes = (after.moved[name] - before.moved[name]) / answered / 1000
        shown = [f"{each:.2f}" for each in (*numbers, kilobytes)] if after.sent[name] else ["", "", ""]
        table.add_row(name, f"{cpu:.3f}", *shown)
    commands = {name: (calls - before.redis[name]) / answered for name, calls in after.redis.items()}
    told = ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(commands.items()) if rate >= 0.01)
    return f"{answered / spent:.0f} requests/s from {count} callers; Redis commands for each: {told}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="./run bench footprint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--callers", type=int, default=8, help="at a time (default: 8)")
    parser.add_argument("--seconds", type=float, default=15.0, help="(default: 15)")
    chosen = parser.parse_args(arguments)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="for each detection")
    for title in ("", "processor ms", "messages sent", "received", "kB"):
        table.add_column(title, justify="right")
    with tempfile.TemporaryDirectory(prefix="pc-bench-") as folder:
        stack = Stack(Path(folder) / "home")
        try:
            stack.up()
            told = asyncio.run(measure(stack, chosen.callers, chosen.seconds, table))
        except (aiohttp.ClientError, BenchError, AssertionError) as error:
            print(f"bench footprint: {error}", file=sys.stderr)
            return 1
        finally:
            stack.run("down", check=False)
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(table)
    print(told)
    return 0
