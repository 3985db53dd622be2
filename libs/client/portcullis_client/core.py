"""What `Client` and `AsyncClient` have in common: where, who, how a call becomes a request, how an answer is read. No I/O."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar

import httpx

from portcullis_client import calls, errors
from portcullis_client.calls import Call
from portcullis_client.errors import ConnectionFailedError, JobUnfinishedError, PortcullisError, UnexpectedAnswerError
from portcullis_client.retries import Notice, Retry
from portcullis_client.types import Item, ItemResult, Job

T = TypeVar("T")

URL_VARIABLE = "PORTCULLIS_URL"
KEY_VARIABLE = "PORTCULLIS_API_KEY"
ADMIN_VARIABLE = "PORTCULLIS_ADMIN_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8000"

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")
_MARGIN_SECONDS = 2.0
"""How much longer than the gateway's deadline an answer is waited for: it says itself that it is late."""
_STREAM_MARGIN_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_KEPT_IN_MEMORY_BYTES = 1024 * 1024
_PIECE_BYTES = 64 * 1024


class Core:
    """`api_key`, `admin_token`: neither is in the repr, and both travel in `Authorization`, which httpx does not show either."""

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        admin_token: str | None,
        timeout_seconds: float,
        retry: Retry,
        notice: Notice | None,
    ) -> None:
        self.url = _url(url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
        if timeout_seconds <= 0:
            raise ValueError("timeout_seconds must be greater than 0")
        self.address = f"{self.url.scheme}://{self.url.netloc.decode('ascii')}"
        self.retry = retry
        self.notice = notice
        self._api_key = _secret(api_key or os.environ.get(KEY_VARIABLE), "The API key")
        self._admin_token = _secret(admin_token or os.environ.get(ADMIN_VARIABLE), "The admin token")
        self._timeout_seconds = timeout_seconds

    @property
    def has_admin_token(self) -> bool:
        return self._admin_token is not None

    def settings(self) -> dict[str, Any]:
        """For httpx's two clients alike."""
        return {"base_url": self.url, "headers": {"User-Agent": f"portcullis-client/{version('portcullis-client')}"}}

    def request(self, call: Call[Any], *, streamed: bool = False) -> dict[str, Any]:
        """The arguments of httpx's `request` and `stream`, but for a body that is not in memory."""
        token = (self._admin_token or self._api_key) if call.admin else self._api_key
        headers = {"Accept": call.accept, "X-Request-Timeout": f"{self._timeout_seconds:g}", **call.headers}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if call.body is not None:
            headers["Content-Type"] = call.content_type
            if not isinstance(call.body, bytes):
                headers["Content-Length"] = str(call.body.length)
        margin_seconds = _STREAM_MARGIN_SECONDS if streamed else _MARGIN_SECONDS
        timeout = httpx.Timeout(self._timeout_seconds + margin_seconds, connect=min(_CONNECT_SECONDS, self._timeout_seconds))
        return {"method": call.method, "url": call.path, "params": call.params, "headers": headers, "timeout": timeout}

    def read(self, call: Call[T], status: int, headers: Mapping[str, str], body: bytes) -> T:
        """Raises `PortcullisError` for an answer that is no success."""
        self.check(status, headers, body)
        return call.read(body)

    def check(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status // 100 == 3:
            raise UnexpectedAnswerError(f"{self.address} sends elsewhere ({status}); set {URL_VARIABLE} to where.", status=status)
        if status // 100 != 2:
            raise errors.from_answer(status, headers, body)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """httpx's failures as ours."""
        try:
            yield
        except httpx.TimeoutException as error:
            unsent = isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout))
            raise ConnectionFailedError(f"{self.address} does not answer in time.", sent=not unsent) from None
        except httpx.ConnectError as error:
            said = _ERRNO.sub("", str(error))
            raise ConnectionFailedError(f"{self.address} cannot be reached: {said}", sent=False) from None
        except httpx.TransportError as error:
            said = str(error) or type(error).__name__
            raise ConnectionFailedError(f"The connection to {self.address} broke off: {said}", sent=True) from None
        except httpx.DecodingError:
            raise UnexpectedAnswerError(f"The answer of {self.address} cannot be unpacked.") from None


def _url(value: str) -> httpx.URL:
    try:
        url = httpx.URL(value.strip().rstrip("/"))
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"The gateway's address must be like {DEFAULT_URL}")
    return url


def _secret(value: str | None, what: str) -> str | None:
    value = (value or "").strip()
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"{what} holds characters that cannot be in one")
    return value or None


class Spool:
    """The texts of a job as NDJSON: on disk from a certain size on, and there to be sent again."""

    def __init__(self) -> None:
        self.length = 0
        self._file = SpooledTemporaryFile(max_size=_KEPT_IN_MEMORY_BYTES)  # noqa: SIM115  # closed by `close`

    def add(self, item: str | Item) -> None:
        """Raises ValueError for a text that is no Unicode."""
        document = {"text": item} if isinstance(item, str) else {"id": item.id, "text": item.text}
        self.length += self._file.write(calls.encode_text(document) + b"\n")

    def pieces(self) -> Iterator[bytes]:
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            yield piece

    async def pieces_async(self) -> AsyncIterator[bytes]:
        for piece in self.pieces():
            yield piece

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def new_idempotency_key() -> str:
    return str(uuid.uuid4())


class Polling:
    """How often a job is asked about, and for how long. Pauses grow from half a second to five."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._left_seconds = timeout_seconds
        self._pause_seconds = 0.5

    def pause(self, job: Job) -> float:
        """Seconds until the next question. Raises `JobUnfinishedError` when the time is over."""
        seconds, self._pause_seconds = self._pause_seconds, min(self._pause_seconds * 1.5, 5.0)
        if self._left_seconds is not None:
            if self._left_seconds <= 0:
                raise JobUnfinishedError(f"Job {job.id} is {job.state}: {job.done} of {job.total} done.")
            seconds = min(seconds, self._left_seconds)
            self._left_seconds -= seconds
        return seconds


class Reading:
    """The stored results of a job, from a cursor on, whatever happens to the connection."""

    def __init__(self, retry: Retry, job_id: str, after: str | None) -> None:
        self._retry = retry
        self._job_id = job_id
        self._after = after
        self._failures = 0
        self._waited_seconds = 0.0

    def start(self) -> Call[None]:
        return calls.job_results(self._job_id, self._after)

    def line(self, line: bytes) -> ItemResult | None:
        result = calls.result_line(line)
        if not isinstance(result, ItemResult):
            return None
        if result.cursor is None:
            raise UnexpectedAnswerError("The gateway told a result without its cursor.")
        self._after = result.cursor
        self._failures, self._waited_seconds = 0, 0.0
        return result

    def failed(self, failure: PortcullisError) -> float:
        """For how many seconds to pause. Raises the failure when waiting does not help, or has not for long enough."""
        self._failures += 1
        seconds = self._retry.pause_seconds(failure, self._failures)
        if not isinstance(failure, errors.PASSING) or self._waited_seconds + seconds > self._retry.patience_seconds:
            raise failure
        self._waited_seconds += seconds
        return seconds
