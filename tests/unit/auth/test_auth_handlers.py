"""What auth does with each message, on keys in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import pytest

from libs.common import contracts, keys, subjects
from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import (
    AccountRequest,
    AdminCreateKey,
    AdminCredential,
    AdminKey,
    AdminListKeys,
    AdminUpdateKey,
    AdmissionRequest,
    AnsweredAccount,
    AuthenticatedAdmission,
    AuthenticatedDetect,
    BreakersReset,
    BreakersResetRequest,
    DayUsage,
    DetectPayload,
    DetectRequest,
    IssuedKey,
    KeyList,
    KeyRecord,
    RegisterRequest,
    TakeRequest,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from services.auth import handlers
from services.auth.cache import Authenticator, KeyCache
from services.auth.core import Caps, Peppers, Usage
from services.auth.handlers import Finisher, Keys, Policy
from tests.unit.auth.fakes import CREATED, PEPPER, PEPPERS, MemoryKeys, RecordingAnnouncer, credential_of

T = TypeVar("T")
AccountHandler = Callable[[AccountRequest, RequestContext, Keys], Awaitable[Forward]]
CONTEXT = RequestContext(0, "id", "trace")
TOKEN = AdminCredential(admin_digest=keys.digest("the admin token"))


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock(CREATED.timestamp())
        self.store = MemoryKeys()
        self.cache = KeyCache(self.store.find, self.clock, ttl_seconds=10.0, entries=100, is_up=lambda: True)
        self.announcer = RecordingAnnouncer(self.cache.forget)
        policy = Policy(True, Caps(1000, 100_000), timedelta(hours=1), keys.digest("the admin token"))
        self.use = Keys(self.store, Authenticator(self.cache, self.clock, PEPPERS), self.announcer, self.clock, PEPPERS, policy)

    def exchange_pepper(self, *, ended: bool = False) -> None:
        """As if started anew."""
        peppers = Peppers(b"the-pepper-from-now-on", None if ended else PEPPER)
        self.use = replace(self.use, peppers=peppers, authenticator=Authenticator(self.cache, self.clock, peppers))

    def policy(self, **changes: Any) -> Keys:
        return replace(self.use, policy=replace(self.use.policy, **changes))

    async def register(self, use: Keys | None = None, **fields: Any) -> IssuedKey:
        message = RegisterRequest(**{"name": "app", "address": "127.0.0.1", **fields})
        return result(await handlers.register(message, CONTEXT, use or self.use), IssuedKey)

    async def detect(self, api_key: str, cost: int = 1) -> Forward:
        payload = contracts.raw(DetectPayload(text="t"))
        message = DetectRequest(credential=credential_of(api_key), payload=payload, cost=cost)
        return await handlers.detect(message, CONTEXT, self.use.authenticator)

    async def account(
        self, handler: Callable[[AccountRequest, RequestContext, Keys], Awaitable[Forward]], api_key: str
    ) -> Forward:
        return await handler(AccountRequest(credential=credential_of(api_key)), CONTEXT, self.use)

    async def rotate(self, api_key: str) -> IssuedKey:
        return answered(await self.account(handlers.rotate, api_key), IssuedKey)

    async def create(self, **fields: Any) -> IssuedKey:
        message = AdminCreateKey(**{"admin": TOKEN, "name": "made", **fields})
        return result(await handlers.create_key(message, CONTEXT, self.use), IssuedKey)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


def result(answer: Answer, kind: type[T]) -> T:
    assert isinstance(answer.result, kind)
    return answer.result


def answered(forward: Forward, kind: type[T]) -> T:
    assert forward.subject == subjects.ACCOUNT_ANSWERED
    assert isinstance(forward.message, AnsweredAccount)
    return msgspec.json.decode(forward.message.result, type=kind)


async def refusal(work: Awaitable[object]) -> PortcullisError:
    with pytest.raises(PortcullisError) as caught:
        await work
    return caught.value


async def refused(work: Awaitable[object]) -> str:
    return (await refusal(work)).code


async def test_a_registered_key_is_forwarded_with_its_limits(bench: Bench) -> None:
    issued = await bench.register(name="My App", rate_limit_per_minute=70)
    assert keys.parse(issued.api_key) is not None
    assert issued.record == KeyRecord(
        key_id=issued.record.key_id,
        name="My App",
        scopes=("detect", "batch"),
        rate_limit_per_minute=70,
        rate_limit_per_day=10_000,
        created_at="2026-01-02T03:04:05.678Z",
    )
    forward = await bench.detect(issued.api_key)
    assert forward.subject == subjects.DETECT_AUTHENTICATED
    assert isinstance(forward.message, AuthenticatedDetect)
    assert forward.message.principal == contracts.Principal(
        key_id=issued.record.key_id, scopes=("detect", "batch"), limit_minute=70, limit_day=10_000
    )
    assert forward.message.payload == contracts.raw(DetectPayload(text="t"))


async def test_registration_has_caps_and_tells_all_that_is_wrong(bench: Bench) -> None:
    error = await refusal(bench.register(name="", rate_limit_per_minute=1001, rate_limit_per_day=100_001))
    assert error.code == ErrorCode.INVALID_FIELD
    assert [field for field, _ in error.fields] == ["name", "rate_limit_per_minute", "rate_limit_per_day"]
    assert bench.store.rows == {}


async def test_registration_by_admin_asks_for_the_token(bench: Bench) -> None:
    use = bench.policy(registration_open=False)
    assert await refused(bench.register(use)) == ErrorCode.FORBIDDEN
    assert await refused(bench.register(use, admin_digest=keys.digest("a guess"))) == ErrorCode.FORBIDDEN
    await bench.register(use, admin_digest=keys.digest("the admin token"))
    # Without a token configured nobody is an administrator.
    use = bench.policy(registration_open=False, admin_digest=None)
    assert await refused(bench.register(use, admin_digest=keys.digest("the admin token"))) == ErrorCode.FORBIDDEN


async def test_every_bad_key_gets_the_same_answer(bench: Bench) -> None:
    issued = await bench.register()
    revoked = await bench.register()
    await bench.account(handlers.revoke, revoked.api_key)
    expiring = await bench.create(expires_at="2026-01-02T04:00:00Z")
    await bench.detect(expiring.api_key)
    bench.clock.advance(3600)
    seen = set()
    for api_key in (
        keys.generate(),
        keys.generate(issued.record.key_id),
        revoked.api_key,
        expiring.api_key,
    ):
        error = await refusal(bench.detect(api_key))
        seen.add((error.code, error.detail, error.internal, error.retry_after))
    malformed = DetectRequest(credential=contracts.Credential(key_id="?", digest="ü"), payload=contracts.NULL)
    error = await refusal(handlers.detect(malformed, CONTEXT, bench.use.authenticator))
    seen.add((error.code, error.detail, error.internal, error.retry_after))
    assert len(seen) == 1
    assert error.kind.status == 401


async def test_scopes(bench: Bench) -> None:
    single = await bench.create(scopes=("detect",))
    many = await bench.create(scopes=("batch",))
    await bench.detect(single.api_key)
    assert await refused(bench.detect(single.api_key, cost=2)) == ErrorCode.FORBIDDEN
    await bench.detect(many.api_key, cost=2)
    assert await refused(bench.detect(many.api_key)) == ErrorCode.FORBIDDEN


async def test_rotation_keeps_the_old_secret_for_the_grace_period(bench: Bench) -> None:
    issued = await bench.register()
    rotated = await bench.rotate(issued.api_key)
    assert rotated.record.key_id == issued.record.key_id
    assert rotated.api_key != issued.api_key
    assert rotated.previous_valid_until == "2026-01-02T04:04:05.678Z"
    assert bench.announcer.announced == [issued.record.key_id]
    await bench.detect(rotated.api_key)
    bench.clock.advance(3599)
    await bench.detect(issued.api_key)
    bench.clock.advance(1)
    assert await refused(bench.detect(issued.api_key)) == ErrorCode.INVALID_CREDENTIALS
    await bench.detect(rotated.api_key)


async def test_a_key_is_rotated_before_the_exchange_of_the_pepper_has_reached_it(bench: Bench) -> None:
    issued = await bench.register()
    before = bench.store.rows[issued.record.key_id]
    bench.exchange_pepper()
    rotated = await bench.rotate(issued.api_key)
    stored = bench.store.rows[issued.record.key_id]
    assert (stored.previous_verifier, stored.previous_pepper_id) == (before.verifier, before.pepper_id)
    assert stored.pepper_id == bench.use.peppers.current_id != before.pepper_id
    for api_key in (issued.api_key, rotated.api_key):
        await bench.detect(api_key)
    bench.exchange_pepper(ended=True)
    await bench.detect(rotated.api_key)
    assert await refused(bench.detect(issued.api_key)) == ErrorCode.INVALID_CREDENTIALS


async def test_a_replaced_secret_cannot_rotate(bench: Bench) -> None:
    issued = await bench.register()
    await bench.rotate(issued.api_key)
    assert await refused(bench.rotate(issued.api_key)) == ErrorCode.FORBIDDEN


async def test_a_second_rotation_ends_the_first_secret(bench: Bench) -> None:
    first = await bench.register()
    second = await bench.rotate(first.api_key)
    third = await bench.rotate(second.api_key)
    assert await refused(bench.detect(first.api_key)) == ErrorCode.INVALID_CREDENTIALS
    await bench.detect(second.api_key)
    await bench.detect(third.api_key)


async def test_of_two_rotations_at_once_one_wins(bench: Bench) -> None:
    issued = await bench.register()
    await bench.detect(issued.api_key)  # cached, so both get as far as the store
    outcomes = await asyncio.gather(bench.rotate(issued.api_key), bench.rotate(issued.api_key), return_exceptions=True)
    won = [outcome for outcome in outcomes if isinstance(outcome, IssuedKey)]
    assert len(won) == 1
    assert [outcome.code for outcome in outcomes if isinstance(outcome, PortcullisError)] == [ErrorCode.FORBIDDEN]
    await bench.detect(won[0].api_key)


async def test_revoking_ends_both_secrets_at_once(bench: Bench) -> None:
    issued = await bench.register()
    rotated = await bench.rotate(issued.api_key)
    await bench.detect(issued.api_key)
    bench.announcer.announced.clear()
    assert answered(await bench.account(handlers.revoke, issued.api_key), type(None)) is None
    assert bench.announcer.announced == [issued.record.key_id]
    for api_key in (issued.api_key, rotated.api_key):
        assert await refused(bench.detect(api_key)) == ErrorCode.INVALID_CREDENTIALS


async def test_the_profile_shows_usage(bench: Bench) -> None:
    issued = await bench.register()
    days = tuple(DayUsage(date=f"2025-12-{day:02}", requests=day, malicious=1) for day in range(1, 32))
    bench.store.used[issued.record.key_id] = Usage(496, 31, CREATED, days)
    record = answered(await bench.account(handlers.profile, issued.api_key), KeyRecord)
    assert (record.total_requests, record.malicious_detections) == (496, 31)
    assert record.last_used_at == "2026-01-02T03:04:05.678Z"
    # Today is January 2: 30 days reach back to December 4; days without usage are not told.
    assert [day.date for day in record.days] == [f"2025-12-{day:02}" for day in range(4, 32)]


async def test_administration_needs_the_token_or_a_key_with_the_scope(bench: Bench) -> None:
    admin = await bench.create(scopes=("admin",))
    plain = await bench.register()
    calls: list[Callable[[AdminCredential], Awaitable[object]]] = [
        lambda who: handlers.list_keys(AdminListKeys(admin=who), CONTEXT, bench.use),
        lambda who: handlers.create_key(AdminCreateKey(admin=who, name="x"), CONTEXT, bench.use),
        lambda who: handlers.get_key(AdminKey(admin=who, key_id=plain.record.key_id), CONTEXT, bench.use),
        lambda who: handlers.update_key(AdminUpdateKey(admin=who, key_id=plain.record.key_id), CONTEXT, bench.use),
        lambda who: handlers.reset_breakers(BreakersResetRequest(admin=who, name="detect"), CONTEXT, bench.use),
        lambda who: handlers.delete_key(AdminKey(admin=who, key_id=plain.record.key_id), CONTEXT, bench.use),
    ]
    for call in calls:
        for nobody in (
            AdminCredential(),
            AdminCredential(admin_digest=keys.digest("a guess")),
            AdminCredential(credential=credential_of(plain.api_key)),
            AdminCredential(credential=credential_of(keys.generate())),
        ):
            assert await refused(call(nobody)) == ErrorCode.FORBIDDEN
    for call in calls:
        await call(AdminCredential(credential=credential_of(admin.api_key)))
    assert bench.store.rows[plain.record.key_id].revoked_at is not None


async def test_an_unreachable_store_is_not_a_refusal(bench: Bench) -> None:
    admin = await bench.create(scopes=("admin",))
    bench.store.away = True
    who = AdminCredential(credential=credential_of(admin.api_key))
    assert await refused(handlers.list_keys(AdminListKeys(admin=who), CONTEXT, bench.use)) == ErrorCode.STAGE_UNAVAILABLE


async def test_administrators_go_beyond_the_caps_of_registration(bench: Bench) -> None:
    issued = await bench.create(rate_limit_per_minute=1_000_000, rate_limit_per_day=1_000_000_000)
    assert issued.record.rate_limit_per_day == 1_000_000_000
    error = await refusal(bench.create(rate_limit_per_minute=1_000_001, rate_limit_per_day=1_000_000_001, scopes=()))
    assert {field for field, _ in error.fields} == {"rate_limit_per_minute", "rate_limit_per_day", "scopes"}


async def test_keys_are_listed_by_page(bench: Bench) -> None:
    made = []
    for _ in range(5):
        made.append((await bench.create()).record.key_id)
        bench.clock.advance(1)
    seen: list[str] = []
    after = None
    for _ in range(3):
        page = result(await handlers.list_keys(AdminListKeys(admin=TOKEN, after=after, limit=2), CONTEXT, bench.use), KeyList)
        seen += [key.key_id for key in page.keys]
        after = page.next_after
    assert seen == made
    assert after is None
    for unknown in ("A" * 12, "\x00"):
        error = await refusal(handlers.list_keys(AdminListKeys(admin=TOKEN, after=unknown), CONTEXT, bench.use))
        assert [field for field, _ in error.fields] == ["after"]


async def test_a_changed_limit_is_used_at_once(bench: Bench) -> None:
    issued = await bench.register()
    await bench.detect(issued.api_key)
    message = AdminUpdateKey(admin=TOKEN, key_id=issued.record.key_id, rate_limit_per_minute=5, name="renamed")
    record = result(await handlers.update_key(message, CONTEXT, bench.use), KeyRecord)
    assert (record.name, record.rate_limit_per_minute, record.rate_limit_per_day) == ("renamed", 5, 10_000)
    forward = await bench.detect(issued.api_key)
    assert isinstance(forward.message, AuthenticatedDetect)
    assert forward.message.principal.limit_minute == 5


async def test_a_revoked_key_cannot_be_changed_and_stays_revoked(bench: Bench) -> None:
    issued = await bench.register()
    message = AdminKey(admin=TOKEN, key_id=issued.record.key_id)
    first = result(await handlers.delete_key(message, CONTEXT, bench.use), KeyRecord)
    bench.clock.advance(60)
    second = result(await handlers.delete_key(message, CONTEXT, bench.use), KeyRecord)
    assert first.revoked_at == second.revoked_at == "2026-01-02T03:04:05.678Z"
    update = AdminUpdateKey(admin=TOKEN, key_id=issued.record.key_id, name="again")
    assert await refused(handlers.update_key(update, CONTEXT, bench.use)) == ErrorCode.INVALID_FIELD


async def test_keys_that_do_not_exist(bench: Bench) -> None:
    for key_id in ("A" * 12, "", "\x00" * 12, "x" * 1000):
        message = AdminKey(admin=TOKEN, key_id=key_id)
        assert await refused(handlers.get_key(message, CONTEXT, bench.use)) == ErrorCode.NOT_FOUND
        assert await refused(handlers.delete_key(message, CONTEXT, bench.use)) == ErrorCode.NOT_FOUND
        update = AdminUpdateKey(admin=TOKEN, key_id=key_id)
        assert await refused(handlers.update_key(update, CONTEXT, bench.use)) == ErrorCode.NOT_FOUND


async def test_a_breaker_reset_goes_on_to_the_proxies(bench: Bench) -> None:
    forward = await handlers.reset_breakers(BreakersResetRequest(admin=TOKEN, name="tei"), CONTEXT, bench.use)
    assert forward == Forward(subjects.BREAKERS_RESET, BreakersReset(name="tei"))


async def test_a_change_is_announced_even_if_its_caller_has_left(bench: Bench) -> None:
    issued = await bench.register()
    finisher = Finisher()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow_revoke(message: AccountRequest, context: RequestContext, use: Keys) -> Forward:
        reached.set()
        await go_on.wait()
        return await handlers.revoke(message, context, use)

    run = handlers.finished(slow_revoke, bench.use, finisher)
    asked = asyncio.create_task(asyncio.wait_for(run(AccountRequest(credential=credential_of(issued.api_key)), CONTEXT), 60))
    await reached.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    go_on.set()
    await finisher.close()
    assert bench.announcer.announced == [issued.record.key_id]


async def test_no_secret_in_any_log_error_or_repr(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    issued = await bench.register()
    rotated = await bench.rotate(issued.api_key)
    errors = [
        await refusal(bench.detect(keys.generate(issued.record.key_id))),
        await refusal(bench.rotate(issued.api_key)),
    ]
    caller = await bench.use.authenticator.authenticate(credential_of(rotated.api_key))
    shown = caplog.text + repr(errors) + repr(caller) + repr(bench.store.rows) + "".join(str(e) + e.internal for e in errors)
    for api_key in (issued.api_key, rotated.api_key):
        assert api_key[21:] not in shown
        assert credential_of(api_key).digest not in shown


# --- many texts ----------------------------------------------------------------------------------------------------------


async def test_units_for_many_texts_go_on_to_the_limiter_all_or_none() -> None:
    bench = Bench()
    issued = await bench.register()
    message = AdmissionRequest(credential=credential_of(issued.api_key), cost=40)
    forward = await handlers.admit(message, CONTEXT, bench.use.authenticator)
    assert forward.subject == subjects.BATCH_AUTHENTICATED
    assert isinstance(forward.message, AuthenticatedAdmission)
    assert (forward.message.principal.key_id, forward.message.cost, forward.message.partial) == (issued.record.key_id, 40, False)


async def test_units_for_accepted_work_are_taken_by_the_key_s_id_as_far_as_there_is_room() -> None:
    bench = Bench()
    issued = await bench.register()
    message = TakeRequest(key_id=issued.record.key_id, cost=40)
    forward = await handlers.take(message, CONTEXT, bench.use.authenticator)
    assert forward.subject == subjects.BATCH_AUTHENTICATED
    assert isinstance(forward.message, AuthenticatedAdmission)
    assert (forward.message.principal.key_id, forward.message.cost, forward.message.partial) == (issued.record.key_id, 40, True)


async def test_both_want_the_scope() -> None:
    bench = Bench()
    issued = await bench.create(name="app", scopes=("detect",))
    ask = AdmissionRequest(credential=credential_of(issued.api_key), cost=2)
    take = TakeRequest(key_id=issued.record.key_id, cost=2)
    for call in (
        handlers.admit(ask, CONTEXT, bench.use.authenticator),
        handlers.take(take, CONTEXT, bench.use.authenticator),
    ):
        with pytest.raises(PortcullisError) as caught:
            await call
        assert caught.value.code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize("fate", ["unknown", "revoked", "expired"])
async def test_a_key_that_is_not_valid_any_more_takes_nothing(fate: str) -> None:
    bench = Bench()
    in_an_hour = (CREATED + timedelta(hours=1)).isoformat()
    issued = await bench.create(name="app", expires_at=in_an_hour if fate == "expired" else None)
    key_id = issued.record.key_id if fate != "unknown" else keys.new_key_id()
    if fate == "revoked":
        await bench.account(handlers.revoke, issued.api_key)
    if fate == "expired":
        await handlers.take(TakeRequest(key_id=key_id, cost=1), CONTEXT, bench.use.authenticator)
        bench.clock.advance(3600)
    with pytest.raises(PortcullisError) as caught:
        await handlers.take(TakeRequest(key_id=key_id, cost=1), CONTEXT, bench.use.authenticator)
    assert caught.value.code is ErrorCode.INVALID_CREDENTIALS
