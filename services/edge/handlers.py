"""One function per call of the HTTP interface: parse, ask the stages, put the reply into HTTP. No rule is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from libs.common import subjects, tracing
from libs.common.context import RequestContext
from libs.common.contracts import (
    AccountRequest,
    AdminCreateKey,
    AdminKey,
    AdminListKeys,
    AdminUpdateKey,
    BreakerReport,
    BreakersListRequest,
    BreakersResetRequest,
    DetectPayload,
    DetectRequest,
    IssuedKey,
    KeyList,
    KeyRecord,
    Message,
    RateState,
    RegisterRequest,
    Reply,
    Verdict,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, health, problems
from services.edge.admission import Admission
from services.edge.bodies import Bodies
from services.edge.gate import Call, Gate, call_of
from services.edge.metrics import PublicPage
from services.edge.ports import Answered, Stages
from services.edge.replies import Refused, decoded
from services.edge.schemas import (
    BreakersAnswer,
    CreateKeyBody,
    DetectAnswer,
    DetectBody,
    DetectConfig,
    IssuedKeyAnswer,
    LiveAnswer,
    ProfileAnswer,
    ReadyAnswer,
    RegisterBody,
    UpdateKeyBody,
)

T = TypeVar("T")

BREAKERS_WINDOW_SECONDS = 0.5
MAX_PAGE = 1000
DEFAULT_PAGE = 100
_RETRY = {"retry-after": "1"}

_DETECT = msgspec.json.Decoder(DetectBody)
_REGISTER = msgspec.json.Decoder(RegisterBody)
_CREATE_KEY = msgspec.json.Decoder(CreateKeyBody)
_UPDATE_KEY = msgspec.json.Decoder(UpdateKeyBody)

_VERDICT = msgspec.json.Decoder(Verdict)
_ISSUED_KEY = msgspec.json.Decoder(IssuedKey)
_KEY_RECORD = msgspec.json.Decoder(KeyRecord)
_KEY_LIST = msgspec.json.Decoder(KeyList)
_BREAKER_REPORT = msgspec.json.Decoder(BreakerReport)
_REPLY = msgspec.json.Decoder(Reply)

_IDEMPOTENT = frozenset(
    {
        subjects.DETECT_REQUEST,
        subjects.ACCOUNT_PROFILE,
        subjects.ADMIN_KEYS_LIST,
        subjects.ADMIN_KEYS_GET,
        subjects.ADMIN_KEYS_UPDATE,
    }
)
"""What does no harm when it is done twice: the bus may send it again when a stage dies with it."""

_DEFAULT_CONFIG = DetectConfig()
_encode = msgspec.json.Encoder().encode


class Handlers:
    """The calls. Each is `Request` → `Response`, and raises `PortcullisError` or `Refused`."""

    def __init__(
        self,
        stages: Stages,
        bodies: Bodies,
        monitor: health.FleetMonitor,
        admission: Admission,
        *,
        request_timeout_seconds: float,
    ) -> None:
        self.gate: Gate | None = None
        """Set when the gate stands around the app; tells when the process is about to stop."""
        self._stages = stages
        self._bodies = bodies
        self._monitor = monitor
        self._admission = admission
        self._longest_seconds = request_timeout_seconds
        self._public_metrics = PublicPage()

    # --- detection -------------------------------------------------------------------------------------------------------

    async def detect(self, request: Request) -> Response:
        """Judge one text: does it try to take over the language model that it is meant for?"""
        call = call_of(request.scope)
        credential = core.credential(call.headers)
        context = self._context(call)
        # Before the body is read, which nobody needs if there is no room; a place is taken after that, since it may come slowly.
        self._admission.check(self._remaining(context))
        body = await self._body(request, call, context, _DETECT)
        config = body.config or _DEFAULT_CONFIG
        payload = DetectPayload(text=body.text, threshold=config.confidence_threshold, detailed=config.detailed_response)
        message = DetectRequest(credential=credential, payload=raw(payload))
        answered = await self._admission.through(
            lambda: self._ask(subjects.DETECT_REQUEST, message, context), self._remaining(context)
        )
        verdict = decoded(answered, _VERDICT)
        rate = answered.reply.rate
        degraded = verdict.degraded or (rate is not None and rate.degraded)
        tracing.annotate("portcullis.key_id", credential.key_id)
        tracing.annotate("portcullis.is_malicious", verdict.is_malicious)
        tracing.annotate("portcullis.degraded", degraded)
        if verdict.coverage is not None:
            tracing.annotate("portcullis.tokens", verdict.coverage.tokens)
        spent_ms = round((self._stages.clock.monotonic() - call.arrived) * 1000, 3)
        answer = DetectAnswer(
            is_malicious=verdict.is_malicious,
            confidence=verdict.confidence,
            threat_types=verdict.threat_types,
            processing_time_ms=spent_ms,
            endpoint=verdict.endpoint,
            request_id=call.request_id,
            degraded=degraded,
            coverage=verdict.coverage,
        )
        if config.detailed_response:
            answer = msgspec.structs.replace(
                answer,
                reason=verdict.reason,
                spans=verdict.spans,
                transforms=verdict.transforms,
                timings={**answered.timings, **verdict.timings, "total": spent_ms},
            )
        return _json(answer, rate)

    # --- the caller's own key --------------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        """Issue a new key. It is shown in this answer only."""
        call = call_of(request.scope)
        context = self._context(call)
        body = await self._body(request, call, context, _REGISTER)
        message = RegisterRequest(
            name=body.name,
            address=request.client.host if request.client else "",
            rate_limit_per_minute=body.rate_limit_per_minute,
            rate_limit_per_day=body.rate_limit_per_day,
            admin_digest=core.admin_digest(call.headers),
        )
        answered = await self._ask(subjects.REGISTER_REQUEST, message, context)
        return _json(_issued(decoded(answered, _ISSUED_KEY)), status=201)

    async def profile(self, request: Request) -> Response:
        """The caller's key: its limits, what is left of them, and its use."""
        call = call_of(request.scope)
        answered = await self._account(call, subjects.ACCOUNT_PROFILE)
        record, rate = decoded(answered, _KEY_RECORD), answered.reply.rate
        return _json(
            ProfileAnswer(
                key_id=record.key_id,
                name=record.name,
                scopes=record.scopes,
                created_at=record.created_at,
                last_used_at=record.last_used_at,
                expires_at=record.expires_at,
                rate_limit_per_minute=record.rate_limit_per_minute,
                rate_limit_per_day=record.rate_limit_per_day,
                requests_this_minute=rate.limit_minute - rate.remaining_minute if rate else None,
                requests_today=rate.limit_day - rate.remaining_day if rate else None,
                remaining_this_minute=rate.remaining_minute if rate else None,
                remaining_today=rate.remaining_day if rate else None,
                total_requests=record.total_requests,
                malicious_detections=record.malicious_detections,
                days=record.days,
            ),
            rate,
        )

    async def rotate(self, request: Request) -> Response:
        """Issue a new secret for the caller's key. The old one stays valid until `previous_valid_until`."""
        answered = await self._account(call_of(request.scope), subjects.ACCOUNT_ROTATE)
        issued = decoded(answered, _ISSUED_KEY)
        answer = msgspec.structs.replace(_issued(issued), previous_valid_until=issued.previous_valid_until)
        return _json(answer, answered.reply.rate)

    async def revoke(self, request: Request) -> Response:
        """Revoke the caller's key, for good."""
        answered = await self._account(call_of(request.scope), subjects.ACCOUNT_REVOKE)
        return _nothing(answered.reply.rate)

    async def _account(self, call: Call, subject: str) -> Answered:
        return await self._ask(subject, AccountRequest(credential=core.credential(call.headers)), self._context(call))

    # --- all keys --------------------------------------------------------------------------------------------------------

    async def list_keys(self, request: Request) -> Response:
        """All keys, oldest first, a page at a time: pass `next_after` as `after` until it is null."""
        call = call_of(request.scope)
        admin = core.admin_credential(call.headers)
        message = AdminListKeys(
            admin=admin, after=request.query_params.get("after"), limit=_page_size(request.query_params.get("limit"))
        )
        answered = await self._ask(subjects.ADMIN_KEYS_LIST, message, self._context(call))
        return _json(decoded(answered, _KEY_LIST), answered.reply.rate)

    async def create_key(self, request: Request) -> Response:
        """Issue a key with scopes, limits and an expiry of one's choice. It is shown in this answer only."""
        call = call_of(request.scope)
        admin = core.admin_credential(call.headers)
        context = self._context(call)
        body = await self._body(request, call, context, _CREATE_KEY)
        message = AdminCreateKey(
            admin=admin,
            name=body.name,
            scopes=body.scopes,
            rate_limit_per_minute=body.rate_limit_per_minute,
            rate_limit_per_day=body.rate_limit_per_day,
            expires_at=body.expires_at,
        )
        answered = await self._ask(subjects.ADMIN_KEYS_CREATE, message, context)
        return _json(_issued(decoded(answered, _ISSUED_KEY)), answered.reply.rate, status=201)

    async def get_key(self, request: Request) -> Response:
        """One key, with its use."""
        answered = await self._admin_key(request, subjects.ADMIN_KEYS_GET)
        return _json(decoded(answered, _KEY_RECORD), answered.reply.rate)

    async def update_key(self, request: Request) -> Response:
        """Change a key's name, scopes, limits or expiry. Fields that are left out, or null, stay as they are."""
        call = call_of(request.scope)
        admin = core.admin_credential(call.headers)
        context = self._context(call)
        body = await self._body(request, call, context, _UPDATE_KEY)
        message = AdminUpdateKey(
            admin=admin,
            key_id=request.path_params["key_id"],
            name=body.name,
            scopes=body.scopes,
            rate_limit_per_minute=body.rate_limit_per_minute,
            rate_limit_per_day=body.rate_limit_per_day,
            expires_at=body.expires_at,
        )
        answered = await self._ask(subjects.ADMIN_KEYS_UPDATE, message, context)
        return _json(decoded(answered, _KEY_RECORD), answered.reply.rate)

    async def delete_key(self, request: Request) -> Response:
        """Revoke a key, for good."""
        answered = await self._admin_key(request, subjects.ADMIN_KEYS_DELETE)
        return _nothing(answered.reply.rate)

    async def _admin_key(self, request: Request, subject: str) -> Answered:
        call = call_of(request.scope)
        message = AdminKey(admin=core.admin_credential(call.headers), key_id=request.path_params["key_id"])
        return await self._ask(subject, message, self._context(call))

    # --- breakers --------------------------------------------------------------------------------------------------------

    async def list_breakers(self, request: Request) -> Response:
        """The circuit breakers of all replicas of the proxy. Needs a key, or the admin token."""
        call = call_of(request.scope)
        context = self._context(call)
        answered = await self._verify(call, context)
        replicas = (await self._monitor.fleet()).count("detector_proxy")
        answers = await self._stages.gather(
            subjects.BREAKERS_LIST,
            BreakersListRequest(),
            context,
            window_seconds=BREAKERS_WINDOW_SECONDS,
            expected=replicas,
        )
        return _breakers(answers, answered.reply.rate)

    async def reset_breaker(self, request: Request) -> Response:
        """Close a breaker in all replicas of the proxy. Needs the admin token."""
        call = call_of(request.scope)
        message = BreakersResetRequest(admin=core.admin_credential(call.headers), name=request.path_params["name"])
        context = self._context(call)
        replicas = (await self._monitor.fleet()).count("detector_proxy")
        answers = await self._stages.gather(
            subjects.BREAKERS_RESET_REQUEST, message, context, window_seconds=BREAKERS_WINDOW_SECONDS, expected=replicas
        )
        return _breakers(answers, None)

    async def _verify(self, call: Call, context: RequestContext) -> Answered:
        """Let auth decide about a caller when the call itself does not pass it."""
        if core.admin_digest(call.headers) is not None:
            return await self._ask(
                subjects.ADMIN_KEYS_LIST, AdminListKeys(admin=core.admin_credential(call.headers), limit=1), context
            )
        return await self._ask(subjects.ACCOUNT_PROFILE, AccountRequest(credential=core.credential(call.headers)), context)

    # --- health ----------------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """The state of the whole gateway, as its processes tell it; no detection is made for it."""
        answer = health.describe(await self._monitor.fleet())
        unhealthy = answer.status == "unhealthy"
        return _json(answer, status=503 if unhealthy else 200, headers=_RETRY if unhealthy else None)

    async def live(self, _: Request) -> Response:
        """This process runs."""
        return _json(LiveAnswer(status="alive"))

    async def ready(self, _: Request) -> Response:
        """A detection would be answered now."""
        missing = health.missing(await self._monitor.fleet())
        if self.gate is not None and self.gate.stop.is_set():
            missing = (*missing, "edge")
        if missing:
            return _json(ReadyAnswer(status="not_ready", missing=missing), status=503, headers=_RETRY)
        return _json(ReadyAnswer(status="ready", missing=()))

    async def metrics(self, _: Request) -> Response:
        """What anybody may see of this process's metrics, in Prometheus' text format."""
        page = self._public_metrics.render(self._stages.clock.monotonic())
        return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})

    # --- what they share -------------------------------------------------------------------------------------------------

    def _context(self, call: Call) -> RequestContext:
        clock = self._stages.clock
        since_arrival = clock.monotonic() - call.arrived
        seconds = core.timeout_seconds(call.headers, self._longest_seconds) - since_arrival
        return RequestContext.lasting(seconds, clock, call.request_id, call.traceparent)

    async def _body(self, request: Request, call: Call, context: RequestContext, decoder: msgspec.json.Decoder[T]) -> T:
        async with self._bodies.read(call.headers, request.receive, self._remaining(context)) as body:
            core.require_json(call.headers, body)
            return core.decode_json(body, decoder)

    def _remaining(self, context: RequestContext) -> float:
        return context.remaining_seconds(self._stages.clock)

    async def _ask(self, subject: str, message: Message, context: RequestContext) -> Answered:
        answered = await self._stages.request(subject, message, context, idempotent=subject in _IDEMPOTENT)
        reply = answered.reply
        if reply.error is not None:
            raise Refused(problems.from_reply(reply.error), reply.rate)
        return answered


