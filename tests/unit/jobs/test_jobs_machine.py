"""Submissions, cancellations, replicas that work at once and die in the middle, stores that fail before and after doing what they
were asked: in any order, against what must hold of every job at every moment, and at the end when all is well again.

The fakes answer after a drawn number of steps, so that what runs at once takes turns in drawn orders.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from libs.common.contracts import (
    DetectItems,
    ItemResult,
    ItemResults,
    JobAppend,
    JobCreate,
    JobItem,
    JobSeal,
    JobState,
    JobStatus,
    Principal,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs.core import LOST, MAX_FAILURES, JobRecord
from services.jobs.desk import Bounds, Desk
from services.jobs.ports import RecordMovedError
from services.jobs.runner import PROBE_TEXT, Pace, Runner
from tests.fuzz.budget import examples
from tests.unit.jobs.fakes import (
    BENIGN,
    BROKEN,
    MALICIOUS,
    FakeBackend,
    FakeDelivery,
    FakeQueues,
    FakeRecords,
    FakeResults,
    clock_at,
)

T = TypeVar("T")
AWAY = PortcullisError(ErrorCode.STAGE_UNAVAILABLE)
KEYS = ("aaaabbbbcccc", "ddddeeeeffff")
PACE = Pace(slots=2, message_items=4, keep_seconds=5, max_run_ms=86_400_000)
NEXT: dict[JobState, set[JobState]] = {
    "open": {"open", "queued", "running", "done", "failed", "cancelled"},
    "queued": {"queued", "running", "done", "failed", "cancelled"},
    "running": {"running", "done", "failed", "cancelled"},
    "done": {"done"},
    "failed": {"failed"},
    "cancelled": {"cancelled"},
}
"""Between two looks; several steps may have been taken."""
LONGEST_LOOK_STEPS = 300
MOST_JOBS = 8
VERDICTS = {"good": BENIGN, "bad": MALICIOUS, "broken": BROKEN}
"""By the first word of a text. `poison` ends whoever judges it, and the message with it."""


class Weather:
    """How the fakes answer: after how many steps of the loop, and how often they fail instead of or after doing it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.failures = 0.0

    async def passes(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    def fails(self) -> bool:
        return self.rng.random() < self.failures


@dataclass(eq=False)
class Process:
    """One replica, or one caller's: all that it asks goes through here, so that it can be dead from one step to the next."""

    weather: Weather
    dead: bool = False
    in_hand: set[Handed] = field(default_factory=set)

    async def ask(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **named: Any) -> T:
        await self.weather.passes()
        self._end()
        if self.weather.fails():
            raise AWAY
        answer = await call(*arguments, **named)
        await self.weather.passes()
        self._end()
        if self.weather.fails():
            raise AWAY  # it has been done, and the answer is lost
        return answer

    def _end(self) -> None:
        """Whatever it still does, nothing of it reaches anybody."""
        if self.dead:
            raise asyncio.CancelledError


@dataclass(eq=False)
class Handed:
    """`Delivery`: as the server has it, an item that was acknowledged or whose queue is closed is nobody's any more."""

    process: Process
    of: FakeDelivery

    @property
    def index(self) -> int:
        return self.of.index

    @property
    def item(self) -> JobItem | None:
        return self.of.item

    @property
    def redelivered(self) -> bool:
        return self.of.redelivered

    async def done(self) -> None:
        await self.process.ask(self._done)
        self.process.in_hand.discard(self)

    async def _done(self) -> None:
        self.of.queue.ready.discard(self.index)
        await self.of.done()

    async def give_back(self, delay_seconds: float) -> None:
        await self.process.ask(self._give_back, delay_seconds)
        self.process.in_hand.discard(self)

    async def _give_back(self, delay_seconds: float) -> None:
        if self.index in self.of.queue.in_hand:
            await self.of.give_back(delay_seconds)

    async def keep(self) -> None:
        await self.process.ask(self.of.keep)


class Asked:
    """A fake, asked by a process."""

    def __init__(self, process: Process, fake: Any) -> None:
        self._process = process
        self._fake = fake

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def ask(*arguments: Any, **named: Any) -> Any:
            return await self._process.ask(getattr(self._fake, name), *arguments, **named)

        return ask


class AskedQueues(Asked):
    async def append(self, key_id: str, job_id: str, first_index: int, items: Sequence[JobItem]) -> None:
        await self._process.ask(self._append, key_id, job_id, first_index, items)

    async def _append(self, key_id: str, job_id: str, first_index: int, items: Sequence[JobItem]) -> None:
        if (key_id, job_id) in self._fake.open_queues:  # else they are stored where nobody looks
            await self._fake.append(key_id, job_id, first_index, items)

    async def fetch(self, key_id: str, job_id: str, most: int, wait_seconds: float) -> list[Handed]:
        return await self._process.ask(self._fetch, key_id, job_id, most, wait_seconds)

    async def _fetch(self, key_id: str, job_id: str, most: int, wait_seconds: float) -> list[Handed]:
        if (key_id, job_id) not in self._fake.open_queues:
            raise AWAY
        handed = [Handed(self._process, each) for each in await self._fake.fetch(key_id, job_id, most, wait_seconds)]
        self._process.in_hand |= set(handed)
        return handed


class Backend(FakeBackend):
    """By key, what was granted. `away`: nobody judges anything."""

    def __init__(self) -> None:
        super().__init__()
        self.verdict = self._verdict
        self.granted: dict[str, int] = dict.fromkeys(KEYS, 0)

    def _verdict(self, text: str) -> ItemResult | PortcullisError:
        word = text.split()[0]
        return AWAY if word == "poison" else VERDICTS[word]

    async def take(self, key_id: str, units: int) -> Any:
        admission = await super().take(key_id, units)
        self.granted[key_id] += admission.granted
        return admission

    async def judge(self, items: DetectItems) -> ItemResults:
        if items.texts == (PROBE_TEXT,) and self.failure is None:
            self.granted[items.key_id] += 1  # it says so itself: asking whether anything can be judged costs the key a unit
            return ItemResults(results=(BENIGN,))
        return await super().judge(items)


@dataclass
class Submitted:
    """What was asked for, whether or not it was accepted. `accepted`: somebody was told so, and it must not be lost."""

    key_id: str
    texts: tuple[str, ...]
    accepted: bool = False
    cancelled: bool = False


class JobsMachine(RuleBasedStateMachine):
    @initialize(replicas=st.integers(1, 3), seed=st.integers())
    def begin(self, replicas: int, seed: int) -> None:
        self.loop = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.weather = Weather(random.Random(seed))
        self.records, self.queues, self.results = FakeRecords(), FakeQueues(), FakeResults()
        self.backend = Backend()
        self.clock = clock_at(1_000_000)
        self.replicas = [self.replica() for _ in range(replicas)]
        self.submitted: dict[str, Submitted] = {}
        self.claimed: dict[tuple[str, str], tuple[str, str]] = {}
        self.seen: dict[str, JobRecord] = {}
        self.first: dict[tuple[str, int], ItemResult] = {}
        self.outages = 0

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            try:
                self.all_is_well_again()
            finally:
                self.loop.close()

    def ports(self, process: Process) -> tuple[Any, Any, Any]:
        return Asked(process, self.records), AskedQueues(process, self.queues), Asked(process, self.results)

    def replica(self) -> tuple[Process, Runner]:
        process = Process(self.weather)
        records, queues, results = self.ports(process)
        backend: Any = Asked(process, self.backend)
        rng = random.Random(self.weather.rng.random())
        return process, Runner(records, queues, results, backend, self.clock, PACE, rng=rng, sleep=lambda _: asyncio.sleep(0))

    def desk(self) -> Desk:
        process = Process(self.weather)
        records, queues, results = self.ports(process)
        bounds = Bounds(items=100, stored_bytes=100_000, open_per_key=20, open_in_all=30)
        return Desk(records, queues, results, self.clock, bounds, webhook_refusal=lambda _: None, kick=lambda: None)

    # --- what can happen --------------------------------------------------------------------------------------------------

    async def submit(self, key_id: str, texts: tuple[str, ...], idempotency: str | None) -> None:
        """As the edge does, which tries a step again when it may have been done."""
        job_id = f"{len(self.submitted):028x}"
        self.submitted[job_id] = Submitted(key_id, texts)
        principal = Principal(key_id=key_id, scopes=("batch",), limit_minute=70, limit_day=500)
        digest = " ".join(texts)
        desk = self.desk()
        try:
            opened = await again(lambda: desk.create(principal, JobCreate(idempotency=idempotency), job_id))
            if not opened.sealed:
                for index, text in enumerate(texts):
                    append = JobAppend(job_id=opened.job_id, first_index=index, items=(JobItem(text=text),))
                    await again(lambda append=append: desk.append(principal, append))  # type: ignore[misc]
            seal = JobSeal(job_id=opened.job_id, total=len(texts), digest=digest)
            status = await again(lambda: desk.seal(principal, seal))
        except PortcullisError as refusal:
            if refusal.code not in (ErrorCode.STAGE_UNAVAILABLE, ErrorCode.CONFLICT, ErrorCode.OVERLOADED):
                raise
            return
        self.accepted(status, job_id, key_id, texts, idempotency)

    def accepted(self, status: JobStatus, job_id: str, key_id: str, texts: tuple[str, ...], idempotency: str | None) -> None:
        assert status.total == len(texts)
        job = self.submitted[status.job_id]
        assert (job.key_id, job.texts) == (key_id, texts)
        if idempotency is None:
            assert status.job_id == job_id
        else:
            assert self.claimed.setdefault((key_id, idempotency), (status.job_id, " ".join(texts))) == (
                status.job_id,
                " ".join(texts),
            ), "two jobs for one Idempotency-Key"
        job.accepted = True

    async def cancel(self, job_id: str) -> None:
        job = self.submitted[job_id]
        principal = Principal(key_id=job.key_id, scopes=("batch",), limit_minute=70, limit_day=500)
        job.cancelled = True
        try:
            status = await self.desk().cancel(principal, job_id)
        except PortcullisError as refusal:
            if refusal.code not in (ErrorCode.STAGE_UNAVAILABLE, ErrorCode.NOT_FOUND, ErrorCode.CONFLICT):
                raise
        else:
            assert status.state in ("done", "failed", "cancelled")

    async def work(self, number: int) -> None:
        """A look of one replica, and two turns at once."""
        process, runner = self.replicas[number % len(self.replicas)]

        async def turn() -> None:
            if (mine := runner._schedule.take(self.clock.monotonic(), PACE.message_items)) is not None:
                try:
                    await runner._guarded(runner.turn(*mine), "a turn")
                finally:
                    runner._schedule.done(*mine[:2])

        await runner._guarded(runner.look(), "a look")
        await asyncio.gather(turn(), turn())
        if not process.dead:
            self.let_go(process)

    def let_go(self, process: Process) -> None:
        """The server hands out again what nobody has acknowledged, and nobody goes on with."""
        for handed in process.in_hand:
            if handed.index in handed.of.queue.in_hand:
                handed.of.queue.ready.add(handed.index)
        process.in_hand.clear()

    async def die(self, number: int, after_steps: int) -> None:
        """One replica is gone in the middle of its work, if it has any, and another begins in its place."""
        process, _ = self.replicas[number % len(self.replicas)]
        for _ in range(LONGEST_LOOK_STEPS):
            if process.in_hand:
                break
            await asyncio.sleep(0)
        for _ in range(after_steps):
            await asyncio.sleep(0)
        process.dead = True

    @precondition(lambda self: len(self.submitted) < MOST_JOBS)
    @rule(
        key_id=st.sampled_from(KEYS),
        texts=st.lists(st.sampled_from(["good", "good", "bad", "broken", "poison"]), min_size=1, max_size=7),
        idempotency=st.sampled_from([None, None, "one", "two"]),
    )
    def a_submission(self, key_id: str, texts: list[str], idempotency: str | None) -> None:
        named = tuple(f"{word} {number}" for number, word in enumerate(texts))
        self.loop.run(self.submit(key_id, named, idempotency))

    @rule(
        workers=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        dies=st.none() | st.tuples(st.integers(0, 2), st.integers(0, 30)),
        cancels=st.none() | st.integers(0, 100),
        submits=st.none() | st.sampled_from(["one", "two"]),
    )
    def at_once(self, workers: list[int], dies: tuple[int, int] | None, cancels: int | None, submits: str | None) -> None:
        async def together() -> None:
            others: list[Coroutine[Any, Any, None]] = []
            if cancels is not None and self.submitted:
                others.append(self.cancel(sorted(self.submitted)[cancels % len(self.submitted)]))
            if submits is not None and len(self.submitted) < MOST_JOBS:
                others += [self.submit(KEYS[0], ("good 0", "bad 1"), submits) for _ in range(2)]
            tasks = [asyncio.create_task(self.work(number)) for number in {number % len(self.replicas) for number in workers}]
            ends = [asyncio.create_task(each) for each in others]
            if dies is not None:
                await self.die(*dies)
            await asyncio.gather(*ends)
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
            for number, (process, _) in enumerate(self.replicas):
                if process.dead:
                    self.let_go(process)
                    self.replicas[number] = self.replica()

        self.loop.run(together())
        self.clock.advance(2)

    @rule(job=st.integers(0, 100))
    def a_cancellation(self, job: int) -> None:
        if self.submitted:
            self.loop.run(self.cancel(sorted(self.submitted)[job % len(self.submitted)]))

    @rule(failures=st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.2]))
    def the_weather_changes(self, failures: float) -> None:
        self.weather.failures = failures

    @rule(away=st.booleans())
    def nobody_judges(self, away: bool) -> None:
        self.outages += away and self.backend.failure is None
        self.backend.failure = AWAY if away else None

    @rule(room=st.integers(0, 12))
    def limits(self, room: int) -> None:
        self.backend.room = room

    @rule(seconds=st.sampled_from([0.5, 5.0, 40.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- what holds -------------------------------------------------------------------------------------------------------

    @invariant()
    def all_holds(self) -> None:
        self.every_record_goes_forward()
        self.what_is_counted_is_what_is_stored()
        self.every_item_has_one_result_and_its_own()
        self.what_was_accepted_is_not_lost()
        self.no_more_is_judged_than_the_limits_gave()

    def every_record_goes_forward(self) -> None:
        for kept in self.records.kept.values():
            record = kept.record
            before = self.seen.get(record.job_id, record)
            assert record.state in NEXT[before.state], (before.state, record.state)
            for count in ("done", "malicious", "failed", "position", "total"):
                assert getattr(record, count) >= getattr(before, count)
            assert record.done <= record.total
            self.seen[record.job_id] = record

    def what_is_counted_is_what_is_stored(self) -> None:
        for kept in self.records.kept.values():
            record = kept.record
            stored = [entry for (job_id, _), entry in self.results.stored.items() if job_id == record.job_id]
            counted = [result.result for place, result in stored if place <= record.position]
            assert record.done == len(counted)
            assert record.failed == sum(result.verdict is None for result in counted)
            assert record.malicious == counted.count(MALICIOUS)
            if record.state == "done":
                assert record.done == record.total == len(stored)

    def every_item_has_one_result_and_its_own(self) -> None:
        for (job_id, index), (_, stored) in self.results.stored.items():
            result = self.first.setdefault((job_id, index), stored.result)
            assert result == stored.result, "a result was changed"
            word = self.submitted[job_id].texts[index].split()[0]
            assert result in (VERDICTS.get(word), result if result.error is not None else None)
            if result.error is None:
                continue
            assert result.error.detail != LOST
            assert any((letter.job_id, letter.index) == (job_id, index) for letter in self.results.letters)
            # What is sound is given up only when it failed alone, and others did not, in as many outages.
            assert word in ("broken", "poison") or self.outages >= MAX_FAILURES

    def what_was_accepted_is_not_lost(self) -> None:
        for job_id, job in self.submitted.items():
            if not job.accepted:
                continue
            record = self.records.of(job_id, job.key_id)
            if record.state in ("queued", "running"):
                queue = self.queues.open_queues[job.key_id, job_id]
                for index in range(record.total):
                    assert index in queue.items or (job_id, index) in self.results.stored
            assert record.state != "failed"
            assert record.state != "cancelled" or job.cancelled

    def no_more_is_judged_than_the_limits_gave(self) -> None:
        for key_id in KEYS:
            verdicts = [
                stored
                for (job_id, _), (_, stored) in self.results.stored.items()
                if self.submitted[job_id].key_id == key_id and stored.result.verdict is not None
            ]
            assert len(verdicts) <= self.backend.granted[key_id]

    def all_is_well_again(self) -> None:
        """Then everything that was accepted comes to its end, with one result for each text."""
        self.weather.failures, self.backend.failure, self.backend.room = 0.0, None, 1_000_000

        def over() -> bool:
            return all(self.records.of(name, job.key_id).over for name, job in self.submitted.items() if job.accepted)

        for _ in range(500):  # an item that ends whoever works on it is given up after some ten messages of its own
            if over():
                break
            for number in range(len(self.replicas)):
                self.loop.run(self.work(number))
                self.all_holds()
            self.clock.advance(2)
        assert over(), [kept.record for kept in self.records.kept.values()]
        for job_id, job in self.submitted.items():
            if job.accepted and self.records.of(job_id, job.key_id).state == "done":
                assert set(self.results.of(job_id)) == set(range(len(job.texts)))


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """Ask a second time when it may have been done, or somebody else was faster."""
    try:
        return await call()
    except RecordMovedError:
        return await call()
    except PortcullisError as error:
        if error.code != ErrorCode.STAGE_UNAVAILABLE:
            raise
        return await call()


JobsMachine.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40)
TestJobsMachine = JobsMachine.TestCase
