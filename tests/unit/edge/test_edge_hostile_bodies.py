"""Bodies that mean harm, at every call that takes one: each has its status, quickly, and none reaches a stage."""

from __future__ import annotations

import gzip
import json
import time
import zlib

import httpx
import pytest

from tests.bad_inputs import LONE_SURROGATES, NO_JSON, filled
from tests.unit.edge.fakes import KEY, RECORD, FakeStages

KEYED = {"X-API-Key": KEY}
JOB = {**KEYED, "Prefer": "respond-async"}
LINES = {"Content-Type": "application/x-ndjson"}
ADMIN = {"X-Admin-Token": "let me in"}

CALLS = {
    "detect": ("POST", "/v1/detect", KEYED, '{"text": %s}'),
    "batch": ("POST", "/v1/detect/batch", KEYED, '{"requests": [{"text": %s}]}'),
    "job": ("POST", "/v1/detect/batch", JOB, '{"requests": [{"text": %s}]}'),
    "register": ("POST", "/auth/register", {}, '{"name": %s}'),
    "create": ("POST", "/admin/keys", ADMIN, '{"name": %s}'),
    "update": ("PATCH", f"/admin/keys/{RECORD.key_id}", ADMIN, '{"name": %s}'),
}
"""Method, path, headers, and a body with a place for a string."""
UPLOADS = (KEYED, JOB)


def _filled(body: bytes, template: str) -> bytes:
    return filled(body, (template % '"a"').encode()[1:-1])


async def assert_refused(response: httpx.Response, status: int, began: float, stages: FakeStages) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert time.monotonic() - began < 2  # far above what it takes on a busy machine; nothing waits for a deadline
    assert stages.asked == []


@pytest.mark.parametrize("name", NO_JSON)
async def test_what_is_no_json_is_400(client: httpx.AsyncClient, stages: FakeStages, name: str) -> None:
    for method, path, headers, template in CALLS.values():
        began = time.monotonic()
        body = _filled(NO_JSON[name], template)
        response = await client.request(method, path, content=body, headers={**headers, "Content-Type": "application/json"})
        await assert_refused(response, 400, began, stages)


async def test_half_a_surrogate_is_no_text(client: httpx.AsyncClient, stages: FakeStages) -> None:
    for method, path, headers, template in CALLS.values():
        for text in LONE_SURROGATES:
            began = time.monotonic()
            response = await client.request(method, path, content=template % text, headers=headers)
            await assert_refused(response, 400, began, stages)


@pytest.mark.parametrize(
    "encoding",
    [
        b"gzip", b"x-gzip", b"deflate", b"br", b"zstd", b"GZIP", b"gzip, identity", b"identity, gzip",
        b"aes128gcm", b"\xff",
    ],
)  # fmt: skip
async def test_nothing_is_ever_unpacked(client: httpx.AsyncClient, stages: FakeStages, encoding: bytes) -> None:
    uploads = [("POST", "/v1/detect/batch", {**headers, **LINES}, '{"text": %s}') for headers in UPLOADS]
    for method, path, headers, template in (*CALLS.values(), *uploads):
        plain = (template % json.dumps(" " * 100_000)).encode()
        for body in (gzip.compress(plain), zlib.compress(plain), plain):
            began = time.monotonic()
            given = [(name.encode(), value.encode()) for name, value in headers.items()]
            response = await client.request(method, path, content=body, headers=[*given, (b"Content-Encoding", encoding)])
            await assert_refused(response, 415, began, stages)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-999", "0." + "9" * 100_000, "9" * 1_000_000, "1" + "0" * 400])
async def test_numbers_beyond_all_bounds_are_refused_or_held_to_them(
    client: httpx.AsyncClient, stages: FakeStages, number: str
) -> None:
    began = time.monotonic()
    body = f'{{"text": "a", "config": {{"confidence_threshold": {number}}}}}'
    response = await client.post("/v1/detect", content=body, headers=KEYED)
    assert response.status_code in ((200,) if number.startswith(("0.", "1e-")) else (400, 422)), response.text
    assert time.monotonic() - began < 2
    assert bool(stages.asked) == (response.status_code == 200)
    if number.startswith("10"):
        return  # a whole number, and whether a limit may be so high is auth's to say
    for call in ("register", "create", "update"):
        method, path, headers, _ = CALLS[call]
        body = f'{{"name": "a", "rate_limit_per_minute": {number}}}'
        response = await client.request(method, path, content=body, headers=headers)
        assert response.status_code in (400, 422), (call, response.text)


