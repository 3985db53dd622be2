"""`with within(seconds):`: `asyncio.timeout` for what nearly always ends in time.

A request is under several time limits, and hardly ever over one. A timer of the event loop for each costs more than the limit
is worth: to make and to cancel one takes as long as to decode a message. Here all limits that end in the same hundredth of a
second share a timer, and to leave in time is to leave a set.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

GRAIN_SECONDS: Final = 0.01
"""A limit is kept to so much, and never early. Of two that must not end together, one has to be longer by more than this."""


class _Wheel:
    """The limits of one event loop by the grain of its time in which they end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: dict[int, set[within]] = {}

    def add(self, limit: within, seconds: float) -> set[within]:
        """The set that `limit` leaves when it is not needed any more."""
        grain = int((self.loop.time() + seconds) / GRAIN_SECONDS) + 1
        due = self._due.get(grain)
        if due is None:
            due = self._due[grain] = set()
            self.loop.call_at(grain * GRAIN_SECONDS, self._expire, grain)
        due.add(limit)
        return due

    def _expire(self, grain: int) -> None:
        for limit in self._due.pop(grain):
            limit.expire()


_wheel: _Wheel | None = None


def _wheel_of(loop: asyncio.AbstractEventLoop) -> _Wheel:
    # Of the loop that asked last: a process has one, and where tests have had others, theirs go with them.
    global _wheel
    wheel = _wheel
    if wheel is None or wheel.loop is not loop:
        wheel = _wheel = _Wheel(loop)
    return wheel


class within:  # noqa: N801  # used like a function
    """Cancels what is in the block when `seconds` are over, and raises TimeoutError in place of that cancellation.

    One block for each object, in a task. As with `asyncio.timeout`, whoever cancels the task from outside has it cancelled.
    """

    __slots__ = ("_cancelling", "_due", "_expired", "_seconds", "_task")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._due = _wheel_of(loop).add(self, self._seconds)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._expired:
            self._due.discard(self)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        self._expired = True
        self._task.cancel()
