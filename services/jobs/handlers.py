"""What arrives on the bus: calls of callers whom auth has verified. What is read back carries the state of the key's limits."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from libs.common.context import RequestContext
from libs.common.contracts import (
    AnsweredAccount,
    AuthenticatedJobRequest,
    JobAppend,
    JobCreate,
    JobGet,
    JobList,
    JobResults,
    JobSeal,
    Message,
    Principal,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from libs.common.subjects import ACCOUNT_ANSWERED
from services.jobs.core import new_job_id
from services.jobs.desk import Desk

T = TypeVar("T", bound=Message)


async def create(message: AuthenticatedJobRequest, context: RequestContext, desk: Desk) -> Forward:
    job_id = new_job_id(context.deadline_ms, context.attempt_of)
    return _with_rate(message.principal, await desk.create(message.principal, _read(message, JobCreate), job_id))


async def append(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Answer:
    await desk.append(message.principal, _read(message, JobAppend))
    return Answer(None)


async def seal(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Forward:
    return _with_rate(message.principal, await desk.seal(message.principal, _read(message, JobSeal)))


async def get(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Forward:
    return _with_rate(message.principal, await desk.get(message.principal, _read(message, JobGet).job_id))


async def list_jobs(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Forward:
    return _with_rate(message.principal, await desk.list(message.principal, _read(message, JobList)))


async def results(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Answer:
    return Answer(await desk.results(message.principal, _read(message, JobResults)))


async def cancel(message: AuthenticatedJobRequest, _: RequestContext, desk: Desk) -> Forward:
    return _with_rate(message.principal, await desk.cancel(message.principal, _read(message, JobGet).job_id))


def _read(message: AuthenticatedJobRequest, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(message.payload, type=kind)
    except msgspec.DecodeError as error:
        raise PortcullisError(ErrorCode.BAD_REQUEST, f"The message could not be read: {error}.") from None
    except (UnicodeDecodeError, RecursionError):  # which no stage before has seen: the payload stays encoded until here
        raise PortcullisError(ErrorCode.BAD_REQUEST, "The message could not be read.") from None


def _with_rate(principal: Principal, result: Message) -> Forward:
    return Forward(ACCOUNT_ANSWERED, AnsweredAccount(principal=principal, result=raw(result)))
