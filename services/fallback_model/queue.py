"""Windows that wait for a session, found by their age and by their length."""

from __future__ import annotations

from asyncio import Future
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.fallback_model.engine import Scores
from services.fallback_model.windows import Ids

_SLACK: Final = 4
"""Windows whose lengths differ by at most this many tokens, or by a quarter, share a batch. A batch of its own costs a window as
much as some fifteen tokens, and it may still find others of its length."""
_CLOSE: Final = 16
"""A batch that is half full takes no more than what differs from its first window by this part of it: half a batch is scored as
fast by the token as a whole one, and without padding."""
_MOST_PAIRS: Final = 80_000
"""Pairs of tokens that attend to each other, in all rows of a batch. Attention keeps a number for each of them in each of its
heads, here 12 of 4 bytes: about as many as a processor has in a cache of its own. Two windows of 256 tokens at a time cost 1.06
of what they cost one after the other."""


def most_rows(longest: int, most_tokens: int) -> int:
    """How many rows of so many tokens make a batch, at least 1."""
    longest = max(1, longest)
    return max(1, min(most_tokens // longest, _MOST_PAIRS // longest**2))


@dataclass(eq=False)
class Request:
    """The windows of one text, which wait since `since`. `left`: those that have no score yet."""

    left: int
    logits: np.ndarray
    threats: np.ndarray | None
    done: Future[Scores]
    since: float
    begun: bool = False
    taken: float | None = None
    """When its first window left the queue."""
    batch_rows: int = 0
    """Of the batch that its first window was in."""


@dataclass(eq=False)
class Item:
    """One window: row `row` of its request, which waits since `since`."""

    request: Request
    row: int
    ids: Ids
    since: float
    urgent: bool
    waits: bool = True

    @property
    def abandoned(self) -> bool:
        """Cancelled or failed: nobody waits for it."""
        return self.request.done.done()


class Queue:
    """A batch is made of the oldest window and those that come closest to its length, so that little of it is padding.

    To take a window costs the same however many wait: each is in a line of all, and in a line of those of its length. Of one
    length the oldest goes first, so a window that leaves is always the first of its length; the line of all is tidied as its
    head moves on.
    """

    def __init__(self, leaves: Callable[[Item], None]) -> None:
        """`leaves` is told of every window that does not wait any more."""
        self._leaves = leaves
        self._by_age: deque[Item] = deque()
        self._by_length: dict[int, deque[Item]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Windows that wait; abandoned ones may be among them."""
        return self._count

    def add(self, item: Item) -> None:
        self._by_age.append(item)
        self._by_length.setdefault(len(item.ids), deque()).append(item)
        self._count += 1

    def oldest(self) -> Item | None:
        while self._by_age:
            item = self._by_age[0]
            if item.waits and not item.abandoned:
                return item
            self._by_age.popleft()
            if item.waits:
                self._leave(item)
        return None

    def fill(self, batch: list[Item], most_tokens: int) -> None:
        """Add to `batch` what is alike, as many rows as `most_rows` has it; the oldest if it is empty."""
        if not batch:
            oldest = self.oldest()
            if oldest is None:
                return
            self._leave(oldest)
            batch.append(oldest)
        lengths = [len(item.ids) for item in batch]
        middle, shortest, longest = lengths[0], min(lengths), max(lengths)
        for length in _outwards(middle, max(_SLACK, middle // 4)):
            if 2 * len(batch) >= most_rows(longest, most_tokens) and abs(length - middle) > middle // _CLOSE:
                return
            shortest_then, longest_then = min(shortest, length), max(longest, length)
            if longest_then - shortest_then > max(_SLACK, shortest_then // 4):
                continue
            while len(batch) < most_rows(longest_then, most_tokens) and (item := self._take(length)) is not None:
                batch.append(item)
                shortest, longest = shortest_then, longest_then
            if len(batch) >= most_rows(longest, most_tokens):
                return

    def _take(self, length: int) -> Item | None:
        """The oldest of so many tokens."""
        while same := self._by_length.get(length):
            item = same[0]
            self._leave(item)
            if not item.abandoned:
                return item
        return None

    def _leave(self, item: Item) -> None:
        same = self._by_length[len(item.ids)]
        same.popleft()
        if not same:
            del self._by_length[len(item.ids)]
        item.waits = False
        self._count -= 1
        self._leaves(item)


def _outwards(middle: int, reach: int) -> list[int]:
    """`middle`, then what is next to it on both sides, the shorter first: it makes nobody else longer."""
    lengths = [middle]
    for distance in range(1, reach + 1):
        lengths += (middle - distance, middle + distance)
    return lengths
