"""What every implementation of the limiter's rule must do, whatever it stands on; and the exact oracle to judge it by.

Subclasses of `RuleBehaviour` say what `make_rule` makes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import pytest
from hypothesis import strategies as st

from services.limiter.core import PER_KEY, REFUSALS_KEPT, Decision, KeyState, Policy

MINUTE, DAY = 60.0, 86_400.0

Step = tuple[float, int, tuple[int, int]]
"""A pause in seconds, then a call of some cost under limits for the minute and the day."""


class Rule(Protocol):
    """One key, and a clock in seconds that the test sets."""

    def decide(
        self, limits: Sequence[int], cost: int, known: Sequence[int] | None = None, *, partial: bool = False
    ) -> Decision: ...

    def set_clock(self, seconds: float) -> None: ...


class Timed:
    """A rule whose clock is advanced."""

    def __init__(self, rule: Rule, start: float = 1_800_000_000.25) -> None:
        self.rule = rule
        self.now = start
        rule.set_clock(start)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.rule.set_clock(self.now)

    def decide(
        self, limits: Sequence[int], cost: int = 1, known: Sequence[int] | None = None, *, partial: bool = False
    ) -> Decision:
        return self.rule.decide(limits, cost, known, partial=partial)


class ExactLog:
    """Every admission with its exact time: what the rule is measured against."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, int]] = []

    def admit(self, now: float, cost: int) -> None:
        self.entries.append((now, cost))

    def units(self, now: float, seconds: float) -> int:
        """Units admitted in (now - seconds, now]."""
        return sum(cost for at, cost in self.entries if at > now - seconds)


def replay(timed: Timed, policy: Policy, seconds: Sequence[float], steps: Sequence[Step]) -> None:
    """Play (pause, cost, limits) and hold every single decision against the exact log."""
    log = ExactLog()
    for index, (pause, cost, limits) in enumerate(steps):
        timed.advance(pause)
        partial = index % 4 == 3
        decision = timed.decide(limits, cost, partial=partial)
        if partial:
            assert decision.admitted
            # What one window leaves out, an exact limiter of a window 1.9 % longer would have refused as well.
            assert decision.granted == cost or any(
                log.units(timed.now, (window.span_ms + window.width_ms + 1) / 1000) + decision.granted + 1 > limit
                for limit, window in zip(limits, policy.windows, strict=True)
            )
        if decision.granted:
            log.admit(timed.now, decision.granted)
            for limit, window in zip(limits, seconds, strict=True):
                assert log.units(timed.now, window) <= limit
        elif not partial:
            # Had the window been 1.9 % longer, an exact limiter would have refused the call too.
            assert any(
                log.units(timed.now, (window.span_ms + window.width_ms + 1) / 1000) + cost > limit
                for limit, window in zip(limits, policy.windows, strict=True)
            )


def replay_stepping_back(rule: Rule, steps: Sequence[Step], back: Sequence[tuple[int, float]]) -> None:
    """Play steps while the rule's clock steps back now and then (before which step, how far): never more in *true* time."""
    log = ExactLog()
    true = shown = 1_800_000_000.0
    for index, (pause, cost, limits) in enumerate(steps):
        true += pause
        shown += pause - sum(seconds for at, seconds in back if at == index)
        rule.set_clock(shown)
        if rule.decide(limits, cost).admitted:
            log.admit(true, cost)
            assert log.units(true, MINUTE) <= limits[0]
            assert log.units(true, DAY) <= limits[1]
    # And nothing is stuck: two days later everything is free.
    rule.set_clock(shown + 2 * DAY)
    assert rule.decide((1, 1), 1).admitted


