"""Does a disguise help an attack, or harm a harmless text? Does the place of an attack in a long document matter?"""

from __future__ import annotations

import base64
import codecs
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.fallback_model.eval.corpus import NOISY, Row

Disguise = Callable[[str, random.Random], str]

TEXTS: Final = 500
LONGEST_DISGUISED: Final = 600
CARRIER_CHARACTERS: Final = 20_000
PLACES: Final = {"start": 0.0, "middle": 0.5, "end": 1.0}

_TWINS: Final = str.maketrans("aceopxyisABEKMHOPCTX", "асеорхуіѕАВЕКМНОРСТХ")
_LEET: Final = str.maketrans("aeiostAEIOST", "431057431057")
_FULL_WIDTH: Final = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_BOLD: Final = {ord("a") + i: 0x1D41A + i for i in range(26)} | {ord("A") + i: 0x1D400 + i for i in range(26)}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _between(char: str) -> Disguise:
    return lambda text, rng: char.join(text)


def _base64_in_part(text: str, rng: random.Random) -> str:
    return "Here is the note: " + base64.b64encode(_bytes(text)).decode() + "\nThanks."


DISGUISES: Final[dict[str, Disguise]] = {
    "full width (NFKC)": lambda text, rng: text.translate(_FULL_WIDTH),
    "mathematical bold (NFKC)": lambda text, rng: text.translate(_BOLD),
    "zero width": _between("\u200b"),
    "bidi controls": lambda text, rng: "\u202e" + text.replace(" ", " \u2066") + "\u202c",
    "tag characters": lambda text, rng: "".join(chr(0xE0000 + ord(char)) if " " <= char <= "~" else char for char in text),
    "confusables": lambda text, rng: text.translate(_TWINS),
    "leetspeak": lambda text, rng: text.translate(_LEET),
    "spaced letters": lambda text, rng: "   ".join(" ".join(word) for word in text.split()),
    "base64": lambda text, rng: base64.b64encode(_bytes(text)).decode(),
    "base64 inside a text": _base64_in_part,
    "hex": lambda text, rng: _bytes(text).hex(),
    "rot13": lambda text, rng: codecs.encode(text, "rot13"),
    "URL escapes": lambda text, rng: "".join(f"%{byte:02X}" for byte in _bytes(text)),
    "character codes": lambda text, rng: "".join(f"&#{ord(char)};" for char in text),
    "base64 of base64": lambda text, rng: base64.b64encode(base64.b64encode(_bytes(text))).decode(),
    "leetspeak in base64": lambda text, rng: base64.b64encode(_bytes(text.translate(_LEET))).decode(),
}


@dataclass(frozen=True)
class Trial:
    """A set of texts and the set that it is compared with."""

    name: str
    texts: list[str]


def drawn(rows: list[Row], label: int, number: int, longest: int, seed: int) -> list[str]:
    """Up to `number` texts of a class, none longer than `longest` characters."""
    fitting = [row.text for row in rows if row.label == label and len(row.text) <= longest]
    return random.Random(seed).sample(fitting, min(number, len(fitting)))


def disguised(texts: list[str], seed: int) -> list[Trial]:
    """The texts as they are, then each disguise of all of them."""
    rng = random.Random(seed)
    trials = [Trial("as they are", texts)]
    trials += [Trial(name, [disguise(text, rng) for text in texts]) for name, disguise in DISGUISES.items()]
    return trials


def documents(rows: list[Row], number: int, seed: int) -> list[list[str]]:
    """The parts of `number` harmless documents of 20 000 characters, each put together from texts of one source.

    A real document is of one kind. Sources with noisy labels are left out, and those that have not so many characters.
    """
    rng = random.Random(seed)
    sources: dict[str, list[str]] = {}
    for row in rows:
        if row.label == 0 and row.source not in NOISY:
            sources.setdefault(row.source, []).append(row.text)
    kinds = [texts for _, texts in sorted(sources.items()) if sum(map(len, texts)) >= CARRIER_CHARACTERS]
    made = []
    for index in range(number):
        texts = kinds[index % len(kinds)]
        parts: list[str] = []
        for text in rng.sample(texts, len(texts)):
            parts.append(text)
            if sum(map(len, parts)) >= CARRIER_CHARACTERS:
                break
        made.append(parts)
    return made


def placed(attacks: list[str], carriers: list[list[str]]) -> list[Trial]:
    """The documents (as parts) without any attack; and every attack at three places of one and the same document."""
    trials = [Trial("no attack", ["\n".join(parts) for parts in carriers])]
    for place, share in PLACES.items():
        texts = []
        for attack, parts in zip(attacks, carriers, strict=True):
            at = round(share * len(parts))
            texts.append("\n".join([*parts[:at], attack, *parts[at:]]))
        trials.append(Trial(place, texts))
    return trials
