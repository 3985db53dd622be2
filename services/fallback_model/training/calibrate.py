"""From logits on `valid` to probabilities, the shipped threshold, the threats' limits and the penalty for many windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from services.fallback_model.engine import Calibration
from services.fallback_model.eval import metrics
from services.fallback_model.eval.corpus import Row
from services.fallback_model.labels import THREATS

Array = NDArray[np.float64]

FALSE_ALARMS = 0.01
FOLDS = 5
LONG_FALSE_ALARMS = 0.03
PENALTIES = tuple(round(0.05 * step, 2) for step in range(7))
"""From none to 0.3, which takes 1.35 off the logit of a document of 90 windows. More would cost more attacks in long documents
than it saves false alarms: the logits of attacks end at about 7."""


@dataclass(frozen=True)
class CrossFitted:
    """Figures on texts that were not used to fit what they measure: every fold is judged by the fit of the others."""

    ece: float
    false_alarms: float
    recall: float
    threat_f1: float


def fit_platt(labels: Array, logits: Array) -> Calibration:
    """Platt scaling with next to no regularisation: two parameters on thousands of texts."""
    fitted = LogisticRegression(C=1e6).fit(logits[:, None], labels)
    return Calibration(float(fitted.coef_[0, 0]), float(fitted.intercept_[0]))


def probabilities(calibration: Calibration, logits: Array) -> Array:
    return np.array([calibration.probability(float(logit)) for logit in logits])


def fit_threats(kinds: list[str | None], logits: Array) -> list[float]:
    """Per type the limit that gives the best F1 of naming it, on malicious texts of known type. `logits`: [texts, 6]."""
    known = np.array([kind is not None for kind in kinds])
    limits = []
    for column, threat in enumerate(THREATS):
        truth = np.array([kind == threat for kind in kinds])[known]
        values = logits[known, column]
        candidates = np.quantile(values, np.linspace(0.3, 0.995, 120))
        scores = [f1_score(truth, values >= limit, zero_division=0.0) for limit in candidates]
        limits.append(float(candidates[int(np.argmax(scores))]))
    return limits


def name_threats(logits: Array, limits: list[float]) -> list[tuple[str, ...]]:
    """The types at or over their limits, or the nearest one."""
    named: list[tuple[str, ...]] = []
    for margins in logits - np.array(limits):
        over = tuple(threat for threat, margin in zip(THREATS, margins, strict=True) if margin >= 0)
        named.append(over or (THREATS[int(np.argmax(margins))],))
    return named


def cross_fitted(rows: list[Row], logits: Array, threat_logits: Array, seed: int) -> CrossFitted:
    """Calibration error, false alarms, recall and threat F1, each from fits on the other folds."""
    order = np.random.default_rng(seed).permutation(len(rows))
    labels = np.array([row.label for row in rows], dtype=np.float64)
    kinds = [row.threat if row.label else None for row in rows]
    said, flagged = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    named: list[tuple[str, ...]] = [()] * len(rows)
    for fold in range(FOLDS):
        held = np.isin(np.arange(len(rows)), order[fold::FOLDS])
        calibration = fit_platt(labels[~held], logits[~held])
        said[held] = probabilities(calibration, logits[held])
        flagged[held] = logits[held] >= metrics.threshold_at(logits[~held & (labels == 0)], FALSE_ALARMS)
        limits = fit_threats([kind for kind, away in zip(kinds, held, strict=True) if not away], threat_logits[~held])
        for index, names in zip(np.flatnonzero(held), name_threats(threat_logits[held], limits), strict=True):
            named[index] = names
    counts = metrics.confusion(labels, flagged)
    known = [index for index, kind in enumerate(kinds) if kind is not None]
    f1, _ = metrics.macro_f1([kinds[i] or "" for i in known], [named[i] for i in known], THREATS)
    return CrossFitted(metrics.reliability(labels, said).ece, counts.false_alarms or 0.0, counts.recall or 0.0, f1)


def fit_penalty(labels: Array, logits: Array, windows: Array, long_logits: Array, long_windows: Array) -> float:
    """The smallest penalty per log(window) with which long benign documents raise few false alarms at the shipped threshold.

    `logits` and `windows` are those of `valid`, the others those of long benign documents; all without a penalty.
    """
    for penalty in PENALTIES:
        threshold = metrics.threshold_at((logits - penalty * np.log(windows))[labels == 0], FALSE_ALARMS)
        if (long_logits - penalty * np.log(long_windows) >= threshold).mean() <= LONG_FALSE_ALARMS:
            return penalty
    return PENALTIES[-1]
