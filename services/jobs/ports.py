"""What jobs needs from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from libs.common.contracts import Admission, DeadLetter, DetectItems, ItemResults, JobItem, JobResult
from services.jobs.core import JobRecord, Outcome, Queue


class RecordMovedError(Exception):
    """Somebody else has changed the record since it was read."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A record, and the revision that a change of it must name."""

    record: JobRecord
    revision: int


Stored = tuple[int, bytes]
"""A place, and a `JobResult` encoded."""


class Delivery(Protocol):
    """An item in hand, until it is acknowledged, given back, or its time is over. Each raises `PortcullisError`."""

    @property
    def index(self) -> int: ...

    @property
    def item(self) -> JobItem | None:
        """None: it cannot be read."""
        ...

    @property
    def redelivered(self) -> bool: ...

    async def done(self) -> None:
        """It has its result. That is not waited for: if the server is not told, the item comes again, and has its result."""
        ...

    async def give_back(self, delay_seconds: float) -> None: ...

    async def keep(self) -> None:
        """It takes longer."""
        ...


class Records(Protocol):
    """Each raises `PortcullisError` STAGE_UNAVAILABLE when the store cannot be asked."""

    async def get(self, key_id: str, job_id: str) -> Kept | None: ...

    async def create(self, record: JobRecord) -> None:
        """Nothing happens when it is there already."""
        ...

    async def update(self, record: JobRecord, revision: int) -> int:
        """The new revision. Raises `RecordMovedError`."""
        ...

    async def job_ids(self, key_id: str) -> list[str]: ...

    async def claim(self, key_id: str, idempotency: str) -> tuple[str, int] | None:
        """Which job was submitted under an idempotency key, and the revision of that."""
        ...

    async def set_claim(self, key_id: str, idempotency: str, job_id: str, revision: int) -> None:
        """`revision` 0: there is none yet. Raises `RecordMovedError`."""
        ...


class Queues(Protocol):
    """As `Records`."""

    async def all(self) -> list[Queue]: ...

    async def one(self, key_id: str, job_id: str) -> Queue | None: ...

    async def has(self, key_id: str, job_id: str, index: int) -> bool:
        """Whether an item is still kept, which `one` need not know yet where several servers keep it."""
        ...

    async def open(self, key_id: str, job_id: str) -> None: ...

    async def close(self, key_id: str, job_id: str) -> None:
        """Nobody fetches from it any more, and its items are gone."""
        ...

    async def append(self, key_id: str, job_id: str, first_index: int, items: Sequence[JobItem]) -> None:
        """Returns when all are stored. Raises OVERLOADED when they do not fit."""
        ...

    async def fetch(self, key_id: str, job_id: str, most: int, wait_seconds: float) -> Sequence[Delivery]:
        """What there is, waiting for the first."""
        ...


class Results(Protocol):
    """As `Records`. Places are positive, and grow in the order of storing."""

    async def store(self, key_id: str, job_id: str, result: JobResult) -> None:
        """Store an item's one result; nothing happens when it has one."""
        ...

    async def has(self, key_id: str, job_id: str, index: int) -> bool: ...

    async def outcomes(self, key_id: str, job_id: str, after: int, most: int) -> list[tuple[int, int, Outcome]]:
        """(place, index, outcome)."""
        ...

    async def page(
        self, key_id: str, job_id: str, after: int, most: int, most_bytes: int
    ) -> tuple[list[tuple[int, bytes]], bool]:
        """(place, `JobResult` encoded), at least one if there is any, and whether there are more.

        `outcomes` and `page` may know less than `has` for a moment, where several servers keep the results.
        """
        ...

    async def bury(self, letter: DeadLetter) -> None: ...

    async def announce(self, key_id: str, job_id: str) -> None:
        """The job is over: its webhook is due."""
        ...


class Backend(Protocol):
    """The stages that a job's items go through."""

    async def take(self, key_id: str, units: int) -> Admission:
        """Units of the key's limits, as far as there is room. Raises `PortcullisError`."""
        ...

    async def judge(self, items: DetectItems) -> ItemResults:
        """Raises `PortcullisError` when all came to nothing."""
        ...
