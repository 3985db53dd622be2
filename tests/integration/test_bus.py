"""The bus against a real server: the cases in which FastStream's in-memory broker disagrees with it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
import nats
import pytest
from pydantic import SecretStr

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common import contracts, subjects
from libs.common.bus import RESEND_GRACE_SECONDS, Bus, NoRespondersError
from libs.common.clock import SystemClock
from libs.common.context import RequestContext
from libs.common.contracts import Message
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.settings import CommonSettings
from libs.common.stages import Answer, Forward, origin_of
from tests.conftest import OPERATOR, arrived, free_port, running
from tests.integration.buses import MakeBus, Ping, bus_of, started


def context(seconds: float = 5.0) -> RequestContext:
    return RequestContext.lasting(seconds, SystemClock())


async def forward_to_limiter(message: Ping, _: RequestContext) -> Forward:
    return Forward(subjects.DETECT_AUTHENTICATED, message)


async def test_chain_answers_the_origin_with_timings(make_bus: MakeBus) -> None:
    edge, auth, limiter = make_bus("edge"), make_bus("auth"), make_bus("limiter")

    async def double(message: Ping, _: RequestContext) -> Answer:
        return Answer(Ping(value=message.value * 2))

    auth.stage(subjects.DETECT_REQUEST, Ping, forward_to_limiter)
    limiter.stage(subjects.DETECT_AUTHENTICATED, Ping, double)
    async with started(edge, auth, limiter):
        response = await edge.request(subjects.DETECT_REQUEST, Ping(value=21), context())
    assert response.reply.error is None
    assert response.reply.result == contracts.raw(Ping(value=42))
    assert list(response.timings) == ["auth", "limiter"]


async def test_nobody_at_the_first_stage_is_known_at_once(make_bus: MakeBus) -> None:
    edge = make_bus("edge")
    async with started(edge):
        began = time.monotonic()
        with pytest.raises(NoRespondersError):
            await edge.request(subjects.DETECT_REQUEST, Ping(), context(30))
        assert time.monotonic() - began < 10


async def test_nobody_at_a_later_stage_is_answered_at_once(make_bus: MakeBus) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    auth.stage(subjects.DETECT_REQUEST, Ping, forward_to_limiter)
    async with started(edge, auth):
        response = await edge.request(subjects.DETECT_REQUEST, Ping(), context(30))
    assert response.reply.error is not None
    assert response.reply.error.code == ErrorCode.STAGE_UNAVAILABLE


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\xff\x00garbage", ErrorCode.BAD_REQUEST),
        (b'{"value":"x"}', ErrorCode.BAD_REQUEST),
        (b"[]", ErrorCode.BAD_REQUEST),
        (b'{"x":' + b"[" * 100_000, ErrorCode.BAD_REQUEST),
    ],
    ids=["garbage", "wrong type", "no object", "nested"],
)
async def test_a_body_that_cannot_be_read_is_answered(make_bus: MakeBus, body: bytes, code: ErrorCode) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    auth.stage(subjects.DETECT_REQUEST, Ping, forward_to_limiter)
    async with started(edge, auth):
        msg = await edge.connection.request(subjects.DETECT_REQUEST, body, timeout=5, headers=context().headers())
    assert msgspec.json.decode(msg.data, type=contracts.Reply).error.code == code  # type: ignore[union-attr]


async def test_a_message_without_deadline_is_refused(make_bus: MakeBus) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    auth.stage(subjects.DETECT_REQUEST, Ping, forward_to_limiter)
    async with started(edge, auth):
        msg = await edge.connection.request(subjects.DETECT_REQUEST, b"{}", timeout=5)
    assert msgspec.json.decode(msg.data, type=contracts.Reply).error.code == ErrorCode.BAD_REQUEST  # type: ignore[union-attr]


async def test_errors_and_bugs_of_a_handler_are_answered(make_bus: MakeBus) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")

    async def fail(message: Ping, _: RequestContext) -> Answer:
        if message.value:
            raise PortcullisError(ErrorCode.FORBIDDEN, internal="a secret")
        raise ZeroDivisionError("a secret")

    auth.stage(subjects.DETECT_REQUEST, Ping, fail)
    async with started(edge, auth):
        refusal = await edge.request(subjects.DETECT_REQUEST, Ping(value=1), context())
        bug = await edge.request(subjects.DETECT_REQUEST, Ping(value=0), context())
    assert refusal.reply.error is not None
    assert refusal.reply.error.code == ErrorCode.FORBIDDEN
    assert bug.reply.error is not None
    assert bug.reply.error.code == ErrorCode.INTERNAL
    assert "secret" not in bug.reply.error.detail + refusal.reply.error.detail


async def test_expired_work_is_dropped_before_the_handler(make_bus: MakeBus) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    seen: list[int] = []

    async def record(message: Ping, _: RequestContext) -> Answer:
        seen.append(message.value)
        return Answer(None)

    auth.stage(subjects.DETECT_REQUEST, Ping, record)
    async with started(edge, auth):
        await edge.connection.publish(
            subjects.DETECT_REQUEST, contracts.encode(Ping(value=1)), reply="_INBOX.edge.x.1", headers=context(-1).headers()
        )
        await edge.request(subjects.DETECT_REQUEST, Ping(value=2), context())
    assert seen == [2]


async def test_a_full_stage_says_so_at_once(make_bus: MakeBus) -> None:
    edge, auth = make_bus("edge"), make_bus("auth")
    both, release = asyncio.Event(), asyncio.Event()
    waiting: list[Ping] = []

    async def wait(message: Ping, _: RequestContext) -> Answer:
        waiting.append(message)
        if len(waiting) == 2:
            both.set()
        await release.wait()
        return Answer(None)

    auth.stage(subjects.DETECT_REQUEST, Ping, wait, max_in_flight=2)
    async with started(edge, auth):
        held = [asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(), context())) for _ in range(2)]
        await asyncio.wait_for(both.wait(), 5)
        refused = await edge.request(subjects.DETECT_REQUEST, Ping(), context())
        release.set()
        answers = await asyncio.gather(*held)
    assert refused.reply.error is not None
    assert refused.reply.error.code == ErrorCode.OVERLOADED
    assert all(answer.reply.error is None for answer in answers)


async def test_drain_finishes_everything_that_was_delivered(make_bus: MakeBus) -> None:
    edge, first, second = make_bus("edge"), make_bus("auth"), make_bus("auth")

    async def slow(message: Ping, _: RequestContext) -> Answer:
        await asyncio.sleep(0.01)
        return Answer(message)

    first.stage(subjects.DETECT_REQUEST, Ping, slow)
    second.stage(subjects.DETECT_REQUEST, Ping, slow)
    async with started(edge, second):
        await first.connect()
        await first.start()
        asked = [asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=i), context())) for i in range(300)]
        await asyncio.sleep(0)
        drained = asyncio.create_task(first.drain())
        more = [asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=i), context())) for i in range(300)]
        await drained
        answers = await asyncio.gather(*asked, *more)
    assert all(answer.reply.error is None for answer in answers)


async def test_a_drain_gives_up_on_what_takes_longer_than_it_may(nats_server: Server, nats_passwords: dict[str, str]) -> None:
    password = SecretStr(nats_passwords["auth"])
    settings = CommonSettings(nats_url=nats_server.url, nats_user="auth", nats_password=password, drain_seconds=0.1)
    bus = Bus("auth", settings)
    begun = asyncio.Event()

    async def never(_: Ping, __: RequestContext) -> Answer:
        begun.set()
        await asyncio.Event().wait()
        return Answer(None)

    bus.stage(subjects.BREAKERS_RESET_REQUEST, Ping, never)
    edge = bus_of("edge", nats_server, nats_passwords)
    async with started(edge):
        await bus.connect()
        await bus.start()
        asked = asyncio.create_task(edge.request(subjects.BREAKERS_RESET_REQUEST, Ping(), context(60)))
        async with asyncio.timeout(10):  # by default it would wait for 15 s
            await begun.wait()
            await bus.drain()
        assert not asked.done()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


class HourSlow(SystemClock):
    def now(self) -> float:
        return super().now() - 3600


async def test_what_a_dead_stage_had_in_hand_is_sent_again(make_apart: MakeBus) -> None:
    edge, first, second = make_apart("edge"), make_apart("auth"), make_apart("auth")
    taken: asyncio.Queue[str] = asyncio.Queue()
    left: list[float] = []

    async def never(_: Ping, request: RequestContext) -> Answer:
        taken.put_nowait(request.attempt_of)
        await asyncio.Event().wait()
        return Answer(None)

    async def answer(message: Ping, request: RequestContext) -> Answer:
        taken.put_nowait(request.attempt_of)
        left.append(request.remaining_seconds(second.clock))
        return Answer(message)

    second.clock = HourSlow()  # the deadline tells it nothing
    first.stage(subjects.DETECT_REQUEST, Ping, never)
    second.stage(subjects.DETECT_REQUEST, Ping, answer)
    await first.connect()
    await first.start()
    async with started(edge):
        once = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=1), context(3)))
        twice = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=2), context(30), idempotent=True))
        seen = {await taken.get(), await taken.get()}
        async with started(second):
            transport = first.connection._transport
            assert transport is not None
            first.connection.options["allow_reconnect"] = False
            transport.close()  # type: ignore[no-untyped-call]  # as the kernel does for a process that is killed
            response = await twice
            assert response.reply.result == contracts.raw(Ping(value=2))
            assert await taken.get() in seen  # the same attempt_of: whoever does things once can tell
            assert 0 < left[0] <= 30 - RESEND_GRACE_SECONDS
            with pytest.raises(PortcullisError) as caught:
                await once  # not idempotent: never sent again
            assert caught.value.code == ErrorCode.DEADLINE_EXCEEDED


async def test_a_stage_that_drained_causes_no_second_sending(
    make_bus: MakeBus, nats_server: Server, nats_passwords: dict[str, str]
) -> None:
    edge, first, second = make_bus("edge"), make_bus("auth"), make_bus("auth")
    taken: list[int] = []
    release = asyncio.Event()

    async def hold(message: Ping, _: RequestContext) -> Answer:
        taken.append(message.value)
        await release.wait()
        return Answer(message)

    second.stage(subjects.DETECT_REQUEST, Ping, hold)
    operator = await nats.connect(nats_server.url, user=OPERATOR, password=nats_passwords[OPERATOR])
    gone = await operator.subscribe(subjects.CLIENT_DISCONNECTED)
    await arrived(operator)
    async with started(edge, second):
        await first.connect()
        await first.start()
        asked = asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(value=7), context(), idempotent=True))
        await first.drain()
        while first.instance.encode() not in (await gone.next_msg(5)).data:
            pass
        await edge.gather("$SRV.PING", None, context(), window_seconds=5, expected=1)  # what came before it has been read
        assert not edge._resending
        release.set()
        await asked
    assert taken == [7]
    await operator.close()


async def test_a_message_too_large_is_refused_and_the_connection_lives(make_bus: MakeBus) -> None:
    edge = make_bus("edge")

    class Blob(Message, frozen=True):
        data: str

    async with started(edge):
        with pytest.raises(PortcullisError) as caught:
            await edge.request(subjects.DETECT_REQUEST, Blob(data="x" * 3_000_000), context())
        assert caught.value.code == ErrorCode.PAYLOAD_TOO_LARGE
        assert edge.connected


async def test_ping_shows_the_fleet_and_its_health(make_bus: MakeBus) -> None:
    edge, limiter = make_bus("edge"), make_bus("limiter")
    limiter.status.set("store.redis", "down")
    async with started(edge, limiter):
        answers = await edge.gather("$SRV.PING", None, context(), window_seconds=2, expected=2)
    found = {ping["name"]: ping["metadata"] for ping in map(msgspec.json.decode, answers)}
    assert found["portcullis-limiter"]["store.redis"] == "down"
    assert found["portcullis-edge"]["status"] == "ok"


async def test_a_service_can_use_only_its_own_subjects(nats_server: Server, nats_passwords: dict[str, str]) -> None:
    refused = asyncio.Event()

    async def on_error(error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            refused.set()

    client = await nats.connect(
        nats_server.url, user="fallback_model", password=nats_passwords["fallback_model"], error_cb=on_error
    )
    await client.subscribe(subjects.DETECT_REQUEST)
    await asyncio.wait_for(refused.wait(), 5)
    await client.close()


def test_origin_is_what_is_behind_the_last_stage() -> None:
    assert origin_of("_INBOX.edge.a.1") == "_INBOX.edge.a.1"
    assert origin_of("_INBOX.auth.b._INBOX.edge.a.1") == "_INBOX.edge.a.1"
    assert origin_of("_INBOX.limiter.c._INBOX.edge.a.1") == "_INBOX.edge.a.1"
    for forged in (None, "", "detect.v1.request", "_INBOX", "_INBOX.>", "_INBOX.a b", "$JS.API.STREAM.DELETE.USAGE"):
        assert origin_of(forged) is None


@pytest.mark.parametrize("turns", [*range(6), 1000])
async def test_a_drain_comes_to_an_end_at_whatever_step_of_losing_the_server(
    turns: int, tmp_path: Path, nats_passwords: dict[str, str]
) -> None:
    # nats-py's close() cancels its attempt to reconnect, and with it, for one turn of the loop, what it waits for itself.
    server = servers.nats(tmp_path, free_port(), nats_passwords)
    bus = bus_of("auth", server, nats_passwords)
    bus.stage(subjects.DETECT_REQUEST, Ping, forward_to_limiter)
    with running(server):
        await bus.connect()
        await bus.start()
    async with asyncio.timeout(10):
        while bus.connected:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await bus.drain()
    assert bus.closed.is_set()


async def test_a_drained_connection_stays_closed_though_its_attempt_to_reconnect_loses_a_cancellation(make_bus: MakeBus) -> None:
    # As `asyncio.wait_for`, which it waits with, does before Python 3.12 when what it waits for comes at the same time.
    bus = make_bus("auth")
    await bus.connect()
    await bus.start()
    connection, trying = bus.connection, asyncio.Event()
    select_next_server = connection._select_next_server

    async def heedless() -> None:
        trying.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await select_next_server()

    connection._select_next_server = heedless  # type: ignore[method-assign]
    assert connection._transport is not None
    connection._transport.close()  # type: ignore[no-untyped-call]  # as when the network takes it
    await trying.wait()
    await bus.drain()
    assert connection._reconnection_task is not None
    assert connection._reconnection_task.done()
    assert connection.is_closed


async def test_a_pull_subscription_does_not_hold_up_the_stop(make_bus: MakeBus) -> None:
    operator = make_bus("operator")
    await operator.connect()
    await operator.start()
    stream = operator.connection.jetstream()
    await stream.add_stream(name="PULLED", subjects=["pulled"])
    subscription = await stream.pull_subscribe("pulled", stream="PULLED")
    fetch = asyncio.create_task(subscription.fetch(1, timeout=20))
    while not (await subscription.consumer_info()).num_waiting:
        await asyncio.sleep(0.01)
    fetch.cancel()
    await stream.publish("pulled", b"")
    while not subscription.pending_msgs:
        await asyncio.sleep(0.01)
    # What has come for an earlier fetch is taken off the queue without a word that it is done; nc.drain() waits for that.
    assert len(await subscription.fetch(1, timeout=5)) == 1
    await stream.delete_stream("PULLED")
    stopping = asyncio.create_task(operator.drain())
    ended, _ = await asyncio.wait({stopping}, timeout=10)  # nats-py would take 30 s, and swallow a cancellation
    assert stopping in ended
