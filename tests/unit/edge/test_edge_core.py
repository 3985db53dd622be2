"""What the edge reads off a request and writes on an answer."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.common import keys
from libs.common.contracts import BreakerReport, BreakerState, BreakerStatus, RateState
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core
from services.edge.schemas import DetectBody

DETECT = msgspec.json.Decoder(DetectBody)


@pytest.mark.parametrize(
    "content_type",
    [None, b"", b"application/json", b"Application/JSON; charset=utf-8", b"application/vnd.x+json", b"application/problem+json"],
)
@pytest.mark.parametrize("body", [b"{}", b"[", b""])
def test_json_types_and_no_type_are_taken(content_type: bytes | None, body: bytes) -> None:
    core.require_json({} if content_type is None else {b"content-type": content_type}, body)


@pytest.mark.parametrize("body", [b'{"text":"a"}', b' \r\n\t{"text"', b"{"])
def test_curls_default_type_is_taken_for_an_object(body: bytes) -> None:
    core.require_json({b"content-type": b"application/x-www-form-urlencoded"}, body)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (b"application/x-www-form-urlencoded", b"text=a"),
        (b"application/x-www-form-urlencoded", b""),
        (b"application/x-www-form-urlencoded", b"[{}]"),
        (b"text/plain", b"{}"),
        (b"text/json", b"{}"),
        (b"multipart/form-data", b"{}"),
        (b"application/jsonx", b"{}"),
        (b"+json", b"{}"),
        (b"application/xml", b"{}"),
    ],
)
def test_other_types_are_refused(content_type: bytes, body: bytes) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.require_json({b"content-type": content_type}, body)
    assert caught.value.code == ErrorCode.UNSUPPORTED_MEDIA_TYPE


def test_a_compressed_body_is_refused() -> None:
    with pytest.raises(PortcullisError) as caught:
        core.require_json({b"content-encoding": b"gzip"}, b"\x1f\x8b")
    assert caught.value.code == ErrorCode.UNSUPPORTED_MEDIA_TYPE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"text":"a"} x',
        b'\xef\xbb\xbf{"text":"a"}',
        b'{"text":"a\xff"}',
        b'{"text":"a","other":"\xff"}',
        b'{"text":"\xed\xa0\x80"}',
        b'{"text":"\\ud800"}',
        b'{"text":"\\udc00\\ud800"}',
        b'{"text":"a\x00"}',
        b'{"text":"a","config":{"confidence_threshold":NaN}}',
        b'{"text":"a","config":{"confidence_threshold":Infinity}}',
        b'{"text":"a","other":NaN}',
        b'{"text":5, NaN}',
        b"[" * 100_000,
        b'{"text":"a","other":' + b"[" * 100_000,
        b'{"other":' * 20_000,
    ],
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.decode_json(body, DETECT)
    assert caught.value.code == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"null", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"{}", "text"),
        (b'{"text":""}', "text"),
        (b'{"text":null}', "text"),
        (b'{"text":["a"]}', "text"),
        (b'{"text":"a","config":1}', "config"),
        (b'{"text":"a","config":{"confidence_threshold":1.01}}', "config.confidence_threshold"),
        (b'{"text":"a","config":{"confidence_threshold":-0.1}}', "config.confidence_threshold"),
        (b'{"text":"a","config":{"confidence_threshold":"0.5"}}', "config.confidence_threshold"),
        (b'{"text":"a","config":{"confidence_threshold":true}}', "config.confidence_threshold"),
        (b'{"text":"a","config":{"confidence_threshold":1e999}}', "config.confidence_threshold"),
        (b'{"text":"a","config":{"detailed_response":1}}', "config.detailed_response"),
        (b'{"text":"' + b"a" * 100_001 + b'"}', "text"),
    ],
)
def test_a_wrong_field_is_named(body: bytes, field: str) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.decode_json(body, DETECT)
    assert caught.value.code == ErrorCode.INVALID_FIELD
    assert [path for path, _ in caught.value.fields] == [field]


def test_the_longest_text_is_taken_in_characters_not_bytes() -> None:
    body = b'{"text":"' + b"\\ud83d\\ude00" * 100_000 + b'"}'
    assert len(core.decode_json(body, DETECT).text) == 100_000


def test_unknown_fields_are_ignored() -> None:
    assert core.decode_json(b'{"text":"a","other":{"deep":[1]},"config":{"more":1}}', DETECT).text == "a"


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_no_bytes_lead_to_anything_but_a_body_or_a_typed_refusal(data: bytes) -> None:
    try:
        core.decode_json(data, DETECT)
    except PortcullisError as error:
        status = error.kind.status
    else:
        status = 200
    assert status in (200, 400, 422)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200))
@settings(max_examples=200)
def test_every_text_arrives_as_it_was_sent(text: str) -> None:
    assert core.decode_json(msgspec.json.encode({"text": text}), DETECT).text == text


# --- credentials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        lambda key: {b"x-api-key": key},
        lambda key: {b"authorization": b"Bearer " + key},
        lambda key: {b"authorization": b"bearer   " + key},
        lambda key: {b"x-api-key": key, b"authorization": b"Basic abc"},
    ],
)
def test_a_key_is_found_in_either_header(headers: object) -> None:
    key = keys.generate()
    found = core.credential(headers(key.encode()))  # type: ignore[operator]
    assert found.digest == keys.digest(key)
    assert key not in repr(found)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"x-api-key": b""},
        {b"x-api-key": b"pc_live_x"},
        {b"x-api-key": b"\xff\xfe"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Basic abc"},
        {b"x-api-key": keys.generate().encode()[:-1] + b"!"},
    ],
)
def test_no_key_and_a_mistyped_key_are_the_same(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.credential(headers)
    assert (caught.value.code, caught.value.detail) == (
        ErrorCode.INVALID_CREDENTIALS,
        PortcullisError(ErrorCode.INVALID_CREDENTIALS).detail,
    )


def test_an_admin_token_crosses_as_its_digest() -> None:
    for headers in ({b"x-admin-token": b"secret"}, {b"authorization": b"Bearer secret"}):
        admin = core.admin_credential(headers)
        assert admin.admin_digest == keys.digest("secret")
        assert admin.credential is None


def test_a_key_may_be_an_administrators() -> None:
    key = keys.generate()
    for headers in ({b"x-api-key": key.encode()}, {b"authorization": b"Bearer " + key.encode()}):
        admin = core.admin_credential(headers)
        assert admin.admin_digest is None
        assert admin.credential is not None
        assert admin.credential.digest == keys.digest(key)


@pytest.mark.parametrize("headers", [{}, {b"x-admin-token": b""}, {b"x-api-key": b"x"}, {b"authorization": b"Bearer pc_live_x"}])
def test_without_admin_credentials_it_is_forbidden(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.admin_credential(headers)
    assert caught.value.code == ErrorCode.FORBIDDEN


# --- the rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "seconds"), [(None, 10.0), (b"0.5", 0.5), (b"10", 10.0), (b"99", 10.0), (b"1e1", 10.0)])
def test_a_timeout_can_only_be_lowered(value: bytes | None, seconds: float) -> None:
    assert core.timeout_seconds({} if value is None else {b"x-request-timeout": value}, 10.0) == seconds


@pytest.mark.parametrize("value", [b"", b"0", b"-1", b"nan", b"soon", b"1s", b"\xff"])
def test_a_timeout_that_is_no_positive_number_is_refused(value: bytes) -> None:
    with pytest.raises(PortcullisError) as caught:
        core.timeout_seconds({b"x-request-timeout": value}, 10.0)
    assert caught.value.fields[0][0] == "X-Request-Timeout"


def test_rate_headers_are_structured_fields_with_whole_seconds_rounded_up() -> None:
    rate = RateState(limit_minute=70, remaining_minute=0, reset_minute=0.2, limit_day=5, remaining_day=4, reset_day=0.0)
    assert core.rate_headers(rate) == {
        "x-ratelimit-limit-minute": "70",
        "x-ratelimit-remaining-minute": "0",
        "x-ratelimit-limit-day": "5",
        "x-ratelimit-remaining-day": "4",
        "ratelimit-policy": '"minute";q=70;w=60, "day";q=5;w=86400',
        "ratelimit": '"minute";r=0;t=1, "day";r=4;t=0',
    }


def test_the_worst_replica_speaks_for_a_breaker() -> None:
    def report(replica: str, state: BreakerState) -> BreakerReport:
        status = BreakerStatus(name="primary", state=state, replica=replica, failures=0, successes=0)
        return BreakerReport(replica=replica, breakers=(status,))

    (merged,) = core.merge_breakers([report("b", "closed"), report("a", "half_open")])
    assert (merged.name, merged.state, [status.replica for status in merged.replicas]) == ("primary", "half_open", ["a", "b"])
    (merged,) = core.merge_breakers([report("b", "open"), report("a", "half_open")])
    assert merged.state == "open"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:80", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("api.example.com:1", True),
        ("example.com", False),
        ("evilexample.com", False),
        ("localhost.evil.com", False),
        ("", False),
        ("[::2]", False),
    ],
)
def test_hosts(host: str, allowed: bool) -> None:
    assert core.host_allowed(host, ("localhost", "127.0.0.1", "[::1]", "*.example.com")) is allowed
    assert core.host_allowed(host, ("*",))
