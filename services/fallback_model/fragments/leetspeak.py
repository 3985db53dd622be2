"""Digits and signs for letters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from services.fallback_model.fragments.source import FRAGMENT_CHARACTERS, Found, Source

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


def find_leetspeak(source: Source) -> Found:
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
        if whole and chunk.end() - whole[0] <= FRAGMENT_CHARACTERS and chunk.start() - whole[1] < 3:
            parts += [source.text[whole[1] : chunk.start()], *split]
            whole = (whole[0], chunk.end(), whole[2] + hits)
            continue
        if whole and whole[2] >= 2:
            yield whole[0], whole[1], leet.read(parts, whole[2])
        whole, parts = (chunk.start(), chunk.end(), hits), split
    if whole and whole[2] >= 2:
        yield whole[0], whole[1], leet.read(parts, whole[2])


def _unleet(source: Source) -> _LeetWords:
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
