"""Jobs, put together: the streams, the calls, the runner, the webhooks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from libs.common import subjects, tasks
from libs.common.bus import Bus
from libs.common.contracts import AuthenticatedJobRequest
from libs.common.errors import PortcullisError
from libs.common.service import Service
from services.jobs import handlers, webhooks
from services.jobs.adapters import BusBackend, JetStream, JetStreamQueues, JetStreamRecords, JetStreamResults
from services.jobs.desk import Bounds, Desk
from services.jobs.door import open_door
from services.jobs.runner import Pace, Runner
from services.jobs.settings import Settings

log = logging.getLogger(__name__)

START_RETRY_SECONDS = 0.5
CALLS_IN_FLIGHT = 128
APPENDS_IN_FLIGHT = 32
"""Each holds up to 2 MB."""


@asynccontextmanager
async def parts(bus: Bus, settings: Settings) -> AsyncIterator[None]:
    """Takes no call before the streams are there."""
    stream = JetStream(bus, settings)
    await _ensure(stream)
    records, queues, results = JetStreamRecords(stream), JetStreamQueues(stream), JetStreamResults(stream)
    rng = random.Random()  # noqa: S311  # spreads out retries; nothing secret depends on it
    runner = Runner(
        records,
        queues,
        results,
        BusBackend(bus, settings.jobs_message_timeout_seconds),
        bus.clock,
        Pace(
            slots=settings.jobs_slots,
            message_items=settings.jobs_message_items,
            keep_seconds=settings.jobs_ack_wait_seconds / 3,
            max_run_ms=int(settings.jobs_max_run_hours * 3_600_000),
        ),
        rng=rng,
    )
    desk = Desk(
        records,
        queues,
        results,
        bus.clock,
        Bounds(settings.jobs_max_items, settings.jobs_max_bytes, settings.jobs_open_per_key, settings.jobs_open),
        webhook_refusal=partial(webhooks.refusal, allow_private=settings.webhook_allow_private),
        kick=runner.kick,
    )
    for subject, handler, most in (
        (subjects.JOBS_CREATE, handlers.create, CALLS_IN_FLIGHT),
        (subjects.JOBS_APPEND, handlers.append, APPENDS_IN_FLIGHT),
        (subjects.JOBS_SEAL, handlers.seal, CALLS_IN_FLIGHT),
        (subjects.JOBS_GET, handlers.get, CALLS_IN_FLIGHT),
        (subjects.JOBS_LIST, handlers.list_jobs, CALLS_IN_FLIGHT),
        (subjects.JOBS_RESULTS, handlers.results, APPENDS_IN_FLIGHT),
        (subjects.JOBS_CANCEL, handlers.cancel, CALLS_IN_FLIGHT),
    ):
        bus.stage(subject, AuthenticatedJobRequest, partial(handler, desk=desk), max_in_flight=most)
    open_door(bus, desk)
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(webhooks.sending(settings))
        deliverer = webhooks.Deliverer(webhooks.JetStreamHooks(stream), records, sender, bus.clock, settings.webhook_attempts)
        stack.push_async_callback(tasks.end, asyncio.create_task(stream.keep_measuring()))
        running, delivering = asyncio.create_task(runner.run()), asyncio.create_task(deliverer.run())
        stack.push_async_callback(tasks.end, running)
        stack.push_async_callback(tasks.end, delivering)
        # While the connection is still there: what is in hand can be finished, and the rest given back.
        bus.on_drained += [partial(runner.finish, running), partial(tasks.end, delivering)]
        yield


async def _ensure(stream: JetStream) -> None:
    """Make the streams, waiting for JetStream."""
    waiting = False
    while True:
        try:
            await stream.ensure()
        except PortcullisError as error:
            if not waiting:
                log.warning("waiting for JetStream (%s)", error.internal)
            waiting = True
            await asyncio.sleep(START_RETRY_SECONDS)
        else:
            return


SERVICE = Service("jobs", Settings, parts)
