"""`./run bench scale-out`: throughput with 1, 2 and 4 workers whose model sleeps, and how evenly the work is spread.

A model that sleeps uses no processor, so that a machine with two can have four workers and tell what the way to them is worth:
queue groups that pick at random, workers that say that they are busy, an edge that lets in what is answered in time. A closed
loop with as many callers for each worker; whoever is refused asks again a moment later. What is wanted: 0.9 of linear, and no
worker with more than 1.3 times the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

from libs.common.subjects import DEFAULT_POOL, model_pool
from tests.bench.load import BenchError, issued_key
from tests.bench.systems import Stack, portcullis

TEXT = "The invoice was paid in March, but the reminder went out anyway."
WARM_UP_SECONDS = 5.0
AGAIN_SECONDS = 0.1
LEAST_OF_LINEAR, MOST_OF_MEAN = 0.9, 1.3


@dataclass(frozen=True, slots=True)
class Level:
    """What so many workers did. `share`: what each had of the answers."""

    workers: int
    rate: float
    median_ms: float
    refused: int
    degraded: int
    shares: tuple[int, ...]

    @property
    def worst(self) -> float:
        """The busiest worker's part of the mean."""
        return max(self.shares) / mean(self.shares)


class Counts:
    """What each worker has answered, by its metrics."""

    def __init__(self, stack: Stack) -> None:
        targets = json.loads(stack.home.metrics_targets.read_text())
        self._addresses = sorted(each["targets"][0] for each in targets if each["labels"]["service"] == "fallback_model")

    async def read(self, session: aiohttp.ClientSession) -> list[int]:
        return [await self._one(session, address) for address in self._addresses]

    @staticmethod
    async def _one(session: aiohttp.ClientSession, address: str) -> int:
        async with session.get(f"http://{address}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        wanted = {"subject": model_pool(DEFAULT_POOL), "outcome": "ok"}
        samples = (sample for family in families for sample in family.samples)
        return sum(
            int(each.value) for each in samples if each.name == "portcullis_stage_requests_total" and each.labels == wanted
        )


async def load(session: aiohttp.ClientSession, key: str, count: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Latencies in seconds of what was answered with a verdict, and how often something else was."""
    latencies: list[float] = []
    other: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while (began := time.perf_counter()) < end:
            body = {"text": f"{TEXT} {secrets.token_hex(4)}"}
            async with session.post("/v1/detect", json=body, headers={"X-API-Key": key}) as response:
                answer = await response.json()
            if response.status == 200:
                latencies.append(time.perf_counter() - began)
                other["degraded"] += answer["degraded"]
            elif response.status in (429, 503):
                other["refused"] += 1
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                raise BenchError(f"answered {response.status}: {answer}")

    await asyncio.gather(*(caller() for _ in range(count)))
    return latencies, other


async def measure(stack: Stack, workers: int, each: int, seconds: float) -> Level:
    counts = Counts(stack)
    async with (
        aiohttp.ClientSession(stack.url, connector=aiohttp.TCPConnector(limit=0)) as session,
        aiohttp.ClientSession() as metrics,
        issued_key(session, stack.token) as key,
    ):
        await load(session, key, workers * each, WARM_UP_SECONDS)
        before = await counts.read(metrics)
        began = time.perf_counter()
        latencies, other = await load(session, key, workers * each, seconds)
        spent = time.perf_counter() - began
        after = await counts.read(metrics)
    if not latencies:
        raise BenchError(f"{workers} workers: nothing was answered, {dict(other)}")
    shares = tuple(late - early for early, late in zip(before, after, strict=True))
    median = sorted(latencies)[len(latencies) // 2] * 1000
    return Level(workers, len(latencies) / spent, median, other["refused"], other["degraded"], shares)


def levels(workers: Iterable[int], each: int, seconds: float) -> Iterable[Level]:
    """A stack of its own for each number of workers."""
    environment = {
        "PYTHONPATH": str(Path(__file__).parent / "sleeping"),
        "PORTCULLIS_MODEL_SESSIONS": "1",
        "PORTCULLIS_MODEL_BATCH_TOKENS": "128",  # one that sleeps for each row gains nothing by large ones
    }
    for count in workers:
        with portcullis(environment, {"fallback_model": count}) as stack:
            yield asyncio.run(measure(stack, count, each, seconds))


def shortfalls(found: list[Level]) -> list[str]:
    """What is not as it is wanted, in words."""
    single = found[0].rate / found[0].workers
    said = []
    for level in found:
        if level.rate < LEAST_OF_LINEAR * single * level.workers:
            said.append(f"{level.workers} workers: {level.rate / single / level.workers:.2f} of linear")
        if level.worst > MOST_OF_MEAN:
            said.append(f"{level.workers} workers: the busiest had {level.worst:.2f} of the mean")
    return said


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="./run bench scale-out", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--callers", type=int, default=16, help="for each worker (default: 16)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each (default: 20)")
    chosen = parser.parse_args(arguments)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"a model that sleeps; {os.cpu_count()} processors, this load included"
    )
    for title in ("workers", "texts/s", "of linear", "median ms", "busiest / mean", "by worker", "refused", "degraded"):
        table.add_column(title, justify="right")
    found: list[Level] = []
    try:
        for level in levels(chosen.workers, chosen.callers, chosen.seconds):
            found.append(level)
            linear = level.rate / level.workers / (found[0].rate / found[0].workers)
            table.add_row(
                str(level.workers),
                f"{level.rate:.1f}",
                f"{linear:.3f}",
                f"{level.median_ms:.0f}",
                f"{level.worst:.2f}",
                " ".join(map(str, level.shares)),
                str(level.refused),
                str(level.degraded),
            )
    except (aiohttp.ClientError, BenchError) as error:
        print(f"bench scale-out: {error}", file=sys.stderr)
        return 1
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(table)
    for line in shortfalls(found):
        print(f"below what is wanted: {line}", file=sys.stderr)
    return 1 if shortfalls(found) else 0
