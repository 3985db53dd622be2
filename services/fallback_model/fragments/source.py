"""A text in which fragments are looked for, and what more than one finder needs to know of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

from services.fallback_model.fragments.chunks import Chunks, chunks_of
from services.fallback_model.lexicon import Lexicon

FRAGMENT_CHARACTERS: Final = 480
"""Neighbouring pieces that need the same undoing are put together up to this length, about one window of the model."""

Found = Iterator[tuple[int, int, str]]
"""What was decoded, and from which characters [start, end) of the text."""


class Source:
    """See the module."""

    def __init__(self, text: str, lexicon: Lexicon) -> None:
        self.text = text
        self.lexicon = lexicon

    @functools.cached_property
    def chunks(self) -> Chunks:
        return chunks_of(self.text, self.lexicon)

    @functools.cached_property
    def words(self) -> list[str]:
        """What stands between blanks."""
        return self.text.split()

    @functools.cached_property
    def longest_word(self) -> int:
        """Characters without a blank in between. Where they are few, no expression for long runs need be tried."""
        return max(map(len, self.words), default=0)