def overload(rule: Rule, limit: int, seconds: float, pace: str, windows: int = 4) -> float:
    """What share of its limit a rule of one window admits, over some windows in which always a call is waiting."""
    timed = Timed(rule)
    rng = random.Random(limit)
    if pace == "barely":
        # The hardest: with one call in twenty too many, admissions stay spread over the window, and every slot is waited for.
        cost = max(1, limit // 2000)
        interval = seconds * cost / (1.05 * limit)
    else:
        # Twice as many units as the limit, and at the least 200 calls a window.
        cost = max(1, limit // 200)
        interval = seconds / max(200, 2 * limit // cost)
    admitted, elapsed = 0, 0.0
    while True:
        pause = interval * {"flood": 0.5, "jitter": rng.uniform(0, 2)}.get(pace, 1)
        if elapsed + pause >= windows * seconds:
            return admitted / (limit * windows)
        elapsed += pause
        timed.advance(pause)
        admitted += cost if timed.decide((limit,), cost).admitted else 0


def mixed_overload(rule: Rule, limit: int, largest: int, windows: int = 4) -> float:
    """The same with costs of 1 to `largest`, as a share of what calls of the largest can fill for certain."""
    timed = Timed(rule)
    rng = random.Random(7)
    admitted = 0
    for _ in range(windows * 600):
        cost = rng.randint(1, largest)
        admitted += cost if timed.decide((limit, 10**9), cost).admitted else 0
        timed.advance(0.1)
    return admitted / ((limit - largest) * windows)


# Limits over six orders of magnitude, with costs that use them up in a few hundred calls.
magnitudes = st.floats(0, 6).map(lambda exponent: int(10**exponent))


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    minute = draw(magnitudes)
    day = draw(st.sampled_from((1, 2, 10, 1440, 10_000))) * minute
    # How long until the limits are used up: at the pace of the window, a slot, a few times either.
    pace = draw(st.sampled_from((0.0, 0.0004, 0.05, 0.3, 0.937, 1.0, 7.0, 400.0, 1350.0)))
    largest = max(1, minute // draw(st.sampled_from((1, 3, 20, 100))))
    rng = draw(st.randoms(use_true_random=False))
    steps = []
    limits = (minute, day)
    for _ in range(draw(st.integers(1, 150))):
        if rng.random() < 0.02:
            limits = (max(1, int(minute * rng.uniform(0.2, 2))), max(1, int(day * rng.uniform(0.2, 2))))
        pause = (
            pace * rng.choice((0.0, 0.5, 1.0, 1.0, 1.0, 2.0)) if rng.random() < 0.97 else rng.choice((59.9, 60.0, 61.0, 86_400.0))
        )
        steps.append((pause, rng.randint(1, largest), limits))
    return steps


@st.composite
def edges(draw: st.DrawFn) -> list[Step]:
    """Bursts about as long as a slot, each retried about one window later: where slots are freed, and a mistake would show."""
    scale = draw(st.sampled_from((1, 1440)))  # in the minute, or in the day
    limit = draw(st.integers(1, 40))
    rng = draw(st.randoms(use_true_random=False))
    limits = (limit, 10**9) if scale == 1 else (10**9, limit)
    steps: list[Step] = []
    for _ in range(3):
        length = 0.0
        for call in range(30):
            pause = rng.uniform(0, 0.15) * scale if call else 0.0
            length += pause
            steps.append((pause, rng.randint(1, 3), limits))
        steps.append((max(0.0, rng.uniform(59, 60.5) * scale - length), 1, limits))
    return steps


# Before which step a clock steps back, and by how many seconds.
steps_back = st.lists(st.tuples(st.integers(0, 150), st.floats(0, 200_000)), max_size=5)


class RuleBehaviour:
    @pytest.fixture
    def timed(self) -> Timed:
        return Timed(self.make_rule(PER_KEY))

    def make_rule(self, policy: Policy) -> Rule:
        raise NotImplementedError

    def test_admits_up_to_the_limit_and_tells_what_is_used(self, timed: Timed) -> None:
        assert [timed.decide((3, 100)).admitted for _ in range(5)] == [True, True, True, False, False]
        assert timed.decide((3, 100), 0).used == (3, 3)

    def test_a_unit_is_free_again_when_its_reset_says_so(self, timed: Timed) -> None:
        timed.decide((1, 100))
        reset = timed.decide((1, 100), 0).reset_ms[0]
        assert 60_000 < reset <= 60_200
        timed.advance((reset - 1) / 1000)
        assert not timed.decide((1, 100)).admitted
        timed.advance(0.001)
        assert timed.decide((1, 100)).admitted

    def test_the_day_limits_as_the_minute_does(self, timed: Timed) -> None:
        for _ in range(4):
            assert timed.decide((2, 4)).admitted
            timed.advance(100)
        refused = timed.decide((2, 4))
        assert not refused.admitted
        assert refused.used == (0, 4)
        assert refused.reset_ms[0] == 0
        timed.advance(refused.reset_ms[1] / 1000)
        assert timed.decide((2, 4)).admitted

    def test_a_cost_is_taken_at_once_or_not_at_all(self, timed: Timed) -> None:
        assert timed.decide((10, 100), 7).admitted
        assert not timed.decide((10, 100), 4).admitted
        assert timed.decide((10, 100), 3).used == (10, 10)

    def test_what_one_window_refuses_costs_nothing_in_the_other(self, timed: Timed) -> None:
        timed.decide((10, 5), 4)
        for _ in range(50):
            assert not timed.decide((10, 5), 2).admitted
        assert timed.decide((10, 5), 0).used == (4, 4)

    def test_a_cost_above_the_limit_is_never_admitted(self, timed: Timed) -> None:
        assert not timed.decide((10, 100), 11).admitted
        assert timed.decide((10, 100), 10).admitted

    def test_a_partial_cost_is_taken_as_far_as_there_is_room_and_never_refused(self, timed: Timed) -> None:
        assert timed.decide((10, 15), 7, partial=True).granted == 7
        taken = timed.decide((10, 15), 7, partial=True)
        assert (taken.admitted, taken.granted, taken.used, taken.refused) == (True, 3, (10, 10), 0)
        nothing = timed.decide((10, 15), 7, partial=True)
        assert (nothing.admitted, nothing.granted, nothing.used, nothing.refused) == (True, 0, (10, 10), 0)
        timed.advance(nothing.reset_ms[0] / 1000)
        assert timed.decide((10, 15), 7, partial=True).granted == 5  # the day has no room for more
        assert timed.decide((5, 15), 1, partial=True).granted == 0  # nor has a limit that was lowered

    def test_a_partial_cost_leaves_room_for_what_is_known_to_be_used(self, timed: Timed) -> None:
        assert timed.decide((10, 100), 7, (6, 6), partial=True).granted == 4

    def test_what_is_granted_is_the_cost_or_nothing_when_it_is_not_partial(self, timed: Timed) -> None:
        assert timed.decide((10, 100), 7).granted == 7
        assert timed.decide((10, 100), 7).granted == 0

    def test_looking_costs_nothing_and_is_never_refused(self, timed: Timed) -> None:
        for _ in range(5):
            timed.decide((2, 100))
        looked = timed.decide((2, 100), 0)
        assert (looked.admitted, looked.used, looked.refused) == (True, (2, 2), 3)
        assert timed.decide((2, 100), 0) == looked

    def test_a_limit_of_nothing(self, timed: Timed) -> None:
        refused = timed.decide((0, 100))
        assert not refused.admitted
        assert refused.reset_ms[0] >= 60_000

    def test_a_lower_limit_counts_at_once_and_a_higher_one_too(self, timed: Timed) -> None:
        for _ in range(10):
            timed.decide((10, 1000))
            timed.advance(2)
        lowered = timed.decide((5, 1000))
        assert not lowered.admitted
        assert lowered.used[0] == 10
        # Six of the ten must go before there is room; they were 2 s apart, and the first is 20 s old.
        assert lowered.reset_ms[0] == pytest.approx(60_151 - 20_000 + 5 * 2000, abs=1)
        timed.advance(lowered.reset_ms[0] / 1000)
        assert timed.decide((5, 1000)).admitted
        assert [timed.decide((8, 1000)).admitted for _ in range(4)] == [True, True, True, False]

    def test_refused_calls_are_counted_over_the_minute(self, timed: Timed) -> None:
        timed.decide((1, 1000))
        assert [timed.decide((1, 1000)).refused for _ in range(12)] == list(range(1, 13))
        timed.advance(30)
        assert timed.decide((1, 1000)).refused == 13
        timed.advance(31)
        # The first twelve are over a minute old.
        assert timed.decide((1, 1000), 0).refused == 1

    def test_the_count_of_refused_calls_ends_where_the_last_band_has_begun(self, timed: Timed) -> None:
        timed.decide((1, 1000))
        assert [timed.decide((1, 1000)).refused for _ in range(100)][-1] == REFUSALS_KEPT

    def test_units_known_to_be_used_count_from_now(self, timed: Timed) -> None:
        timed.decide((10, 100), 2)
        timed.advance(30)
        assert timed.decide((10, 100), 1, (7, 50)).used == (8, 51)
        assert timed.decide((10, 100), 1, (3, 3)).used == (9, 52)
        timed.advance(31)
        # The two are over; the five that were not known of before are not.
        assert timed.decide((10, 100), 0).used == (7, 52)

    def test_a_clock_that_steps_back_frees_nothing_early_and_sticks_nowhere(self, timed: Timed) -> None:
        timed.decide((1, 100))
        timed.advance(20)
        timed.decide((1, 100))
        timed.now -= 1_000_000
        timed.rule.set_clock(timed.now)
        refused = timed.decide((1, 100))
        assert not refused.admitted
        assert refused.reset_ms[0] == pytest.approx(40_151, abs=1)
        timed.advance(refused.reset_ms[0] / 1000 - 0.001)
        assert not timed.decide((1, 100)).admitted
        timed.advance(0.002)
        assert timed.decide((1, 100)).admitted

    def test_limits_of_thirty_two_bits(self, timed: Timed) -> None:
        most = 2**32 - 1
        assert timed.decide((most, most), most - 1).admitted
        assert not timed.decide((most, most), 2).admitted
        assert timed.decide((most, most), 1).used == (most, most)
        timed.advance(61)
        assert timed.decide((most, most), 0).used == (0, most)

    def test_slots_and_their_units_survive_a_whole_day(self, timed: Timed) -> None:
        for _ in range(600):
            timed.advance(500)
            assert timed.decide((10, 1000)).admitted
        # 86 400 s hold 172.8 calls 500 s apart; slots are freed up to 1 / 64 of a day later.
        assert 173 <= timed.decide((10, 1000), 0).used[1] <= 176


class CoreRule:
    """The Python form, on one key."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.state = KeyState(policy)
        self.clock_ms = 0

    def set_clock(self, seconds: float) -> None:
        # By way of microseconds, as Redis tells the time: rounded straight to milliseconds the two can be one apart.
        self.clock_ms = int(seconds * 1_000_000) // 1000

    def decide(self, limits: Sequence[int], cost: int, known: Sequence[int] | None = None, *, partial: bool = False) -> Decision:
        return self.state.decide(self.policy, limits, cost, self.clock_ms, known, partial=partial)
