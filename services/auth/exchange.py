"""The exchange of the pepper: keys are stored under the current one as they are used, and those that are left are counted."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

from libs.common.clock import Clock
from services.auth import metrics
from services.auth.core import LeftBehind, StoreUnavailableError, utc
from services.auth.ports import KeyStore

log = logging.getLogger(__name__)

WAITING_KEYS: Final = 1024
"""Beyond that, a key is stored anew when it is used the next time."""
PAUSE_SECONDS: Final = 0.02
"""Between two keys: at most 50 a second of each replica, so that neither PostgreSQL nor the requests feel it. Where replicas
disagree for a while about which pepper is the current one, each undoes what the other has done; this bounds that, too."""
RETRY_SECONDS: Final = 1.0
COUNT_EVERY_SECONDS: Final = 60.0


class Exchange:
    """Work that no request waits for and that nothing depends on: a key that could not be stored anew works as before.

    `stored`: told of each key that has been. What other replicas know of it stays good, since they know both peppers: nobody
    is told to forget it (which would also end its owner's connections to NATS).
    """

    def __init__(
        self, store: KeyStore, clock: Clock, pepper_id: str, is_up: Callable[[], bool], stored: Callable[[str], None]
    ) -> None:
        self._store = store
        self._clock = clock
        self._pepper_id = pepper_id
        self._is_up = is_up
        self._stored = stored
        self._waiting: dict[str, LeftBehind] = {}
        self._wake = asyncio.Event()
        self._left: int | None = None
        metrics.KEYS_UNDER_PREVIOUS_PEPPER.set(math.nan)  # 0 would say that the previous pepper can go

    def leave(self, secret: LeftBehind) -> None:
        """Store this secret anew, some time soon; while PostgreSQL is away, when it is used again."""
        if len(self._waiting) < WAITING_KEYS and self._is_up():
            self._waiting[secret.key_id] = secret
            self._wake.set()

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(self._store_waiting(), self._keep_count())

    async def _store_waiting(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                secret = self._waiting.pop(next(iter(self._waiting)))
                if await _is_done(self._store.store_anew(secret)):
                    self._stored(secret.key_id)
                    await asyncio.sleep(PAUSE_SECONDS)
                else:
                    self._waiting.clear()
                    await asyncio.sleep(RETRY_SECONDS)

    async def _keep_count(self) -> None:
        while True:
            await _is_done(self._count())
            await asyncio.sleep(COUNT_EVERY_SECONDS)

    async def _count(self) -> None:
        left = await self._store.count_left(self._pepper_id, utc(self._clock.now()))
        if self._left is None or (left == 0) != (self._left == 0):
            log.info("keys not known to be stored under PORTCULLIS_KEY_PEPPER: %d", left)
        self._left = left
        metrics.KEYS_UNDER_PREVIOUS_PEPPER.set(left)


async def _is_done(work: Awaitable[None]) -> bool:
    try:
        await work
    except StoreUnavailableError as error:
        log.info("the exchange of the pepper waits: %s", error.internal)
        return False
    except Exception:
        # The one catch-all of these tasks: a bug in them must neither end them silently nor touch the requests.
        log.exception("the exchange of the pepper failed")
        return False
    return True
