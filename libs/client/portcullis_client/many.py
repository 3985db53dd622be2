"""Many texts, as portions that are sent one after the other: what goes into the next, and what is left of the last. No I/O.

httpx sends all of a body before it reads any of the answer. The gateway, whose memory is bounded, reads on only while its lines
are taken. A body of any length would stop both; one of `MOST_BYTES` is always taken whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from portcullis_client import calls, errors
from portcullis_client.calls import Call, End
from portcullis_client.errors import ConnectionFailedError, InvalidFieldError, PortcullisError, UnexpectedAnswerError
from portcullis_client.retries import Retry
from portcullis_client.types import Item, ItemResult

MOST_ITEMS = 256
MOST_BYTES = 60_000

_COMES_BACK = (*errors.PASSING, errors.DeadlineExceededError)


@dataclass(slots=True)
class _Pending:
    index: int
    id: str | None
    line: bytes
    attempt: int = 1


class ManyTexts:
    """Feed with `add` while it `wants`, then send what `start` gives and read its lines with `line`, then `over`, and again.

    Each text gets exactly one result. One whose error is passing is sent again, as often as `Retry.attempts` allows.
    """

    def __init__(self, retry: Retry, *, threshold: float | None, detailed: bool) -> None:
        self._retry = retry
        self._threshold = threshold
        self._detailed = detailed
        self._ended = False
        self._added = 0
        self._waiting: deque[_Pending] = deque()
        self._waiting_bytes = 0
        self._sent: dict[int, _Pending] = {}
        self._again: list[_Pending] = []
        self._setback: PortcullisError | None = None
        self._end: End | None = None
        self._refused: list[ItemResult] = []
        self._failures = 0
        self._waited_seconds = 0.0

    @property
    def wants(self) -> bool:
        """Whether there is room for another text in the next portion."""
        return not self._ended and len(self._waiting) + len(self._refused) < MOST_ITEMS and self._waiting_bytes < MOST_BYTES

    def fill(self, source: Iterator[str | Item]) -> None:
        for item in source:
            self.add(item)
            if not self.wants:
                return
        self._ended = True

    async def fill_async(self, source: AsyncIterator[str | Item]) -> None:
        async for item in source:
            self.add(item)
            if not self.wants:
                return
        self._ended = True

    def add(self, item: str | Item) -> None:
        """Raises TypeError for what is neither a text nor an `Item`."""
        if isinstance(item, str):
            item = Item(text=item)
        elif not isinstance(item, Item):
            raise TypeError(f"expected str or Item, got {type(item).__name__}")
        index, self._added = self._added, self._added + 1
        try:
            line = calls.encode_text({"text": item.text}) + b"\n"
        except ValueError as error:
            refusal = InvalidFieldError(str(error), code="invalid_field")
            self._refused.append(ItemResult(index=index, id=item.id, error=refusal))
            return
        self._waiting.append(_Pending(index, item.id, line))
        self._waiting_bytes += len(line)

    def refused(self) -> list[ItemResult]:
        """Results of texts that cannot be sent at all."""
        refused, self._refused = self._refused, []
        return refused

    def start(self) -> Call[None] | None:
        """The next portion; None when there is nothing more to send."""
        if not self._waiting:
            return None
        self._sent, self._again, self._end, self._setback = {}, [], None, None
        size = 0
        while self._waiting and len(self._sent) < MOST_ITEMS:
            if self._sent and size + len(self._waiting[0].line) > MOST_BYTES:
                break
            pending = self._waiting.popleft()
            self._waiting_bytes -= len(pending.line)
            size += len(pending.line)
            self._sent[len(self._sent)] = pending
        body = b"".join(pending.line for pending in self._sent.values())
        return calls.detect_portion(body, threshold=self._threshold, detailed=self._detailed)

    def line(self, line: bytes) -> ItemResult | None:
        """The result that a line of the answer tells, if it is final. Raises `UnexpectedAnswerError`."""
        read = calls.result_line(line)
        if isinstance(read, End):
            self._end = read
            return None
        if read is None:
            return None
        pending = self._sent.pop(read.index, None)
        if pending is None:
            raise UnexpectedAnswerError("The gateway answered a text twice, or one that was not sent.")
        if isinstance(read.error, _COMES_BACK) and pending.attempt < self._retry.attempts:
            pending.attempt += 1
            self._again.append(pending)
            self._setback = read.error
            return None
        self._failures, self._waited_seconds = 0, 0.0
        return msgspec.structs.replace(read, index=pending.index, id=pending.id)

    def over(self, failure: PortcullisError | None) -> tuple[PortcullisError, float] | None:
        """The portion's answer has ended, or failed: why and for how many seconds to pause before the next, if at all.

        Raises the failure when waiting does not help, or has not for `Retry.patience_seconds`.
        """
        if failure is None and self._end is not None:
            failure = self._end.error
            if failure is None and self._sent:
                raise UnexpectedAnswerError("The gateway's answer leaves out a text.")
        elif failure is None and self._sent:
            failure = ConnectionFailedError("The connection broke off in the middle of the answer.", sent=True)
        for pending in sorted((*self._again, *self._sent.values()), key=lambda pending: pending.index, reverse=True):
            self._waiting.appendleft(pending)
            self._waiting_bytes += len(pending.line)
        failure = failure or self._setback
        if failure is None:
            return None
        if not isinstance(failure, _COMES_BACK):
            raise failure
        self._failures += 1
        seconds = self._retry.pause_seconds(failure, self._failures)
        if self._waited_seconds + seconds > self._retry.patience_seconds:
            raise failure
        self._waited_seconds += seconds
        return failure, seconds


async def as_async(source: Iterable[str | Item] | AsyncIterable[str | Item]) -> AsyncIterator[str | Item]:
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item
