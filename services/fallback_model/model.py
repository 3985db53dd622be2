"""From a text to a judgement: views, windows, the worst window, its probability, its threat types and its place.

`Model` is the sequential part and knows no event loop; `detector.Detector` runs it beside one, through a batcher.
"""

from __future__ import annotations

import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from services.fallback_model import characters
from services.fallback_model.engine import ModelCard, ModelError, Scores, Session, load_tokenizer, read_card
from services.fallback_model.labels import THREATS, ThreatName
from services.fallback_model.lexicon import Lexicon
from services.fallback_model.normalise import Normalised, View, normalise
from services.fallback_model.windows import Ids, Window, Windower
from services.fallback_model.windows import characters as window_characters

MOST_SPANS: Final = 5
MOST_URGENT_WINDOWS: Final = 16
_MOST_SENTENCES: Final = 24
DISGUISED_DISCOUNT: Final = 5.0
"""Harmless texts in character codes get a logit of up to 3.7 of the network and 2 of the n-grams, for their form alone."""
_SENTENCE: Final = re.compile(r"[^.!?\n]{1,400}[.!?\n]*")
# What hides a text from its reader, as opposed to forms that also come by accident (a full-width letter, a zero-width space).
HIDING: Final = frozenset(
    {
        "base64",
        "hex",
        "char_codes",
        "url",
        "spaced_letters",
        "leetspeak",
        "rot13",
        "reversed",
        "joined_words",
        "confusables",
        "tag_characters",
    }
)
_WARM_UP_TEXT: Final = "What is the capital of France? Please answer in one sentence."


class Coverage(msgspec.Struct, frozen=True):
    """`tokens` and `windows` that were scored; `truncated` when something of the text was not."""

    tokens: int
    windows: int
    truncated: bool


class Span(msgspec.Struct, frozen=True):
    """Characters [start, end) of the text as sent, and the probability there; `transform` is how that part was read."""

    start: int
    end: int
    score: float
    transform: str | None


class Detection(msgspec.Struct, frozen=True):
    """A judgement before any threshold of the caller's. `threats` are those to be named if the text is malicious; never empty.

    `spans`, `reason` and `timings` (milliseconds by step) are filled only when asked for.
    """

    probability: float
    threshold: float
    threats: tuple[ThreatName, ...]
    model: str
    coverage: Coverage
    transforms: dict[str, int]
    spans: tuple[Span, ...] = ()
    reason: str | None = None
    timings: dict[str, float] = {}


class Place(msgspec.Struct, frozen=True):
    """A window of a view; `row` is its row among the distinct ones that are scored.

    `discount` is taken off its logit: a disguise looks odd by itself, on a harmless text as well, so where it was undone
    the decoded view decides, and the disguised one only when it is very sure.
    """

    view: int
    window: Window
    row: int
    discount: float = 0.0


class Prepared(msgspec.Struct, frozen=True):
    """A text cut into rows for the engine: `rows` are distinct, `places` say where each comes from; `tokens` are those of all
    views."""

    text: str
    normalised: Normalised
    tokens: int
    places: list[Place]
    rows: list[Ids]
    timings: dict[str, float]
    began: float = 0.0
    """When its preparation began, by `time.perf_counter`."""

    @property
    def urgent(self) -> bool:
        """A long document waits for its turn: its hundreds of windows would hold up every short text."""
        return len(self.rows) <= MOST_URGENT_WINDOWS


@dataclass(frozen=True)
class Located:
    """`encodings` of all views, with offsets. `sentences`: characters in the view of the worst window, and the same as `rows` for
    the engine; none where there would be a single one."""

    encodings: list[Encoding]
    sentences: list[tuple[int, int]]
    rows: list[Ids]


