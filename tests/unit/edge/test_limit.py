"""The adaptive limit against a simulated gateway: so many places, each of which takes so long for a text."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.edge.limit import FORGET_SECONDS, AdaptiveLimit

LEAST, MOST, TOLERATED_SECONDS = 8, 512, 0.25


def limit_of(least: int = LEAST, most: int = MOST) -> AdaptiveLimit:
    return AdaptiveLimit(least=least, most=most, tolerated_seconds=TOLERATED_SECONDS)


@dataclass
class Result:
    """Of the texts that came in a stretch of time."""

    refused: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def refused_share(self) -> float:
        return self.refused / (self.refused + len(self.seconds))

    @property
    def worst(self) -> float:
        return max(self.seconds)


@dataclass
class Gateway:
    """`places` texts are worked on at a time, `service` seconds each; the others wait in line."""

    limit: AdaptiveLimit
    places: int = 2
    service: float = 0.01
    now: float = 0.0
    _ends: list[tuple[float, int, float, Result]] = field(default_factory=list)
    _line: deque[tuple[float, Result]] = field(default_factory=deque)
    _busy: int = 0
    _stopped_until: float = 0.0
    _number: Iterator[int] = field(default_factory=itertools.count)

    @property
    def capacity(self) -> float:
        return self.places / self.service

    def load(self, rate: float, seconds: float) -> Result:
        """So many texts a second come, evenly."""
        result, began = Result(), self.now
        for number in range(int(rate * seconds)):
            self._run_until(began + number / rate)
            self._arrive(result)
        self._run_until(began + seconds)
        return result

    def stop(self, seconds: float) -> None:
        """Nothing is worked on for so long, by anybody."""
        self._stopped_until = self.now + seconds

    def _arrive(self, result: Result) -> None:
        if self.limit.full:
            result.refused += 1
            return
        self.limit.begin(self.now)
        self._line.append((self.now, result))
        self._work()

    def _work(self) -> None:
        while self._line and self._busy < self.places:
            self._busy += 1
            came, result = self._line.popleft()
            begins = max(self.now, self._stopped_until)
            heapq.heappush(self._ends, (begins + self.service, next(self._number), came, result))

    def _run_until(self, until: float) -> None:
        while self._ends and self._ends[0][0] <= until:
            self.now, _, came, result = heapq.heappop(self._ends)
            self._busy -= 1
            seconds = self.now - came
            result.seconds.append(seconds)
            self.limit.measure(came, seconds, self.now)
            self.limit.end()
            self._work()
        self.now = until


def test_an_idle_gateway_lets_everything_through() -> None:
    gateway = Gateway(limit_of())
    assert gateway.load(0.5 * gateway.capacity, 30).refused == 0
    assert gateway.limit.value == MOST
    assert math.isclose(gateway.limit.base_seconds, gateway.service)


def test_twice_the_capacity_keeps_the_places_busy_and_nobody_waiting() -> None:
    gateway = Gateway(limit_of())
    gateway.load(0.5 * gateway.capacity, 5)
    gateway.load(2 * gateway.capacity, 5)
    # For as long as it may last: nothing drifts.
    for _ in range(10):
        over = gateway.load(2 * gateway.capacity, 30)
        assert len(over.seconds) >= 0.97 * gateway.capacity * 30
        assert over.worst <= 2 * (gateway.service + TOLERATED_SECONDS)
    after = gateway.load(0.7 * gateway.capacity, 5)
    assert after.refused == 0
    assert after.worst < 2 * (gateway.service + TOLERATED_SECONDS)


def late(limit: AdaptiveLimit, began: float, texts: int, seconds: float = 1.0) -> float:
    """So many texts begin together and take so long. When the last was answered."""
    for _ in range(texts):
        limit.begin(began)
    for number in range(texts):
        limit.measure(began, seconds, began + seconds + number * 0.01)
        limit.end()
    return began + seconds + texts * 0.01


def test_the_first_cut_counts_what_is_under_way_and_not_a_limit_that_nothing_came_near() -> None:
    limit = limit_of()
    limit.base_seconds = 0.01
    now = late(limit, 0.0, 60)
    assert limit.value == MOST
    late(limit, now, 60)
    assert LEAST < limit.value < 60


def test_what_is_measured_first_is_taken_for_the_base() -> None:
    limit = limit_of()
    now = late(limit, 0.0, 60)
    late(limit, now, 60)
    assert limit.value == MOST


def test_a_stop_of_a_moment_is_no_overload() -> None:
    """Nothing is worked on for two seconds, then all that came in the meantime."""
    gateway = Gateway(limit_of(), service=0.02)
    gateway.load(0.4 * gateway.capacity, 5)
    for _ in range(3):  # nor are several
        gateway.stop(2.0)
        assert gateway.load(0.4 * gateway.capacity, 5).refused == 0
        assert gateway.limit.value == MOST


def test_answers_to_what_began_under_the_last_limit_do_not_cut_twice() -> None:
    limit = limit_of()
    limit.base_seconds = 0.01
    began = late(limit, 0.0, 60)
    now = late(limit, began, 100)
    once = limit.value
    assert once < 100
    for number in range(100):
        limit.measure(began, 2.0, now + number * 0.02)
        limit.refuse(began, now + number * 0.02)
    assert limit.value == once


def test_work_that_has_become_slow_by_itself_is_found_out_and_not_refused_for_ever() -> None:
    """Forty places that take a second each, after forty that took ten milliseconds: no text waits for another."""
    gateway = Gateway(limit_of(), places=40)
    gateway.load(30, 10)
    gateway.service = 1.0
    gateway.load(30, 60)
    assert gateway.load(30, 30).refused_share == 0
    # Also when it is asked for all that it can do, and the limit had to fall for that.
    gateway.load(2 * gateway.capacity, 60)
    assert len(gateway.load(2 * gateway.capacity, 60).seconds) >= 0.9 * gateway.capacity * 60


def test_below_the_least_nothing_is_refused_however_long_it_takes() -> None:
    gateway = Gateway(limit_of(), places=1)
    gateway.load(50, 5)
    gateway.service = 3.0
    gateway.load(0.3, 100)
    assert gateway.limit.value >= LEAST
    assert gateway.load(0.3, 100).refused == 0


def test_refusals_of_the_stages_lower_it_and_are_no_measure_of_how_long_a_text_takes() -> None:
    gateway = Gateway(limit_of())
    gateway.load(0.5 * gateway.capacity, 5)
    limit, began = gateway.limit, gateway.now
    for _ in range(50):
        limit.begin(began)
    for number in range(60):
        limit.measure(began, 0.02, began + 0.01 * number)
    assert limit.value == MOST
    for number in range(200):
        limit.refuse(began + 0.6 + 0.01 * number, began + 0.6 + 0.01 * number)
    assert LEAST < limit.value < 50
    for _ in range(50):
        limit.end()
    for number in range(6000):  # down to the least, at which every window tells the base
        limit.refuse(began + 3 + 0.01 * number, began + 3 + 0.01 * number)
    assert math.isclose(limit.base_seconds, gateway.service)


def test_what_was_learnt_is_forgotten_when_nothing_comes() -> None:
    gateway = Gateway(limit_of())
    gateway.load(0.5 * gateway.capacity, 5)
    gateway.load(3 * gateway.capacity, 10)
    assert gateway.limit.value < 100
    gateway.load(1, 2)
    gateway.now += FORGET_SECONDS + 1
    assert gateway.load(10_000, 0.03).refused == 0


def test_after_an_overload_it_is_soon_as_wide_as_before() -> None:
    gateway = Gateway(limit_of())
    gateway.load(0.5 * gateway.capacity, 5)
    gateway.load(3 * gateway.capacity, 10)
    assert gateway.limit.value < 100
    gateway.load(0.3 * gateway.capacity, 3)
    assert gateway.limit.value == MOST


def test_a_wait_is_predicted_from_what_the_last_ones_waited() -> None:
    gateway = Gateway(limit_of())
    assert gateway.limit.wait_seconds() == 0
    gateway.load(0.5 * gateway.capacity, 5)
    assert gateway.limit.wait_seconds() == 0
    gateway.load(2 * gateway.capacity, 10)
    assert 0.5 * TOLERATED_SECONDS < gateway.limit.wait_seconds() < 2 * TOLERATED_SECONDS
    gateway.load(0.001, 1)
    assert gateway.limit.in_flight == 0
    assert gateway.limit.wait_seconds() == 0  # nobody is ahead any more, though nothing has been measured since


def test_the_least_is_never_more_than_the_most() -> None:
    assert limit_of(least=8, most=2).value == 2
    gateway = Gateway(limit_of(least=8, most=2))
    gateway.load(2 * gateway.capacity, 5)
    assert gateway.limit.value == 2
