"""Letters that stand for others, or backwards: rot13 and reversed text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from services.fallback_model.fragments.chunks import Chunks
from services.fallback_model.fragments.source import FRAGMENT_CHARACTERS, Found, Source


def _joined_chunks(chunks: Chunks, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where the wanted chunks stand, neighbours put together."""
    if not wanted.any():
        return
    whole: tuple[int, int] | None = None
    for start, end in zip(chunks.starts[wanted].tolist(), chunks.ends[wanted].tolist(), strict=True):
        if whole and end - whole[0] <= FRAGMENT_CHARACTERS and start == whole[1]:
            whole = (whole[0], end)
            continue
        if whole:
            yield whole
        whole = (start, end)
    if whole:
        yield whole


def find_rot13(source: Source) -> Found:
    for start, end in _joined_chunks(source.chunks, source.chunks.rot13):
        yield start, end, codecs.encode(source.text[start:end], "rot13")


def find_reversed(source: Source) -> Found:
    for start, end in _joined_chunks(source.chunks, source.chunks.reversed):
        yield start, end, source.text[start:end][::-1]