class Model:
    """One loaded model directory with its sessions. All methods are safe to call from several threads."""

    def __init__(self, directory: Path, sessions: int, threads: int) -> None:
        """Loads and warms up; seconds, not milliseconds. Raises `ModelError`."""
        self.card: ModelCard = read_card(directory)
        tokenizer = load_tokenizer(directory)
        try:
            self._windower = Windower(tokenizer, self.card.max_tokens, self.card.overlap)
        except ValueError as error:
            raise ModelError(f"{directory}: {error}") from None
        self._lexicon = Lexicon.of_vocabulary(tokenizer.get_vocab())
        with ThreadPoolExecutor(sessions, thread_name_prefix="load") as pool:
            pending = [pool.submit(Session, directory, self.card, threads) for _ in range(sessions)]
            characters.warm()
            self.sessions = [session.result() for session in pending]
        prepared = self.prepare(_WARM_UP_TEXT)
        for session in self.sessions:
            self.judge(prepared, session.run(prepared.rows))

    def prepare(self, text: str) -> Prepared:
        """Everything that comes before the network."""
        began = time.perf_counter()
        normalised = normalise(text, self._lexicon, spelt=self.card.spelt)
        middle = time.perf_counter()
        undone = _undone(normalised.views, len(text))
        texts = [view.text for view in normalised.views]
        encodings = self._windower.encode(texts) if undone is not None else [None] * len(texts)
        tokens = 0
        rows: dict[bytes, int] = {}
        kept: list[Ids] = []
        places = []
        for index, (view, encoding) in enumerate(zip(normalised.views, encodings, strict=True)):
            ids = self._windower.ids(view.text) if encoding is None else np.array(encoding.ids, dtype=np.int64)
            tokens += len(ids)
            for window in self._windower.cut(ids):
                row = rows.setdefault(window.ids.tobytes(), len(kept))
                if row == len(kept):
                    kept.append(window.ids)
                discount = DISGUISED_DISCOUNT if _is_disguised(view, encoding, window, undone) else 0.0
                places.append(Place(index, window, row, discount))
        end = time.perf_counter()
        return Prepared(
            text,
            normalised,
            tokens,
            places,
            kept,
            {"normalise": milliseconds(began, middle), "tokenise": milliseconds(middle, end)},
            began,
        )

    def logit(self, prepared: Prepared, scores: Scores) -> tuple[float, Place]:
        """The text's logit, which is its worst window's less the penalty for their number; and that window."""
        worst = max(prepared.places, key=lambda place: _logit(place, scores))
        # A disguised window hardly counts, so it is no further chance for a false alarm either.
        chances = sum(place.discount == 0.0 for place in prepared.places)
        penalty = self.card.window_penalty * math.log(max(1, chances))
        return _logit(worst, scores) - penalty, worst

    def judge(self, prepared: Prepared, scores: Scores) -> Detection:
        """Pools the windows' scores; rows of `scores` are those of `prepared.rows`."""
        logit, worst = self.logit(prepared, scores)
        return Detection(
            probability=self.card.calibration.probability(logit),
            threshold=self.card.threshold,
            threats=self._threats(
                scores.threats[worst.row], prepared.normalised.views[worst.view], prepared.normalised.transforms
            ),
            model=self.card.name,
            coverage=Coverage(
                tokens=prepared.tokens,
                windows=len(prepared.places),
                truncated=not prepared.normalised.complete,
            ),
            transforms=prepared.normalised.transforms,
        )

    def _threats(self, logits: np.ndarray, view: View, transforms: dict[str, int]) -> tuple[ThreatName, ...]:
        limits = self.card.threat_logits or (0.0,) * len(THREATS)
        margins = [float(logit) - limit for logit, limit in zip(logits, limits, strict=True)]
        named = {threat for threat, margin in zip(THREATS, margins, strict=True) if margin >= 0}
        if not HIDING.isdisjoint(view.transforms) or not HIDING.isdisjoint(transforms.keys() & {"confusables", "tag_characters"}):
            named.add("encoding_attack")
        if not named:
            named = {THREATS[margins.index(max(margins))]}
        return tuple(threat for threat in THREATS if threat in named)

    def locate(self, prepared: Prepared, scores: Scores) -> Located:
        """Where in the text its windows and the sentences of the worst one are. As much work as to prepare it."""
        _, worst = self.logit(prepared, scores)
        texts = [view.text for view in prepared.normalised.views]
        encodings = self._windower.encode(texts)
        text = texts[worst.view]
        start, end = window_characters(encodings[worst.view], worst.window)
        found = [(start + m.start(), start + m.end()) for m in _SENTENCE.finditer(text[start:end]) if m[0].strip()]
        if not 1 < len(found) <= _MOST_SENTENCES:
            return Located(encodings, [], [])
        rows = [self._windower.cut(self._windower.ids(text[a:b]))[0].ids for a, b in found]
        return Located(encodings, found, rows)

    def explain(
        self,
        detection: Detection,
        prepared: Prepared,
        scores: Scores,
        located: Located | None,
        sentence_logits: list[float],
        timings: dict[str, float],
    ) -> Detection:
        """The same detection with spans, a reason and timings. A benign text is not `located`, and gets no spans.

        `sentence_logits`: of the rows in `located`.
        """
        spans = self._spans(detection, prepared, scores, located, sentence_logits) if located is not None else ()
        return msgspec.structs.replace(
            detection, spans=spans, reason=_reason(detection, spans), timings={**prepared.timings, **timings}
        )

    def _spans(
        self, detection: Detection, prepared: Prepared, scores: Scores, located: Located, sentence_logits: list[float]
    ) -> tuple[Span, ...]:
        probability = self.card.calibration.probability
        _, worst = self.logit(prepared, scores)
        first = _span(prepared, worst, probability(_logit(worst, scores)), located)
        if sentence_logits:
            best = int(np.argmax(sentence_logits))
            # A sentence that is malicious by itself is the better answer; else only the window as a whole is.
            if probability(sentence_logits[best]) >= detection.threshold:
                view = prepared.normalised.views[worst.view]
                start, end = view.source(*located.sentences[best])
                first = Span(start, end, probability(sentence_logits[best]), first.transform)
        spans = [first]
        for place in sorted(prepared.places, key=lambda place: -_logit(place, scores)):
            score = probability(_logit(place, scores))
            if len(spans) == MOST_SPANS or score < detection.threshold:
                break
            span = _span(prepared, place, score, located)
            if all(span.end <= other.start or span.start >= other.end for other in spans):
                spans.append(span)
        return tuple(spans)


