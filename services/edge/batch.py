"""Many texts in one call: read, charged, judged and answered as a stream, a bounded number of them at a time.

A JSON list is charged whole, before anything is judged. NDJSON is read as it arrives and charged in slices, so that an upload may
be of any length: what is in memory are the items under way, what is left of one slice, and the piece that was read last. Nothing
more is read while enough is under way, and an item is under way until its line has been written: a slow reader slows the work
down.

Once the status is sent, nothing can be refused any more. What goes wrong with an item is a line; what ends the stream is a line,
too, that says from which item on nothing was judged or charged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from libs.common import subjects, tasks, tracing
from libs.common.context import RequestContext
from libs.common.contracts import (
    AccountRequest,
    Admission,
    AdmissionRequest,
    Credential,
    DetectItems,
    ItemResults,
    Message,
    RateState,
    Verdict,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, items
from services.edge.asking import insist
from services.edge.bodies import Bodies
from services.edge.feeds import STOPPING, ChargedFeed, Feed, ListFeed, NdjsonFeed
from services.edge.gate import Call, Gate, call_of
from services.edge.items import Entry, Pace, Tally
from services.edge.metrics import BATCH_ITEMS, BATCHES, Shed, shed
from services.edge.peer import Peer, peer_of
from services.edge.ports import Answered, Stages
from services.edge.replies import Refused, decoded
from services.edge.schemas import BatchLine, DetectConfig

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""When the process is about to stop: how long a list that has been charged may still take."""
_PASSING = frozenset({ErrorCode.STAGE_UNAVAILABLE, ErrorCode.OVERLOADED})
_MOST_ITEM_SPANS = 8
"""Items of one message that failed and are shown in the trace, each by itself."""

_ADMISSION = msgspec.json.Decoder(Admission)
_RESULTS = msgspec.json.Decoder(ItemResults)

Later = Callable[[Request], Awaitable[Response]]


class Batches:
    """`POST /v1/detect/batch`."""

    def __init__(
        self,
        stages: Stages,
        bodies: Bodies,
        *,
        request_timeout_seconds: float,
        idle_seconds: float,
        most_line_bytes: int,
        most_batches: int,
    ) -> None:
        self.gate: Gate | None = None
        """Set when the gate stands around the app; tells when the process is about to stop."""
        self.later: Later | None = None
        """Takes a batch that is to be answered later (`Prefer: respond-async`); without one, that preference is ignored."""
        self._stages = stages
        self._bodies = bodies
        self._longest_seconds = request_timeout_seconds
        self._idle_seconds = idle_seconds
        self._most_line_bytes = most_line_bytes
        self._most_batches = most_batches
        self._under_way = 0
        self._never = asyncio.Event()

    async def detect(self, request: Request) -> Response:
        """Judge many texts, each as a single one would be.

        A JSON list of up to 1 000 is charged at once or not at all. NDJSON, one item a line, is read and charged as it arrives,
        and may be of any length. Results come in the order of completion, then a summary; as `application/json`, in the order of
        asking.
        """
        call = call_of(request.scope)
        if self.later is not None and core.prefers_async(call.headers):
            return await self.later(request)
        credential = core.credential(call.headers)
        seconds = core.timeout_seconds(call.headers, self._longest_seconds)
        media_type = items.chosen(call.headers.get(b"accept", b""))
        if self._under_way >= self._most_batches:
            shed(Shed.BATCHES)
            raise PortcullisError(ErrorCode.OVERLOADED, internal="too many batches at a time")
        async with AsyncExitStack() as stack:
            self._under_way += 1
            BATCHES.inc()
            stack.callback(self._ended)
            desk = Desk(self._stages, call, credential, seconds)
            ndjson = items.is_ndjson(call.headers)
            feed, config = await (self._upload(request, desk, media_type) if ndjson else self._list(request, desk, stack))
            run = Run(desk, feed, config, self._stopping, media_type)
            await run.begin()
            return BatchResponse(run, stack.pop_all(), media_type, idle_seconds=self._idle_seconds)

    @property
    def _stopping(self) -> asyncio.Event:
        return self.gate.stop if self.gate is not None else self._never

    def _ended(self) -> None:
        self._under_way -= 1
        BATCHES.dec()

    async def _list(self, request: Request, desk: Desk, stack: AsyncExitStack) -> tuple[Feed, DetectConfig]:
        headers = desk.call.headers
        body = await stack.enter_async_context(self._bodies.read(headers, request.receive))
        core.require_json(headers, body)
        decoded = items.decode_list(body)
        entries = items.entries_of(decoded)
        await desk.charge(len(entries))
        return ListFeed(entries), decoded.config or DetectConfig()

    async def _upload(self, request: Request, desk: Desk, media_type: str) -> tuple[Feed, DetectConfig]:
        headers = call_of(request.scope).headers
        core.require_no_encoding(headers)
        config = core.query_config(request.query_params)
        feed = NdjsonFeed(
            request.receive,
            self._stopping,
            most_bytes=self._most_line_bytes,
            most_items=items.MAX_LIST if media_type == items.JSON else None,
            idle_seconds=self._idle_seconds,
        )
        return ChargedFeed(feed, desk.charge), config


