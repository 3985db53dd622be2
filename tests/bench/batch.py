"""`./run bench batch`: what streamed batches cost and do, on the running stack; figures of one run on one machine.

- the first result of a batch of 1 000, against a single detection;
- texts a second of a streamed batch, against onnxruntime alone on the same texts: prepared beforehand, sorted by length, in
  the best of some batch sizes, on as many threads as there are processors;
- memory of the edge and the proxy while 1 000 and 100 000 lines are uploaded;
- latency of single detections, alone, beside a batch, and beside a job.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Any

import aiohttp
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.control import Supervisor
from infra.embedded.home import locate_home
from services.fallback_model import processors
from services.fallback_model.detector import Model
from services.fallback_model.paths import DEFAULT_MODEL
from tests.bench.load import BenchError, Measured, issued_key, texts

NDJSON = {"Content-Type": "application/x-ndjson"}
BATCH_TOKENS = (128, 256, 512, 1024, 2048)
JOB_ITEMS = 20_000
SETTLING_SECONDS = 2.0
WATCHED = ("edge", "detector_proxy", "fallback_model")


class Gateway:
    """The running stack, as a caller with a key sees it."""

    def __init__(self, session: aiohttp.ClientSession, key: str) -> None:
        self.session = session
        self.headers = {"X-API-Key": key}

    async def single(self, text: str) -> float:
        """Milliseconds of one detection."""
        began = time.perf_counter()
        async with self.session.post("/v1/detect", json={"text": text}, headers=self.headers) as response:
            await response.read()
            if response.status != 200:
                raise BenchError(f"a detection was answered {response.status}")
        return (time.perf_counter() - began) * 1000

    async def stream(self, data: Any, headers: dict[str, str]) -> tuple[float, float, dict[str, Any]]:
        """Milliseconds to the first line and to the last, and the summary."""
        began = time.perf_counter()
        first = 0.0
        line = b""
        async with self.session.post("/v1/detect/batch", data=data, headers=self.headers | headers) as response:
            if response.status != 200:
                raise BenchError(f"a batch was answered {response.status}: {await response.text()}")
            async for received in response.content:
                line = received
                first = first or (time.perf_counter() - began) * 1000
        summary: dict[str, Any] = json.loads(line)["summary"]
        if summary["failed"] or not summary["complete"]:
            raise BenchError(f"a batch did not go well: {summary}")
        return first, (time.perf_counter() - began) * 1000, summary

    async def listed(self, batch: list[str]) -> tuple[float, float, dict[str, Any]]:
        body = json.dumps({"requests": [{"text": text} for text in batch]})
        return await self.stream(body, {"Content-Type": "application/json"})

    async def upload(self, batch: AsyncIterator[str] | list[str]) -> tuple[float, float, dict[str, Any]]:
        return await self.stream(_lines(batch), NDJSON)


async def _lines(batch: AsyncIterator[str] | list[str]) -> AsyncIterator[bytes]:
    if isinstance(batch, list):
        yield b"".join(json.dumps({"text": text}).encode() + b"\n" for text in batch)
        return
    async for text in batch:
        yield json.dumps({"text": text}).encode() + b"\n"


def made(count: int) -> list[str]:
    return [f"{text} {secrets.token_hex(4)}" for text in islice(texts(), count)]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class Alone:
    """onnxruntime and nothing else, on as many threads as there are processors."""

    def __init__(self) -> None:
        threads = processors.usable()
        self._model = Model(DEFAULT_MODEL, threads, 1)
        self._pool = ThreadPoolExecutor(threads)

    def rows(self, batch: list[str]) -> list[Any]:
        """What the network is given, sorted by length; preparing it is not counted."""
        return sorted((row for text in batch for row in self._model.prepare(text).rows), key=len)

    def seconds(self, rows: list[Any], tokens: int) -> float:
        """Seconds that `rows` take in batches of at most so many tokens, padding included."""
        batches: list[list[Any]] = [[]]
        for row in rows:
            if batches[-1] and len(row) * (len(batches[-1]) + 1) > tokens:
                batches.append([])
            batches[-1].append(row)
        free = list(self._model.sessions)

        def run(one: list[Any]) -> None:
            session = free.pop()
            session.run(one)
            free.append(session)

        began = time.perf_counter()
        list(self._pool.map(run, batches))
        return time.perf_counter() - began

    def close(self) -> None:
        self._pool.shutdown()


class Memory:
    """The highest resident size of each watched service while a block runs, in MB, all replicas together."""

    def __init__(self) -> None:
        states = Supervisor(locate_home(dict(os.environ))).processes()
        self._processes = {
            name: [psutil.Process(state.pid) for state in states if state.pid and state.name.rpartition("_")[0] == name]
            for name in WATCHED
        }
        self.highest: dict[str, float] = {}

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Memory]:
        self.highest = dict.fromkeys(WATCHED, 0.0)
        task = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            for name, processes in self._processes.items():
                size = sum(process.memory_info().rss for process in processes) / 1e6
                self.highest[name] = max(self.highest[name], size)
            await asyncio.sleep(0.1)


async def first_result(gateway: Gateway, show: Callable[..., None]) -> None:
    batch = made(1000)
    for text in batch[:20]:
        await gateway.single(text)
    single = median([await gateway.single(text) for text in batch[:100]])
    first = median([(await gateway.listed([text, *batch[1:]]))[0] for text in made(5)])
    show("first of 1 000", f"{first:.1f} ms", f"a single detection: {single:.1f} ms", f"{first / single:.2f} times")


async def throughput(gateway: Gateway, show: Callable[..., None], count: int) -> None:
    """In rounds of a thousand texts, each measured in every way: what else the machine does falls on all of them alike."""
    alone = await asyncio.to_thread(Alone)
    probe = await asyncio.to_thread(alone.rows, made(500))
    tokens = min(BATCH_TOKENS, key=lambda tokens: alone.seconds(probe, tokens))
    ways = {"NDJSON": gateway.upload, "a list": gateway.listed}
    spent: dict[str, list[float]] = {name: [] for name in (*ways, "alone")}
    for _ in range(max(1, count // 1000)):
        batch = made(1000)
        rows = await asyncio.to_thread(alone.rows, batch)
        spent["alone"].append(await asyncio.to_thread(alone.seconds, rows, tokens))
        for name, ask in ways.items():
            spent[name].append((await ask(batch))[1] / 1000)
    alone.close()
    reached = 1000 / median(spent["alone"])
    for name in ways:
        share = median([mine / ours for mine, ours in zip(spent["alone"], spent[name], strict=True)])
        against = f"onnxruntime alone: {reached:.0f} (batches of {tokens} tokens)"
        show(f"texts/s, {name}", f"{1000 / median(spent[name]):.0f}", against, f"{100 * share:.0f} %")


async def memory(gateway: Gateway, show: Callable[..., None], lines: int) -> None:
    async def short(count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield f"What is {number} plus {number % 7}?"

    watch = Memory()
    sizes = []
    for count in (1000, lines):
        async with watch.watched():
            await gateway.upload(short(count))
        sizes.append(watch.highest)
    for name in WATCHED[:2]:
        small, large = sizes[0][name], sizes[1][name]
        show(f"memory, {name}", f"{large:.1f} MB at {lines} lines", f"{small:.1f} MB at 1 000", f"{large - small:+.1f} MB")


async def beside(gateway: Gateway, show: Callable[..., None], seconds: float) -> None:
    async def singles() -> Measured:
        measured = Measured(1)
        end = time.perf_counter() + seconds
        for text in texts():
            if time.perf_counter() > end:
                break
            measured.latencies.append(await gateway.single(f"{text} {secrets.token_hex(4)}"))
            await asyncio.sleep(0.02)
        return measured

    quiet = await singles()
    for name, load in (("batch", _batch_running), ("job", _job_running)):
        async with load(gateway):
            loud = await singles()
        for share, figure in ((0.5, "median"), (0.99, "p99")):
            with_it, without = loud.percentile(share), quiet.percentile(share)
            show(
                f"single, {figure}",
                f"{with_it:.1f} ms beside a {name}",
                f"{without:.1f} ms alone",
                f"{with_it / without:.2f} times",
            )


@asynccontextmanager
async def _batch_running(gateway: Gateway) -> AsyncIterator[None]:
    """A streamed batch that does not end by itself."""

    async def forever() -> AsyncIterator[str]:
        for text in texts():
            yield f"{text} {secrets.token_hex(4)}"

    batch = asyncio.create_task(gateway.upload(forever()))
    await asyncio.sleep(SETTLING_SECONDS)
    yield
    if batch.done():
        raise BenchError(f"the batch had ended: {batch.result()}")
    batch.cancel()
    with suppress(asyncio.CancelledError):
        await batch


@asynccontextmanager
async def _job_running(gateway: Gateway) -> AsyncIterator[None]:
    """A job that is too large to be done in the meantime."""
    headers = gateway.headers | NDJSON | {"Prefer": "respond-async"}
    async with gateway.session.post("/v1/detect/batch", data=_lines(made(JOB_ITEMS)), headers=headers) as response:
        if response.status != 202:
            raise BenchError(f"a job was answered {response.status}: {await response.text()}")
        place = response.headers["Location"]
    await asyncio.sleep(SETTLING_SECONDS)
    yield
    async with gateway.session.get(place, headers=gateway.headers) as response:
        job = await response.json()
    if job["state"] != "running":
        raise BenchError(f"the job was not running any more: {job}")
    async with gateway.session.delete(place, headers=gateway.headers):
        pass


async def bench(
    url: str, token: str, parts: list[str], count: int, lines: int, seconds: float, show: Callable[..., None]
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with (
        aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session,
        issued_key(session, token) as key,
    ):
        gateway = Gateway(session, key)
        if "first" in parts:
            await first_result(gateway, show)
        if "throughput" in parts:
            await throughput(gateway, show, count)
        if "beside" in parts:
            await beside(gateway, show, seconds)
        if "memory" in parts:
            await memory(gateway, show, lines)


def main(arguments: list[str]) -> int:
    port = os.environ.get("PORTCULLIS_EDGE_PORT", "8000")
    every = ["first", "throughput", "beside", "memory"]
    parser = argparse.ArgumentParser(
        prog="./run bench batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=f"http://127.0.0.1:{port}", help="where the gateway is (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--texts", type=int, default=3000, help="for the throughput, in rounds of 1000 (default: 3000)")
    parser.add_argument("--lines", type=int, default=100_000, help="of the long upload (default: 100000)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of single detections, each time (default: 15)")
    chosen = parser.parse_args(arguments)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"{chosen.url}, {processors.usable()} processors, this load included"
    )
    for title in ("", "batch", "against", ""):
        table.add_column(title)
    try:
        token = os.environ.get("PORTCULLIS_ADMIN_TOKEN") or locate_home(dict(os.environ)).admin_token.read_text().strip()
        asyncio.run(bench(chosen.url, token, chosen.parts, chosen.texts, chosen.lines, chosen.seconds, table.add_row))
    except FileNotFoundError:
        print("bench: no admin token; start the stack with ./run up, or set PORTCULLIS_ADMIN_TOKEN", file=sys.stderr)
        return 1
    except (aiohttp.ClientError, BenchError) as error:
        print(f"bench: {error}; is the stack running (./run status)?", file=sys.stderr)
        return 1
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(table)
    return 0
