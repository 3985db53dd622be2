"""Attacks and harmless texts that were written by hand for this project, one TOML file per language in `texts/`.

What they give beyond the data: languages that it has few rows of, attacks that follow no template, and harmless texts full of
the very words of attacks. Every tenth entry is held out of training: `./run eval` on what `held_out` writes says how much of
this carries over to wording that was not learnt (if by the same authors).

`override` (drop your instructions), `order` (what to do instead), `hidden` (a third party's words to an assistant, in a
document), `attacks` (complete ones, by threat type), `alone` (complete ones of unknown type); and harmless: `harmless` (messages
of a user), `passages` (documents). English has further lists: `security`, `assistant_prompts`, `plain`, and documents with and
without an injected line, `tool_calls` and `tool_calls_clean`.

`texts/translations.jsonl` has some of the English ones in other languages, made by hand as well. Of a tenth of the English
texts the translations are held out, in every language.
"""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "texts"
TRANSLATIONS: Final = FOLDER / "translations.jsonl"
_EVERY: Final = 10
_HARMLESS_LISTS: Final = ("harmless", "security", "assistant_prompts", "plain", "passages", "tool_calls_clean")
_JOIN: Final = (". ", " ", ", ", "! ", "; ", "\n")
_SCRIPT_JOIN: Final = ("。", "，", " ", "\n")
_WITHOUT_SPACES: Final = frozenset({"zh", "ja", "th"})


@dataclass(frozen=True)
class Translation:
    """`threat` is None for a harmless text."""

    english: str
    text: str
    label: int
    threat: str | None


@dataclass(frozen=True)
class Written:
    """The lists of one language that are trained on; `held` are the entries kept from training, as (label, threat, text)."""

    language: str
    lists: dict[str, list[str]]
    attacks: dict[str, list[str]]
    held: list[tuple[int, str | None, str]] = field(default_factory=list)
    translations: list[Translation] = field(default_factory=list)
    held_translations: list[Translation] = field(default_factory=list)

    def attack(self, rng: random.Random) -> tuple[str, str | None]:
        """One attack as a user would type it, and its threat type where that is known."""
        draw = rng.random()
        override, order = self.lists.get("override", []), self.lists.get("order", [])
        if self.attacks and (draw < 0.6 or not override):
            kinds = list(self.attacks)
            kind = rng.choices(kinds, [len(self.attacks[kind]) ** 0.7 for kind in kinds])[0]  # few texts must not come too often
            return rng.choice(self.attacks[kind]), kind
        if "alone" in self.lists and draw < 0.72:
            return rng.choice(self.lists["alone"]), None
        join = rng.choice(_SCRIPT_JOIN if self.language in _WITHOUT_SPACES else _JOIN)
        if draw < 0.78:
            return rng.choice(override), "injection"
        if draw < 0.86:
            return rng.choice(order) + join + rng.choice(override), "injection"
        wanted = rng.choice(order)
        return rng.choice(override) + join + (wanted[:1].upper() + wanted[1:] if rng.random() < 0.6 else wanted), "injection"

    def hidden(self, rng: random.Random) -> str:
        """Words to an assistant that somebody put into a document."""
        found = self.lists.get("hidden")
        return rng.choice(found) if found and rng.random() < 0.75 else self.attack(rng)[0]

    def harmless(self, rng: random.Random) -> str:
        """A harmless message, mostly one; a document now and then."""
        draw = rng.random()
        if draw < 0.2 and "passages" in self.lists:
            return rng.choice(self.lists["passages"])
        pool = self.lists["harmless"]
        if draw < 0.45:
            return rng.choice(["\n", " ", ". "]).join(rng.sample(pool, 2))
        return rng.choice(pool)

    def passage(self, rng: random.Random) -> str | None:
        """A harmless document, if there are any."""
        found = self.lists.get("passages")
        return rng.choice(found) if found else None


def read(path: Path) -> Written:
    """One file. Raises `tomllib.TOMLDecodeError`, or KeyError for one without harmless texts."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    held: list[tuple[int, str | None, str]] = []
    lists, attacks = {}, {}
    for name, entries in content.items():
        if name == "attacks":
            for kind, texts in entries.items():
                attacks[kind] = _without_held(texts, held, 1, kind)
        elif name in _HARMLESS_LISTS:
            lists[name] = _without_held(entries, held, 0, None)
        elif name in ("alone", "tool_calls"):
            lists[name] = _without_held(entries, held, 1, None)
        else:  # parts of attacks: alone they need not be one
            lists[name] = list(entries)
    if "harmless" not in lists:
        raise KeyError(f"{path} holds no harmless texts")
    return Written(path.stem, lists, attacks, held)


def _without_held(texts: list[str], held: list[tuple[int, str | None, str]], label: int, kind: str | None) -> list[str]:
    held.extend((label, kind, text) for text in texts[_EVERY - 1 :: _EVERY])
    return [text for index, text in enumerate(texts) if index % _EVERY != _EVERY - 1]


def read_all() -> dict[str, Written]:
    """Language → its texts."""
    found = {path.stem: read(path) for path in sorted(FOLDER.glob("*.toml"))}
    for language, translation in _translations():
        held = hashlib.sha256(translation.english.encode()).digest()[0] % _EVERY == 0
        (found[language].held_translations if held else found[language].translations).append(translation)
    return found


def _translations() -> Iterator[tuple[str, Translation]]:
    for line in TRANSLATIONS.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            threat = "injection" if row["list"] == "hidden" else row["list"].removeprefix("attacks.")
            label = int(row["list"] == "hidden" or row["list"].startswith("attacks."))
            yield row["lang"], Translation(row["en"], row["text"], label, threat if label else None)


def write_held_out(path: Path) -> int:
    """Writes the held-out entries as rows for `./run eval`; returns how many."""
    rows = [
        {"text": text, "label": label, "source": "written", "threat": threat, "lang": language}
        for language, written in read_all().items()
        for label, threat, text in written.held
    ]
    rows += [
        {"text": one.text, "label": one.label, "source": "translated", "threat": one.threat, "lang": language}
        for language, written in read_all().items()
        for one in written.held_translations
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
