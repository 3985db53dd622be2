"""Buses on the real server, of services in processes of their own and of services that share one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from pydantic import SecretStr

from infra.embedded.servers import Server
from libs.common.bus import Bus
from libs.common.contracts import Message
from libs.common.neighbours import Neighbours
from libs.common.settings import CommonSettings

MakeBus = Callable[[str], Bus]


class Ping(Message, frozen=True):
    value: int = 0


def bus_of(service: str, server: Server, passwords: dict[str, str], neighbours: Neighbours | None = None) -> Bus:
    """As its own user; `neighbours`: those of its process, if it is not alone there."""
    settings = CommonSettings(nats_url=server.url, nats_user=service, nats_password=SecretStr(passwords[service]))
    return Bus(service, settings, neighbours=neighbours)


@asynccontextmanager
async def started(*buses: Bus) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for bus in buses:
            await bus.connect()
            await bus.start()
            stack.push_async_callback(bus.drain)
        yield
