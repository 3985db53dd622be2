"""How services run, alone or several in a process: settings, logs, the bus, their own parts, then messages until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import nats.errors
import uvloop

from libs.common import VERSION, tasks, telemetry, trace_export, tracing
from libs.common import settings as settings_module
from libs.common.bus import Bus
from libs.common.guard import PlainTextError
from libs.common.neighbours import Neighbours
from libs.common.probes import ProcessHealth
from libs.common.settings import CommonSettings

log = logging.getLogger(__name__)

S = TypeVar("S", bound=CommonSettings)

Parts = Callable[[Bus, S], AbstractAsyncContextManager[None]]
"""A service's composition root: on a connected bus it opens what it needs and registers its stages; on exit it closes."""

Front = Callable[[Bus, S], AbstractAsyncContextManager[None]]
"""What a service shows to the outside besides its stages. It opens before the service takes messages, and closes while the bus
still works: what is in hand can be finished, and nothing new comes in."""

CONNECT_GRACE_SECONDS = 1.0
"""How long a front waits for the bus before it opens: callers that queued while it was away need not be refused then. After
that it opens all the same, and says that nothing is there, instead of keeping them."""

START_GRACE_SECONDS = 5.0
"""How long it waits, for the same reason, until the services that it asks have started, where they are of its process."""

GC_THRESHOLDS = (10_000, 20, 50)
"""Of `gc.set_threshold`: some megabytes of garbage in circles at the most."""

EXIT_CONNECTION_LOST = 3
"""The NATS connection was closed for good; whoever supervises us starts a new process."""


class ConfigurationError(Exception):
    """Something that only the operator can mend; its text is one line that says what to do."""


@asynccontextmanager
async def _nothing(_: Bus, __: CommonSettings) -> AsyncIterator[None]:
    yield


@dataclass(frozen=True, slots=True)
class Service(Generic[S]):
    """What there is to know of a service for running it. `name`: as the bus calls it."""

    name: str
    settings: type[S]
    parts: Parts[S] = _nothing
    front: Front[S] = _nothing


@dataclass(frozen=True, slots=True)
class _Member(Generic[S]):
    """A service of this process."""

    service: Service[S]
    settings: S
    bus: Bus


def run(*services: Service[Any]) -> None:
    """Run services until SIGTERM or SIGINT, in one process, which is called like the first of them. They are given in the order
    in which they ask each other. Exit status 0 after a clean stop, 2 on wrong configuration.
    """
    chosen = [settings_module.load(service.settings) for service in services]
    try:
        if len(services) > 1:
            chosen = [_as_its_user(service.name, settings) for service, settings in zip(services, chosen, strict=True)]
        status = uvloop.run(_serve(services, chosen))
    except ConfigurationError as error:
        print(f"portcullis {services[0].name}: {error}", file=sys.stderr)  # noqa: T201
        status = 2
    raise SystemExit(status)


def _as_its_user(service: str, settings: CommonSettings) -> CommonSettings:
    """The settings of one of several services, each of which has its own user on NATS."""
    if not settings.nats_passwords:
        return settings
    if service not in settings.nats_passwords:
        raise ConfigurationError(f"PORTCULLIS_NATS_PASSWORDS holds no password of {service}; add it")
    return settings.model_copy(update={"nats_user": service, "nats_password": settings.nats_passwords[service]})


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


async def _serve(services: Sequence[Service[Any]], chosen: Sequence[CommonSettings]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    neighbours = Neighbours()
    members = [
        _Member(service, settings, Bus(service.name, settings, neighbours=neighbours))
        for service, settings in zip(services, chosen, strict=True)
    ]
    first = members[0]
    telemetry.setup_logging(first.service.name, first.bus.instance, first.settings)
    telemetry.BUILD.labels(VERSION).set(1)
    try:
        exporter = trace_export.start(first.service.name, first.bus.instance, first.settings)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    try:
        return await _serve_on(members, stop)
    finally:
        if exporter is not None:
            exporter.close()


async def _serve_on(members: Sequence[_Member[Any]], stop: asyncio.Event) -> int:
    health = ProcessHealth()
    buses = [member.bus for member in members]
    async with AsyncExitStack() as outside:
        for beside in (telemetry.serve_metrics(members[0].settings, health), telemetry.watch_loop(health)):
            outside.push_async_callback(tasks.end, asyncio.create_task(beside))
        connecting: asyncio.Task[None] = asyncio.create_task(_connect(members))
        outside.push_async_callback(_end_unless_done, connecting)
        fronts = [_Front(member, stop) for member in members]
        for front in fronts:
            outside.push_async_callback(front.close)
        await asyncio.wait({connecting}, timeout=CONNECT_GRACE_SECONDS)
        if not connecting.done():
            for front in fronts:
                front.may_open.set()
        if not await _unless(stop, connecting):
            return 0
        async with AsyncExitStack() as inside:
            started: list[Bus] = []
            # Whoever is asked is there before whoever asks.
            for member, front in zip(reversed(members), reversed(fronts), strict=True):
                front.may_open.set()
                await _first(stop, front.shown)
                if stop.is_set():
                    break
                tracing.serve(member.service.name)
                if not await _entered(stop, inside, member.service.parts(member.bus, member.settings)):
                    break
                await member.bus.start()
                started.append(member.bus)
            else:
                _keep_what_is_there()
                log.info("ready")
                health.takes_work = lambda: all(bus.connected for bus in buses) and not stop.is_set()
                await _first(stop, *(bus.closed for bus in buses))
            await outside.aclose()
            if any(bus.closed.is_set() for bus in buses):
                log.error("the NATS connection is closed for good")
                return EXIT_CONNECTION_LOST
            for bus in reversed(started):
                await bus.drain()
    log.info("stopped")
    return 0


class _Front:
    """What a service shows to the outside, in a task of its own: whatever the others wait for as they start, it opens in time."""

    def __init__(self, member: _Member[Any], stop: asyncio.Event) -> None:
        """`stop` is set when it fails; `close` raises why."""
        self.may_open = asyncio.Event()
        self.shown = asyncio.Event()
        self._member = member
        self._leave = asyncio.Event()
        self._task = asyncio.create_task(self._show())
        self._task.add_done_callback(lambda _: stop.set())

    async def close(self) -> None:
        self._leave.set()
        self.may_open.set()
        await self._task

    async def _show(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_GRACE_SECONDS):
                await self.may_open.wait()
        if self._leave.is_set():
            return
        tracing.serve(self._member.service.name)
        async with self._member.service.front(self._member.bus, self._member.settings):
            self.shown.set()
            await self._leave.wait()


async def _connect(members: Sequence[_Member[Any]]) -> None:
    for member in members:
        await connect(member.bus, member.settings)


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()


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
    """What the process is made of stays until its end: the garbage collector need not look at it again and again.

    What requests leave behind is freed without it. By default it looks whenever 700 objects more are there than before, which are
    those of the requests in hand: a twentieth of all processor time where stages share a process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


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
