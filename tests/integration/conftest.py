"""Of buses, for whoever tests what they promise."""

from __future__ import annotations

import pytest

from infra.embedded.servers import Server
from libs.common.neighbours import Neighbours
from tests.integration.buses import MakeBus, bus_of


@pytest.fixture
def make_apart(nats_server: Server, nats_passwords: dict[str, str]) -> MakeBus:
    """Of services in processes of their own: each can die by itself."""
    return lambda service: bus_of(service, nats_server, nats_passwords)


@pytest.fixture(params=["apart", "together"])
def make_bus(nats_server: Server, nats_passwords: dict[str, str], request: pytest.FixtureRequest) -> MakeBus:
    """Of services in processes of their own, or in one and the same."""
    neighbours = Neighbours() if request.param == "together" else None
    return lambda service: bus_of(service, nats_server, nats_passwords, neighbours)
