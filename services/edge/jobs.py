"""Jobs: a batch that is accepted now and judged as the key's limits allow, and what can be asked about it afterwards.

A submission is read as it arrives and handed on a message at a time; it is accepted when all of it is stored, or not at all.
Results are passed on a page at a time. Neither is ever in memory as a whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
from fastapi import Request, Response
from msgspec import UNSET
from starlette.responses import StreamingResponse
from starlette.types import Message as AsgiMessage

from libs.common import subjects, tracing
from libs.common.context import RequestContext
from libs.common.contracts import (
    MAX_JOB_APPEND,
    JobAppend,
    JobCreate,
    JobGet,
    JobItem,
    JobList,
    JobOpened,
    JobOperation,
    JobPage,
    JobRequest,
    JobResultPage,
    JobResults,
    JobSeal,
    JobStatus,
    Message,
    RateState,
    StoredJobResult,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, items
from services.edge.asking import insist
from services.edge.bodies import Bodies
from services.edge.feeds import Feed, ListFeed, NdjsonFeed
from services.edge.gate import Call, Gate, call_of
from services.edge.items import Entry
from services.edge.metrics import Shed, shed
from services.edge.ports import Answered, Stages
from services.edge.replies import Refused, decoded
from services.edge.schemas import DetectConfig, JobAnswer, JobLine, JobsAnswer, JobWebhook

MAX_JOBS = 100
DEFAULT_JOBS = 20
MAX_RESULTS = 100_000
APPEND_CHARACTERS = 250_000
"""Of one message, unless a single text is longer: at most 1.5 MB of JSON."""
PAGE = 500
_PASSING = frozenset({ErrorCode.STAGE_UNAVAILABLE, ErrorCode.INTERNAL})

_JOB_ID = re.compile("[0-9a-f]{28}", re.ASCII)
_CURSOR = re.compile("[0-9]{1,18}", re.ASCII)
_IDEMPOTENCY_KEY = re.compile("[!-~]{1,255}", re.ASCII)
_OPENED = msgspec.json.Decoder(JobOpened)
_STATUS = msgspec.json.Decoder(JobStatus)
_JOBS = msgspec.json.Decoder(JobPage)
_RESULTS = msgspec.json.Decoder(JobResultPage)
_encode = msgspec.json.Encoder().encode


class Jobs:
    """The calls. Each is `Request` → `Response`, and raises `PortcullisError` or `Refused`."""

    def __init__(
        self,
        stages: Stages,
        bodies: Bodies,
        *,
        request_timeout_seconds: float,
        idle_seconds: float,
        most_line_bytes: int,
        most_submissions: int,
    ) -> None:
        self.gate: Gate | None = None
        """Set when the gate stands around the app; tells when the process is about to stop."""
        self._stages = stages
        self._bodies = bodies
        self._longest_seconds = request_timeout_seconds
        self._idle_seconds = idle_seconds
        self._most_line_bytes = most_line_bytes
        self._most_submissions = most_submissions
        self._under_way = 0
        self._never = asyncio.Event()

    # --- submission ------------------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> Response:
        """Accept a batch as a job: `POST /v1/detect/batch` with `Prefer: respond-async`."""
        call = call_of(request.scope)
        core.credential(call.headers)
        if self._under_way >= self._most_submissions:
            shed(Shed.BATCHES)
            raise PortcullisError(ErrorCode.OVERLOADED, internal="too many submissions at a time")
        self._under_way += 1
        try:
            create = JobCreate(idempotency=_idempotency(call))
            if not items.is_ndjson(call.headers):
                async with self._bodies.read(call.headers, request.receive) as body:
                    core.require_json(call.headers, body)
                    document = items.decode_list(body)
                    webhook = document.webhook.url if document.webhook is not None else None
                    feed = ListFeed(items.entries_of(document))
                    submission = _Submission(document.config or DetectConfig(), webhook, create)
                    submission.hash.update(body)
                    return await self._store(call, feed, submission)
            core.require_no_encoding(call.headers)
            submission = _Submission(core.query_config(request.query_params), request.query_params.get("webhook_url"), create)

            async def receive() -> AsgiMessage:
                message = await request.receive()
                submission.hash.update(message.get("body", b""))
                return message

            lines = NdjsonFeed(
                receive,
                self.gate.stop if self.gate is not None else self._never,
                most_bytes=self._most_line_bytes,
                most_items=None,
                idle_seconds=self._idle_seconds,
            )
            return await self._store(call, lines, submission)
        finally:
            self._under_way -= 1

    async def _store(self, call: Call, feed: Feed, submission: _Submission) -> Response:
        # Auth decides about the caller before much is read.
        opened = decoded(await self._ask(call, "create", submission.create), _OPENED)
        total = 0
        try:
            while entries := await feed.take(MAX_JOB_APPEND, APPEND_CHARACTERS):
                append = JobAppend(job_id=opened.job_id, first_index=total, items=tuple(_item(entry) for entry in entries))
                total += len(entries)
                if not opened.sealed:  # otherwise the body is read only to see whether it is the same
                    await self._ask(call, "append", append)
            if not total:
                raise core.invalid_field("body", "Expected at least one line")
        except (PortcullisError, Refused):
            if not opened.sealed:
                await self._give_up(call, opened.job_id)
            raise
        config = submission.config
        seal = JobSeal(
            job_id=opened.job_id,
            total=total,
            digest=submission.digest(),
            threshold=config.confidence_threshold,
            detailed=config.detailed_response,
            webhook_url=submission.webhook,
        )
        answered = await self._ask(call, "seal", seal)
        answer = _job(decoded(answered, _STATUS))
        tracing.annotate("portcullis.job_id", answer.id)
        tracing.annotate("portcullis.key_id", core.credential(call.headers).key_id)
        headers = {"location": f"/v1/jobs/{answer.id}", "preference-applied": "respond-async"}
        return _json(answer, answered.reply.rate, status=202, headers=headers)

    async def _give_up(self, call: Call, job_id: str) -> None:
        """Say that a submission will not be completed, so that it is not one of the key's open jobs any more."""
        with suppress(PortcullisError, Refused):
            context = self._context(call)
            message = self._message(call, "cancel", JobGet(job_id=job_id))
            await self._stages.request(subjects.JOBS_REQUEST, message, context, idempotent=True)

    # --- reading ---------------------------------------------------------------------------------------------------------

    async def get(self, request: Request) -> Response:
        """How far a job is."""
        answered = await self._about(request, "get")
        return _json(_job(decoded(answered, _STATUS)), answered.reply.rate)

    async def list(self, request: Request) -> Response:
        """The caller's jobs, newest first, a page at a time: pass `next_before` as `before` until it is null."""
        call = call_of(request.scope)
        before = request.query_params.get("before")
        if before is not None and not _JOB_ID.fullmatch(before):
            raise core.invalid_field("before", "Expected the id of a job")
        limit = _number(request.query_params.get("limit"), "limit", MAX_JOBS) or DEFAULT_JOBS
        answered = await self._ask(call, "list", JobList(before=before, limit=limit))
        page = decoded(answered, _JOBS)
        return _json(JobsAnswer(tuple(map(_job, page.jobs)), page.next_before), answered.reply.rate)

    async def results(self, request: Request) -> Response:
        """The results that there are, in the order in which they were stored, one a line: pass the last `cursor` as `after`."""
        call = call_of(request.scope)
        after = request.query_params.get("after", "0")
        if not _CURSOR.fullmatch(after):
            raise core.invalid_field("after", "Expected the cursor of a result")
        limit = _number(request.query_params.get("limit"), "limit", MAX_RESULTS)
        answered = await self._about(request, "get")
        status = decoded(answered, _STATUS)
        first = await self._page(call, status.job_id, int(after), limit)
        headers = {"x-accel-buffering": "no"}
        if answered.reply.rate is not None:
            headers |= core.rate_headers(answered.reply.rate)
        return StreamingResponse(self._lines(call, status, first, limit), 200, headers, items.NDJSON)

    async def cancel(self, request: Request) -> Response:
        """Stop a job. What has been judged by then can still be read."""
        answered = await self._about(request, "cancel")
        return _json(_job(decoded(answered, _STATUS)), answered.reply.rate)

    async def _lines(self, call: Call, job: JobStatus, page: JobResultPage, limit: int | None) -> AsyncIterator[bytes]:
        """A failure in the middle ends the connection without the last chunk: what has come can be told from all there is."""
        while page.results:
            yield b"".join(_encode(_line(stored, detailed=job.detailed)) + b"\n" for stored in page.results)
            if limit is not None:
                limit -= len(page.results)
                if limit <= 0:
                    return
            if not page.more:
                return
            page = await self._page(call, job.job_id, page.results[-1].cursor, limit)

    async def _page(self, call: Call, job_id: str, after: int, limit: int | None) -> JobResultPage:
        message = JobResults(job_id=job_id, after=after, limit=min(PAGE, limit or PAGE))
        return decoded(await self._ask(call, "results", message), _RESULTS)

    async def _about(self, request: Request, operation: JobOperation) -> Answered:
        call = call_of(request.scope)
        core.credential(call.headers)
        job_id = request.path_params["id"]
        if not _JOB_ID.fullmatch(job_id):
            raise PortcullisError(ErrorCode.NOT_FOUND, "There is no such job.")
        tracing.annotate("portcullis.job_id", job_id)
        return await self._ask(call, operation, JobGet(job_id=job_id))

    # --- asking ----------------------------------------------------------------------------------------------------------

    def _context(self, call: Call) -> RequestContext:
        seconds = core.timeout_seconds(call.headers, self._longest_seconds)
        return RequestContext.lasting(seconds, self._stages.clock, call.request_id, call.traceparent)

    @staticmethod
    def _message(call: Call, operation: JobOperation, payload: Message) -> JobRequest:
        return JobRequest(credential=core.credential(call.headers), operation=operation, payload=raw(payload))

    async def _ask(self, call: Call, operation: JobOperation, payload: Message) -> Answered:
        """Every operation can be repeated, and does its work once."""
        token = f"j{random.getrandbits(64):x}"  # a name of this request; nothing secret depends on it
        return await insist(
            self._stages,
            subjects.JOBS_REQUEST,
            self._message(call, operation, payload),
            self._context(call),
            passing=_PASSING,
            token=token,
        )


