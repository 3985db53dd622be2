"""What a process does with the messages of one subject: bounds, deadlines, decoding, the handler, the answer to a failure."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec
from nats.aio.msg import Msg

from libs.common import hops, meter, telemetry, tracing
from libs.common.clock import Clock
from libs.common.context import (
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
    TRACEPARENT_HEADER,
    RequestContext,
    from_headers,
)
from libs.common.contracts import Message, RateState
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import INBOX_PREFIX, client_inbox, key_of
from libs.common.timeouts import within

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Message)

MAX_DOOR_BYTES = 1024 * 1024
"""Of what a client sends in one message."""

_ORIGIN = re.compile(r"_INBOX(\.[A-Za-z0-9_-]+){1,4}", re.ASCII)


class Forward(msgspec.Struct, frozen=True, gc=False):
    """A handler's decision: on to the next stage, with the same origin and deadline."""

    subject: str
    message: Message


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A handler's decision: reply to the origin. `result` may already be encoded."""

    result: Message | msgspec.Raw | None
    rate: RateState | None = None


Outcome = Forward | Answer | None
"""None: no answer (a broadcast that does not concern this process)."""

Handler = Callable[[T, RequestContext], Awaitable[Outcome]]
DoorHandler = Callable[[str, T, RequestContext], Awaitable[Outcome]]
"""Of what a client asks in the name of the key whose id comes first."""
AskedHandler = Callable[[bytes], Awaitable[bytes | None]]
Accept = Callable[[Msg], Awaitable[None]]

Waiting = Callable[[], int]
"""How many messages of a subject have come and are not worked on yet."""


class Carrier(Protocol):
    """What a stage needs of the bus."""

    service: str
    clock: Clock

    async def forward(self, forward: Forward, origin: str | None, context: RequestContext) -> Handed | None: ...

    async def answer(self, origin: str | None, answer: Answer, context: RequestContext) -> None: ...

    async def reply_error(
        self,
        origin: str | None,
        error: PortcullisError,
        context: RequestContext | None = None,
        rate: RateState | None = None,
    ) -> None: ...

    async def reply_raw(self, reply: str, payload: bytes) -> None: ...


def _meter(subject: str, queue_group: str, limit: int, tasks: set[asyncio.Task[None]], waiting: Waiting) -> meter.StageMeter:
    # NATS ADR-32 allows no other characters in a name.
    name = subject.replace(".", "-").replace("*", "KEY").replace("$", "")
    return meter.StageMeter(name, subject, queue_group, limit, in_flight=tasks.__len__, queued=waiting)


class Handed(msgspec.Struct, frozen=True, gc=False):
    """A message for a stage of the same process, as it is; `context` as that stage sees it."""

    stage: Stage[Any]
    body: Message
    context: RequestContext


Come = Msg | Handed


async def follow(handed: Handed | None, origin: str | None) -> None:
    """See a request through the stages of this process, one after the other, in the task that calls. Raises nothing."""
    while handed is not None:
        handed = await handed.stage.take(handed, origin)


