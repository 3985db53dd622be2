"""Scores many texts on a model directory, without a worker around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.fallback_model.engine import Scores
from services.fallback_model.model import Detection, Model, Prepared

_BATCH_TOKENS = 2048
_TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class Scored:
    """`logit` is the text's pooled logit before calibration, penalty included; `windows` how many were pooled."""

    detection: Detection
    logit: float
    windows: int
    threat_logits: list[float]
    transforms: tuple[str, ...]


def score(model: Model, texts: list[str]) -> Iterator[Scored]:
    """In the order of the texts."""
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        prepared = [model.prepare(text) for text in texts[first : first + _TEXTS_AT_ONCE]]
        for one, scores in zip(prepared, _run(model, prepared), strict=True):
            logit, worst = model.logit(one, scores)
            yield Scored(
                model.judge(one, scores),
                logit,
                len(one.places),
                scores.threats[worst.row].tolist(),
                one.normalised.views[worst.view].transforms,
            )


def _run(model: Model, prepared: list[Prepared]) -> list[Scores]:
    rows = [(len(row), index, place) for index, one in enumerate(prepared) for place, row in enumerate(one.rows)]
    rows.sort()
    logits = [np.empty(len(one.rows), np.float32) for one in prepared]
    threats = [np.empty((len(one.rows), 6), np.float32) for one in prepared]
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and rows[end][0] * (end + 1 - start) <= _BATCH_TOKENS:
            end += 1
        batch = rows[start:end]
        scores = model.sessions[0].run([prepared[index].rows[place] for _, index, place in batch])
        for at, (_, index, place) in enumerate(batch):
            logits[index][place] = scores.logits[at]
            threats[index][place] = scores.threats[at]
        start = end
    return [Scores(a, b) for a, b in zip(logits, threats, strict=True)]
