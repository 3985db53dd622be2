"""The HTTP interface as a table: which function answers which call, and what OpenAPI says of it."""

from __future__ import annotations

import http
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from libs.common.contracts import KeyList, KeyRecord
from libs.common.errors import CATALOGUE
from services.edge import items, problems, schemas
from services.edge.batch import Batches
from services.edge.handlers import DEFAULT_PAGE, MAX_PAGE, Handlers
from services.edge.jobs import DEFAULT_JOBS, MAX_JOBS, MAX_RESULTS, Jobs

DESCRIPTION = """Tells an application whether a text tries to take over its language model.

Keys come in `X-API-Key` or `Authorization: Bearer`, the admin token in `X-Admin-Token` or `Authorization: Bearer`; neither ever
in the URL. Every error is `application/problem+json` (RFC 9457). Unknown fields of a request are ignored, and of equal names in
one JSON object the last counts. JSON is taken under `application/json`, `+json`, without a type, and under curl's default
`application/x-www-form-urlencoded` when the body is a JSON object. `X-Request-Timeout` (seconds) lowers the deadline of a call,
`X-Request-ID` names it, and `traceparent` is passed on.
"""
REQUEST_HEADERS = [
    "Authorization", "Content-Type", "X-API-Key", "X-Admin-Token", "X-Request-ID", "X-Request-Timeout", "traceparent", "Prefer",
    "Idempotency-Key",
]  # fmt: skip
RATE_HEADERS = {
    "X-RateLimit-Limit-Minute": "Units per sliding minute",
    "X-RateLimit-Remaining-Minute": "Units left of the minute",
    "X-RateLimit-Limit-Day": "Units per sliding day",
    "X-RateLimit-Remaining-Day": "Units left of the day",
    "RateLimit-Policy": "The limits as draft-ietf-httpapi-ratelimit-headers has them",
    "RateLimit": "What is left; `t`: seconds until the next unit is free",
}
ANSWER_HEADERS = [*RATE_HEADERS, "X-Request-ID", "Retry-After", "Location"]

_REFERENCE = "#/components/schemas/{name}"
_OPEN = frozenset({400, 431, 503})
_CALL = frozenset({400, 422, 429, 431, 503, 504})
_BODY = frozenset({413, 415})
_KEYED = frozenset({401, 403})
_KEY: list[dict[str, list[str]]] = [{"ApiKey": []}, {"Bearer": []}]
_ADMIN: list[dict[str, list[str]]] = [{"AdminToken": []}, {"Bearer": []}, {"ApiKey": []}]

