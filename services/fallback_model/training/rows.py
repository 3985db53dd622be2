"""Rows of the data as the network will see them, where in a long one the attack may be, and what a teacher leaves out."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.fallback_model.characters import spell
from services.fallback_model.eval.corpus import Row

FOLDS: Final = 3
_SENTENCE: Final = re.compile(r"[^.!?\n]{1,160}[.!?\n]*\s*")
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True)
class SpeltRow(Row):
    """`foreign`: mostly not of Latin letters before it was spelt; `changed`: spelling it has changed it."""

    foreign: bool = False
    changed: bool = False


class Localiser:
    """Finds the sentence of a long malicious text that is most likely the attack: naive Bayes on words and word pairs.

    It only chooses which window of a training text is shown; the detector itself knows nothing of it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for row in rows:
            for sentence in _SENTENCE.findall(row.text[:4000]):
                counts[row.label].update(self._features(sentence))
        totals = [sum(counter.values()) + len(counter) for counter in counts]
        self._odds = {
            feature: max(-3.0, min(3.0, math.log((number + 1) / totals[1]) - math.log((counts[0][feature] + 1) / totals[0])))
            for feature, number in counts[1].items()
            if number >= 3
        }

    @staticmethod
    def _features(sentence: str) -> set[str]:
        words = _WORD.findall(sentence.lower())
        return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}

    def position(self, text: str) -> int:
        """Offset of the likeliest attack sentence's first character."""
        best, place = -math.inf, 0
        for match in _SENTENCE.finditer(text):
            score = sum(self._odds.get(feature, 0.0) for feature in self._features(match[0]))
            if score > best:
                best, place = score, match.start()
        return place


def spelt(row: Row) -> SpeltRow:
    """As the network will see it. An attack in look-alikes is spelt like any other then: an injection, whatever it was called."""
    if row.text.isascii():
        return SpeltRow(row.text, row.label, row.source, row.threat, row.lang)
    threat = "injection" if row.threat == "encoding_attack" else row.threat
    return SpeltRow(spell(row.text), row.label, row.source, threat, row.lang, _is_foreign(row.text), changed=True)


def _is_foreign(text: str) -> bool:
    """True where a good part of the text is not Latin, so that its spelling takes about two tokens a syllable."""
    return sum(ord(char) > 0x24F for char in text) * 5 > len(text)


def fold_of(row: Row) -> int:
    """The part of `FOLDS` that a row is in.

    Every teacher leaves out another part, and judges its rows without having learnt their labels by heart.
    """
    return hashlib.sha256(row.text.encode("utf-8", "replace")).digest()[0] % FOLDS
