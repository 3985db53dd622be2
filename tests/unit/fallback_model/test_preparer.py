"""Texts that come together are prepared in one go, in their order, and what becomes of one is no matter of the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from services.fallback_model.model import Prepared
from services.fallback_model.normalise import Normalised
from services.fallback_model.preparer import TEXTS_TOGETHER, Preparer


class Work:
    """Prepares nothing; keeps what it was given, waits while it is held, and fails on "bad"."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, text: str) -> Prepared:
        self.free.wait(10)
        self.seen.append((text, threading.get_ident()))
        if text == "bad":
            raise ValueError(text)
        return Prepared(text, Normalised([], {}, complete=True), 0, [], [], {})

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.seen]


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.free.set()


async def test_each_gets_its_own_in_their_order(work: Work) -> None:
    preparer = Preparer(work, 2, "test")
    asked = [preparer.prepare([f"{number}", f"{number}b"][: 1 + number % 2]) for number in range(50)]
    for number, outcomes in enumerate(await asyncio.gather(*asked)):
        texts = [outcome.text for outcome in outcomes if isinstance(outcome, Prepared)]
        assert texts == [f"{number}", f"{number}b"][: 1 + number % 2]
    preparer.close()


async def test_a_text_that_fails_is_no_matter_of_the_others(work: Work) -> None:
    preparer = Preparer(work, 1, "test")
    good, both = await asyncio.gather(preparer.prepare(["good"]), preparer.prepare(["bad", "fine"]))
    assert isinstance(good[0], Prepared)
    assert isinstance(both[0], ValueError)
    assert isinstance(both[1], Prepared)
    preparer.close()


async def test_what_comes_together_is_one_piece_of_work(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(work, 2, "test")
    handed: list[list[str]] = []
    loop = asyncio.get_running_loop()
    run = loop.run_in_executor

    def handing(threads: ThreadPoolExecutor, each: Callable[[list[str]], Any], texts: list[str]) -> asyncio.Future[Any]:
        handed.append(texts)
        return run(threads, each, texts)

    monkeypatch.setattr(loop, "run_in_executor", handing)
    long = "x" * 5_000
    singles = [f"{number}" for number in range(TEXTS_TOGETHER + 1)]
    await asyncio.gather(*(preparer.prepare([text]) for text in [*singles, long, "after"]))
    assert handed == [singles[:TEXTS_TOGETHER], singles[TEXTS_TOGETHER:], [long], ["after"]]
    preparer.close()


async def test_who_has_gone_is_passed_over_and_nobody_waits_for_him(work: Work) -> None:
    preparer = Preparer(work, 1, "test")
    work.free.clear()
    first = preparer.prepare(["first"])
    await asyncio.sleep(0)  # the one thread has it now
    gone, last = preparer.prepare(["gone"]), preparer.prepare(["last"])
    gone.cancel()
    first.cancel()
    work.free.set()
    (outcome,) = await last
    assert isinstance(outcome, Prepared)
    assert work.texts == ["first", "last"]
    preparer.close()