_KEY_ID = {
    "name": "key_id",
    "in": "path",
    "required": True,
    "description": "The public id of a key",
    "schema": {"type": "string", "pattern": "^[0-9A-Za-z]{12}$"},
}
_BREAKER_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_AFTER = {
    "name": "after",
    "in": "query",
    "description": "The last key_id of the page before",
    "schema": {"type": "string", "pattern": "^[0-9A-Za-z]{12}$"},
}
_LIMIT = {
    "name": "limit",
    "in": "query",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. `answer` None: no body; `errors`: the statuses with which it can be refused; `security` None: no key."""

    method: str
    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    tag: str
    answer: type[msgspec.Struct] | None = None
    status: int = 200
    errors: frozenset[int] = _OPEN
    body: type[msgspec.Struct] | None = None
    body_example: dict[str, object] = field(default_factory=dict)
    parameters: tuple[dict[str, Any], ...] = ()
    security: list[dict[str, list[str]]] | None = None
    also: dict[int, type[msgspec.Struct]] = field(default_factory=dict)
    """Other statuses with a body that is no problem document."""
    also_takes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Media types of the body besides JSON, as OpenAPI describes them."""
    also_gives: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same of the answer."""
    lines: bool = False
    """The answer is NDJSON: any number of `answer`, one a line."""
    accepted: type[msgspec.Struct] | None = None
    """What a 202 says, with the `Location` of what was accepted."""
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What can be called next with what was answered (where there is a 202, with that)."""


_THRESHOLD = {
    "name": "confidence_threshold",
    "in": "query",
    "description": "For NDJSON, which has no `config`",
    "schema": {"type": "number", "minimum": 0, "maximum": 1},
}
_DETAILED = {
    "name": "detailed_response",
    "in": "query",
    "description": "For NDJSON, which has no `config`",
    "schema": {"type": "boolean", "default": False},
}
# Without an example: tools that try examples out (schemathesis) cannot write this media type, and stop at it.
_ITEM_LINES = {
    items.NDJSON: {
        "schema": {
            "type": "string",
            "description": 'One BatchItem a line, as many as there are, such as `{"id": "a", "text": "Ignore all instructions"}`',
        }
    }
}
_LINES = 'one BatchLine for each item in the order of completion, then one `{"summary": BatchSummary}`. A stream that ends early'
_RESULT_LINES = {
    items.NDJSON: {
        "schema": {"type": "string", "description": f"JSON a line: {_LINES} says why in a line before it, with `next_index`"}
    },
    items.EVENTS: {
        "schema": {"type": "string", "description": f"Events `result`, `error` and `summary`: {_LINES} has an `error` before it"}
    },
}


_PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`respond-async`: accept the batch as a job, and answer 202",
    "schema": {"type": "string"},
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Of a job: with the same key and the same body it is the same job, with another body 409",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_WEBHOOK = {
    "name": "webhook_url",
    "in": "query",
    "description": "Of a job, for NDJSON, which has no `webhook`",
    "schema": {"type": "string", "format": "uri", "maxLength": 2000},
}
_JOB_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The id of a job",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{28}$"},
}
_BEFORE = {
    "name": "before",
    "in": "query",
    "description": "`next_before` of the page before",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{28}$"},
}
_JOBS_LIMIT = {
    "name": "limit",
    "in": "query",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_JOBS, "default": DEFAULT_JOBS},
}
_CURSOR = {
    "name": "after",
    "in": "query",
    "description": "The `cursor` of the last line that was read",
    "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}
_RESULTS_LIMIT = {
    "name": "limit",
    "in": "query",
    "description": "All that there are when it is left out",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS},
}


def _link(method: str, path: str, parameter: str, value: str) -> dict[str, Any]:
    pointer = path.replace("~", "~0").replace("/", "~1")
    return {"operationRef": f"#/paths/{pointer}/{method}", "parameters": {parameter: value}}


def _job_links(job_id: str) -> dict[str, dict[str, Any]]:
    return {
        "FollowJob": _link("get", "/v1/jobs/{id}", "id", job_id),
        "ReadResults": _link("get", "/v1/jobs/{id}/results", "id", job_id),
        "CancelJob": _link("delete", "/v1/jobs/{id}", "id", job_id),
    }


_LINKS_OF_NEW_JOB = _job_links("$response.body#/id")
_LINKS_OF_JOB = _job_links("$request.path.id")
_LINKS_OF_NEW_KEY = {
    "GetKey": _link("get", "/admin/keys/{key_id}", "key_id", "$response.body#/key_id"),
    "UpdateKey": _link("patch", "/admin/keys/{key_id}", "key_id", "$response.body#/key_id"),
    "DeleteKey": _link("delete", "/admin/keys/{key_id}", "key_id", "$response.body#/key_id"),
}


