"""What the limiter answers to each message."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from pydantic import ValidationError

from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import (
    Admission,
    AdmittedDetect,
    AnsweredAccount,
    AuthenticatedAdmission,
    AuthenticatedDetect,
    Principal,
    RegisterRequest,
)
from libs.common.errors import ErrorCode
from libs.common.subjects import DETECT_ADMITTED, REGISTER_ADMITTED
from services.limiter import handlers
from services.limiter.core import PER_ADDRESS, PER_KEY, Decision, KeyState, Policy
from services.limiter.failover import Health, Limiter
from services.limiter.handlers import RateLimitedError
from services.limiter.ports import StoreUnavailableError
from services.limiter.settings import Settings

CONTEXT = RequestContext(2**53, "request", "trace")
PAYLOAD = msgspec.Raw(b'{"text":"hello"}')


class Store:
    """One dict of states; `away` at will."""

    def __init__(self, policy: Policy, clock: ManualClock) -> None:
        self.policy, self.clock, self.away = policy, clock, False
        self.states: dict[str, KeyState] = {}

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        if self.away:
            raise StoreUnavailableError
        state = self.states.setdefault(key, KeyState(self.policy))
        return state.decide(self.policy, limits, cost, int(self.clock.monotonic() * 1000), known, partial=partial)

    async def beat(self) -> int:
        return 1


class Desk:
    """Handlers with their dependencies."""

    def __init__(self, policy: Policy = PER_KEY) -> None:
        self.clock = ManualClock()
        self.store = Store(policy, self.clock)
        self.limiter = Limiter(policy, self.store, Health(self.store, lambda up: None), self.clock, 100)
        self.rng = random.Random(1)
        self.principal = Principal(key_id="0123456789ab", scopes=("detect",), limit_minute=3, limit_day=5)

    async def admit(self, cost: int = 1) -> AdmittedDetect:
        message = AuthenticatedDetect(principal=self.principal, payload=PAYLOAD, cost=cost)
        forward = await handlers.admit(message, CONTEXT, self.limiter, self.rng)
        assert forward.subject == DETECT_ADMITTED
        assert isinstance(forward.message, AdmittedDetect)
        return forward.message

    async def admit_many(self, cost: int, *, partial: bool = False) -> Admission:
        message = AuthenticatedAdmission(principal=self.principal, cost=cost, partial=partial)
        answer = await handlers.admit_many(message, CONTEXT, self.limiter, self.rng)
        assert isinstance(answer.result, Admission)
        assert answer.rate == answer.result.rate
        assert answer.result.principal == self.principal
        return answer.result

    async def refused(self, cost: int = 1) -> RateLimitedError:
        with pytest.raises(RateLimitedError) as caught:
            await self.admit(cost)
        return caught.value


async def test_an_admitted_call_goes_on_with_the_state_of_its_limits() -> None:
    desk = Desk()
    message = await desk.admit(2)
    assert (message.principal, message.payload, message.cost) == (desk.principal, PAYLOAD, 2)
    rate = message.rate
    assert (rate.limit_minute, rate.remaining_minute, rate.reset_minute) == (3, 1, 0)
    assert (rate.limit_day, rate.remaining_day, rate.reset_day, rate.degraded) == (5, 3, 0, False)


async def test_a_refusal_carries_the_state_of_the_limits_and_when_to_come_back() -> None:
    desk = Desk()
    await desk.admit(3)
    error = await desk.refused()
    assert error.code == ErrorCode.RATE_LIMITED
    assert error.rate is not None
    assert (error.rate.remaining_minute, error.rate.remaining_day) == (0, 2)
    assert error.rate.reset_minute == pytest.approx(60.151)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 3
    assert "3 units a minute" in error.detail


async def test_retry_after_grows_with_the_overrun() -> None:
    desk = Desk()
    await desk.admit(3)
    waits = [(await desk.refused()).retry_after or 0 for _ in range(60)]
    assert all(1 <= wait <= 3 for wait in waits[:10])
    assert all(3 <= wait <= 10 for wait in waits[10:30])
    assert all(6 <= wait <= 19 for wait in waits[30:])
    assert len(set(waits[10:30])) > 2
    assert len(set(waits[30:])) > 3


async def test_a_call_larger_than_the_limit_is_told_that_it_can_never_pass() -> None:
    desk = Desk()
    assert "can never pass this key's limit of 3 a minute" in (await desk.refused(4)).detail
    assert "can never pass this key's limit of 5 a day" in (await desk.refused(6)).detail
    assert (await desk.admit(3)).rate.remaining_day == 2


async def test_the_day_is_named_when_it_is_the_day() -> None:
    desk = Desk()
    await desk.admit(3)
    desk.clock.advance(61)
    error = await desk.refused(3)
    assert "5 units a day leaves 2" in error.detail


async def test_many_units_are_taken_at_once_or_not_at_all() -> None:
    desk = Desk()
    admission = await desk.admit_many(2)
    assert (admission.granted, admission.rate.remaining_minute, admission.rate.remaining_day) == (2, 1, 3)
    with pytest.raises(RateLimitedError) as caught:
        await desk.admit_many(2)
    assert "leaves 1; the call costs 2 units" in caught.value.detail
    assert caught.value.rate is not None
    assert caught.value.rate.remaining_minute == 1
    assert (await desk.admit_many(1)).granted == 1


@pytest.mark.parametrize("away", [False, True])
async def test_a_partial_request_gets_what_there_is_and_no_refusal(away: bool) -> None:
    desk = Desk()
    desk.store.away = away
    granted = [await desk.admit_many(2, partial=True) for _ in range(3)]
    assert [each.granted for each in granted] == [2, 1, 0]
    assert granted[-1].rate.reset_minute == pytest.approx(60.151)
    assert granted[-1].rate.degraded is away
    # Nothing of that was an overrun: the first refusal is in the first band.
    assert (await desk.refused()).retry_after in (1, 2, 3, 4)


async def test_answers_say_when_redis_had_no_part_in_them() -> None:
    desk = Desk()
    desk.store.away = True
    assert (await desk.admit(3)).rate.degraded
    error = await desk.refused()
    assert error.rate is not None
    assert error.rate.degraded


async def test_an_account_answer_is_sent_on_unchanged_and_costs_nothing() -> None:
    desk = Desk()
    await desk.admit(3)
    result = msgspec.Raw(b'{"anything":1}')
    for _ in range(5):
        answer = await handlers.answered(AnsweredAccount(principal=desk.principal, result=result), CONTEXT, desk.limiter)
        assert answer.result is result
        assert answer.rate is not None
        assert (answer.rate.remaining_minute, answer.rate.remaining_day) == (0, 2)


async def test_an_address_registers_so_many_keys_in_any_hour() -> None:
    desk = Desk(PER_ADDRESS)

    async def register(address: str) -> None:
        message = RegisterRequest(name="app", address=address)
        forward = await handlers.register(message, CONTEXT, desk.limiter, desk.rng, 30)
        assert (forward.subject, forward.message) == (REGISTER_ADMITTED, message)

    for _ in range(30):
        await register("192.0.2.1")
    with pytest.raises(RateLimitedError) as caught:
        await register("192.0.2.1")
    assert (caught.value.code, caught.value.rate) == (ErrorCode.RATE_LIMITED, None)
    assert "192.0.2" not in caught.value.detail
    await register("192.0.2.2")
    assert not any("192.0.2" in key for key in desk.store.states)
    desk.clock.advance(3601)
    await register("192.0.2.1")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:6379",
        "http://secret-host:6379",
        "redis://user:secret@host:port/0",
        "",
        "redis+sentinel://:secret@host:26379/",
        "redis+sentinel://:secret@host:26379,/mymaster",
        "redis+sentinel://:secret@host:port/mymaster",
        "redis+sentinel://:secret@host:26379/mymaster/zero",
        "unix+sentinel://:secret@host:26379/mymaster",
        "unix+cluster://:secret@host:6379",
        "redis+cluster://:secret@host:6379,",
        "redis+cluster://:secret@host:port",
        "redis+cluster://:secret@host:6379/1",
        "redis+cluster://:secret@host:6379?db=1",
    ],
)
def test_a_malformed_redis_url_is_refused_without_being_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTCULLIS_REDIS_URL", url)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (problem,) = caught.value.errors(include_input=False, include_url=False)
    assert problem["loc"] == ("redis_url",)
    assert "not a Redis URL" in problem["msg"]
    assert "secret" not in str(caught.value)
