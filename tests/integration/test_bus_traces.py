"""What the bus records of messages, on a real server. The processes of the path are one here, and share one recorder."""

from __future__ import annotations

import asyncio
import time

import msgspec
import nats
import pytest

from infra.embedded.servers import Server
from libs.common import hops, subjects, tracing
from libs.common.bus import NoRespondersError
from libs.common.context import RequestContext, new_request_id
from libs.common.contracts import TraceKept
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from libs.common.tracing import Recorded, Recorder
from tests.conftest import OPERATOR
from tests.integration.buses import MakeBus, Ping, started

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE}-00f067aa0ba902b7-"


def context(seconds: float = 5.0, flag: str = "01") -> RequestContext:
    return RequestContext(int((time.time() + seconds) * 1000), new_request_id(), CALLER + flag)


def found(recorder: Recorder, name: str) -> list[Recorded]:
    return [span for span in spans(recorder) if span[3] == name]


def spans(recorder: Recorder) -> list[Recorded]:
    """All that have been recorded so far; they are still there the next time."""
    taken = recorder.take(1000)
    for span in taken:
        recorder.add(span, sampled=True)
    return taken


def events(span: Recorded) -> list[str]:
    return [name for name, _ in span[9]]


async def answered(message: Ping, _: RequestContext) -> Answer:
    return Answer(message)


async def on_to_limiter(message: Ping, _: RequestContext) -> Forward:
    return Forward(subjects.DETECT_AUTHENTICATED, message)


async def test_each_hop_is_below_the_one_that_sent_it(
    make_bus: MakeBus, recorder: Recorder, request: pytest.FixtureRequest
) -> None:
    edge, auth, limiter = make_bus("edge"), make_bus("auth"), make_bus("limiter")
    inside: list[str] = []

    async def look(message: Ping, request: RequestContext) -> Answer:
        inside.append(request.traceparent)
        assert tracing.here() == request.traceparent
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, on_to_limiter)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, look)
    async with started(edge, auth, limiter):
        tracing.serve("edge")
        await edge.request(subjects.DETECT_REQUEST, Ping(), context())
    by_id = {span[1]: span for span in spans(recorder)}
    (last,) = found(recorder, "process detect.v1.authenticated")
    assert inside == [f"00-{TRACE}-{last[1]}-01"]
    path = [last]
    while path[-1][2] in by_id:
        path.append(by_id[path[-1][2]])
    hops = [
        ("limiter", "process detect.v1.authenticated"), ("auth", "send detect.v1.authenticated"),
        ("auth", "process detect.v1.request"), ("edge", "send detect.v1.request"),
    ]  # fmt: skip
    if request.node.callspec.params["make_bus"] == "together":
        hops = hops[::2]  # nothing is sent
    assert [(span[12], span[3]) for span in path] == hops
    assert path[-1][2] == CALLER[36:52]


async def test_nobody_at_the_first_stage_is_an_event_of_the_sending(make_bus: MakeBus, recorder: Recorder) -> None:
    edge = make_bus("edge")
    async with started(edge):
        with pytest.raises(NoRespondersError):
            await edge.request(subjects.DETECT_REQUEST, Ping(), context())
    (sent,) = found(recorder, "send detect.v1.request")
    assert events(sent) == [hops.NO_RESPONDERS]
    assert sent[11] == "stage_unavailable"


async def test_nobody_at_a_later_stage_is_shown_below_the_sending(make_bus: MakeBus, recorder: Recorder) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    auth.stage(subjects.DETECT_REQUEST, Ping, on_to_limiter)
    async with started(edge, auth):
        await edge.request(subjects.DETECT_REQUEST, Ping(), context())
    (missed,), (sent,) = found(recorder, hops.NO_RESPONDERS), found(recorder, "send detect.v1.authenticated")
    assert missed[2] == sent[1]
    assert missed[12] == sent[12] == "auth"
    assert events(missed) == [hops.NO_RESPONDERS]