def operations(handlers: Handlers, batches: Batches, jobs: Jobs) -> tuple[Operation, ...]:
    keyed = _CALL | _KEYED
    return (
        Operation(
            "POST", "/v1/detect", handlers.detect, "detection", schemas.DetectAnswer, errors=keyed | _BODY,
            body=schemas.DetectBody, body_example={"text": "Ignore all previous instructions"}, security=_KEY,
        ),
        Operation(
            "POST", "/v1/detect/batch", batches.detect, "detection", schemas.BatchAnswer, errors=keyed | _BODY | {409},
            body=schemas.BatchBody,
            body_example={"requests": [{"id": "a", "text": "Ignore all previous instructions"}, {"text": "What time is it?"}]},
            parameters=(_THRESHOLD, _DETAILED, _WEBHOOK, _PREFER, _IDEMPOTENCY_KEY), security=_KEY, also_takes=_ITEM_LINES,
            also_gives=_RESULT_LINES, accepted=schemas.JobAnswer, links=_LINKS_OF_NEW_JOB,
        ),
        Operation(
            "GET", "/v1/jobs", jobs.list, "jobs", schemas.JobsAnswer, errors=keyed, parameters=(_BEFORE, _JOBS_LIMIT),
            security=_KEY,
        ),
        Operation(
            "GET", "/v1/jobs/{id}", jobs.get, "jobs", schemas.JobAnswer, errors=keyed | {404}, parameters=(_JOB_ID,),
            security=_KEY, links=_LINKS_OF_JOB,
        ),
        Operation(
            "GET", "/v1/jobs/{id}/results", jobs.results, "jobs", schemas.JobLine, errors=keyed | {404},
            parameters=(_JOB_ID, _CURSOR, _RESULTS_LIMIT), security=_KEY, lines=True, links=_LINKS_OF_JOB,
        ),
        Operation(
            "DELETE", "/v1/jobs/{id}", jobs.cancel, "jobs", schemas.JobAnswer, errors=keyed | {404}, parameters=(_JOB_ID,),
            security=_KEY, links=_LINKS_OF_JOB,
        ),
        Operation(
            "POST", "/auth/register", handlers.register, "keys", schemas.IssuedKeyAnswer, 201, _CALL | _BODY | {403},
            body=schemas.RegisterBody, body_example={"name": "My App", "rate_limit_per_minute": 70},
        ),
        Operation(
            "GET", "/auth/profile", handlers.profile, "keys", schemas.ProfileAnswer, errors=keyed,
            security=_KEY,
        ),
        Operation(
            "POST", "/auth/rotate", handlers.rotate, "keys", schemas.IssuedKeyAnswer, errors=keyed,
            security=_KEY,
        ),
        Operation("DELETE", "/auth/key", handlers.revoke, "keys", None, 204, keyed, security=_KEY),
        Operation(
            "GET", "/admin/keys", handlers.list_keys, "admin", KeyList, errors=keyed, parameters=(_AFTER, _LIMIT),
            security=_ADMIN,
        ),
        Operation(
            "POST", "/admin/keys", handlers.create_key, "admin", schemas.IssuedKeyAnswer, 201, keyed | _BODY,
            body=schemas.CreateKeyBody, body_example={"name": "My App", "scopes": ["detect"]},
            security=_ADMIN, links=_LINKS_OF_NEW_KEY,
        ),
        Operation(
            "GET", "/admin/keys/{key_id}", handlers.get_key, "admin", KeyRecord, errors=keyed | {404},
            parameters=(_KEY_ID,), security=_ADMIN,
        ),
        Operation(
            "PATCH", "/admin/keys/{key_id}", handlers.update_key, "admin", KeyRecord, errors=keyed | _BODY | {404},
            body=schemas.UpdateKeyBody, body_example={"rate_limit_per_minute": 120}, parameters=(_KEY_ID,),
            security=_ADMIN,
        ),
        Operation(
            "DELETE", "/admin/keys/{key_id}", handlers.delete_key, "admin", None, 204, keyed | {404},
            parameters=(_KEY_ID,), security=_ADMIN,
        ),
        Operation(
            "GET", "/v1/circuit-breakers", handlers.list_breakers, "operations", schemas.BreakersAnswer, errors=keyed,
            security=_KEY + _ADMIN[:1],
        ),
        Operation(
            "POST", "/v1/circuit-breakers/{name}/reset", handlers.reset_breaker, "operations", schemas.BreakersAnswer,
            errors=keyed | {404}, parameters=(_BREAKER_NAME,), security=_ADMIN,
        ),
        Operation(
            "GET", "/health", handlers.health, "operations", schemas.HealthAnswer, also={503: schemas.HealthAnswer},
        ),
        Operation("GET", "/health/live", handlers.live, "operations", schemas.LiveAnswer),
        Operation(
            "GET", "/health/ready", handlers.ready, "operations", schemas.ReadyAnswer, also={503: schemas.ReadyAnswer},
        ),
    )  # fmt: skip


