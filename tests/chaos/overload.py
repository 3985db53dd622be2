"""More than the stack can do: its peak is measured, then so many times as much is sent, whether or not it is answered."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.bench.generator import Answer, Load, Run, request
from tests.bench.load import bodies, texts
from tests.chaos.kit import Stack

DISTINCT_TEXTS = 30


@dataclass(frozen=True, slots=True)
class Shot:
    """What one caller saw. `status` 0: the connection failed. `latency`: seconds, from when it was due."""

    status: int
    latency: float
    correct: bool
    retry_after: str | None


@dataclass(slots=True)
class Volley:
    """What the callers of one load saw, who came for `seconds`."""

    seconds: float
    shots: list[Shot] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """How much later than due each was sent, in seconds: the callers' own share of what they see."""
    own_ms: float = 0.0
    """Processor time that the callers used for a call: they have the same processors as what they ask."""

    @property
    def goodput(self) -> float:
        """Verdicts a second."""
        return sum(shot.status == 200 for shot in self.shots) / self.seconds

    def statuses(self) -> Counter[int]:
        return Counter(shot.status for shot in self.shots)

    def latency(self, share: float, *statuses: int) -> float:
        """This percentile of the answers with these statuses, in seconds; 0.0 when there are none."""
        return percentile([shot.latency for shot in self.shots if shot.status in statuses], share)

    def summary(self) -> str:
        sent = len(self.shots) / self.seconds
        shown = [f"{sent:.0f} sent/s, {self.goodput:.0f} verdicts/s, {dict(sorted(self.statuses().items()))}"]
        for name, statuses in (("verdicts", (200,)), ("refusals", (429, 503))):
            values = " ".join(f"p{share * 100:g} {self.latency(share, *statuses) * 1000:.0f}" for share in (0.5, 0.9, 0.99, 1))
            shown.append(f"{name} {values} ms")
        shown.append(
            f"callers late by p99 {percentile(self.late, 0.99) * 1000:.0f} ms, {self.own_ms:.2f} ms of processor time a call"
        )
        return "; ".join(shown)


def percentile(values: list[float], share: float) -> float:
    """0.0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class Callers:
    """Callers of `stack` who know what the answer to each text is, since they have asked before the load.

    They cost little themselves, since they have the same processors as what they ask.
    """

    def __init__(self, stack: Stack, timeout_seconds: float) -> None:
        headers = {"X-API-Key": stack.key, "X-Request-Timeout": str(timeout_seconds)}
        asked = bodies(list(itertools.islice(texts(), DISTINCT_TEXTS)))
        self._requests = [request(stack.port, "/v1/detect", body, headers) for body in asked]
        self._load = Load(stack.port, itertools.cycle(self._requests), self._see)
        self._known: dict[bytes, bool] = {}
        self._shots: list[Shot] = []

    async def learn(self) -> None:
        """Ask for each text once, one after the other."""
        while not self._known.keys() >= set(self._requests):
            volley = await self.closed(1, 0.5)
            assert set(volley.statuses()) == {200}, volley.summary()

    async def closed(self, callers: int, seconds: float) -> Volley:
        """So many callers, each of whom waits for its answer before it asks again: the peak."""
        return await self._volley(self._load.closed(callers, seconds))

    async def open(self, rate: float, seconds: float) -> Volley:
        """`rate` requests a second, whatever becomes of them; returns when the last has been answered."""
        return await self._volley(self._load.open([number / rate for number in range(int(rate * seconds))]))

    async def close(self) -> None:
        await self._load.close()

    def _see(self, answer: Answer) -> None:
        correct = True
        if answer.status == 200:
            said = json.loads(answer.body)["is_malicious"]
            correct = said is self._known.setdefault(answer.request, said)
        retry_after = answer.headers.get(b"retry-after")
        self._shots.append(Shot(answer.status, answer.seconds, correct, retry_after.decode() if retry_after else None))

    async def _volley(self, work: Awaitable[Run]) -> Volley:
        self._shots = []
        used = time.process_time()
        run = await work
        own_ms = (time.process_time() - used) * 1000 / max(1, len(self._shots))
        return Volley(run.seconds, self._shots, [late / 1000 for late in run.late], own_ms)


@asynccontextmanager
async def calling(stack: Stack, timeout_seconds: float) -> AsyncIterator[Callers]:
    """Callers of `stack` who have learnt what the answers are."""
    callers = Callers(stack, timeout_seconds)
    try:
        await callers.learn()
        yield callers
    finally:
        await callers.close()
