"""What callers send that they should not, at both doors, and what the gateway makes of it: one row each.

`tests/chaos/test_bad_inputs.py` plays every row against a running stack; tests of single services use parts of it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from infra.embedded.servers import MAX_PAYLOAD_BYTES
from libs.common import subjects
from libs.common.context import DEADLINE_HEADER, TIME_LEFT_HEADER, TIMINGS_HEADER
from libs.common.contracts import MAX_TEXT_CHARACTERS
from libs.common.errors import ErrorCode
from libs.common.stages import MAX_DOOR_BYTES

DEADLINE_SECONDS = 10.0
"""The default of a call, within which every row has its answer, unless it says otherwise."""
KEY = b"@KEY@"
"""Where the player puts the API key."""
KEY_ID = "@KEY_ID@"
"""Where it puts that key's id."""

# --- HTTP --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Http:
    """`begin` is sent at once, then `again` without end, one each `every_seconds` or as fast as it is taken, until there is an
    answer. `code`: of that answer, which is the only one, a problem document, and the last of its connection; None: the call is
    answered well. `inside`: the error of the first line of a batch. `or_refused`: what is much work may be refused for want of
    time. `answers`: so many calls are in it; `sips`: which are read slowly. `seconds`: within which the answer has come.
    """

    group: str
    name: str
    begin: bytes
    code: ErrorCode | None = ErrorCode.BAD_REQUEST
    again: bytes = b""
    every_seconds: float = 0.0
    inside: ErrorCode | None = None
    or_refused: bool = False
    answers: int = 1
    sips: bool = False
    seconds: float = DEADLINE_SECONDS


CLOSE = b"Connection: close\r\n\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nX-API-Key: " + KEY + b"\r\n"
CHUNKED = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"text":"a"}'
WHOLE = b"%x\r\n" % len(BODY) + BODY + b"\r\n"


def call(body: bytes, path: str = "/v1/detect", method: str = "POST", **headers: str) -> bytes:
    """A whole call with the key, unless a header says otherwise (`x_api_key=""`: none); underscores are hyphens."""
    given = {"x_api_key": KEY.decode(), "content_type": "application/json"} | headers
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items() if value]
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{''.join(lines)}Content-Length: {len(body)}\r\n"
    return head.encode() + CLOSE + body


