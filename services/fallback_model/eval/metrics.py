"""The figures of a report, from labels and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

Array = NDArray[np.float64]

BINS = 15


@dataclass(frozen=True)
class Confusion:
    """Counts at one threshold."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def recall(self) -> float | None:
        """Share of malicious texts found; None without any."""
        malicious = self.true_positive + self.false_negative
        return self.true_positive / malicious if malicious else None

    @property
    def false_alarms(self) -> float | None:
        """Share of benign texts called malicious; None without any."""
        benign = self.false_positive + self.true_negative
        return self.false_positive / benign if benign else None


def confusion(labels: Array, flagged: NDArray[np.bool_]) -> Confusion:
    malicious = labels == 1
    return Confusion(
        int((flagged & malicious).sum()),
        int((flagged & ~malicious).sum()),
        int((~flagged & ~malicious).sum()),
        int((~flagged & malicious).sum()),
    )


def auc(labels: Array, scores: Array) -> float | None:
    """Area under the ROC curve; None unless both classes are there."""
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


def average_precision(labels: Array, scores: Array) -> float | None:
    """None without malicious texts."""
    return float(average_precision_score(labels, scores)) if labels.any() else None


def threshold_at(benign_scores: Array, false_alarms: float) -> float:
    """The lowest score s such that at most the share `false_alarms` of the benign texts has a score >= s.

    Raises ValueError without any benign text.
    """
    if not len(benign_scores):
        raise ValueError("a threshold needs benign texts")
    ranked = np.sort(benign_scores)[::-1]
    allowed = int(np.floor(false_alarms * len(ranked)))
    return float(np.nextafter(ranked[allowed], np.inf)) if allowed < len(ranked) else float(ranked[-1])


def recall_at(labels: Array, scores: Array, false_alarms: float) -> float | None:
    """Recall at the threshold of `threshold_at` on the same texts; None unless both classes are there."""
    if not 0 < labels.sum() < len(labels):
        return None
    return float((scores[labels == 1] >= threshold_at(scores[labels == 0], false_alarms)).mean())


@dataclass(frozen=True)
class Reliability:
    """Per bin of equal width: mean probability, share of malicious texts, number of texts; empty bins are left out."""

    predicted: list[float]
    observed: list[float]
    counts: list[int]

    @property
    def ece(self) -> float:
        """Expected calibration error (Naeini et al. 2015): |observed - predicted|, weighted by the bins' sizes."""
        total = sum(self.counts)
        return sum(abs(o - p) * n for p, o, n in zip(self.predicted, self.observed, self.counts, strict=True)) / total


def reliability(labels: Array, probabilities: Array) -> Reliability:
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    used = [index for index in range(BINS) if (bins == index).any()]
    return Reliability(
        [float(probabilities[bins == index].mean()) for index in used],
        [float(labels[bins == index].mean()) for index in used],
        [int((bins == index).sum()) for index in used],
    )


def macro_f1(truth: list[str], named: list[tuple[str, ...]], kinds: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """Mean over threat types of the F1 of naming them, each type a yes-or-no question; kinds that never occur are left out."""
    scores: dict[str, float] = {}
    for kind in kinds:
        wanted = [kind == one for one in truth]
        if any(wanted):
            scores[kind] = float(f1_score(wanted, [kind in given for given in named], zero_division=0.0))
    return float(np.mean(list(scores.values()))) if scores else 0.0, scores


def interval(
    labels: Array, scores: Array, figure: Callable[[Array, Array], float | None], rounds: int = 200
) -> tuple[float, float] | None:
    """A 95 % bootstrap interval of a figure, texts drawn with replacement; None where the figure is not defined."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(labels), len(labels))
        value = figure(labels[drawn], scores[drawn])
        if value is not None:
            values.append(value)
    return (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if values else None
