"""What clients ask on NATS themselves, in the name of the key whose id stands in the subject.

Nobody but a client that auth has let in with that key may publish there, with the scope `batch`; so it need not be asked again.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Final

from libs.common import subjects
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import (
    MAX_JOB_APPEND,
    DetectOptions,
    JobAppend,
    JobCreate,
    JobGet,
    JobList,
    JobResults,
    JobSeal,
    JobSubmit,
    Principal,
    encode,
)
from libs.common.stages import Answer
from services.jobs.core import new_job_id
from services.jobs.desk import Desk

SECONDS: Final = 30.0
"""How long anything that a client asks may take: the items of a large submission are stored one by one."""
SUBMISSIONS_IN_FLIGHT: Final = 32
"""Each holds up to 1 MB."""
CALLS_IN_FLIGHT: Final = 128


def open_door(bus: Bus, desk: Desk) -> None:
    """Take what clients ask."""
    many, few = CALLS_IN_FLIGHT, SUBMISSIONS_IN_FLIGHT
    bus.door(subjects.DOOR_SUBMIT, JobSubmit, partial(submit, desk=desk), seconds=SECONDS, max_in_flight=few)
    bus.door(subjects.DOOR_STATUS, JobGet, partial(status, desk=desk), seconds=SECONDS, max_in_flight=many)
    bus.door(subjects.DOOR_LIST, JobList, partial(list_jobs, desk=desk), seconds=SECONDS, max_in_flight=many)
    bus.door(subjects.DOOR_RESULTS, JobResults, partial(results, desk=desk), seconds=SECONDS, max_in_flight=few)
    bus.door(subjects.DOOR_CANCEL, JobGet, partial(cancel, desk=desk), seconds=SECONDS, max_in_flight=many)


async def submit(key_id: str, message: JobSubmit, context: RequestContext, desk: Desk) -> Answer:
    """All of it in one message: it is accepted as a whole, or not at all."""
    caller, items = _caller(key_id), message.requests
    idempotency = hashlib.sha256(message.idempotency_key.encode()).hexdigest() if message.idempotency_key is not None else None
    opened = await desk.create(caller, JobCreate(idempotency=idempotency), new_job_id(context.deadline_ms, context.attempt_of))
    if not opened.sealed:
        for first in range(0, len(items), MAX_JOB_APPEND):
            part = items[first : first + MAX_JOB_APPEND]
            await desk.append(caller, JobAppend(job_id=opened.job_id, first_index=first, items=part))
    options = message.config or DetectOptions()
    seal = JobSeal(
        job_id=opened.job_id,
        total=len(items),
        digest=hashlib.sha256(encode(message)).hexdigest(),
        threshold=options.confidence_threshold,
        detailed=options.detailed_response,
        webhook_url=message.webhook.url if message.webhook is not None else None,
    )
    return Answer(await desk.seal(caller, seal))


async def status(key_id: str, message: JobGet, _: RequestContext, desk: Desk) -> Answer:
    return Answer(await desk.get(_caller(key_id), message.job_id))


async def list_jobs(key_id: str, message: JobList, _: RequestContext, desk: Desk) -> Answer:
    return Answer(await desk.list(_caller(key_id), message))


async def results(key_id: str, message: JobResults, _: RequestContext, desk: Desk) -> Answer:
    return Answer(await desk.results(_caller(key_id), message))


async def cancel(key_id: str, message: JobGet, _: RequestContext, desk: Desk) -> Answer:
    return Answer(await desk.cancel(_caller(key_id), message.job_id))


def _caller(key_id: str) -> Principal:
    """Whose the jobs are. The key's limits are not known here, and not needed: units are taken when its items are judged."""
    return Principal(key_id=key_id, scopes=("batch",), limit_minute=0, limit_day=0)
