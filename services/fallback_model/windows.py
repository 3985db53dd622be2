"""Token windows with overlap over a whole text, and the way back from a token to the characters that it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer

Ids = NDArray[np.int64]

# `tokenizers` takes a text in one piece without harm, but the pieces of one call run in parallel, which one long text would not.
_PROBE: Final = "a"
# What BERT's normaliser drops: all control characters but a tab and the ends of lines.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Window:
    """Tokens [first, last) of a view's encoding, and their ids between the model's own special tokens."""

    first: int
    last: int
    ids: Ids


class _Plain:
    """A tokenizer with BERT's lower-casing normaliser, for texts that it would only put into lower case: to keep track of what it
    changes is a third of the work.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.normalizer = None
        self._special = [token.content.lower() for token in tokenizer.get_added_tokens_decoder().values()]

    def encode(self, texts: list[str]) -> list[Encoding] | None:
        """None where one is not of printable ASCII and blanks alone, or holds a special token, which is not in lower case."""
        lower = [text.lower() for text in texts if text.isascii() and not _CONTROL.search(text)]
        if len(lower) < len(texts) or any(special in text for text in lower for special in self._special):
            return None
        return self._tokenizer.encode_batch_fast(lower, add_special_tokens=False)


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
        normaliser = tokenizer.normalizer
        self._plain = _Plain(tokenizer) if isinstance(normaliser, BertNormalizer) and normaliser.lowercase else None
        self._head = np.array(probe.ids[:begin], dtype=np.int64)
        self._tail = np.array(probe.ids[end:], dtype=np.int64)
        self.room = max_tokens - len(self._head) - len(self._tail)
        self.step = self.room - overlap
        if self.step <= 0:
            raise ValueError(f"windows of {max_tokens} tokens cannot overlap by {overlap}")

    def encode(self, texts: list[str], *, located: bool = False) -> list[Encoding]:
        """Encodings without special tokens; releases the interpreter lock while it works.

        `located`: with offsets, which few texts are asked for and which are a quarter of the work.
        """
        if located:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        encodings = self._plain.encode(texts) if self._plain is not None else None
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if encodings is None else encodings

    def cut(self, encoding: Encoding) -> list[Window]:
        """At least one window, even of no tokens; every token is in one, and the last window is full where the text allows."""
        ids = np.array(encoding.ids, dtype=np.int64)
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
