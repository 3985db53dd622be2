"""The rule in Python, and what is built on it without I/O."""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings

from services.limiter.core import PER_KEY, REFUSALS_KEPT, KeyState, KeyStates, Policy, Window, address_key, retry_after_seconds
from tests.unit.limiter.rule import (
    DAY,
    MINUTE,
    CoreRule,
    Rule,
    RuleBehaviour,
    Step,
    Timed,
    edges,
    histories,
    mixed_overload,
    overload,
    replay,
    replay_stepping_back,
    steps_back,
)


class TestCoreRule(RuleBehaviour):
    def make_rule(self, policy: Policy) -> Rule:
        return CoreRule(policy)


@given(histories() | edges())
@settings(max_examples=150)
def test_every_decision_agrees_with_an_exact_log(steps: list[Step]) -> None:
    replay(Timed(CoreRule(PER_KEY)), PER_KEY, (MINUTE, DAY), steps)


@given(histories() | edges(), steps_back)
@settings(max_examples=100)
def test_a_clock_that_steps_back_never_admits_more(steps: list[Step], back: list[tuple[int, float]]) -> None:
    replay_stepping_back(CoreRule(PER_KEY), steps, back)


@pytest.mark.parametrize("seconds", [MINUTE, DAY])
@pytest.mark.parametrize(
    ("limit", "pace"),
    [
        *itertools.product([1, 2, 60, 63, 64, 65, 1000, 1_000_000], ["flood", "twice", "jitter"]),
        *itertools.product([1000, 10_000, 1_000_000], ["barely"]),
    ],
)
def test_at_least_98_percent_under_steady_overload(limit: int, pace: str, seconds: float) -> None:
    # What the slots cost shows only after some windows when demand is barely too much: the first of them is filled as it comes.
    windows = 20 if pace == "barely" else 4
    assert 0.98 <= overload(CoreRule(Policy.of(seconds)), limit, seconds, pace, windows) <= (windows + 1) / windows


@pytest.mark.parametrize(("limit", "largest"), [(100_000, 1000), (1000, 100), (1_000_000, 10_000)])
def test_at_least_98_percent_with_mixed_costs(limit: int, largest: int) -> None:
    assert mixed_overload(CoreRule(PER_KEY), limit, largest) >= 0.98


def test_a_window_keeps_its_promise_on_paper() -> None:
    for seconds in (1, 1.5, 2, 60, 3600, 86_400):
        window = Window.of(seconds)
        assert window.span_ms > seconds * 1000
        assert seconds * 1000 / (window.span_ms + window.width_ms) > 0.98
    with pytest.raises(ValueError, match="at least one second"):
        Window.of(0.5)


@pytest.mark.parametrize("pause_ms", [1, 331, 937, 938, 60_151, 1_350_000, 1_350_001])
def test_a_state_is_of_constant_size(pause_ms: int) -> None:
    state = KeyState(PER_KEY)
    for step in range(1000):
        state.decide(PER_KEY, (10**6, 10**9), 1 + step % 7, step * pause_ms)
        state.decide(PER_KEY, (1, 1), 10, step * pause_ms)
        assert all(len(slots.counts) == len(slots.last_ms) <= 68 for slots in state._slots)
        assert len(state._refusals) <= REFUSALS_KEPT


def test_following_decisions_made_elsewhere_counts_own_units_and_raises_to_the_rest() -> None:
    state = KeyState(PER_KEY)
    state.record(PER_KEY, 1, (1, 1), 0)
    state.record(PER_KEY, 1, (5, 9), 30_000)
    assert state.used(PER_KEY, 30_000) == (5, 9)
    # An own unit counts even while those that are over elsewhere are still held here, or a fresh window would follow.
    state.record(PER_KEY, 1, (1, 9), 60_100)
    assert state.used(PER_KEY, 60_100)[0] == 6
    assert state.used(PER_KEY, 60_200)[0] == 5
    assert state.used(PER_KEY, 100_000)[0] == 1


def test_only_the_most_recently_seen_keys_are_kept() -> None:
    states = KeyStates(PER_KEY, 3)
    first = states.get("a")
    for key in "bcab":
        states.get(key)
    assert states.get("a") is first
    states.get("d")
    assert len(states) == 3
    assert states.get("a") is first
    states.get("e")
    states.get("f")
    states.get("g")
    assert states.get("a") is not first


@pytest.mark.parametrize(
    ("refused", "low", "high"),
    [(1, 1, 3), (10, 1, 3), (11, 3, 8), (30, 3, 8), (31, 8, 15), (REFUSALS_KEPT, 8, 15), (10_000, 8, 15)],
)
def test_retry_after_is_in_its_band_and_spread_over_it(refused: int, low: float, high: float) -> None:
    rng = random.Random(refused)
    drawn = [retry_after_seconds(refused, rng) for _ in range(20_000)]
    seen = Counter(drawn)
    assert min(seen) >= max(1, low * 0.7)
    assert max(seen) <= high * 1.3
    # Every whole second that the jitter can reach does occur, and the whole of it is centred on the band.
    assert set(seen) == set(range(max(1, -int(-low * 0.7 // 1)), int(high * 1.3) + 1))
    assert sum(drawn) / len(drawn) == pytest.approx((low + high) / 2, rel=0.05)
    assert max(seen.values()) < 0.6 * len(drawn)


def test_retry_after_repeats_with_its_random_numbers() -> None:
    assert [retry_after_seconds(5, random.Random(3)) for _ in range(3)] == [retry_after_seconds(5, random.Random(3))] * 3


def test_an_address_is_counted_without_being_kept() -> None:
    assert address_key("192.0.2.1") != address_key("192.0.2.2")
    assert "192" not in address_key("192.0.2.1")
    assert address_key("::ffff:192.0.2.1") == address_key("192.0.2.1")
    assert address_key("2001:db8::1") == address_key("2001:db8:0:0:ffff::2") != address_key("2001:db8:0:1::1")
    for odd in ("", "unix:", "\ud800", "x" * 100_000, "fe80::1%eth0"):
        assert len(address_key(odd)) == 32
    assert len({address_key(str(ipaddress.ip_address(number))) for number in range(1000)}) == 1000
