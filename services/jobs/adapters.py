"""Jobs on JetStream: what is kept of them, their items, their results; and the stages that judge them, on the bus."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js.api import RawStreamMsg
from nats.js.kv import KeyValue

from libs.common import streams, subjects, tracing
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import (
    Admission,
    DeadLetter,
    DetectItems,
    ItemResults,
    JobItem,
    JobResult,
    Message,
    Reply,
    TakeRequest,
    encode,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import JOB_BUCKET, JOB_DEAD_STREAM, JOB_HOOKS_STREAM, JOB_ITEMS_STREAM, JOB_RESULTS_STREAM, job_subject
from services.jobs import metrics
from services.jobs.core import JobRecord, Outcome, Queue, code_of, outcome_of
from services.jobs.ports import Kept, RecordMovedError
from services.jobs.settings import Settings

log = logging.getLogger(__name__)

API_TIMEOUT_SECONDS: Final = 5.0
MEASURE_SECONDS: Final = 10.0
READER_LIFE_SECONDS: Final = 30.0
"""How long the server keeps a consumer that somebody has died with."""
TAKE_TIMEOUT_SECONDS: Final = 5.0
DEAD_STREAM_BYTES: Final = 256 * 1024**2
HOOKS_STREAM_BYTES: Final = 16 * 1024**2
BUCKET_BYTES: Final = 128 * 1024**2
HOOKS_CONSUMER: Final = "webhooks"
OUTCOME_HEADER: Final = "Portcullis-Outcome"
_STREAM_STORE_FAILED: Final = 10077  # these two: nats-server's errors.json; here the description says what does not fit
_NO_SUCH_MESSAGE: Final = 10037
_PER_SUBJECT: Final = "per subject"

_SEND_ITEMS: Final = tracing.messaging("send", JOB_ITEMS_STREAM)

_RECORD = msgspec.json.Decoder(JobRecord)
_ITEM = msgspec.json.Decoder(JobItem)
_ADMISSION = msgspec.json.Decoder(Admission)
_RESULTS = msgspec.json.Decoder(ItemResults)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Failures of JetStream as STAGE_UNAVAILABLE, and a full stream as OVERLOADED."""
    try:
        yield
    except (nats.errors.Error, TimeoutError) as error:
        # When the connection has been closed, nats-py reports a cancellation as ConnectionClosedError.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        if isinstance(error, nats.js.errors.APIError) and error.err_code == _STREAM_STORE_FAILED:
            raise PortcullisError(ErrorCode.OVERLOADED, internal=f"{what}: {error.description}") from error
        raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal=f"{what}: {error!r}") from error


def stream_configurations(settings: Settings) -> list[api.StreamConfig]:
    """The streams of jobs. Every bound refuses what is new: nothing that was accepted makes room for something else."""
    run, kept = settings.jobs_max_run_hours * 3600, settings.jobs_retention_hours * 3600

    def stream(
        name: str, kind: str, description: str, max_bytes: int, max_age: float, retention: api.RetentionPolicy
    ) -> api.StreamConfig:
        return api.StreamConfig(
            name=name,
            subjects=[f"jobs.v1.*.*.{kind}.*"],
            description=description,
            storage=api.StorageType.FILE,
            retention=retention,
            discard=api.DiscardPolicy.NEW,
            # Whatever is sent twice is stored once, for as long as it is kept; the window of Nats-Msg-Id would be over before.
            max_msgs_per_subject=1,
            discard_new_per_subject=True,
            max_bytes=max_bytes,
            max_age=max_age,
            allow_direct=True,
            num_replicas=settings.stream_replicas,
        )

    queue, limits = api.RetentionPolicy.WORK_QUEUE, api.RetentionPolicy.LIMITS
    return [
        stream(
            JOB_ITEMS_STREAM,
            "items",
            "Items of jobs, until they have a result.",
            settings.jobs_items_stream_bytes,
            run + 86_400,
            queue,
        ),
        # A job may run for so long after its first result, and is read for so long after its end.
        stream(
            JOB_RESULTS_STREAM, "results", "One result for each item.", settings.jobs_results_stream_bytes, run + kept, limits
        ),
        stream(JOB_DEAD_STREAM, "dead", "Items that were given up, with the reason.", DEAD_STREAM_BYTES, run + kept, limits),
        stream(JOB_HOOKS_STREAM, "hook", "Jobs whose webhook is due.", HOOKS_STREAM_BYTES, kept, queue),
    ]


