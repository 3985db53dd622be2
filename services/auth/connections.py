"""The connections of clients, as NATS's servers list and end them."""

from __future__ import annotations

from typing import Final

import msgspec

from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import Message
from libs.common.subjects import CLIENT_USER_PREFIX, CONNECTIONS, client_user, kick
from services.auth.door import Connection, ConnectionsUnavailableError

SERVER_SECONDS: Final = 1.0
CLUSTER_SECONDS: Final = 0.3
"""How long the servers of a cluster have to answer; how many there are is not known."""
PAGE: Final = 1024


class _List(Message, frozen=True):
    """What nats-server calls ConnzOptions. `auth`: show whose each is."""

    user: str
    auth: bool = True
    offset: int = 0
    limit: int = PAGE


class _End(Message, frozen=True):
    cid: int


class _Listed(msgspec.Struct):
    cid: int
    authorized_user: str = ""


class _Connections(msgspec.Struct):
    server_id: str
    total: int
    connections: list[_Listed] = []


class _Listing(msgspec.Struct):
    data: _Connections


_LISTING = msgspec.json.Decoder(_Listing)


class BusConnections:
    """`Connections`, by requests that the server imports for the services' account; auth's user may make them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def of(self, key_id: str) -> set[Connection]:
        user = client_user(key_id)
        return {Connection(server, each.cid) for server, each in await self._list(user) if each.authorized_user == user}

    async def key_ids(self) -> set[str]:
        users = {each.authorized_user for _, each in await self._list("")}
        return {user.removeprefix(CLIENT_USER_PREFIX) for user in users if user.startswith(CLIENT_USER_PREFIX)}

    async def end(self, connection: Connection) -> None:
        # The answer is an error when there is no such connection, which is just as well.
        if not await self._ask(kick(connection.server), _End(cid=connection.number), SERVER_SECONDS, expected=1):
            raise ConnectionsUnavailableError("the server does not answer")

    async def _list(self, user: str) -> list[tuple[str, _Listed]]:
        """Of everybody when `user` is empty."""
        found: list[tuple[str, _Listed]] = []
        offset, total = 0, 1
        while offset < total:
            window, expected = (CLUSTER_SECONDS, 0) if self._bus.clustered else (SERVER_SECONDS, 1)
            answers = await self._ask(CONNECTIONS, _List(user=user, offset=offset), window, expected)
            if not answers:
                raise ConnectionsUnavailableError("no server answers")
            total = 0
            for answer in answers:
                try:
                    listed = _LISTING.decode(answer).data
                except (ValueError, RecursionError):
                    raise ConnectionsUnavailableError("a server's answer cannot be read") from None
                total = max(total, listed.total)
                found += [(listed.server_id, each) for each in listed.connections]
            offset += PAGE
        return found

    async def _ask(self, subject: str, message: Message, window_seconds: float, expected: int) -> list[bytes]:
        context = RequestContext.lasting(window_seconds, self._bus.clock)
        return await self._bus.gather(subject, message, context, window_seconds=window_seconds, expected=expected)
