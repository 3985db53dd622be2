"""More than the stack can do: its peak is measured, then so many times as much is sent, whether or not it is answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp

from tests.bench.load import texts

DISTINCT_TEXTS = 30


@dataclass(frozen=True, slots=True)
class Shot:
    """What one caller saw. `status` 0: the connection failed. Times in seconds, `at` from the start of the load."""

    at: float
    status: int
    latency: float
    correct: bool
    retry_after: str | None
    error: str = ""


@dataclass(slots=True)
class Volley:
    """What the callers of one load saw, who came for `seconds`."""

    seconds: float
    shots: list[Shot] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """How much later than due each was sent, in seconds: the callers' own share of what they see."""

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
        if failed := Counter(shot.error for shot in self.shots if shot.error):
            shown.append(f"failed: {failed.most_common(3)}")
        shown.append(f"callers late by p99 {percentile(self.late, 0.99) * 1000:.0f} ms")
        return "; ".join(shown)


def percentile(values: list[float], share: float) -> float:
    """0.0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class Callers:
    """Callers who know what the answer to each text is, since they have asked before the load."""

    def __init__(self, session: aiohttp.ClientSession, key: str, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._session = session
        self._headers = {"X-API-Key": key, "X-Request-Timeout": str(timeout_seconds)}
        self._known: dict[str, bool] = {}

    async def learn(self) -> None:
        for text in itertools.islice(texts(), DISTINCT_TEXTS):
            async with self._session.post("/v1/detect", json={"text": text}, headers=self._headers) as response:
                document = await response.json()
                assert response.status == 200, document
                self._known[text] = document["is_malicious"]

    async def closed(self, callers: int, seconds: float) -> Volley:
        """So many callers, each of whom waits for its answer before it asks again: the peak."""
        volley, supply = Volley(seconds), self._supply()
        began = time.monotonic()

        async def caller() -> None:
            while time.monotonic() < began + seconds:
                await self._ask(next(supply), volley, began)

        await asyncio.gather(*(caller() for _ in range(callers)))
        volley.seconds = time.monotonic() - began
        return volley

    async def open(self, rate: float, seconds: float) -> Volley:
        """`rate` requests a second, whatever becomes of them; returns when the last has been answered."""
        volley, supply = Volley(seconds), self._supply()
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                due = began + number / rate
                if (ahead := due - time.monotonic()) > 0:
                    await asyncio.sleep(ahead)
                volley.late.append(time.monotonic() - due)
                group.create_task(self._ask(next(supply), volley, began))
            volley.seconds = max(seconds, time.monotonic() - began)
        return volley

    def _supply(self) -> Iterator[str]:
        return itertools.cycle(self._known)

    async def _ask(self, text: str, volley: Volley, began: float) -> None:
        sent = time.monotonic()
        status, correct, retry_after, error = 0, True, None, ""
        try:
            async with self._session.post("/v1/detect", json={"text": text}, headers=self._headers) as response:
                document = await response.json(content_type=None)
                status, retry_after = response.status, response.headers.get("retry-after")
                if status == 200:
                    correct = document["is_malicious"] is self._known[text]
        except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
            error = type(failure).__name__ + str(failure)[:80]
        volley.shots.append(Shot(sent - began, status, time.monotonic() - sent, correct, retry_after, error))