async def test_a_text_may_hold_what_a_string_may_hold(client: httpx.AsyncClient, stages: FakeStages) -> None:
    """NUL and the like are characters, and what is hidden with them is what we look for."""
    for text in ("a\x00b", "\u202e" * 1000, "\u200b" * 1000, "e" + "\u0301" * 99_999, "\U0010ffff", "\ufffe", "\ufeff"):
        assert (await client.post("/v1/detect", json={"text": text}, headers=KEYED)).status_code == 200
    assert len(stages.asked) == 7


@pytest.mark.parametrize("name", sorted(set(NO_JSON) - {"nothing"}))
async def test_a_bad_line_is_its_own_error_and_the_next_is_judged(
    client: httpx.AsyncClient, stages: FakeStages, name: str
) -> None:
    bad = _filled(NO_JSON[name], '{"text": %s}').replace(b"\n", b" ")
    response = await client.post("/v1/detect/batch", content=bad + b'\n{"text":"a","id":"good"}\n', headers={**KEYED, **LINES})
    assert response.status_code == 200
    *results, last = map(json.loads, response.text.splitlines())
    by_index = {result["index"]: result for result in results}
    assert by_index[0]["error"]["status"] == 400
    assert by_index[1]["id"] == "good"
    assert "error" not in by_index[1]
    assert (last["summary"]["total"], last["summary"]["failed"]) == (2, 1)


@pytest.mark.parametrize(
    "header", ["X-API-Key", "Authorization", "X-Admin-Token", "Idempotency-Key", "X-Request-Timeout", "Prefer", "Accept"]
)
async def test_headers_of_any_bytes_are_answered(client: httpx.AsyncClient, header: str) -> None:
    for value in (
        b"\xff\xfe",
        b"",
        b" ",
        b"\t",
        b"'; DROP TABLE keys; --",
        b"a" * 16_000,
        "Bearer é".encode(),
        b"\xed\xa0\x80",
        b"1e999",
        b"nan",
    ):
        for method, path, headers, template in CALLS.values():
            given = [(name.encode(), part.encode()) for name, part in headers.items() if name != header]
            response = await client.request(method, path, content=template % '"a"', headers=[*given, (header.encode(), value)])
            assert response.status_code < 500, (method, path, value, response.text)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/%00", "/v1/jobs/%ff", "/v1/jobs/..%2f..%2fadmin", "/v1/jobs/" + "a" * 4000, "/v1/jobs/%0d%0aX:%20y/results",
        "/v1/jobs/*/results", "/v1/jobs/%3e/results", "/v1/jobs/a.b.c", "/v1/jobs/" + "0" * 28 + "%0a", "//v1/jobs",
    ],
)  # fmt: skip
async def test_paths_of_any_bytes_name_nothing(client: httpx.AsyncClient, stages: FakeStages, path: str) -> None:
    response = await client.get(path, headers=KEYED)
    assert response.status_code in (400, 403, 404, 422), response.text
    assert "x" not in response.headers
    assert stages.asked == []


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("X-API-Key", KEY, "nonsense"),
        ("X-API-Key", "nonsense", KEY),
        ("Authorization", f"Bearer {KEY}", "Bearer x"),
        ("Content-Type", "application/json", "text/plain"),
        ("Content-Type", "text/plain", "application/json"),
        ("Content-Encoding", "gzip", "identity"),
        ("Content-Encoding", "identity", "gzip"),
        ("X-Request-Timeout", "1", "10"),
        ("X-Admin-Token", "let me in", "x"),
        ("Idempotency-Key", "a", "b"),
    ],
)
async def test_what_is_meant_to_be_there_once_is_not_there_twice(
    client: httpx.AsyncClient, stages: FakeStages, name: str, first: str, second: str
) -> None:
    for method, path, headers, template in CALLS.values():
        began = time.monotonic()
        given = [each for each in headers.items() if each[0] != name]
        response = await client.request(method, path, content=template % '"a"', headers=[*given, (name, first), (name, second)])
        await assert_refused(response, 400, began, stages)
        assert name.lower() in response.json()["detail"]