def bucket_configuration(settings: Settings) -> api.StreamConfig:
    hours = settings.jobs_max_run_hours + settings.jobs_retention_hours
    return streams.bucket(JOB_BUCKET, ttl_seconds=hours * 3600, max_bytes=BUCKET_BYTES, replicas=settings.stream_replicas)


NEEDS: Final = frozenset({"subjects", "retention", "discard", "discard_new_per_subject", "max_msgs_per_subject"})
"""What the one result of an item rests on (ADR 7)."""


class JetStream:
    """What the adapters share: the connection's JetStream, and the streams' making."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.settings = settings
        self._keeper = streams.Keeper()

    @property
    def api(self) -> JetStreamContext:
        return self.bus.connection.jetstream(timeout=API_TIMEOUT_SECONDS)

    async def ensure(self) -> None:
        """Make the streams that are not there; one that is there is never altered."""
        with translated("making the streams"):
            stream = self.api
            for configuration in (*stream_configurations(self.settings), bucket_configuration(self.settings)):
                await self._keeper.stream(stream, configuration, NEEDS)
            await self._keeper.consumer(
                stream,
                JOB_HOOKS_STREAM,
                api.ConsumerConfig(
                    name=HOOKS_CONSUMER,
                    durable_name=HOOKS_CONSUMER,
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=self.settings.webhook_timeout_seconds + 20,
                    max_ack_pending=64,
                ),
            )

    async def measure(self) -> None:
        """Show what the streams hold, and may hold."""
        with translated("looking at the streams"):
            for configuration in stream_configurations(self.settings):
                assert configuration.name is not None
                info = await self.api.stream_info(configuration.name)
                metrics.STREAM_BYTES.labels(configuration.name).set(info.state.bytes)
                metrics.STREAM_LIMIT.labels(configuration.name).set(info.config.max_bytes or 0)

    async def keep_measuring(self) -> None:
        """For ever."""
        while True:
            with suppress(PortcullisError):  # it cannot be asked now; others say so
                await self.measure()
            await asyncio.sleep(MEASURE_SECONDS)

    @property
    def bucket(self) -> KeyValue:
        """For changes. It is read by `last`."""
        return KeyValue(JOB_BUCKET, f"KV_{JOB_BUCKET}", f"$KV.{JOB_BUCKET}.", self.api, direct=False)

    async def last(self, stream: str, subject: str) -> RawStreamMsg | None:
        """What is stored under a subject, by the word of the stream's leader.

        A direct read any server of a cluster may answer, also one that has missed the last minute and does not know it yet.
        """
        try:
            return await self.api.get_msg(stream, subject=subject)
        except nats.js.errors.NotFoundError as error:
            if error.err_code == _NO_SUCH_MESSAGE:
                return None
            raise  # the stream itself is not there, which says nothing about what it held

    async def in_bucket(self, key: str) -> tuple[bytes, int] | None:
        """A value and its revision."""
        found = await self.last(f"KV_{JOB_BUCKET}", f"$KV.{JOB_BUCKET}.{key}")
        if found is None:
            return None
        assert found.seq is not None
        return found.data or b"", found.seq

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Store once: when something is stored under the subject, it stays as it is.

        Raises nats-py's errors, PAYLOAD_TOO_LARGE (which would close nats-py's connection for good).
        """
        connection = self.bus.connection
        if len(payload) + 1024 > connection.max_payload:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, internal=f"{len(payload)} bytes for {subject}")
        try:
            await self.api.publish(subject, payload, headers=headers)
        except nats.js.errors.APIError as error:
            if not (error.err_code == _STREAM_STORE_FAILED and _PER_SUBJECT in (error.description or "")):
                raise

    async def subjects(self, stream: str, pattern: str) -> list[str]:
        """The subjects below a pattern that something is stored under."""
        try:
            info = await self.api.stream_info(stream, subjects_filter=pattern)
        except nats.js.errors.NotFoundError:
            return []
        return sorted(info.state.subjects or {})

    async def read(
        self, stream: str, pattern: str, after: int, most: int, *, headers_only: bool = False, most_bytes: float = math.inf
    ) -> tuple[list[Msg], bool]:
        """Messages behind the place `after`, in order, at least one if there is any; and whether there are more."""
        subscription = await self.api.pull_subscribe(
            pattern,
            stream=stream,
            config=api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=after + 1,
                ack_policy=api.AckPolicy.NONE,
                mem_storage=True,
                num_replicas=1,
                inactive_threshold=READER_LIFE_SECONDS,
                headers_only=headers_only or None,
            ),
        )
        try:
            info = await subscription.consumer_info()
            waiting = info.num_pending or 0
            messages: list[Msg] = []
            held = 0
            while len(messages) < min(waiting, most):
                # A few at a time, so that what is in memory stays within the bytes that were asked for.
                want = min(waiting, most) - len(messages)
                batch = await subscription.fetch(min(want, 1000 if headers_only else 64), timeout=API_TIMEOUT_SECONDS)
                for message in batch:
                    held += len(message.data)
                    if messages and held > most_bytes:
                        return messages, True
                    messages.append(message)
            return messages, waiting > len(messages)
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()
            if info_name := subscription._consumer:
                with suppress(nats.errors.Error, TimeoutError):
                    await self.api.delete_consumer(stream, info_name)