class _Submission:
    """What comes with the items. `hash`: over the body as it is read."""

    def __init__(self, config: DetectConfig, webhook: str | None, create: JobCreate) -> None:
        self.config = config
        self.webhook = webhook
        self.create = create
        self.hash = hashlib.sha256()

    def digest(self) -> str:
        """Of all that makes a submission the same."""
        self.hash.update(_encode([self.config, self.webhook]))
        return self.hash.hexdigest()


def _idempotency(call: Call) -> str | None:
    value = call.headers.get(b"idempotency-key")
    if value is None:
        return None
    text = value.decode("latin-1")
    if not _IDEMPOTENCY_KEY.fullmatch(text):
        raise core.invalid_field("Idempotency-Key", "Expected 1 to 255 printable ASCII characters without spaces")
    return hashlib.sha256(value).hexdigest()


def _item(entry: Entry) -> JobItem:
    """A job is accepted as a whole: one item that cannot be read refuses it."""
    if entry.error is None:
        return JobItem(text=entry.text, id=entry.id)
    if entry.error.fields:
        fields = tuple((f"requests[{entry.index}].{field}", message) for field, message in entry.error.fields)
        raise PortcullisError(entry.error.code, fields=fields)
    raise PortcullisError(entry.error.code, f"Item {entry.index}: {entry.error.detail}")


