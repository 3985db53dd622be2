"""Undoes what hides a text from a reader that is not human, before any engine sees it.

`normalise` gives *views*: first the whole text as the engine reads it (compatibility forms, invisible characters and
look-alikes undone), then fragments in which something was decoded: leetspeak, letters set apart, words run together, base64,
hex, character codes, URL escapes, rot13, reversed text; nested twice at most. All views are scored and the worst one counts.

Every view knows where it comes from, so that a span in it can be given in characters of the text as sent. Time is linear in
the length of the text: fixed passes of regular expressions that cannot backtrack far, and a bounded amount of decoded text.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from services.fallback_model.characters import CLEAN, LATIN, fold_lookalikes
from services.fallback_model.lexicon import Lexicon

MOST_NESTING: Final = 2
MOST_FRAGMENTS: Final = 256
SPARE_CHARACTERS: Final = 4_000
"""All fragments of a text together are at most this much longer than the text: decoding cannot multiply the work."""
_FRAGMENT_CHARACTERS: Final = 480
"""Neighbouring pieces that need the same undoing are put together up to this length, about one window of the model."""

Offsets = NDArray[np.int32]


@dataclass(frozen=True)
class View:
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


@dataclass(frozen=True)
class Normalised:
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
        found["confusables"] = sum(map(str.__ne__, folded, cleaned))
    views = [_whole(folded, starts, spelt, ())]
    if folded != cleaned:
        views.append(replace(_whole(cleaned, starts, spelt, ()), disguised=True))
    complete, room = True, len(text) + SPARE_CHARACTERS
    for piece in _fragments(folded, lexicon, MOST_NESTING):
        if len(views) > MOST_FRAGMENTS or len(piece.text) > room:
            complete = False
            break
        room -= len(piece.text)
        found.update(piece.transforms)
        first, last = piece.start, piece.end - 1
        region = (first, last + 1) if starts is None else (int(starts[first]), int(starts[last]) + 1)
        inner = _whole(fold_lookalikes(piece.text), None, spelt, piece.transforms)
        views.append(View(inner.text, region=region, transforms=piece.transforms, disguised=piece.disguised))
    return Normalised([view for index, view in enumerate(views) if index == 0 or view.text.strip()], dict(found), complete)


# --- the whole text --------------------------------------------------------------------------------------------------------


_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def _clean(text: str, found: Counter[str]) -> tuple[str, Offsets | None]:
    """Compatibility forms and invisible characters undone; the offsets are None where nothing moved."""
    if text.isascii() and not _CONTROL.search(text):
        return text, None
    pieces = [CLEAN[ord(char)] for char in text]
    cleaned = "".join(pieces)
    if cleaned == text:
        return text, None
    for char, number in Counter(text).items():
        if CLEAN[ord(char)] != char and (name := _name_of_change(char)) is not None:
            found[name] += number
    if len(cleaned) == len(text) and "" not in pieces:
        return cleaned, None
    return cleaned, _spread(pieces, None)


def _name_of_change(char: str) -> str | None:
    code, reading = ord(char), CLEAN[ord(char)]
    if 0xE0000 <= code <= 0xE007F:
        return "tag_characters"
    if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x200E, 0x200F, 0x061C):
        return "bidi"
    if not reading:
        return "zero_width" if unicodedata.category(char) != "Cc" else "control_characters"
    # Typographic forms (…, ½, a no-break space) are no disguise; letters and digits in other clothes are.
    return "nfkc" if reading.isascii() and reading.isalnum() else None


def _spread(pieces: list[str], starts: Offsets | None) -> Offsets:
    """Offsets after character i became pieces[i], on top of the offsets from before."""
    lengths = np.fromiter(map(len, pieces), dtype=np.int32, count=len(pieces))
    source = np.arange(len(pieces), dtype=np.int32) if starts is None else starts
    return np.repeat(source, lengths)


_LONG_RUN: Final = re.compile(r"[a-zA-Z]{81}")
_RUN_PIECE: Final = re.compile(r"([a-zA-Z]{60})(?=[a-zA-Z])")


def _whole(text: str, starts: Offsets | None, spelt: bool, transforms: tuple[str, ...]) -> View:
    if not spelt or text.isascii():
        return View(text, starts, transforms=transforms)
    pieces = [LATIN[ord(char)] for char in text]
    spelling, starts = "".join(pieces), _spread(pieces, starts)
    if _LONG_RUN.search(spelling):
        # Scripts without spaces become words that no tokenizer takes (over a hundred letters is [UNK]): cut them.
        cuts = np.fromiter((match.end() for match in _RUN_PIECE.finditer(spelling)), dtype=np.int64)
        starts = np.insert(starts, cuts, starts[cuts])
        spelling = _RUN_PIECE.sub(r"\1 ", spelling)
    return View(spelling, starts, transforms=transforms)


# --- fragments -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """`text` was decoded from characters [start, end) of the outer text."""

    start: int
    end: int
    text: str
    transforms: tuple[str, ...]
    disguised: bool = False


def _fragments(text: str, lexicon: Lexicon, nesting: int) -> Iterator[_Piece]:
    for name, find in _FINDERS:
        for start, end, decoded in find(text, lexicon):
            inner = list(_fragments(decoded, lexicon, nesting - 1)) if nesting > 1 else []
            further = sum(piece.end - piece.start for piece in inner if len(piece.transforms) == 1)
            yield _Piece(start, end, decoded, (name,), disguised=further * 2 > len(decoded))
            for piece in inner:
                yield _Piece(start, end, piece.text, (name, *piece.transforms), piece.disguised)


Found = Iterator[tuple[int, int, str]]


_SIGNS: Final = re.compile(r"[^\w\s]|_")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]")


def _is_text(decoded: str) -> bool:
    """True for something that a person or a further decoder could read, as opposed to bytes that happen to be UTF-8."""
    if len(decoded) < 6:
        return False
    signs = len(_SIGNS.findall(decoded))
    return signs <= 0.55 * len(decoded) and len(_UNPRINTABLE.findall(decoded)) <= 0.03 * len(decoded)


def _from_bytes(data: bytes) -> str | None:
    if data[1::2].count(0) * 3 > len(data):  # every other byte is zero: UTF-16, as PowerShell writes it
        decoded = data.decode("utf-16-le", "replace")
    else:
        try:
            decoded = data.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return decoded if _is_text(decoded) else None


_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*={0,2}")


def _base64(text: str, _: Lexicon) -> Found:
    for match in _BASE64.finditer(text):
        blob = match[0]
        if blob.isalpha() and (blob.islower() or blob.isupper()):
            continue
        candidates = [blob] if "\n" not in blob else ["".join(blob.split()), *blob.split()]
        for candidate in candidates:
            decoded = _decode_base64(candidate)
            if decoded is not None:
                yield match.start(), match.end(), decoded
                break


def _decode_base64(blob: str) -> str | None:
    # A prefix glued on ("data:...,", "b64-") shifts nothing here: the run began at the first character of the alphabet.
    blob = blob.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    blob = blob[: len(blob) - 1] if len(blob) % 4 == 1 else blob
    try:
        return _from_bytes(base64.b64decode(blob + "=" * (-len(blob) % 4), validate=True))
    except binascii.Error:
        return None


_HEX: Final = re.compile(r"(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ ,:;\n-]{0,2}){8,}")
_HEX_PAIR: Final = re.compile(r"(?:0x|\\x)?([0-9a-fA-F]{2})")


def _hex(text: str, _: Lexicon) -> Found:
    for match in _HEX.finditer(text):
        decoded = _from_bytes(bytes.fromhex("".join(_HEX_PAIR.findall(match[0]))))
        if decoded is not None:
            yield match.start(), match.end(), decoded


_ESCAPED: Final = re.compile(r"(?:%[0-9a-fA-F]{2}[^\s%]{0,200}){2,}")
_BEFORE_ESCAPE: Final = re.compile(r"\S{0,200}\Z")


def _url(text: str, _: Lexicon) -> Found:
    for match in _ESCAPED.finditer(text):
        start = match.start()
        if lead := _BEFORE_ESCAPE.search(text[max(0, start - 200) : start]):
            start -= len(lead[0])
        decoded = _from_bytes(unquote_to_bytes(text[start : match.end()].replace("+", " ")))
        if decoded is not None:
            yield start, match.end(), decoded


# Whether the form alone says that these are character codes, the sign by which they show, and the form of a run of them. Bare
# numbers may be anything: they must spell mostly letters.
_CODES: Final = (
    (
        True,
        re.compile(r"&#|\\[uU0-7]|U\+|chr\("),
        re.compile(
            r"(?:(?:&#x?[0-9a-fA-F]{2,6};|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|U\+[0-9a-fA-F]{4,6}|chr\(\d{1,6}\)|\\[0-7]{3})"
            r"[ ,;+.]{0,3}){5,}"
        ),
    ),
    (True, re.compile(r"[01]{8}"), re.compile(r"(?<!\d)(?:[01]{8}[ ,;]{0,2}){5,}(?!\d)")),
    (False, re.compile(r"\d\d[ ,;\n-]{1,2}\d\d"), re.compile(r"(?<!\d)(?:\d{2,3}[ ,;\n-]{1,2}){7,}\d{2,3}(?!\d)")),
)
_CODE: Final = re.compile(
    r"&#x([0-9a-fA-F]+);|&#(\d+);|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|U\+([0-9a-fA-F]+)|chr\((\d+)\)|\\([0-7]{3})|([01]{8})|(\d{2,3})"
)
_BASES: Final = (16, 10, 16, 16, 16, 10, 8, 2, 10)


def _codes(text: str, _: Lexicon) -> Found:
    for certain, sign, run in _CODES:
        if not sign.search(text):
            continue
        for match in run.finditer(text):
            chars = []
            for code in _CODE.finditer(match[0]):
                group = code.lastindex or 1
                value = int(code[group], _BASES[group - 1])
                chars.append(chr(value) if value < 0x110000 and not 0xD800 <= value <= 0xDFFF else "\x00")
            decoded = "".join(chars)
            if _is_text(decoded) and (certain or sum(map(str.isalpha, decoded)) * 2 > len(decoded)):
                yield match.start(), match.end(), decoded


_CHUNK: Final = re.compile(r"[^.!?\n]{1,200}[.!?\n]*")
_WORD: Final = re.compile(r"[A-Za-z]{3,}")
_LETTER: Final = re.compile(r"[a-z]")


def _gains_vowels(ciphered: str, plain: str) -> bool:
    """True where deciphering brings the vowels, about two letters in five in any language, back from one in five.

    For languages that the lexicon does not know, in plain ASCII: where a vowel has an accent it is not counted.
    """
    letters = len(_LETTER.findall(plain))
    if letters < 20 or not ciphered.isascii():
        return False
    before, after = (sum(map(text.lower().count, "aeiou")) / letters for text in (ciphered, plain))
    return before < 0.27 and after > 0.33


def _enciphered(cipher: Callable[[str], str], *, by_vowels: bool) -> Callable[[str, Lexicon], Found]:
    """Finds the pieces that hold few English words as they stand, and mostly English words once deciphered."""

    def find(text: str, lexicon: Lexicon) -> Found:
        whole: tuple[int, int] | None = None
        for match in _CHUNK.finditer(text):
            words = _WORD.findall(match[0].lower())
            known = lexicon.share(words)
            if len(words) >= 3 and known < 0.5:
                plain = cipher(match[0]).lower()
                read = lexicon.share(_WORD.findall(plain))
                # The request to decode often stands in the same sentence, in plain words.
                if read > known + 0.15 or (by_vowels and known < 0.3 and _gains_vowels(match[0], plain)):
                    if whole and match.end() - whole[0] <= _FRAGMENT_CHARACTERS and match.start() - whole[1] < 3:
                        whole = (whole[0], match.end())
                        continue
                    if whole:
                        yield *whole, cipher(text[slice(*whole)])
                    whole = (match.start(), match.end())
        if whole:
            yield *whole, cipher(text[slice(*whole)])

    return find


# Single characters between blanks, whatever they are; or single letters and digits between other signs.
_SPACED: Final = re.compile(
    r"(?<!\S)(?:[^\s][ \t]{1,4}){4,}[^\s](?!\S)|(?<![^\W_])(?:[^\W_][ \t._*|~·-]{1,4}){4,}[^\W_](?![^\W_])"
)
_GAP: Final = re.compile(r"[ \t._*|~·-]+")
_BLANKS: Final = re.compile(r"[ \t]+")


def _spaced(text: str, lexicon: Lexicon) -> Found:
    """Letters set apart: `i g n o r e   a l l`; without wider gaps between the words, the lexicon finds where they end."""
    for match in _SPACED.finditer(text):
        run = match[0]
        between = _BLANKS if len(run[1:].lstrip(" \t")) < len(run) - 1 else _GAP
        gaps = Counter(gap[0] for gap in between.finditer(run))
        usual = gaps.most_common(1)[0][0]
        wide = [gap for gap in gaps if len(gap) > len(usual)]
        letters = between.sub("", run)
        if wide:
            pattern = "|".join(re.escape(gap) for gap in sorted(wide, key=len, reverse=True))
            decoded = " ".join(between.sub("", word) for word in re.split(pattern, run))
        elif letters.isascii() and letters.isalpha():
            decoded = " ".join(lexicon.segment(letters.lower()))
        else:
            decoded = letters
        yield match.start(), match.end(), decoded


_JOINED: Final = re.compile(r"(?<![A-Za-z])[A-Za-z]{24,2000}(?![A-Za-z])")


def _joined(text: str, lexicon: Lexicon) -> Found:
    """Words run together: `ignoreallpreviousinstructions`."""
    for match in _JOINED.finditer(text):
        words = lexicon.segment(match[0].lower())
        if sum(len(word) for word in words if len(word) > 2) >= 0.7 * len(match[0]):
            yield match.start(), match.end(), " ".join(words)


_LEET: Final = str.maketrans("013456789@$!|+€", "oieasgtbgasilte")
_LEET_L: Final = str.maketrans("013456789@$!|+€", "oleasgtbgasilte")
_LEET_MARKS: Final = frozenset("013456789@$!|+€")
_EDGES: Final = ".,;:?\"'`()]}[{<>*_#-"


def _leet(text: str, lexicon: Lexicon) -> Found:
    """Words with digits and signs for letters, where what they spell is an English word."""
    if _LEET_MARKS.isdisjoint(text):
        return
    whole: tuple[int, int, int] | None = None
    pieces: list[str] = []
    known: dict[str, str | None] = {}
    for chunk in _LEET_CHUNK.finditer(text):
        hits = 0
        decoded = []
        for token in chunk[0].split(" "):
            if token not in known:
                known[token] = _unleet(token, lexicon)
            word = known[token]
            # A bare number may be a word (`70` is `to`), but only among others that are.
            hits += word is not None and len(word) > 2 and not token.strip(_EDGES).isdigit()
            decoded.append(token if word is None else word)
        if not hits:
            continue
        if whole and chunk.end() - whole[0] <= _FRAGMENT_CHARACTERS and chunk.start() - whole[1] < 3:
            whole = (whole[0], chunk.end(), whole[2] + hits)
            pieces.append(" ".join(decoded))
            continue
        if whole and whole[2] >= 2:
            yield whole[0], whole[1], " ".join(pieces)
        whole, pieces = (chunk.start(), chunk.end(), hits), [" ".join(decoded)]
    if whole and whole[2] >= 2:
        yield whole[0], whole[1], " ".join(pieces)


_LEET_CHUNK: Final = re.compile(r"[^\n]{1,160}+[^\s]{0,40}+[ \n]?")  # possessive: a chunk is never given back


def _unleet(token: str, lexicon: Lexicon) -> str | None:
    if token.isalpha() or _LEET_MARKS.isdisjoint(token):
        return None
    core = token.strip(_EDGES)
    bare = core.rstrip("!")
    if bare.isalpha() or not 0 < len(bare) <= 40 or (bare.isdigit() and len(bare) > 5):
        return None
    lower, apostrophe, ending = bare.lower().partition("'")
    ending = apostrophe + ending.translate(_LEET)
    for table in (_LEET, _LEET_L):
        word = lower.translate(table)
        if word.isalpha() and (word in lexicon.words or (word.endswith("s") and word[:-1] in lexicon.words)):
            return token.replace(bare, word + ending)
    word = lower.translate(_LEET)
    # Not a known word, yet letters and digits alternate as no number or name does: still worth a reading.
    digits = sum(char in _LEET_MARKS for char in bare)
    if word.isalpha() and len(word) >= 5 and not bare.isdigit() and 0.2 <= digits / len(bare) <= 0.8 and _alternates(bare):
        return token.replace(bare, word + ending)
    return None


def _alternates(word: str) -> bool:
    """True where signs and letters change place at least three times: `1n57ruc710n`, but not `abc123` or `v1`."""
    kinds = [char.isalpha() for char in word]
    return sum(a != b for a, b in itertools.pairwise(kinds)) >= 3


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _reverse(text: str) -> str:
    return text[::-1]


_FINDERS: Final[tuple[tuple[str, Callable[[str, Lexicon], Found]], ...]] = (
    ("base64", _base64),
    ("hex", _hex),
    ("char_codes", _codes),
    ("url", _url),
    ("spaced_letters", _spaced),
    ("leetspeak", _leet),
    ("rot13", _enciphered(_rot13, by_vowels=True)),
    ("reversed", _enciphered(_reverse, by_vowels=False)),
    ("joined_words", _joined),
)
