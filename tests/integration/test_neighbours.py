"""Services in one process hand each other their messages; what others have to do with them goes over a real server as ever.

`test_bus.py` and `test_bus_traces.py` play what holds of every bus with neighbours, too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from infra.embedded.servers import Server
from libs.common import subjects, tracing
from libs.common.bus import RESEND_GRACE_SECONDS, Bus
from libs.common.clock import SystemClock
from libs.common.context import RequestContext
from libs.common.contracts import raw
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.neighbours import Neighbours
from libs.common.stages import Answer, Forward, Stage
from libs.common.tracing import PerSecond, Recorder
from tests.conftest import OPERATOR, arrived
from tests.integration.buses import Ping, bus_of, started


@dataclass
class House:
    """Makes buses of one process, and overhears what goes over the server."""

    server: Server
    passwords: dict[str, str]
    operator: Client
    neighbours: Neighbours = field(default_factory=Neighbours)
    overheard: list[str] = field(default_factory=list)

    def bus(self, service: str, neighbours: Neighbours | None = None) -> Bus:
        return bus_of(service, self.server, self.passwords, neighbours or self.neighbours)

    async def overhear(self, subject: str) -> None:
        async def note(msg: Msg) -> None:
            self.overheard.append(msg.subject)

        await self.operator.subscribe(subject, cb=note)
        await self.crossed()

    async def crossed(self) -> list[str]:
        """The subjects of what has gone over the server so far, of messages about detections."""
        await arrived(self.operator)
        return self.overheard


@pytest.fixture
async def house(nats_server: Server, nats_passwords: dict[str, str]) -> AsyncIterator[House]:
    operator = await nats.connect(nats_server.url, user=OPERATOR, password=nats_passwords[OPERATOR])
    made = House(nats_server, nats_passwords, operator)
    await made.overhear("detect.v1.>")
    yield made
    await operator.close()


def context(seconds: float = 20.0) -> RequestContext:
    return RequestContext.lasting(seconds, SystemClock())


async def to_limiter(message: Ping, _: RequestContext) -> Forward:
    return Forward(subjects.DETECT_AUTHENTICATED, message)


async def test_what_neighbours_tell_each_other_does_not_leave_the_process(house: House) -> None:
    edge, auth, limiter = house.bus("edge"), house.bus("auth"), house.bus("limiter")
    seen: list[tuple[Ping, RequestContext]] = []

    async def look(message: Ping, request: RequestContext) -> Answer:
        seen.append((message, request))
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, to_limiter)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, look)
    asked, message = context(), Ping(value=7)
    async with started(edge, auth, limiter):
        for _ in range(2):
            response = await edge.request(subjects.DETECT_REQUEST, message, asked)
        assert await house.crossed() == []
    assert response.reply.result == raw(message)
    assert list(response.timings) == ["auth", "limiter"]
    (first, one), (_, two) = seen
    assert first is message
    assert (one.request_id, one.traceparent, one.deadline_ms) == (asked.request_id, asked.traceparent, asked.deadline_ms)
    assert one.attempt_of != two.attempt_of  # two requests, whatever their callers call them


async def test_what_is_asked_again_may_go_to_another_process(house: House) -> None:
    edge, auth, elsewhere = house.bus("edge"), house.bus("auth"), house.bus("auth", Neighbours())

    async def refuse(_: Ping, __: RequestContext) -> Answer:
        raise PortcullisError(ErrorCode.OVERLOADED)

    async def answer(message: Ping, _: RequestContext) -> Answer:
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, refuse)
    elsewhere.stage(subjects.DETECT_REQUEST, Ping, answer)
    async with started(edge, auth, elsewhere):
        first = await edge.request(subjects.DETECT_REQUEST, Ping(), context())
        assert first.reply.error is not None
        assert await house.crossed() == []
        async with asyncio.timeout(20):  # the queue group picks at random
            while (await edge.request(subjects.DETECT_REQUEST, Ping(), context(), again=True)).reply.error is not None:
                pass
        assert set(await house.crossed()) == {subjects.DETECT_REQUEST}


async def test_who_asks_works_for_the_same_afterwards(house: House) -> None:
    edge, auth = house.bus("edge"), house.bus("auth")
    recorder = Recorder(PerSecond(0, SystemClock()), slow_ms=1000, ring_spans=64)

    async def answer(message: Ping, _: RequestContext) -> Answer:
        tracing.annotate("whose", "auth's")
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, answer)
    async with started(edge, auth):
        tracing.use(recorder)
        try:
            tracing.serve("edge")
            with tracing.root("asking", tracing.SERVER) as span:
                tracing.enter(span.traceparent, span)
                asked = RequestContext.lasting(20.0, SystemClock(), traceparent=span.traceparent)
                await edge.request(subjects.DETECT_REQUEST, Ping(), asked)
                assert (tracing.here(), tracing.service()) == (span.traceparent, "edge")
                tracing.annotate("whose", "the edge's")
            recorder.keep((span.traceparent[3:35],))
            spans = {span[3]: dict(span[8]) for span in recorder.take(64)}
        finally:
            tracing.use(None)
    assert spans["asking"] == {"whose": "the edge's"}
    assert spans["process detect.v1.request"]["whose"] == "auth's"


async def test_what_comes_from_elsewhere_is_taken_and_answered_there(house: House) -> None:
    stranger, auth, limiter = house.bus("edge", Neighbours()), house.bus("auth"), house.bus("limiter")

    async def answer(message: Ping, _: RequestContext) -> Answer:
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, to_limiter)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, answer)
    async with started(stranger, auth, limiter):
        response = await stranger.request(subjects.DETECT_REQUEST, Ping(value=3), context())
        assert await house.crossed() == [subjects.DETECT_REQUEST]
    assert response.reply.result == raw(Ping(value=3))


async def test_who_has_no_such_neighbour_asks_elsewhere(house: House) -> None:
    edge, auth, limiter = house.bus("edge"), house.bus("auth", Neighbours()), house.bus("limiter")

    async def refuse(_: Ping, __: RequestContext) -> Answer:
        raise PortcullisError(ErrorCode.RATE_LIMITED, retry_after=2)

    auth.stage(subjects.DETECT_REQUEST, Ping, to_limiter)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, refuse)
    async with started(edge, auth, limiter):
        response = await edge.request(subjects.DETECT_REQUEST, Ping(), context())
        assert await house.crossed() == [subjects.DETECT_REQUEST, subjects.DETECT_AUTHENTICATED]
    assert response.reply.error is not None
    assert (response.reply.error.code, response.reply.error.retry_after) == (ErrorCode.RATE_LIMITED, 2)


async def test_another_replica_goes_on_where_a_neighbour_stops(house: House) -> None:
    edge, auth, other = house.bus("edge"), house.bus("auth"), house.bus("auth", Neighbours())

    async def answer(message: Ping, _: RequestContext) -> Answer:
        return Answer(message)

    for bus in (auth, other):
        bus.stage(subjects.DETECT_REQUEST, Ping, answer)
    async with started(edge, other):
        async with started(auth):
            await edge.request(subjects.DETECT_REQUEST, Ping(), context())
            assert await house.crossed() == []
        response = await edge.request(subjects.DETECT_REQUEST, Ping(value=5), context())
        assert await house.crossed() == [subjects.DETECT_REQUEST]
    assert response.reply.result == raw(Ping(value=5))


async def test_what_concerns_every_replica_reaches_those_elsewhere_too(house: House) -> None:
    edge, proxy, other = house.bus("edge"), house.bus("detector_proxy"), house.bus("detector_proxy", Neighbours())

    async def tell(message: Ping, _: RequestContext) -> Answer:
        return Answer(message)

    for bus in (proxy, other):
        bus.stage(subjects.BREAKERS_LIST, Ping, tell, broadcast=True)
    async with started(edge, proxy, other):
        answers = await edge.gather(subjects.BREAKERS_LIST, Ping(), context(), window_seconds=20.0, expected=2)
    assert len(answers) == 2


async def test_without_a_connection_nobody_is_asked(house: House) -> None:
    """As if the stages were elsewhere: what a verdict leaves behind on NATS (usage, the trace) is part of it."""
    edge, auth = house.bus("edge"), house.bus("auth")
    asked: list[Ping] = []

    async def note(message: Ping, _: RequestContext) -> Answer:
        asked.append(message)
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, note)
    async with started(edge, auth):
        await edge.connection.close()
        with pytest.raises(PortcullisError) as caught:
            await edge.request(subjects.DETECT_REQUEST, Ping(), context())
    assert caught.value.code == ErrorCode.STAGE_UNAVAILABLE
    assert asked == []


async def test_who_gives_up_takes_the_work_along(house: House) -> None:
    edge, auth = house.bus("edge"), house.bus("auth")
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait(message: Ping, _: RequestContext) -> Answer:
        if message.value:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, wait)
    async with started(edge, auth):
        await house.overhear(f"{edge._inbox}.>")
        asked = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=1), context()))
        await begun.wait()
        asked.cancel()
        await asyncio.wait({asked})
        assert ended.is_set()
        assert (await edge.request(subjects.DETECT_REQUEST, Ping(), context())).reply.result == raw(Ping())
        with pytest.raises(PortcullisError) as caught:
            await edge.request(subjects.DETECT_REQUEST, Ping(value=1), context(0.1))
        assert caught.value.code == ErrorCode.DEADLINE_EXCEEDED
        assert await house.crossed() == []
        (stage,) = auth._stages
        assert isinstance(stage, Stage)
        assert stage.tasks == set()


async def test_an_answer_that_comes_after_all_is_told_to_nobody(house: House) -> None:
    """Of a stage elsewhere: its request has been given up, and the answer reaches a neighbour that passes it on."""
    edge, limiter, auth = house.bus("edge"), house.bus("limiter"), house.bus("auth", Neighbours())
    begun, release, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(message: Ping, _: RequestContext) -> Forward:
        begun.set()
        await release.wait()
        return Forward(subjects.DETECT_AUTHENTICATED, message)

    async def answer(message: Ping, _: RequestContext) -> Answer:
        done.set()
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, wait)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, answer)
    async with started(edge, auth, limiter):
        await house.overhear(f"{edge._inbox}.>")
        asked = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=1), context()))
        await begun.wait()
        asked.cancel()
        await asyncio.wait({asked})
        release.set()
        await done.wait()
        assert await house.crossed() == [subjects.DETECT_REQUEST, subjects.DETECT_AUTHENTICATED]


async def test_what_a_neighbour_without_a_connection_has_in_hand_is_not_sent_again(house: House) -> None:
    edge, auth = house.bus("edge"), house.bus("auth")
    taken: list[Ping] = []
    release = asyncio.Event()

    async def wait(message: Ping, _: RequestContext) -> Answer:
        taken.append(message)
        await release.wait()
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, wait)
    async with started(edge, auth):
        gone = asyncio.Event()

        async def note(_: Msg) -> None:
            gone.set()

        asked = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=1), context(), idempotent=True))
        await edge.connection.subscribe(subjects.CLIENT_DISCONNECTED, cb=note)
        await arrived(edge.connection)
        transport = auth.connection._transport
        assert transport is not None
        transport.close()  # type: ignore[no-untyped-call]  # as when the network takes it
        await gone.wait()
        await asyncio.sleep(2 * RESEND_GRACE_SECONDS)
        release.set()
        assert (await asked).reply.result == raw(Ping(value=1))
        assert await house.crossed() == []
    assert taken == [Ping(value=1)]


@pytest.mark.parametrize(
    ("names", "passwords", "said"),
    [
        ((), "{}", "usage: python -m services NAME..., each once, of edge, auth, "),
        (("edge", "postgres"), "{}", "usage: python -m services NAME..., "),
        (("edge", "edge"), "{}", "usage: python -m services NAME..., "),
        (("edge", "limiter"), '{"edge": "x"}', "portcullis edge: PORTCULLIS_NATS_PASSWORDS holds no password of limiter"),
    ],
)
def test_what_cannot_be_run_together_is_said_in_a_line(names: tuple[str, ...], passwords: str, said: str) -> None:
    environment = {**os.environ, "PORTCULLIS_NATS_PASSWORDS": passwords}
    command = [sys.executable, "-m", "services", *names]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith(said)
