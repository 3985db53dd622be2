"""Services that run in one process: what goes from one to another does not leave it.

Why, and what it costs: docs/adr/0018-stages-may-share-a-process.md.

Each has its bus all the same, with its own connection, credentials, queue groups and bounds; only the way of a message is
shorter: a stage that is here is handed the message itself, and the answer goes straight to the request that waits for it. What
others send to these services, and what these send to others, goes over NATS as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from libs.common import telemetry
from libs.common.clock import Clock, SystemClock
from libs.common.contracts import Reply
from libs.common.retries import RetryBudget
from libs.common.stages import Stage


class Response(msgspec.Struct, frozen=True, gc=False):
    """A decoded answer and the time that the stages spent on it (milliseconds by stage)."""

    reply: Reply
    timings: dict[str, float]


class Asker(Protocol):
    """A bus, as its neighbours see it."""

    @property
    def connected(self) -> bool: ...

    def resolve(self, token: str, response: Response) -> bool:
        """The answer to one of its requests. False when it waits for several answers, which come over NATS."""
        ...


class Neighbours:
    """The buses of one process; most processes have a single one. Made before them, and given to each."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.retry_budget = RetryBudget(self.clock)
        """Of all that this process asks again."""
        self._askers: dict[str, Asker] = {}
        self._stages: dict[str, tuple[Asker, Stage[Any]]] = {}
        telemetry.NATS_CONNECTED.set_function(lambda: all(asker.connected for asker in self._askers.values()))
        telemetry.RETRIES_LEFT.set_function(lambda: self.retry_budget.left)

    def add(self, inbox: str, asker: Asker) -> None:
        """A bus whose answers come to `inbox`."""
        self._askers[inbox] = asker

    def lives(self, inbox: str) -> bool:
        """Whether the bus with this inbox is of this process."""
        return inbox in self._askers

    def open(self, asker: Asker, stages: Iterable[Stage[Any]]) -> None:
        """These stages of a bus take messages from now on."""
        self._stages |= {stage.subject: (asker, stage) for stage in stages}

    def close(self, asker: Asker) -> None:
        """Those of this bus take no more: others of their queue group do, over NATS."""
        self._stages = {subject: found for subject, found in self._stages.items() if found[0] is not asker}

    def stage(self, subject: str) -> Stage[Any] | None:
        """The one that takes a message on `subject`, if it is here and has a connection to pass it on."""
        asker, stage = self._stages.get(subject, (None, None))
        return stage if asker is not None and asker.connected else None

    def answer(self, origin: str, response: Response) -> bool:
        """Give an answer to whoever waits for it at `origin`, or does so no more. False when it must be told over NATS."""
        inbox, _, token = origin.rpartition(".")
        asker = self._askers.get(inbox)
        return asker is not None and asker.resolve(token, response)
