"""What the limiter needs from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.limiter.core import Decision


class StoreUnavailableError(Exception):
    """The store did not answer, or not in time. Whether it counted the call is not known."""


class StoreForgotError(StoreUnavailableError):
    """The store answers, and does not know what it was told: it has lost its data, between one beat and the next."""


class KeyUnavailableError(StoreUnavailableError):
    """This one key is not decided now: it is on its way from one part of the store to another, or no part has it."""


class RateStore(Protocol):
    """The states of all keys under one policy, shared by every replica."""

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        """As `core.KeyState.decide`, by the store's own clock. Raises `StoreUnavailableError` within 0.1 s."""
        ...


class Heartbeat(Protocol):
    """Where replicas make themselves known to one another."""

    async def beat(self) -> int:
        """Say that this replica is there; how many are. Raises `StoreUnavailableError` within 0.1 s; `StoreForgotError`."""
        ...
