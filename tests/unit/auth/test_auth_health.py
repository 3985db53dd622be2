"""How the state of PostgreSQL is told."""

from __future__ import annotations

from libs.common.clock import ManualClock
from libs.common.micro import STATUS, STORE_POSTGRES, FleetStatus
from services.auth.health import StoreHealth


def test_down_is_degraded_while_known_keys_work_and_then_down() -> None:
    clock, status = ManualClock(), FleetStatus()
    health = StoreHealth(status, clock)

    def told() -> tuple[bool, str, str]:
        return health.is_up(), status.metadata[STORE_POSTGRES], status.metadata[STATUS]

    assert told() == (True, "up", "ok")
    health.record(up=False)
    assert told() == (False, "down", "degraded")
    clock.advance(30)
    health.record(up=False)
    assert told() == (False, "down", "degraded")
    clock.advance(0.5)
    health.record(up=False)
    assert told() == (False, "down", "down")
    health.record(up=True)
    assert told() == (True, "up", "ok")