def _logit(place: Place, scores: Scores) -> float:
    return float(scores.logits[place.row]) - place.discount


def _span(prepared: Prepared, place: Place, score: float, located: Located) -> Span:
    view = prepared.normalised.views[place.view]
    start, end = window_characters(located.encodings[place.view], place.window)
    # A view without any token (a text of invisible characters) has no place of its own.
    where = view.source(start, end) if end > start else (0, len(prepared.text))
    return Span(*where, score, "+".join(view.transforms) or None)


def _undone(views: list[View], length: int) -> NDArray[np.int64] | None:
    """For each place in the text as sent, how many characters before it were decoded in some fragment; None for none."""
    regions = [view.region for view in views if view.region is not None]
    if not regions:
        return None
    marks = np.zeros(length + 1, dtype=np.int64)
    for start, end in regions:
        marks[start + 1 : end + 1] = 1
    return np.cumsum(marks)


def _is_disguised(view: View, encoding: Encoding | None, window: Window, undone: NDArray[np.int64] | None) -> bool:
    """True where another view shows most of a window undone."""
    if view.disguised:
        return True
    if undone is None or encoding is None or view.region is not None:
        return False
    start, end = window_characters(encoding, window)
    if start == end:
        return False
    start, end = view.source(start, end)
    return int(undone[end] - undone[start]) * 2 > end - start


def _reason(detection: Detection, spans: tuple[Span, ...]) -> str:
    if not spans:
        return f"No part of the text reached the threshold of {detection.threshold:.3f}."
    first = spans[0]
    read = f", read as {first.transform}," if first.transform else ""
    kinds = ", ".join(detection.threats)
    return (
        f"Characters {first.start} to {first.end}{read} scored {first.score:.3f} (threshold {detection.threshold:.3f}): {kinds}."
    )


def milliseconds(begin: float, end: float) -> float:
    return round((end - begin) * 1000, 3)