NOT_HTTP: Mapping[str, bytes] = {
    "garbage": b"garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "another version": b"GET /health/live HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /health/live\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a space in a header's name": b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
    "NUL in a header": b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "a path that is no ASCII": b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in the path": b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "CONNECT": b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tabs for spaces": b"GET\t/health/live\tHTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
    "a small method": b"get /health/live HTTP/1.1\r\nHost: localhost\r\n" + CLOSE,
}
SMUGGLING: Mapping[str, bytes] = {
    # Where does the body end?
    "CL, then TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + POST + b"\r\n",
    "TE, then CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nX",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 12\r\n\r\n" + BODY,
    "the same length twice": POST + b"Content-Length: 12\r\nContent-Length: 12\r\n" + CLOSE + BODY,
    "a list of lengths": POST + b"Content-Length: 12, 12\r\n" + CLOSE + BODY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with an exponent": POST + b"Content-Length: 1e1\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +12\r\n" + CLOSE + BODY,
    "a length in hexadecimal": POST + b"Content-Length: 0xc\r\n" + CLOSE + BODY,
    "a length with a tab": POST + b"Content-Length: 1\t2\r\n" + CLOSE + BODY,
    "an empty length": POST + b"Content-Length: \r\n" + CLOSE + BODY,
    "an endless length": POST + b"Content-Length: 99999999999999999999\r\n" + CLOSE + BODY,
    "a space before the colon of TE": POST + b"Transfer-Encoding : chunked\r\n" + CLOSE + b"0\r\n\r\n",
    "nearly chunked": POST + b"Transfer-Encoding: xchunked\r\n" + CLOSE + b"0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n" + CLOSE + b"0\r\n\r\n",
    "chunked in the middle": POST + b"Transfer-Encoding: gzip, chunked, gzip\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n" + CLOSE,
    "chunked and identity": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + CLOSE + b"0\r\n\r\n",
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n' + CLOSE + b"0\r\n\r\n",
    "chunked after a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n" + CLOSE + b"0\r\n\r\n",
    "a chunk of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "a chunk of endless size": CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\n",
    "a chunk of negative size": CHUNKED + b"-1\r\n",
    "a chunk with a prefix": CHUNKED + b"0xc\r\n" + BODY,
    "a chunk after a space": CHUNKED + b" c\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunks with bare LF": CHUNKED + b"c\n" + BODY + b"\n0\n\n",
    "a chunk that is longer": CHUNKED + b"c\r\n" + BODY + b"XX0\r\n\r\n",
    # Whose headers are they? Proxies fold, trim and split where we might not.
    "bare LF": b"GET /health/live HTTP/1.1\nHost: localhost\n\n",
    "bare LF in headers": GET + b"X: a\nY: b\r\n" + CLOSE,
    "bare CR": GET + b"X: a\rY: b\r\n" + CLOSE,
    "a folded header": GET + b"X: a\r\n b\r\n" + CLOSE,
    "a space before a colon": GET + b"X : a\r\n" + CLOSE,
    "a header without a name": GET + b": a\r\n" + CLOSE,
    "a space before the first header": b"GET /health/live HTTP/1.1\r\n Host: localhost\r\n" + CLOSE,
}
HOST: Mapping[str, bytes] = {
    "none": b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two": b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "another": b"GET /health/live HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "empty": b"GET /health/live HTTP/1.1\r\nHost:\r\n" + CLOSE,
    "a list": b"GET /health/live HTTP/1.1\r\nHost: localhost, evil.example\r\n" + CLOSE,
    "with a user": b"GET /health/live HTTP/1.1\r\nHost: localhost@evil.example\r\n" + CLOSE,
    "a space before the colon": b"GET /health/live HTTP/1.1\r\nHost : localhost\r\n" + CLOSE,
}
NO_JSON: Mapping[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"text": ',
    "not a number": b'{"confidence": NaN, %s}',
    "infinity": b'{"confidence": Infinity, %s}',
    "minus infinity": b'{"confidence": -Infinity, %s}',
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep in what nobody reads": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", %s}",
    "half a surrogate in UTF-8": b'{"x": "\xed\xa0\x80", %s}',
    "overlong UTF-8": b'{"x": "\xc0\xaf", %s}',
    "NUL as it is": b'{"x": "\x00", %s}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{%s}",
    "something behind": b"{%s} {}",
    "a comma too many": b"{%s,}",
    "single quotes": b"{'text': 'a'}",
    "a bomb": gzip.compress(b" " * 10_000_000),
}
"""Bodies that are none, with `%s` where the fields of a good one may stand."""
LONE_SURROGATES = (r'"\ud800"', r'"a\udc00b"', r'"\udc00\ud800"')


def filled(body: bytes, fields: bytes = b'"text": "a"') -> bytes:
    """One of `NO_JSON` with the fields of a good body in it."""
    return body.replace(b"%s", fields)


