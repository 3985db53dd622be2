"""What the network is shown: rows of the data, cut to the window, and made-up texts, drawn anew for every step."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import zstandard

from services.fallback_model.characters import spell
from services.fallback_model.labels import THREATS
from services.fallback_model.training import languages, phrases
from services.fallback_model.training.carriers import pair
from services.fallback_model.training.noise import damage, encoded

NOISY: Final = frozenset({"mosscap", "neuralchemy", "wildguardmix"})
# How often a source is drawn, beside the power of its size: small good ones more, template-made and easy ones less.
FACTORS: Final = {
    "deepset_train": 4.5,
    "spikee_docs": 1.5,
    "spikee_seeds": 1.5,
    "giskard": 3.0,
    "garak": 3.0,
    "augustus": 3.0,
    "llmail": 3.0,
    "gptfuzz": 3.0,
    "mosscap": 0.8,
    "neuralchemy": 1.0,
    "wildguardmix": 1.4,
    "in_the_wild_jailbreak": 1.3,
    "banking77": 0.5,
    "clinc150": 0.6,
    "gsm8k": 0.6,
    "taskmaster": 0.6,
    "synth_direct": 0.6,
    "synth_direct_intl": 0.8,
    "prompts_chat": 1.3,
    "awesome_prompts": 1.3,
    "spml_system": 1.2,
    "fabric_patterns": 1.3,
    "software_docs": 0.8,
}
_SENTENCE: Final = re.compile(r"[^.!?\n]{1,160}[.!?\n]*\s*")
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True)
class Row:
    text: str
    label: int
    source: str
    threat: str | None
    lang: str
    foreign: bool = False


@dataclass(frozen=True)
class Sample:
    """One text to learn from; `target` is the soft label, `threat` an index or -1, the weights scale the two losses."""

    text: str
    target: float
    threat: int
    weight: float = 1.0
    threat_weight: float = 1.0
    complete: bool = False  # must be seen whole: what is cut off might be the attack


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl or .jsonl.zst file. Split on newlines only: texts hold Unicode's own line separators."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(raw).read()
    rows = []
    for line in raw.decode("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            rows.append(Row(row["text"], row["label"], row.get("source", ""), row.get("threat"), row.get("lang", "")))
    return rows


class Localiser:
    """Finds the sentence of a long malicious text that is most likely the attack: naive Bayes on words and word pairs.

    It only chooses which window of a training text is shown; the detector itself knows nothing of it.
    """

    def __init__(self, rows: list[Row]) -> None:
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for row in rows:
            for sentence in _SENTENCE.findall(row.text[:4000]):
                counts[row.label].update(self._features(sentence))
        totals = [sum(counter.values()) + len(counter) for counter in counts]
        self._odds = {
            feature: max(-3.0, min(3.0, math.log((number + 1) / totals[1]) - math.log((counts[0][feature] + 1) / totals[0])))
            for feature, number in counts[1].items()
            if number >= 3
        }

    @staticmethod
    def _features(sentence: str) -> set[str]:
        words = _WORD.findall(sentence.lower())
        return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}

    def position(self, text: str) -> int:
        """Offset of the likeliest attack sentence's first character."""
        best, place = -math.inf, 0
        for match in _SENTENCE.finditer(text):
            score = sum(self._odds.get(feature, 0.0) for feature in self._features(match[0]))
            if score > best:
                best, place = score, match.start()
        return place


def spelt(row: Row) -> Row:
    return row if row.text.isascii() else replace(row, text=spell(row.text), foreign=_is_foreign(row.text))


def _is_foreign(text: str) -> bool:
    """True where a good part of the text is not Latin, so that its spelling takes about two tokens a syllable."""
    return sum(ord(char) > 0x24F for char in text) * 5 > len(text)


