"""A storm: two replicas of each service under a steady load, and at every stroke of a clock one process is harmed."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.chaos.kit import Load, Seen, Stack
from tests.chaos.scenario import STEADY, recovery_limit

SERVICES = ("edge", "auth", "limiter", "detector_proxy", "fallback_model")
PAUSE_SECONDS = 3.0
FIRST_SECONDS = 2.0
"""Of load before the first harm."""
CHOOSING_SECONDS = 1.0
"""Before each stroke the victim is looked up, which takes its time on a busy machine."""
STALE_SECONDS = 0.5
"""What /health said before may be said again for half of that."""
WHOLE_SECONDS = 60.0

Harm = Callable[[Stack, int], Awaitable[None]]


async def kill(stack: Stack, pid: int) -> None:
    stack.signal(pid, signal.SIGKILL)


async def pause(stack: Stack, pid: int) -> None:
    stack.signal(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(PAUSE_SECONDS)
    finally:
        stack.signal(pid, signal.SIGCONT)


@dataclass(slots=True)
class Harmed:
    """One harm: `at` in the time of the load, `late` by so much; both in seconds.

    `whole_after`: seconds until there were two of each again; None when the next harm came first.
    """

    name: str
    at: float
    late: float = 0.0
    whole_after: float | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What callers saw of one harm: how many calls were not answered well that were asked until the next one came, and after how
    many seconds answers were right again (0.0: they always were; infinite: they never were).
    """

    name: str
    failed: int
    seconds: float


@dataclass(slots=True)
class Storm:
    """See the module."""

    load: Load
    harms: list[Harmed] = field(default_factory=list)

    def recoveries(self) -> list[Recovery]:
        """Of each harm. Answers are right again when so many in a row are, be it after the next harm or the one after that."""
        asked = sorted(self.load.seen, key=lambda seen: seen.at)
        ends = [*(harmed.at for harmed in self.harms[1:]), math.inf]
        found = []
        for harmed, end in zip(self.harms, ends, strict=True):
            bad = [number for number, seen in enumerate(asked) if not _well(seen) and harmed.at <= seen.at < end]
            found.append(Recovery(harmed.name, len(bad), _steady_from(asked, bad[-1]) - harmed.at if bad else 0.0))
        return found

    def summary(self) -> str:
        """Some lines for whoever looks on."""
        load, recoveries = self.load, self.recoveries()
        whole = sorted(harmed.whole_after for harmed in self.harms if harmed.whole_after is not None)
        seconds = [recovery.seconds for recovery in recoveries]
        shown = f"{statistics.median(whole):.1f} s (median), at most {whole[-1]:.1f} s" if whole else "never"
        return "\n".join(
            (
                load.summary(),
                f"harmed: {dict(Counter(harmed.name for harmed in self.harms))}, each at most "
                f"{max((harmed.late for harmed in self.harms), default=0.0):.2f} s late",
                f"{self.failed() / len(load.seen):.2%} failed, {load.statuses()[0]} connections lost with an edge, "
                f"{sum(seen.degraded for seen in load.seen) / len(load.seen):.2%} degraded",
                f"right again after {max(seconds):.2f} s at most; noticed of {sum(map(bool, seconds))} of {len(seconds)} harms",
                f"two of each again after {shown}; {len(self.harms) - len(whole)} times not before the next harm",
                "; ".join(f"{each.name}: {each.failed} within {each.seconds:.2f} s" for each in recoveries if each.failed),
            )
        )

    def failed(self) -> int:
        """Calls that got an answer, but no verdict."""
        return sum(1 for seen in self.load.seen if seen.status not in (0, 200))

    def assert_stood(self, failures: float) -> None:
        """The invariants; `failures`: the part of all calls that may fail."""
        load = self.load
        load.assert_invariants(lost_connections=True)
        assert self.failed() <= failures * len(load.seen), self.summary()
        edges = sum(harmed.name == "edge" for harmed in self.harms)
        assert load.statuses()[0] <= load.rate * edges, "more than what a dead edge had in hand"
        assert max(recovery.seconds for recovery in self.recoveries()) <= recovery_limit(), self.summary()


def _well(seen: Seen) -> bool:
    return seen.status == 200 and seen.correct


def _steady_from(asked: Sequence[Seen], number: int) -> float:
    """When the first of the next so many right answers in a row was asked for; infinite when there are none."""
    run = 0
    for index in range(number, len(asked)):
        run = run + 1 if _well(asked[index]) else 0
        if run == STEADY:
            return asked[index - STEADY + 1].at
    return math.inf


async def blow(
    stack: Stack, load: Load, harm: Harm, *, seconds: float, every_seconds: float, wait_for_whole: bool, seed: int = 17
) -> Storm:
    """Harm a random process of a random service every `every_seconds`, from `FIRST_SECONDS` on, under `load`, for `seconds`.

    With `wait_for_whole` the next harm waits until there are two of each again: for a machine that needs longer than that to
    start a process, where else both replicas of a service would be away at times, which is another fault than the one tried.
    """
    storm, rng = Storm(load), random.Random(seed)
    watching: asyncio.Task[None] | None = None
    due = FIRST_SECONDS
    async with load.running():
        try:
            while due < seconds:
                await _until(load, due - CHOOSING_SECONDS)
                name, pid = await asyncio.to_thread(_victim, stack, rng)
                await _until(load, due)
                if watching is not None:
                    watching.cancel()
                storm.harms.append(Harmed(name, load.now, load.now - due))
                watching = asyncio.create_task(_watch(load, storm.harms[-1]))
                await harm(stack, pid)
                due += every_seconds
                if wait_for_whole:
                    async with asyncio.timeout(WHOLE_SECONDS):
                        await watching
                    due = max(due, load.now + CHOOSING_SECONDS)
            await _until(load, due)
        finally:
            if watching is not None:
                watching.cancel()
    return storm


def _victim(stack: Stack, rng: random.Random) -> tuple[str, int]:
    """A service, and a process of it. One whose replicas are both away is passed over."""
    for name in rng.sample(SERVICES, len(SERVICES)):
        if pids := stack.pids(name):
            return name, rng.choice(pids)
    raise AssertionError("no service is there")


async def _until(load: Load, moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - load.now))


async def _watch(load: Load, harmed: Harmed) -> None:
    """Until there are two of each again."""
    await asyncio.sleep(STALE_SECONDS)
    while not await two_of_each(load.session):
        await asyncio.sleep(0.2)
    harmed.whole_after = load.now - harmed.at


async def two_of_each(session: aiohttp.ClientSession) -> bool:
    """Whether /health says so."""
    try:
        async with session.get("/health") as response:
            services = (await response.json())["services"]
    except (aiohttp.ClientError, TimeoutError):  # the edge that was asked is the one that has just been killed
        return False
    return all(services.get(name, {}).get("replicas", 0) >= 2 for name in SERVICES)
