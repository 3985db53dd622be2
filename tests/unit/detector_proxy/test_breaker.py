"""The six rules of the breaker, each also seen to be broken by the library as it is."""

from __future__ import annotations

import asyncio
import random

import circuitbreaker  # type: ignore[import-untyped]  # the library ships no types
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.common.clock import ManualClock
from libs.common.contracts import BreakerState
from services.detector_proxy import breaker as breaker_module
from services.detector_proxy.breaker import JITTER, BreakerChange, BreakerPolicy, CircuitBreakerError, EngineBreaker
from services.detector_proxy.ports import EngineError

POLICY = BreakerPolicy(
    failure_threshold=5, failure_rate=0.5, minimum_calls=10, window_seconds=10, open_seconds=1, open_max_seconds=4
)


class Bench:
    """A breaker with a driven clock, a log of its changes, and calls that end as they are told."""

    def __init__(self, policy: BreakerPolicy = POLICY) -> None:
        self.clock = ManualClock()
        self.changes: list[BreakerChange] = []
        self.breaker = EngineBreaker("primary", policy, self.clock, self.changes.append, random.Random(1))

    def state(self) -> BreakerState:
        return self.breaker.state

    def succeed(self) -> None:
        with self.breaker.admit():
            pass

    def fail(self) -> None:
        with pytest.raises(EngineError), self.breaker.admit():
            raise EngineError("timeout")

    def fail_neutrally(self) -> None:
        with pytest.raises(EngineError), self.breaker.admit():
            raise EngineError("rejected", counts=False)

    def refused(self) -> bool:
        try:
            call = self.breaker.admit()
        except CircuitBreakerError:
            return True
        call.__exit__(asyncio.CancelledError, asyncio.CancelledError(), None)
        return False

    def open(self) -> None:
        for _ in range(self.breaker.policy.failure_threshold):
            self.fail()
        assert self.state() == "open"

    def wait_until_due(self) -> None:
        self.clock.advance(self.breaker.open_remaining)
        assert self.state() == "half_open"

    @property
    def path(self) -> list[str]:
        return [change.after for change in self.changes]


def library_breaker(**values: object) -> circuitbreaker.CircuitBreaker:
    """The library as it is, at the point at which its open time is over."""
    return circuitbreaker.CircuitBreaker(name="library", expected_exception=EngineError, **values)


# --- opening -------------------------------------------------------------------------------------------------------------


def test_opens_at_consecutive_failures_and_not_before() -> None:
    bench = Bench()
    for _ in range(4):
        bench.fail()
    assert bench.state() == "closed"
    bench.fail()
    assert bench.state() == "open"
    assert bench.refused()
    assert bench.path == ["open"]
    assert bench.changes[0].reason == "5 consecutive failures, the last: timeout"


def test_a_success_ends_a_row_of_failures() -> None:
    bench = Bench(BreakerPolicy(failure_threshold=5, minimum_calls=1000))
    for _ in range(20):
        for _ in range(4):
            bench.fail()
        bench.succeed()
    assert bench.state() == "closed"


def test_opens_at_a_failure_rate_without_any_row_of_failures() -> None:
    bench = Bench()
    for _ in range(4):
        bench.fail()
        bench.succeed()
    bench.succeed()
    bench.fail()  # 5 of 10
    assert bench.state() == "open"
    assert bench.changes[0].reason == "5 of 10 calls failed, the last: timeout"


def test_four_failures_in_five_never_open_the_library_s() -> None:
    library = library_breaker(failure_threshold=5)
    for _ in range(100):
        for _ in range(4):
            with pytest.raises(EngineError), library:
                raise EngineError("timeout")
        with library:
            pass
    assert library.state == "closed"


def test_below_the_rate_it_stays_closed() -> None:
    bench = Bench()
    for _ in range(50):
        bench.succeed()
        bench.succeed()
        bench.fail()
    assert bench.state() == "closed"


