"""The bus: one NATS connection of one process, on which stages are registered and requests are made.

A request is one message that moves forward. The edge publishes it with an address of its own inbox as the reply subject; every
stage forwards it, and the last one (or one that refuses) answers that address, its *origin*.

A forward carries a reply subject below the forwarding stage's own inbox, with the origin appended:
`_INBOX.auth.<instance>._INBOX.edge.<instance>.<token>`. Nobody answers there but the NATS server: when the next stage has no
subscriber, its "no responders" message comes back to the stage that forwarded, which reads the origin off the subject and
replies with a typed error at once. Nothing is kept in memory for it, and nothing is sent when all is well.

A stage that dies takes the messages that it had in hand with it. The server announces the end of its connection, and whoever
waits for an answer that may have been there sends the request again, once, if doing it twice does no harm. All that a process
asks again comes out of one budget (`retry_budget`).

FastStream carries the subscriptions. Its handler only admits a message (deadline, bound) and starts a task, because its own
way of answering is silent about exceptions, undecodable bodies and the messages that it drops while stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import nats.errors
from faststream.nats import NatsMessage
from faststream.security import BaseSecurity, SASLPlaintext
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.micro.service import ServiceConfig

from libs.common import VERSION, hops, micro, tasks, telemetry, tracing
from libs.common.clock import Clock
from libs.common.context import (
    TIMINGS_HEADER,
    RequestContext,
    parse_timings,
)
from libs.common.contracts import ErrorBody, FieldError, InstanceLeft, Message, RateState, Reply, TraceKept, encode, raw
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.guard import GuardedBroker, PlainTextError, guard
from libs.common.neighbours import Neighbours, Response
from libs.common.settings import CommonSettings
from libs.common.stages import (
    Accept,
    Answer,
    AskedHandler,
    AskedStage,
    DoorHandler,
    DoorStage,
    Forward,
    Handed,
    Handler,
    Stage,
    Waiting,
    follow,
)
from libs.common.subjects import (
    CLIENT_DISCONNECTED,
    CLIENT_USER_PREFIX,
    DEPENDS_ON,
    EVENT_LEFT,
    EVENT_TRACE_KEPT,
    INBOX_PREFIX,
    TRACES_BEGIN_IN,
    connection_name,
    inbox,
    service_of,
)
from libs.common.timeouts import within

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Message)

# A hung server must be noticed long before nats-py's default of two missed pings 120 s apart.
PING_INTERVAL_SECONDS = 2
RECONNECT_WAIT_SECONDS = 0.1
RESEND_GRACE_SECONDS = 0.05
"""How long an answer may still come after a stage's death before the request is sent again."""
TELL_KEPT_SECONDS = 0.2
"""How often the others are told which traces are kept: long before they have forgotten their spans of them."""
HEADER_RESERVE_BYTES = 1024
"""What the headers of a message may take of the server's `max_payload`."""


class NoRespondersError(PortcullisError):
    """Nobody subscribes to the subject: known at once, as distinct from a timeout."""

    def __init__(self, subject: str) -> None:
        super().__init__(ErrorCode.STAGE_UNAVAILABLE, internal=f"no responders on {subject}")


Hook = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Pending:
    """A request without an answer yet. `again` sends it once more; None when that is not allowed (or has been done)."""

    future: asyncio.Future[Msg | Response]
    again: Callable[[], Awaitable[None]] | None
    span: tracing.Span


