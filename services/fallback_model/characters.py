"""How one character is read: compatibility forms undone, invisible characters dropped, look-alikes and scripts made ASCII.

Two readings are kept per character:

- *clean*: NFKC of the character, nothing for what has no shape of its own (zero-width, bidi controls, variation
  selectors); a tag character (U+E0020-E007E) becomes the ASCII character it shadows, since some models read it as such.
- *latin*: the clean character spelt in ASCII by `anyascii`. The base model's vocabulary is English, so a script it
  cannot spell would otherwise arrive as [UNK] or as single letters; transliterated, every script reaches it as pieces it
  has embeddings for. Ideographs are set apart by spaces, one syllable each.

Both are tables over all of Unicode, built once, and a text is read with a few array operations: the time depends on its
length, not on the characters that it is made of.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from anyascii import anyascii
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
"""A text as its code points."""

_TAGS: Final = range(0xE0020, 0xE007F)
_REPLACEMENT: Final = "�"
MOST_GROWTH: Final = 4
"""Characters that one character may become when cleaned."""
MOST_SPELT: Final = 10
"""Characters that one character may become when spelt."""
_CODE_POINTS: Final = sys.maxunicode + 1
_SEVERAL: Final = 3


def warm() -> None:
    """Builds the tables, half a second of work, so that the first text is read as fast as the next."""
    tables()


def codes_of(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def text_of(codes: Codes) -> str:
    return codes.tobytes().decode("utf-32-le", "surrogatepass")


def _is_invisible(char: str, code: int) -> bool:
    if 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:  # variation selectors
        return True
    if code in (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0, 0x2800):
        return True  # grapheme joiner, Hangul and Khmer fillers, Mongolian selectors, blank braille: no shape at all
    category = unicodedata.category(char)
    return category == "Cf" or (category == "Cc" and char not in "\t\n\r\v\f")


def _is_unassigned(char: str) -> bool:
    return unicodedata.category(char) in ("Cn", "Co")


def clean_character(char: str) -> str:
    """The reading of one character for any model. A lone surrogate, which no tokenizer takes, becomes U+FFFD."""
    code = ord(char)
    if code in _TAGS:
        return chr(code - 0xE0000)
    if 0xD800 <= code <= 0xDFFF:
        return _REPLACEMENT
    if _is_invisible(char, code):
        return ""
    reading = unicodedata.normalize("NFKC", char)
    # A few ligatures of whole phrases expand to as many as 18 characters; growth is bounded, so they stay as they are.
    return reading if len(reading) <= MOST_GROWTH else char


def latin_character(char: str) -> str:
    """The reading of one character for a model with an English vocabulary: ASCII, or nothing."""
    cleaned = clean_character(char)
    if not cleaned or cleaned.isascii():
        return cleaned
    if _is_unassigned(cleaned[0]):
        return " "
    code = ord(cleaned[0])
    if 0xAC00 <= code <= 0xD7A3:  # a Hangul syllable is spelt whole, not by its jamo
        return anyascii(cleaned)
    out = []
    for part in unicodedata.normalize("NFKD", cleaned) if code < 0x0900 or code > 0x109F else cleaned:
        if part.isascii():
            out.append(part)
        elif unicodedata.category(part) != "Mn" or _is_vowel_sign(part):
            spelt = anyascii(part)
            if spelt[:1] == ":" and len(spelt) > 1:  # anyascii names an emoji; a text of emoji would grow tenfold
                spelt = " "
            out.append(f" {spelt} " if _is_ideograph(part) else spelt)
    return "".join(out)[:MOST_SPELT]


def _is_ideograph(char: str) -> bool:
    code = ord(char)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF


def _is_vowel_sign(mark: str) -> bool:
    """Vowel signs of the scripts of India and South-East Asia are marks by category, yet they are spelt."""
    return 0x0900 <= ord(mark) <= 0x109F or 0x1780 <= ord(mark) <= 0x17FF


class Table:
    """A reading, of any length, for every code point."""

    def __init__(self, readings: dict[int, str], other: int | None) -> None:
        """`other`: how a code point without an entry in `readings` is read; None: as itself."""
        spelt = codes_of("".join(readings.values()))
        lengths = np.fromiter(map(len, readings.values()), dtype=np.int32, count=len(readings))
        codes = np.fromiter(readings, dtype=np.int64, count=len(readings))
        plain = np.arange(_CODE_POINTS, dtype=np.uint32)
        # The reading of code point c is _pool[_start[c] : _start[c] + _length[c]]; the pool begins with every code point itself.
        self._pool = np.concatenate([plain, spelt])
        self._start = plain.astype(np.int32) if other is None else np.full(_CODE_POINTS, other, dtype=np.int32)
        self._start[codes] = _CODE_POINTS + np.cumsum(lengths, dtype=np.int32) - lengths
        self._length = np.ones(_CODE_POINTS, dtype=np.uint8)
        self._length[codes] = lengths

    def read(self, codes: Codes) -> tuple[Codes, NDArray[np.int32] | None]:
        """The readings of a text's characters one after the other, and the length of each; None where all are 1."""
        start, length = self._start[codes], self._length[codes]
        if (length == 1).all():
            return self._pool[start], None
        lengths = length.astype(np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        places = np.repeat(start - ends + lengths, lengths)
        places += np.arange(len(places), dtype=np.int32)
        return self._pool[places], lengths


@dataclass(frozen=True)
class Tables:
    """What is known of every code point; the arrays have one entry for each.

    `change`: what reading it clean undoes, as an index into `CHANGES`.
    `twin`: the ASCII letter or digit that it can be mistaken for (Unicode's confusables table), 0 for none.
    `letter`: whether it is part of a word: letters and the numbers that are no decimal digits.
    """

    clean: Table
    latin: Table
    change: NDArray[np.uint8]
    twin: NDArray[np.uint8]
    letter: NDArray[np.bool_]


CHANGES: Final = ("", "tag_characters", "bidi", "zero_width", "control_characters", "nfkc")


@functools.cache
def tables() -> Tables:
    # What is not assigned, or for private use, stands for itself and is spelt as a blank: no entry needed.
    living = [code for code in range(_CODE_POINTS) if unicodedata.category(chr(code)) not in ("Cn", "Co")]
    clean = {code: clean_character(chr(code)) for code in living}
    change = np.zeros(_CODE_POINTS, dtype=np.uint8)
    for code, reading in clean.items():
        if reading != chr(code):
            change[code] = CHANGES.index(_change(code, reading))
    return Tables(
        clean=Table({code: reading for code, reading in clean.items() if reading != chr(code)}, None),
        latin=Table({code: latin_character(chr(code)) for code in living}, ord(" ")),
        change=change,
        twin=_twins(),
        letter=_marked(code for code in living if chr(code).isalnum() and not chr(code).isdecimal()),
    )


def _marked(codes: Iterable[int]) -> NDArray[np.bool_]:
    marks = np.zeros(_CODE_POINTS, dtype=np.bool_)
    marks[list(codes)] = True
    return marks


def _change(code: int, reading: str) -> str:
    if 0xE0000 <= code <= 0xE007F:
        return "tag_characters"
    if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x200E, 0x200F, 0x061C):
        return "bidi"
    if not reading:
        return "zero_width" if unicodedata.category(chr(code)) != "Cc" else "control_characters"
    # Typographic forms (…, ½, a no-break space) are no disguise; letters and digits in other clothes are.
    return "nfkc" if reading.isascii() and reading.isalnum() else ""


