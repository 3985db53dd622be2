"""What the engines behind HTTP have in common: one bounded client that trusts nothing it is told.

It is somebody else's service. No redirect is followed, no cookie kept, no proxy taken from the environment, nothing decompressed,
no more than `MAX_BODY_BYTES` read; headers are bounded by aiohttp (8 190 bytes each, 128 of them). Time is bounded by whoever
calls: a cancelled call closes its connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import msgspec

from libs.common import telemetry
from libs.common.context import TRACEPARENT_HEADER, RequestContext
from services.detector_proxy.ports import EngineError, Health

T = TypeVar("T")

MAX_BODY_BYTES = 1024 * 1024
MAX_HEADERS = 128
KEEPALIVE_SECONDS = 4.0
"""Less than the 5 s after which uvicorn closes an idle connection: so that we do not write into one that is being closed."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """`body` is JSON by its content type (or has none), and at most `MAX_BODY_BYTES` long."""

    status: int
    body: bytes


class HttpClient:
    """Connections to one engine. Make it inside a running event loop."""

    def __init__(self, base_url: str, *, token: str | None, max_connections: int) -> None:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "portcullis"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._base_url = base_url.rstrip("/")
        self._in_use = telemetry.CONNECTIONS.labels("engine")
        telemetry.CONNECTIONS_LIMIT.labels("engine").set(max_connections)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections, keepalive_timeout=KEEPALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(),  # the guard in front of every engine bounds the whole call
            trust_env=False,
            auto_decompress=False,
            max_headers=MAX_HEADERS,
        )

    async def post(self, path: str, body: bytes, context: RequestContext) -> HttpReply:
        """Raises `EngineError`: unreachable, bad_http, redirect, content_type, content_encoding, too_large, cut_off, status_…"""
        headers = {
            "Content-Type": "application/json",
            "X-Request-ID": context.request_id,
            TRACEPARENT_HEADER: context.traceparent,
        }
        try:
            with self._in_use.track_inprogress():
                async with self._session.post(
                    self._base_url + path, data=body, headers=headers, allow_redirects=False
                ) as response:
                    _check_head(response)
                    return HttpReply(response.status, await _read(response))
        except aiohttp.ClientPayloadError:
            raise EngineError("cut_off") from None
        except aiohttp.ClientResponseError:
            raise EngineError("bad_http") from None
        except (aiohttp.ClientError, OSError):
            raise EngineError("unreachable") from None

    async def get_status(self, path: str) -> int | None:
        """The status of a GET whose body nobody reads; None when there is no answer."""
        try:
            async with self._session.get(self._base_url + path, allow_redirects=False) as response:
                return response.status
        except (aiohttp.ClientError, OSError):
            return None

    async def close(self) -> None:
        await self._session.close()


def _check_head(response: aiohttp.ClientResponse) -> None:
    if 300 <= response.status < 400:
        raise EngineError("redirect")
    kind = response.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise bad_status(response.status) if response.status != 200 else EngineError("content_type")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise EngineError("content_encoding")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise EngineError("too_large")
    return bytes(body)


def bad_status(status: int) -> EngineError:
    """The error for a status that is not the text's fault."""
    return EngineError(f"status_{status // 100}xx")


def decoded(decoder: msgspec.json.Decoder[T], reply: HttpReply) -> T:
    """The body as what it should be, else `EngineError` "malformed". Bounds are those of the type."""
    try:
        return decoder.decode(reply.body)
    except (ValueError, RecursionError):  # malformed, mistyped, out of bounds; not UTF-8; nested too deep to be read
        raise EngineError("malformed") from None


def up_if_ok(status: int | None) -> Health:
    """The health of an engine whose endpoint knows only yes (200) and no."""
    return "up" if status == 200 else "down"
