"""Prepares texts in threads, several in one go where several wait: to hand one to a thread costs as much as to prepare it."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from services.fallback_model.model import Prepared

TEXTS_TOGETHER: Final = 8
"""At most: a few milliseconds of work, after which the sessions have something to do."""
_CHARACTERS_TOGETHER: Final = 4_000
"""About so many, so that a short text does not wait for a long document that came just before it."""

Outcome = Prepared | Exception
_Asked = tuple[Sequence[str], "asyncio.Future[list[Outcome]]"]


class Preparer:
    """Create it in the event loop that uses it. Who asked first is served first."""

    def __init__(self, prepare: Callable[[str], Prepared], threads: int, name: str) -> None:
        """`threads` may be lent other work on texts."""
        self._prepare = prepare
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._idle = threads
        self._asked: deque[_Asked] = deque()
        self._begins = False

    def prepare(self, texts: Sequence[str]) -> asyncio.Future[list[Outcome]]:
        """For each text what became of it, in their order: where it could not be prepared, the exception."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Outcome]] = loop.create_future()
        self._asked.append((texts, done))
        if self._idle and not self._begins:
            # A turn of the loop later: what comes with the same read from the bus is prepared with it.
            self._begins = True
            loop.call_soon(self._begin)
        return done

    def close(self) -> None:
        """Frees the threads once what was asked is done."""
        self.threads.shutdown(wait=False)

    def _begin(self) -> None:
        self._begins = False
        while self._idle and (together := self._take()):
            self._idle -= 1
            texts = [text for part, _ in together for text in part]
            work = asyncio.get_running_loop().run_in_executor(self.threads, self._each, texts)
            work.add_done_callback(functools.partial(self._hand_out, together))

    def _take(self) -> list[_Asked]:
        """The next to be prepared in one go; who has gone is passed over."""
        together: list[_Asked] = []
        count = characters = 0
        while self._asked:
            texts, done = self._asked[0]
            if not done.done():
                count, characters = count + len(texts), characters + sum(map(len, texts))
                if together and (count > TEXTS_TOGETHER or characters > _CHARACTERS_TOGETHER):
                    break
                together.append(self._asked[0])
            self._asked.popleft()
        return together

    def _each(self, texts: Sequence[str]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for text in texts:
            try:
                outcomes.append(self._prepare(text))
            except Exception as error:  # noqa: BLE001  # handed to whoever asked for this text
                outcomes.append(error)
        return outcomes

    def _hand_out(self, together: list[_Asked], work: asyncio.Future[list[Outcome]]) -> None:
        self._idle += 1
        outcomes = iter(work.result())
        for texts, done in together:
            own = list(itertools.islice(outcomes, len(texts)))
            if not done.done():
                done.set_result(own)
        self._begin()