class JetStreamRecords:
    """`Records` in a key-value bucket."""

    def __init__(self, stream: JetStream) -> None:
        self._stream = stream

    async def get(self, key_id: str, job_id: str) -> Kept | None:
        with translated("reading a record"):
            found = await self._stream.in_bucket(f"job.{key_id}.{job_id}")
        return Kept(_RECORD.decode(found[0]), found[1]) if found is not None else None

    async def create(self, record: JobRecord) -> None:
        with translated("making a record"), suppress(nats.js.errors.KeyWrongLastSequenceError):
            bucket = self._stream.bucket
            await bucket.create(f"job.{record.key_id}.{record.job_id}", msgspec.json.encode(record))

    async def update(self, record: JobRecord, revision: int) -> int:
        with translated("changing a record"):
            bucket = self._stream.bucket
            try:
                return await bucket.update(f"job.{record.key_id}.{record.job_id}", msgspec.json.encode(record), last=revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                raise RecordMovedError from None

    async def job_ids(self, key_id: str) -> list[str]:
        with translated("listing records"):
            found = await self._stream.subjects(f"KV_{JOB_BUCKET}", f"$KV.{JOB_BUCKET}.job.{key_id}.*")
        return [subject.rpartition(".")[2] for subject in found]

    async def claim(self, key_id: str, idempotency: str) -> tuple[str, int] | None:
        with translated("reading a claim"):
            found = await self._stream.in_bucket(f"claim.{key_id}.{idempotency}")
        return (found[0].decode(), found[1]) if found is not None else None

    async def set_claim(self, key_id: str, idempotency: str, job_id: str, revision: int) -> None:
        with translated("making a claim"):
            try:
                await self._stream.bucket.update(f"claim.{key_id}.{idempotency}", job_id.encode(), last=revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                raise RecordMovedError from None


class JetStreamDelivery:
    """`Delivery`."""

    def __init__(self, message: Msg) -> None:
        self._message = message
        self.index = int(message.subject.rpartition(".")[2])
        self.redelivered = (message.metadata.num_delivered or 1) > 1
        self.item: JobItem | None
        try:
            self.item = _ITEM.decode(message.data)
        except (ValueError, RecursionError):
            self.item = None

    async def done(self) -> None:
        with translated("acknowledging an item"):
            await self._message.ack()

    async def give_back(self, delay_seconds: float) -> None:
        with translated("giving an item back"):
            await self._message.nak(delay=delay_seconds)

    async def keep(self) -> None:
        with translated("keeping an item"):
            await self._message.in_progress()


class JetStreamQueues:
    """`Queues`: one durable consumer for each job that is not over, on a stream of all items."""

    def __init__(self, stream: JetStream) -> None:
        self._stream = stream
        self._subscriptions: dict[str, JetStreamContext.PullSubscription] = {}
        self._fetching: dict[str, asyncio.Lock] = {}

    async def all(self) -> list[Queue]:
        found: list[Queue] = []
        with translated("listing queues"):
            stream = self._stream.api
            while True:
                page = await stream.consumers_info(JOB_ITEMS_STREAM, offset=len(found))
                found += [_queue(info) for info in page]
                if len(page) < 256:  # nats-server's page
                    break
        names = {_consumer(queue.key_id, queue.job_id) for queue in found}
        for name in self._subscriptions.keys() - names:
            await self._unsubscribe(name)
        return found

    async def one(self, key_id: str, job_id: str) -> Queue | None:
        with translated("looking at a queue"):
            try:
                return _queue(await self._stream.api.consumer_info(JOB_ITEMS_STREAM, _consumer(key_id, job_id)))
            except nats.js.errors.NotFoundError:
                return None

    async def has(self, key_id: str, job_id: str, index: int) -> bool:
        with translated("looking for an item"):
            return await self._stream.last(JOB_ITEMS_STREAM, job_subject(key_id, job_id, "items", index)) is not None

    async def open(self, key_id: str, job_id: str) -> None:
        with translated("opening a queue"):
            await self._stream.api.add_consumer(
                JOB_ITEMS_STREAM,
                api.ConsumerConfig(
                    name=_consumer(key_id, job_id),
                    durable_name=_consumer(key_id, job_id),
                    filter_subject=job_subject(key_id, job_id, "items"),
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=self._stream.settings.jobs_ack_wait_seconds,
                    # For ever: when an item is given up is ours to decide, and what it is delivered for is no failure of its own.
                    max_deliver=-1,
                    max_ack_pending=2048,
                ),
            )

    async def close(self, key_id: str, job_id: str) -> None:
        name = _consumer(key_id, job_id)
        await self._unsubscribe(name)
        with translated("closing a queue"):
            # The consumer last: it is what tells that there is something to clean up.
            await self._stream.api.purge_stream(JOB_ITEMS_STREAM, subject=job_subject(key_id, job_id, "items"))
            with suppress(nats.js.errors.NotFoundError):
                await self._stream.api.delete_consumer(JOB_ITEMS_STREAM, name)

    async def append(self, key_id: str, job_id: str, first_index: int, items: Sequence[JobItem]) -> None:
        attributes = (("messaging.batch.message_count", len(items)),)
        with translated("storing items"), tracing.span(f"send {JOB_ITEMS_STREAM}", tracing.PRODUCER, _SEND_ITEMS + attributes):
            stored = await asyncio.gather(
                *(
                    self._stream.publish(job_subject(key_id, job_id, "items", first_index + offset), encode(item))
                    for offset, item in enumerate(items)
                ),
                return_exceptions=True,
            )
            for outcome in stored:
                if isinstance(outcome, BaseException):
                    raise outcome

    async def fetch(self, key_id: str, job_id: str, most: int, wait_seconds: float) -> Sequence[JetStreamDelivery]:
        name = _consumer(key_id, job_id)
        # One at a time: two readers of one subscription would take each other's messages for their own.
        async with self._fetching.setdefault(name, asyncio.Lock()):
            with translated("fetching items"):
                subscription = self._subscriptions.get(name)
                if subscription is None:
                    subscription = await self._stream.api.pull_subscribe_bind(durable=name, stream=JOB_ITEMS_STREAM)
                    self._subscriptions[name] = subscription
                try:
                    messages = await subscription.fetch(most, timeout=wait_seconds)
                except (TimeoutError, nats.errors.TimeoutError):
                    return []
        return [JetStreamDelivery(message) for message in messages]

    async def _unsubscribe(self, name: str) -> None:
        self._fetching.pop(name, None)
        subscription = self._subscriptions.pop(name, None)
        if subscription is not None:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()


def _consumer(key_id: str, job_id: str) -> str:
    return f"{key_id}_{job_id}"


def _queue(info: api.ConsumerInfo) -> Queue:
    key_id, _, job_id = info.name.partition("_")
    created_ms = int(info.created.timestamp() * 1000) if info.created is not None else 0
    return Queue(key_id, job_id, info.num_pending or 0, info.num_ack_pending or 0, created_ms)


class JetStreamResults:
    """`Results`."""

    def __init__(self, stream: JetStream) -> None:
        self._stream = stream

    async def store(self, key_id: str, job_id: str, result: JobResult) -> None:
        with translated("storing a result"):
            await self._stream.publish(
                job_subject(key_id, job_id, "results", result.index),
                encode(result),
                {OUTCOME_HEADER: outcome_of(result.result)},
            )

    async def has(self, key_id: str, job_id: str, index: int) -> bool:
        with translated("looking for a result"):
            return await self._stream.last(JOB_RESULTS_STREAM, job_subject(key_id, job_id, "results", index)) is not None

    async def outcomes(self, key_id: str, job_id: str, after: int, most: int) -> list[tuple[int, int, Outcome]]:
        with translated("counting results"):
            pattern = job_subject(key_id, job_id, "results")
            messages, _ = await self._stream.read(JOB_RESULTS_STREAM, pattern, after, most, headers_only=True)
        return [
            (message.metadata.sequence.stream, int(message.subject.rpartition(".")[2]), _outcome(message)) for message in messages
        ]

    async def page(
        self, key_id: str, job_id: str, after: int, most: int, most_bytes: int
    ) -> tuple[list[tuple[int, bytes]], bool]:
        with translated("reading results"):
            pattern = job_subject(key_id, job_id, "results")
            messages, more = await self._stream.read(JOB_RESULTS_STREAM, pattern, after, most, most_bytes=most_bytes)
            found = [(message.metadata.sequence.stream, message.data) for message in messages]
            # Whoever reads on until nothing comes must have read everything, also from a server that lags behind the others.
            newest = await self._stream.last(JOB_RESULTS_STREAM, pattern) if not more else None
        if newest is None or (newest.seq or 0) <= (found[-1][0] if found else after):
            return found, more
        if not found:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="the server that was asked for results lags behind")
        return found, True

    async def bury(self, letter: DeadLetter) -> None:
        with translated("keeping a dead letter"):
            await self._stream.publish(job_subject(letter.key_id, letter.job_id, "dead", letter.index), encode(letter))

    async def announce(self, key_id: str, job_id: str) -> None:
        with translated("announcing the end of a job"):
            await self._stream.publish(job_subject(key_id, job_id, "hook", 0), b"{}")


def _outcome(message: Msg) -> Outcome:
    value = (message.headers or {}).get(OUTCOME_HEADER, "")
    return value if value in ("benign", "malicious") else "failed"  # type: ignore[return-value]  # one of the two


class BusBackend:
    """`Backend`: auth and the limiter, which give units; the proxy, which judges."""

    def __init__(self, bus: Bus, message_timeout_seconds: float) -> None:
        self._bus = bus
        self._message_timeout_seconds = message_timeout_seconds

    async def take(self, key_id: str, units: int) -> Admission:
        message = TakeRequest(key_id=key_id, cost=units)
        return _ADMISSION.decode(await self._ask(subjects.BATCH_TAKE, message, TAKE_TIMEOUT_SECONDS))

    async def judge(self, items: DetectItems) -> ItemResults:
        results = _RESULTS.decode(await self._ask(subjects.BATCH_ITEMS, items, self._message_timeout_seconds))
        if len(results.results) != len(items.texts):
            raise PortcullisError(
                ErrorCode.STAGE_UNAVAILABLE, internal=f"{len(results.results)} results for {len(items.texts)} texts"
            )
        return results

    async def _ask(self, subject: str, message: Message, seconds: float) -> msgspec.Raw:
        context = RequestContext.lasting(seconds, self._bus.clock, traceparent=tracing.here())
        reply: Reply = (await self._bus.request(subject, message, context, idempotent=subject == subjects.BATCH_ITEMS)).reply
        if reply.error is not None:
            raise PortcullisError(code_of(reply.error), reply.error.detail, retry_after=reply.error.retry_after)
        return reply.result