class Stage(Generic[T]):
    """One subject that this process handles."""

    def __init__(
        self,
        bus: Carrier,
        subject: str,
        kind: type[T],
        handler: Handler[T],
        queue_group: str,
        max_in_flight: int,
        waiting: Waiting,
    ) -> None:
        self.subject = subject
        self.queue_group = queue_group
        self.tasks: set[asyncio.Task[None]] = set()
        self.meter = _meter(subject, queue_group, max_in_flight, self.tasks, waiting)
        self._bus = bus
        self._decode = msgspec.json.Decoder(kind).decode
        self._handler = handler
        self._max_in_flight = max_in_flight
        self._span_name = f"process {subject}"
        self._span_attributes = tracing.messaging("process", subject, queue_group)

    async def accept(self, msg: Msg) -> None:
        """Start a task for a message, or refuse it at once when the stage is full."""
        origin = self._origin(msg)
        if len(self.tasks) >= self._max_in_flight:
            await self._refuse(msg, origin)
        else:
            self.tasks.add(asyncio.get_running_loop().create_task(self._work(msg, origin)))

    async def take(self, handed: Handed, origin: str | None) -> Handed | None:
        """As `accept`, from a service of the same process and in the task that calls. What is to be handed on, if anything."""
        if len(self.tasks) >= self._max_in_flight:
            await self._refuse(handed, origin)
            return None
        return await self._run(handed, origin)

    async def _work(self, msg: Msg, origin: str | None) -> None:
        await follow(await self._run(msg, origin), origin)

    async def _refuse(self, come: Come, origin: str | None) -> None:
        self.meter.count(ErrorCode.OVERLOADED, None)
        contextvars.copy_context().run(self._trace_refusal, come, origin)
        await self._bus.reply_error(origin, PortcullisError(ErrorCode.OVERLOADED, internal=f"{self.subject} is full"))

    async def _run(self, come: Come, origin: str | None) -> Handed | None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        started = time.perf_counter_ns()
        context: RequestContext | None = None
        rate: RateState | None = None
        outcome_name: str = meter.OK
        span = tracing.NO_SPAN
        tracing.serve(self._bus.service)
        try:
            context = self._context(come, origin)
            telemetry.request_id_var.set(context.request_id)
            if span := self._begin(come, context):
                context = context.within(span.traceparent)
            tracing.enter(context.traceparent, span or None)
            remaining = context.remaining_seconds(self._bus.clock)
            if remaining <= 0:
                outcome_name = meter.EXPIRED
                return None
            body = self._body(come)
            rate = getattr(body, "rate", None)
            # Work that outlives its deadline is cancelled: the caller has been told, and will not read it.
            with within(remaining):
                outcome = await self._handle(come, body, context)
            spent = msgspec.structs.replace(
                context,
                timings={**context.timings, self._bus.service: round((time.perf_counter_ns() - started) / 1e6, 3)},
            )
            if isinstance(outcome, Forward):
                return await self._bus.forward(outcome, origin, spent)
            if isinstance(outcome, Answer):
                await self._bus.answer(origin, outcome, spent)
        except TimeoutError:
            outcome_name = meter.EXPIRED
        except asyncio.CancelledError:
            outcome_name = meter.EXPIRED  # whoever asked has given up
            raise
        except PortcullisError as error:
            outcome_name = error.code
            if error.internal:
                log.info("%s refused: %s", self.subject, error)
            await self._bus.reply_error(origin, error, context, getattr(error, "rate", None) or rate)
        except Exception:
            # The one catch-all of a stage: a bug is answered like any other failure, and told to the log.
            outcome_name = ErrorCode.INTERNAL
            log.exception("%s failed", self.subject)
            await self._bus.reply_error(origin, PortcullisError(ErrorCode.INTERNAL), context, rate)
        finally:
            self.tasks.discard(task)
            if span and context is not None:
                hops.handled(span, context, outcome_name)
            # After the span's end, which may be what a trace is kept for: the exemplar knows.
            self.meter.count(outcome_name, time.perf_counter_ns() - started)
        return None

    def _begin(self, _: Come, context: RequestContext) -> tracing.Span:
        return tracing.begin(self._span_name, tracing.CONSUMER, context.traceparent, self._span_attributes)

    def _trace_refusal(self, come: Come, origin: str | None) -> None:
        tracing.serve(self._bus.service)
        if tracing.recorder() is not None:
            with contextlib.suppress(PortcullisError):
                context = self._context(come, origin)
                hops.handled(self._begin(come, context), context, ErrorCode.OVERLOADED)

    def _origin(self, msg: Msg) -> str | None:
        return origin_of(msg.reply)

    def _context(self, come: Come, origin: str | None) -> RequestContext:
        return come.context if isinstance(come, Handed) else from_headers(come.headers or {}, self._bus.clock, origin)

    async def _handle(self, _: Come, body: T, context: RequestContext) -> Outcome:
        return await self._handler(body, context)

    def _body(self, come: Come) -> T:
        return cast("T", come.body) if isinstance(come, Handed) else self._read(come.data)

    def _read(self, data: bytes) -> T:
        try:
            return self._decode(data)
        except msgspec.DecodeError as error:
            # msgspec's sentence names the field and the expected type, not the value.
            raise PortcullisError(ErrorCode.BAD_REQUEST, f"The message could not be read: {error}.") from None
        except (UnicodeDecodeError, RecursionError):  # what msgspec lets through: bytes that are not UTF-8, endless nesting
            raise PortcullisError(ErrorCode.BAD_REQUEST, "The message could not be read.") from None


