"""Running jobs: whose turn it is, units for it, its items to the proxy, their results into the stream, and the end of it.

Every replica runs every job; the queues (durable consumers) share the items out. The stored result decides: an item that comes
back after a crash and has a result is done, and a result that is stored a second time stays the first. How far a job is follows
from its results alone, by position, whoever counts.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from libs.common import tasks, tracing
from libs.common.clock import Clock
from libs.common.contracts import DeadLetter, DetectItems, ItemResult, JobResult, encode
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import JOB_ITEMS_STREAM
from services.jobs import core, metrics
from services.jobs.core import Doubts, JobRecord, Purse, Queue, Schedule
from services.jobs.desk import COUNT_MESSAGES, change_record, count_late
from services.jobs.ports import Backend, Delivery, Kept, Queues, RecordMovedError, Records, Results

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often a replica looks for what others have accepted or finished, while there are jobs."""
IDLE_LOOK_SECONDS = 2.0
"""The same while there are none. A job is begun at once by the replica that accepted it; only its help comes later."""
COUNT_SECONDS = 1.0
"""How often a running job's results are counted."""
MOST_PER_JOB = 2
"""Messages of one job that a replica has in flight."""
MOST_CHARACTERS = 32_000
"""Of one message, unless a single text is longer: half a second of a worker's time."""
MAX_RESULT_BYTES = 900_000
"""So that a page of results holds at least one."""
STOP_SECONDS = 3.0
"""How long messages in hand may take when the process is about to stop."""
ABANDONED_SECONDS = 600.0
"""A submission to which nothing has been added for so long is given up; until then it is one of the open jobs of its key."""
PAUSE_SECONDS = (0.2, 2.0)
"""The first and the longest pause of a job after a message that came to nothing, for no fault of its items. Short: asking again
costs one message, and where things keep dying there may be but seconds in which all of them are there."""
PROBE_TEXT = "Hello."
FETCH_SECONDS = 1.0
"""How long a replica waits for items that nobody has had yet."""
AGAIN_SECONDS = 0.1
"""How long a replica waits for items that were handed out before: given back, or in the hands of somebody who has died."""
BLOCK_SECONDS = (0.05, 30.0)
"""The least and the most that a key waits for units; its limits may be raised in the meantime."""


_SPAN = f"process {JOB_ITEMS_STREAM}"
_SPAN_ATTRIBUTES = tracing.messaging("process", JOB_ITEMS_STREAM)


@dataclass(frozen=True, slots=True)
class Pace:
    """How much one replica has in hand. `max_run_ms`: how long a job may take."""

    slots: int
    message_items: int
    keep_seconds: float
    max_run_ms: int


@dataclass(slots=True)
class _Hand:
    """What one turn has in hand. `used`: units of the key's limits that went into results; `since`: when they were taken.
    `last`: nothing more waited when it was filled."""

    held: set[Delivery] = field(default_factory=set)
    used: int = 0
    since: float = 0.0
    last: bool = False


