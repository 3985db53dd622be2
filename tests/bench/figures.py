"""The arithmetic of benchmarks: when requests are due, what a stretch of load comes to, and what pairs of stretches tell."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SHARES = (0.5, 0.9, 0.99)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due: callers who know nothing of each other, `rate` a second on average.

    A Poisson process (exponential gaps), the same for the same seed. Fixed in advance: a slow answer holds back nothing.
    """
    rng = random.Random(seed)
    due: list[float] = []
    now = rng.expovariate(rate)
    while now < seconds:
        due.append(now)
        now += rng.expovariate(rate)
    return due


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed (nearest rank); NaN of none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if len(values) else math.nan


@dataclass(slots=True)
class Stretch:
    """What one stretch of load came to. Times in milliseconds; `cpu`: by stage, for each answered request.

    `generator`: the load generator's own processor time for each request. `late`: how much later than due its requests left it
    (99 of 100 of them), which is in the latencies, too; 0 in a closed loop. `failed`: anything that was not answered with 200.
    """

    rate: float
    p50: float
    p90: float
    p99: float
    answered: int
    failed: int
    degraded: int
    late: float
    generator: float
    cpu: dict[str, float] = field(default_factory=dict)

    @property
    def cpu_total(self) -> float:
        return sum(self.cpu.values())


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeats, and the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """By round: what was measured one after the other is compared, so that what else the machine does falls on both."""
    return [a / b for a, b in zip(over, under, strict=True)]


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of the ratios of pairs, and where it lies with `confidence`; NaN where there are too few pairs to say."""

    median: float
    low: float
    high: float
    confidence: float

    @property
    def tells(self) -> bool:
        """Whether the two sides differ for certain."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.median:.3f} (too few pairs for an interval)"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def compared(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """`second` over `first`, pair by pair, whatever the distribution: the interval is that of the sign test (Conover, Practical
    Nonparametric Statistics, section 3.2), as `scipy.stats.quantile_test` gives it. Fewer than six pairs say nothing at 95 %.
    """
    from scipy.stats import quantile_test  # takes half a second

    values = ratios(second, first)
    found = quantile_test(values, q=1.0, p=0.5).confidence_interval(confidence_level=confidence)
    known = not (math.isnan(found.low) or math.isnan(found.high))
    return Interval(
        statistics.median(values), float(found.low) if known else math.nan, float(found.high) if known else math.nan, confidence
    )


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """How time grows with size: the slope between the logarithms (least squares); 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
