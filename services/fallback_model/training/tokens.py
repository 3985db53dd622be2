"""The tokenizer without its own padding, truncation and special tokens, and the special tokens by number."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

CLS: Final = 101
SEP: Final = 102
PAD: Final = 0
"""The base's special tokens."""


def bare_tokenizer(path: Path) -> Tokenizer:
    """Cuts texts into ids and nothing else."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
