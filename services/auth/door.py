"""The door: who may connect to NATS with an API key (the server asks, as its auth callout), and how that ends.

A connection holds for as long as its key does. Whenever a key is changed, in whatever way, its connections are ended; a client
whose key is still good connects again by itself, and is asked for it again. What a server was told of a key's end (its expiry, or
that of a replaced secret) it carries out itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from libs.common import keys
from libs.common.clock import Clock
from libs.common.contracts import Credential
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import client_user, door_permissions
from services.auth import core, metrics
from services.auth.cache import Authenticator
from services.auth.tokens import BadTokenError, ConnectRequest, Issuer

log = logging.getLogger(__name__)

SWEEP_SECONDS: Final = 30.0
"""How often all connections are looked at, for the one whose end was not carried out because a process died on the way to it."""
RETRY_SECONDS: Final = 0.5
LATELY_SECONDS: Final = 5.0
"""How long a server may take to list a connection that it has asked about."""
LATELY_ENTRIES: Final = 4096
DUE_ENTRIES: Final = 65_536


class ConnectionsUnavailableError(Exception):
    """The servers cannot be asked about connections (yet)."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A client's connection: which one, to which server."""

    server: str
    number: int


class Connections(Protocol):
    """Those of clients that have connected with a key. Each raises `ConnectionsUnavailableError`."""

    async def of(self, key_id: str) -> set[Connection]: ...

    async def key_ids(self) -> set[str]:
        """Whose there are."""
        ...

    async def end(self, connection: Connection) -> None:
        """Returns when it has ended, or was over before."""
        ...


@dataclass(frozen=True, slots=True)
class _Lately:
    key_id: str
    connection: Connection
    at: float
    admitted: bool


class Door:
    """`most_connections`: of one key, at a time."""

    def __init__(
        self, issuer: Issuer, authenticator: Authenticator, connections: Connections, clock: Clock, *, most_connections: int
    ) -> None:
        self._issuer = issuer
        self._authenticator = authenticator
        self._connections = connections
        self._clock = clock
        self._most = most_connections
        self._lately: deque[_Lately] = deque(maxlen=LATELY_ENTRIES)
        self._due: dict[str, None] = {}
        self._wake = asyncio.Event()

    # --- who may come in -------------------------------------------------------------------------------------------------

    async def answer(self, token: bytes) -> bytes | None:
        """The answer to a server's question; None when it is none that deserves one: the client is then refused in time."""
        try:
            request = self._issuer.read(token, self._clock.now())
        except BadTokenError as error:
            log.warning("a request of the auth callout is passed over: %s", error)
            return None
        try:
            admitted = await self._admit(request)
        except PortcullisError as error:
            metrics.DOOR.labels(error.code).inc()
            log.info("a connection is refused: %s %s", error.code, error.internal)
            return self._issuer.refuse(request, error.code, self._clock.now())
        except ConnectionsUnavailableError as error:
            metrics.DOOR.labels(ErrorCode.STAGE_UNAVAILABLE).inc()
            log.warning("a connection is refused, since its key's connections cannot be counted: %s", error)
            return self._issuer.refuse(request, ErrorCode.STAGE_UNAVAILABLE, self._clock.now())
        metrics.DOOR_ADMITTED.inc()
        return admitted

    async def _admit(self, request: ConnectRequest) -> bytes:
        parsed = keys.parse(request.secret)
        if parsed is None:
            raise PortcullisError(ErrorCode.INVALID_CREDENTIALS)
        key_id, connection = parsed.key_id, Connection(request.server, request.connection)
        # Before the key is looked at: if it is changed from here on, this connection ends with the others.
        self._note(key_id, connection, admitted=False)
        caller = await self._authenticator.authenticate(Credential(key_id=key_id, digest=parsed.digest))
        core.require_scope(caller.principal, "batch")
        known = await self._connections.of(key_id)
        # Nothing is awaited between here and the answer, so that no two connections take the same place.
        known |= {each.connection for each in self._recent(key_id) if each.admitted}
        if len(known - {connection}) >= self._most:
            raise PortcullisError(ErrorCode.OVERLOADED, internal=f"{key_id} has {len(known)} connections")
        self._note(key_id, connection, admitted=True)
        return self._issuer.admit(
            request,
            client_user(key_id),
            door_permissions(key_id),
            self._clock.now(),
            until=caller.valid_until if math.isfinite(caller.valid_until) else None,
        )

    # --- and how that ends -----------------------------------------------------------------------------------------------

    def end(self, key_id: str) -> None:
        """The key has been changed: end its connections, soon."""
        if len(self._due) < DUE_ENTRIES:  # beyond that, the sweep finds them
            self._due[key_id] = None
        self._wake.set()

    async def run(self) -> None:
        """End what is to end, until cancelled."""
        swept_at = self._clock.monotonic()
        while True:
            self._wake.clear()
            try:
                while self._due:
                    key_id = next(iter(self._due))
                    del self._due[key_id]
                    try:
                        await self._end(key_id)
                    except BaseException:
                        self._due[key_id] = None
                        raise
                if self._clock.monotonic() - swept_at >= SWEEP_SECONDS:
                    await self._sweep()
                    swept_at = self._clock.monotonic()
            except (ConnectionsUnavailableError, PortcullisError) as error:
                log.info("connections cannot be ended yet: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except Exception:
                # The one catch-all of this task: without it, no key's connection would ever be ended again.
                log.exception("ending connections failed")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                async with asyncio.timeout(max(0.0, swept_at + SWEEP_SECONDS - self._clock.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _end(self, key_id: str) -> None:
        # Those that a server does not list yet are known from what it has asked.
        found = {each.connection for each in self._recent(key_id)} | await self._connections.of(key_id)
        for connection in found:
            await self._connections.end(connection)
        if found:
            log.info("the connections of %s are ended", key_id)

    async def _sweep(self) -> None:
        for key_id in await self._connections.key_ids():
            try:
                core.require_scope(await self._authenticator.identify(key_id), "batch")
            except PortcullisError as error:
                if error.code not in (ErrorCode.INVALID_CREDENTIALS, ErrorCode.FORBIDDEN):
                    raise
                await self._end(key_id)

    def _note(self, key_id: str, connection: Connection, *, admitted: bool) -> None:
        self._lately.append(_Lately(key_id, connection, self._clock.monotonic(), admitted))

    def _recent(self, key_id: str) -> list[_Lately]:
        oldest = self._clock.monotonic() - LATELY_SECONDS
        while self._lately and self._lately[0].at < oldest:
            self._lately.popleft()
        return [each for each in self._lately if each.key_id == key_id]
