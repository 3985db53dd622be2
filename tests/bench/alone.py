"""onnxruntime and nothing else, on as many threads as there are processors: the limit of whatever asks the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from services.fallback_model import processors
from services.fallback_model.model import Model
from services.fallback_model.paths import DEFAULT_MODEL
from services.fallback_model.windows import Ids

BATCH_TOKENS = (128, 256, 512, 1024, 2048)
TURNS = 5
"""In which the sizes of batches are compared: a single one says little on a noisy machine."""


def by_tokens(rows: Sequence[Ids], tokens: int) -> list[list[Ids]]:
    """Batches of neighbours of at most so many tokens each, padding included; a longer row has one of its own."""
    batches: list[list[Ids]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = len(row)
        batches[-1].append(row)
    return batches


class Alone:
    """The shipped model's network, with one session for each processor."""

    def __init__(self) -> None:
        threads = processors.usable()
        self._model = Model(DEFAULT_MODEL, threads, 1)
        self._pool = ThreadPoolExecutor(threads)

    def rows(self, batch: list[str]) -> list[Ids]:
        """What the network is given, sorted by length; preparing it is not counted."""
        return sorted((row for text in batch for row in self._model.prepare(text).rows), key=len)

    def each(self, batch: list[str]) -> list[list[Ids]]:
        """The rows of each text by themselves."""
        return [self._model.prepare(text).rows for text in batch]

    def best_tokens(self, rows: list[Ids]) -> int:
        """The size of batches that is fastest here, by the median of some turns."""
        spent: dict[int, list[float]] = {tokens: [] for tokens in BATCH_TOKENS}
        for _ in range(TURNS):
            for tokens, seconds in spent.items():
                seconds.append(self.seconds(by_tokens(rows, tokens)))
        return min(spent, key=lambda tokens: statistics.median(spent[tokens]))

    def seconds(self, batches: Sequence[list[Ids]]) -> float:
        """Seconds that these batches take, all sessions at work."""
        free = list(self._model.sessions)

        def run(one: list[Ids]) -> None:
            session = free.pop()
            session.run(one)
            free.append(session)

        began = time.perf_counter()
        list(self._pool.map(run, batches))
        return time.perf_counter() - began

    def close(self) -> None:
        self._pool.shutdown()