def _twins() -> NDArray[np.uint8]:
    # Imported when the tables are built, and not before: its data is a megabyte of JSON.
    from confusable_homoglyphs.confusables import confusables_data

    twins = np.zeros(_CODE_POINTS, dtype=np.uint8)
    for char, others in confusables_data.items():
        if len(char) != 1 or char.isascii() or not char.isalpha():
            continue
        for other in others:
            if len(other["c"]) == 1 and other["c"].isascii() and other["c"].isalnum():
                twins[ord(char)] = ord(other["c"])
                break
    return twins


def fold_lookalikes(text: str) -> str:
    """Replaces letters that only look Latin by the Latin ones; the length stays the same.

    A word that mixes such letters with ASCII ones is always folded. A word made of nothing but look-alikes may be an honest
    word of another script, so it is folded only where the text around it is mostly ASCII letters or mixes scripts within
    several words, which no honest text does.
    """
    if text.isascii():
        return text
    codes = codes_of(text)
    twins = tables().twin[codes]
    if not twins.any():
        return text
    letters = tables().letter[codes]
    starts, ends = runs(letters)
    latin = letters & (codes < 128)
    foreign = letters & (codes >= 128)
    with_latin, with_foreign = holds(latin, starts, ends), holds(foreign, starts, ends)
    mixed = with_latin & with_foreign
    folded = mixed
    if latin.sum() * 2 > len(text) or _are_several(text, starts[mixed], ends[mixed]):
        folded = mixed | (with_foreign & ~holds(foreign & (twins == 0), starts, ends))
    inside = np.zeros(len(codes), dtype=np.bool_)
    inside[letters] = np.repeat(folded, ends - starts)
    return text_of(np.where(inside & (twins != 0), twins, codes))


def runs(marks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each run of True starts, and where it ends (exclusive)."""
    padded = np.zeros(len(marks) + 2, dtype=np.bool_)
    padded[1:-1] = marks
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges[::2], edges[1::2]


def holds(marks: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether there is a True in each [start, end)."""
    before = np.concatenate([[0], np.cumsum(marks, dtype=np.int32)])
    found: NDArray[np.bool_] = before[ends] > before[starts]
    return found


def _are_several(text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
    words = set()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        words.add(text[start:end])
        if len(words) >= _SEVERAL:
            return True
    return False


def spell(text: str) -> str:
    """The text as a model with an English vocabulary reads it: look-alikes folded, then every character spelt in ASCII."""
    return text if text.isascii() else text_of(tables().latin.read(codes_of(fold_lookalikes(text)))[0])
