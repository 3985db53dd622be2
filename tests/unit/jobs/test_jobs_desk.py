from __future__ import annotations

import base64

import msgspec
import pytest

from libs.common.clock import ManualClock
from libs.common.contracts import (
    JobAppend,
    JobCreate,
    JobItem,
    JobList,
    JobResult,
    JobResults,
    JobSeal,
    JobStatus,
    Principal,
    encode,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs import core
from services.jobs.desk import Bounds, Desk
from tests.unit.jobs.fakes import BENIGN, JOB, KEY, MALICIOUS, FakeQueues, FakeRecords, FakeResults, record

PRINCIPAL = Principal(key_id=KEY, scopes=("batch",), limit_minute=70, limit_day=500)
SOMEBODY_ELSE = Principal(key_id="zzzzyyyyxxxx", scopes=("batch",), limit_minute=70, limit_day=500)
CLAIM = "a-hash"


class Kit:
    def __init__(self) -> None:
        self.records = FakeRecords()
        self.queues = FakeQueues()
        self.results = FakeResults()
        self.clock = ManualClock()
        self.kicks = 0
        self.desk = Desk(
            self.records,
            self.queues,
            self.results,
            self.clock,
            Bounds(items=10, stored_bytes=200, open_per_key=2, open_in_all=3),
            webhook_refusal=lambda url: "Expected a public address" if "private" in url else None,
            kick=self.kick,
        )

    def kick(self) -> None:
        self.kicks += 1

    async def submit(
        self,
        job_id: str = JOB,
        *texts: str,
        idempotency: str | None = None,
        digest: str = "d",
        webhook_url: str | None = None,
        principal: Principal = PRINCIPAL,
    ) -> JobStatus:
        """As the edge does."""
        texts = texts or ("one", "two")
        opened = await self.desk.create(principal, JobCreate(idempotency=idempotency), job_id)
        if not opened.sealed:
            await self.append(opened.job_id, 0, *texts, principal=principal)
        seal = JobSeal(job_id=opened.job_id, total=len(texts), digest=digest, webhook_url=webhook_url)
        return await self.desk.seal(principal, seal)

    async def append(self, job_id: str, first: int, *texts: str, principal: Principal = PRINCIPAL) -> None:
        items = tuple(JobItem(text=text) for text in texts)
        await self.desk.append(principal, JobAppend(job_id=job_id, first_index=first, items=items))


@pytest.fixture
def kit() -> Kit:
    return Kit()


def named(number: int) -> str:
    return f"{number:028x}"


async def refused(call: object) -> PortcullisError:
    with pytest.raises(PortcullisError) as caught:
        await call  # type: ignore[misc]
    return caught.value


# --- submission ----------------------------------------------------------------------------------------------------------


async def test_a_submission_is_queued_when_it_is_complete(kit: Kit) -> None:
    opened = await kit.desk.create(PRINCIPAL, JobCreate(), JOB)
    await kit.append(JOB, 0, "one", "two")
    await kit.append(JOB, 2, "three")
    assert (await refused(kit.desk.get(PRINCIPAL, JOB))).code == ErrorCode.NOT_FOUND  # nobody sees it yet
    status = await kit.desk.seal(PRINCIPAL, JobSeal(job_id=JOB, total=3, digest="d", threshold=0.3, detailed=True))
    assert (opened.sealed, status.state, status.total, status.done, status.detailed) == (False, "queued", 3, 0, True)
    assert kit.records.of().threshold == 0.3
    assert [item.text for item in kit.queues.of().items.values() if item is not None] == ["one", "two", "three"]
    assert kit.kicks == 1


async def test_every_step_can_be_repeated(kit: Kit) -> None:
    for _ in range(2):
        assert not (await kit.desk.create(PRINCIPAL, JobCreate(idempotency=CLAIM), JOB)).sealed
    for _ in range(20):  # a repetition is not counted as bytes of its own
        await kit.append(JOB, 0, "one", "two")
    size = kit.records.of().stored_bytes
    assert size == sum(len(encode(JobItem(text=text))) for text in ("one", "two"))
    await kit.append(JOB, 2, "three")
    assert kit.records.of().stored_bytes > size
    seal = JobSeal(job_id=JOB, total=3, digest="d", webhook_url="https://example.com")
    first, second = await kit.desk.seal(PRINCIPAL, seal), await kit.desk.seal(PRINCIPAL, seal)
    assert first == second
    assert first.webhook is not None
    assert first.webhook.secret is not None


async def test_a_seal_that_was_overtaken_by_itself_makes_one_secret(kit: Kit) -> None:
    await kit.desk.create(PRINCIPAL, JobCreate(), JOB)
    await kit.append(JOB, 0, "one")
    sealed = core.seal(
        kit.records.of(), 0, total=1, digest="d", threshold=None, detailed=False, webhook=("https://example.com", "whsec_first")
    )
    kit.records.before_update.append(lambda: kit.records.put(sealed))
    status = await kit.desk.seal(PRINCIPAL, JobSeal(job_id=JOB, total=1, digest="d", webhook_url="https://example.com"))
    assert status.webhook is not None
    assert status.webhook.secret == "whsec_first"


async def test_a_seal_before_all_is_stored_is_to_be_tried_again(kit: Kit) -> None:
    await kit.desk.create(PRINCIPAL, JobCreate(), JOB)
    await kit.append(JOB, 0, "one")
    error = await refused(kit.desk.seal(PRINCIPAL, JobSeal(job_id=JOB, total=2, digest="d")))
    assert error.code == ErrorCode.STAGE_UNAVAILABLE
    assert kit.records.of().state == "open"


async def test_nothing_can_be_added_to_what_is_sealed_or_cancelled(kit: Kit) -> None:
    await kit.submit()
    assert (await refused(kit.append(JOB, 2, "three"))).code == ErrorCode.CONFLICT
    await kit.desk.cancel(PRINCIPAL, JOB)
    assert (await refused(kit.append(JOB, 2, "three"))).code == ErrorCode.CONFLICT


async def test_a_webhook_has_a_secret_of_its_own_as_the_standard_wants_it(kit: Kit) -> None:
    secrets = set()
    for number in range(2):
        status = await kit.submit(named(number), webhook_url="https://example.com/")
        assert status.webhook is not None
        assert status.webhook.secret is not None
        assert status.webhook.secret.startswith("whsec_")
        assert len(base64.b64decode(status.webhook.secret.removeprefix("whsec_"))) == 24
        secrets.add(status.webhook.secret)
        shown = (await kit.desk.get(PRINCIPAL, named(number))).webhook
        assert shown is not None
        assert shown.secret is None
    assert len(secrets) == 2


async def test_a_webhook_that_cannot_be_used_refuses_the_job_and_leaves_no_open_one(kit: Kit) -> None:
    for number in range(5):  # more than a key may have open
        error = await refused(kit.submit(named(number), webhook_url="http://private/"))
        assert error.code == ErrorCode.INVALID_FIELD
        assert dict(error.fields) == {"webhook.url": "Expected a public address"}
    assert await kit.queues.all() == []


# --- the same submission once more ---------------------------------------------------------------------------------------


async def test_same_key_and_same_body_is_the_same_job(kit: Kit) -> None:
    first = await kit.submit(named(1), idempotency=CLAIM)
    second = await kit.submit(named(2), idempotency=CLAIM)
    assert second == first
    assert list(kit.queues.open_queues) == [(KEY, named(1))]
    kit.records.put(msgspec.structs.replace(kit.records.of(named(1)), state="done", done=2))
    assert (await kit.submit(named(3), idempotency=CLAIM)).job_id == named(1)


async def test_same_key_and_another_body_is_a_conflict(kit: Kit) -> None:
    await kit.submit(named(1), idempotency=CLAIM)
    error = await refused(kit.submit(named(2), "other", idempotency=CLAIM, digest="another"))
    assert error.code == ErrorCode.CONFLICT
    assert kit.records.of(named(1)).total == 2


async def test_the_same_idempotency_key_of_another_key_is_another_job(kit: Kit) -> None:
    first = await kit.submit(named(1), idempotency=CLAIM)
    second = await kit.submit(named(2), idempotency=CLAIM, principal=SOMEBODY_ELSE)
    assert first.job_id != second.job_id


async def test_an_unfinished_submission_gives_way_to_a_later_one(kit: Kit) -> None:
    await kit.desk.create(PRINCIPAL, JobCreate(idempotency=CLAIM), named(1))
    await kit.append(named(1), 0, "one")
    status = await kit.submit(named(2), idempotency=CLAIM)
    assert status.job_id == named(2)
    assert kit.records.of(named(1)).state == "cancelled"
    assert (KEY, named(1)) not in kit.queues.open_queues
    assert (await refused(kit.append(named(1), 1, "two"))).code == ErrorCode.CONFLICT
    late = JobSeal(job_id=named(1), total=1, digest="d")
    assert (await refused(kit.desk.seal(PRINCIPAL, late))).code == ErrorCode.CONFLICT


async def test_an_idempotency_key_whose_submission_was_given_up_can_be_used_again(kit: Kit) -> None:
    await kit.desk.create(PRINCIPAL, JobCreate(idempotency=CLAIM), named(1))
    await kit.desk.cancel(PRINCIPAL, named(1))
    status = await kit.submit(named(2), idempotency=CLAIM)
    assert (status.job_id, status.state) == (named(2), "queued")


async def test_two_submissions_at_once_under_one_idempotency_key_leave_one(kit: Kit) -> None:
    kit.records.before_claim.append(lambda: kit.records.claims.update({(KEY, CLAIM): (named(1), 1)}))
    error = await refused(kit.desk.create(PRINCIPAL, JobCreate(idempotency=CLAIM), named(2)))
    assert error.code == ErrorCode.CONFLICT
    assert kit.records.of(named(2)).state == "cancelled"
    assert await kit.queues.all() == []


# --- bounds --------------------------------------------------------------------------------------------------------------


async def test_a_job_holds_so_many_items_and_bytes(kit: Kit) -> None:
    await kit.desk.create(PRINCIPAL, JobCreate(), JOB)
    error = await refused(kit.append(JOB, 9, "a", "b"))
    assert (error.code, error.detail) == (ErrorCode.PAYLOAD_TOO_LARGE, "A job holds at most 10 items.")
    error = await refused(kit.append(JOB, 0, "x" * 200))
    assert (error.code, error.detail) == (ErrorCode.PAYLOAD_TOO_LARGE, "A job holds at most 200 bytes.")
    assert not kit.queues.of().items
    await kit.append(JOB, 0, "x" * 100)
    assert (await refused(kit.append(JOB, 1, "x" * 100))).code == ErrorCode.PAYLOAD_TOO_LARGE
    await kit.append(JOB, 0, "x" * 100)  # the same once more still fits


async def test_a_key_and_all_keys_have_so_many_jobs_at_a_time(kit: Kit) -> None:
    await kit.submit(named(1))
    await kit.submit(named(2))
    error = await refused(kit.submit(named(3)))
    assert (error.code, error.retry_after) == (ErrorCode.OVERLOADED, 10)
    assert "2 jobs" in error.detail
    await kit.submit(named(4), principal=SOMEBODY_ELSE)
    assert (await refused(kit.submit(named(5), principal=SOMEBODY_ELSE))).code == ErrorCode.OVERLOADED
    await kit.desk.cancel(PRINCIPAL, named(1))
    assert (await kit.submit(named(6))).state == "queued"


async def test_an_answer_that_was_lost_is_given_again_where_there_is_no_room_for_another(kit: Kit) -> None:
    await kit.submit(named(1), idempotency=CLAIM)
    await kit.submit(named(2))
    assert (await kit.submit(named(3), idempotency=CLAIM)).job_id == named(1)


# --- reading -------------------------------------------------------------------------------------------------------------


async def test_jobs_of_somebody_else_do_not_exist(kit: Kit) -> None:
    await kit.submit(idempotency=CLAIM)
    for call in (
        kit.desk.get(SOMEBODY_ELSE, JOB),
        kit.desk.cancel(SOMEBODY_ELSE, JOB),
        kit.desk.results(SOMEBODY_ELSE, JobResults(job_id=JOB)),
        kit.append(JOB, 0, "x", principal=SOMEBODY_ELSE),
        kit.desk.seal(SOMEBODY_ELSE, JobSeal(job_id=JOB, total=2, digest="d")),
    ):
        assert (await refused(call)).code == ErrorCode.NOT_FOUND
    assert kit.records.of().state == "queued"
    assert (await kit.desk.list(SOMEBODY_ELSE, JobList())).jobs == ()


async def test_jobs_are_listed_newest_first_a_page_at_a_time_without_unfinished_submissions(kit: Kit) -> None:
    for number in range(7):
        kit.records.put(record(job_id=named(number), total=0 if number in (2, 6) else 3))
    first = await kit.desk.list(PRINCIPAL, JobList(limit=3))
    assert [job.job_id for job in first.jobs] == [named(5), named(4), named(3)]
    assert first.next_before == named(3)
    second = await kit.desk.list(PRINCIPAL, JobList(limit=3, before=first.next_before))
    assert [job.job_id for job in second.jobs] == [named(1), named(0)]
    assert second.next_before is None


async def test_results_are_read_by_cursor(kit: Kit) -> None:
    kit.records.put(record())
    for index in (2, 0, 1):
        await kit.results.store(KEY, JOB, JobResult(index=index, result=BENIGN, id=f"id-{index}"))
    first = await kit.desk.results(PRINCIPAL, JobResults(job_id=JOB, limit=2))
    assert ([each.result.index for each in first.results], first.more) == ([2, 0], True)
    second = await kit.desk.results(PRINCIPAL, JobResults(job_id=JOB, limit=2, after=first.results[-1].cursor))
    assert ([each.result.id for each in second.results], second.more) == (["id-1"], False)


async def test_a_cancelled_job_is_over_and_keeps_and_counts_what_has_been_judged(kit: Kit) -> None:
    await kit.submit(JOB, "a", "b", "c")
    await kit.results.store(KEY, JOB, JobResult(index=0, result=BENIGN))
    cancelled = await kit.desk.cancel(PRINCIPAL, JOB)
    assert (cancelled.state, cancelled.done, cancelled.malicious) == ("cancelled", 1, 0)
    assert await kit.queues.all() == []
    await kit.results.store(KEY, JOB, JobResult(index=1, result=MALICIOUS))  # it was in hand
    seen = await kit.desk.get(PRINCIPAL, JOB)
    assert (seen.state, seen.done, seen.malicious) == ("cancelled", 2, 1)
    assert kit.records.of().done == 2
    assert await kit.desk.cancel(PRINCIPAL, JOB) == seen


async def test_a_job_that_is_done_cannot_be_cancelled_any_more(kit: Kit) -> None:
    kit.records.put(record(state="done", done=4))
    assert (await kit.desk.cancel(PRINCIPAL, JOB)).state == "done"


async def test_a_cancellation_survives_that_somebody_counts_at_the_same_time(kit: Kit) -> None:
    await kit.submit()
    counted = msgspec.structs.replace(kit.records.of(), state="running", done=1)
    kit.records.before_update.append(lambda: kit.records.put(counted))
    assert (await kit.desk.cancel(PRINCIPAL, JOB)).state == "cancelled"
    assert (kit.records.of().state, kit.records.of().done) == ("cancelled", 1)
