"""`./run bench batch`: what many texts at a time cost, streamed and as a job, and what single texts feel of them.

- the first result of a batch of 1 000, against a single detection;
- texts a second of a streamed batch and of a job, against onnxruntime alone on the same texts: prepared beforehand, sorted by
  length, in the best of some batch sizes, on as many threads as there are processors;
- memory of the edge and the proxy while 1 000 and 100 000 lines are uploaded;
- latency of single detections, alone, beside a batch, and beside a job.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import psutil
import uvloop

from infra.embedded.control import Supervisor
from infra.embedded.home import Home
from tests.bench.alone import Alone, by_tokens
from tests.bench.figures import Spread, percentile
from tests.bench.load import BenchError, issued_key, made, texts
from tests.bench.report import P50, P99, Bar, Report
from tests.bench.systems import Stack, portcullis
from tests.bench.turns import Options

NDJSON = {"Content-Type": "application/x-ndjson"}
TEXTS = 1000
ROUNDS = 4
"""Of throughput, for each repeat: within the seconds that one lasts, this kind of machine may get a third faster or slower."""
LINES = 100_000
JOB_ITEMS = 20_000
SETTLING_SECONDS = 2.0
POLL_SECONDS = 0.1
WATCHED = ("edge", "detector_proxy", "fallback_model")
TEXTS_RATE, MEMORY, FIRST = "texts/s", "memory MB", "first ms"
ALONE, STREAM, LIST, JOB = "onnxruntime alone", "NDJSON", "a list", "a job"


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

    async def stream(self, data: Any, headers: dict[str, str]) -> tuple[float, float]:
        """Milliseconds to the first line and to the last."""
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
        return first, (time.perf_counter() - began) * 1000

    async def listed(self, batch: list[str]) -> tuple[float, float]:
        body = json.dumps({"requests": [{"text": text} for text in batch]})
        return await self.stream(body, {"Content-Type": "application/json"})

    async def upload(self, batch: AsyncIterator[str] | list[str]) -> tuple[float, float]:
        return await self.stream(_lines(batch), NDJSON)

    async def submit(self, batch: list[str]) -> str:
        """Where the job is that judges these texts."""
        headers = self.headers | NDJSON | {"Prefer": "respond-async"}
        async with self.session.post("/v1/detect/batch", data=_lines(batch), headers=headers) as response:
            if response.status != 202:
                raise BenchError(f"a job was answered {response.status}: {await response.text()}")
            return response.headers["Location"]

    async def job(self, batch: list[str]) -> tuple[float, float]:
        """Milliseconds until a job was accepted, and until it was over."""
        began = time.perf_counter()
        place = await self.submit(batch)
        accepted = (time.perf_counter() - began) * 1000
        while (state := await self.state(place)) in ("queued", "running"):
            await asyncio.sleep(POLL_SECONDS)
        if state != "done":
            raise BenchError(f"a job ended as {state}")
        return accepted, (time.perf_counter() - began) * 1000

    async def state(self, place: str) -> str:
        async with self.session.get(place, headers=self.headers) as response:
            return str((await response.json())["state"])


async def _lines(batch: AsyncIterator[str] | list[str]) -> AsyncIterator[bytes]:
    if isinstance(batch, list):
        yield b"".join(json.dumps({"text": text}).encode() + b"\n" for text in batch)
        return
    async for text in batch:
        yield json.dumps({"text": text}).encode() + b"\n"


class Memory:
    """The highest resident size of each watched service while a block runs, in MB, all replicas together."""

    def __init__(self, home: Home) -> None:
        states = Supervisor(home).processes()
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


async def first_result(gateway: Gateway, report: Report, options: Options) -> None:
    batch = made(TEXTS)
    for text in batch[:20]:
        await gateway.single(text)
    singles, firsts = [], []
    for _ in range(options.repeats):
        singles.append(statistics.median([await gateway.single(text) for text in batch[:50]]))
        firsts.append((await gateway.listed([*made(1), *batch[1:]]))[0])
    report.add("a single detection", "first result", {FIRST: singles})
    report.add("a list of 1 000", "first result", {FIRST: firsts})


async def throughput(gateway: Gateway, report: Report, options: Options) -> None:
    """In rounds of a thousand texts, each measured in every way, in another order each time, with onnxruntime alone before and
    after each: what else the machine does, and what was done before, falls on all of them alike."""
    alone = await asyncio.to_thread(Alone)
    tokens = alone.best_tokens(await asyncio.to_thread(alone.rows, made(200)))
    ways: dict[str, Callable[[list[str]], Awaitable[tuple[float, float]]]] = {
        STREAM: gateway.upload,
        LIST: gateway.listed,
        JOB: gateway.job,
    }
    rates: dict[str, list[float]] = {name: [] for name in (ALONE, *ways)}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS * options.repeats):
        batch = made(TEXTS)
        batches = by_tokens(await asyncio.to_thread(alone.rows, batch), tokens)
        limits = [await asyncio.to_thread(alone.seconds, batches)]
        order = deque(ways)
        order.rotate(-number)
        for name in order:
            seconds = (await ways[name](batch))[1] / 1000
            limits.append(await asyncio.to_thread(alone.seconds, batches))
            rates[name].append(TEXTS / seconds)
            shares[name].append((limits[-2] + limits[-1]) / 2 / seconds)
        rates[ALONE] += [TEXTS / seconds for seconds in limits]
    alone.close()
    report.notes.append(f"onnxruntime alone in batches of {tokens} tokens, sorted by length")
    for name, values in rates.items():
        report.add(name, f"{TEXTS} texts", {TEXTS_RATE: values})
    for name, values in shares.items():
        report.bars.append(Bar(f"texts/s, {name}, of onnxruntime alone", Spread.of(values), 0.85, at_least=True))


async def memory(gateway: Gateway, report: Report, home: Home) -> None:
    async def short(count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield f"What is {number} plus {number % 7}?"

    watch = Memory(home)
    for count in (TEXTS, LINES):
        async with watch.watched():
            await gateway.upload(short(count))
        for name in (name for name in WATCHED[:2] if watch.highest[name]):
            report.add(name, f"{count} lines", {MEMORY: [watch.highest[name]]})


async def beside(gateway: Gateway, report: Report, options: Options) -> None:
    async def singles() -> dict[str, list[float]]:
        rounds = []
        for _ in range(options.repeats):
            latencies = []
            end = time.perf_counter() + options.seconds
            for text in texts():
                if time.perf_counter() > end:
                    break
                latencies.append(await gateway.single(f"{text} {secrets.token_hex(4)}"))
                await asyncio.sleep(0.02)
            rounds.append(latencies)
        return {figure: [percentile(one, share) for one in rounds] for figure, share in ((P50, 0.5), (P99, 0.99))}

    report.add("alone", "single texts", await singles())
    for name, load in (("beside a batch", _batch_running), ("beside a job", _job_running)):
        async with load(gateway):
            report.add(name, "single texts", await singles())


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
    place = await gateway.submit(made(JOB_ITEMS))
    await asyncio.sleep(SETTLING_SECONDS)
    yield
    if (state := await gateway.state(place)) != "running":
        raise BenchError(f"the job was not running any more: {state}")
    async with gateway.session.delete(place, headers=gateway.headers):
        pass


def run(options: Options) -> Report:
    with portcullis({}, together=options.together) as stack:
        return uvloop.run(_measure(options, stack))


async def _measure(options: Options, stack: Stack) -> Report:
    report = Report("batch", "Many texts at a time", plotted=(TEXTS_RATE, P50, P99))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with (
        aiohttp.ClientSession(stack.url, connector=connector, timeout=timeout) as session,
        issued_key(session, stack.token) as key,
    ):
        gateway = Gateway(session, key)
        await first_result(gateway, report, options)
        await throughput(gateway, report, options)
        await beside(gateway, report, options)
        await memory(gateway, report, stack.home)
    return report
