"""What can be asked about jobs, in the name of a caller who has been verified. Each raises `PortcullisError`."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from libs.common import tracing
from libs.common.clock import Clock
from libs.common.contracts import (
    JobAppend,
    JobCreate,
    JobList,
    JobOpened,
    JobPage,
    JobResult,
    JobResultPage,
    JobResults,
    JobSeal,
    JobStatus,
    Principal,
    StoredJobResult,
    encode,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs import core, metrics
from services.jobs.core import JobRecord
from services.jobs.ports import Kept, Queues, RecordMovedError, Records, Results

log = logging.getLogger(__name__)

PAGE_BYTES = 1_000_000
"""Of a page of results: it goes to the caller in one message."""
COUNT_MESSAGES = 5000
"""Results that are counted at a time."""
SECRET_BYTES = 24  # what Standard Webhooks recommends: 24 to 64

_RESULT = msgspec.json.Decoder(JobResult)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what one job, one key and all together may hold."""

    items: int
    stored_bytes: int
    open_per_key: int
    open_in_all: int


class Desk:
    """`webhook_refusal`: why a webhook's URL cannot be used, or None. `kick`: there is something to run."""

    def __init__(
        self,
        records: Records,
        queues: Queues,
        results: Results,
        clock: Clock,
        bounds: Bounds,
        *,
        webhook_refusal: Callable[[str], str | None],
        kick: Callable[[], None],
    ) -> None:
        self._records = records
        self._queues = queues
        self._results = results
        self._clock = clock
        self._bounds = bounds
        self._webhook_refusal = webhook_refusal
        self._kick = kick

    # --- submission ------------------------------------------------------------------------------------------------------

    async def create(self, principal: Principal, message: JobCreate, job_id: str) -> JobOpened:
        """Begin a submission; the same `job_id` once more is the same submission."""
        key_id = principal.key_id
        claimed = await self._records.claim(key_id, message.idempotency) if message.idempotency is not None else None
        if claimed is not None and claimed[0] != job_id:
            earlier = await self._records.get(key_id, claimed[0])
            if earlier is not None and earlier.record.total:
                return JobOpened(job_id=claimed[0], sealed=True)
            if earlier is not None and not earlier.record.over:
                await self._give_up(earlier)
        await self._check_room(key_id, job_id)
        await self._queues.open(key_id, job_id)
        now_ms = self._now_ms()
        await self._records.create(JobRecord(key_id=key_id, job_id=job_id, state="open", created_ms=now_ms, updated_ms=now_ms))
        if message.idempotency is not None and (claimed is None or claimed[0] != job_id):
            try:
                await self._records.set_claim(key_id, message.idempotency, job_id, claimed[1] if claimed is not None else 0)
            except RecordMovedError:
                if (kept := await self._records.get(key_id, job_id)) is not None:
                    await self._give_up(kept)
                raise PortcullisError(
                    ErrorCode.CONFLICT, "Another submission with this Idempotency-Key has begun at the same time."
                ) from None
        return JobOpened(job_id=job_id, sealed=False)

    async def append(self, principal: Principal, message: JobAppend) -> None:
        """Store items; returns when they are."""
        key_id, job_id = principal.key_id, message.job_id
        kept = await self._open(key_id, job_id)
        if message.first_index + len(message.items) > self._bounds.items:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, f"A job holds at most {self._bounds.items} items.")
        size = sum(len(encode(item)) for item in message.items)
        if message.first_index >= kept.record.stored_items and kept.record.stored_bytes + size > self._bounds.stored_bytes:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, f"A job holds at most {self._bounds.stored_bytes} bytes.")
        await self._queues.append(key_id, job_id, message.first_index, message.items)

        def grown(record: JobRecord) -> JobRecord:
            if record.state != "open":
                raise core.superseded()
            if message.first_index < record.stored_items:  # the same once more
                return record
            return msgspec.structs.replace(
                record,
                stored_items=message.first_index + len(message.items),
                stored_bytes=record.stored_bytes + size,
                updated_ms=self._now_ms(),
            )

        await self._change(kept, grown)

    async def seal(self, principal: Principal, message: JobSeal) -> JobStatus:
        """All items are there: run them."""
        key_id, job_id = principal.key_id, message.job_id
        kept = await self._get(key_id, job_id)
        if kept.record.state != "open":
            return self._same(kept.record, message, self._now_ms())
        if message.webhook_url is not None and (refusal := self._webhook_refusal(message.webhook_url)) is not None:
            await self._give_up(kept)  # it will not be completed
            raise PortcullisError(ErrorCode.INVALID_FIELD, fields=(("webhook.url", refusal),))
        queue = await self._queues.one(key_id, job_id)
        if queue is None:
            raise core.superseded()
        if queue.waiting != message.total:
            raise PortcullisError(
                ErrorCode.STAGE_UNAVAILABLE, internal=f"{queue.waiting} of {message.total} items of {job_id} are stored"
            )
        webhook = (message.webhook_url, _new_secret()) if message.webhook_url is not None else None

        def sealed(record: JobRecord) -> JobRecord:
            if record.state == "cancelled":
                raise core.superseded()
            if record.state != "open":  # the same request, sent again while it was being carried out
                return record
            return core.seal(
                record,
                self._now_ms(),
                total=message.total,
                digest=message.digest,
                threshold=message.threshold,
                detailed=message.detailed,
                webhook=webhook,
                traceparent=tracing.here(),
            )

        record = await self._change(kept, sealed)
        self._kick()
        return self._same(record, message, self._now_ms())

    @staticmethod
    def _same(record: JobRecord, message: JobSeal, now_ms: int) -> JobStatus:
        if record.digest != message.digest:
            raise core.conflict() if record.digest else core.superseded()
        return core.status_of(record, now_ms, with_secret=True)

    async def _check_room(self, key_id: str, job_id: str) -> None:
        open_jobs = [queue for queue in await self._queues.all() if queue.job_id != job_id]
        if len(open_jobs) >= self._bounds.open_in_all:
            raise PortcullisError(ErrorCode.OVERLOADED, internal="too many jobs that are not over", retry_after=10)
        if sum(queue.key_id == key_id for queue in open_jobs) >= self._bounds.open_per_key:
            raise PortcullisError(
                ErrorCode.OVERLOADED,
                f"The key has {self._bounds.open_per_key} jobs that are not over, which is the most.",
                retry_after=10,
            )

    async def _give_up(self, kept: Kept) -> None:
        """End a submission that was never completed."""

        def given_up(record: JobRecord) -> JobRecord:
            if record.state != "open":
                raise core.conflict()
            return core.end(record, "cancelled", "The submission was not completed.", self._now_ms())

        await self._change(kept, given_up)
        await self._queues.close(kept.record.key_id, kept.record.job_id)

    # --- reading ---------------------------------------------------------------------------------------------------------

    async def get(self, principal: Principal, job_id: str) -> JobStatus:
        return self._status(await self._late((await self._visible(principal.key_id, job_id)).record))

    async def list(self, principal: Principal, message: JobList) -> JobPage:
        ids = [
            job_id
            for job_id in reversed(await self._records.job_ids(principal.key_id))
            if message.before is None or job_id < message.before
        ]
        shown: list[JobRecord] = []
        looked_at = 0
        while looked_at < len(ids) and len(shown) <= message.limit:
            part = ids[looked_at : looked_at + message.limit + 1]
            looked_at += len(part)
            kept = await asyncio.gather(*(self._records.get(principal.key_id, job_id) for job_id in part))
            shown += [each.record for each in kept if each is not None and each.record.total]
        page = shown[: message.limit]
        return JobPage(
            jobs=tuple(self._status(record) for record in page),
            next_before=page[-1].job_id if len(shown) > len(page) else None,
        )

    async def results(self, principal: Principal, message: JobResults) -> JobResultPage:
        await self._visible(principal.key_id, message.job_id)
        found, more = await self._results.page(principal.key_id, message.job_id, message.after, message.limit, PAGE_BYTES)
        return JobResultPage(
            results=tuple(StoredJobResult(cursor=place, result=_RESULT.decode(data)) for place, data in found), more=more
        )

    async def cancel(self, principal: Principal, job_id: str) -> JobStatus:
        """Stop it, if it is not over; what has a result keeps it. A submission that has not been completed is given up."""
        kept = await self._get(principal.key_id, job_id)
        if not kept.record.total:
            if kept.record.over:
                raise core.not_found()
            await self._give_up(kept)
            return self._status(core.end(kept.record, "cancelled", None, self._now_ms()))

        def cancelled(record: JobRecord) -> JobRecord:
            return record if record.over else core.end(record, "cancelled", None, self._now_ms())

        record = await self._change(kept, cancelled)
        if record.state == "cancelled":
            if not kept.record.over:
                metrics.ENDED.labels(record.state).inc()
            await self._queues.close(record.key_id, record.job_id)
        return self._status(await self._late(record))

    # --- what they share -------------------------------------------------------------------------------------------------

    async def _get(self, key_id: str, job_id: str) -> Kept:
        kept = await self._records.get(key_id, job_id)
        if kept is None:
            raise core.not_found()
        return kept

    async def _open(self, key_id: str, job_id: str) -> Kept:
        kept = await self._get(key_id, job_id)
        if kept.record.state != "open":
            raise core.superseded()
        return kept

    async def _visible(self, key_id: str, job_id: str) -> Kept:
        """A submission that has not been completed is nobody's to see."""
        kept = await self._get(key_id, job_id)
        if not kept.record.total:
            raise core.not_found()
        return kept

    def _status(self, record: JobRecord) -> JobStatus:
        return core.status_of(record, self._now_ms())

    async def _late(self, record: JobRecord) -> JobRecord:
        return await count_late(self._records, self._results, record, self._now_ms())

    async def _change(self, kept: Kept, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        return await change_record(self._records, kept, change)

    def _now_ms(self) -> int:
        return int(self._clock.now() * 1000)


async def change_record(records: Records, kept: Kept, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
    """Change a record, again on what somebody else has made of it in the meantime. `change` may refuse by raising."""
    while True:
        changed = change(kept.record)
        if changed is kept.record:
            return changed
        try:
            await records.update(changed, kept.revision)
        except RecordMovedError:
            again = await records.get(kept.record.key_id, kept.record.job_id)
            if again is None:
                raise core.not_found() from None
            kept = again
        else:
            return changed


async def count_late(records: Records, results: Results, record: JobRecord, now_ms: int) -> JobRecord:
    """A job that was stopped, with the results that were stored since it was last counted; any other as it is."""
    if not record.over or record.done >= record.total:
        return record
    found = await results.outcomes(record.key_id, record.job_id, record.position, COUNT_MESSAGES)
    if not found:
        return record
    kept = await records.get(record.key_id, record.job_id)
    if kept is None:
        return record
    behind = kept.record
    while found:
        new = [(place, outcome) for place, _, outcome in found if place > behind.position]
        behind = core.count(behind, new, now_ms)
        found = await results.outcomes(record.key_id, record.job_id, max(behind.position, found[-1][0]), COUNT_MESSAGES)
    with suppress(RecordMovedError):  # somebody else has counted the same
        await records.update(behind, kept.revision)
    return behind


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