async def test_what_is_sent_again_says_so(make_apart: MakeBus, recorder: Recorder) -> None:
    edge, first, second = make_apart("edge"), make_apart("auth"), make_apart("auth")
    taken = asyncio.Event()

    async def never(_: Ping, __: RequestContext) -> Answer:
        taken.set()
        await asyncio.Event().wait()
        return Answer(None)

    first.stage(subjects.DETECT_REQUEST, Ping, never)
    second.stage(subjects.DETECT_REQUEST, Ping, answered)
    await first.connect()
    await first.start()
    async with started(edge):
        asked = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(), context(30), idempotent=True))
        await taken.wait()
        async with started(second):
            transport = first.connection._transport
            assert transport is not None
            first.connection.options["allow_reconnect"] = False
            transport.close()  # type: ignore[no-untyped-call]  # as the kernel does for a process that is killed
            await asked
    (sent,) = found(recorder, "send detect.v1.request")
    assert events(sent) == [hops.SENT_AGAIN]
    assert sent[11] == ""


async def test_a_refusal_an_expiry_and_a_full_stage_are_seen(make_bus: MakeBus, recorder: Recorder) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    begun, release = asyncio.Event(), asyncio.Event()

    async def handle(message: Ping, _: RequestContext) -> Answer:
        if message.value == 1:
            raise PortcullisError(ErrorCode.FORBIDDEN, internal="a text")
        begun.set()
        await release.wait()
        return Answer(message)

    auth.stage(subjects.DETECT_REQUEST, Ping, handle, max_in_flight=1)
    async with started(edge, auth):
        await edge.request(subjects.DETECT_REQUEST, Ping(value=1), context())
        held = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(), context(0.5)))
        await begun.wait()
        await edge.request(subjects.DETECT_REQUEST, Ping(), context())
        with pytest.raises(PortcullisError):
            await held
    stages = found(recorder, "process detect.v1.request")
    assert {(span[11], span[12]) for span in stages} == {("forbidden", "auth"), ("overloaded", "auth"), ("expired", "auth")}
    assert "a text" not in str(spans(recorder))


async def test_what_a_client_asks_at_the_door_begins_here(
    make_bus: MakeBus, recorder: Recorder, nats_server: Server, nats_passwords: dict[str, str]
) -> None:
    jobs = make_bus("jobs")

    async def fail(_: str, __: Ping, ___: RequestContext) -> Answer:
        raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE)

    jobs.door(subjects.DOOR_STATUS, Ping, fail, seconds=5, max_in_flight=4)
    key_id = "a1B2c3D4e5F6"
    operator = await nats.connect(
        nats_server.url, user=OPERATOR, password=nats_passwords[OPERATOR], inbox_prefix=f"_INBOX.{key_id}"
    )
    try:
        async with started(jobs):
            heard = await operator.subscribe(subjects.EVENT_TRACE_KEPT)
            for headers in ({"traceparent": CALLER + "00"}, None):
                await operator.request(f"jobs.v1.{key_id}.status", b"{}", timeout=5, headers=headers)
            told: set[str] = set()
            while len(told) < 2:
                told |= set(trace_ids_in((await heard.next_msg(timeout=5)).data))
    finally:
        await operator.close()
    first, second = found(recorder, "process jobs.v1.*.status")
    assert (first[0], first[2]) == (TRACE, CALLER[36:52])
    assert second[2] == ""
    assert told == {first[0], second[0]}
    assert key_id not in str(spans(recorder))


def trace_ids_in(data: bytes) -> tuple[str, ...]:
    return msgspec.json.decode(data, type=TraceKept).trace_ids


async def test_what_others_keep_is_exported_here(make_bus: MakeBus, recorder: Recorder) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    auth.stage(subjects.DETECT_REQUEST, Ping, answered)
    async with started(edge, auth):
        await edge.request(subjects.DETECT_REQUEST, Ping(), context(flag="00"))
        assert spans(recorder) == []
        await edge.publish(subjects.EVENT_TRACE_KEPT, TraceKept(trace_ids=(TRACE,)))
        async with asyncio.timeout(5):
            while not found(recorder, "process detect.v1.request"):
                await asyncio.sleep(0.01)
