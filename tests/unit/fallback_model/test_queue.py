"""Windows that wait, and the batches that are made of them."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.fallback_model.engine import Scores
from services.fallback_model.queue import Item, Queue, Request, most_rows

MOST_TOKENS = 100


def item(length: int, done: asyncio.Future[Scores]) -> Item:
    request = Request(1, np.empty(1, np.float32), None, done, since=0.0)
    return Item(request, 0, np.zeros(length, np.int64), since=0.0, urgent=True)


def taken(*lengths: int) -> list[int]:
    """The lengths of the first batch of windows that came in this order."""
    loop = asyncio.new_event_loop()
    queue = Queue(lambda _: None)
    for length in lengths:
        queue.add(item(length, loop.create_future()))
    batch: list[Item] = []
    queue.fill(batch, MOST_TOKENS)
    return [len(each.ids) for each in batch]


def test_a_batch_is_made_of_what_comes_closest_in_length_to_the_oldest() -> None:
    # Taken as they came, 20, 24, 12 and 28 would be four, and a quarter of them padding.
    assert taken(20, 24, 12, 28, 20, 90) == [20, 20, 24]
    assert taken(20, 24, 28, 90) == [20, 24]  # to pad one costs more than to score it in another batch


def test_a_batch_that_is_half_full_takes_only_what_hardly_differs() -> None:
    assert taken(20, 24, 20, 20, 21, 19) == [20, 20, 20, 19]
    assert taken(20, 20, 20, 24) == [20, 20, 20]
    assert taken(8, 8, 8, 8, 8, 8, 8, 9, 8, 8, 8, 8, 8) == [8] * 12


def test_of_long_rows_a_batch_has_fewer_since_attention_grows_with_the_square() -> None:
    assert most_rows(32, 512) == 16  # by its tokens
    assert most_rows(192, 512) == 2
    assert most_rows(256, 512) == 1
    assert most_rows(512, 512) == most_rows(1024, 512) == 1  # there is always room for one
    assert most_rows(0, 512) == 512  # a text without any token, by a model without tokens of its own


@given(st.lists(st.tuples(st.integers(1, 120), st.booleans()), max_size=60))
def test_every_window_leaves_once_and_the_oldest_goes_first(windows: list[tuple[int, bool]]) -> None:
    loop = asyncio.new_event_loop()
    left: list[Item] = []
    queue = Queue(left.append)
    waiting = []
    for length, abandoned in windows:
        done: asyncio.Future[Scores] = loop.create_future()
        if abandoned:
            done.cancel()
        waiting.append(item(length, done))
        queue.add(waiting[-1])
    batched = []
    while True:
        oldest = queue.oldest()
        batch: list[Item] = []
        queue.fill(batch, MOST_TOKENS)
        if not batch:
            break
        assert batch[0] is oldest
        lengths = [len(each.ids) for each in batch]
        assert len(batch) <= most_rows(max(lengths), MOST_TOKENS)
        assert max(lengths) - min(lengths) <= max(4, min(lengths) // 4)
        batched += batch
    loop.close()
    assert len(queue) == 0
    assert sorted(map(id, batched)) == sorted(id(each) for each in waiting if not each.abandoned)
    assert sorted(map(id, left)) == sorted(map(id, waiting))
