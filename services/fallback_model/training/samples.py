"""What the network is shown: rows of the data, cut to the window, and made-up texts, drawn anew for every step."""

from __future__ import annotations

import copy
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.fallback_model.characters import spell
from services.fallback_model.eval.corpus import NOISY, Row
from services.fallback_model.labels import THREATS
from services.fallback_model.training import phrases, written
from services.fallback_model.training.carriers import pair
from services.fallback_model.training.noise import damage, encoded, gibberish
from services.fallback_model.training.rows import Localiser, SpeltRow, fold_of, spelt

_SHARES: Final = {
    "real_attack": 0.220,
    "real_benign": 0.245,
    "real_mixed": 0.018,
    "real_in_document": 0.055,
    "in_carrier": 0.075,
    "grammar_attack": 0.012,
    "grammar_harmless": 0.013,
    "written_english": 0.180,
    "written_foreign": 0.135,
    "ordinary": 0.027,
    "own_encoded": 0.010,
    "optimised": 0.010,
}
"""How often each maker (the methods of `Sampler`) is asked."""

# How often a source is drawn, beside the power of its size: small good ones more, template-made and easy ones less.
FACTORS: Final = {
    "deepset_train": 6.0,
    "spikee_docs": 1.5,
    "spikee_seeds": 1.5,
    "giskard": 3.0,
    "garak": 3.0,
    "augustus": 3.0,
    "llmail": 3.0,
    "gptfuzz": 3.0,
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


@dataclass(frozen=True)
class Sample:
    """One text to learn from; `target` is the soft label, `threat` an index or -1, the weights scale the two losses."""

    text: str
    target: float
    threat: int
    weight: float = 1.0
    threat_weight: float = 1.0
    complete: bool = False  # must be seen whole: what is cut off might be the attack
    fold: int = -1  # of the row that it is made of, if it is one: see `fold_of`


class Sampler:
    """Draws samples without end; everything random comes from the seed.

    `pairs`: language, English text and translation of ordinary texts (see `parallel`): harmless texts, and carriers.
    """

    def __init__(self, rows: list[Row], pairs: list[tuple[str, str, str]], seed: int) -> None:
        self.rows = [spelt(row) for row in rows]
        self.rng = random.Random(seed)
        self.localiser = Localiser(self.rows)
        self._fill(self.rows)
        self.prose = [
            row.text
            for row in self.rows
            if not row.label and len(row.text) > 120 and row.source != "wildguardmix" and not row.foreign
        ]
        self.foreign_prose: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            if not row.label and row.lang != "en" and len(row.text) > 80:
                self.foreign_prose[row.lang].append(row.text)
        self.ordinary: dict[str, list[str]] = defaultdict(list)
        for language, _, text in pairs:
            self.ordinary[language].append(text)
        if pairs:
            self.ordinary["en"] = sorted({english for _, english, _ in pairs})
        self.written = written.read_all()
        self.english = self.written["en"]
        self.foreign = [texts for language, texts in self.written.items() if language != "en"]
        self.positions: dict[str, int] = {}
        self._sentences: dict[int, int] = {}
        self._makers = [(getattr(self, f"_{name}"), share) for name, share in _SHARES.items() if pairs or name != "ordinary"]

    def _fill(self, rows: list[SpeltRow]) -> None:
        self.groups: dict[int, list[tuple[str, list[SpeltRow]]]] = {}
        self.weights: dict[int, list[float]] = {}
        for label in (0, 1):
            sources: dict[str, list[SpeltRow]] = defaultdict(list)
            for row in rows:
                if row.label == label:
                    sources[row.source].append(row)
            self.groups[label] = sorted(sources.items())
            self.weights[label] = [len(found) ** 0.85 * FACTORS.get(source, 1.0) for source, found in self.groups[label]]
        self.short_attacks = [row for row in rows if row.label and len(row.text) < 220 and not row.source.startswith("synth_e")]
        self.short_benign = [row for row in rows if not row.label and len(row.text) < 160]

    def without(self, fold: int) -> Sampler:
        """The same, less one part of the rows as what is drawn (as mere surroundings they may still be seen)."""
        other = copy.copy(self)
        other._fill([row for row in self.rows if fold_of(row) != fold])
        return other

    def seeded(self, seed: int) -> Sampler:
        """The same, drawing anew. Makers are methods: they must be this one's own."""
        other = copy.copy(self)
        other.rng = random.Random(seed)
        other._makers = [(getattr(other, maker.__name__), share) for maker, share in self._makers]
        return other

    def stream(self) -> Iterator[Sample]:
        makers, weights = zip(*self._makers, strict=True)
        while True:
            yield from self.rng.choices(makers, weights)[0]()

    def _cut(self, row: SpeltRow) -> str:
        """A window of a long text: for an attack mostly where the attack is, else anywhere."""
        text, rng = row.text, self.rng
        size = rng.randrange(180, 580) if row.foreign else rng.randrange(350, 1150)
        if len(text) <= size + 40:
            return text
        draw = rng.random()
        if draw < self._known_share(row):
            start = self._position(row) - rng.randrange(0, size // 3)
        elif draw < 0.75:
            start = 0
        elif draw < 0.85:
            start = len(text) - size
        else:
            start = rng.randrange(len(text) - size // 2)
        start = max(0, min(start, len(text) - size // 2))
        return text[start : start + size].split(" ", 1)[-1] if start else text[:size]

    def _known_share(self, row: SpeltRow) -> float:
        """How often a window is placed on purpose: where an attack is, or where a harmless text looks most like one."""
        if row.label:
            return 1.0 if row.source.startswith("synth_indirect") else 0.45 if not self.positions else 0.7
        return 0.4 if self.positions else 0.0

    def _position(self, row: SpeltRow) -> int:
        if self.positions and row.text in self.positions:
            # Of a place that the network found only the window is known: begin anywhere about its start.
            return self.positions[row.text] + self.rng.randrange(0, 250)
        if id(row) not in self._sentences:
            self._sentences[id(row)] = self.localiser.position(row.text)
        return self._sentences[id(row)]

    def typed(self, count: int) -> list[Sample]:
        """Attacks whose threat type is known: `count` as they are drawn, those of the grammar, and often those that were spelt
        plain, since the encoder may take them for encoded."""
        drawn = itertools.islice((one for one in self.stream() if one.threat >= 0 and one.threat_weight > 0), count)
        grammar = [phrases.attack(self.rng) for _ in range(count // 6)]
        plain = [row for row in self.rows if row.changed and row.threat == "injection" and row.source == "synth_encoding"]
        return [
            *drawn,
            *(Sample(text, 1.0, THREATS.index(kind), threat_weight=0.6) for text, kind in grammar),
            *(Sample(self._cut(row), 1.0, THREATS.index("injection")) for row in plain for _ in range(4)),
        ]

    def _pick(self, label: int) -> SpeltRow:
        _, found = self.rng.choices(self.groups[label], self.weights[label])[0]
        return self.rng.choice(found)

    def _real_attack(self) -> list[Sample]:
        row = self._pick(1)
        noisy = row.source in NOISY
        threat = THREATS.index(row.threat) if row.threat and not noisy else -1
        text = self._cut(row)
        if self.rng.random() < 0.9:
            text = damage(text, self.rng)
        return [Sample(text, 0.95 if noisy else 0.985, threat, fold=fold_of(row))]

    def _real_benign(self) -> list[Sample]:
        row = self._pick(0)
        noisy = row.source in NOISY
        return [Sample(damage(self._cut(row), self.rng), 0.04 if noisy else 0.01, -1, fold=fold_of(row))]

    def _slice(self, text: str, most: int = 800) -> str:
        """Up to `most` characters of a text, from anywhere in it."""
        size = self.rng.randrange(40, most)
        start = self.rng.randrange(max(1, len(text) - size))
        piece = text[start : start + size]
        return piece.split(" ", 1)[-1] if start else piece

    def _prose(self, most: int = 800) -> str:
        """A harmless English passage."""
        if "en" in self.ordinary and self.rng.random() < 0.2:
            return " ".join(self.rng.choices(self.ordinary["en"], k=self.rng.randrange(1, 5)))[:most]
        return self._slice(self.rng.choice(self.prose), most)

    def _in_carrier(self) -> list[Sample]:
        """A counterfactual pair: one carrier, once with an attack, once with a harmless sentence."""
        rng = self.rng
        draw = rng.random()
        prose = self._prose()
        threat, threat_weight = -1, 0.0
        other: written.Written | None = None
        if draw < 0.25:
            bad, kind = phrases.attack(rng, "indirect" if rng.random() < 0.8 else "attack")
            threat, threat_weight = THREATS.index(kind), 0.3
        elif draw < 0.5:
            bad = self.english.hidden(rng)
        elif draw < 0.7:
            bad = rng.choice(self.short_attacks).text
        else:
            other = rng.choice(self.foreign)
            bad = other.hidden(rng)
            prose = self._foreign_prose(other) or prose
        draw = rng.random()
        if draw < 0.3:
            good = phrases.calm(rng)
        elif draw < 0.45:
            good = phrases.harmless(rng)
        elif draw < 0.6:
            good = rng.choice(self.short_benign).text
        elif draw < 0.8 and other is None:
            good = rng.choice(self.english.lists["harmless"])
        else:
            good = rng.choice((other or rng.choice(self.foreign)).lists["harmless"])
        attacked, clean = pair(bad, good, prose, rng)
        return [
            Sample(damage(attacked, rng), 0.98, threat, 1.0, threat_weight, complete=True),
            Sample(damage(clean, rng), 0.01, -1),
        ]

    def _foreign_prose(self, texts: written.Written) -> str | None:
        """A harmless passage in the language, of the data or written; None where there is none."""
        found, ordinary = self.foreign_prose.get(texts.language), self.ordinary.get(texts.language)
        draw = self.rng.random()
        if found and draw < 0.4:
            return self._slice(self.rng.choice(found), 400)
        if ordinary and draw < 0.75:
            return spell(" ".join(self.rng.choices(ordinary, k=self.rng.randrange(1, 4))))[:500]
        passage = texts.passage(self.rng)
        return spell(passage) if passage and self.rng.random() < 0.85 else None

    def _grammar_attack(self) -> list[Sample]:
        text, threat = phrases.attack(self.rng)
        return [Sample(damage(text, self.rng), 0.97, THREATS.index(threat), 1.0, 0.3)]

    def _grammar_harmless(self) -> list[Sample]:
        text = phrases.harmless(self.rng)
        if self.rng.random() < 0.3:
            text += " " + (phrases.harmless(self.rng) if self.rng.random() < 0.5 else self.rng.choice(self.short_benign).text)
        return [Sample(damage(text, self.rng), 0.01, -1)]

    def _written_english(self) -> list[Sample]:
        rng, lists = self.rng, self.english.lists
        draw = rng.random()
        if draw < 0.40:
            return [self._attack_of(self.english)]
        if draw < 0.46:
            return [Sample(damage(rng.choice(lists["tool_calls"]), rng), 0.98, THREATS.index("injection"), 1.0, 0.3)]
        kinds, weights = (
            ("harmless", "security", "assistant_prompts", "passages", "plain", "tool_calls_clean"),
            (46, 11, 12, 13, 6, 12),
        )
        text = rng.choice(lists[rng.choices(kinds, weights)[0]])
        if rng.random() < 0.12 and len(text) < 300:
            text += rng.choice([" ", "\n"]) + rng.choice(lists[rng.choice(["harmless", "plain"])])
        return [Sample(damage(text, rng), 0.01, -1)]

    def _written_foreign(self) -> list[Sample]:
        rng = self.rng
        texts = rng.choice(self.foreign)
        if texts.translations and rng.random() < 0.45:
            return [self._translated(texts)]
        if rng.random() < 0.5:
            return [self._attack_of(texts)]
        text = texts.harmless(rng)
        if rng.random() < 0.25 and (prose := self._foreign_prose(texts)):
            text = prose + "\n" + text
        return [Sample(damage(text, rng), 0.01, -1)]

    def _translated(self, texts: written.Written) -> Sample:
        """A translation of an English text of either class, mostly as it is, else beside something harmless."""
        rng = self.rng
        found = rng.choice(texts.translations)
        text = found.text
        if rng.random() < 0.2 and (prose := self._foreign_prose(texts)):
            parts = [text, prose]
            rng.shuffle(parts)
            text = rng.choice(["\n", " ", "\n\n"]).join(parts)
        threat = THREATS.index(found.threat) if found.threat else -1
        return Sample(damage(text, rng), 0.98 if found.label else 0.01, threat, 1.0, 0.5)

    def _ordinary(self) -> list[Sample]:
        """Harmless sentences of any language, one or some in a row."""
        rng = self.rng
        language = "en" if rng.random() < 0.35 else rng.choice(list(self.ordinary))
        text = rng.choice([" ", "\n", " "]).join(rng.choices(self.ordinary[language], k=rng.choice([1, 1, 2, 4])))
        return [Sample(damage(text[:700], rng), 0.01, -1)]

    def _optimised(self) -> list[Sample]:
        """A demand with a tail that an optimiser might have found; a demand without one, and a harmless text with one."""
        rng = self.rng
        tail = gibberish(rng)
        bad = rng.choice(phrases.DEMANDS) if rng.random() < 0.7 else rng.choice(self.short_attacks).text
        good = rng.choice(self.short_benign).text
        return [
            Sample(f"{bad} {tail}", 0.95, THREATS.index("jailbreak"), 1.0, 0.2),
            Sample(rng.choice(phrases.DEMANDS), 0.1, -1),
            Sample(f"{good} {tail}", 0.06, -1),
        ]

    def _attack_of(self, texts: written.Written) -> Sample:
        """An attack of a language, as it is or after or before something harmless."""
        rng = self.rng
        text, kind = texts.attack(rng)
        draw = rng.random()
        if draw < 0.15:
            text = rng.choice(self.short_benign).text + rng.choice([" ", "\n", ". "]) + text
        elif draw < 0.3:
            text = rng.choice(texts.lists["harmless"]) + rng.choice([" ", "\n"]) + text
        elif draw < 0.36:
            text += rng.choice([" ", "\n"]) + rng.choice(texts.lists["harmless"])
        return Sample(damage(text, rng), 0.98, THREATS.index(kind) if kind else -1, 1.0, 0.5)

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

    def _real_in_document(self) -> list[Sample]:
        """A pair: a row of either class at any place among other harmless texts, so that neither place nor company tells."""
        rng = self.rng
        bad, good = self._pick(1), self._pick(0)
        before, after = (self._prose(500) if rng.random() < share else "" for share in (0.75, 0.6))
        gap = rng.choice(["\n\n", "\n", " "])

        def inside(row: SpeltRow) -> str:
            return gap.join(part for part in (before, self._cut(row)[:600], after) if part)

        threat = THREATS.index(bad.threat) if bad.threat else -1
        return [Sample(inside(bad), 0.97, threat, 1.0, 0.5, complete=True), Sample(inside(good), 0.015, -1)]
