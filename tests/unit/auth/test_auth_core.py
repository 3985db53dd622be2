"""The rules of keys and of counting."""

from __future__ import annotations

import hmac
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.common import keys
from libs.common.contracts import UsageRecorded
from libs.common.errors import ErrorCode, PortcullisError
from services.auth import core
from services.auth.core import (
    Caps,
    Fields,
    LeftBehind,
    Match,
    Peppers,
    Position,
    StreamState,
    VerifiableKey,
    pepper_id,
    verifier_of,
)
from tests.unit.auth.fakes import CREATED, PEPPER, credential_of, new_key

NOW = CREATED.timestamp()
CAPS = Caps(1000, 100_000)


def problems(fields: Fields) -> dict[str, str]:
    try:
        fields.check()
    except PortcullisError as error:
        return dict(error.fields) if error.code == ErrorCode.INVALID_FIELD else {error.code: error.detail}
    return {}


@pytest.mark.parametrize("name", ["x", "a" * 100, "Müller & Söhne", "日本", "👩‍💻 app"])
def test_names_that_are_taken(name: str) -> None:
    fields = Fields()
    assert fields.name(name) == name
    assert problems(fields) == {}


@pytest.mark.parametrize("name", ["", " ", "\u3000", "a" * 101, "a\x00b", "a\nb", "a\x7fb", "a\x85b", "a\u2028b", "a\ud800b"])
def test_names_that_are_refused(name: str) -> None:
    fields = Fields()
    fields.name(name)
    assert set(problems(fields)) == {"name"}


def test_limits_have_defaults_and_caps() -> None:
    fields = Fields()
    assert fields.limits(None, None, CAPS) == (60, 10_000)
    assert fields.limits(1, 1, CAPS) == (1, 1)
    assert fields.limits(1000, 100_000, CAPS) == (1000, 100_000)
    assert problems(fields) == {}
    for per_minute, per_day, refused in [
        (0, 1, {"rate_limit_per_minute"}),
        (1001, 1, {"rate_limit_per_minute"}),
        (-1, 100_001, {"rate_limit_per_minute", "rate_limit_per_day"}),
        (2**70, 0, {"rate_limit_per_minute", "rate_limit_per_day"}),
    ]:
        fields = Fields()
        fields.limits(per_minute, per_day, CAPS)
        assert set(problems(fields)) == refused


def test_the_default_is_never_above_the_cap() -> None:
    assert Fields().limits(None, None, Caps(10, 20)) == (10, 20)


EXPIRIES = ["", "tomorrow", "2030-01-01", "2030-01-01T00:00:00", "2020-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59"]


@pytest.mark.parametrize("value", EXPIRIES)
def test_expiries_that_are_refused(value: str) -> None:
    fields = Fields()
    fields.expiry(value, CREATED)
    assert set(problems(fields)) == {"expires_at"}


def test_an_expiry_is_turned_to_utc() -> None:
    fields = Fields()
    assert fields.expiry("2030-01-01T02:00:00+02:00", CREATED) == datetime(2030, 1, 1, tzinfo=UTC)
    assert problems(fields) == {}


def test_scopes_are_told_once_each() -> None:
    fields = Fields()
    assert fields.scopes(("admin", "detect", "admin")) == ("detect", "admin")
    fields.scopes(())
    assert set(problems(fields)) == {"scopes"}


def verifier(api_key: str) -> bytes:
    return verifier_of(PEPPER, credential_of(api_key).digest)


def test_only_the_right_secret_matches() -> None:
    api_key, stored = new_key()
    key = VerifiableKey(stored)
    assert key.match([verifier(api_key)], NOW) is Match.CURRENT
    assert key.match([verifier(keys.generate(stored.key_id))], NOW) is None
    assert key.match([verifier_of(b"another pepper", credential_of(api_key).digest)], NOW) is None


def test_the_previous_secret_matches_until_its_end() -> None:
    old_key, old = new_key()
    new, _ = new_key()
    _, stored = new_key(
        verifier=verifier(new), previous_verifier=old.verifier, previous_valid_until=CREATED + timedelta(seconds=10)
    )
    key = VerifiableKey(stored)
    assert key.match([verifier(new)], NOW) is Match.CURRENT
    assert key.match([verifier(old_key)], NOW + 9.999) is Match.PREVIOUS
    assert key.match([verifier(old_key)], NOW + 10) is None


