"""Keeps what `$SRV.PING` shows of the engines up to date: their own health, asked in the background, and their breakers."""

from __future__ import annotations

import asyncio

from libs.common import micro
from libs.common.micro import FleetStatus
from services.detector_proxy.core import GuardedEngine
from services.detector_proxy.ports import Health

POLL_SECONDS = 1.0
POLL_SECONDS_WHEN_DOWN = 0.25
HEALTH_TIMEOUT_SECONDS = 1.0


class EngineWatch:
    """`run()` asks; `refresh()` writes down what is known, and is to be called whenever a breaker changes."""

    def __init__(self, status: FleetStatus, kind: str, primary: GuardedEngine | None, fallback: GuardedEngine) -> None:
        self._status = status
        self._engines = [fallback] if primary is None else [primary, fallback]
        self._health: dict[str, Health] = {guarded.role: "down" for guarded in self._engines}
        status.set(micro.ENGINE_CONFIGURED, kind)
        status.set(micro.ENGINE_NAME, self._engines[0].engine.name)
        self.refresh()

    async def run(self) -> None:
        """Ask for ever: every second, and more often while something is missing, so that its return is seen at once."""
        while True:
            await self.poll()
            all_up = all(health == "up" for health in self._health.values())
            await asyncio.sleep(POLL_SECONDS if all_up else POLL_SECONDS_WHEN_DOWN)

    async def poll(self) -> None:
        await asyncio.gather(*(self._ask(guarded) for guarded in self._engines))
        self.refresh()

    async def _ask(self, guarded: GuardedEngine) -> None:
        guarded.breaker.observe()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
                self._health[guarded.role] = await guarded.engine.health()
        except TimeoutError:
            self._health[guarded.role] = "down"

    def refresh(self) -> None:
        engine = self._engines[0]
        self._status.set(micro.ENGINE_STATUS, self._health[engine.role])
        self._status.set(micro.ENGINE_BREAKER, engine.breaker.state)
        self._status.set(micro.STATUS, self._overall())

    def _overall(self) -> micro.Status:
        """ok: the configured engine answers. degraded: something does. down: nothing would."""
        usable = [self._health[g.role] != "down" and g.breaker.state != "open" for g in self._engines]
        first = self._engines[0]
        if usable[0]:
            return "ok" if self._health[first.role] == "up" and first.breaker.state == "closed" else "degraded"
        return "degraded" if any(usable) else "down"
