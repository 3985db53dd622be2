"""The client for programs without asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from datetime import datetime
from typing import Any, TypeVar

import httpx
from tenacity import Retrying

from portcullis_client import calls
from portcullis_client.calls import Call
from portcullis_client.core import Core, Polling, Reading, Spool, new_idempotency_key
from portcullis_client.errors import PortcullisError
from portcullis_client.lines import Lines
from portcullis_client.many import ManyTexts
from portcullis_client.retries import Notice, Retry
from portcullis_client.types import IssuedKey, Item, ItemResult, Job, JobPage, KeyPage, KeyRecord, Profile, Verdict

T = TypeVar("T")


class Client:
    """A Portcullis gateway, over connections that are kept and may be shared by threads.

    Parameters
    ----------
    url: of the gateway; otherwise PORTCULLIS_URL, or http://127.0.0.1:8000.
    api_key: otherwise PORTCULLIS_API_KEY.
    admin_token: for the calls on all keys; otherwise PORTCULLIS_ADMIN_TOKEN, or an API key that may do it.
    timeout_seconds: until when a verdict must be there; the gateway is told, and may have a shorter limit of its own.
    retry: how persistent calls are; see `Retry`.
    on_wait: called before each pause with the reason and the seconds.
    transport, sleep: httpx's transport, for proxies, certificates or tests; and what pauses.

    All calls raise `PortcullisError`, of the class that fits, and only that.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        admin_token: str | None = None,
        timeout_seconds: float = 10.0,
        retry: Retry | None = None,
        on_wait: Notice | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._core = Core(url, api_key, admin_token, timeout_seconds, retry or Retry(), on_wait)
        self._http = httpx.Client(transport=transport, **self._core.settings())
        self._sleep = sleep

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.address!r})"

    # --- detections ------------------------------------------------------------------------------------------------------

    def detect(self, text: str, *, threshold: float | None = None, detailed: bool = False) -> Verdict:
        """Judge one text. `threshold`: from which probability on it is malicious; None: the model's own. `detailed`: say why.

        ValueError for a text that is no Unicode (half a surrogate pair).
        """
        return self._do(calls.detect(text, threshold=threshold, detailed=detailed))

    def detect_many(
        self, items: Iterable[str | Item], *, threshold: float | None = None, detailed: bool = False
    ) -> Iterator[ItemResult]:
        """Judge texts, any number of them, and give each one's result as it comes, not in the order of asking.

        At most a few hundred texts are in memory. Rate limits and outages are waited out for `Retry.patience_seconds` since the
        last result; then this raises, and the texts without a result have none. A text that is itself at fault has a result
        with `error`.
        """
        many = ManyTexts(self._core.retry, threshold=threshold, detailed=detailed)
        source = iter(items)
        while True:
            if many.wants:
                many.fill(source)
            yield from many.refused()
            call = many.start()
            if call is None:
                if many.wants:
                    continue
                return
            failure: PortcullisError | None = None
            try:
                with closing(self._lines(call)) as lines:
                    for line in lines:
                        if (result := many.line(line)) is not None:
                            yield result
            except PortcullisError as error:
                failure = error
            if (pause := many.over(failure)) is not None:
                self._pause(*pause)

    def batch(self, items: Iterable[str | Item], *, threshold: float | None = None, detailed: bool = False) -> list[ItemResult]:
        """As `detect_many`, but all at once and in the order of asking."""
        return sorted(self.detect_many(items, threshold=threshold, detailed=detailed), key=lambda result: result.index)

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def submit_job(
        self,
        items: Iterable[str | Item],
        *,
        threshold: float | None = None,
        detailed: bool = False,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
    ) -> Job:
        """Hand in texts to be judged later, as the key's limits allow: all of them, or none if one is not valid.

        With the same `idempotency_key` it is the same job, and `ConflictError` if the texts are others. `webhook_url`: told when
        the job is over, signed with the answer's `webhook.secret`.
        """
        with Spool() as spool:
            for item in items:
                spool.add(item)
            key = idempotency_key or new_idempotency_key()
            return self._do(calls.submit_job(spool, key, threshold=threshold, detailed=detailed, webhook_url=webhook_url))

    def job(self, job_id: str) -> Job:
        """How far a job is."""
        return self._do(calls.job(job_id))

    def jobs(self, *, before: str | None = None, limit: int | None = None) -> JobPage:
        """A page of the key's jobs, newest first."""
        return self._do(calls.jobs(before, limit))

    def wait(self, job_id: str, *, timeout_seconds: float | None = None, on_progress: Callable[[Job], None] | None = None) -> Job:
        """Wait until a job has finished. Raises `JobUnfinishedError` after `timeout_seconds`."""
        polling = Polling(timeout_seconds)
        while not (job := self.job(job_id)).finished:
            if on_progress is not None:
                on_progress(job)
            self._sleep(polling.pause(job))
        return job

    def results(self, job_id: str, *, after: str | None = None, follow: bool = False) -> Iterator[ItemResult]:
        """The stored results after the one whose `cursor` is `after`; with `follow`, until the job has finished.

        A connection that breaks off is taken up again where it was.
        """
        reading = Reading(self._core.retry, job_id, after)
        polling = Polling(None)
        while True:
            # Asked first: what is stored after this answer and before the end of the reading is then not missed.
            job = self.job(job_id) if follow else None
            try:
                with closing(self._lines(reading.start())) as lines:
                    for line in lines:
                        if (result := reading.line(line)) is not None:
                            yield result
            except PortcullisError as error:
                self._pause(error, reading.failed(error))
                continue
            if job is None or job.finished:
                return
            self._sleep(polling.pause(job))

    def cancel(self, job_id: str) -> None:
        """Cancel a job: what has no result yet will not get a verdict."""
        self._do(calls.cancel_job(job_id))

    # --- the key ---------------------------------------------------------------------------------------------------------

    def register(
        self, name: str, *, rate_limit_per_minute: int | None = None, rate_limit_per_day: int | None = None
    ) -> IssuedKey:
        """A new key. It is shown this once. It is not the one that this client uses from now on."""
        return self._do(calls.register(name, rate_limit_per_minute, rate_limit_per_day, admin=self._core.has_admin_token))

    def profile(self) -> Profile:
        """The key's limits, what is left of them, and its use."""
        return self._do(calls.profile())

    def rotate(self) -> IssuedKey:
        """A new secret for the key. The old one, which this client goes on using, works until `previous_valid_until`."""
        return self._do(calls.rotate())

    def revoke(self) -> None:
        """Revoke the key, for good."""
        self._do(calls.revoke())

    # --- all keys --------------------------------------------------------------------------------------------------------

    def list_keys(self, *, after: str | None = None, limit: int | None = None) -> KeyPage:
        """A page of all keys, oldest first."""
        return self._do(calls.list_keys(after, limit))

    def get_key(self, key_id: str) -> KeyRecord:
        return self._do(calls.get_key(key_id))

    def create_key(
        self,
        name: str,
        *,
        scopes: Iterable[str] | None = None,
        rate_limit_per_minute: int | None = None,
        rate_limit_per_day: int | None = None,
        expires_at: datetime | None = None,
    ) -> IssuedKey:
        """A key with scopes (detect, batch, admin), limits and an expiry of one's choice."""
        return self._do(calls.create_key(name, **key_fields(scopes, rate_limit_per_minute, rate_limit_per_day, expires_at)))

    def update_key(
        self,
        key_id: str,
        *,
        name: str | None = None,
        scopes: Iterable[str] | None = None,
        rate_limit_per_minute: int | None = None,
        rate_limit_per_day: int | None = None,
        expires_at: datetime | None = None,
    ) -> KeyRecord:
        """Change what is given; what is None stays as it is."""
        fields = key_fields(scopes, rate_limit_per_minute, rate_limit_per_day, expires_at)
        return self._do(calls.update_key(key_id, name=name, **fields))

    def revoke_key(self, key_id: str) -> None:
        """Revoke a key, for good."""
        self._do(calls.revoke_key(key_id))

    # --- how -------------------------------------------------------------------------------------------------------------

    def _do(self, call: Call[T]) -> T:
        retrying = Retrying(sleep=self._sleep, **self._core.retry.options(idempotent=call.idempotent, notice=self._core.notice))
        answer: T = retrying(self._once, call)
        return answer

    def _once(self, call: Call[T]) -> T:
        content = call.body if call.body is None or isinstance(call.body, bytes) else call.body.pieces()
        with self._core.translated():
            response = self._http.request(content=content, **self._core.request(call))
        return self._core.read(call, response.status_code, response.headers, response.content)

    def _lines(self, call: Call[None]) -> Generator[bytes, None, None]:
        lines = Lines()
        content = call.body if isinstance(call.body, bytes) else None
        with (
            self._core.translated(),
            self._http.stream(content=content, **self._core.request(call, streamed=True)) as response,
        ):
            if response.status_code != httpx.codes.OK:
                self._core.check(response.status_code, response.headers, response.read())
            for piece in response.iter_bytes():
                yield from lines.add(piece)

    def _pause(self, reason: PortcullisError, seconds: float) -> None:
        if self._core.notice is not None:
            self._core.notice(reason, seconds)
        self._sleep(seconds)


def key_fields(
    scopes: Iterable[str] | None, per_minute: int | None, per_day: int | None, expires_at: datetime | None
) -> dict[str, Any]:
    return {
        "scopes": None if scopes is None else list(scopes),
        "rate_limit_per_minute": per_minute,
        "rate_limit_per_day": per_day,
        "expires_at": expires_at,
    }
