"""Small damage done to texts of both classes alike, so that damage itself says nothing about the class."""

from __future__ import annotations

import base64
import codecs
import random
from typing import Final

_LEET: Final = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}
_TWINS: Final = {"a": "а", "c": "с", "e": "е", "i": "і", "o": "о", "p": "р", "s": "ѕ", "x": "х", "y": "у"}
_KEYS: Final = "abcdefghijklmnopqrstuvwxyz"


def typos(text: str, rng: random.Random) -> str:
    """Swaps, drops, doubles or replaces one character in about every fortieth."""
    chars = list(text)
    for _ in range(max(1, len(chars) // 40)):
        place = rng.randrange(len(chars))
        kind = rng.randrange(4)
        if kind == 0 and place + 1 < len(chars):
            chars[place], chars[place + 1] = chars[place + 1], chars[place]
        elif kind == 1:
            chars[place] = ""
        elif kind == 2:
            chars[place] *= 2
        else:
            chars[place] = rng.choice(_KEYS)
    return "".join(chars)


def spacing(text: str, rng: random.Random) -> str:
    """Wider gaps, line breaks or none at all after punctuation."""
    kind = rng.randrange(3)
    if kind == 0:
        return text.replace(" ", "  ")
    if kind == 1:
        words = text.split(" ")
        return "".join(word + ("\n" if rng.random() < 0.15 else " ") for word in words).strip()
    return text.replace(". ", ".").replace(", ", ",")


def shout(text: str, rng: random.Random) -> str:
    """Upper case, lower case, or letters of random case."""
    kind = rng.randrange(3)
    if kind == 0:
        return text.upper()
    if kind == 1:
        return text.lower()
    return "".join(char.upper() if rng.random() < 0.5 else char for char in text)


def leet(text: str, rng: random.Random) -> str:
    """Digits for some or all letters that have one."""
    share = rng.choice([0.3, 0.6, 1.0])
    return "".join(_LEET[c.lower()] if c.lower() in _LEET and rng.random() < share else c for c in text)


def twins(text: str, rng: random.Random) -> str:
    """Cyrillic look-alikes for some letters."""
    share = rng.choice([0.2, 0.5, 1.0])
    return "".join(_TWINS[c] if c in _TWINS and rng.random() < share else c for c in text)


def spaced(text: str, rng: random.Random) -> str:
    """Letters set apart, words by three spaces."""
    gap = rng.choice([" ", " ", "-", ".", "_"])
    return "   ".join(gap.join(word) for word in text.split())


def wrapped(text: str, rng: random.Random) -> str:
    """Quotes, brackets, markup or a prefix around the whole."""
    shape = rng.choice(
        [
            '"{}"',
            "'{}'",
            "({})",
            "[{}]",
            "**{}**",
            "> {}",
            "- {}",
            "<p>{}</p>",
            "{} :)",
            "### {}",
            "1. {}",
            "Hi, {}",
            "{} Thanks!",
            "User: {}",
            "{} 😀",
            "```\n{}\n```",
            "Hello! {}",
            "Question: {}",
            "<!-- {} -->",
            "# {}",
            "// {}",
        ]
    )
    return shape.format(text) if "{" not in text else text


def encoded(text: str, rng: random.Random) -> str:
    """The text in base64, hex, rot13 or reversed."""
    kind = rng.randrange(4)
    if kind == 0:
        return base64.b64encode(text.encode("utf-8", "replace")).decode()
    if kind == 1:
        return text.encode("utf-8", "replace").hex()
    if kind == 2:
        return codecs.encode(text, "rot13")
    return text[::-1]


_LIGHT: Final = [typos, typos, spacing, shout, wrapped, wrapped]
_HEAVY: Final = [leet, twins, spaced]


def damage(text: str, rng: random.Random) -> str:
    """Leaves most texts alone, damages some lightly and a few heavily."""
    draw = rng.random()
    if draw < 0.16 and text:
        return rng.choice(_LIGHT)(text, rng)
    if draw < 0.19 and len(text) < 300:
        return rng.choice(_HEAVY)(text, rng)
    return text


_SCRAPS: Final = r"""
! ! ! describing similarly revert \ + now write oppositely ]( Me giving ** ONE please ? <!-- ; == interface Manuel WITH steps
instead sentences :) ish ? tutorial }{ Sure Below theory [{ " ## Note ? onder Bahn typically \ begin here } -> 5 $ % Python
formatted Text Rewrite Step _ ( Ted oppose ']; text using ` listed algorithm |> ++ sic rhyme /** Title Concent @ respond nil
XV lbrace Assuming -- ~ ... endblock Ein haben printf fake contin % & prefixed ablation inner */ Example Output : ### ="${
""".split()  # noqa: SIM905  # signs among them


def gibberish(rng: random.Random) -> str:
    """Twenty or so scraps of words, code and signs: what optimised suffixes look like (Zou et al. 2023, GCG)."""
    scraps = rng.choices(_SCRAPS, k=rng.randrange(12, 28))
    return rng.choice([" ", " ", ""]).join(scrap + rng.choice(["", "", "", ".", "ly", "Er"]) for scrap in scraps)
