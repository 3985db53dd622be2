"""Percentiles of the last seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from libs.common.recent import SLOT_NS, SLOTS, RecentDurations, bucket_of, middle_ms

DURATIONS = st.integers(min_value=0, max_value=3_600_000_000_000)


@given(DURATIONS)
def test_a_duration_is_told_to_a_sixteenth(duration_ns: int) -> None:
    told = middle_ms(bucket_of(duration_ns))
    assert abs(told - duration_ns / 1e6) <= max(0.001, duration_ns / 1e6 / 16 + 0.001)


@given(DURATIONS, DURATIONS)
def test_buckets_keep_the_order(one: int, other: int) -> None:
    assert (bucket_of(one) <= bucket_of(other)) is (one <= other) or bucket_of(one) == bucket_of(other)


def test_percentiles_are_of_what_was_added() -> None:
    recent = RecentDurations()
    for milliseconds in range(1, 101):
        recent.add(milliseconds * 1_000_000, now_ns=0)
    half, nearly_all = recent.percentile_ms(0.5, 0), recent.percentile_ms(0.99, 0)
    assert half is not None
    assert nearly_all is not None
    assert abs(half - 50) <= 50 / 16
    assert abs(nearly_all - 99) <= 99 / 16


def test_what_is_old_is_forgotten() -> None:
    recent = RecentDurations()
    recent.add(1_000_000, now_ns=0)
    last_ns = SLOTS * SLOT_NS - 1
    assert recent.percentile_ms(0.5, last_ns) is not None
    assert recent.percentile_ms(0.5, last_ns + 1) is None
    recent.add(64_000_000, now_ns=last_ns + 1)
    slowest = recent.percentile_ms(1.0, last_ns + 1)
    assert slowest is not None
    assert slowest > 60


def test_nothing_gives_no_percentile() -> None:
    assert RecentDurations().percentile_ms(0.99, 0) is None
