"""Whether PostgreSQL can be asked, kept current, for the health check and for failing at once while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from libs.common import telemetry
from libs.common.clock import Clock
from libs.common.micro import STATUS, STORE_POSTGRES, FleetStatus
from services.auth.cache import STALE_SECONDS
from services.auth.core import StoreUnavailableError

log = logging.getLogger(__name__)

CHECK_EVERY_SECONDS: Final = 1.0
CHECK_AGAIN_SECONDS: Final = 0.25
"""While it is away."""


class StoreHealth:
    """Up until a check fails. Up: `ok`. Down: `degraded` as long as known keys still work, then `down`."""

    def __init__(self, status: FleetStatus, clock: Clock) -> None:
        self._status = status
        self._clock = clock
        self._up_at = clock.monotonic()
        self.up = True
        self.record(up=True)

    def is_up(self) -> bool:
        return self.up

    def record(self, *, up: bool) -> None:
        now = self._clock.monotonic()
        if up != self.up:
            log.log(logging.INFO if up else logging.WARNING, "PostgreSQL is %s", "back" if up else "away")
        self.up = up
        telemetry.STORE_UP.labels("postgres").set(up)
        if up:
            self._up_at = now
        self._status.set(STORE_POSTGRES, "up" if up else "down")
        self._status.set(STATUS, "ok" if up else "degraded" if now - self._up_at <= STALE_SECONDS else "down")

    async def watch(self, check: Callable[[], Awaitable[None]]) -> None:
        """Check for ever. `check` raises `StoreUnavailableError`, in good time."""
        while True:
            try:
                await check()
            except StoreUnavailableError:
                self.record(up=False)
            else:
                self.record(up=True)
            await asyncio.sleep(CHECK_EVERY_SECONDS if self.up else CHECK_AGAIN_SECONDS)