OTHER = b"the-other-pepper-of-an-exchange"


def test_while_the_pepper_is_exchanged_a_secret_matches_under_both() -> None:
    (old_key, _), (new, _) = new_key(), new_key()
    for current, previous in ((PEPPER, OTHER), (OTHER, PEPPER), (OTHER, OTHER)):
        _, stored = new_key(
            verifier=verifier_of(current, credential_of(new).digest),
            previous_verifier=verifier_of(previous, credential_of(old_key).digest),
            previous_valid_until=CREATED + timedelta(seconds=10),
        )
        for peppers in (Peppers(PEPPER, OTHER), Peppers(OTHER, PEPPER)):
            key = VerifiableKey(stored)
            assert key.match(peppers.verifiers(credential_of(new).digest), NOW) is Match.CURRENT
            assert key.match(peppers.verifiers(credential_of(old_key).digest), NOW) is Match.PREVIOUS
            assert key.match(peppers.verifiers(credential_of(old_key).digest), NOW + 10) is None
            assert key.match(peppers.verifiers(credential_of(keys.generate()).digest), NOW) is None
        alone = Peppers(b"neither of the two").verifiers(credential_of(new).digest)
        assert VerifiableKey(stored).match(alone, NOW) is None


def test_a_revoked_key_matches_under_neither_pepper() -> None:
    api_key, stored = new_key(revoked_at=CREATED)
    for peppers in (Peppers(PEPPER, OTHER), Peppers(OTHER, PEPPER)):
        assert VerifiableKey(stored).match(peppers.verifiers(credential_of(api_key).digest), NOW) is None


def test_every_comparison_is_made_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(core, "hmac", SimpleNamespace(compare_digest=compare, digest=hmac.digest))
    peppers = Peppers(OTHER, PEPPER)
    api_key, stored = new_key()
    for presented in (api_key, keys.generate(stored.key_id)):  # as many, whether it is found or not
        compared.clear()
        verifiers = peppers.verifiers(credential_of(presented).digest)
        VerifiableKey(stored).match(verifiers, NOW)
        assert compared == [(verifier, stored.verifier) for verifier in verifiers]


def test_a_secret_is_left_behind_until_it_is_known_to_be_under_the_current_pepper() -> None:
    api_key, stored = new_key()
    peppers = Peppers(OTHER, PEPPER)
    presented = peppers.verifiers(credential_of(api_key).digest)

    def left(match: Match, **changes: object) -> LeftBehind | None:
        return VerifiableKey(replace(stored, **changes)).left_behind(match, presented, peppers.current_id)  # type: ignore[arg-type]

    expected = LeftBehind(stored.key_id, Match.CURRENT, stored.verifier, presented[0], pepper_id(OTHER))
    assert left(Match.CURRENT) == expected
    assert left(Match.CURRENT, pepper_id=None) == expected
    # The id beside it is wrong: what counts is what is stored.
    assert left(Match.CURRENT, pepper_id=pepper_id(OTHER)) == expected
    # Stored under it, and not known to be.
    assert left(Match.CURRENT, verifier=presented[0]) == replace(expected, old=presented[0])
    assert left(Match.CURRENT, verifier=presented[0], pepper_id=pepper_id(OTHER)) is None
    assert left(Match.PREVIOUS, previous_verifier=stored.verifier) == replace(expected, match=Match.PREVIOUS)
    assert left(Match.PREVIOUS, previous_verifier=presented[0], previous_pepper_id=pepper_id(OTHER)) is None


def test_peppers_are_not_shown_and_have_ids_of_their_own() -> None:
    peppers = Peppers(PEPPER, OTHER)
    assert peppers.is_exchanging
    assert not Peppers(PEPPER).is_exchanging
    assert pepper_id(PEPPER) == peppers.current_id != pepper_id(OTHER)
    assert len(peppers.current_id) == 8
    left = LeftBehind("A" * 12, Match.CURRENT, b"old verifier", b"new verifier", peppers.current_id)
    for shown in (repr(peppers), repr(left)):
        for secret in ("pepper-for", "other-pepper", "verifier"):
            assert secret not in shown


