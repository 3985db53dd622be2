"""A list of English words, ranked by frequency: what tells a text from the same text enciphered, reversed or glued together."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import Unigram

LONGEST_WORD: Final = 18
_UNKNOWN_COST: Final = 12.0
NO_LETTER: Final = 26
_ROT13: Final = [*range(13, 26), *range(13), NO_LETTER]

_NUMBERS: Final = bytes(string.ascii_lowercase.find(chr(code).lower()) % (NO_LETTER + 1) for code in range(256))

_ROW: Final = np.int16(NO_LETTER + 1)

Letters = NDArray[np.uint8]
Likelihoods = NDArray[np.float32]
Gains = NDArray[np.float64]


def letter_numbers(text: str) -> Letters:
    """For each character 0 to 25 for a letter of ASCII, large or small, and 26 (`NO_LETTER`) for anything else."""
    return np.frombuffer(text.encode("ascii", "replace").translate(_NUMBERS), dtype=np.uint8)


def pairs_of(numbers: Letters) -> NDArray[np.int16]:
    """Each letter number with the next one, as an index into a table of 27 x 27; one less than there are letters."""
    pairs: NDArray[np.int16] = numbers[:-1] * _ROW
    pairs += numbers[1:]
    return pairs


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

        # How letters follow each other in English words, which is much like other languages in the same letters, and unlike what
        # ciphers make of any.
        counts = np.bincount(pairs_of(letter_numbers(f" {' '.join(sorted(self.words))} ")), minlength=(NO_LETTER + 1) ** 2)
        counts = counts.reshape(NO_LETTER + 1, NO_LETTER + 1) + 1
        likelihoods = np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
        likelihoods[NO_LETTER, NO_LETTER] = 0.0
        self._likelihoods: Likelihoods = likelihoods.ravel()
        letter = np.arange(NO_LETTER + 1) < NO_LETTER
        self.pair_evidence: Likelihoods = np.stack(
            [
                likelihoods,
                likelihoods[np.ix_(_ROT13, _ROT13)],
                likelihoods.T,
                letter[:, None] | letter,
                letter[:, None] & letter,
            ],
            axis=-1,
        ).reshape(-1, 5)
        """By pair of letters: its likelihood in nats as it stands, deciphered by rot13, and backwards, 0 for a pair of no
        letters; then 1 where one of the pair is a letter, and 1 where both are."""
        plain = self.pair_evidence[:, :1]
        self.pair_gains: Gains = (self.pair_evidence[:, 1:3].astype(np.float64) - plain).copy()
        """By pair of letters: how much likelier it is deciphered by rot13, and backwards, than as it stands."""

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

    def likeness(self, words: list[str]) -> list[float]:
        """The mean likelihood, in nats, of the pairs of letters of each word; the words are of ASCII letters."""
        if not words:
            return []
        likelihoods = self._likelihoods.take(pairs_of(letter_numbers(f" {' '.join(words)} ")))
        # A word has a pair more than letters: with the blank before it, and with the one after it.
        pairs = np.fromiter(map(len, words), dtype=np.int64, count=len(words)) + 1
        means: list[float] = (np.add.reduceat(likelihoods, np.cumsum(pairs) - pairs) / pairs).tolist()
        return means

    def segment(self, letters: str) -> list[str]:
        """The likeliest words that `letters` (lower case ASCII, no spaces) is made of; linear time in its length.

        A unigram model with Zipf costs; a letter that fits no word stands alone.
        """
        return [token.value for token in self._segmenter.tokenize(letters)]