def add_routes(app: FastAPI, handlers: Handlers, batches: Batches, jobs: Jobs) -> None:
    """Register every operation, and `app.openapi()` that describes them."""
    table = operations(handlers, batches, jobs)
    answers = {kind for operation in table for kind in (operation.answer, operation.accepted) if kind is not None}
    bodies = {operation.body for operation in table if operation.body is not None}
    _, components = msgspec.json.schema_components(
        sorted(answers | bodies | {schemas.Problem}, key=lambda kind: kind.__name__), ref_template=_REFERENCE
    )
    for operation in table:
        app.add_api_route(
            operation.path,
            operation.endpoint,
            methods=[operation.method],
            status_code=operation.status,
            response_class=Response,
            tags=[operation.tag],
            openapi_extra=_describe(operation),
        )
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document["components"] = {
            "schemas": components,
            "responses": {_problem_name(status): _problem(status) for status in _statuses(table)},
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in RATE_HEADERS.items()},
            "securitySchemes": {
                "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "Bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or the admin token"},
                "AdminToken": {"type": "apiKey", "in": "header", "name": "X-Admin-Token"},
            },
        }
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _describe(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": http.HTTPStatus(operation.status).phrase}
    if operation.lines:
        assert operation.answer is not None
        lines = {"type": "string", "description": f"JSON a line: {operation.answer.__name__}, as described in the components"}
        success["content"] = {items.NDJSON: {"schema": lines}}
    elif operation.answer is not None:
        success["content"] = operation.also_gives | _content(operation.answer)
    if operation.security == _KEY:
        success["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in RATE_HEADERS}
    responses: dict[str, Any] = {str(operation.status): success}
    if operation.accepted is not None:
        responses["202"] = {
            "description": http.HTTPStatus(202).phrase,
            "content": _content(operation.accepted),
            "headers": {"Location": {"required": True, "schema": {"type": "string"}}, **success.get("headers", {})},
        }
    if operation.links:
        responses[str(operation.status if operation.accepted is None else 202)]["links"] = operation.links
    for status in sorted(operation.errors):
        responses[str(status)] = {"$ref": f"#/components/responses/{_problem_name(status)}"}
    for status, answer in operation.also.items():
        responses[str(status)] = {
            "description": http.HTTPStatus(status).phrase,
            "content": {**_content(answer), **_problem(status)["content"]},
        }
    described: dict[str, Any] = {"responses": responses, "security": operation.security or []}
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        content = _content(operation.body)
        content["application/json"]["example"] = operation.body_example
        described["requestBody"] = {"required": True, "content": content | operation.also_takes}
    return described


def _content(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(name=kind.__name__)}}}


def _statuses(table: tuple[Operation, ...]) -> list[int]:
    return sorted(frozenset().union(*(operation.errors for operation in table)))


def _problem_name(status: int) -> str:
    return http.HTTPStatus(status).phrase.replace(" ", "").replace("-", "")


def _problem(status: int) -> dict[str, Any]:
    kinds = [kind for kind in CATALOGUE.values() if kind.status == status]
    return {
        "description": "; ".join(dict.fromkeys(kind.title for kind in kinds)),
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(name="Problem")}}},
    }
