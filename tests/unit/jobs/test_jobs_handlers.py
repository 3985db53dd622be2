from __future__ import annotations

import msgspec
import pytest

from libs.common.context import RequestContext, new_request_id, new_traceparent
from libs.common.contracts import (
    AnsweredAccount,
    AuthenticatedJobRequest,
    JobAppend,
    JobCreate,
    JobGet,
    JobItem,
    JobList,
    JobOpened,
    JobPage,
    JobResultPage,
    JobResults,
    JobSeal,
    JobStatus,
    Message,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from libs.common.subjects import ACCOUNT_ANSWERED
from services.jobs import handlers
from tests.bad_inputs import NO_UTF8, UNREADABLE
from tests.unit.jobs.test_jobs_desk import PRINCIPAL, Kit

CONTEXT = RequestContext(1_800_000_010_000, new_request_id(), new_traceparent(), attempt_of="one")


def asked(payload: Message | msgspec.Raw) -> AuthenticatedJobRequest:
    return AuthenticatedJobRequest(principal=PRINCIPAL, payload=payload if isinstance(payload, msgspec.Raw) else raw(payload))


def forwarded(outcome: object, kind: type[msgspec.Struct]) -> object:
    """The result, which goes on to the limiter in the caller's name."""
    assert isinstance(outcome, Forward)
    assert outcome.subject == ACCOUNT_ANSWERED
    assert isinstance(outcome.message, AnsweredAccount)
    assert outcome.message.principal == PRINCIPAL
    return msgspec.json.decode(outcome.message.result, type=kind)


async def test_every_operation_is_answered_by_what_it_promises() -> None:
    desk = Kit().desk
    opened = forwarded(await handlers.create(asked(JobCreate()), CONTEXT, desk), JobOpened)
    assert isinstance(opened, JobOpened)
    again = forwarded(await handlers.create(asked(JobCreate()), CONTEXT, desk), JobOpened)
    assert again == opened  # the same request, sent again
    job_id = opened.job_id
    append = JobAppend(job_id=job_id, first_index=0, items=(JobItem(text="a"),))
    assert await handlers.append(asked(append), CONTEXT, desk) == Answer(None)
    sealed = forwarded(await handlers.seal(asked(JobSeal(job_id=job_id, total=1, digest="d")), CONTEXT, desk), JobStatus)
    assert forwarded(await handlers.get(asked(JobGet(job_id=job_id)), CONTEXT, desk), JobStatus) == sealed
    page = forwarded(await handlers.list_jobs(asked(JobList()), CONTEXT, desk), JobPage)
    assert page == JobPage(jobs=(sealed,))  # type: ignore[arg-type]
    assert await handlers.results(asked(JobResults(job_id=job_id)), CONTEXT, desk) == Answer(
        JobResultPage(results=(), more=False)
    )
    cancelled = forwarded(await handlers.cancel(asked(JobGet(job_id=job_id)), CONTEXT, desk), JobStatus)
    assert isinstance(cancelled, JobStatus)
    assert cancelled.state == "cancelled"


@pytest.mark.parametrize(
    "payload",
    [b"{}", b'{"job_id":"../../etc"}', b'{"job_id":"' + b"*" * 28 + b'"}', NO_UTF8, *UNREADABLE.values()],
    ids=lambda _: "",
)
async def test_a_message_that_cannot_be_read_is_a_bad_request(payload: bytes) -> None:
    """Above all, no job id becomes a wildcard of a subject."""
    for handler in (handlers.get, handlers.cancel, handlers.results, handlers.append, handlers.seal):
        with pytest.raises(PortcullisError) as caught:
            await handler(asked(msgspec.Raw(payload)), CONTEXT, Kit().desk)
        assert caught.value.code == ErrorCode.BAD_REQUEST
