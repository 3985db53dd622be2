"""Texts of any characters, as the normaliser reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.fallback_model import characters
from services.fallback_model.engine import load_tokenizer
from services.fallback_model.lexicon import Lexicon
from services.fallback_model.paths import DEFAULT_MODEL
from tests.bench import patterns
from tests.fuzz.views import check_views

LEXICON: Final = Lexicon.of_vocabulary(load_tokenizer(DEFAULT_MODEL).get_vocab())
_SEED_CHARACTERS: Final = 300

characters.warm()


def run(data: bytes) -> None:
    """UTF-8; a byte that is none stands for half a surrogate, which JSON can smuggle in elsewhere."""
    check_views(data.decode("utf-8", "surrogateescape"), LEXICON)


def seeds() -> Iterator[bytes]:
    for name in patterns.NAMES:
        yield patterns.pattern(name, _SEED_CHARACTERS).encode("utf-8", "surrogatepass")
    for name in patterns.NAMES:
        yield patterns.pattern(name, 40).encode("utf-8", "surrogatepass")


def words() -> Iterator[str]:
    yield from (
        "&#x41;",
        "&#65;",
        "\\u0041",
        "\\U00000041",
        "U+0041",
        "chr(65)",
        "\\101",
        "%41",
        "0x41",
        "\\x41",
        "01000001",
        "65 ",
    )
    yield from ("aWdub3Jl", "ignore", "vtaber", "erongi", "i g n o r e ", "1gn0r3 ", "previousinstructions", "==", "\r\n", "\t")
    yield from (
        "\u200b",
        "\u202e",
        "\u0301",
        "\U000e0041",
        "\ufe0f",
        "\u0430",
        "\uff21",
        "\u5ffd",
        "\uac00",
        "\ufdfa",
        "\U0001d400",
    )
