"""What traces and metrics cost: the same load on two stacks by turns, one with both at their defaults, one with neither.

Both stacks are up all the time, and are loaded by turns for a few seconds each, so that whatever else the machine does falls on
both alike. With: spans are recorded and those of kept traces go to a collector that reads and drops them, and every process's
metrics are scraped every five seconds. Without: no collector, and metrics that do nothing. What is told is the ratio of the two
throughputs, of all rounds together, and the quartiles of single rounds; on a stub engine that answers at once (`detect`) and on
the shipped model. And the same of the processor time that a request takes in all of the stack's processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.figures import ratios
from tests.bench.load import BenchError, issued_key, texts
from tests.bench.systems import Stack, engine, portcullis

PROCESSES = 12
"""Ports in a row for metrics; more than there are processes."""
SCRAPE_SECONDS = 5.0
MOST = 0.10
"""Of the throughput."""
MOST_DEGRADED = 0.5
"""A busy machine lets Redis or the engine miss its time now and then; this is for an engine that is never reached."""


@dataclass(slots=True)
class Side:
    """One stack under load. By round: `rates`, requests a second; `costs`, milliseconds of processor time for each."""

    name: str
    stack: Stack
    session: aiohttp.ClientSession
    key: str
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def processor_seconds(self) -> float:
        """What all processes of the stack have used, servers and all."""
        return sum(self.stack.cpu().values())


def _free_row() -> int:
    """The first of `PROCESSES` free ports in a row."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), ExitStack() as stack:
            for offset in range(PROCESSES):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", first + offset))
            return first


@asynccontextmanager
async def _side(name: str, environment: dict[str, str]) -> AsyncIterator[Side]:
    with portcullis(environment) as stack:
        async with (
            aiohttp.ClientSession(stack.url, connector=aiohttp.TCPConnector(limit=0)) as session,
            issued_key(session, stack.token) as key,
        ):
            yield Side(name, stack, session, key)


@asynccontextmanager
async def _scraped(first_port: int) -> AsyncIterator[None]:
    """Each process's metrics are read, as Prometheus would."""

    async def scrape() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                for port in range(first_port, first_port + PROCESSES):
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                            await response.read()
                await asyncio.sleep(SCRAPE_SECONDS)

    task = asyncio.create_task(scrape())
    try:
        yield
    finally:
        task.cancel()


async def load(side: Side, callers: int, seconds: float) -> None:
    """One turn."""
    supply = texts()
    answered = degraded = 0
    used = side.processor_seconds()
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal answered, degraded
        while time.perf_counter() - began < seconds:
            body = {"text": f"{next(supply)} {secrets.token_hex(4)}"}
            async with side.session.post("/v1/detect", json=body, headers={"X-API-Key": side.key}) as response:
                verdict = await response.json()
                if response.status != 200:
                    raise BenchError(f"{side.name}: answered {response.status}, {verdict}")
                answered += 1
                degraded += verdict["degraded"]

    await asyncio.gather(*(caller() for _ in range(callers)))
    if degraded > answered * MOST_DEGRADED:
        raise BenchError(f"{side.name}: {degraded} of {answered} were degraded; something else was measured than was meant")
    side.rates.append(answered / (time.perf_counter() - began))
    side.costs.append((side.processor_seconds() - used) * 1000 / answered)


async def compare(settings: dict[str, str], collector: str, callers: int, rounds: int, seconds: float) -> tuple[Side, Side]:
    """Both sides, loaded by turns."""
    async with AsyncExitStack() as stack:
        row = _free_row()
        watched = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector, "PORTCULLIS_METRICS_PORT": str(row)}
        with_both = await stack.enter_async_context(_side("with", {**settings, **watched}))
        without = await stack.enter_async_context(
            _side("without", {**settings, "PYTHONPATH": str(Path(__file__).parent / "unmeasured")})
        )
        await stack.enter_async_context(_scraped(row))
        for side in (with_both, without):
            await load(side, callers, seconds)  # warm
            side.rates.clear()
            side.costs.clear()
        for number in range(rounds):
            # The one that goes first changes, so that a machine that slows down favours neither.
            for side in (with_both, without) if number % 2 else (without, with_both):
                await load(side, callers, seconds)
        return with_both, without


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench tracing", description=__doc__)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn (default: 4)")
    parser.add_argument("--engine", choices=("detect", "model", "both"), default="both")
    options = parser.parse_args(arguments)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=f"{options.callers} callers, {options.rounds} rounds")
    for title in ("engine", "req/s", "without", "ratio (quartiles)", "CPU ms", "without", "ratio (quartiles)"):
        table.add_column(title, justify="right", no_wrap=True)
    worst = 1.0
    try:
        with engine() as served:
            stub = served.url
            engines = {
                "detect": {"PORTCULLIS_ENGINE_KIND": "detect", "PORTCULLIS_ENGINE_URL": stub},
                "model": dict[str, str](),
            }
            for name, settings in engines.items():
                if options.engine not in (name, "both"):
                    continue
                sides = asyncio.run(compare(settings, stub, options.callers, options.rounds, options.seconds))
                rates = statistics.quantiles(ratios(*(side.rates for side in sides)), n=4)
                costs = statistics.quantiles(ratios(*(side.costs for side in sides)), n=4)
                rate, other_rate = (statistics.mean(side.rates) for side in sides)
                cost, other_cost = (statistics.mean(side.costs) for side in sides)
                worst = min(worst, rate / other_rate)
                table.add_row(
                    name,
                    f"{rate:.0f}",
                    f"{other_rate:.0f}",
                    f"{rate / other_rate:.3f} ({rates[0]:.2f}–{rates[2]:.2f})",
                    f"{cost:.2f}",
                    f"{other_cost:.2f}",
                    f"{cost / other_cost:.3f} ({costs[0]:.2f}–{costs[2]:.2f})",
                )
    except BenchError as error:
        print(f"bench tracing: {error}", file=sys.stderr)
        return 1
    Console(highlight=False).print(table)
    return 0 if worst >= 1 - MOST else 1
