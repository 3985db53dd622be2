"""The budget of retries, with a clock that the test drives."""

from __future__ import annotations

import asyncio

import pytest

from libs.common import telemetry
from libs.common.bus import Bus, _Pending
from libs.common.clock import ManualClock
from libs.common.retries import FLOOR_PER_SECOND, SHARE, WINDOW_SECONDS, RetryBudget
from libs.common.settings import CommonSettings
from libs.common.tracing import NO_SPAN

FLOOR = int(FLOOR_PER_SECOND * WINDOW_SECONDS)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def taken(budget: RetryBudget) -> int:
    """All that it gives at once."""
    count = 0
    while budget.take():
        count += 1
    return count


def test_who_is_asked_little_may_still_retry_but_not_for_ever(clock: ManualClock) -> None:
    budget = RetryBudget(clock)
    budget.count()
    assert taken(budget) == FLOOR
    clock.advance(WINDOW_SECONDS - 1)
    assert not budget.take()
    clock.advance(1)
    assert taken(budget) == FLOOR


def test_of_many_requests_a_tenth_may_be_retried(clock: ManualClock) -> None:
    budget = RetryBudget(clock)
    for _ in range(5000):
        budget.count()
    assert budget.left == 500
    assert taken(budget) == 500
    clock.advance(WINDOW_SECONDS)
    assert budget.left == FLOOR  # what was asked before is no credit for ever


@pytest.mark.parametrize("rate", [20, 400])
def test_no_window_has_more_retries_than_its_share_when_all_requests_fail(clock: ManualClock, rate: int) -> None:
    budget = RetryBudget(clock)
    retries: list[float] = []
    for _ in range(60 * rate):
        clock.advance(1 / rate)
        budget.count()
        if budget.take():
            retries.append(clock.monotonic())
    most = max(FLOOR, SHARE * rate * WINDOW_SECONDS)
    # A window that begins within a second has a part of it that the budget has forgotten.
    ends = [moment for moment in retries if moment > WINDOW_SECONDS]
    assert ends
    for end in ends:
        assert sum(end - WINDOW_SECONDS + 1 < moment <= end for moment in retries) <= most + 1
    assert len(retries) >= 0.9 * 60 / WINDOW_SECONDS * min(most, rate * WINDOW_SECONDS)


def test_a_long_silence_is_no_work(clock: ManualClock) -> None:
    budget = RetryBudget(clock)
    budget.take()
    clock.advance(1e9)
    assert budget.left == FLOOR


async def test_the_death_of_a_stage_sends_no_more_again_than_the_budget_has(clock: ManualClock) -> None:
    bus = Bus("edge", CommonSettings(), clock)
    sent: list[str] = []
    for number in range(FLOOR + 20):
        token = f"{number:x}"

        async def again(token: str = token) -> None:
            sent.append(token)

        bus._pending[token] = _Pending(asyncio.get_running_loop().create_future(), again, NO_SPAN)
    withheld = telemetry.RESEND_WITHHELD._value.get()
    tokens = list(bus._pending)
    await bus._send_again(tokens)
    assert sent == tokens[:FLOOR]
    assert telemetry.RESEND_WITHHELD._value.get() == withheld + 20
    # Whoever was not sent again may be at the next death.
    clock.advance(WINDOW_SECONDS)
    await bus._send_again(tokens)
    assert sent == tokens
