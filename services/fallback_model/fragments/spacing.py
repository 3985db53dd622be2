"""Letters set apart, and words run together."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from services.fallback_model.fragments.source import Found, Source

# Single characters between blanks, whatever they are; or single letters and digits between other signs.
_SPACED: Final = re.compile(
    r"(?<!\S)(?:[^\s][ \t]{1,4}){4,}[^\s](?!\S)|(?<![^\W_])(?:[^\W_][ \t._*|~·-]{1,4}){4,}[^\W_](?![^\W_])"
)
_GAP_SIGNS: Final = " \t._*|~·-"
_SET_APART: Final = re.compile(rf"[{_GAP_SIGNS}]\S[{_GAP_SIGNS}]{{1,4}}\S[{_GAP_SIGNS}]")  # found faster, and in every run
_GAP: Final = re.compile(rf"[{_GAP_SIGNS}]+")
_BLANKS: Final = re.compile(r"[ \t]+")


def find_spaced_letters(source: Source) -> Found:
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


def find_joined_words(source: Source) -> Found:
    """Words run together: `ignoreallpreviousinstructions`."""
    if source.longest_word < _SHORTEST_JOINED:
        return
    for match in _JOINED.finditer(source.text):
        if len(match[0]) > _LONGEST_JOINED:
            continue
        words = source.lexicon.segment(match[0].lower())
        if sum(len(word) for word in words if len(word) > 2) >= 0.7 * len(match[0]):
            yield match.start(), match.end(), " ".join(words)