def _job(status: JobStatus) -> JobAnswer:
    webhook = None
    if status.webhook is not None:
        secret = status.webhook.secret
        webhook = JobWebhook(status.webhook.url, secret if secret is not None else UNSET)
    return JobAnswer(
        id=status.job_id,
        state=status.state,
        total=status.total,
        done=status.done,
        malicious=status.malicious,
        failed=status.failed,
        items_per_second=status.items_per_second,
        estimated_end_at=status.estimated_end_at,
        created_at=status.created_at,
        started_at=status.started_at,
        finished_at=status.finished_at,
        reason=status.reason,
        webhook=webhook,
    )


def _line(stored: StoredJobResult, *, detailed: bool) -> JobLine:
    result = stored.result
    config = DetectConfig(detailed_response=detailed)
    line = items.line_of(Entry(result.index, result.id), items.outcome_of(result.result), config)
    return JobLine(cursor=str(stored.cursor), **msgspec.structs.asdict(line))


def _json(
    answer: msgspec.Struct, rate: RateState | None, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    fields = dict(headers or {})
    if rate is not None:
        fields |= core.rate_headers(rate)
    return Response(_encode(answer), status, fields, "application/json")


def _number(value: str | None, name: str, most: int) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9 or not 1 <= int(value) <= most:
        raise core.invalid_field(name, f"Expected a whole number from 1 to {most}")
    return int(value)