class Desk:
    """What one batch asks of the stages, in the name of one caller. `rate`: the limits as they were last told."""

    def __init__(self, stages: Stages, call: Call, credential: Credential, seconds: float) -> None:
        self.call = call
        self.clock = stages.clock
        self.rate: RateState | None = None
        self._stages = stages
        self.key_id = credential.key_id
        self._credential = credential
        self._seconds = seconds

    async def charge(self, units: int) -> None:
        """Take units from the key's limits, all or none. Raises `PortcullisError` or `Refused`."""
        answered = await self._insist(subjects.BATCH_REQUEST, AdmissionRequest(credential=self._credential, cost=units))
        self.rate = decoded(answered, _ADMISSION).rate

    async def identify(self) -> None:
        """Let auth decide about the caller without taking anything."""
        answered = await self._insist(subjects.ACCOUNT_PROFILE, AccountRequest(credential=self._credential))
        self.rate = answered.reply.rate

    async def judge(self, entries: list[Entry], config: DetectConfig) -> list[Verdict | PortcullisError]:
        """An outcome for each text. Raises nothing."""
        message = DetectItems(
            key_id=self._credential.key_id,
            texts=tuple(entry.text for entry in entries),
            threshold=config.confidence_threshold,
            detailed=config.detailed_response,
            rate_degraded=self.rate is not None and self.rate.degraded,
        )
        try:
            # Under one token, also when it is sent again: the proxy counts it once.
            answered = await self._insist(subjects.BATCH_ITEMS, message, token=f"b{secrets.token_hex(8)}")
            results = decoded(answered, _RESULTS).results
        except Refused as refused:
            return [refused.error] * len(entries)
        except PortcullisError as error:
            return [error] * len(entries)
        if len(results) != len(entries):
            log.error("%d results for %d texts", len(results), len(entries))
            return [PortcullisError(ErrorCode.STAGE_UNAVAILABLE)] * len(entries)
        return [items.outcome_of(result) for result in results]

    async def _insist(self, subject: str, message: Message, token: str | None = None) -> Answered:
        context = RequestContext.lasting(self._seconds, self.clock, self.call.request_id, self.call.traceparent)
        return await insist(self._stages, subject, message, context, passing=_PASSING, token=token)