class Runner:
    """`run` for ever; `kick` when there is something new."""

    def __init__(
        self,
        records: Records,
        queues: Queues,
        results: Results,
        backend: Backend,
        clock: Clock,
        pace: Pace,
        *,
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._records = records
        self._queues = queues
        self._results = results
        self._backend = backend
        self._clock = clock
        self._pace = pace
        self._rng = rng
        self._sleep = sleep
        self._schedule = Schedule(MOST_PER_JOB)
        self._purse = Purse()
        self._doubts = Doubts()
        self._pauses: dict[str, tuple[float, float]] = {}
        """Job → the length of its last pause in seconds, and when that ends (monotonic)."""
        self._sealed: dict[str, JobRecord] = {}
        self._counted_at: dict[str, float] = {}
        self._hands: dict[str, list[_Hand]] = {}
        self._handed_out: set[str] = set()
        self._emptied: set[str] = set()
        """Jobs of which nothing waits any more, and something is in our hands."""
        self._changed = asyncio.Event()
        self._has_jobs = False
        self._look = asyncio.Event()
        self._stopping = False

    def kick(self) -> None:
        self._look.set()

    async def run(self) -> None:
        """Until `finish`."""
        looking = asyncio.create_task(self._keep_looking())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._pace.slots):
                    group.create_task(self._keep_working())
        finally:
            await tasks.end(looking)

    async def finish(self, task: asyncio.Task[None]) -> None:
        """End `task`, which is `run`: take no more, and give what is in hand some time."""
        self._stopping = True
        self._changed.set()
        await asyncio.wait({task}, timeout=STOP_SECONDS)
        await tasks.end(task)

    # --- what there is to do ---------------------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            self._look.clear()
            await self._guarded(self.look(), "looking for work")
            self._changed.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if self._has_jobs else IDLE_LOOK_SECONDS):
                    await self._look.wait()

    async def look(self) -> None:
        """See what there is to do; count, end and clean up what is due."""
        queues = await self._queues.all()
        self._has_jobs = bool(queues)
        metrics.OPEN.set(len(queues))
        metrics.WAITING.set(sum(queue.waiting for queue in queues))
        metrics.IN_HAND.set(sum(queue.in_hand for queue in queues))
        runnable = [queue for queue in queues if await self._is_sealed(queue)]
        # What waits is what was never handed out. An item that is given back, or whose replica dies, is not counted there:
        # it stays among those in hand until somebody asks for it, so that what is not in our hands is worth asking for.
        self._handed_out = {queue.job_id for queue in runnable if not queue.waiting}
        self._schedule.refresh(
            replace(queue, waiting=queue.waiting + max(0, queue.in_hand - self._in_our_hands(queue.job_id))) for queue in runnable
        )
        self._changed.set()
        present = {queue.job_id for queue in queues}
        for job_id in self._sealed.keys() - present:
            self._forget(job_id)
        for queue in runnable:
            await self._guarded(self.attend(queue), "counting a job")

    async def _is_sealed(self, queue: Queue) -> bool:
        """Whether a queue's job may run; one that is left over is removed."""
        if queue.job_id in self._sealed:
            return True
        kept = await self._records.get(queue.key_id, queue.job_id)
        if kept is not None and kept.record.total:
            self._sealed[queue.job_id] = kept.record
            return True
        if kept is not None and kept.record.over:
            await self._queues.close(queue.key_id, queue.job_id)
        elif self._now_ms() - (kept.record.updated_ms if kept is not None else queue.created_ms) > ABANDONED_SECONDS * 1000:
            if kept is not None:
                now_ms = self._now_ms()
                await change_record(
                    self._records,
                    kept,
                    lambda record: core.end(record, "cancelled", None, now_ms) if record.state == "open" else record,
                )
            log.warning("a submission of %s was never completed", queue.key_id)
            await self._queues.close(queue.key_id, queue.job_id)
        return False

    async def attend(self, queue: Queue) -> None:
        """Count a job's results, and end it when that is due. `queue`: as it was seen before."""
        now = self._clock.monotonic()
        drained = not queue.waiting and not queue.in_hand
        if not drained and now - self._counted_at.get(queue.job_id, -COUNT_SECONDS) < COUNT_SECONDS:
            return
        self._counted_at[queue.job_id] = now
        kept = await self._records.get(queue.key_id, queue.job_id)
        if kept is None:  # it was kept for as long as jobs are
            await self._queues.close(queue.key_id, queue.job_id)
            return
        record = kept.record
        if not record.over:
            if not drained and self._now_ms() - record.updated_ms < COUNT_SECONDS * 500 and record.state == "running":
                return  # another replica has just counted
            record = await self._count(kept, drained=drained)
        if record.over:
            await self._finish(record)

    async def _count(self, kept: Kept, *, drained: bool) -> JobRecord:
        record = kept.record
        while True:
            found = await self._results.outcomes(record.key_id, record.job_id, record.position, COUNT_MESSAGES)
            record = core.count(record, [(place, outcome) for place, _, outcome in found], self._now_ms())
            if record.over or len(found) < COUNT_MESSAGES:
                break
        if not record.over and (expired := core.expire(record, self._now_ms(), self._pace.max_run_ms)) is not None:
            record = expired
        elif not record.over and drained and record.done < record.total:
            await self._replace_lost(record)
        if record is not kept.record:
            try:
                await self._records.update(record, kept.revision)
            except RecordMovedError:
                return kept.record  # another replica was faster; the next look sees it
            if record.over:
                metrics.ENDED.labels(record.state).inc()
        return record

    async def _replace_lost(self, record: JobRecord) -> None:
        """Nothing waits and nobody has anything in hand: items without a result do not exist any more. Say so in their place."""
        present: set[int] = set()
        position = 0
        while found := await self._results.outcomes(record.key_id, record.job_id, position, COUNT_MESSAGES):
            present |= {index for _, index, _ in found}
            position = found[-1][0]
        missing = [index for index in range(record.total) if index not in present]
        queue = await self._queues.one(record.key_id, record.job_id)
        if queue is None or queue.waiting or queue.in_hand:
            return
        for index in missing:
            # A server of a cluster that has been away tells of its queues and results what it knew then.
            if await self._queues.has(record.key_id, record.job_id, index):
                return
            if await self._results.has(record.key_id, record.job_id, index):
                continue
            log.error("item %d of %s is lost", index, record.job_id)
            await self._bury(record, index, None, core.error_result(ErrorCode.INTERNAL, core.LOST), core.LOST)

    async def _finish(self, record: JobRecord) -> None:
        """What is left to do once a job is over; all of it can be done again by whoever comes next."""
        if record.webhook_url is not None and record.state != "cancelled":
            await self._results.announce(record.key_id, record.job_id)
        await self._queues.close(record.key_id, record.job_id)
        self._schedule.drop(record.key_id, record.job_id)
        self._forget(record.job_id)
        log.info("job %s is %s", record.job_id, record.state)

    def _forget(self, job_id: str) -> None:
        self._sealed.pop(job_id, None)
        self._counted_at.pop(job_id, None)
        self._pauses.pop(job_id, None)
        self._doubts.forget_job(job_id)

    # --- work ------------------------------------------------------------------------------------------------------------

    async def _keep_working(self) -> None:
        while not self._stopping:
            worked = False
            turn = self._schedule.take(self._clock.monotonic(), self._pace.message_items)
            if turn is not None:
                key_id, job_id, most = turn
                try:
                    worked = await self._guarded(self.turn(key_id, job_id, most), "running a job") is True
                finally:
                    self._schedule.done(key_id, job_id)
            if not worked and not self._stopping:
                self._changed.clear()
                with suppress(TimeoutError):
                    # A job that is blocked becomes ready by the clock; where there is none, nothing does.
                    async with asyncio.timeout(LOOK_SECONDS / 2 if self._schedule.has_waiting else None):
                        await self._changed.wait()

    async def turn(self, key_id: str, job_id: str, most: int) -> bool:
        """One turn of a job: some of its items, from the queue to their results. Whether there were any."""
        record = self._sealed.get(job_id)
        if record is None:
            return False
        # A trace of its own, that goes back to the submission: that of a job of many items would never end.
        span = tracing.root(_SPAN, tracing.CONSUMER, shared=_SPAN_ATTRIBUTES, link=record.traceparent)
        tracing.enter(span.traceparent, span or None)
        worked = False
        try:
            worked = await self._turn(record, most)
        except BaseException as error:
            span.fail(tracing.word_for(error))
            raise
        finally:
            tracing.enter("")
            if worked or span.error:
                span.set("portcullis.job_id", job_id)
                span.set("portcullis.key_id", key_id)
                span.end()
        return worked

    async def _turn(self, record: JobRecord, most: int) -> bool:
        key_id, job_id = record.key_id, record.job_id
        units, degraded = 0, False
        hand = _Hand()
        self._hands.setdefault(job_id, []).append(hand)
        try:
            if job_id in self._handed_out:  # there may be nothing: units only for what there is
                hand.held |= set(await self._queues.fetch(key_id, job_id, most, AGAIN_SECONDS))
                if hand.held:
                    units, degraded = await self._units(record, len(hand.held), hand)
                    if not units:
                        return False
                for delivery in sorted(hand.held, key=lambda delivery: delivery.index)[units:]:
                    await delivery.give_back(PAUSE_SECONDS[0])
                    hand.held.discard(delivery)
            else:
                units, degraded = await self._units(record, most, hand)
                if not units:
                    return False
                hand.held |= set(await self._queues.fetch(key_id, job_id, units, FETCH_SECONDS))
                hand.last = len(hand.held) < units
            if not hand.held:
                self._schedule.drop(key_id, job_id)  # until the next look
                return False
            tracing.annotate("messaging.batch.message_count", len(hand.held))
            if record.state == "queued":
                await self._start(record)
            await self._process(record, hand, degraded)
        finally:
            self._put_down(job_id, hand)
            self._purse.put(key_id, units - hand.used, hand.since)
            # Whatever ended this early, somebody else can go on at once.
            with suppress(PortcullisError):
                for delivery in hand.held:
                    await delivery.give_back(PAUSE_SECONDS[0])
        return True

    def _in_our_hands(self, job_id: str) -> int:
        return sum(len(hand.held) for hand in self._hands.get(job_id, ()))

    def _put_down(self, job_id: str, hand: _Hand) -> None:
        hands = self._hands[job_id]
        hands.remove(hand)
        if not hands:
            del self._hands[job_id]
        if hand.last:
            self._emptied.add(job_id)
        if job_id in self._emptied and not hands:
            self._emptied.discard(job_id)
            self.kick()  # the job may be over: somebody waits for the end of it

    async def _units(self, record: JobRecord, most: int, hand: _Hand) -> tuple[int, bool]:
        """Units for up to `most` items, and whether the limiter ran without Redis."""
        now = self._clock.monotonic()
        key_id = record.key_id
        held, hand.since = self._purse.take(key_id, most, now)
        if held:
            return held, False
        try:
            admission = await self._backend.take(key_id, most)
        except PortcullisError as error:
            if error.code in (ErrorCode.INVALID_CREDENTIALS, ErrorCode.FORBIDDEN):
                await self._fail(record, core.KEY_GONE)
            else:
                metrics.UNAVAILABLE.inc()
                log.info("no units for a job: %s", error)
                self._hold(record, self._pause(record.job_id))
            return 0, False
        if not admission.granted:
            metrics.LIMITS.inc()
            least, longest = BLOCK_SECONDS
            rate = admission.rate
            wait = rate.reset_day if rate.remaining_day <= 0 else rate.reset_minute
            self._schedule.block_key(key_id, now + min(longest, max(least, wait)))
        return admission.granted, admission.rate.degraded

    async def _fail(self, record: JobRecord, reason: str) -> None:
        kept = await self._records.get(record.key_id, record.job_id)
        if kept is None:
            return
        now_ms = self._now_ms()
        ended = await change_record(
            self._records, kept, lambda each: each if each.over else core.end(each, "failed", reason, now_ms)
        )
        if not kept.record.over:
            metrics.ENDED.labels(ended.state).inc()
        await count_late(self._records, self._results, ended, now_ms)
        await self._finish(ended)

    async def _start(self, record: JobRecord) -> None:
        kept = await self._records.get(record.key_id, record.job_id)
        if kept is not None:
            now_ms = self._now_ms()
            self._sealed[record.job_id] = await change_record(
                self._records, kept, lambda each: core.started(each, now_ms) if each.state == "queued" else each
            )

    async def _process(self, record: JobRecord, hand: _Hand, degraded: bool) -> None:
        """Judge the items in hand, and store their results."""
        keeping = asyncio.create_task(self._keep(hand))
        metrics.REDELIVERED.inc(sum(delivery.redelivered for delivery in hand.held))
        try:
            for delivery in [delivery for delivery in hand.held if delivery.redelivered]:
                if await self._results.has(record.key_id, record.job_id, delivery.index):
                    # Whoever had it before has stored its result and could not say so.
                    await delivery.done()
                    hand.held.discard(delivery)
            async with asyncio.TaskGroup() as group:
                for message in self._groups(record, sorted(hand.held, key=lambda delivery: delivery.index)):
                    group.create_task(self._message(record, message, degraded, hand))
        except* PortcullisError as errors:
            raise errors.exceptions[0] from None
        finally:
            await tasks.end(keeping)

    def _groups(self, record: JobRecord, deliveries: Sequence[Delivery]) -> list[list[Delivery]]:
        """By message: suspects alone, the others together as far as they fit."""
        alone = [delivery for delivery in deliveries if self._doubts.alone((record.job_id, delivery.index))]
        others = [delivery for delivery in deliveries if delivery not in alone]
        sizes = [len(delivery.item.text) if delivery.item is not None else 0 for delivery in others]
        groups = [[delivery] for delivery in alone]
        begin = 0
        for size in core.split(sizes, self._pace.message_items, MOST_CHARACTERS):
            groups.append(others[begin : begin + size])
            begin += size
        return groups

    async def _message(self, record: JobRecord, group: list[Delivery], degraded: bool, hand: _Hand) -> None:
        """One message to the proxy, and what comes of it."""
        results: Sequence[ItemResult | PortcullisError]
        suspect = len(group) == 1 and self._doubts.unproven((record.job_id, group[0].index))
        if suspect and not await self._can_judge(record, degraded, hand):
            self._hold(record, self._pause(record.job_id))
            # The item has not been tried: a code that says nothing about it.
            results = [PortcullisError(ErrorCode.OVERLOADED)]
        else:
            results = await self._judged(record, group, degraded)
        with tracing.span("store results"):
            settled = await asyncio.gather(
                *(
                    self._settle(record, delivery, result, alone=len(group) == 1)
                    for delivery, result in zip(group, results, strict=True)
                ),
                return_exceptions=True,
            )
        for delivery, result, has_result in zip(group, results, settled, strict=True):
            if isinstance(has_result, bool):
                hand.held.discard(delivery)
                hand.used += has_result
            elif isinstance(result, ItemResult) and result.verdict is not None:
                hand.used += 1  # it was judged, and that its result is stored may be what we were not told
        for outcome in settled:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _can_judge(self, record: JobRecord, degraded: bool, hand: _Hand) -> bool:
        """Whether a text that harms nobody is judged; that costs the key a unit.

        Where nothing else is under way, nothing else tells an item that ends whoever works on it from an outage.
        """
        message = DetectItems(key_id=record.key_id, texts=(PROBE_TEXT,), threshold=record.threshold, rate_degraded=degraded)
        try:
            (result,) = (await self._backend.judge(message)).results
        except PortcullisError as error:
            log.info("nothing can be judged: %s", error)
            return False
        if result.verdict is None:
            return False
        hand.used += 1
        self._doubts.succeeded()
        return True

    async def _judged(self, record: JobRecord, group: list[Delivery], degraded: bool) -> list[ItemResult | PortcullisError]:
        readable = [delivery for delivery in group if delivery.item is not None]
        unreadable = PortcullisError(ErrorCode.BAD_REQUEST, "The item as it was stored cannot be read.")
        found: dict[int, ItemResult | PortcullisError] = {delivery.index: unreadable for delivery in group}
        if readable:
            try:
                answer = await self._backend.judge(
                    DetectItems(
                        key_id=record.key_id,
                        texts=tuple(delivery.item.text for delivery in readable if delivery.item is not None),
                        threshold=record.threshold,
                        detailed=record.detailed,
                        rate_degraded=degraded,
                    )
                )
            except PortcullisError as error:
                log.info("a message of %s came to nothing: %s", record.job_id, error)
                self._hold(record, self._pause(record.job_id))
                found |= {delivery.index: error for delivery in readable}
            else:
                found |= {delivery.index: result for delivery, result in zip(readable, answer.results, strict=True)}
                if any(result.verdict is not None for result in answer.results):
                    self._doubts.succeeded()
                    self._pauses.pop(record.job_id, None)
        return [found[delivery.index] for delivery in group]

    async def _settle(self, record: JobRecord, delivery: Delivery, result: ItemResult | PortcullisError, *, alone: bool) -> bool:
        """Store an item's result, or give it back; whether it has its result."""
        item = (record.job_id, delivery.index)
        if isinstance(result, ItemResult) and result.verdict is not None:
            result = await self._store(record, delivery, result)
        else:
            if isinstance(result, PortcullisError):
                code, detail, attributed = result.code, result.detail, alone
            else:
                assert result.error is not None
                code, detail, attributed = core.code_of(result.error), result.error.detail, True
            # An error of one item that says "nobody was there" is not its own; one that was sent alone may have driven them away.
            attributed = attributed and (alone or not core.is_transient(code))
            tracing.record("item", 0.0, own=(("portcullis.item.index", delivery.index),), error=str(code))
            tracing.refuse()
            if not self._doubts.failed(item, code, attributed=attributed):
                metrics.RETRIED.labels(code).inc()
                await delivery.give_back(self._doubts.retry_seconds(item, self._rng))
                return False
            await self._bury(record, delivery.index, delivery, core.error_result(code, detail), f"{code}: {detail}")
        await delivery.done()
        self._doubts.clear(item)
        return True

    async def _store(self, record: JobRecord, delivery: Delivery, result: ItemResult) -> ItemResult:
        stored = JobResult(index=delivery.index, result=result, id=delivery.item.id if delivery.item is not None else None)
        if len(encode(stored)) > MAX_RESULT_BYTES:
            detail = f"The result is longer than {MAX_RESULT_BYTES} bytes; ask without details."
            result = core.error_result(ErrorCode.PAYLOAD_TOO_LARGE, detail)
            stored = JobResult(index=stored.index, result=result, id=stored.id)
        await self._results.store(record.key_id, record.job_id, stored)
        metrics.ITEMS.labels(core.outcome_of(result)).inc()
        return result

    async def _bury(self, record: JobRecord, index: int, delivery: Delivery | None, result: ItemResult, reason: str) -> None:
        """Give an item up: into the dead letters first, so that a result without one cannot be."""
        item = delivery.item if delivery is not None else None
        letter = DeadLetter(
            key_id=record.key_id,
            job_id=record.job_id,
            index=index,
            item=item,
            reason=reason,
            at=datetime.fromtimestamp(self._clock.now(), UTC).isoformat(),
        )
        try:
            await self._results.bury(letter)
        except PortcullisError as error:
            if error.code != ErrorCode.OVERLOADED:
                raise
            # Full: the item's result tells its owner; what is lost is the text, to be tried again by hand.
            log.error("the stream of dead letters is full; item %d of %s is not kept", index, record.job_id)
        metrics.DEAD.inc()
        stored = JobResult(index=index, result=result, id=item.id if item is not None else None)
        await self._results.store(record.key_id, record.job_id, stored)
        metrics.ITEMS.labels("failed").inc()

    async def _keep(self, hand: _Hand) -> None:
        """Tell the queue that work goes on, so that nobody else is given the same."""
        while True:
            await self._sleep(self._pace.keep_seconds)
            with suppress(PortcullisError):
                for delivery in list(hand.held):
                    await delivery.keep()

    # --- what they share -------------------------------------------------------------------------------------------------

    def _pause(self, job_id: str) -> float:
        """Seconds until the job is tried again: twice those before, but what fails during a pause belongs to the same outage."""
        first, longest = PAUSE_SECONDS
        now = self._clock.monotonic()
        seconds, until = self._pauses.get(job_id, (first / 2, now))
        if now >= until:
            seconds = min(longest, seconds * 2)
            until = now + seconds * self._rng.uniform(0.75, 1.25)
            self._pauses[job_id] = (seconds, until)
        return until - now

    def _hold(self, record: JobRecord, seconds: float) -> None:
        self._schedule.block_job(record.key_id, record.job_id, self._clock.monotonic() + seconds)

    async def _guarded(self, work: Awaitable[bool | None], what: str) -> bool | None:
        """What fails is done again at the next turn, by us or by another replica."""
        try:
            return await work
        except PortcullisError as error:
            log.info("%s is interrupted: %s", what, error)
            await self._sleep(PAUSE_SECONDS[0])
        except RecordMovedError:
            pass
        except Exception:
            # The one catch-all of these tasks: a bug in one job must neither end them silently nor touch the others.
            log.exception("%s failed", what)
            await self._sleep(PAUSE_SECONDS[0])
        return None

    def _now_ms(self) -> int:
        return int(self._clock.now() * 1000)
