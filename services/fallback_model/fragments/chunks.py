"""Which sentences of a text are enciphered: whose letters follow each other as in words once deciphered, and do not before."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.fallback_model.characters import holds, runs
from services.fallback_model.lexicon import Lexicon, letter_numbers, pairs_of

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
class Chunks:
    """Pieces of about a sentence, [starts, ends) in characters, and which of them are to be read how."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    rot13: NDArray[np.bool_]
    reversed: NDArray[np.bool_]


def chunks_of(text: str, lexicon: Lexicon) -> Chunks:
    """Finds the pieces whose letters follow each other as in words once deciphered, and do not as they stand."""
    lengths = np.array([*map(len, _CHUNK.findall(text))], dtype=np.int64)
    ends = np.cumsum(lengths) + len(text) - len(text.lstrip(_STOPS))
    starts = ends - lengths
    if not len(starts):
        none = np.empty(0, dtype=np.bool_)
        return Chunks(starts, ends, none, none)
    starts[0] = 0  # the stops that a text begins with go with the first: backwards they end it
    pairs = pairs_of(letter_numbers(f"{text} "))
    if np.add.reduceat(lexicon.pair_gains.take(pairs, axis=0), starts).max() < _LEAST_GAIN:  # as in nearly all texts
        none = np.zeros(len(starts), dtype=np.bool_)
        return Chunks(starts, ends, none, none)
    evidence = np.add.reduceat(lexicon.pair_evidence.take(pairs, axis=0), starts, dtype=np.float64)
    plain, turned, backwards, number, inner = evidence.T
    # Single letters between signs, as in `\\u0041`, are no words of anything.
    wordy = (inner >= _LEAST_INNER * number) & (inner >= _FEWEST_INNER)
    rot13 = turned >= backwards
    return Chunks(
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
