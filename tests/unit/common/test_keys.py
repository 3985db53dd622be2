"""The form of an API key."""

from __future__ import annotations

import hashlib
import math

from hypothesis import given
from hypothesis import strategies as st

from libs.common import keys


def test_a_generated_key_parses_to_its_id_and_digest() -> None:
    key = keys.generate("0123456789ab")
    parsed = keys.parse(key)
    assert parsed is not None
    assert parsed.key_id == "0123456789ab"
    assert parsed.digest == hashlib.sha256(key.encode()).hexdigest()
    assert key not in repr(parsed)
    assert parsed.digest not in repr(parsed)


def test_the_secret_has_at_least_160_random_bits() -> None:
    assert keys.SECRET_LENGTH * math.log2(62) >= 160
    assert len({keys.generate() for _ in range(1000)}) == 1000


@given(st.integers(0), st.sampled_from("0aZ9_x"))
def test_a_mistyped_character_is_refused(position: int, character: str) -> None:
    key = keys.generate()
    position %= len(key)
    mistyped = key[:position] + character + key[position + 1 :]
    assert (keys.parse(mistyped) is not None) == (mistyped == key)


@given(st.text())
def test_anything_else_is_refused(text: str) -> None:
    assert keys.parse(text) is None


def test_other_digits_and_line_ends_are_refused() -> None:
    key = keys.generate()
    for other in (key + "\n", " " + key, key.replace("pc_live", "pc_test"), key[:-1] + "٣"):
        assert keys.parse(other) is None
