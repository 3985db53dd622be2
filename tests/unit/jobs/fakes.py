"""What jobs stands on, written by hand and in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from libs.common.clock import ManualClock
from libs.common.contracts import (
    Admission,
    Coverage,
    DeadLetter,
    DetectItems,
    ItemResult,
    ItemResults,
    JobItem,
    JobResult,
    Principal,
    RateState,
    Verdict,
    encode,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs.core import JobRecord, Outcome, Queue, error_result, outcome_of
from services.jobs.ports import Kept, RecordMovedError

KEY = "aaaabbbbcccc"
JOB = "0123456789ab0123456789abcdef"
RATE = RateState(limit_minute=70, remaining_minute=0, reset_minute=4.0, limit_day=500, remaining_day=9, reset_day=900.0)
VERDICT = Verdict(
    is_malicious=False,
    confidence=0.1,
    threat_types=(),
    endpoint="test",
    degraded=False,
    coverage=Coverage(tokens=3, windows=1, truncated=False),
)
BENIGN = ItemResult(verdict=VERDICT)
MALICIOUS = ItemResult(
    verdict=Verdict(is_malicious=True, confidence=0.9, threat_types=("jailbreak",), endpoint="test", degraded=False)
)
BROKEN = error_result(ErrorCode.INTERNAL, "It broke.")


def record(**values: object) -> JobRecord:
    """A job that has been accepted."""
    given = {"key_id": KEY, "job_id": JOB, "state": "queued", "created_ms": 0, "updated_ms": 0, "total": 4, "digest": "d"}
    return JobRecord(**{**given, **values})  # type: ignore[arg-type]


class FakeRecords:
    """`before_update` and `before_claim`: what somebody else does just before."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], Kept] = {}
        self.claims: dict[tuple[str, str], tuple[str, int]] = {}
        self.before_update: list[Callable[[], object]] = []
        self.before_claim: list[Callable[[], object]] = []

    def put(self, kept: JobRecord) -> JobRecord:
        earlier = self.kept.get((kept.key_id, kept.job_id))
        self.kept[kept.key_id, kept.job_id] = Kept(kept, earlier.revision + 1 if earlier is not None else 1)
        return kept

    def of(self, job_id: str = JOB, key_id: str = KEY) -> JobRecord:
        return self.kept[key_id, job_id].record

    async def get(self, key_id: str, job_id: str) -> Kept | None:
        return self.kept.get((key_id, job_id))

    async def create(self, record: JobRecord) -> None:
        if (record.key_id, record.job_id) not in self.kept:
            self.put(record)

    async def update(self, record: JobRecord, revision: int) -> int:
        if self.before_update:
            self.before_update.pop()()
        if self.kept[record.key_id, record.job_id].revision != revision:
            raise RecordMovedError
        self.put(record)
        return revision + 1

    async def job_ids(self, key_id: str) -> list[str]:
        return sorted(job_id for key, job_id in self.kept if key == key_id)

    async def claim(self, key_id: str, idempotency: str) -> tuple[str, int] | None:
        return self.claims.get((key_id, idempotency))

    async def set_claim(self, key_id: str, idempotency: str, job_id: str, revision: int) -> None:
        if self.before_claim:
            self.before_claim.pop()()
        if self.claims.get((key_id, idempotency), ("", 0))[1] != revision:
            raise RecordMovedError
        self.claims[key_id, idempotency] = (job_id, revision + 1)


@dataclass(eq=False)
class FakeDelivery:
    queue: FakeQueue
    index: int
    item: JobItem | None
    redelivered: bool = False
    acknowledgement: PortcullisError | None = None
    kept: int = 0

    async def done(self) -> None:
        if self.acknowledgement is not None:
            raise self.acknowledgement
        self.queue.in_hand.discard(self.index)
        self.queue.items.pop(self.index, None)

    async def give_back(self, delay_seconds: float) -> None:
        self.queue.given_back.append((self.index, delay_seconds))
        self.queue.ready.add(self.index)

    async def keep(self) -> None:
        self.kept += 1


@dataclass
class FakeQueue:
    """As the server keeps one: what has been handed out stays in hand until it is acknowledged, wherever it is."""

    items: dict[int, JobItem | None] = field(default_factory=dict)
    in_hand: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    """In hand, and to be handed out again."""
    given_back: list[tuple[int, float]] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        return len(self.items) - len(self.in_hand)


