"""How a service runs: settings, logs, the bus, the service's own parts, then messages until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

import nats.errors
import uvloop

from libs.common import VERSION, tasks, telemetry, trace_export
from libs.common import settings as settings_module
from libs.common.bus import Bus
from libs.common.guard import PlainTextError
from libs.common.probes import ProcessHealth
from libs.common.settings import CommonSettings

log = logging.getLogger(__name__)

S = TypeVar("S", bound=CommonSettings)

Parts = Callable[[Bus, S], AbstractAsyncContextManager[None]]
"""A service's composition root: on a connected bus it opens what it needs and registers its stages; on exit it closes."""

Front = Callable[[Bus, S], AbstractAsyncContextManager[None]]
"""What a service shows to the outside besides its stages. It opens before the bus is connected, and closes while the bus still
works: what is in hand can be finished, and nothing new comes in."""

CONNECT_GRACE_SECONDS = 1.0
"""How long a front waits for the bus before it opens: callers that queued while it was away need not be refused then. After
that it opens all the same, and says that nothing is there, instead of keeping them."""

EXIT_CONNECTION_LOST = 3
"""The NATS connection was closed for good; whoever supervises us starts a new process."""


class ConfigurationError(Exception):
    """Something that only the operator can mend; its text is one line that says what to do."""


def run(service: str, settings_type: type[S], parts: Parts[S] | None = None, *, front: Front[S] | None = None) -> None:
    """Run a service until SIGTERM or SIGINT. Exit status 0 after a clean stop, 2 on wrong configuration."""
    settings = settings_module.load(settings_type)
    try:
        status = uvloop.run(_serve(service, settings, parts or _nothing, front or _nothing))
    except ConfigurationError as error:
        print(f"portcullis {service}: {error}", file=sys.stderr)  # noqa: T201
        status = 2
    raise SystemExit(status)


async def connect(bus: Bus, settings: CommonSettings) -> None:
    """Connect the bus, waiting for the server; wrong credentials are the operator's to mend."""
    while True:
        try:
            await bus.connect()
        except nats.errors.NoServersError:
            log.warning("no NATS server yet")
            await asyncio.sleep(0.2)
        except nats.errors.Error as error:
            if "authorization" in str(error).lower():
                raise ConfigurationError(
                    "NATS refuses the credentials; check PORTCULLIS_NATS_USER and PORTCULLIS_NATS_PASSWORD"
                ) from None
            if isinstance(error, PlainTextError):
                raise ConfigurationError(
                    "the NATS server offers no TLS, and nothing is sent to it without; "
                    "check PORTCULLIS_NATS_URL, and leave PORTCULLIS_NATS_TLS_CA unset where no TLS is wanted"
                ) from None
            raise
        except ssl.SSLCertVerificationError as error:
            raise ConfigurationError(
                f"the certificate of the NATS server is not accepted ({error.verify_message}); "
                "check PORTCULLIS_NATS_URL and PORTCULLIS_NATS_TLS_CA"
            ) from None
        else:
            return


async def _serve(service: str, settings: S, parts: Parts[S], front: Front[S]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    bus = Bus(service, settings)
    telemetry.setup_logging(service, bus.instance, settings)
    telemetry.BUILD.labels(VERSION).set(1)
    try:
        exporter = trace_export.start(service, bus.instance, settings)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    try:
        return await _serve_on(bus, settings, parts, front, stop)
    finally:
        if exporter is not None:
            exporter.close()


async def _serve_on(bus: Bus, settings: S, parts: Parts[S], front: Front[S], stop: asyncio.Event) -> int:
    health = ProcessHealth()
    async with AsyncExitStack() as outside:
        for beside in (telemetry.serve_metrics(settings, health), telemetry.watch_loop(health)):
            outside.push_async_callback(tasks.end, asyncio.create_task(beside))
        connecting: asyncio.Task[None] = asyncio.create_task(connect(bus, settings))
        outside.push_async_callback(_end_unless_done, connecting)
        await asyncio.wait({connecting}, timeout=CONNECT_GRACE_SECONDS)
        await outside.enter_async_context(front(bus, settings))
        if not await _unless(stop, connecting):
            return 0
        async with AsyncExitStack() as inside:
            if not await _entered(stop, inside, parts(bus, settings)):
                return 0
            await bus.start()
            _keep_what_is_there()
            log.info("ready")
            health.takes_work = lambda: bus.connected and not stop.is_set()
            lost = asyncio.ensure_future(bus.closed.wait())
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait({lost, stopped}, return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            stopped.cancel()
            await outside.aclose()
            if bus.closed.is_set():
                log.error("the NATS connection is closed for good")
                return EXIT_CONNECTION_LOST
            await bus.drain()
    log.info("stopped")
    return 0


@asynccontextmanager
async def _nothing(_: Bus, __: CommonSettings) -> AsyncIterator[None]:
    yield


async def _entered(stop: asyncio.Event, stack: AsyncExitStack, parts: AbstractAsyncContextManager[None]) -> bool:
    """Enter `parts`, which may wait for servers that are not there yet; False when the signal to stop came first.

    In this very task, unlike `_unless`: what is entered here is left here, and a task group or a timeout minds the difference.
    """
    stopped = asyncio.ensure_future(stop.wait())
    try:
        async with asyncio.timeout(None) as limit:

            def give_up(_: object) -> None:
                limit.reschedule(0.0)

            stopped.add_done_callback(give_up)
            await stack.enter_async_context(parts)
    except TimeoutError:
        if not limit.expired():
            raise
        return False
    finally:
        stopped.remove_done_callback(give_up)
        stopped.cancel()
    return True


async def _end_unless_done(task: asyncio.Task[None]) -> None:
    """As `tasks.end`, for a task whose failure somebody else tells of."""
    if not task.done():
        await tasks.end(task)


def _keep_what_is_there() -> None:
    """What the process is made of stays until its end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


async def _unless(stop: asyncio.Event, task: asyncio.Task[None]) -> bool:
    """Wait for `task`; False when the signal to stop came first."""
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        await tasks.end(task)
        return False
    task.result()
    return True
