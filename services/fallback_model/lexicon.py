"""A list of English words, ranked by frequency: what tells a text from the same text enciphered, reversed or glued together."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from typing import Final

from tokenizers.models import Unigram

LONGEST_WORD: Final = 18
_UNKNOWN_COST: Final = 12.0


class Lexicon:
    """Words of two letters or more, and `a`, `i`; lower case."""

    def __init__(self, words: Iterable[str]) -> None:
        """`words` in descending order of frequency, as the entries of a subword vocabulary stand."""
        ranked = dict.fromkeys(word for word in words if word.isascii() and word.isalpha() and 1 < len(word) <= LONGEST_WORD)
        ranked |= dict.fromkeys(("a", "i"))
        self.words: frozenset[str] = frozenset(ranked)
        # Zipf's law: the frequency of a word falls with its rank, so a word costs about the logarithm of its rank. Rare entries
        # of two letters in a subword vocabulary are mostly not words at all.
        costs = {
            word: math.log(rank + 10) + (3.0 if len(word) == 2 and rank > 1500 else 0.0) for rank, word in enumerate(ranked)
        } | {"a": 4.0, "i": 4.0}
        letters = dict.fromkeys(string.ascii_lowercase, _UNKNOWN_COST)
        self._segmenter = Unigram([(word, -cost) for word, cost in (letters | costs).items()])
        self._segmenter._resize_cache(0)  # it would keep what it has seen of texts

    @classmethod
    def of_vocabulary(cls, vocabulary: dict[str, int]) -> Lexicon:
        """From a tokenizer's vocabulary: entries that begin a word, by ascending id."""
        marked = any(entry.startswith("▁") or entry.startswith("Ġ") for entry in vocabulary)
        words = []
        for entry in sorted(vocabulary, key=vocabulary.__getitem__):
            if marked and not entry.startswith(("▁", "Ġ")):
                continue
            word = entry.lstrip("▁Ġ")
            if not entry.startswith("##"):
                words.append(word.lower())
        return cls(words)

    def share(self, words: list[str]) -> float:
        """The share of `words` (lower case) that are known, 0 for none."""
        return sum(word in self.words for word in words) / len(words) if words else 0.0

    def segment(self, letters: str) -> list[str]:
        """The likeliest words that `letters` (lower case ASCII, no spaces) is made of; linear time in its length.

        A unigram model with Zipf costs; a letter that fits no word stands alone.
        """
        return [token.value for token in self._segmenter.tokenize(letters)]
