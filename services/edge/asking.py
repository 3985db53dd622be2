"""Asking a stage again: for what may wait a little, a stage that is full or away now may not be so for long."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from libs.common.context import RequestContext
from libs.common.contracts import Message
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import problems
from services.edge.ports import Answered, Stages
from services.edge.replies import Refused

PAUSE_SECONDS: Final = (0.05, 1.0)
"""The first and the longest pause before something is asked again."""


async def insist(
    stages: Stages,
    subject: str,
    message: Message,
    context: RequestContext,
    *,
    passing: frozenset[ErrorCode],
    token: str | None = None,
) -> Answered:
    """Ask until there is an answer, a failure that is not `passing`, or no time left before the context's deadline.

    `message` must be one that can be asked twice; `token`: see `Stages.request`. Raises `PortcullisError` when no reply came,
    `Refused` when the last reply was a refusal.
    """
    pause, longest = PAUSE_SECONDS
    while True:
        try:
            answered = await stages.request(subject, message, context, idempotent=True, token=token)
        except PortcullisError as error:
            failure, refusal = error, None
        else:
            reply = answered.reply
            if reply.error is None:
                return answered
            failure = problems.from_reply(reply.error)
            refusal = Refused(failure, reply.rate)
        seconds = pause * random.uniform(0.5, 1.5)  # noqa: S311  # spreads out retries
        if failure.code not in passing or context.remaining_seconds(stages.clock) <= seconds:
            raise refusal or failure
        await asyncio.sleep(seconds)
        pause = min(pause * 2, longest)
