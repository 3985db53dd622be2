"""Errors as RFC 9457 has them: application/problem+json."""

from __future__ import annotations

import http
from collections.abc import Mapping

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from libs.common import tracing
from libs.common.contracts import ErrorBody
from libs.common.errors import CATALOGUE, ErrorCode, PortcullisError
from services.edge.schemas import FieldProblem, Problem

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:portcullis:problem:"
"""A name, not an address: nothing is promised to be found there."""

_encode = msgspec.json.Encoder().encode


def document(error: PortcullisError, request_id: str) -> bytes:
    """`error` as a JSON document."""
    fields = tuple(FieldProblem(field, message) for field, message in error.fields)
    return _encode(
        Problem(
            type=TYPE_PREFIX + error.code,
            title=error.kind.title,
            status=error.kind.status,
            detail=error.detail,
            request_id=request_id,
            errors=fields or UNSET,
            retry_after=error.retry_after if error.retry_after is not None else UNSET,
        )
    )


def respond(error: PortcullisError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """`error` as an answer; `headers` besides its own."""
    tracing.annotate("portcullis.outcome", str(error.code))
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["retry-after"] = str(error.retry_after)
    if error.kind.status == 401:
        extra["www-authenticate"] = "Bearer"  # RFC 9110 wants it beside every 401
    return Response(document(error, request_id), error.kind.status, extra, MEDIA_TYPE)


def respond_http(status: int, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """The framework's own refusals: 404 for a path, 405 for a method."""
    if status == 404:
        return respond(PortcullisError(ErrorCode.NOT_FOUND), request_id, headers)
    title = http.HTTPStatus(status).phrase
    problem = Problem(
        type=TYPE_PREFIX + title.lower().replace(" ", "_"),
        title=title,
        status=status,
        detail=http.HTTPStatus(status).description or title,
        request_id=request_id,
    )
    return Response(_encode(problem), status, headers, MEDIA_TYPE)


def from_reply(body: ErrorBody) -> PortcullisError:
    """A stage's refusal. A code that this release does not know comes from a newer stage; its class cannot be told."""
    code = ErrorCode(body.code) if body.code in CATALOGUE else ErrorCode.STAGE_UNAVAILABLE
    return PortcullisError(
        code,
        body.detail,
        retry_after=body.retry_after,
        fields=tuple((field.field, field.message) for field in body.fields),
    )
