"""What /health makes of the fleet's answers."""

from __future__ import annotations

import pytest

from libs.common import micro
from libs.common.clock import ManualClock
from services.edge import health
from services.edge.health import FleetMonitor, fleet_of
from tests.bad_inputs import NO_UTF8, UNREADABLE
from tests.unit.edge.fakes import HEALTHY, FakeStages, healthy_fleet, ping


def without(*services: str) -> list[bytes]:
    return [answer for answer in healthy_fleet() if not any(f'"portcullis-{service}"'.encode() in answer for service in services)]


PROXY = {
    micro.ENGINE_CONFIGURED: "detect",
    micro.ENGINE_NAME: "go-engine",
    micro.ENGINE_STATUS: "up",
    micro.ENGINE_BREAKER: "closed",
}


def proxy(says: str = "ok", replica: str = "1", **engine: str) -> bytes:
    metadata = {**PROXY, **{f"engine.{key}": value for key, value in engine.items()}}
    return ping("detector-proxy", metadata, replica=replica, status=says)


def test_all_well() -> None:
    answer = health.describe(fleet_of(healthy_fleet(), connected=True))
    assert answer.status == "healthy"
    assert {service.replicas for service in answer.services.values()} == {1}
    assert (answer.engine.configured, answer.engine.name) == ("pool", "portcullis-minilm-v1")
    assert (answer.engine.status, answer.engine.breaker) == ("up", "closed")
    assert (answer.stores.redis, answer.stores.postgres, answer.stores.nats) == ("up", "up", "up")


@pytest.mark.parametrize("service", ["auth", "limiter", "detector-proxy"])
def test_a_stage_that_is_away_makes_it_unhealthy(service: str) -> None:
    fleet = fleet_of(without(service), connected=True)
    assert health.describe(fleet).status == "unhealthy"
    assert service.replace("-", "_") in health.missing(fleet)


@pytest.mark.parametrize("service", ["auth", "limiter", "detector-proxy"])
def test_a_stage_that_says_down_is_away_unless_another_replica_works(service: str) -> None:
    alone = [*without(service), ping(service, PROXY, status="down")]
    assert health.describe(fleet_of(alone, connected=True)).status == "unhealthy"
    answer = health.describe(fleet_of([*healthy_fleet(), ping(service, PROXY, replica="2", status="down")], connected=True))
    assert answer.status == "degraded"
    assert answer.services[service.replace("-", "_")].replicas == 2


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([*without("detector-proxy", "fallback-model"), proxy()], "degraded"),  # the engine answers; nothing to fall back to
        ([*without("detector-proxy"), proxy(says="degraded", breaker="open")], "degraded"),
        ([*without("detector-proxy"), proxy(says="degraded", status="down")], "degraded"),
        ([*without("detector-proxy"), proxy(breaker="half_open")], "degraded"),
        ([*without("detector-proxy", "fallback-model"), proxy(says="degraded", breaker="open")], "unhealthy"),
        ([*without("detector-proxy"), proxy(), proxy(replica="2", breaker="open")], "degraded"),
    ],
)
def test_an_engine_or_the_pool_must_be_able_to_answer(answers: list[bytes], status: str) -> None:
    assert health.describe(fleet_of(answers, connected=True)).status == status


def test_workers_that_take_no_single_texts_cannot_stand_in_for_the_engine() -> None:
    bulk = ping("fallback-model", {micro.LANES: micro.BULK_ONLY}, replica="bulk")
    rest = [*without("detector-proxy", "fallback-model"), proxy(says="degraded", breaker="open")]
    assert health.missing(fleet_of([*rest, bulk], connected=True)) == ("engine",)
    assert health.missing(fleet_of([*rest, bulk, ping("fallback-model", {})], connected=True)) == ()


def test_the_worst_replica_speaks_for_the_engine() -> None:
    answers = [*without("detector-proxy"), proxy(), proxy(replica="2", breaker="open")]
    assert health.describe(fleet_of(answers, connected=True)).engine.breaker == "open"


@pytest.mark.parametrize(("service", "key"), [("auth", micro.STORE_POSTGRES), ("limiter", micro.STORE_REDIS)])
def test_a_store_that_is_down_degrades(service: str, key: str) -> None:
    answer = health.describe(fleet_of([*without(service), ping(service, {key: "down"}, status="degraded")], connected=True))
    assert answer.status == "degraded"
    assert "down" in (answer.stores.redis, answer.stores.postgres)


def test_without_nats_nothing_is_well() -> None:
    answer = health.describe(fleet_of([], connected=False))
    assert (answer.status, answer.stores.nats, answer.stores.redis) == ("unhealthy", "down", "unknown")


def test_strangers_and_garbage_are_left_out() -> None:
    answers = [*healthy_fleet(), *UNREADABLE.values(), NO_UTF8, ping("other"), b'{"name":"someone","id":"1"}']
    assert fleet_of(answers, connected=True).size == len(HEALTHY)


async def test_a_flood_of_questions_is_one_round() -> None:
    stages = FakeStages()
    monitor = FleetMonitor(stages)
    for _ in range(50):
        await monitor.fleet()
    assert len(stages.expected) == 1
    stages.clock.advance(health.FRESH_SECONDS + 0.01)
    await monitor.fleet()
    assert len(stages.expected) == 2


async def test_a_known_and_complete_fleet_is_not_waited_for_but_counted_now_and_then() -> None:
    stages = FakeStages()
    monitor = FleetMonitor(stages)
    await monitor.fleet()
    stages.clock.advance(0.5)
    await monitor.fleet()
    assert [expected for _, expected in stages.expected] == [0, len(HEALTHY)]
    stages.reports["$SRV.PING"].append(ping("limiter", {micro.STORE_REDIS: "up"}, replica="2"))
    stages.clock.advance(health.CENSUS_SECONDS)
    assert (await monitor.fleet()).count("limiter") == 2  # whoever asks after a while is told of all who are there
    assert stages.expected[-1][1] == 0
    stages.clock.advance(0.5)
    await monitor.fleet()
    assert stages.expected[-1][1] == len(HEALTHY) + 1


async def test_an_incomplete_fleet_is_waited_for() -> None:
    stages = FakeStages()
    stages.reports["$SRV.PING"] = without("auth")
    monitor = FleetMonitor(stages)
    for _ in range(3):
        await monitor.fleet()
        stages.clock.advance(0.5)
    assert [expected for _, expected in stages.expected] == [0, 0, 0]


async def test_a_lost_connection_is_seen_at_once() -> None:
    stages = FakeStages()
    assert isinstance(stages.clock, ManualClock)
    monitor = FleetMonitor(stages)
    assert (await monitor.fleet()).connected
    stages.connected = False
    assert not (await monitor.fleet()).connected
