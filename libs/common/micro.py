"""NATS ADR-32 (`$SRV.PING/INFO/STATS`) for a service whose subscriptions are the bus's own, so that `nats micro ls` shows it.

Health travels in the metadata of the PING answer: `status` and the state of what the service depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nats.aio.client import Client
from nats.micro.service import EndpointInfo, EndpointStats, Service, ServiceConfig, ServiceInfo, ServiceStats

# Keys in the PING metadata.
INSTANCE = "instance"
STATUS = "status"  # ok, degraded (answers, but not as configured) or down (cannot answer)
STORE_REDIS = "store.redis"  # up or down
STORE_POSTGRES = "store.postgres"  # up or down
ENGINE_CONFIGURED = "engine.configured"  # kind of the primary engine, or "pool" when the fallback pool is the engine
ENGINE_NAME = "engine.name"
ENGINE_STATUS = "engine.status"  # up, degraded or down
ENGINE_BREAKER = "engine.breaker"  # closed, open or half_open
MODEL_NAME = "model.name"
POOL = "pool"  # which pool a worker serves; without it, the default one
LANES = "lanes"  # BULK_ONLY of a worker that takes the texts of batches and jobs alone; without it, it takes single texts too
BULK_ONLY = "bulk"

Status = Literal["ok", "degraded", "down"]


@dataclass(slots=True)
class FleetStatus:
    """This process's health, as PING shows it. Values are short words; never an address or a secret."""

    metadata: dict[str, str] = field(default_factory=lambda: {STATUS: "ok"})

    def set(self, key: str, value: str) -> None:
        self.metadata[key] = value


class Endpoint(Protocol):
    """What a subject tells of itself (`libs.common.meter.StageMeter`)."""

    def info(self) -> EndpointInfo: ...

    def stats(self) -> EndpointStats: ...


class MicroService(Service):
    """nats-py's micro service with the subjects of the bus in place of its own endpoints."""

    def __init__(self, client: Client, config: ServiceConfig, endpoints: Sequence[Endpoint]) -> None:
        super().__init__(client, config)
        self._told = endpoints

    def info(self) -> ServiceInfo:
        info = super().info()
        info.endpoints = [endpoint.info() for endpoint in self._told]
        return info

    def stats(self) -> ServiceStats:
        stats = super().stats()
        stats.endpoints = [endpoint.stats() for endpoint in self._told]
        return stats
