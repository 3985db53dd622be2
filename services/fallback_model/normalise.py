"""Undoes what hides a text from a reader that is not human, before any engine sees it.

`normalise` gives *views*: first the whole text as the engine reads it (compatibility forms, invisible characters and
look-alikes undone), then fragments in which something was decoded: leetspeak, letters set apart, words run together, base64,
hex, character codes, URL escapes, rot13, reversed text; nested twice at most. All views are scored and the worst one counts.

Every view knows where it comes from, so that a span in it can be given in characters of the text as sent. Time is linear in
the length of the text: fixed passes of regular expressions that cannot backtrack far, and a bounded amount of decoded text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.fallback_model.characters import CHANGES, Codes, codes_of, fold_lookalikes, runs, tables, text_of
from services.fallback_model.fragments import FINDERS, NOT_WITHIN, Source
from services.fallback_model.lexicon import NO_LETTER, Lexicon, letter_numbers

MOST_NESTING: Final = 2
MOST_FRAGMENTS: Final = 256
SPARE_CHARACTERS: Final = 4_000
"""All fragments of a text together are at most this much longer than the text: decoding cannot multiply the work."""

Offsets = NDArray[np.int32]


class View(msgspec.Struct, frozen=True):
    """A text to be scored.

    `starts`: for each character of `text` the character of the text as sent that it comes from; None: the same place.
    `region`: for a decoded fragment [start, end) of the text as sent, which then holds for every part of it.
    `disguised`: another view shows most of this one undone (look-alikes folded, or the decoded text decoded further).
    """

    text: str
    starts: Offsets | None = None
    region: tuple[int, int] | None = None
    transforms: tuple[str, ...] = ()
    disguised: bool = False

    def source(self, start: int, end: int) -> tuple[int, int]:
        """Where characters [start, end) of this view stand in the text as sent; `start < end` within the view."""
        if self.region is not None:
            return self.region
        if self.starts is None:
            return start, end
        return int(self.starts[start]), int(self.starts[end - 1]) + 1


class Normalised(msgspec.Struct, frozen=True):
    """`transforms`: what was undone, and how often. `complete`: False when there was more to decode than the bounds allow."""

    views: list[View]
    transforms: dict[str, int]
    complete: bool


def normalise(text: str, lexicon: Lexicon, *, spelt: bool) -> Normalised:
    """The views of a text of any Unicode characters.

    `spelt`: the engine's vocabulary is English, so every script is spelt in ASCII; else views keep their scripts.
    """
    found: Counter[str] = Counter()
    cleaned, starts = _clean(text, found)
    folded = fold_lookalikes(cleaned)
    if folded != cleaned:
        found["confusables"] = int((codes_of(folded) != codes_of(cleaned)).sum())
    views = [_whole(folded, starts, spelt, ())]
    if folded != cleaned:
        views.append(msgspec.structs.replace(_whole(cleaned, starts, spelt, ()), disguised=True))
    bounds = _Bounds(len(text) + SPARE_CHARACTERS)
    for piece in _fragments(folded, lexicon, MOST_NESTING, bounds):
        found.update(piece.transforms)
        first, last = piece.start, piece.end - 1
        region = (first, last + 1) if starts is None else (int(starts[first]), int(starts[last]) + 1)
        inner = _whole(fold_lookalikes(piece.text), None, spelt, piece.transforms)
        views.append(View(inner.text, region=region, transforms=piece.transforms, disguised=piece.disguised))
    kept = [view for index, view in enumerate(views) if index == 0 or view.text.strip()]
    return Normalised(kept, dict(found), not bounds.reached)


# --- the whole text --------------------------------------------------------------------------------------------------------


_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def _clean(text: str, found: Counter[str]) -> tuple[str, Offsets | None]:
    """Compatibility forms and invisible characters undone; the offsets are None where nothing moved."""
    if text.isascii() and not _CONTROL.search(text):
        return text, None
    codes = codes_of(text)
    cleaned, lengths = tables().clean.read(codes)
    if lengths is None and np.array_equal(cleaned, codes):
        return text, None
    changes = np.bincount(tables().change[codes], minlength=len(CHANGES)).tolist()
    found.update({name: number for name, number in zip(CHANGES, changes, strict=True) if name and number})
    return text_of(cleaned), None if lengths is None else _spread(lengths, None)


def _spread(lengths: Offsets, starts: Offsets | None) -> Offsets:
    """Offsets after character i became lengths[i] characters, on top of the offsets from before."""
    return np.repeat(np.arange(len(lengths), dtype=np.int32) if starts is None else starts, lengths)


_LONGEST_RUN: Final = 80
_RUN_PIECE: Final = 60


def _whole(text: str, starts: Offsets | None, spelt: bool, transforms: tuple[str, ...]) -> View:
    if not spelt or text.isascii():
        return View(text, starts, transforms=transforms)
    spelling, lengths = tables().latin.read(codes_of(text))
    if lengths is not None:
        starts = _spread(lengths, starts)
    cuts = _cuts(spelling)
    if len(cuts):
        # Scripts without spaces become words that no tokenizer takes (over a hundred letters is [UNK]): cut them.
        starts = np.arange(len(spelling), dtype=np.int32) if starts is None else starts
        spelling, starts = np.insert(spelling, cuts, ord(" ")), np.insert(starts, cuts, starts[cuts])
    return View(text_of(spelling), starts, transforms=transforms)


def _cuts(codes: Codes) -> NDArray[np.int64]:
    """Where runs of ASCII letters are to be cut for none to be too long; nowhere, where none is."""
    starts, ends = runs(letter_numbers(text_of(codes)) < NO_LETTER)
    if not (ends - starts > _LONGEST_RUN).any():
        return np.empty(0, dtype=np.int64)
    pieces = (ends - starts - 1) // _RUN_PIECE
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 1
    cuts: NDArray[np.int64] = np.repeat(starts, pieces) + nth * _RUN_PIECE
    return cuts


# --- fragments -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """`text` was decoded from characters [start, end) of the outer text."""

    start: int
    end: int
    text: str
    transforms: tuple[str, ...]
    disguised: bool = False


@dataclass
class _Bounds:
    """How much may still be decoded. `reached`: there was more than that."""

    characters: int
    fragments: int = MOST_FRAGMENTS
    reached: bool = False

    def take(self, characters: int) -> bool:
        """False, for good, from the first fragment on that there is no room for."""
        if self.fragments == 0 or characters > self.characters:
            self.reached = True
        else:
            self.fragments -= 1
            self.characters -= characters
        return not self.reached


def _fragments(text: str, lexicon: Lexicon, nesting: int, bounds: _Bounds, within: str = "") -> Iterator[_Piece]:
    """`within`: how `text` itself was decoded."""
    source = Source(text, lexicon)
    for name, find in FINDERS:
        if name in NOT_WITHIN.get(within, ()):
            continue
        for start, end, decoded in find(source):
            if not bounds.take(len(decoded)):
                return
            inner = list(_fragments(decoded, lexicon, nesting - 1, bounds, name)) if nesting > 1 else []
            further = sum(piece.end - piece.start for piece in inner if len(piece.transforms) == 1)
            yield _Piece(start, end, decoded, (name,), disguised=further * 2 > len(decoded))
            for piece in inner:
                yield _Piece(start, end, piece.text, (name, *piece.transforms), piece.disguised)
            if bounds.reached:
                return
