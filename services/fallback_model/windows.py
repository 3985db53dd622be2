"""Token windows with overlap over a whole text, and the way back from a token to the characters that it came from."""

from __future__ import annotations

import re
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

Ids = NDArray[np.int64]

_PROBE: Final = "a"
# What BERT's normaliser drops: all control characters but a tab and the ends of lines.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FEW: Final = 4
"""Where more than one word in so many is not in the vocabulary, the tokenizer itself is faster: it takes them all at once."""
_WORD: Final = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


class Window(msgspec.Struct, frozen=True):
    """Tokens [first, last) of a view's encoding, and their ids between the model's own special tokens."""

    first: int
    last: int
    ids: Ids


class _Plain:
    """BERT's lower-casing tokenizer, for texts of printable ASCII: a word is what stands between blanks and signs, and nearly all
    words are in the vocabulary as they are. To look them up there is about half of the tokenizer's work.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self._pieces = tokenizer.model.tokenize
        self._special = [token.content.lower() for token in tokenizer.get_added_tokens_decoder().values()]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Plain | None:
        """None for a tokenizer of another kind."""
        normaliser = tokenizer.normalizer
        is_lower = isinstance(normaliser, BertNormalizer) and normaliser.lowercase
        is_bert = isinstance(tokenizer.model, WordPiece) and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
        return cls(tokenizer) if is_lower and is_bert else None

    def ids(self, text: str) -> list[int] | None:
        """None where it is not of printable ASCII and blanks alone, holds a special token, or is mostly of unknown words."""
        if not text.isascii() or _CONTROL.search(text):
            return None
        lower = text.lower()
        if any(map(lower.__contains__, self._special)):
            return None
        words = _WORD.findall(lower)
        known = [*map(self._vocabulary.get, words)]
        if known.count(None) * _FEW > len(known):
            return None
        numbers: list[int] = []
        for word, number in zip(words, known, strict=True):
            if number is None:
                numbers += [piece.id for piece in self._pieces(word)]
            else:
                numbers.append(number)
        return numbers


class Windower:
    """Cuts an encoded text into windows of at most `max_tokens`, special tokens included, of which `overlap` are shared."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, overlap: int) -> None:
        """Raises ValueError if a window would not move forward."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        probe = tokenizer.encode(_PROBE)
        plain = [index for index, special in enumerate(probe.special_tokens_mask) if not special]
        begin, end = (plain[0], plain[-1] + 1) if plain else (len(probe.ids), len(probe.ids))
        self._tokenizer = tokenizer
        self._plain = _Plain.of(tokenizer)
        self._head = np.array(probe.ids[:begin], dtype=np.int64)
        self._tail = np.array(probe.ids[end:], dtype=np.int64)
        self.room = max_tokens - len(self._head) - len(self._tail)
        self.step = self.room - overlap
        if self.step <= 0:
            raise ValueError(f"windows of {max_tokens} tokens cannot overlap by {overlap}")

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Encodings with offsets, which few texts are asked for and which are most of the work; without special tokens. Releases
        the interpreter's lock meanwhile."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def ids(self, text: str) -> Ids:
        """The ids of an encoding, nothing else of it."""
        found = self._plain.ids(text) if self._plain is not None else None
        if found is None:
            found = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array(found, dtype=np.int64)

    def cut(self, ids: Ids) -> list[Window]:
        """At least one window, even of no tokens; every token is in one, and the last window is full where the text allows."""
        if len(ids) <= self.room:
            return [self.frame(ids, 0, len(ids))]
        firsts = list(range(0, len(ids) - self.room, self.step))
        firsts.append(len(ids) - self.room)
        return [self.frame(ids[first : first + self.room], first, first + self.room) for first in firsts]

    def frame(self, ids: Ids, first: int, last: int) -> Window:
        return Window(first, last, np.concatenate([self._head, ids, self._tail]))


def characters(encoding: Encoding, window: Window) -> tuple[int, int]:
    """The characters [start, end) of the encoded text that a window covers; (0, 0) for a window of no tokens. Needs offsets."""
    if window.first == window.last:
        return 0, 0
    # Token by token: `encoding.offsets` makes a list of all of them each time, which for every window would be quadratic.
    first, last = encoding.token_to_chars(window.first), encoding.token_to_chars(window.last - 1)
    assert first is not None
    assert last is not None
    return first[0], last[1]
