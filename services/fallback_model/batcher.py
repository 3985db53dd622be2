"""Gathers windows of many requests into batches for the engine's sessions.

A batch is bounded by tokens, padding included (rows x the longest of them), and made of windows of about the same length, so
that a short text is not padded to a long neighbour's length. Urgent windows go first; others are overtaken for a bounded
time only. The queue is bounded in tokens, and nobody waits in it in vain: when it is full, or when a request would hardly be
scored before its deadline at the speed of late, `Busy` is raised at once and the caller can ask another worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from libs.common import tracing
from services.fallback_model.engine import Scores
from services.fallback_model.forecast import Speed
from services.fallback_model.metrics import LaneMetrics
from services.fallback_model.queue import Item, Queue, Request, most_rows
from services.fallback_model.windows import Ids

_FOR_A_SESSION: Final = (("portcullis.queue", "model"),)
_CERTAIN: Final = 0.5
"""A request is taken when it would wait for at most this part of its time: a forecast is no more exact than that, and what is
scored too late is work that nobody gets anything of."""
_FIRST_SHARE: Final = 4
"""Who comes to sessions that have nothing to do is scored in a batch of a quarter of the usual bound: what came first need not
wait for what came with it, and there is another session, or another turn, for the rest."""
_FULL: Final = 0.5
"""Batches of at least this part of the rows that they may have tell how fast a queue is worked off."""


class Busy(Exception):  # noqa: N818  # it is an answer, not a fault
    """The queue is at its bound, or too long for the time that a request has."""


class Runner(Protocol):
    def run(self, rows: list[Ids]) -> Scores:
        """Scores one batch; blocks, and is called in a thread."""
        ...


class Time(Protocol):
    def monotonic(self) -> float:
        """Seconds since some fixed point."""
        ...


@dataclass(frozen=True)
class Limits:
    """batch_tokens: rows x longest row of a batch, and of long rows fewer (`most_rows`). queue_tokens: the bound of the queue.

    wait_seconds: how long a session that is free waits for more than what is there, when that does not fill a batch.
    overtaken_seconds: after this long a window that is not urgent counts as urgent.
    """

    batch_tokens: int = 256
    queue_tokens: int = 65_536
    wait_seconds: float = 0.001
    overtaken_seconds: float = 0.5


@dataclass(frozen=True, slots=True)
class Scored:
    """A batch that has been scored in `seconds`. `occupied_seconds`: for how long a thread did nothing else, the time included in
    which it waited for a processor: on a busy machine that is much of it."""

    scores: Scores
    seconds: float
    occupied_seconds: float


class Batcher:
    """Create it in the event loop that uses it."""

    def __init__(
        self,
        runners: list[Runner],
        limits: Limits,
        clock: Time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        *,
        begin_thread: Callable[[], None] | None = None,
        ahead: int = 0,
        turn: int = 1,
        lane: str = "single",
    ) -> None:
        """`begin_thread` is called first in each thread that runs batches. `lane`: for the metrics, see there.

        `ahead`: full batches that are ready before a thread is, at most one for each runner, which must bear two threads then.
        No thread has to wait for its next batch so, when there is enough to do. `turn`: batches that a thread scores in one go,
        when what waits is enough for all threads.
        """
        self._limits = limits
        self._turn = turn
        self._clock = clock
        self._sleep = sleep
        self._urgent = Queue(self._take_off)
        self._patient = Queue(self._take_off)
        self._queued_tokens = 0
        self._urgent_tokens = 0
        self._running_tokens = 0
        self._expected_tokens = 0.0
        self._speed = Speed()
        self._waiting_requests = 0
        self._metrics = LaneMetrics(lane, limits.queue_tokens, lambda: self._queued_tokens)
        self._work = asyncio.Event()
        self._closing = False
        self._patient_turn = False
        self._thread = threading.local()
        """`free`: when this thread has scored its last batch."""
        self._sessions = len(runners)
        self._threads = ThreadPoolExecutor(len(runners), thread_name_prefix="infer", initializer=begin_thread)
        self._tasks = [asyncio.create_task(self._serve(runner)) for runner in runners]
        self._tasks += [asyncio.create_task(self._serve(runner, least_tokens=limits.batch_tokens)) for runner in runners[:ahead]]

    @property
    def queued_tokens(self) -> int:
        """Tokens of the windows that wait."""
        return self._queued_tokens

    @property
    def waiting_requests(self) -> int:
        """Requests of which no window has been put into a batch yet."""
        return self._waiting_requests

    def check(self, seconds: float, *, urgent: bool = True) -> None:
        """Raises `Busy` when a request with so many seconds left would be refused now."""
        if self._closing or self._queued_tokens >= self._limits.queue_tokens:
            self._metrics.full.inc()
            raise Busy
        if self.wait_seconds(urgent=urgent) > _CERTAIN * max(0.0, seconds):
            self._metrics.late.inc()
            raise Busy

    def wait_seconds(self, *, urgent: bool = True) -> float:
        """How long a request would wait that came now, at the speed of late: at least, since others may go first by then.

        What is being scored counts as a whole: half of it is done, and the request's own batch is about as much as that half.
        """
        ahead = self._expected_tokens + self._running_tokens + (self._urgent_tokens if urgent else self._queued_tokens)
        return self._speed.seconds_for(ahead) / self._sessions

    @contextlib.contextmanager
    def expecting(self, tokens: float) -> Iterator[None]:
        """For as long as the block runs, about so many tokens are on their way here and count as if they waited."""
        self._expected_tokens += tokens
        try:
            yield
        finally:
            self._expected_tokens -= tokens

    async def score(self, rows: list[Ids], *, urgent: bool = True, seconds: float = math.inf) -> Scores:
        """Scores of `rows` (at least one), in their order. Raises as `submit`, or whatever the engine raised.

        When the caller is cancelled, its windows that still wait are dropped.
        """
        request = self.submit(rows, urgent=urgent, seconds=seconds)
        try:
            return await request.done
        finally:
            self._trace(request)

    def submit(self, rows: list[Ids], *, urgent: bool = True, seconds: float = math.inf) -> Request:
        """Let `rows` wait for a session. Whoever loses interest cancels `done`.

        Raises `Busy` when they would hardly be scored within `seconds`. A request is taken whole, so the queue may stand above
        its bound by one request.
        """
        self.check(seconds, urgent=urgent)
        tokens = sum(map(len, rows))
        now = self._clock.monotonic()
        request = Request(len(rows), np.empty(len(rows), np.float32), None, asyncio.get_running_loop().create_future(), now)
        queue = self._urgent if urgent else self._patient
        for index, ids in enumerate(rows):
            queue.add(Item(request, index, ids, now, urgent))
        self._queued_tokens += tokens
        self._urgent_tokens += tokens if urgent else 0
        self._waiting_requests += 1
        self._work.set()
        return request

    def _trace(self, request: Request) -> None:
        """The steps of a request that has been scored, or has failed."""
        if request.taken is None or request.done.cancelled():
            return
        now = self._clock.monotonic()
        error = request.done.exception()
        tracing.record("queue", request.taken - request.since, ago=now - request.taken, own=_FOR_A_SESSION)
        tracing.record(
            "inference",
            now - request.taken,
            own=(("portcullis.windows", len(request.logits)), ("portcullis.batch.windows", request.batch_rows)),
            error=type(error).__name__ if error is not None else "",
        )

    async def close(self) -> None:
        """Finishes what was accepted; further requests are refused."""
        self._closing = True
        self._work.set()
        await asyncio.gather(*self._tasks)
        self._threads.shutdown(wait=False)

    async def _serve(self, runner: Runner, least_tokens: int = 0) -> None:
        """Make batches while anything waits, or so many tokens, and see them through."""
        loop = asyncio.get_running_loop()
        while True:
            has_rested = False
            while not (self._urgent or self._patient) or self._queued_tokens < least_tokens:
                if self._closing:
                    return
                has_rested = True
                self._work.clear()
                await self._work.wait()
            if self._queued_tokens < self._limits.batch_tokens and self._limits.wait_seconds > 0 and not self._closing:
                await self._sleep(self._limits.wait_seconds)
            batches = self._take_turn(is_first=has_rested and not self._running_tokens)
            if not batches:
                continue
            tokens = sum(len(item.ids) for batch in batches for item in batch)
            self._running_tokens += tokens
            try:
                outcomes = await loop.run_in_executor(self._threads, self._run, runner, batches, self._clock.monotonic())
            except RuntimeError as error:  # no thread could be had
                outcomes = [error] * len(batches)
            finally:
                self._running_tokens -= tokens
            for batch, outcome in zip(batches, outcomes, strict=True):
                if outcome is None:
                    continue
                if isinstance(outcome, Exception):
                    for item in batch:
                        if not item.request.done.done():
                            item.request.done.set_exception(outcome)
                    continue
                self._metrics.scored(outcome.seconds)
                self._deliver(batch, outcome.scores)
                self._measure(batch, outcome.occupied_seconds)

    def _take_turn(self, *, is_first: bool) -> list[list[Item]]:
        """The batches that a thread scores next; there may be none."""
        most = self._limits.batch_tokens
        batches = [self._gather(most // (_FIRST_SHARE if is_first else 1))]
        while not is_first and len(batches) < self._turn and self._queued_tokens > self._sessions * most:
            batches.append(self._gather(most))
        batches = [batch for batch in batches if batch]
        for batch in batches:
            self._metrics.began([len(item.ids) for item in batch], self._clock.monotonic() - min(item.since for item in batch))
            self._note_begin(batch)
        return batches

    def _run(self, runner: Runner, batches: list[list[Item]], ready: float) -> list[Scored | Exception | None]:
        """In one of the threads; `ready`: since when the batches have been waiting for it. Of one that fails, what the engine
        raised; of one that nobody waits for any more when its turn comes, None."""
        outcomes: list[Scored | Exception | None] = []
        for batch in batches:
            if all(item.abandoned for item in batch):
                outcomes.append(None)
                continue
            try:
                outcomes.append(self._score(runner, [item.ids for item in batch], ready))
            except Exception as error:  # noqa: BLE001  # handed to those who asked, whatever it is; the worker goes on
                outcomes.append(error)
        return outcomes

    def _score(self, runner: Runner, rows: list[Ids], ready: float) -> Scored:
        free = getattr(self._thread, "free", -math.inf)
        began = time.perf_counter()
        try:
            scores = runner.run(rows)
        finally:
            self._thread.free = self._clock.monotonic()
        return Scored(scores, time.perf_counter() - began, self._thread.free - max(ready, free))

    def _measure(self, batch: list[Item], seconds: float) -> None:
        tokens = sum(len(item.ids) for item in batch)
        # A queue that makes anybody wait is worked off in full batches. Small ones are slower by the token; but if even they are
        # faster than what is believed, then that is out of date, and must not keep the queue too short for full ones.
        longest = max(len(item.ids) for item in batch)
        full = len(batch) >= _FULL * most_rows(longest, self._limits.batch_tokens)
        if full or tokens > seconds * self._speed.per_second > 0:
            self._speed.add(tokens, seconds)

    def _note_begin(self, batch: list[Item]) -> None:
        now = self._clock.monotonic()
        for item in batch:
            if item.request.taken is None:
                item.request.taken, item.request.batch_rows = now, len(batch)

    def _gather(self, most_tokens: int) -> list[Item]:
        """The next batch: what has waited longest, and others of like length, up to so many tokens with its padding."""
        overdue = self._clock.monotonic() - self._limits.overtaken_seconds
        first, second = self._urgent, self._patient
        longest_patient = self._patient.oldest()
        if self._urgent and longest_patient is not None and longest_patient.since <= overdue:
            # Turn by turn from now on: neither queue can starve the other.
            self._patient_turn = not self._patient_turn
            if self._patient_turn:
                first, second = second, first
        batch: list[Item] = []
        # What the one queue leaves of the batch is filled from the other.
        for queue in (first, second):
            queue.fill(batch, most_tokens)
        return batch

    def _take_off(self, item: Item) -> None:
        self._queued_tokens -= len(item.ids)
        self._urgent_tokens -= len(item.ids) if item.urgent else 0
        if not item.request.begun:
            item.request.begun = True
            self._waiting_requests -= 1

    def _deliver(self, batch: list[Item], scores: Scores) -> None:
        for index, item in enumerate(batch):
            request = item.request
            if request.done.done():
                continue
            if request.threats is None:
                request.threats = np.empty((len(request.logits), scores.threats.shape[1]), np.float32)
            request.logits[item.row] = scores.logits[index]
            request.threats[item.row] = scores.threats[index]
            request.left -= 1
            if request.left == 0:
                request.done.set_result(Scores(request.logits, request.threats))
