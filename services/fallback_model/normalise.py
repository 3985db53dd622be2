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
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.fallback_model.characters import CHANGES, Codes, codes_of, fold_lookalikes, holds, runs, tables, text_of
from services.fallback_model.lexicon import NO_LETTER, Lexicon, letter_numbers, pairs_of

MOST_NESTING: Final = 2
MOST_FRAGMENTS: Final = 256
SPARE_CHARACTERS: Final = 4_000
"""All fragments of a text together are at most this much longer than the text: decoding cannot multiply the work."""
_FRAGMENT_CHARACTERS: Final = 480
"""Neighbouring pieces that need the same undoing are put together up to this length, about one window of the model."""

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
    source = _Source(text, lexicon)
    for name, find in _FINDERS:
        if name in _NOT_WITHIN.get(within, ()):
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


class _Source:
    """A text in which fragments are looked for, and what more than one finder needs to know of it."""

    def __init__(self, text: str, lexicon: Lexicon) -> None:
        self.text = text
        self.lexicon = lexicon

    @functools.cached_property
    def chunks(self) -> _Chunks:
        return _chunks(self.text, self.lexicon)

    @functools.cached_property
    def words(self) -> list[str]:
        """What stands between blanks."""
        return self.text.split()

    @functools.cached_property
    def longest_word(self) -> int:
        """Characters without a blank in between. Where they are few, no expression for long runs need be tried."""
        return max(map(len, self.words), default=0)


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


_SHORTEST_RUN: Final = 16
_SHORTEST_BLOB: Final = 8
"""Fewer characters of base64 are less than six bytes, which `_is_text` takes for nothing."""
_BASE64: Final = re.compile(rf"[A-Za-z0-9+/_-]{{{_SHORTEST_RUN},}}(?:\r?\n[A-Za-z0-9+/_-]{{4,}})*={{0,2}}")


def _base64(source: _Source) -> Found:
    if source.longest_word < _SHORTEST_RUN:
        return
    for match in _BASE64.finditer(source.text):
        blob = match[0]
        if blob.isalpha() and (blob.islower() or blob.isupper()):
            continue
        lines = blob.split()
        candidates = [blob] if len(lines) == 1 else ["".join(lines), *(line for line in lines if len(line) >= _SHORTEST_BLOB)]
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
_HEX_STRETCH: Final = re.compile(r"[0-9a-fA-Fx\\ ,:;\n-]{16,}")  # what a run stands in; found much faster
_HEX_PAIR: Final = re.compile(r"(?:0x|\\x)?([0-9a-fA-F]{2})")


def _hex(source: _Source) -> Found:
    for stretch in _HEX_STRETCH.finditer(source.text):
        for match in _HEX.finditer(source.text, *stretch.span()):
            decoded = _from_bytes(bytes.fromhex("".join(_HEX_PAIR.findall(match[0]))))
            if decoded is not None:
                yield match.start(), match.end(), decoded


_ESCAPED: Final = re.compile(r"(?:%[0-9a-fA-F]{2}[^\s%]{0,200}){2,}")
_MOST_BEFORE_ESCAPE: Final = 200


def _url(source: _Source) -> Found:
    text = source.text
    if "%" not in text:
        return
    for match in _ESCAPED.finditer(text):
        start = match.start()
        before = text[max(0, start - _MOST_BEFORE_ESCAPE) : start]
        if before and not before[-1].isspace():
            start -= len(before.split()[-1])
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


def _codes(source: _Source) -> Found:
    for certain, sign, run in _CODES:
        if not sign.search(source.text):
            continue
        for match in run.finditer(source.text):
            chars = []
            for code in _CODE.finditer(match[0]):
                group = code.lastindex or 1
                value = int(code[group], _BASES[group - 1])
                chars.append(chr(value) if value < 0x110000 and not 0xD800 <= value <= 0xDFFF else "\x00")
            decoded = "".join(chars)
            if _is_text(decoded) and (certain or sum(map(str.isalpha, decoded)) * 2 > len(decoded)):
                yield match.start(), match.end(), decoded


