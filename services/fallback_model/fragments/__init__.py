"""Fragments of a text in which something is decoded, each kind with a finder of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.fallback_model.fragments.ciphers import find_reversed, find_rot13
from services.fallback_model.fragments.encodings import find_base64, find_character_codes, find_hex, find_url_escapes
from services.fallback_model.fragments.leetspeak import find_leetspeak
from services.fallback_model.fragments.source import Found, Source
from services.fallback_model.fragments.spacing import find_joined_words, find_spaced_letters

__all__ = ["FINDERS", "NOT_WITHIN", "Source"]

FINDERS: Final[tuple[tuple[str, Callable[[Source], Found]], ...]] = (
    ("base64", find_base64),
    ("hex", find_hex),
    ("char_codes", find_character_codes),
    ("url", find_url_escapes),
    ("spaced_letters", find_spaced_letters),
    ("leetspeak", find_leetspeak),
    ("rot13", find_rot13),
    ("reversed", find_reversed),
    ("joined_words", find_joined_words),
)
# What is not looked for in a fragment. In leetspeak only words become others, and rot13 leaves numbers as they are, so what else
# is encoded there has been found in the text around it; and a cipher that undoes itself gives the text back.
NOT_WITHIN: Final = {
    "leetspeak": frozenset({"base64", "hex", "char_codes", "url", "spaced_letters", "leetspeak"}),
    "rot13": frozenset({"char_codes", "rot13"}),
    "reversed": frozenset({"reversed"}),
}
