"""The state of the fleet, from what its processes say of themselves in their answers to `$SRV.PING`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from libs.common import VERSION, micro
from libs.common.context import RequestContext
from libs.common.contracts import BreakerState
from libs.common.subjects import SERVICES
from services.edge.ports import Stages
from services.edge.schemas import EngineHealth, HealthAnswer, ServiceHealth, StoresHealth

log = logging.getLogger(__name__)

PING_SUBJECT = "$SRV.PING"
WINDOW_SECONDS = 0.4
"""How long answers are waited for; /health itself promises one second."""
FRESH_SECONDS = 0.25
"""For so long an answer is given again: a flood of /health is not a flood of pings."""
CENSUS_SECONDS = 2.0
"""For so long the replicas that were found are taken for all there are; then a whole window is waited out again."""

_NAME_PREFIX = "portcullis-"
_NEEDED = ("auth", "limiter", "detector_proxy")


class Ping(msgspec.Struct, frozen=True):
    """The part of ADR-32's PING answer that matters here."""

    name: str
    id: str
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Metadata of every process that answered, by service."""

    replicas: dict[str, tuple[dict[str, str], ...]]
    connected: bool

    def count(self, service: str) -> int:
        return len(self.replicas.get(service, ()))

    @property
    def size(self) -> int:
        return sum(map(len, self.replicas.values()))

    def values(self, service: str, key: str) -> list[str]:
        return [replica[key] for replica in self.replicas.get(service, ()) if key in replica]

    def usable(self, service: str) -> bool:
        """Whether a replica is there that can answer."""
        return any(replica.get(micro.STATUS) != "down" for replica in self.replicas.get(service, ()))


def fleet_of(answers: Iterable[bytes], connected: bool) -> Fleet:
    """Answers of strangers, and what cannot be read, are left out."""
    replicas: dict[str, dict[str, dict[str, str]]] = {}
    decode = msgspec.json.Decoder(Ping).decode
    for answer in answers:
        try:
            ping = decode(answer)
        except (ValueError, RecursionError):
            continue
        service = ping.name.removeprefix(_NAME_PREFIX).replace("-", "_")
        if ping.name.startswith(_NAME_PREFIX) and service in SERVICES:
            replicas.setdefault(service, {})[ping.id] = ping.metadata or {}
    return Fleet({service: tuple(found.values()) for service, found in replicas.items()}, connected)


def missing(fleet: Fleet) -> tuple[str, ...]:
    """What a detection would need and does not have; empty: one would be answered now."""
    lacking = [] if fleet.connected else ["nats"]
    lacking += [service for service in _NEEDED if not fleet.usable(service)]
    if not (_engine_answers(fleet) or _pool_answers(fleet)):
        lacking.append("engine")
    return tuple(lacking)


def describe(fleet: Fleet) -> HealthAnswer:
    """`unhealthy`: a detection would not be answered; `degraded`: something is not as configured."""
    # The console looks on; the gateway is whole without it, and where it is not used it is not missed.
    services = {service: _service(fleet, service) for service in SERVICES if service != "console" or fleet.count("console")}
    engine = _engine(fleet)
    stores = StoresHealth(
        redis=_store(fleet, "limiter", micro.STORE_REDIS),
        postgres=_store(fleet, "auth", micro.STORE_POSTGRES),
        nats="up" if fleet.connected else "down",
    )
    if missing(fleet):
        status = "unhealthy"
    elif (
        any(service.status != "ok" for name, service in services.items() if name != "console")
        or (engine.status, engine.breaker) != ("up", "closed")
        or (stores.redis, stores.postgres) != ("up", "up")
    ):
        status = "degraded"
    else:
        status = "healthy"
    return HealthAnswer(status=status, version=VERSION, services=services, engine=engine, stores=stores)


def _service(fleet: Fleet, service: str) -> ServiceHealth:
    statuses = fleet.values(service, micro.STATUS)
    working = "ok" if all(status == "ok" for status in statuses) else "degraded"
    return ServiceHealth(working if fleet.usable(service) else "down", fleet.count(service))


def _worst(values: Iterable[str], order: tuple[str, ...], unknown: str) -> str:
    """The last in `order` of the values that are known in it."""
    return max((value for value in values if value in order), key=order.index, default=unknown)


def _store(fleet: Fleet, service: str, key: str) -> str:
    return _worst(fleet.values(service, key), ("up", "down"), "unknown")


def _engine(fleet: Fleet) -> EngineHealth:
    def first(key: str) -> str | None:
        return next(iter(fleet.values("detector_proxy", key)), None)

    states: tuple[BreakerState, ...] = ("closed", "half_open", "open")
    breakers = [state for state in states if state in fleet.values("detector_proxy", micro.ENGINE_BREAKER)]
    return EngineHealth(
        configured=first(micro.ENGINE_CONFIGURED),
        name=first(micro.ENGINE_NAME),
        status=_worst(fleet.values("detector_proxy", micro.ENGINE_STATUS), ("up", "degraded", "down"), "down"),
        breaker=breakers[-1] if breakers else None,
    )


def _engine_answers(fleet: Fleet) -> bool:
    """Whether some proxy has an engine that it would ask."""
    return any(
        proxy.get(micro.ENGINE_STATUS) in ("up", "degraded") and proxy.get(micro.ENGINE_BREAKER) != "open"
        for proxy in fleet.replicas.get("detector_proxy", ())
    )


def _pool_answers(fleet: Fleet) -> bool:
    """Whether some worker takes single texts."""
    return any(
        worker.get(micro.STATUS) != "down" and worker.get(micro.LANES) != micro.BULK_ONLY
        for worker in fleet.replicas.get("fallback_model", ())
    )


class FleetMonitor:
    """Asks the fleet when somebody wants to know, at most once at a time."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._fleet = Fleet({}, connected=False)
        self._known = 0
        self._asked_at = self._census_at = -CENSUS_SECONDS
        self._round: asyncio.Task[Fleet] | None = None

    async def fleet(self) -> Fleet:
        """The fleet as it was at most `FRESH_SECONDS` ago."""
        if not self._stages.connected:
            return Fleet({}, connected=False)
        now = self._stages.clock.monotonic()
        if self._fleet.connected and now - self._asked_at < FRESH_SECONDS:
            return self._fleet
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._ask(now))
        # A caller that goes away does not take the answer from the others.
        return await asyncio.shield(self._round)

    async def _ask(self, now: float) -> Fleet:
        # When all that are known have answered there is nothing to wait for; as long as something is missing, there is, and
        # after a while nobody can say who else has come.
        complete = not missing(self._fleet) and now - self._census_at < CENSUS_SECONDS
        fleet = await self._ping(expected=self._known if complete else 0)
        self._fleet = fleet
        self._asked_at = self._stages.clock.monotonic()
        if not complete:
            self._known, self._census_at = fleet.size, self._asked_at
        return fleet

    async def _ping(self, expected: int) -> Fleet:
        context = RequestContext.lasting(2 * WINDOW_SECONDS, self._stages.clock)
        answers = await self._stages.gather(PING_SUBJECT, None, context, window_seconds=WINDOW_SECONDS, expected=expected)
        return fleet_of(answers, self._stages.connected)