class Run:
    """One batch under way, from its first items to its summary."""

    def __init__(self, desk: Desk, feed: Feed, config: DetectConfig, stop: asyncio.Event, media_type: str) -> None:
        self.desk = desk
        self.feed = feed
        self._config = config
        self._stop = stop
        self._in_order = media_type == items.JSON
        self._frame = items.framing(media_type)
        self._pace = Pace()
        self._room = asyncio.Event()
        self._tally = Tally()
        self._held: list[tuple[int, bytes]] = []
        self._first: list[Entry] | None = None
        self._write: Callable[[bytes], Awaitable[None]] = _nowhere

    async def begin(self) -> None:
        """Take the first items, while all can still be refused. Raises `PortcullisError`, `Refused`, `ClientDisconnect`."""
        self._first = await self._take()
        if not self._first:
            raise core.invalid_field("body", "Expected at least one line")
        if self.desk.rate is None:  # nothing to be charged yet, and the caller is still unknown
            await self.desk.identify()
        tracing.annotate("portcullis.key_id", self.desk.key_id)

    async def answer(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Do the work, and write the lines, the summary last."""
        self._write = write
        stopped: PortcullisError | None = None
        next_index = 0
        async with asyncio.TaskGroup() as group:
            entries = self._first or []
            while entries:
                await self._wait_for_room(len(entries))
                self._send_off(entries, group)
                next_index = self.feed.next_index
                try:
                    entries = await self._take()
                except Refused as refused:
                    stopped = refused.error
                    break
                except PortcullisError as error:
                    stopped = error
                    break
        spent_ms = round((self.desk.clock.monotonic() - self.desk.call.arrived) * 1000, 3)
        summary = self._tally.summary(spent_ms, stopped, next_index)
        self._trace(stopped)
        if self._in_order:
            await write(items.encode_whole((line for _, line in sorted(self._held)), summary))
            return
        last = self._frame("error", items.encode_stop(stopped, next_index)) if stopped is not None else b""
        await write(last + self._frame("summary", items.encode_summary(summary)))

    def _trace(self, stopped: PortcullisError | None) -> None:
        tracing.annotate("portcullis.items", self._tally.total)
        tracing.annotate("portcullis.failed_items", self._tally.failed)
        tracing.annotate("portcullis.degraded", self._tally.degraded > 0)
        if stopped is not None:
            tracing.annotate("portcullis.outcome", str(stopped.code))
            tracing.fail(str(stopped.code))
        elif self._tally.failed:
            tracing.refuse()

    async def _take(self) -> list[Entry]:
        """The next items."""
        return await self.feed.take(self._pace.size, items.MAX_CHARACTERS)

    def _send_off(self, entries: list[Entry], group: asyncio.TaskGroup) -> None:
        characters = sum(len(entry.text) for entry in entries)
        self._pace.begin(len(entries), characters)
        group.create_task(self._work(entries, characters))

    async def _wait_for_room(self, count: int) -> None:
        while not self._pace.has_room(count):
            self._room.clear()
            await self._room.wait()

    async def _work(self, entries: list[Entry], characters: int) -> None:
        outcomes = {entry.index: entry.error for entry in entries if entry.error is not None}
        texts = [entry for entry in entries if entry.error is None]
        lines = [items.line_of(entry, outcomes[entry.index], self._config) for entry in entries if entry.error is not None]
        if texts:
            began = self.desk.clock.monotonic()
            judged = await self._judged(texts)
            seconds = self.desk.clock.monotonic() - began
            self._pace.answered(len(texts), seconds)
            _trace_failures(texts, judged, seconds)
            lines += [items.line_of(entry, outcome, self._config) for entry, outcome in zip(texts, judged, strict=True)]
        await self._tell(lines)
        self._pace.end(len(entries), characters)
        self._room.set()

    async def _judged(self, texts: list[Entry]) -> list[Verdict | PortcullisError]:
        if not self._stop.is_set():
            return await self.desk.judge(texts, self._config)
        # What was charged is still judged when the process is about to stop, but not for ever.
        try:
            async with asyncio.timeout_at(self._last_call()):
                return await self.desk.judge(texts, self._config)
        except TimeoutError:
            return [PortcullisError(ErrorCode.STAGE_UNAVAILABLE, STOPPING)] * len(texts)

    _stop_at: float | None = None

    def _last_call(self) -> float:
        if self._stop_at is None:
            self._stop_at = asyncio.get_running_loop().time() + STOP_SECONDS
        return self._stop_at

    async def _tell(self, lines: list[BatchLine]) -> None:
        pieces = []
        for line in lines:
            self._tally.count(line)
            BATCH_ITEMS.labels("ok" if isinstance(line.error, msgspec.UnsetType) else line.error.code).inc()
            kind, encoded = items.encode_line(line)
            if self._in_order:
                self._held.append((line.index, encoded))
            else:
                pieces.append(self._frame(kind, encoded))
        if pieces:
            await self._write(b"".join(pieces))


def _trace_failures(texts: list[Entry], judged: list[Verdict | PortcullisError], seconds: float) -> None:
    failed = [(entry.index, each.code) for entry, each in zip(texts, judged, strict=True) if isinstance(each, PortcullisError)]
    for index, code in failed[:_MOST_ITEM_SPANS]:
        tracing.record("item", seconds, own=(("portcullis.item.index", index),), error=str(code))


async def _nowhere(_: bytes) -> None:
    raise AssertionError("nobody reads yet")


class BatchResponse(Response):
    """Sends a run's lines while it goes on, and ends it as soon as the caller has gone."""

    def __init__(self, run: Run, held: AsyncExitStack, media_type: str, *, idle_seconds: float) -> None:
        # As Starlette's StreamingResponse: there is no body whose length could be told.
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        headers = core.rate_headers(run.desk.rate) if run.desk.rate is not None else {}
        if media_type != items.JSON:
            headers["x-accel-buffering"] = "no"  # nginx would keep lines until it has a buffer full of them
        self.init_headers(headers)
        self._run = run
        self._held = held
        self._idle_seconds = idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            peer = peer_of(scope)
            left = asyncio.Event()
            answering = asyncio.create_task(self._answer(send, peer, left))
            leaving = asyncio.create_task(self._gone(peer, receive, left))
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if answering.done():
                    answering.result()
            finally:
                await tasks.end(leaving)
                if not answering.done():
                    await tasks.end(answering)

    async def _answer(self, send: Send, peer: Peer | None, left: asyncio.Event) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.Lock()

        async def write(piece: bytes) -> None:
            async with writing:
                try:
                    async with asyncio.timeout(self._idle_seconds):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    # It takes nothing, and does not go away either: what it holds up is let go.
                    left.set()
                    if peer is not None:
                        peer.abort()

        try:
            await self._run.answer(write)
        except* ClientDisconnect:
            left.set()
        if left.is_set():
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _gone(self, peer: Peer | None, receive: Receive, left: asyncio.Event) -> None:
        """Return when nobody reads any more."""
        hanging_up: Coroutine[Any, Any, object] = peer.gone.wait() if peer is not None else self._hung_up(receive)
        watched: list[asyncio.Task[Any]] = [asyncio.create_task(left.wait()), asyncio.create_task(hanging_up)]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in watched:
                future.cancel()

    async def _hung_up(self, receive: Receive) -> None:
        """ASGI's own way, which works once the body has been read."""
        if isinstance(self._run.feed, ChargedFeed):
            await self._run.feed.ended.wait()
        while (await receive())["type"] != "http.disconnect":
            pass