class FakeQueues:
    """`acknowledgement`: what becomes of every acknowledgement from now on. `seen_empty`: by a server that was away."""

    def __init__(self) -> None:
        self.seen_empty = False
        self.open_queues: dict[tuple[str, str], FakeQueue] = {}
        self.acknowledgement: PortcullisError | None = None
        self.fetched: list[int] = []
        self.created_ms = 0

    def of(self, job_id: str = JOB, key_id: str = KEY) -> FakeQueue:
        return self.open_queues[key_id, job_id]

    def fill(self, *texts: str | None, job_id: str = JOB, key_id: str = KEY) -> FakeQueue:
        items = {index: JobItem(text=text, id=f"id-{index}") if text is not None else None for index, text in enumerate(texts)}
        queue = self.open_queues[key_id, job_id] = FakeQueue(items)
        return queue

    def _seen(self, key_id: str, job_id: str) -> Queue:
        queue = FakeQueue() if self.seen_empty else self.open_queues[key_id, job_id]
        return Queue(key_id, job_id, queue.waiting, len(queue.in_hand), self.created_ms)

    async def all(self) -> list[Queue]:
        return [self._seen(*name) for name in self.open_queues]

    async def one(self, key_id: str, job_id: str) -> Queue | None:
        return self._seen(key_id, job_id) if (key_id, job_id) in self.open_queues else None

    async def has(self, key_id: str, job_id: str, index: int) -> bool:
        return index in self.of(job_id, key_id).items

    async def open(self, key_id: str, job_id: str) -> None:
        self.open_queues.setdefault((key_id, job_id), FakeQueue())

    async def close(self, key_id: str, job_id: str) -> None:
        self.open_queues.pop((key_id, job_id), None)

    async def append(self, key_id: str, job_id: str, first_index: int, items: Sequence[JobItem]) -> None:
        for offset, item in enumerate(items):
            self.of(job_id, key_id).items.setdefault(first_index + offset, item)

    async def fetch(self, key_id: str, job_id: str, most: int, wait_seconds: float) -> Sequence[FakeDelivery]:
        queue = self.of(job_id, key_id)
        again = sorted(queue.ready)[:most]
        new = [index for index in queue.items if index not in queue.in_hand][: most - len(again)]
        queue.ready -= set(again)
        queue.in_hand |= set(new)
        self.fetched.append(len(again) + len(new))
        return [FakeDelivery(queue, index, queue.items[index], index in again, self.acknowledgement) for index in [*again, *new]]


class FakeResults:
    """`failure`: of everything that is asked. `unseen`: the server that is asked for many at a time was away."""

    def __init__(self) -> None:
        self.unseen = False
        self.stored: dict[tuple[str, int], tuple[int, JobResult]] = {}
        self.letters: list[DeadLetter] = []
        self.announced: list[str] = []
        self.failure: PortcullisError | None = None
        self.letters_full = False

    def of(self, job_id: str = JOB) -> dict[int, ItemResult]:
        return {index: result.result for (job, index), (_, result) in self.stored.items() if job == job_id}

    async def store(self, key_id: str, job_id: str, result: JobResult) -> None:
        if self.failure is not None:
            raise self.failure
        self.stored.setdefault((job_id, result.index), (len(self.stored) + 1, result))

    async def has(self, key_id: str, job_id: str, index: int) -> bool:
        return (job_id, index) in self.stored

    def _behind(self, job_id: str, after: int) -> list[tuple[int, JobResult]]:
        if self.unseen:
            return []
        return sorted(
            (entry for (job, _), entry in self.stored.items() if job == job_id and entry[0] > after), key=lambda e: e[0]
        )

    async def outcomes(self, key_id: str, job_id: str, after: int, most: int) -> list[tuple[int, int, Outcome]]:
        return [(place, result.index, outcome_of(result.result)) for place, result in self._behind(job_id, after)[:most]]

    async def page(
        self, key_id: str, job_id: str, after: int, most: int, most_bytes: int
    ) -> tuple[list[tuple[int, bytes]], bool]:
        found = self._behind(job_id, after)
        return [(place, encode(result)) for place, result in found[:most]], len(found) > most

    async def bury(self, letter: DeadLetter) -> None:
        if self.letters_full:
            raise PortcullisError(ErrorCode.OVERLOADED)
        self.letters.append(letter)

    async def announce(self, key_id: str, job_id: str) -> None:
        self.announced.append(job_id)


class FakeBackend:
    """`verdict`: of a text, an error of its own, or the failure of the message that it is in. `room`: units that are left."""

    def __init__(self) -> None:
        self.verdict: Callable[[str], ItemResult | PortcullisError] = lambda _: BENIGN
        self.failure: PortcullisError | None = None
        self.refusal: PortcullisError | None = None
        self.room = 1_000_000
        self.rate = RATE
        self.judged: list[tuple[str, ...]] = []
        self.messages: list[DetectItems] = []
        self.taken: list[int] = []

    async def take(self, key_id: str, units: int) -> Admission:
        if self.refusal is not None:
            raise self.refusal
        granted = min(units, self.room)
        self.room -= granted
        self.taken.append(granted)
        principal = Principal(key_id=key_id, scopes=("batch",), limit_minute=70, limit_day=500)
        return Admission(principal=principal, granted=granted, rate=self.rate)

    async def judge(self, items: DetectItems) -> ItemResults:
        self.messages.append(items)
        self.judged.append(items.texts)
        if self.failure is not None:
            raise self.failure
        results = [self.verdict(text) for text in items.texts]
        for result in results:
            if isinstance(result, PortcullisError):
                raise result
        return ItemResults(results=tuple(result for result in results if isinstance(result, ItemResult)))


def clock_at(ms: int) -> ManualClock:
    return ManualClock(ms / 1000)