_CHUNK: Final = re.compile(r"[^.!?:\n]{1,200}[.!?:\n]*")
_STOPS: Final = ".!?:\n"
_LEAST_GAIN: Final = 12.0
_LEAST_MEAN_GAIN: Final = 0.3
_LEAST_MEAN: Final = -3.2
"""How much likelier, in nats, the letters of a chunk must be deciphered than as they stand: in all, and by pair of letters; and
how likely they must then be. English has -2.5 by pair, other languages in the same letters -3, letters drawn at random -4.4."""

_LEAST_INNER: Final = 0.1
_FEWEST_INNER: Final = 4
"""The share of pairs with a letter that must be of two letters, and their number; words have 0.6, and in leetspeak fewer."""


Sums = NDArray[np.float64]


@dataclass(frozen=True)
class _Chunks:
    """Pieces of about a sentence, [starts, ends) in characters, and which of them are to be read how."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    rot13: NDArray[np.bool_]
    reversed: NDArray[np.bool_]


def _chunks(text: str, lexicon: Lexicon) -> _Chunks:
    """Finds the pieces whose letters follow each other as in words once deciphered, and do not as they stand."""
    lengths = np.array([*map(len, _CHUNK.findall(text))], dtype=np.int64)
    ends = np.cumsum(lengths) + len(text) - len(text.lstrip(_STOPS))
    starts = ends - lengths
    if not len(starts):
        none = np.empty(0, dtype=np.bool_)
        return _Chunks(starts, ends, none, none)
    starts[0] = 0  # the stops that a text begins with go with the first: backwards they end it
    pairs = pairs_of(letter_numbers(f"{text} "))
    if np.add.reduceat(lexicon.pair_gains.take(pairs, axis=0), starts).max() < _LEAST_GAIN:  # as in nearly all texts
        none = np.zeros(len(starts), dtype=np.bool_)
        return _Chunks(starts, ends, none, none)
    evidence = np.add.reduceat(lexicon.pair_evidence.take(pairs, axis=0), starts, dtype=np.float64)
    plain, turned, backwards, number, inner = evidence.T
    # Single letters between signs, as in `\\u0041`, are no words of anything.
    wordy = (inner >= _LEAST_INNER * number) & (inner >= _FEWEST_INNER)
    rot13 = turned >= backwards
    return _Chunks(
        starts, ends, _enciphered(plain, turned, number, wordy) & rot13, _enciphered(plain, backwards, number, wordy) & ~rot13
    )


def _enciphered(plain: Sums, deciphered: Sums, pairs: Sums, wordy: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The chunks that gain enough, and those beside them that gain anything or hold no letters to tell by."""
    gain = deciphered - plain
    sure = wordy & (gain >= _LEAST_GAIN) & (gain >= _LEAST_MEAN_GAIN * pairs) & (deciphered >= _LEAST_MEAN * pairs)
    if not sure.any():
        return sure
    likely: NDArray[np.bool_] = sure | (gain > 0) | (pairs == 0)
    first, last = runs(likely)
    with_sure = holds(sure, first, last)
    likely[likely] = np.repeat(with_sure, last - first)
    return likely


