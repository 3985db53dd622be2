"""Batches of like length, made by processes of their own where there are processors to spare."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from services.fallback_model.training.tokens import CLS, PAD, SEP

T = TypeVar("T")
_MULTIPLE = 8
"""Of tokens in a row: the widths that GPUs multiply fast."""


@dataclass(frozen=True)
class Tokens:
    """`ids` and `mask`, int64 [rows, tokens]."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.ids.to(device, torch.int64, non_blocking=True), self.mask.to(device, torch.int64, non_blocking=True))


def padded(rows: list[list[int]], room: int) -> Tokens:
    """Rows of ids, cut at `room`, between the special tokens. Small types: they are sent from process to process."""
    longest = -(-(min(room, max(len(row) for row in rows)) + 2) // _MULTIPLE) * _MULTIPLE
    ids = torch.full((len(rows), longest), PAD, dtype=torch.int32)
    mask = torch.zeros((len(rows), longest), dtype=torch.uint8)
    for place, row in enumerate(rows):
        whole = torch.tensor([CLS, *row[:room], SEP], dtype=torch.int32)
        ids[place, : len(whole)] = whole
        mask[place, : len(whole)] = 1
    return Tokens(ids, mask)


def grouped(items: list[T], length: Callable[[T], int], most_tokens: int, most_rows: int, rng: random.Random) -> list[list[T]]:
    """Items sorted by length and cut where rows x longest reaches the budget; the groups in random order."""
    groups: list[list[T]] = []
    group: list[T] = []
    for item in sorted(items, key=length):
        if group and (length(item) * (len(group) + 1) > most_tokens or len(group) == most_rows):
            groups.append(group)
            group = []
        group.append(item)
    groups.append(group)
    rng.shuffle(groups)
    return groups


class _Stream(IterableDataset[T]):
    def __init__(self, make: Callable[[int], Iterator[T]], seed: int) -> None:
        self._make, self._seed = make, seed

    def __iter__(self) -> Iterator[T]:
        worker = get_worker_info()
        return self._make(self._seed + 10_000 * (0 if worker is None else worker.id + 1))


def feed(make: Callable[[int], Iterator[T]], seed: int, processes: int) -> Iterator[T]:
    """Endless: what `make(seed)` yields, from as many processes, each with a seed of its own, in turns (so in a fixed order)."""
    if not processes:
        return iter(_Stream(make, seed))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizers' threads and the fork would wait for each other
    return iter(
        DataLoader(
            _Stream(make, seed),
            batch_size=None,
            num_workers=processes,
            prefetch_factor=6,
            multiprocessing_context=multiprocessing.get_context("fork"),
            worker_init_fn=_alone,
        )
    )


def _alone(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