def test_old_failures_leave_the_window() -> None:
    bench = Bench()
    for _ in range(4):
        bench.fail()
        bench.succeed()
    bench.clock.advance(POLICY.window_seconds)
    assert bench.breaker.counts() == (0, 0)
    for _ in range(5):
        bench.succeed()
    for _ in range(4):
        bench.fail()
    assert bench.state() == "closed"
    assert bench.breaker.counts() == (5, 4)


def test_the_window_forgets_a_part_at_a_time() -> None:
    bench = Bench(BreakerPolicy(failure_threshold=100, minimum_calls=1000, window_seconds=10))
    for _ in range(10):
        bench.fail()
        bench.clock.advance(1)
    assert bench.breaker.counts() == (0, 9)  # the first second has just left
    bench.clock.advance(4)
    assert bench.breaker.counts() == (0, 5)
    bench.clock.advance(1e6)
    assert bench.breaker.counts() == (0, 0)


# --- half-open -----------------------------------------------------------------------------------------------------------


async def test_exactly_one_probe_with_a_hundred_callers_waiting() -> None:
    bench = Bench()
    bench.open()
    bench.wait_until_due()
    running = 0
    release = asyncio.Event()

    async def engine() -> None:
        nonlocal running
        running += 1
        await release.wait()

    callers = [asyncio.create_task(bench.breaker.call_async(engine)) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert running == 1
    refused = [task for task in callers if task.done()]
    assert len(refused) == 99
    assert all(isinstance(task.exception(), CircuitBreakerError) for task in refused)
    release.set()
    await next(task for task in callers if task not in refused)
    assert bench.path == ["open", "half_open", "closed"]


async def test_the_library_s_lets_all_hundred_through() -> None:
    library = library_breaker(failure_threshold=1, recovery_timeout=0.000_001)
    with pytest.raises(EngineError), library:
        raise EngineError("timeout")
    running = 0
    release = asyncio.Event()

    async def engine() -> None:
        nonlocal running
        running += 1
        if running == 100:
            release.set()
        await release.wait()

    assert library.state == "half_open"
    guarded = library(engine)
    await asyncio.gather(*(guarded() for _ in range(100)))
    assert running == 100


def test_a_failed_probe_opens_it_again_and_a_good_one_closes_it() -> None:
    bench = Bench()
    bench.open()
    bench.wait_until_due()
    bench.fail()
    assert bench.state() == "open"
    assert bench.refused()
    bench.wait_until_due()
    bench.succeed()
    assert bench.state() == "closed"
    assert not bench.refused()
    assert bench.path == ["open", "half_open", "open", "half_open", "closed"]
    assert bench.breaker.counts() == (0, 0)  # it starts afresh


def test_the_change_to_half_open_is_told_even_when_nobody_calls() -> None:
    bench = Bench()
    bench.open()
    bench.breaker.observe()
    assert bench.path == ["open"]
    bench.wait_until_due()
    bench.breaker.observe()
    bench.breaker.observe()
    assert bench.path == ["open", "half_open"]


# --- cancelled -----------------------------------------------------------------------------------------------------------


async def cancelled_call(breaker: circuitbreaker.CircuitBreaker) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(breaker.call_async(hang))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_probe_changes_nothing_and_makes_room_for_the_next() -> None:
    bench = Bench()
    bench.open()
    bench.wait_until_due()
    await cancelled_call(bench.breaker)
    assert bench.state() == "half_open"
    with bench.breaker.admit():
        assert bench.refused()
    assert bench.state() == "closed"


async def test_cancelled_calls_neither_end_a_row_nor_count() -> None:
    bench = Bench()
    for _ in range(4):
        bench.fail()
    for _ in range(20):
        await cancelled_call(bench.breaker)
    assert bench.breaker.counts() == (0, 4)
    bench.fail()
    assert bench.state() == "open"


async def test_a_cancelled_call_closes_the_library_s() -> None:
    library = library_breaker(failure_threshold=1, recovery_timeout=0.000_001)
    with pytest.raises(EngineError), library:
        raise EngineError("timeout")
    assert library.state == "half_open"
    await cancelled_call(library)
    assert library.state == "closed"


def test_what_is_not_the_engine_s_fault_counts_neither_way() -> None:
    bench = Bench()
    for _ in range(100):
        bench.fail_neutrally()
    assert bench.state() == "closed"
    assert bench.breaker.counts() == (0, 0)
    bench.open()
    bench.wait_until_due()
    bench.fail_neutrally()
    assert bench.state() == "half_open"
    bench.succeed()
    assert bench.state() == "closed"


# --- late ----------------------------------------------------------------------------------------------------------------


def test_outcomes_of_calls_from_before_the_opening_are_ignored() -> None:
    bench = Bench()
    late_success, late_failure = bench.breaker.admit(), bench.breaker.admit()
    bench.open()
    late_success.__exit__(None, None, None)
    assert bench.state() == "open"
    assert bench.refused()
    bench.wait_until_due()
    with bench.breaker.admit():  # the probe
        late_failure.__exit__(EngineError, EngineError("timeout"), None)
        assert bench.refused()  # it is still the only one
    assert bench.state() == "closed"
    assert bench.path == ["open", "half_open", "closed"]


def test_a_late_success_closes_the_library_s() -> None:
    library = library_breaker(failure_threshold=1)
    library.__enter__()  # a call that takes long
    with pytest.raises(EngineError), library:
        raise EngineError("timeout")
    assert library.state == "open"
    library.__exit__(None, None, None)  # it succeeds after all
    assert library.state == "closed"


def test_a_late_failure_does_not_count_after_the_closing() -> None:
    bench = Bench()
    late = [bench.breaker.admit() for _ in range(50)]
    bench.open()
    bench.wait_until_due()
    bench.succeed()
    for call in late:
        call.__exit__(EngineError, EngineError("timeout"), None)
    assert bench.state() == "closed"
    assert bench.breaker.counts() == (0, 0)


# --- the open time -------------------------------------------------------------------------------------------------------


def test_the_open_time_doubles_to_a_cap_and_a_success_sets_it_back() -> None:
    bench = Bench()
    bench.open()
    for expected in (1, 2, 4, 4, 4):
        assert expected * (1 - JITTER) <= bench.breaker.open_remaining <= expected
        bench.wait_until_due()
        bench.fail()
    bench.wait_until_due()
    bench.succeed()
    bench.open()
    assert bench.breaker.open_remaining <= 1


def test_the_open_time_is_spread() -> None:
    times = set()
    for seed in range(50):
        clock = ManualClock()
        breaker = EngineBreaker("primary", BreakerPolicy(failure_threshold=1), clock, rng=random.Random(seed))
        with pytest.raises(EngineError), breaker.admit():
            raise EngineError("timeout")
        times.add(round(breaker.open_remaining, 6))
    assert len(times) > 40


def test_the_library_s_open_time_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(circuitbreaker, "monotonic", lambda: now)
    library = library_breaker(failure_threshold=1, recovery_timeout=8)
    for _ in range(5):
        with pytest.raises(EngineError), library:
            raise EngineError("timeout")
        assert library.open_remaining == 8
        now += 8


def test_a_thousand_failed_probes_do_no_harm() -> None:
    bench = Bench()
    bench.open()
    for _ in range(1000):
        bench.wait_until_due()
        bench.fail()
    assert bench.breaker.open_remaining <= POLICY.open_max_seconds


def test_times_are_those_of_the_injected_clock() -> None:
    bench = Bench()
    bench.open()
    opened = bench.clock.now()
    bench.clock.advance(0.5)
    assert bench.breaker.opened_at.timestamp() == pytest.approx(opened)
    assert bench.breaker.open_until.timestamp() == pytest.approx(bench.clock.now() + bench.breaker.open_remaining)


# --- by hand, and the base class's other doors ---------------------------------------------------------------------------


def test_reset_closes_it_and_forgets() -> None:
    bench = Bench()
    late = bench.breaker.admit()
    bench.open()
    bench.breaker.reset()
    assert bench.state() == "closed"
    assert bench.breaker.counts() == (0, 0)
    assert bench.changes[-1].reason == "reset"
    late.__exit__(EngineError, EngineError("timeout"), None)
    assert bench.breaker.counts() == (0, 0)
    bench.breaker.reset()
    assert bench.path == ["open", "closed"]  # a reset of a closed breaker is no change


def test_reset_in_half_open_while_a_probe_runs() -> None:
    bench = Bench()
    bench.open()
    bench.wait_until_due()
    probe = bench.breaker.admit()
    bench.breaker.reset()
    probe.__exit__(EngineError, EngineError("timeout"), None)
    assert bench.state() == "closed"
    assert not bench.refused()


async def test_decorated_functions_and_generators_obey_too() -> None:
    bench = Bench(BreakerPolicy(failure_threshold=1))

    @bench.breaker
    async def engine() -> None:
        raise EngineError("timeout")

    @bench.breaker
    def numbers() -> object:
        yield 1

    assert list(numbers()) == [1]
    with pytest.raises(EngineError):
        await engine()
    for _ in range(2):
        with pytest.raises(CircuitBreakerError):
            await engine()
    with pytest.raises(CircuitBreakerError):
        list(numbers())
    with pytest.raises(TypeError), bench.breaker:
        pass


# --- any order of events -------------------------------------------------------------------------------------------------


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin, end and are abandoned in any order while time passes; a simple model says what must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.breaker = self.bench.breaker
        self.calls: list[tuple[breaker_module._Call, int, bool]] = []  # (call, changes of state when it began, a probe)
        self.row = 0
        self.window: list[tuple[float, bool]] = []

    @property
    def age(self) -> int:
        """Grows at each opening, closing and reset."""
        return sum(change.after != "half_open" for change in self.bench.changes) + self.resets

    resets = 0

    @property
    def probing(self) -> bool:
        return any(probe and age == self.age for _, age, probe in self.calls)

    @rule()
    def begin(self) -> None:
        state = self.breaker.state
        try:
            call = self.breaker.admit()
        except CircuitBreakerError:
            assert state == "open" or (state == "half_open" and self.probing)
            return
        assert state == "closed" or (state == "half_open" and not self.probing)
        self.calls.append((call, self.age, state == "half_open"))

    @precondition(lambda self: self.calls)
    @rule(pick=st.integers(0, 1000), outcome=st.sampled_from(["success", "failure", "cancelled", "neutral"]))
    def end(self, pick: int, outcome: str) -> None:
        call, age, probe = self.calls.pop(pick % len(self.calls))
        before, current = self.breaker.state, age == self.age
        counts = self.breaker.counts()
        row = self.breaker.failure_count
        error: BaseException | None = {
            "success": None,
            "failure": EngineError("timeout"),
            "cancelled": asyncio.CancelledError(),
            "neutral": EngineError("rejected", counts=False),
        }[outcome]
        call.__exit__(type(error) if error else None, error, None)
        after = self.breaker.state
        if not current or outcome in ("cancelled", "neutral"):
            assert after == before
            assert self.breaker.counts() == counts
            assert self.breaker.failure_count == row
        elif probe:
            assert after == ("closed" if outcome == "success" else "open")
        elif outcome == "success":
            assert after == "closed"
        else:
            successes, failures = counts[0], counts[1] + 1
            by_row = row + 1 >= POLICY.failure_threshold
            by_rate = successes + failures >= POLICY.minimum_calls and failures / (successes + failures) >= POLICY.failure_rate
            assert after == ("open" if by_row or by_rate else "closed")

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds: float) -> None:
        self.bench.clock.advance(seconds)

    @rule()
    def observe(self) -> None:
        self.breaker.observe()

    @rule()
    def reset(self) -> None:
        closed = self.breaker.state == "closed"
        self.breaker.reset()
        if closed:
            self.resets += 1
        assert self.bench.state() == "closed"

    @invariant()
    def open_time_is_bounded(self) -> None:
        assert self.breaker.open_remaining <= POLICY.open_max_seconds

    @invariant()
    def at_most_one_probe(self) -> None:
        assert sum(probe and age == self.age for _, age, probe in self.calls) <= 1

    @invariant()
    def changes_are_a_path(self) -> None:
        state = "closed"
        for change in self.bench.changes:
            assert change.before == state != change.after
            state = change.after


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestBreakerMachine = BreakerMachine.TestCase