def _joined_chunks(chunks: _Chunks, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where the wanted chunks stand, neighbours put together."""
    if not wanted.any():
        return
    whole: tuple[int, int] | None = None
    for start, end in zip(chunks.starts[wanted].tolist(), chunks.ends[wanted].tolist(), strict=True):
        if whole and end - whole[0] <= _FRAGMENT_CHARACTERS and start == whole[1]:
            whole = (whole[0], end)
            continue
        if whole:
            yield whole
        whole = (start, end)
    if whole:
        yield whole


def _rot13(source: _Source) -> Found:
    for start, end in _joined_chunks(source.chunks, source.chunks.rot13):
        yield start, end, codecs.encode(source.text[start:end], "rot13")


def _reversed(source: _Source) -> Found:
    for start, end in _joined_chunks(source.chunks, source.chunks.reversed):
        yield start, end, source.text[start:end][::-1]


# Single characters between blanks, whatever they are; or single letters and digits between other signs.
_SPACED: Final = re.compile(
    r"(?<!\S)(?:[^\s][ \t]{1,4}){4,}[^\s](?!\S)|(?<![^\W_])(?:[^\W_][ \t._*|~·-]{1,4}){4,}[^\W_](?![^\W_])"
)
_GAP_SIGNS: Final = " \t._*|~·-"
_SET_APART: Final = re.compile(rf"[{_GAP_SIGNS}]\S[{_GAP_SIGNS}]{{1,4}}\S[{_GAP_SIGNS}]")  # found faster, and in every run
_GAP: Final = re.compile(rf"[{_GAP_SIGNS}]+")
_BLANKS: Final = re.compile(r"[ \t]+")


def _spaced(source: _Source) -> Found:
    """Letters set apart: `i g n o r e   a l l`; without wider gaps between the words, the lexicon finds where they end."""
    if not _SET_APART.search(source.text):
        return
    for match in _SPACED.finditer(source.text):
        run = match[0]
        between, signs = (_BLANKS, " \t") if run[1] in " \t" else (_GAP, _GAP_SIGNS)
        without_gaps = dict.fromkeys(map(ord, signs))
        gaps = Counter(between.findall(run))
        usual = gaps.most_common(1)[0][0]
        wide = [gap for gap in gaps if len(gap) > len(usual)]
        letters = run.translate(without_gaps)
        if wide:
            pattern = "|".join(re.escape(gap) for gap in sorted(wide, key=len, reverse=True))
            decoded = re.sub(pattern, "\n", run).translate(without_gaps).replace("\n", " ")
        elif letters.isascii() and letters.isalpha():
            decoded = " ".join(source.lexicon.segment(letters.lower()))
        else:
            decoded = letters
        yield match.start(), match.end(), decoded


_SHORTEST_JOINED: Final = 24
_JOINED: Final = re.compile(rf"[A-Za-z]{{{_SHORTEST_JOINED},}}+")
_LONGEST_JOINED: Final = 2_000


def _joined(source: _Source) -> Found:
    """Words run together: `ignoreallpreviousinstructions`."""
    if source.longest_word < _SHORTEST_JOINED:
        return
    for match in _JOINED.finditer(source.text):
        if len(match[0]) > _LONGEST_JOINED:
            continue
        words = source.lexicon.segment(match[0].lower())
        if sum(len(word) for word in words if len(word) > 2) >= 0.7 * len(match[0]):
            yield match.start(), match.end(), " ".join(words)


_LEET: Final = str.maketrans("013456789@$!|+€", "oieasgtbgasilte")
_LEET_L: Final = str.maketrans("013456789@$!|+€", "oleasgtbgasilte")
_LEET_MARKS: Final = "013456789@$!|+€"
_LEET_CHUNK: Final = re.compile(r"[^\n]{1,160}+[^\s]{0,40}+[ \n]?")  # possessive: a chunk is never given back
# What stands between words: blanks and punctuation, but for the signs that are letters in leetspeak.
_LEET_WORD: Final = re.compile(r"""([^\s_"#%&()*,./:;<=>?\[\\\]^`{}~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f-]+)""")
_LEET_SIGNS: Final = frozenset(_LEET_MARKS)
_NO_LETTERS: Final = f"'27{_LEET_MARKS}"
_LEET_MARK: Final = re.compile(f"[{_LEET_MARKS}]")
# Signs and letters change place at least three times: `1n57ruc710n`, but not `abc123` or `v1`.
_ALTERNATING: Final = re.compile("(?:L++M++L++M|M++L++M++L)".replace("L", r"[^\W\d_]").replace("M", _LEET_MARK.pattern))
# Hexadecimal numbers and ordinals happen to spell words.
_NUMBER: Final = re.compile(r"[0-9a-fA-F]+|[^a-zA-Z]*\d(?:st|nd|rd|th)", re.IGNORECASE)
_LEAST_LIKENESS: Final = -3.2
"""Words of the lexicon have a likeness of -2.4 on average, letters drawn at random one of -4."""


@dataclass(frozen=True)
class _LeetWords:
    """What words with digits and signs for letters spell. `hits`: those that say by themselves that this is leetspeak.

    `known`: what they spell where that is a word, or like one; bare numbers may be (`70` is `to`). `guessed`: the others.
    """

    known: dict[str, str]
    hits: set[str]
    guessed: dict[str, str]

    def read(self, parts: list[str], hits: int) -> str:
        """The text that `parts`, words and what is between them, make up; there are `hits` among them."""
        read = [self.known.get(part, part) for part in parts]
        # Where most words that may be in leetspeak are, take the others to be as well.
        if hits > 2 and hits > sum(map(self.guessed.__contains__, parts)):
            read = [self.guessed.get(part, part) for part in read]
        return "".join(read)


def _leet(source: _Source) -> Found:
    """Stretches with at least two words in which digits and signs stand for letters."""
    leet = _unleet(source)
    if not leet.hits:
        return
    whole: tuple[int, int, int] | None = None
    parts: list[str] = []
    for chunk in _LEET_CHUNK.finditer(source.text):
        split = _LEET_WORD.split(chunk[0])
        hits = sum(map(leet.hits.__contains__, split))
        if not hits:
            continue
        if whole and chunk.end() - whole[0] <= _FRAGMENT_CHARACTERS and chunk.start() - whole[1] < 3:
            parts += [source.text[whole[1] : chunk.start()], *split]
            whole = (whole[0], chunk.end(), whole[2] + hits)
            continue
        if whole and whole[2] >= 2:
            yield whole[0], whole[1], leet.read(parts, whole[2])
        whole, parts = (chunk.start(), chunk.end(), hits), split
    if whole and whole[2] >= 2:
        yield whole[0], whole[1], leet.read(parts, whole[2])


def _unleet(source: _Source) -> _LeetWords:
    found, lexicon = _LeetWords({}, set(), {}), source.lexicon
    if not _LEET_MARK.search(source.text):
        return found
    words, bare = [], []
    # Most of what stands between blanks is of letters alone, and need not be taken apart.
    marked = [part for part in set(source.words) if not part.isalpha() and not _LEET_SIGNS.isdisjoint(part)]
    for word in set(_LEET_WORD.findall(" ".join(marked))):
        if word.isalpha() or _LEET_SIGNS.isdisjoint(word):
            continue
        core = word.lstrip("'").rstrip("!'")
        if core.isalpha() or not 0 < len(core) <= 40 or (len(core) > 5 and core.isdigit()):
            continue
        words.append(word)
        bare.append(core)
    if not any(core.strip(_NO_LETTERS) for core in bare):
        return found  # numbers alone are no hits
    # All at once, one a line: a translation costs little more for a text than for a word.
    lower = "\n".join(bare).lower()
    readings = [lower.translate(table).split("\n") for table in (_LEET, _LEET_L)]
    odd: list[tuple[str, str]] = []
    for word, core, as_i, as_l in zip(words, bare, *readings, strict=True):
        stem, apostrophe, ending = as_i.partition("'")
        for reading in (stem, as_l.partition("'")[0]):
            if reading in lexicon.words or (reading.endswith("s") and reading[:-1] in lexicon.words):
                found.known[word] = word.replace(core, reading + apostrophe + ending)
                if len(reading) > 2 and not _NUMBER.fullmatch(core) and core.strip(_NO_LETTERS):
                    found.hits.add(word)
                break
        else:
            if stem.isascii() and stem.isalpha() and core.strip(_NO_LETTERS):
                found.guessed[word] = word.replace(core, stem + apostrophe + ending)
                # Letters and digits alternate as in no number or name.
                if len(stem) >= 5 and _ALTERNATING.match(core):
                    odd.append((word, stem))
    for (word, _), likeness in zip(odd, lexicon.likeness([stem for _, stem in odd]), strict=True):
        if likeness >= _LEAST_LIKENESS:  # not a known word, yet it may be one
            found.known[word] = found.guessed.pop(word)
            found.hits.add(word)
    return found


_FINDERS: Final[tuple[tuple[str, Callable[[_Source], Found]], ...]] = (
    ("base64", _base64),
    ("hex", _hex),
    ("char_codes", _codes),
    ("url", _url),
    ("spaced_letters", _spaced),
    ("leetspeak", _leet),
    ("rot13", _rot13),
    ("reversed", _reversed),
    ("joined_words", _joined),
)
# What is not looked for in a fragment. In leetspeak only words become others, and rot13 leaves numbers as they are, so what else
# is encoded there has been found in the text around it; and a cipher that undoes itself gives the text back.
_NOT_WITHIN: Final = {
    "leetspeak": frozenset({"base64", "hex", "char_codes", "url", "spaced_letters", "leetspeak"}),
    "rot13": frozenset({"char_codes", "rot13"}),
    "reversed": frozenset({"reversed"}),
}
