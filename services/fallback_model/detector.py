"""A model beside an event loop: texts are prepared in threads, and their windows scored in common batches."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import msgspec

from libs.common import tracing
from services.fallback_model import metrics
from services.fallback_model.batcher import Batcher, Busy
from services.fallback_model.engine import Scores
from services.fallback_model.model import Detection, Located, Model, Prepared, milliseconds
from services.fallback_model.preparer import Preparer

_LEARNING: Final = 0.05
_BULK_PART: Final = 16
"""Texts of one message that are prepared in one go: some milliseconds of work, and a message has several such parts."""
_FOR_A_THREAD: Final = (("portcullis.queue", "prepare"),)


class Judged(msgspec.Struct, frozen=True):
    """What became of one text of many, and after how many seconds."""

    outcome: Detection | Exception
    seconds: float


class Detector:
    """A model served beside an event loop: preparation in threads, windows of many texts in common batches.

    Bulk work has threads, a queue and batches of its own, over the same sessions (onnxruntime's may run in several threads at
    once). The threads that score give way, so that a single text waits neither behind a batch in the queue nor for one to end.
    Those that prepare do not: they hold the interpreter's lock, and whoever is pushed aside with it holds up everybody.
    """

    def __init__(
        self,
        model: Model,
        make_batcher: Callable[[Model], Batcher],
        make_bulk_batcher: Callable[[Model], Batcher],
        preparing_threads: int,
    ) -> None:
        self.model = model
        self._single = _Lane(make_batcher(model), Preparer(model.prepare, preparing_threads, "prepare"))
        self._bulk = _Lane(make_bulk_batcher(model), Preparer(model.prepare, 1, "prepare-bulk"))

    async def detect(self, text: str, *, detailed: bool = False, seconds: float = math.inf) -> Detection:
        """Judges one text within `seconds`, after which the caller cancels it.

        Raises `Busy` at once when its queue is full or it would be late; a failure is an exception, never a verdict.
        """
        lane = self._single
        lane.batcher.check(seconds)
        began = time.perf_counter()
        with lane.expecting((text,)):
            (prepared,) = await lane.preparer.prepare((text,))
        if isinstance(prepared, Exception):
            raise prepared
        ready = time.perf_counter()
        lane.learn(prepared)
        tracing.record("queue", prepared.began - began, ago=ready - prepared.began, own=_FOR_A_THREAD)
        tracing.record("tokenize", ready - prepared.began, own=(("portcullis.normalise_ms", prepared.timings["normalise"]),))
        scores = await lane.batcher.score(prepared.rows, urgent=prepared.urgent, seconds=seconds - (ready - began))
        return await self._judged(lane, prepared, scores, began, ready, detailed=detailed)

    async def detect_many(self, texts: Sequence[str], *, detailed: bool = False, seconds: float = math.inf) -> list[Judged]:
        """Judges many texts side by side, as bulk work. What becomes of one is no matter of the others: where `detect` would
        have raised an exception, that is its outcome."""
        parts = (texts[start : start + _BULK_PART] for start in range(0, len(texts), _BULK_PART))
        judged = await asyncio.gather(*(self._detect_part(part, detailed=detailed, seconds=seconds) for part in parts))
        return [each for part in judged for each in part]

    async def _detect_part(self, texts: Sequence[str], *, detailed: bool, seconds: float) -> list[Judged]:
        """Texts that are prepared in one go."""
        tracing.enter("")  # a task of its own; the steps of each text would be more than all the rest of the trace
        lane = self._bulk
        began = time.perf_counter()
        try:
            lane.batcher.check(seconds)
        except Busy as busy:
            return [Judged(busy, 0.0)] * len(texts)
        with lane.expecting(texts):
            prepared = await lane.preparer.prepare(texts)
        ready = time.perf_counter()
        waiting = [self._scores(lane, each, seconds - (ready - began)) for each in prepared]

        async def judge(one: Prepared | Exception, scores: asyncio.Future[Scores]) -> Judged:
            try:
                if isinstance(one, Exception):
                    raise one
                outcome = await self._judged(lane, one, await scores, began, ready, detailed=detailed)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this text's outcome
                return Judged(error, time.perf_counter() - began)
            return Judged(outcome, time.perf_counter() - began)

        judging = map(judge, prepared, waiting)
        try:
            # Only what is explained asks the model again, and that one text need not wait for another.
            return await asyncio.gather(*judging) if detailed else [await each for each in judging]
        finally:
            for scores in waiting:
                scores.cancel()

    def _scores(self, lane: _Lane, prepared: Prepared | Exception, seconds: float) -> asyncio.Future[Scores]:
        """What a text waits for; what could not be prepared, for ever."""
        if isinstance(prepared, Exception):
            return asyncio.get_running_loop().create_future()
        lane.learn(prepared)
        try:
            return lane.batcher.submit(prepared.rows, urgent=prepared.urgent, seconds=seconds).done
        except Busy as busy:
            refused: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
            refused.set_exception(busy)
            return refused

    async def _judged(
        self, lane: _Lane, prepared: Prepared, scores: Scores, began: float, ready: float, *, detailed: bool
    ) -> Detection:
        scored = time.perf_counter()
        detection = self.model.judge(prepared, scores)
        metrics.count_text(bulk=lane is self._bulk, truncated=detection.coverage.truncated)
        if not detailed:
            return detection
        located: Located | None = None
        logits: list[float] = []
        if detection.probability >= detection.threshold:
            loop = asyncio.get_running_loop()
            located = await loop.run_in_executor(lane.preparer.threads, self.model.locate, prepared, scores)
            if located.rows:
                logits = (await lane.batcher.score(located.rows, urgent=prepared.urgent)).logits.tolist()
        timings = {
            "waited": round((ready - began) * 1000 - sum(prepared.timings.values()), 3),
            "model": milliseconds(ready, scored),
        }
        if located is not None:
            timings["narrow"] = milliseconds(scored, time.perf_counter())
        return self.model.explain(detection, prepared, scores, located, logits, timings)

    @property
    def waiting(self) -> int:
        """Single texts that wait for their first batch."""
        return self._single.batcher.waiting_requests

    @property
    def waiting_bulk(self) -> int:
        return self._bulk.batcher.waiting_requests

    async def close(self) -> None:
        """Finishes what was accepted, then frees the threads. Call it after the last `detect` was started."""
        for lane in (self._single, self._bulk):
            await lane.batcher.close()
            lane.preparer.close()


@dataclass
class _Lane:
    """Where texts are prepared and scored. `tokens_per_character`: of late; most texts are prose in one language or another."""

    batcher: Batcher
    preparer: Preparer
    tokens_per_character: float = 0.25

    def expecting(self, texts: Sequence[str]) -> AbstractContextManager[None]:
        """While `texts` are being prepared, their tokens count as if they waited already."""
        return self.batcher.expecting(sum(map(len, texts)) * self.tokens_per_character)

    def learn(self, prepared: Prepared) -> None:
        """What became of a text is what may be expected of the next."""
        tokens = sum(map(len, prepared.rows))
        self.tokens_per_character += _LEARNING * (tokens / max(1, len(prepared.text)) - self.tokens_per_character)
        metrics.NORMALISE.observe(prepared.timings["normalise"] / 1000)
        metrics.TOKENISE.observe(prepared.timings["tokenise"] / 1000)
