"""The arithmetic of benchmarks."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from tests.bench.figures import Spread, arrivals, compared, exponent, percentile, ratios
from tests.bench.turns import rotated


def test_arrivals_are_fixed_in_advance_and_come_at_their_rate() -> None:
    due = arrivals(rate=500, seconds=20, seed=3)
    assert due == arrivals(rate=500, seconds=20, seed=3)
    assert due != arrivals(rate=500, seconds=20, seed=4)
    assert due == sorted(due)
    assert due[0] > 0
    assert due[-1] < 20
    assert len(due) == pytest.approx(10_000, rel=0.05)  # five standard deviations of a Poisson count


def test_gaps_between_arrivals_are_those_of_callers_who_know_nothing_of_each_other() -> None:
    due = arrivals(rate=1000, seconds=30, seed=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    # Exponential: the deviation is as large as the mean, and a share of 1/e is longer than it. Even gaps would have neither.
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)
    assert sum(gap > 0.001 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.05)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, 5.0), (0.9, 9.0), (0.91, 10.0), (0.99, 10.0), (1.0, 10.0), (0.01, 1.0)],
)
def test_a_percentile_is_a_value_that_was_seen(share: float, expected: float) -> None:
    values = [float(value) for value in range(1, 11)]
    random.Random(2).shuffle(values)
    assert percentile(values, share) == expected


def test_a_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_a_spread_has_the_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert f"{Spread.of([3.0, 1.0, 10.0]):.1f}" == "3.0 (1.0 to 10.0)"


def test_ratios_are_taken_round_by_round() -> None:
    # A machine that is half as fast in the second round has no part in the ratio.
    assert ratios([100.0, 50.0], [200.0, 100.0]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


def test_pairs_tell_a_difference_that_the_machine_would_have_hidden() -> None:
    rng = random.Random(5)
    weather = [rng.uniform(0.5, 2.0) for _ in range(12)]
    first = [100 * each for each in weather]
    second = [110 * each * rng.uniform(0.98, 1.02) for each in weather]
    found = compared(first, second)
    assert found.tells
    assert found.low <= 1.1 <= found.high
    assert 1.0 < found.low < found.median < found.high < 1.2


def test_pairs_of_the_same_tell_nothing() -> None:
    rng = random.Random(6)
    first = [rng.uniform(90, 110) for _ in range(20)]
    second = [rng.uniform(90, 110) for _ in range(20)]
    found = compared(first, second)
    assert not found.tells
    assert found.low < 1 < found.high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(7)
    held = 0
    for _ in range(200):
        first = [100.0] * 10
        second = [100 * math.exp(rng.gauss(math.log(1.05), 0.1)) for _ in first]
        found = compared(first, second)
        held += found.low <= 1.05 <= found.high
    assert held >= 185  # of 200; 95 % would be 190, and the sign test gives a little more than it is asked for


def test_too_few_pairs_have_no_interval_rather_than_a_wrong_one() -> None:
    found = compared([1.0] * 5, [2.0] * 5)
    assert found.median == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.tells
    assert "too few" in str(found)
    assert compared([1.0] * 6, [2.0] * 6).tells


def test_the_exponent_tells_linear_from_quadratic() -> None:
    sizes = [100.0, 1000.0, 10_000.0]
    assert exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1.0)
    assert exponent(sizes, [size**2 for size in sizes]) == pytest.approx(2.0)


def test_every_system_is_first_in_turn_and_follows_each_round_in_the_same_order() -> None:
    rounds = [rotated(3, number) for number in range(3)]
    assert rounds == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
