"""A scenario: a component, a fault, how long, and what is expected; played under a steady load of texts with known answers."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.chaos.kit import BENIGN, LATE_SECONDS, NOISE_SECONDS, RECOVERY_SECONDS, Caller, Load, Seen, callers, register
from tests.chaos.questions import DISTINCT, Question, question
from tests.chaos.rig import Rig

OK = frozenset({200})
REFUSED = OK | {503}
SHED = REFUSED | {429}
LATE = SHED | {504}

RATE = 20.0
STEADY = 15
"""So many answers in a row that are as they should be: the fault is over."""
START_SECONDS = 2.0
"""More than the promise for starting a Python service, which takes one second when nobody else wants the processors, and several
when load generator and servers share two of them."""
PROMPT_SECONDS = 0.25
"""What cannot be answered is refused within so long, and not at its deadline."""


def crowding() -> float:
    """How many want each processor, 1 at the least: so much longer everything takes on a machine that others use as well."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def recovery_limit() -> float:
    """The promise, and what it does not know of this machine."""
    return RECOVERY_SECONDS + START_SECONDS * crowding()


Fault = Callable[[Rig], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class During:
    """What a probe is given. `key`: registered before the fault, 30 units a minute, one of them used."""

    rig: Rig
    session: aiohttp.ClientSession
    load: Load
    key: str
    began: float
    """When the fault began, in the time of the load."""


Probe = Callable[[During], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One cell of the matrix. `seconds`: how long the fault stays once it is there; 0: it is over by itself (a death).

    `statuses`: all that callers may see; 0 is a connection that was lost with the process behind it. `shows`: what tells that the
    fault was there: `failures`, `degraded`, `slower`, a path of /health with its value (`stores.redis=down`), or nothing where
    the fault itself has been waited for. `prompt`: refusals come at once; else they may come at the deadline. `job`: one is
    accepted before, and must have all its results after. `callers`, `operator`: for the page.
    """

    component: str
    fault: str
    does: Fault
    seconds: float
    callers: str
    operator: str
    statuses: frozenset[int] = OK
    shows: str = ""
    prompt: bool = True
    deadline_seconds: float = 2.0
    engine: bool = False
    job: bool = False
    probes: tuple[Probe, ...] = ()
    afterwards: tuple[Probe, ...] = ()
    short: bool = False

    @property
    def name(self) -> str:
        return f"{self.component}-{self.fault.replace(' ', '_')}"


@dataclass(frozen=True, slots=True)
class Report:
    """Seconds from the end of the fault to the last answer that was not as it should be; milliseconds otherwise."""

    recovery_seconds: float
    before_ms: float
    during_ms: float
    summary: str

    def __str__(self) -> str:
        medians = f"median {self.before_ms:.0f} → {self.during_ms:.0f} ms"
        return f"recovered after {self.recovery_seconds:.1f} s; {medians}; {self.summary}"


async def play(rig: Rig, scenario: Scenario) -> Report:
    """Raises AssertionError when an invariant or what is expected does not hold."""
    await asyncio.to_thread(rig.use_engine, scenario.engine)
    rig.engine.asked.clear()
    async with callers(rig.stack) as session:
        await _healthy(rig, session)
        key = await _limited_key(session)
        job = await _Job.submit(rig, session) if scenario.job else None
        load = Load(session, rig.stack.key, RATE, scenario.deadline_seconds, distinct=None if scenario.engine else DISTINCT)
        async with load.running():
            await steady(load, 0.0, 30)
            fault = scenario.does(rig)
            began = load.now
            await asyncio.to_thread(fault.__enter__)
            try:
                during = During(rig, session, load, key, began)
                await asyncio.gather(
                    asyncio.sleep(scenario.seconds), _shown(scenario, during, began), *(p(during) for p in scenario.probes)
                )
            finally:
                over = load.now if scenario.seconds else began
                await asyncio.to_thread(fault.__exit__, None, None, None)
            await steady(load, load.now if scenario.seconds else began, 30)
        await _healthy(rig, session)
        for probe in scenario.afterwards:
            await probe(during)
        if job is not None:
            await job.assert_whole()
    return _judge(rig, scenario, load, began, over)


def _judge(rig: Rig, scenario: Scenario, load: Load, began: float, over: float) -> Report:
    load.assert_invariants(lost_connections=0 in scenario.statuses)
    assert set(load.statuses()) <= scenario.statuses, load.summary()
    if scenario.prompt:
        slow = [seen for seen in load.seen if seen.status == 503 and seen.latency > PROMPT_SECONDS + NOISE_SECONDS * crowding()]
        # Of many, one may have met a processor that others had just then.
        assert len(slow) <= max(1, len(load.seen) // 50), (load.summary(), slow)
    if scenario.shows == "failures":
        assert any(seen.status != 200 for seen in load.since(began - 1)), "nothing was seen of the fault"
    recovery = max((seen.at - over for seen in load.seen if not well(seen)), default=0.0)
    report = Report(max(0.0, recovery), _median(load, 0.0, began), _median(load, began, max(over, began + 1)), load.summary())
    assert recovery <= recovery_limit(), report
    assert scenario.shows != "slower" or report.during_ms > report.before_ms, report
    if rig.with_engine:
        late = [at - load.deadlines[text] for at, text in rig.engine.asked if at > load.deadlines.get(text, at) + LATE_SECONDS]
        assert not late, f"executed {max(late):.2f} s after its deadline"
    return report


def well(seen: Seen) -> bool:
    return seen.status == 200 and not seen.degraded


def _median(load: Load, start: float, end: float) -> float:
    return 1000 * statistics.median([seen.latency for seen in load.seen if start <= seen.at < end] or [0.0])


async def steady(load: Load, since: float, timeout_seconds: float) -> None:
    """Until so many that were asked after `since` have been answered well, one after the other."""
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                recent = sorted(load.since(since), key=lambda seen: seen.at)[-STEADY:]
                if len(recent) == STEADY and all(map(well, recent)):
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not well again after {timeout_seconds} s: {load.summary()}") from None


async def submit(session: aiohttp.ClientSession, key: str, items: int) -> int:
    """The status of a submission."""
    headers = {"X-API-Key": key, "Content-Type": "application/x-ndjson", "Prefer": "respond-async"}
    lines = b"".join(map(_line, range(items)))
    async with session.post("/v1/detect/batch", data=lines, headers=headers) as response:
        await response.read()
        return response.status


async def _healthy(rig: Rig, session: aiohttp.ClientSession) -> None:
    """Until everything says that it is as it should be: the stores, the engine and its breaker, every service."""
    async with asyncio.timeout(60):
        while await _health(session, "status") != "healthy":
            # A breaker that is half open waits for a call.
            await ask(session, rig.stack.key)
            await asyncio.sleep(0.1)


async def _shown(scenario: Scenario, during: During, began: float) -> None:
    """Wait until the fault shows, where that can be waited for."""
    async with asyncio.timeout(max(scenario.seconds, 20)):
        if scenario.shows == "degraded":
            while not any(seen.degraded for seen in during.load.since(began)):
                await asyncio.sleep(0.05)
        elif "=" in scenario.shows:
            path, _, value = scenario.shows.partition("=")
            while await _health(during.session, path) != value:
                await asyncio.sleep(0.1)


async def _health(session: aiohttp.ClientSession, path: str) -> object:
    async with session.get("/health") as response:
        found: Any = await response.json()
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


async def _limited_key(session: aiohttp.ClientSession) -> str:
    key = await register(session, rate_limit_per_minute=LIMIT)
    assert await ask(session, key) == 200
    return key


LIMIT = 30
"""Of the key that probes are given."""


async def ask(session: aiohttp.ClientSession, key: str, text: str | None = None) -> int:
    """The status of one detection of somebody else than the load."""
    asked = BENIGN if text is None else text
    headers = {"X-API-Key": key, "X-Request-Timeout": "5"}
    async with session.post("/v1/detect", json={"text": asked}, headers=headers) as response:
        await response.read()
        return response.status


class _Job:
    """A job that was accepted before the fault."""

    def __init__(self, caller: Caller, job_id: str) -> None:
        self._caller = caller
        self._id = job_id

    ITEMS = 60

    @classmethod
    async def submit(cls, rig: Rig, session: aiohttp.ClientSession) -> _Job:
        caller = Caller(session, rig.stack.key, patience_seconds=90)
        lines = b"".join(_line(number) for number in range(cls.ITEMS))
        return cls(caller, await caller.submit(lines, f"fault-{asyncio.get_running_loop().time()}"))

    async def assert_whole(self) -> None:
        job = await self._caller.wait(self._id)
        assert (job["state"], job["done"], job["failed"]) == ("done", self.ITEMS, 0), job
        found = {line["index"]: line for line in await self._caller.results(self._id)}
        assert len(found) == self.ITEMS
        wrong = [index for index, line in found.items() if line["is_malicious"] is not _item(index).malicious]
        assert not wrong


def _item(number: int) -> Question:
    """Other texts than the load's, about whose deadlines nothing is to be learnt from these."""
    return question(1_000_000 + number)


def _line(number: int) -> bytes:
    return json.dumps({"id": str(number), "text": _item(number).text}).encode() + b"\n"
