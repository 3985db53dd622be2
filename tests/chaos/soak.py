"""Half an hour of ordinary use: what each process of a stack keeps in memory, and whether that grows."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from libs.common import keys
from libs.common.subjects import SERVICES
from tests.chaos.kit import SERVERS, Caller, Stack, register
from tests.chaos.questions import Question, is_right, question

MB = 1024**2

Point = tuple[float, float]
"""Seconds since the start, and megabytes."""


# --- memory ------------------------------------------------------------------------------------------------------------------


def slope(points: Sequence[Point]) -> float:
    """Megabytes a minute in the second half of the time: the median of the slopes between any two samples (Theil and Sen).

    The first half is warming up (caches and rings that fill to their bounds). A median, since an allocator takes memory in
    jumps and gives it back in others: a single one, or a few outliers, are no trend. 0.0 of fewer than two samples.
    """
    if not points:
        return 0.0
    middle = (points[0][0] + points[-1][0]) / 2
    late = [point for point in points if point[0] >= middle]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(late, 2) if b[0] > a[0]]
    return 60 * statistics.median(slopes) if slopes else 0.0


@dataclass(slots=True)
class Memory:
    """One process: `points` of its resident memory, and how many files it had open, first and last."""

    name: str
    pid: int
    points: list[Point] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it has been seen."""
        return self.points[-1][0] - self.points[0][0]


