"""The client for asyncio; it does what `Client` does, call for call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from datetime import datetime
from typing import TypeVar

import httpx
from tenacity import AsyncRetrying

from portcullis_client import calls
from portcullis_client.calls import Call
from portcullis_client.client import key_fields
from portcullis_client.core import Core, Polling, Reading, Spool, new_idempotency_key
from portcullis_client.errors import PortcullisError
from portcullis_client.lines import Lines
from portcullis_client.many import ManyTexts, as_async
from portcullis_client.retries import Notice, Retry
from portcullis_client.types import IssuedKey, Item, ItemResult, Job, JobPage, KeyPage, KeyRecord, Profile, Verdict

T = TypeVar("T")


class AsyncClient:
    """A Portcullis gateway, for one event loop. Parameters, calls and errors are those of `Client`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        admin_token: str | None = None,
        timeout_seconds: float = 10.0,
        retry: Retry | None = None,
        on_wait: Notice | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._core = Core(url, api_key, admin_token, timeout_seconds, retry or Retry(), on_wait)
        self._http = httpx.AsyncClient(transport=transport, **self._core.settings())
        self._sleep = sleep

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.address!r})"

    # --- detections ------------------------------------------------------------------------------------------------------

    async def detect(self, text: str, *, threshold: float | None = None, detailed: bool = False) -> Verdict:
        """Judge one text. `threshold`: from which probability on it is malicious; None: the model's own. `detailed`: say why.

        ValueError for a text that is no Unicode (half a surrogate pair).
        """
        return await self._do(calls.detect(text, threshold=threshold, detailed=detailed))

    async def detect_many(
        self, items: Iterable[str | Item] | AsyncIterable[str | Item], *, threshold: float | None = None, detailed: bool = False
    ) -> AsyncIterator[ItemResult]:
        """Judge texts, any number of them, and give each one's result as it comes, not in the order of asking.

        At most a few hundred texts are in memory. Rate limits and outages are waited out for `Retry.patience_seconds` since the
        last result; then this raises, and the texts without a result have none. A text that is itself at fault has a result
        with `error`.
        """
        many = ManyTexts(self._core.retry, threshold=threshold, detailed=detailed)
        source = as_async(items)
        while True:
            if many.wants:
                await many.fill_async(source)
            for refused in many.refused():
                yield refused
            call = many.start()
            if call is None:
                if many.wants:
                    continue
                return
            failure: PortcullisError | None = None
            try:
                async with aclosing(self._lines(call)) as lines:
                    async for line in lines:
                        if (result := many.line(line)) is not None:
                            yield result
            except PortcullisError as error:
                failure = error
            if (pause := many.over(failure)) is not None:
                await self._pause(*pause)

    async def batch(
        self, items: Iterable[str | Item] | AsyncIterable[str | Item], *, threshold: float | None = None, detailed: bool = False
    ) -> list[ItemResult]:
        """As `detect_many`, but all at once and in the order of asking."""
        results = [result async for result in self.detect_many(items, threshold=threshold, detailed=detailed)]
        return sorted(results, key=lambda result: result.index)

    # --- jobs ------------------------------------------------------------------------------------------------------------

    async def submit_job(
        self,
        items: Iterable[str | Item] | AsyncIterable[str | Item],
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
            async for item in as_async(items):
                spool.add(item)
            key = idempotency_key or new_idempotency_key()
            return await self._do(calls.submit_job(spool, key, threshold=threshold, detailed=detailed, webhook_url=webhook_url))

    async def job(self, job_id: str) -> Job:
        """How far a job is."""
        return await self._do(calls.job(job_id))

    async def jobs(self, *, before: str | None = None, limit: int | None = None) -> JobPage:
        """A page of the key's jobs, newest first."""
        return await self._do(calls.jobs(before, limit))

    async def wait(
        self, job_id: str, *, timeout_seconds: float | None = None, on_progress: Callable[[Job], None] | None = None
    ) -> Job:
        """Wait until a job has finished. Raises `JobUnfinishedError` after `timeout_seconds`."""
        polling = Polling(timeout_seconds)
        while not (job := await self.job(job_id)).finished:
            if on_progress is not None:
                on_progress(job)
            await self._sleep(polling.pause(job))
        return job

    async def results(self, job_id: str, *, after: str | None = None, follow: bool = False) -> AsyncIterator[ItemResult]:
        """The stored results after the one whose `cursor` is `after`; with `follow`, until the job has finished.

        A connection that breaks off is taken up again where it was.
        """
        reading = Reading(self._core.retry, job_id, after)
        polling = Polling(None)
        while True:
            # Asked first: what is stored after this answer and before the end of the reading is then not missed.
            job = await self.job(job_id) if follow else None
            try:
                async with aclosing(self._lines(reading.start())) as lines:
                    async for line in lines:
                        if (result := reading.line(line)) is not None:
                            yield result
            except PortcullisError as error:
                await self._pause(error, reading.failed(error))
                continue
            if job is None or job.finished:
                return
            await self._sleep(polling.pause(job))

    async def cancel(self, job_id: str) -> None:
        """Cancel a job: what has no result yet will not get a verdict."""
        await self._do(calls.cancel_job(job_id))

    # --- the key ---------------------------------------------------------------------------------------------------------

    async def register(
        self, name: str, *, rate_limit_per_minute: int | None = None, rate_limit_per_day: int | None = None
    ) -> IssuedKey:
        """A new key. It is shown this once. It is not the one that this client uses from now on."""
        return await self._do(calls.register(name, rate_limit_per_minute, rate_limit_per_day, admin=self._core.has_admin_token))

    async def profile(self) -> Profile:
        """The key's limits, what is left of them, and its use."""
        return await self._do(calls.profile())

    async def rotate(self) -> IssuedKey:
        """A new secret for the key. The old one, which this client goes on using, works until `previous_valid_until`."""
        return await self._do(calls.rotate())

    async def revoke(self) -> None:
        """Revoke the key, for good."""
        await self._do(calls.revoke())

    # --- all keys --------------------------------------------------------------------------------------------------------

    async def list_keys(self, *, after: str | None = None, limit: int | None = None) -> KeyPage:
        """A page of all keys, oldest first."""
        return await self._do(calls.list_keys(after, limit))

    async def get_key(self, key_id: str) -> KeyRecord:
        return await self._do(calls.get_key(key_id))

    async def create_key(
        self,
        name: str,
        *,
        scopes: Iterable[str] | None = None,
        rate_limit_per_minute: int | None = None,
        rate_limit_per_day: int | None = None,
        expires_at: datetime | None = None,
    ) -> IssuedKey:
        """A key with scopes (detect, batch, admin), limits and an expiry of one's choice."""
        return await self._do(calls.create_key(name, **key_fields(scopes, rate_limit_per_minute, rate_limit_per_day, expires_at)))

    async def update_key(
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
        return await self._do(calls.update_key(key_id, name=name, **fields))

    async def revoke_key(self, key_id: str) -> None:
        """Revoke a key, for good."""
        await self._do(calls.revoke_key(key_id))

    # --- how -------------------------------------------------------------------------------------------------------------

    async def _do(self, call: Call[T]) -> T:
        retrying = AsyncRetrying(
            sleep=self._sleep, **self._core.retry.options(idempotent=call.idempotent, notice=self._core.notice)
        )
        return await retrying(self._once, call)

    async def _once(self, call: Call[T]) -> T:
        content = call.body if call.body is None or isinstance(call.body, bytes) else call.body.pieces_async()
        with self._core.translated():
            response = await self._http.request(content=content, **self._core.request(call))
        return self._core.read(call, response.status_code, response.headers, response.content)

    async def _lines(self, call: Call[None]) -> AsyncGenerator[bytes, None]:
        lines = Lines()
        content = call.body if isinstance(call.body, bytes) else None
        with self._core.translated():
            async with self._http.stream(content=content, **self._core.request(call, streamed=True)) as response:
                if response.status_code != httpx.codes.OK:
                    self._core.check(response.status_code, response.headers, await response.aread())
                async for piece in response.aiter_bytes():
                    for line in lines.add(piece):
                        yield line

    async def _pause(self, reason: PortcullisError, seconds: float) -> None:
        if self._core.notice is not None:
            self._core.notice(reason, seconds)
        await self._sleep(seconds)
