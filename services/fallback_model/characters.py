"""How one character is read: compatibility forms undone, invisible characters dropped, look-alikes and scripts made ASCII.

Two readings are kept per character:

- *clean*: NFKC of the character, nothing for what has no shape of its own (zero-width, bidi controls, variation
  selectors); a tag character (U+E0020-E007E) becomes the ASCII character it shadows, since some models read it as such.
- *latin*: the clean character spelt in ASCII by `anyascii`. The base model's vocabulary is English, so a script it
  cannot spell would otherwise arrive as [UNK] or as single letters; transliterated, every script reaches it as pieces it
  has embeddings for. Ideographs are set apart by spaces, one syllable each.

Both are tables filled on first use, so that reading a text costs one table look-up per character.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from typing import Final

from anyascii import anyascii

_TAGS: Final = range(0xE0020, 0xE007F)
_REPLACEMENT: Final = "�"
MOST_GROWTH: Final = 4
"""Characters that one character may become when cleaned."""
MOST_SPELT: Final = 10
"""Characters that one character may become when spelt."""
_NO_LETTERS: Final = bytes(code for code in range(128) if not chr(code).isalpha())
_LATIN_LETTERS: Final = frozenset(string.ascii_letters)
_SEVERAL: Final = 3


def warm() -> None:
    """Fills both tables for living scripts, so that the first text in one is read as fast as the next."""
    for code in (*range(0x20, 0xD800), *range(0xE000, 0x20000)):
        CLEAN[code]
        LATIN[code]


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


class _Table(dict[int, str]):
    """Code point to reading, filled on first use; at most one entry per code point of Unicode."""

    def __init__(self, latin: bool) -> None:
        super().__init__()
        self._latin = latin

    def __missing__(self, code: int) -> str:
        reading = latin_character(chr(code)) if self._latin else clean_character(chr(code))
        self[code] = reading
        return reading


CLEAN: Final = _Table(latin=False)
LATIN: Final = _Table(latin=True)


@functools.cache
def lookalikes() -> dict[str, str]:
    """Non-ASCII letter → the ASCII letter or digit it can be mistaken for (Unicode's confusables table)."""
    # Loaded on first need: the table is a megabyte, and plain English never asks for it.
    from confusable_homoglyphs.confusables import confusables_data

    table: dict[str, str] = {}
    for char, twins in confusables_data.items():
        if len(char) != 1 or char.isascii() or not char.isalpha():
            continue
        for twin in twins:
            if len(twin["c"]) == 1 and twin["c"].isascii() and twin["c"].isalnum():
                table[char] = twin["c"]
                break
    return table


_LETTERS: Final = re.compile(r"[^\W\d_]+")


def fold_lookalikes(text: str) -> str:
    """Replaces letters that only look Latin by the Latin ones; the length stays the same.

    A word that mixes such letters with ASCII ones is always folded. A word made of nothing but look-alikes may be an honest
    word of another script, so it is folded only where the text around it is mostly ASCII letters or mixes scripts within
    several words, which no honest text does.
    """
    if text.isascii():
        return text
    twins = lookalikes()
    if twins.keys().isdisjoint(text):
        return text
    table = str.maketrans(twins)
    known: dict[str, str] = {}
    ascii_letters = len(text.encode("ascii", "ignore").translate(None, _NO_LETTERS))
    words = set(_LETTERS.findall(text))
    mixed_words = sum(not word.isascii() and not _LATIN_LETTERS.isdisjoint(word) for word in words)
    suspicious = ascii_letters * 2 > len(text) or mixed_words >= _SEVERAL

    def fold(match: re.Match[str]) -> str:
        word = match[0]
        if word.isascii():
            return word
        if (reading := known.get(word)) is None:
            reading = folded = word.translate(table)
            mixed = not _LATIN_LETTERS.isdisjoint(word)
            if not mixed and not (suspicious and folded.isascii()):
                reading = word
            known[word] = reading
        return reading

    return _LETTERS.sub(fold, text)


def spell(text: str) -> str:
    """The text as a model with an English vocabulary reads it: look-alikes folded, then every character spelt in ASCII."""
    return text if text.isascii() else fold_lookalikes(text).translate(LATIN)