class Sampler:
    """Resident memory of every process of a stack. A process that ends keeps what was seen of it."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._began = time.monotonic()
        self.processes: dict[tuple[int, float], Memory] = {}

    def sample(self) -> None:
        """One more point of each process that is there."""
        found = {(process.pid, process.create_time()): process for process in self._stack.processes()}
        if new := found.keys() - self.processes.keys():
            names = {pid: name for name in (*SERVICES, *SERVERS) for pid in self._stack.tree(name)}
            self.processes |= {key: Memory(names.get(key[0], "supervisor"), key[0]) for key in new}
        now = time.monotonic() - self._began
        for key, process in found.items():
            with contextlib.suppress(psutil.Error):  # gone in the meantime
                resident, files = process.memory_info().rss, process.num_fds()
                self.processes[key].points.append((now, resident / MB))
                self.processes[key].files.append(files)

    def lasting(self) -> list[Memory]:
        """Those that were there from the first sample to the last; in the order of their names."""
        seen = [memory for memory in self.processes.values() if memory.points]
        first, last = min(memory.points[0][0] for memory in seen), max(memory.points[-1][0] for memory in seen)
        whole = [memory for memory in seen if (memory.points[0][0], memory.points[-1][0]) == (first, last)]
        return sorted(whole, key=lambda memory: (memory.name, memory.pid))

    def names(self) -> set[str]:
        """What lasted, by name."""
        return {memory.name for memory in self.lasting()}

    def table(self) -> str:
        """A line for each process that lasted."""
        lines = [f"{'process':<20} {'pid':>8} {'first':>8} {'middle':>8} {'last':>8} {'most':>8} MB  {'MB/min':>7}  open files"]
        for memory in self.lasting():
            sizes = [size for _, size in memory.points]
            shown = " ".join(f"{size:8.1f}" for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1], max(sizes)))
            files = f"{memory.files[0]} → {memory.files[-1]}"
            lines.append(f"{memory.name:<20} {memory.pid:>8} {shown}     {slope(memory.points):+7.3f}  {files}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Every sample as a line: name, process id, seconds, megabytes."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("process", "pid", "seconds", "resident_mb"))
            for memory in self.processes.values():
                writer.writerows((memory.name, memory.pid, f"{at:.1f}", f"{size:.2f}") for at, size in memory.points)


# --- load --------------------------------------------------------------------------------------------------------------------

Turn = Callable[[int], Awaitable[None]]


@dataclass(slots=True)
class Mixture:
    """What callers of all kinds do, and how often: texts, batches, jobs, new keys, mistakes, and leaving in the middle.

    Each waits for its answer before its next turn, so that a slow machine gets less rather than more at a time.
    """

    stack: Stack
    session: aiohttp.ClientSession
    done: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """For so long. Raises what a caller raised."""
        ends = time.monotonic() + seconds
        turns: tuple[tuple[float, Turn], ...] = (
            *((0.25, self._text) for _ in range(4)),
            (5.0, self._batch),
            (20.0, self._job),
            (5.0, self._new_key),
            (0.5, self._mistake),
            (2.0, self._leave),
        )
        async with asyncio.TaskGroup() as group:
            for number, (every, turn) in enumerate(turns):
                group.create_task(self._keep_on(turn, every, ends, number * 1_000_000))

    async def _keep_on(self, turn: Turn, every: float, ends: float, number: int) -> None:
        while (began := time.monotonic()) < ends:
            await turn(number)
            number += 1
            await asyncio.sleep(max(0.0, min(began + every, ends) - time.monotonic()))

    def _saw(self, what: str, status: int, *allowed: int, right: bool = True) -> None:
        self.done[f"{what} {status}"] += 1
        if status not in allowed or not right:
            self.unexpected.append(f"{what}: {status}{'' if right else ', wrong'}")

    async def _detect(self, asked: Question, key: str, what: str) -> None:
        async with self.session.post("/v1/detect", json={"text": asked.text}, headers={"X-API-Key": key}) as response:
            body = await response.json(content_type=None)
            self._saw(what, response.status, 200, right=response.status != 200 or is_right(asked, body))

    async def _text(self, number: int) -> None:
        await self._detect(question(number), self.stack.key, "text")

    async def _batch(self, number: int) -> None:
        lines = _lines(number)
        headers = {"X-API-Key": self.stack.key, "Content-Type": "application/x-ndjson"}
        async with self.session.post("/v1/detect/batch", data=lines, headers=headers) as response:
            *results, last = [json.loads(line) async for line in response.content]
            right = response.status == 200 and len(results) == ITEMS == last["summary"]["total"]
            self._saw("batch", response.status, 200, right=right)

    async def _job(self, number: int) -> None:
        caller = Caller(self.session, self.stack.key, patience_seconds=60)
        job = await caller.wait(await caller.submit(_lines(number), f"soak-{number}"))
        results = await caller.results(job["id"])
        self._saw("job", 200, 200, right=(job["state"], len(results)) == ("done", ITEMS))

    async def _new_key(self, number: int) -> None:
        await self._detect(question(number), await register(self.session), "text with a new key")

    async def _mistake(self, number: int) -> None:
        own = {"X-API-Key": self.stack.key}
        json_type = own | {"Content-Type": "application/json"}
        path, headers, data, status = (
            ("/v1/detect", json_type, b'{"text": ', 400),
            ("/v1/detect", json_type, b'{"text": ""}', 422),
            ("/v1/detect", own | {"Content-Type": "text/plain"}, b"a", 415),
            ("/v1/detect", json_type | {"X-API-Key": keys.generate()}, b'{"text": "a"}', 401),
            ("/v1/detect", json_type | {"X-API-Key": "wrong"}, b'{"text": "a"}', 401),
            ("/v1/nothing", own, b"", 404),
        )[number % 6]
        async with self.session.post(path, data=data, headers=headers) as response:
            await response.read()
            self._saw("mistake", response.status, status)

    async def _leave(self, number: int) -> None:
        """Ask for a batch, and go before it is answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.stack.port)
        lines = _lines(number)
        writer.write(
            b"POST /v1/detect/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
            + f"X-API-Key: {self.stack.key}\r\nContent-Length: {len(lines)}\r\n\r\n".encode()
            + lines
        )
        await reader.read(1)
        writer.transport.abort()
        self.done["left in the middle"] += 1


ITEMS = 30


def _lines(number: int) -> bytes:
    return b"".join(json.dumps({"id": str(i), "text": question(ITEMS * number + i).text}).encode() + b"\n" for i in range(ITEMS))