class DoorStage(Stage[T]):
    """One subject on which clients ask themselves, without the headers that services give each other."""

    def __init__(
        self,
        bus: Carrier,
        subject: str,
        kind: type[T],
        handler: DoorHandler[T],
        queue_group: str,
        max_in_flight: int,
        waiting: Waiting,
        seconds: float,
    ) -> None:
        super().__init__(bus, subject, kind, self._nobody, queue_group, max_in_flight, waiting)
        self._door_handler = handler
        self._seconds = seconds

    def _origin(self, msg: Msg) -> str | None:
        # The server lets anything stand there; answering it must not become a way to write into somebody else's inbox.
        own = f"{client_inbox(key_of(msg.subject))}."
        return msg.reply if msg.reply.startswith(own) and _ORIGIN.fullmatch(msg.reply) else None

    def _context(self, come: Come, _: str | None) -> RequestContext:
        msg = _at_the_door(come)
        if len(msg.data) > MAX_DOOR_BYTES:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, f"A message holds at most {MAX_DOOR_BYTES} bytes.")
        if msg.reply and self._origin(msg) is None:
            raise PortcullisError(ErrorCode.BAD_REQUEST, internal="the answer is wanted elsewhere than in the client's own inbox")
        given = msg.headers or {}
        deadline_ms = int((self._bus.clock.now() + self._seconds) * 1000)
        kept = {name: given[name] for name in (REQUEST_ID_HEADER, TRACEPARENT_HEADER) if name in given}
        # Without the origin: what is asked twice from one inbox is two requests.
        return from_headers({**kept, DEADLINE_HEADER: str(deadline_ms)}, self._bus.clock)

    def _begin(self, come: Come, context: RequestContext) -> tracing.Span:
        # Nobody of ours is before it: the trace, or our part of the client's, begins here.
        parent = context.traceparent if TRACEPARENT_HEADER in (_at_the_door(come).headers or {}) else ""
        return tracing.root(self._span_name, tracing.CONSUMER, parent, self._span_attributes)

    async def _handle(self, come: Come, body: T, context: RequestContext) -> Outcome:
        return await self._door_handler(key_of(_at_the_door(come).subject), body, context)

    async def _nobody(self, _: T, __: RequestContext) -> Outcome:
        return None


def _at_the_door(come: Come) -> Msg:
    assert isinstance(come, Msg)  # no service of ours asks there
    return come


class AskedStage:
    """One subject on which the server itself asks, in its own form. What is not answered it takes for a refusal, in time."""

    def __init__(
        self, bus: Carrier, subject: str, handler: AskedHandler, queue_group: str, max_in_flight: int, waiting: Waiting
    ) -> None:
        self.subject = subject
        self.tasks: set[asyncio.Task[None]] = set()
        self.meter = _meter(subject, queue_group, max_in_flight, self.tasks, waiting)
        self._bus = bus
        self._handler = handler
        self._max_in_flight = max_in_flight

    async def accept(self, msg: Msg) -> None:
        if len(self.tasks) >= self._max_in_flight:
            self.meter.count(ErrorCode.OVERLOADED, None)
            return
        task = asyncio.get_running_loop().create_task(self._run(msg))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, msg: Msg) -> None:
        started = time.perf_counter_ns()
        outcome: str = meter.OK
        try:
            answer = await self._handler(msg.data)
            if answer is None or not msg.reply:
                outcome = ErrorCode.BAD_REQUEST
            else:
                await self._bus.reply_raw(msg.reply, answer)
        except PortcullisError as error:
            outcome = error.code
            log.info("%s refused: %s", self.subject, error)
        except Exception:
            # As in a stage: a bug must not be silent.
            outcome = ErrorCode.INTERNAL
            log.exception("%s failed", self.subject)
        self.meter.count(outcome, time.perf_counter_ns() - started)


def origin_of(reply: str | None) -> str | None:
    """Where the answer to a message goes: its reply subject, less the inboxes of the stages that forwarded it.

    None when there is none, or when it is not an inbox (a forged reply subject must not make us publish elsewhere).
    """
    if not reply:
        return None
    origin = INBOX_PREFIX + reply.rpartition(INBOX_PREFIX)[2]
    return origin if _ORIGIN.fullmatch(origin) else None
