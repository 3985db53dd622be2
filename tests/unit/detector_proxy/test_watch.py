from __future__ import annotations

import math

import pytest

from libs.common import micro
from libs.common.clock import ManualClock
from services.detector_proxy.ports import Health
from services.detector_proxy.watch import EngineWatch
from tests.unit.detector_proxy.fakes import FakeEngine, guarded


class Bench:
    def __init__(self, primary: Health | None, pool: Health) -> None:
        clock = ManualClock()
        self.status = micro.FleetStatus()
        self.pool = FakeEngine(health=pool)
        self.primary_engine = FakeEngine(health=primary) if primary is not None else None
        self.primary = guarded(self.primary_engine, clock) if self.primary_engine else None
        self.fallback = guarded(self.pool, clock, role="fallback", timeout_seconds=math.inf)
        self.watch = EngineWatch(self.status, "detect" if primary else "pool", self.primary, self.fallback)

    def shown(self) -> tuple[str, str, str]:
        metadata = self.status.metadata
        return metadata[micro.STATUS], metadata[micro.ENGINE_STATUS], metadata[micro.ENGINE_BREAKER]


@pytest.mark.parametrize(
    ("primary", "pool", "status", "engine"),
    [
        ("up", "up", "ok", "up"),
        ("up", "down", "ok", "up"),
        ("degraded", "up", "degraded", "degraded"),
        ("down", "up", "degraded", "down"),
        ("down", "down", "down", "down"),
        (None, "up", "ok", "up"),
        (None, "degraded", "degraded", "degraded"),
        (None, "down", "down", "down"),
    ],
)
async def test_status_follows_from_what_answers(primary: Health | None, pool: Health, status: str, engine: str) -> None:
    bench = Bench(primary, pool)
    await bench.watch.poll()
    assert bench.shown() == (status, engine, "closed")
    assert bench.status.metadata[micro.ENGINE_CONFIGURED] == ("detect" if primary else "pool")


async def test_nothing_is_claimed_before_the_first_answer() -> None:
    assert Bench("up", "up").shown() == ("down", "down", "closed")


async def test_an_engine_that_hangs_is_down() -> None:
    bench = Bench("up", "up")
    assert bench.primary_engine is not None
    bench.primary_engine.hanging_health = True
    await bench.watch.poll()
    assert bench.shown() == ("degraded", "down", "closed")


async def test_an_open_breaker_shows_whatever_the_health_endpoint_says() -> None:
    bench = Bench("up", "up")
    await bench.watch.poll()
    assert bench.primary is not None
    bench.primary.breaker._open("for the test")
    bench.watch.refresh()
    assert bench.shown() == ("degraded", "up", "open")
    bench.primary.breaker.reset()
    bench.watch.refresh()
    assert bench.shown() == ("ok", "up", "closed")
