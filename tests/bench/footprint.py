"""`./run bench footprint`: what one detection costs each stage, for docs/operations/sizing.md: processor time, NATS messages and
Redis commands, on a stack of its own under a closed loop. Busy stages are cheaper for each request than idle ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
import nats
import redis
from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.stack import OPERATOR
from libs.common.subjects import CONNECTIONS, service_of
from tests.bench.load import BenchError, made
from tests.bench.systems import DISTINCT_REQUESTS, Stack, key_of, loaded, portcullis
from tests.bench.turns import closed

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
    sent, received, moved = Counter[str](), Counter[str](), Counter[str]()
    for each in await _connections(stack):
        known = service_of(each.get("name", ""))
        if known is not None:
            sent[known[0]] += each["in_msgs"]
            received[known[0]] += each["out_msgs"]
            moved[known[0]] += each["in_bytes"] + each["out_bytes"]
    return Seen(stack.cpu(), sent, received, moved, _commands(stack))


async def _connections(stack: Stack) -> list[dict[str, Any]]:
    url = stack.setting("PORTCULLIS_NATS_URL")
    password = (stack.home.path / "secrets" / f"nats-{OPERATOR}").read_text().strip()
    connection = await nats.connect(url, user=OPERATOR, password=password)
    try:
        answer = await connection.request(CONNECTIONS, b"{}", timeout=5)
    finally:
        await connection.close()
    found: list[dict[str, Any]] = json.loads(answer.data)["data"]["connections"]
    return found


def _commands(stack: Stack) -> Counter[str]:
    client = redis.Redis.from_url(stack.setting("PORTCULLIS_REDIS_URL"))
    stats: Any = client.info("commandstats")
    client.close()
    return Counter({name.removeprefix("cmdstat_"): int(one["calls"]) for name, one in stats.items()})


async def measure(stack: Stack, count: int, seconds: float, table: Table) -> str:
    async with key_of(stack) as key, loaded("Portcullis", stack.port, stack.cpu, made(DISTINCT_REQUESTS), [key]) as system:
        await system.measure(closed(count, WARM_UP_SECONDS))
        await asyncio.sleep(SETTLING_SECONDS)
        before = await look(stack)
        stretch = await system.measure(closed(count, seconds))
        await asyncio.sleep(SETTLING_SECONDS)
        after = await look(stack)
    answered = stretch.answered
    if stretch.failed:
        raise BenchError(f"{stretch.failed} requests were not answered with a verdict")
    for name in after.cpu:
        cpu = (after.cpu[name] - before.cpu[name]) * 1000 / answered
        pairs = ((before.sent, after.sent), (before.received, after.received))
        numbers = [(late[name] - early[name]) / answered for early, late in pairs]
        kilobytes = (after.moved[name] - before.moved[name]) / answered / 1000
        shown = [f"{each:.2f}" for each in (*numbers, kilobytes)] if after.sent[name] else ["", "", ""]
        table.add_row(name, f"{cpu:.3f}", *shown)
    commands = {name: (calls - before.redis[name]) / answered for name, calls in after.redis.items()}
    told = ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(commands.items()) if rate >= 0.01)
    return f"{stretch.rate:.0f} requests/s from {count} callers; Redis commands for each: {told}"


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
    try:
        with portcullis({}) as stack:
            told = asyncio.run(measure(stack, chosen.callers, chosen.seconds, table))
    except (aiohttp.ClientError, BenchError) as error:
        print(f"bench footprint: {error}", file=sys.stderr)
        return 1
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(table)
    print(told)
    return 0