def flood(unit: str, beginning: str = "") -> str:
    """A text of the greatest length."""
    return (beginning + unit * (MAX_TEXT_CHARACTERS // len(unit) + 1))[:MAX_TEXT_CHARACTERS]


UNICODE_FLOODS: Mapping[str, str] = {
    "one letter with marks": flood("\u0301", "e"),
    "marks alone": flood("\u0489"),
    "marks of many kinds": flood("".join(map(chr, range(0x300, 0x370)))),
    "letters with a hundred marks each": flood("a" + "\u0323" * 100),
    "zero width": flood("\u200b"),
    "joiners": flood("\u200d\u2060\ufeff\u00ad"),
    "zero width between letters": flood("a\u200b"),
    "overrides of direction": flood("\u202e"),
    "directions opened and never closed": flood("\u2066\u202b\u2067\u202d"),
    "directions between letters": flood("\u202ea\u202cb\u2067"),
    "tags": flood("\U000e0041\U000e007f"),
    "variation selectors": flood("a\ufe0f\U000e0101"),
    "fillers": flood("\u3164\u115f\uffa0"),
    "families": flood("\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"),
    "ligatures that are phrases": flood("\ufdfa"),
    "NUL": flood("\0"),
}

_BATCH = "/v1/detect/batch"
_LINES = "application/x-ndjson"
_SLOW_SECONDS = 20.0
"""For what the edge gives up after 10 s (`PORTCULLIS_HEADER_TIMEOUT_SECONDS`, `PORTCULLIS_BODY_TIMEOUT_SECONDS`)."""


def _fields(name: str, value: object, code: ErrorCode = ErrorCode.INVALID_FIELD) -> Http:
    return Http("fields", name, call(json.dumps(value).encode()), code)


def _http() -> Iterator[Http]:
    for group, requests in (("not HTTP", NOT_HTTP), ("smuggling", SMUGGLING), ("host", HOST)):
        yield from (Http(group, name, request) for name, request in requests.items())
    yield from (Http("no JSON", name, call(filled(body))) for name, body in NO_JSON.items())
    yield from (Http("no JSON", f"batch: {name}", call(filled(body), _BATCH)) for name, body in NO_JSON.items())
    yield from (Http("lone surrogates", text, call(b'{"text": %b}' % text.encode())) for text in LONE_SURROGATES)
    for encoding in ("gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity", "aes128gcm"):
        bomb = gzip.compress(b" " * 10_000_000)
        yield Http("bombs", encoding, call(bomb, content_encoding=encoding), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
        yield Http("bombs", f"batch: {encoding}", call(bomb, _BATCH, content_type=_LINES, content_encoding=encoding),
                   ErrorCode.UNSUPPORTED_MEDIA_TYPE)  # fmt: skip
    for media_type in ("text/plain", "application/xml", "multipart/form-data; boundary=x"):
        yield Http("types", media_type, call(BODY, content_type=media_type), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
    yield Http("types", "a form", call(b"text=a", content_type="application/x-www-form-urlencoded"),
               ErrorCode.UNSUPPORTED_MEDIA_TYPE)  # fmt: skip
    yield _fields("no text", {})
    yield _fields("an empty text", {"text": ""})
    yield _fields("a text that is a number", {"text": 1})
    yield _fields("a text that is null", {"text": None})
    yield _fields("a text that is too long", {"text": "a" * (MAX_TEXT_CHARACTERS + 1)})
    yield _fields("a threshold above 1", {"text": "a", "config": {"confidence_threshold": 2}})
    yield _fields("a threshold that is a word", {"text": "a", "config": {"confidence_threshold": "high"}})
    yield _fields("a list", [])
    yield Http("fields", "a batch of nothing", call(b'{"requests": []}', _BATCH), ErrorCode.INVALID_FIELD)
    yield Http("fields", "a batch of too many", call(json.dumps({"requests": [{"text": "a"}] * 1001}).encode(), _BATCH),
               ErrorCode.INVALID_FIELD)  # fmt: skip
    yield from _credentials()
    yield from _floods()
    yield from _trickles()
    yield from _batches()
    # What is odd and allowed.
    many = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20
    yield Http("slow readers", "twenty documents", many + GET + CLOSE, None, answers=21, sips=True, seconds=_SLOW_SECONDS)
    for name, text in UNICODE_FLOODS.items():
        body = json.dumps({"text": text, "config": {"detailed_response": True}}).encode()
        yield Http("Unicode", name, call(body), None, or_refused=True, seconds=DEADLINE_SECONDS + 2)
    yield Http("Unicode", "one NUL", call(b'{"text": "a\\u0000b"}'), None)
    yield Http("Unicode", "noncharacters", call('{"text": "\ufffe\U0010ffff"}'.encode()), None)


def _credentials() -> Iterator[Http]:
    unknown = "pc_live_000000000000_" + "0" * 32
    for name, headers in {
        "no key": {"x_api_key": ""},
        "a key that is none": {"x_api_key": "'; DROP TABLE keys; --"},
        "a mistyped key": {"x_api_key": unknown},
        "not a bearer": {"x_api_key": "", "authorization": "Basic YTpi"},
    }.items():
        yield Http("credentials", name, call(BODY, **headers), ErrorCode.INVALID_CREDENTIALS)
    yield Http("credentials", "a key in the URL", call(BODY, f"/v1/detect?api_key={KEY.decode()}", x_api_key=""),
               ErrorCode.INVALID_CREDENTIALS)  # fmt: skip
    yield Http("credentials", "a key where the admin token is needed", call(b"", "/admin/keys", "GET"), ErrorCode.FORBIDDEN)
    yield Http("credentials", "no admin token", call(b"", "/admin/keys", "GET", x_api_key=""), ErrorCode.FORBIDDEN)
    yield Http("credentials", "two keys", POST + b"X-API-Key: x\r\nContent-Length: 12\r\n" + CLOSE + BODY)
    for path in ("/v1/nothing", "/v1/jobs/%00", "/v1/jobs/..%2f..%2fadmin", f"/v1/jobs/{'0' * 28}", "/v1/jobs/*/results"):
        yield Http("paths", path, call(b"", path, "GET"), ErrorCode.NOT_FOUND)


def _floods() -> Iterator[Http]:
    large = ErrorCode.HEADERS_TOO_LARGE
    yield Http("floods", "one header", GET + b"X: ", large, again=b"a" * 65_536)
    yield Http("floods", "headers", GET, large, again=b"X: y\r\n" * 10_000)
    yield Http("floods", "a URL", b"GET /", large, again=b"a" * 65_536)
    yield Http("floods", "a body", CHUNKED, ErrorCode.PAYLOAD_TOO_LARGE, again=b"10000\r\n" + b" " * 65_536 + b"\r\n")
    yield Http("floods", "an announced body", POST + b"Content-Length: 50000000\r\n" + CLOSE, ErrorCode.PAYLOAD_TOO_LARGE)
    yield Http("floods", "an expected body", POST + b"Expect: 100-continue\r\nContent-Length: 50000000\r\n" + CLOSE,
               ErrorCode.PAYLOAD_TOO_LARGE)  # fmt: skip


def _trickles() -> Iterator[Http]:
    late = ErrorCode.DEADLINE_EXCEEDED  # that of the call, which is as long as what a body may take
    yield Http("trickles", "headers", GET + b"X: ", again=b"a", every_seconds=0.5, seconds=_SLOW_SECONDS)
    counted = POST + b"Connection: close\r\nContent-Length: 100000\r\n\r\n{"
    yield Http("trickles", "a body", counted, late, again=b" ", every_seconds=0.5, seconds=_SLOW_SECONDS)
    yield Http("trickles", "chunks", CHUNKED, late, again=b"1\r\n \r\n", every_seconds=0.5, seconds=_SLOW_SECONDS)
    yield Http("trickles", "half a request and nothing more", POST, seconds=_SLOW_SECONDS)


def _batches() -> Iterator[Http]:
    """Lines are read as they come, so that what is wrong with one is its own error."""
    too_large = ErrorCode.PAYLOAD_TOO_LARGE

    def lines(name: str, body: bytes, inside: ErrorCode) -> Http:
        return Http("NDJSON", name, call(body, _BATCH, content_type=_LINES), None, inside=inside)

    yield lines("no newline", b'{"text": "' + b"a" * 5_000_000, too_large)
    yield lines("nothing that is a line", b"\xff" * 1000, ErrorCode.BAD_REQUEST)
    yield lines("NaN", b'{"text": NaN}\n', ErrorCode.BAD_REQUEST)
    yield lines("a list", b"[]\n", ErrorCode.INVALID_FIELD)
    yield lines("deep lists", b"[" * 200_000 + b"\n", ErrorCode.BAD_REQUEST)
    yield lines("a lone surrogate", rb'{"text": "\ud800"}', ErrorCode.BAD_REQUEST)
    yield lines("an empty text", b'{"text": ""}\n', ErrorCode.INVALID_FIELD)
    yield Http("NDJSON", "blank lines", call(b"\n" * 1000, _BATCH, content_type=_LINES), ErrorCode.INVALID_FIELD)
    announced = b"POST /v1/detect/batch HTTP/1.1\r\nHost: localhost\r\nX-API-Key: " + KEY + b"\r\nContent-Length: 500000000\r\n"
    yield Http("floods", "an announced list", announced + CLOSE, too_large)


HTTP: tuple[Http, ...] = tuple(_http())

# --- NATS --------------------------------------------------------------------------------------------------------------------

UNREADABLE: Mapping[str, bytes] = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"text"',
    "half an object": b'{"key_id": "a"',
    "NaN": b"NaN",
    "NULs": b"\x00" * 100,
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep in what nobody reads": b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number without end": b"1" * 1_000_000,
    "as large as may be": b" " * (MAX_PAYLOAD_BYTES - 1024),  # headers count, too
}
"""Bodies that no stage can read."""
NO_UTF8 = (
    b"{" + b",".join(b'"%s": "\xff"' % name for name in (b"service", b"instance", b"name", b"id", b"key_id", b"job_id")) + b"}"
)
"""An object that is well until one looks into its strings."""
NO_DEADLINES: tuple[str | None, ...] = (
    *(None, "", "soon", "nan", "1e15", "0x7fffffffffffffff", "9" * 30, "9" * 400, "9" * 5000),
    "-" + "9" * 400,
)
FOREIGN = (
    subjects.EVENT_KEY_CHANGED,
    subjects.DETECT_ADMITTED,
    subjects.BREAKERS_RESET,
    subjects.kick("N" * 56),
    "$JS.API.STREAM.DELETE.JOB_ITEMS",
    "$SYS._INBOX.x",
    "_INBOX",
    "somewhere._INBOX",
    "_INBOX.é",
)
"""Reply subjects that are no inbox: whoever names one wants a service to write there in its own name."""
_HELLO = [{"text": "Hello"}]
DOOR: tuple[tuple[str, str, object, ErrorCode], ...] = (
    ("nothing", "submit", b"", ErrorCode.BAD_REQUEST),
    ("no UTF-8", "submit", b"\xff\xfe", ErrorCode.BAD_REQUEST),
    ("deep lists", "submit", b'{"requests": [' + b"[" * 100_000, ErrorCode.BAD_REQUEST),
    ("no items", "submit", {"requests": []}, ErrorCode.BAD_REQUEST),
    ("too many items", "submit", {"requests": _HELLO * 1001}, ErrorCode.BAD_REQUEST),
    ("an empty text", "submit", {"requests": [{"text": ""}]}, ErrorCode.BAD_REQUEST),
    ("a text that is too long", "submit", {"requests": [{"text": "x" * 100_001}]}, ErrorCode.BAD_REQUEST),
    ("a threshold above 1", "submit", {"requests": _HELLO, "config": {"confidence_threshold": 2}}, ErrorCode.BAD_REQUEST),
    ("a wrong idempotency key", "submit", {"requests": _HELLO, "idempotency_key": "with space"}, ErrorCode.BAD_REQUEST),
    ("a webhook to ourselves", "submit", {"requests": _HELLO, "webhook": {"url": "http://127.0.0.1/"}}, ErrorCode.INVALID_FIELD),
    ("too large", "submit", b" " * (MAX_DOOR_BYTES + 1), ErrorCode.PAYLOAD_TOO_LARGE),
    ("no such job", "status", {"job_id": "0" * 28}, ErrorCode.NOT_FOUND),
    ("a newline in a job's id", "status", {"job_id": "0" * 28 + "\n"}, ErrorCode.BAD_REQUEST),
    ("a newline in a job's id", "results", {"job_id": "0" * 28 + "\n"}, ErrorCode.BAD_REQUEST),
    ("results from before the first", "results", {"job_id": "0" * 28, "after": -1}, ErrorCode.BAD_REQUEST),
    ("too large a page", "list", {"limit": 101}, ErrorCode.BAD_REQUEST),
)
"""Name, operation, message and answer, of a client with a key."""


@dataclass(frozen=True, slots=True)
class Nats:
    """A message to `subject`. `code`: of the answer; None: there is none, and none goes to `reply`, where that is not an inbox.

    `by_client`: sent by a client with a key, and not by somebody who has the passwords of services. `deadline_seconds`: from now.
    `headers`: besides the deadline, or in its place (None: without). `nobody`: no service listens there, which the server says.
    `too_large`: the server takes no such message, and ends the connection.
    """

    group: str
    name: str
    subject: str
    body: bytes
    code: ErrorCode | None = ErrorCode.BAD_REQUEST
    headers: Mapping[str, str | None] = field(default_factory=dict)
    reply: str = ""
    deadline_seconds: float = DEADLINE_SECONDS
    by_client: bool = False
    nobody: bool = False
    too_large: bool = False
    seconds: float = DEADLINE_SECONDS


STAGES = (
    *(subjects.DETECT_REQUEST, subjects.DETECT_AUTHENTICATED, subjects.DETECT_ADMITTED, subjects.BATCH_ITEMS),
    *(subjects.JOBS_REQUEST, subjects.JOBS_CREATE, subjects.model_pool(subjects.DEFAULT_POOL)),
)
"""One of each service, at least."""


def _nats() -> Iterator[Nats]:
    for subject in STAGES:
        for name, body in UNREADABLE.items():
            yield Nats("undecodable", f"{name} to {subject}", subject, body)
        yield Nats("expired", f"a second ago, to {subject}", subject, b"[]", None, deadline_seconds=-1)
        yield Nats("expired", f"nothing left, to {subject}", subject, b"[]", None, {TIME_LEFT_HEADER: "0"})
        for reply in FOREIGN:
            yield Nats("forged reply", f"{subject} to {reply}", subject, b"[]", None, reply=reply)
        yield Nats("version 99", subject, subject.replace(".v1.", ".v99."), b"{}", None, nobody=True)
    first = subjects.DETECT_REQUEST
    for deadline in NO_DEADLINES:
        yield Nats(
            "no deadline", f"{str(deadline)[:40]}, of {len(deadline or '')}", first, b"[]", headers={DEADLINE_HEADER: deadline}
        )
    for left in ("", "soon", "nan", "9" * 400):
        yield Nats("no deadline", f"left: {left[:40]}", first, b"[]", headers={TIME_LEFT_HEADER: left})
    timings = "auth=nan,=,limiter=1e999,,x," + ",".join(f"s{number}=1" for number in range(2000))
    odd = {TIMINGS_HEADER: timings, "traceparent": "00-" + "0" * 32, "Portcullis-Request-Id": "a b\tc", "Status": "503"}
    yield Nats("headers", "that only inform", first, b"[]", headers=odd)
    yield Nats("oversized", "above what the server takes", first, b" " * (MAX_PAYLOAD_BYTES + 1), None, too_large=True)
    for name, operation, message, code in DOOR:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        yield Nats("door", f"{operation}: {name}", f"jobs.v1.{KEY_ID}.{operation}", body, code, by_client=True)
    yield Nats("door", "an answer elsewhere", f"jobs.v1.{KEY_ID}.list", b"{}", None, reply="events.v1.x", by_client=True)


NATS: tuple[Nats, ...] = tuple(_nats())