def test_an_expired_or_revoked_key_matches_nothing() -> None:
    api_key, stored = new_key(expires_at=CREATED + timedelta(seconds=1))
    assert VerifiableKey(stored).match([verifier(api_key)], NOW + 0.999) is Match.CURRENT
    assert VerifiableKey(stored).match([verifier(api_key)], NOW + 1) is None
    old_key, old = new_key()
    api_key, stored = new_key(
        revoked_at=CREATED, previous_verifier=old.verifier, previous_valid_until=CREATED + timedelta(days=1)
    )
    assert VerifiableKey(stored).match([verifier(api_key)], NOW) is None
    assert VerifiableKey(stored).match([verifier(old_key)], NOW) is None


def test_what_is_stored_is_neither_the_key_nor_its_digest() -> None:
    api_key, stored = new_key()
    digest = credential_of(api_key).digest
    assert stored.verifier not in (api_key.encode(), digest.encode(), bytes.fromhex(digest))
    assert stored.verifier.hex() not in repr(stored)
    assert repr(stored.verifier) not in repr(stored)


def test_times_are_shown_as_they_are_stored() -> None:
    assert core.iso(core.utc(1_800_000_000.123456)) == "2027-01-15T08:00:00.123Z"
    assert core.iso(datetime(2026, 1, 1, 1, tzinfo=UTC)) == "2026-01-01T01:00:00.000Z"


EVENTS = st.builds(
    UsageRecorded,
    key_id=st.sampled_from(["A" * 12, "B" * 12]),
    at_ms=st.integers(1_798_761_600_000 - 200_000_000, 1_798_761_600_000 + 200_000_000),
    requests=st.integers(0, 1000),
    malicious=st.integers(0, 1000),
)


@settings(max_examples=50)
@given(st.lists(EVENTS, max_size=30))
def test_nothing_is_lost_in_adding_up(events: list[UsageRecorded]) -> None:
    batch = core.add_up(events)
    for tallies in (batch.days.values(), batch.totals.values()):
        assert sum(tally.requests for tally in tallies) == sum(event.requests for event in events)
        assert sum(tally.malicious for tally in tallies) == sum(event.malicious for event in events)
    for event in events:
        assert batch.totals[event.key_id].last_ms >= event.at_ms
        assert (event.key_id, datetime.fromtimestamp(event.at_ms / 1000, UTC).date()) in batch.days


def test_a_day_is_a_day_in_utc() -> None:
    midnight = int(datetime(2026, 5, 1, tzinfo=UTC).timestamp() * 1000)
    batch = core.add_up([UsageRecorded(key_id="A" * 12, at_ms=at, requests=1, malicious=0) for at in (midnight - 1, midnight)])
    assert sorted(day.isoformat() for _, day in batch.days) == ["2026-04-30", "2026-05-01"]


def test_events_that_cannot_be_counted() -> None:
    good = UsageRecorded(key_id="A" * 12, at_ms=1_800_000_000_000, requests=1, malicious=0)
    assert core.is_sane(good)
    for bad in (
        {"key_id": "A" * 11 + "\x00"},
        {"key_id": "A" * 13},
        {"at_ms": -1},
        {"at_ms": 10**18},
        {"requests": -1},
        {"malicious": 10**7},
    ):
        fields = {"key_id": good.key_id, "at_ms": good.at_ms, "requests": 1, "malicious": 0, **bad}
        assert not core.is_sane(UsageRecorded(**fields))  # type: ignore[arg-type]  # by name, in tests only


def test_counting_goes_on_where_it_was() -> None:
    stream = StreamState("then", 5, 20)
    assert core.resume(None, stream) == Position("then", 0)
    assert core.resume(Position("then", 12), stream) == Position("then", 12)
    # Re-created: the sequences begin again, and none has been counted.
    assert core.resume(Position("earlier", 12), stream) == Position("then", 0)
    # The server lost its end in a crash: what comes next gets sequences that were counted before.
    assert core.resume(Position("then", 25), stream) == Position("then", 20)


def test_events_that_left_before_they_were_counted_are_noticed() -> None:
    assert core.lost_events(Position("then", 12), StreamState("then", 13, 20)) == 0
    assert core.lost_events(Position("then", 12), StreamState("then", 15, 20)) == 2
    assert core.lost_events(Position("then", 0), StreamState("then", 15, 20)) == 0