class Bus:
    """One connection. Register stages and event handlers, then `start()`; `drain()` before the end."""

    def __init__(
        self, service: str, settings: CommonSettings, clock: Clock | None = None, neighbours: Neighbours | None = None
    ) -> None:
        """`neighbours`: the other buses of this process, if it has any; their clock is this one's, too."""
        self.service = service
        self.instance = secrets.token_hex(8)
        self._neighbours = neighbours or Neighbours(clock)
        self.clock: Clock = self._neighbours.clock
        self.status = micro.FleetStatus()
        self.status.set(micro.INSTANCE, self.instance)
        self.closed = asyncio.Event()
        """Set when the connection is gone for good: nothing but a new process helps."""
        self.on_reconnect: list[Hook] = []
        self.on_drained: list[Hook] = []
        """Called by `drain()` when the last message has been worked on and the connection is still there."""
        self.told: list[micro.Endpoint] = []
        """What this process does besides its stages, for whoever asks `$SRV.STATS`; to be filled before `start()`."""
        self.retry_budget = self._neighbours.retry_budget
        """Of all that this process asks again. Who does so by himself takes from it, and says so to `request` (`again`)."""
        self._inbox = inbox(service, self.instance)
        self._neighbours.add(self._inbox, self)
        self._stages: list[Stage[Any] | AskedStage] = []
        self._waiting: dict[str, Callable[[Msg], None]] = {}
        self._pending: dict[str, _Pending] = {}
        self._left: deque[str] = deque(maxlen=256)
        self._resending: set[asyncio.Task[None]] = set()
        self._sequence = 0
        self._hops = hops.Hops()
        self._telling: asyncio.Task[None] | None = None
        self._draining = False
        self._drain_seconds = settings.drain_seconds
        self._micro: micro.MicroService | None = None
        self._decode_reply = msgspec.json.Decoder(Reply).decode
        security: BaseSecurity | None = None
        tls = ssl.create_default_context(cafile=settings.nats_tls_ca) if settings.nats_tls_ca else None
        if settings.nats_user is not None and settings.nats_password is not None:
            password = settings.nats_password.get_secret_value()
            security = SASLPlaintext(username=settings.nats_user, password=password, ssl_context=tls)
        elif tls is not None:
            security = BaseSecurity(ssl_context=tls)
        self.broker = GuardedBroker(
            settings.nats_url.split(","),
            name=connection_name(service, self.instance),
            security=security,
            inbox_prefix=f"{self._inbox}-js",
            # For ever, and at once: requests made in the meantime fail instead of being kept and executed later.
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_SECONDS,  # type: ignore[arg-type]  # nats-py takes fractions of a second
            pending_size=-1,
            ping_interval=PING_INTERVAL_SECONDS,
            connect_timeout=2,
            apply_types=False,
            decoder=_undecoded,
            logger=None,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
        )

    @property
    def connection(self) -> Client:
        """nats-py's client, for JetStream."""
        connection = self.broker._connection
        if connection is None:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="not connected to NATS yet")
        return connection

    @property
    def connected(self) -> bool:
        connection = self.broker._connection
        return connection is not None and connection.is_connected

    @property
    def clustered(self) -> bool:
        """Whether the server is one of several."""
        return bool(self.connection._server_info.get("cluster"))

    # --- registering -----------------------------------------------------------------------------------------------------

    def stage(
        self,
        subject: str,
        kind: type[T],
        handler: Handler[T],
        *,
        broadcast: bool = False,
        max_in_flight: int = 1024,
        waiting: Callable[[], int] | None = None,
    ) -> None:
        """Handle `subject` in the service's queue group, or, with `broadcast`, in every replica.

        At most `max_in_flight` messages are worked on; further ones are answered OVERLOADED at once. `waiting`: how many of those
        that have been accepted wait in a queue of the handler's own, for whoever looks at this stage.
        """
        queue_group = "" if broadcast else self.service
        delivered, subscriber = self._subscriber(subject, queue_group)
        queued = delivered if waiting is None else lambda: delivered() + waiting()
        stage = Stage(self, subject, kind, handler, queue_group, max_in_flight, queued)
        self._stages.append(stage)
        subscriber(stage.accept)

    def door(self, subject: str, kind: type[T], handler: DoorHandler[T], *, seconds: float, max_in_flight: int) -> None:
        """As `stage`, for a subject of clients (`subjects.DOOR_OPERATIONS`): they set no deadline, which is `seconds` away.

        Answers go to the client's own inbox and nowhere else; a message that wants its answer elsewhere is not carried out.
        """
        delivered, subscriber = self._subscriber(subject, self.service)
        stage = DoorStage(self, subject, kind, handler, self.service, max_in_flight, delivered, seconds)
        self._stages.append(stage)
        subscriber(stage.accept)

    def asked(self, subject: str, handler: AskedHandler, *, max_in_flight: int) -> None:
        """Answer what the NATS server asks on `subject`, in one replica, with what `handler` makes of it (None: not at all)."""
        delivered, subscriber = self._subscriber(subject, self.service)
        stage = AskedStage(self, subject, handler, self.service, max_in_flight, delivered)
        self._stages.append(stage)
        subscriber(stage.accept)

    def _subscriber(self, subject: str, queue_group: str) -> tuple[Waiting, Callable[[Accept], None]]:
        """How many messages have been delivered that no stage has seen yet; and what takes the function that sees them."""
        subscriber = self.broker.subscriber(subject, queue=queue_group, no_reply=True)

        def delivered() -> int:
            subscription = subscriber.subscription
            return subscription.pending_msgs if isinstance(subscription, Subscription) else 0

        def hand_to(accept: Accept) -> None:
            subscriber(accept)  # nobody would subscribe without a handler
            # FastStream's own way from a message to its handler (scopes, middlewares, parsing, the choice of a handler) takes
            # longer than all that a stage does with it, and none of it is used here.
            subscriber.process_message = accept  # type: ignore[method-assign,assignment]  # whose result nobody reads

        return delivered, hand_to

    def on_event(self, subject: str, kind: type[T], handler: Callable[[T], Awaitable[None]]) -> None:
        """Listen to a broadcast that nobody waits for an answer to. What cannot be decoded is logged and dropped."""
        decode = msgspec.json.Decoder(kind).decode

        async def accept(message: NatsMessage) -> None:
            try:
                event = decode(message.body)
            except (ValueError, RecursionError) as error:
                log.warning("undecodable event on %s: %r", subject, type(error))
                return
            await handler(event)

        self.broker.subscriber(subject, no_reply=True)(accept)

    # --- life ------------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect; waits for a server that is not there yet."""
        tracing.serve(self.service)  # and so do the tasks that read what comes
        connection = await self.broker.connect()
        guard(connection)
        await connection.subscribe(f"{self._inbox}.>", cb=self._on_inbox)
        if self.service in DEPENDS_ON:
            await connection.subscribe(EVENT_LEFT, cb=self._on_left)
            await connection.subscribe(CLIENT_DISCONNECTED, cb=self._on_client_disconnected)

    async def start(self) -> None:
        """Begin to take messages; everything the handlers need must be there."""
        if (recorder := tracing.recorder()) is not None:
            self._trace(recorder)
        await self.broker.start()
        config = ServiceConfig(
            name=f"portcullis-{self.service}".replace("_", "-"), version=VERSION, metadata=self.status.metadata
        )
        self._micro = micro.MicroService(self.connection, config, [*(stage.meter for stage in self._stages), *self.told])
        await self._micro.start()
        await self._settle()
        self._neighbours.open(self, self._shared_stages())

    def _shared_stages(self) -> list[Stage[Any]]:
        """Those of which one replica takes a message, and that services ask."""
        stages = [stage for stage in self._stages if isinstance(stage, Stage) and not isinstance(stage, DoorStage)]
        return [stage for stage in stages if stage.queue_group]

    async def drain(self) -> None:
        """Take no more messages, finish those in hand, then close the connection. Nothing delivered to us is lost."""
        self._draining = True
        self._neighbours.close(self)
        if self.connected:
            # FastStream's own stop switches handlers off before it unsubscribes; what arrives in between would vanish.
            await asyncio.gather(*(self._drain_subscriber(subscriber) for subscriber in self.broker.subscribers))
            in_hand = [task for stage in self._stages for task in stage.tasks]
            if in_hand:
                await asyncio.wait(in_hand, timeout=self._drain_seconds)
            for hook in self.on_drained:
                await hook()
            if self._telling is not None:
                await tasks.end(self._telling)
                await self._tell_kept()
            with contextlib.suppress(PortcullisError, nats.errors.Error):  # the connection has just gone: the server says so
                await self.publish(EVENT_LEFT, InstanceLeft(service=self.service, instance=self.instance))
                # A last forward may still be answered "no responders"; that answer is on its way back before this flush returns.
                await self._settle()
        # Everything is drained by now. nats-py's own drain, which FastStream calls, may wait out its 30 s for a pull subscription
        # (`fetch` takes some messages off its queue without saying that they are done), and refuses a connection that is
        # being made again. On a closed one it does nothing.
        if (connection := self.broker._connection) is not None:
            # `close` cancels an attempt to reconnect, but once: one that goes on would bring the closed connection back to life.
            if (attempt := connection._reconnection_task) is not None:
                await tasks.end(attempt)
            # Where that attempt had just begun, both wait for the end of one transport, and the cancellation comes back out of
            # `close`; as a task of its own it is told apart from a cancellation of ours.
            closing = asyncio.create_task(connection.close())
            await asyncio.wait({closing})
            if closing.cancelled():
                self.closed.set()
            else:
                closing.result()
        self._forget_subscriptions()
        with contextlib.suppress(nats.errors.ConnectionClosedError):
            await self.broker.stop()

    # --- asking ----------------------------------------------------------------------------------------------------------

    async def request(
        self,
        subject: str,
        message: Message,
        context: RequestContext,
        *,
        idempotent: bool = False,
        token: str | None = None,
        again: bool = False,
    ) -> Response:
        """Send `message` and wait for its reply until the context's deadline.

        An `idempotent` request is sent once more when a process that may have had it in hand dies. `token`, unique among the
        requests of this process and `[A-Za-z0-9_-]+`, becomes part of the origin: whoever asks again for the same after a failure
        gives it again, and what is done once for each origin (usage) is done once for all attempts. `again`: it has been asked
        before, and is no further request to the budget of retries; it goes over NATS even where the stage is of this process,
        which has just refused: another may have room.

        Raises `PortcullisError`: STAGE_UNAVAILABLE (no connection, connection lost, `NoRespondersError`), DEADLINE_EXCEEDED,
        PAYLOAD_TOO_LARGE. An error reply is returned, not raised.
        """
        if not again:
            self.retry_budget.count()
        if not again and self._neighbour(subject) is not None:  # nothing is sent
            return await self._request(subject, message, context, tracing.NO_SPAN, idempotent=idempotent, token=token)
        with self._hops.sending(subject, context.traceparent) as span:
            sent = context.within(span.traceparent) if span else context
            response = await self._request(subject, message, sent, span, idempotent=idempotent, token=token, away=again)
            if (error := response.reply.error) is not None:
                span.set("portcullis.outcome", error.code)
            return response

    async def _request(
        self,
        subject: str,
        message: Message,
        context: RequestContext,
        span: tracing.Span,
        *,
        idempotent: bool,
        token: str | None,
        away: bool = False,
    ) -> Response:
        future: asyncio.Future[Msg | Response] = asyncio.get_running_loop().create_future()
        token = token or self._token()
        origin = f"{self._inbox}.{token}"

        def resolve(msg: Msg) -> None:
            if not future.done():
                future.set_result(msg)

        async def send() -> None:
            stage = None if away else self._neighbour(subject)
            if stage is not None:
                with tracing.aside():
                    await follow(Handed(stage, message, context.as_attempt(origin)), origin)
            else:
                await self._publish(subject, encode(message), reply=origin, headers=context.outgoing(self.clock))

        self._waiting[token] = resolve
        self._pending[token] = _Pending(future, send if idempotent else None, span)
        try:
            with within(context.remaining_seconds(self.clock)):
                await send()
                answer = await future
        except TimeoutError:
            raise PortcullisError(ErrorCode.DEADLINE_EXCEEDED, internal=f"no answer on {subject}") from None
        finally:
            del self._waiting[token], self._pending[token]
        if isinstance(answer, Response):
            return answer
        answered = answer.headers or {}
        if answered.get("Status") == "503":
            span.event(hops.NO_RESPONDERS)
            raise NoRespondersError(subject)
        try:
            reply = self._decode_reply(answer.data)
        except (ValueError, RecursionError) as error:  # what msgspec raises, for bytes that are not UTF-8 and endless nesting too
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal=f"bad reply on {subject}: {error}") from error
        return Response(reply, parse_timings(answered.get(TIMINGS_HEADER)))

    async def gather(
        self, subject: str, message: Message | None, context: RequestContext, *, window_seconds: float, expected: int = 0
    ) -> list[bytes]:
        """Ask every replica; the bodies of all answers that came within the window, or as soon as `expected` have come.

        `message` None sends an empty body (as `$SRV.PING` wants). Nobody there, or no connection: an empty list.
        """
        answers: list[bytes] = []
        complete = asyncio.Event()
        token = self._token()

        def collect(msg: Msg) -> None:
            if (msg.headers or {}).get("Status") == "503":
                complete.set()
                return
            answers.append(msg.data)
            if expected and len(answers) >= expected:
                complete.set()

        self._waiting[token] = collect
        span = self._hops.sending(subject, context.traceparent) if message is not None else tracing.NO_SPAN
        headers = (context.within(span.traceparent) if span else context).outgoing(self.clock)
        try:
            await self._publish(
                subject, encode(message) if message is not None else b"", reply=f"{self._inbox}.{token}", headers=headers
            )
            async with asyncio.timeout(min(window_seconds, context.remaining_seconds(self.clock))):
                await complete.wait()
        except TimeoutError:
            pass
        except PortcullisError as error:
            span.fail(str(error.code))
            log.info("gather on %s: %s", subject, error)
        finally:
            span.end()
            del self._waiting[token]
        return answers

    async def publish(self, subject: str, message: Message, headers: dict[str, str] | None = None) -> None:
        """Publish an event. Raises `PortcullisError` STAGE_UNAVAILABLE without a connection."""
        await self._publish(subject, encode(message), headers=headers)

    async def publish_acked(
        self, subject: str, message: Message, headers: dict[str, str], on_reply: Callable[[Msg], None]
    ) -> Callable[[], None]:
        """Publish what a JetStream stream keeps, without waiting for it: its acknowledgement goes to `on_reply`.

        So does "no responders" (status 503 in the headers) when no stream keeps the subject. It is called at most once; whoever
        gives up waiting calls what is returned. Raises `PortcullisError` as `publish` does.
        """
        token = self._token()

        def resolve(msg: Msg) -> None:
            self._forget(token)
            on_reply(msg)

        self._waiting[token] = resolve
        try:
            await self._publish(subject, encode(message), reply=f"{self._inbox}.{token}", headers=headers)
        except PortcullisError:
            del self._waiting[token]
            raise
        return lambda: self._forget(token)

    # --- answering -------------------------------------------------------------------------------------------------------

    async def forward(self, forward: Forward, origin: str | None, context: RequestContext) -> Handed | None:
        """Send it to the next stage; what is to be done here instead, where that is of this process."""
        stage = self._neighbour(forward.subject)
        if stage is not None:
            return Handed(stage, forward.message, context.as_attempt(origin))
        with self._hops.sending(forward.subject, context.traceparent) as span:
            if span:
                context = context.within(span.traceparent)
            self._hops.forwarded(origin, span)
            reply = f"{self._inbox}.{origin}" if origin else ""
            await self._publish(forward.subject, encode(forward.message), reply=reply, headers=context.outgoing(self.clock))
        return None

    async def answer(self, origin: str | None, answer: Answer, context: RequestContext) -> None:
        result = answer.result if isinstance(answer.result, msgspec.Raw) else raw(answer.result)
        await self._reply(origin, Reply(result=result, rate=answer.rate), context)

    async def reply_error(
        self,
        origin: str | None,
        error: PortcullisError,
        context: RequestContext | None = None,
        rate: RateState | None = None,
    ) -> None:
        body = ErrorBody(
            code=error.code,
            detail=error.detail,
            retry_after=error.retry_after,
            fields=tuple(FieldError(field=path, message=text) for path, text in error.fields),
        )
        try:
            await self._reply(origin, Reply(error=body, rate=rate), context)
        except PortcullisError as problem:
            # The connection is gone: the caller's own connection tells it so.
            log.info("an error reply could not be sent: %s", problem)

    async def reply_raw(self, reply: str, payload: bytes) -> None:
        """An answer in a form that is not ours, to whoever asked in it."""
        await self._publish(reply, payload)

    def _forget_subscriptions(self) -> None:
        """FastStream would end them on a connection that is closed."""
        subscriber: Any
        for subscriber in self.broker.subscribers:
            subscriber.subscription = None

    async def _drain_subscriber(self, subscriber: Any) -> None:
        """Unsubscribe, and wait until every message that was delivered has been handed to its stage."""
        subscription: Subscription | None = subscriber.subscription
        if subscription is None:
            return
        subscriber.subscription = None
        with contextlib.suppress(nats.errors.Error):  # the connection went away in the middle: nothing is delivered any more
            # nats-py's own drain is not enough: its PING is written past its buffer and overtakes the UNSUB there, so that
            # messages still arrive after it has stopped to look. Here the UNSUB has left before drain's PING.
            await self.connection._send_unsubscribe(subscription._id)
            await self.connection.flush()
            await subscription.drain()  # type: ignore[no-untyped-call]

    async def _settle(self) -> None:
        """Wait until the server has taken everything written so far. Twice: the first PING overtakes the buffer (see above)."""
        await self.connection.flush()
        await self.connection.flush()

    async def _reply(self, origin: str | None, reply: Reply, context: RequestContext | None) -> None:
        if origin and not self._neighbours.answer(origin, Response(reply, context.timings if context else {})):
            await self._publish(origin, encode(reply), headers=context.headers() if context else None)

    async def _publish(self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        # Each of these would otherwise close the client for ever, or keep the message for after a reconnect.
        connection = self.connection
        if not connection.is_connected:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="not connected to NATS")
        if len(payload) + HEADER_RESERVE_BYTES > connection.max_payload:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, internal=f"{len(payload)} bytes for {subject}")
        try:
            await connection.publish(subject, payload, reply=reply, headers=headers)
        except nats.errors.Error as error:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal=f"publish to {subject}: {error!r}") from error

    # --- traces ----------------------------------------------------------------------------------------------------------

    def _trace(self, recorder: tracing.Recorder) -> None:
        """Hear which traces are kept, and, where traces begin, tell it."""

        async def kept(news: TraceKept) -> None:
            recorder.keep(news.trace_ids)

        async def tell() -> None:
            while True:
                await asyncio.sleep(TELL_KEPT_SECONDS)
                await self._tell_kept()

        self.on_event(EVENT_TRACE_KEPT, TraceKept, kept)
        if self.service in TRACES_BEGIN_IN:
            self._telling = asyncio.get_running_loop().create_task(tell())

    async def _tell_kept(self) -> None:
        recorder = tracing.recorder()
        if recorder is None or not self.connected or not (news := recorder.news()):
            return
        with contextlib.suppress(PortcullisError):  # the connection has just gone: those traces stay incomplete
            await self.publish(EVENT_TRACE_KEPT, TraceKept(trace_ids=news))

    # --- the connection's own events -------------------------------------------------------------------------------------

    def _token(self) -> str:
        self._sequence += 1
        return f"{self._sequence:x}"

    def _forget(self, token: str) -> None:
        self._waiting.pop(token, None)

    def _neighbour(self, subject: str) -> Stage[Any] | None:
        """The stage of this process that takes what is sent to `subject`. Without a connection nothing is sent, to anybody."""
        return self._neighbours.stage(subject) if self.connected else None

    def resolve(self, token: str, response: Response) -> bool:
        """See `Asker`."""
        pending = self._pending.get(token)
        if pending is not None and not pending.future.done():
            pending.future.set_result(response)
        return pending is not None or token not in self._waiting  # of which `gather` may have one; who has given up has none

    async def _on_inbox(self, msg: Msg) -> None:
        rest = msg.subject[len(self._inbox) + 1 :]
        if rest.startswith(INBOX_PREFIX):
            # Only the server writes here: a forward found no subscriber.
            self._hops.not_received(rest)
            await self.reply_error(rest, PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="the next stage is away"))
        elif (resolve := self._waiting.get(rest)) is not None:
            resolve(msg)

    async def _on_left(self, msg: Msg) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            self._left.append(_decode_left(msg.data).instance)

    async def _on_client_disconnected(self, msg: Msg) -> None:
        try:
            client = _decode_disconnected(msg.data).client
        except (ValueError, RecursionError):
            return
        # A client names its connection as it likes.
        departed = service_of(client.name) if not client.user.startswith(CLIENT_USER_PREFIX) else None
        if departed is None or departed[0] not in DEPENDS_ON[self.service] or departed[1] in self._left:
            return
        if self._neighbours.lives(inbox(*departed)):  # only its connection is gone: this process has its work still in hand
            return
        log.warning("%s %s is gone, with what it had in hand", *departed)
        tokens = [token for token, pending in self._pending.items() if pending.again is not None]
        if tokens:
            task = asyncio.get_running_loop().create_task(self._send_again(tokens))
            self._resending.add(task)
            task.add_done_callback(self._resending.discard)

    async def _send_again(self, tokens: list[str]) -> None:
        await asyncio.sleep(RESEND_GRACE_SECONDS)
        for token in tokens:
            pending = self._pending.get(token)
            if pending is None or pending.again is None or pending.future.done():
                continue
            if not self.retry_budget.take():
                telemetry.RESEND_WITHHELD.inc()
                continue
            again, pending.again = pending.again, None
            telemetry.RESENT.inc()
            pending.span.event(hops.SENT_AGAIN)
            try:
                await again()
            except PortcullisError as error:
                if not pending.future.done():
                    pending.future.set_exception(error)

    async def _on_error(self, error: Exception) -> None:
        event = "slow_consumer" if isinstance(error, nats.errors.SlowConsumerError) else "error"
        telemetry.NATS_EVENTS.labels(event).inc()
        # Ten attempts to reconnect a second fail alike; that the connection is lost, and when it is back, has its own line.
        # Not its repr: that of a UnicodeDecodeError holds all that was to be decoded.
        log.log(logging.WARNING if self.connected else logging.DEBUG, "NATS: %s: %s", type(error).__name__, error)
        if self.broker._connection is None and isinstance(error, ssl.SSLCertVerificationError | PlainTextError):
            raise error  # out of `connect`: trying again for ever would help nobody

    async def _on_disconnected(self) -> None:
        telemetry.NATS_EVENTS.labels("disconnected").inc()
        if not self._draining:
            log.warning("disconnected from NATS")
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(
                    PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="the NATS connection was lost")
                )

    async def _on_reconnected(self) -> None:
        log.info("reconnected to NATS")
        for hook in self.on_reconnect:
            await hook()

    async def _on_closed(self) -> None:
        self.closed.set()


class _DisconnectedClient(msgspec.Struct):
    name: str = ""
    user: str = ""


class _Disconnected(msgspec.Struct):
    """What we read of the server's io.nats.server.advisory.v1.client_disconnect."""

    client: _DisconnectedClient


_decode_disconnected = msgspec.json.Decoder(_Disconnected).decode
_decode_left = msgspec.json.Decoder(InstanceLeft).decode


async def _undecoded(message: NatsMessage) -> NatsMessage:
    """FastStream would decode every body as JSON first; the stages decode for themselves, into their types."""
    return message