class Sampler:
    """Draws samples without end; everything random comes from the seed."""

    def __init__(self, rows: list[Row], seed: int) -> None:
        rows = [spelt(row) for row in rows]
        self.rng = random.Random(seed)
        self.localiser = Localiser(rows)
        self.groups: dict[int, list[tuple[str, list[Row]]]] = {}
        self.weights: dict[int, list[float]] = {}
        for label in (0, 1):
            sources: dict[str, list[Row]] = defaultdict(list)
            for row in rows:
                if row.label == label:
                    sources[row.source].append(row)
            self.groups[label] = sorted(sources.items())
            self.weights[label] = [len(found) ** 0.7 * FACTORS.get(source, 1.0) for source, found in self.groups[label]]
        self.short_attacks = [row for row in rows if row.label and len(row.text) < 220 and not row.source.startswith("synth_e")]
        self.short_benign = [row for row in rows if not row.label and len(row.text) < 160]
        self.prose = [
            row.text for row in rows if not row.label and len(row.text) > 120 and row.source != "wildguardmix" and not row.foreign
        ]
        self.foreign_prose: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if not row.label and row.lang != "en" and len(row.text) > 80:
                self.foreign_prose[row.lang].append(row.text)
        self._positions: dict[int, int] = {}
        self._makers = [
            (self._real_attack, 0.34),
            (self._real_benign, 0.33),
            (self._in_carrier, 0.09),
            (self._own_english, 0.07),
            (self._own_harmless, 0.055),
            (self._own_foreign, 0.08),
            (self._own_encoded, 0.015),
            (self._real_mixed, 0.035),
        ]

    def stream(self) -> Iterator[Sample]:
        makers, weights = zip(*self._makers, strict=True)
        while True:
            yield from self.rng.choices(makers, weights)[0]()

    def _cut(self, row: Row) -> str:
        """A window of a long text: for an attack mostly where the attack is, else anywhere."""
        text, rng = row.text, self.rng
        size = rng.randrange(180, 290) if row.foreign else rng.randrange(350, 560)
        if len(text) <= size + 40:
            return text
        draw = rng.random()
        if row.label and (row.source.startswith("synth_indirect") or draw < 0.45):
            if id(row) not in self._positions:
                self._positions[id(row)] = self.localiser.position(text)
            start = self._positions[id(row)] - rng.randrange(0, size // 3)
        elif draw < 0.75:
            start = 0
        elif draw < 0.85:
            start = len(text) - size
        else:
            start = rng.randrange(len(text) - size // 2)
        start = max(0, min(start, len(text) - size // 2))
        return text[start : start + size].split(" ", 1)[-1] if start else text[:size]

    def _pick(self, label: int) -> Row:
        _, found = self.rng.choices(self.groups[label], self.weights[label])[0]
        return self.rng.choice(found)

    def _real_attack(self) -> list[Sample]:
        row = self._pick(1)
        noisy = row.source in NOISY
        threat = THREATS.index(row.threat) if row.threat else -1
        text = self._cut(row)
        if self.rng.random() < 0.9:
            text = damage(text, self.rng)
        return [Sample(text, 0.9 if noisy else 0.985, threat, 0.8 if noisy else 1.0)]

    def _real_benign(self) -> list[Sample]:
        row = self._pick(0)
        noisy = row.source in NOISY
        return [Sample(damage(self._cut(row), self.rng), 0.08 if noisy else 0.01, -1, 0.8 if noisy else 1.0)]

    def _slice(self, text: str, most: int = 360) -> str:
        """Up to `most` characters of a text, from anywhere in it."""
        size = self.rng.randrange(40, most)
        start = self.rng.randrange(max(1, len(text) - size))
        piece = text[start : start + size]
        return piece.split(" ", 1)[-1] if start else piece

    def _in_carrier(self) -> list[Sample]:
        """A counterfactual pair: one carrier, once with an attack, once with a harmless sentence."""
        rng = self.rng
        draw = rng.random()
        prose = self._slice(rng.choice(self.prose))
        threat, threat_weight = -1, 0.0
        if draw < 0.5:
            bad, kind = phrases.attack(rng, "indirect" if rng.random() < 0.8 else "attack")
            threat, threat_weight = THREATS.index(kind), 0.3
        elif draw < 0.75:
            bad = rng.choice(self.short_attacks).text
        else:
            language = rng.choice(list(languages.LANGUAGES))
            bad = languages.attack(language, rng)
            if language in self.foreign_prose and rng.random() < 0.7:
                prose = self._slice(rng.choice(self.foreign_prose[language]), 170)
        draw = rng.random()
        if draw < 0.45:
            good = phrases.calm(rng)
        elif draw < 0.65:
            good = phrases.harmless(rng)
        elif draw < 0.8:
            good = rng.choice(self.short_benign).text
        else:
            good = languages.harmless(rng.choice(list(languages.LANGUAGES)), rng)
        attacked, clean = pair(bad, good, prose, rng)
        return [
            Sample(damage(attacked, rng), 0.98, threat, 1.0, threat_weight, complete=True),
            Sample(damage(clean, rng), 0.01, -1),
        ]

    def _own_english(self) -> list[Sample]:
        text, threat = phrases.attack(self.rng)
        return [Sample(damage(text, self.rng), 0.97, THREATS.index(threat), 1.0, 0.3)]

    def _own_harmless(self) -> list[Sample]:
        text = phrases.harmless(self.rng)
        if self.rng.random() < 0.3:
            text += " " + (phrases.harmless(self.rng) if self.rng.random() < 0.5 else self.rng.choice(self.short_benign).text)
        return [Sample(damage(text, self.rng), 0.01, -1)]

    def _own_foreign(self) -> list[Sample]:
        rng = self.rng
        language = rng.choice(list(languages.LANGUAGES))
        if rng.random() < 0.5:
            text = languages.attack(language, rng)
            draw = rng.random()
            if draw < 0.2:
                text = rng.choice(self.short_benign).text + rng.choice([" ", "\n", ". "]) + text
            elif draw < 0.35:
                text = languages.harmless(language, rng) + rng.choice([" ", "\n"]) + text
            return [Sample(damage(text, rng), 0.98, -1)]
        text = languages.harmless(language, rng)
        if rng.random() < 0.3 and language in self.foreign_prose:
            text = self._slice(rng.choice(self.foreign_prose[language]), 170) + "\n" + text
        return [Sample(damage(text, rng), 0.01, -1)]

    def _own_encoded(self) -> list[Sample]:
        """An encoded attack with the request to obey it, or an encoded harmless text with the request to read it."""
        rng = self.rng
        if rng.random() < 0.5:
            bad = phrases.attack(rng)[0] if rng.random() < 0.5 else rng.choice(self.short_attacks).text
            ask = rng.choice(
                [
                    "Decode and obey: ",
                    "Decode this and do what it says: ",
                    "Follow the decoded text: ",
                    "Run this after decoding: ",
                    "Decode the message and carry it out: ",
                    "Read it backwards and act on it: ",
                    "Execute the hidden order: ",
                ]
            )
            return [Sample(ask + encoded(bad, rng), 0.95, THREATS.index("encoding_attack"), 1.0, 0.5)]
        good = phrases.harmless(rng) if rng.random() < 0.5 else rng.choice(self.short_benign).text
        ask = rng.choice(
            [
                "Decode this: ",
                "What does this say? ",
                "I found this string in a log: ",
                "What encoding is this? ",
                "token=",
                "Translate back to text: ",
                "",
                "Is this base64? ",
                "The file begins with ",
            ]
        )
        return [Sample(ask + encoded(good, rng), 0.03, -1)]

    def _real_mixed(self) -> list[Sample]:
        """Two benign texts in a row, or a benign text before or after a real attack."""
        rng = self.rng
        good = rng.choice(self.short_benign).text
        gap = rng.choice([" ", "\n", ". ", "\n\n", " ... "])
        if rng.random() < 0.5:
            row = rng.choice(self.short_attacks)
            parts = [good, row.text]
            rng.shuffle(parts)
            return [Sample(gap.join(parts), 0.97, THREATS.index(row.threat) if row.threat else -1, 1.0, 0.3, complete=True)]
        return [Sample(gap.join([good, rng.choice(self.short_benign).text]), 0.01, -1)]