def _json(
    answer: msgspec.Struct, rate: RateState | None = None, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    fields: dict[str, str] = {**headers} if headers else {}
    if rate is not None:
        fields.update(core.rate_headers(rate))
    return Response(_encode(answer), status, fields, "application/json")


def _nothing(rate: RateState | None) -> Response:
    return Response(status_code=204, headers=core.rate_headers(rate) if rate else None)


def _issued(issued: IssuedKey) -> IssuedKeyAnswer:
    record = issued.record
    return IssuedKeyAnswer(
        api_key=issued.api_key,
        key_id=record.key_id,
        name=record.name,
        scopes=record.scopes,
        rate_limit_per_minute=record.rate_limit_per_minute,
        rate_limit_per_day=record.rate_limit_per_day,
        created_at=record.created_at,
        expires_at=record.expires_at,
    )


def _page_size(value: str | None) -> int:
    if value is None:
        return DEFAULT_PAGE
    if not value.isascii() or not value.isdigit() or not 1 <= int(value[:5]) <= MAX_PAGE or len(value) > 4:
        raise core.invalid_field("limit", f"Expected a whole number from 1 to {MAX_PAGE}")
    return int(value)


def _breakers(answers: list[bytes], rate: RateState | None) -> Response:
    """The replicas' reports, merged. A refusal counts only when no replica reports anything."""
    reports: list[BreakerReport] = []
    refusal: PortcullisError | None = None
    for answer in answers:
        try:
            reply = _REPLY.decode(answer)
            if reply.error is None:
                reports.append(_BREAKER_REPORT.decode(reply.result))
            else:
                refusal = problems.from_reply(reply.error)
        except (ValueError, RecursionError) as error:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal=f"a report cannot be read: {error}") from error
    if not reports:
        raise Refused(refusal or PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="no proxy answered"), rate)
    return _json(BreakersAnswer(core.merge_breakers(reports)), rate)


async def refused(request: Request, error: Any) -> Response:
    """The answer to a `PortcullisError` or a `Refused`."""
    rate: RateState | None = None
    if isinstance(error, Refused):
        error, rate = error.error, error.rate
    return problems.respond(error, call_of(request.scope).request_id, core.rate_headers(rate) if rate else None)
