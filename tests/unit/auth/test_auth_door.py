"""The door's rules: which requests of the auth callout are read, what is answered, and which connections are ended."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from typing import Any

import nacl.signing
import nkeys
import pytest

from libs.common import keys, subjects
from libs.common.clock import SystemClock
from libs.common.errors import ErrorCode
from services.auth.cache import Authenticator, KeyCache
from services.auth.core import StoredKey, utc
from services.auth.door import Connection, ConnectionsUnavailableError, Door
from services.auth.tokens import BadTokenError, ConnectRequest, Issuer
from tests.unit.auth.fakes import PEPPERS, MemoryKeys, new_key

SEED = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT).decode()
PAIR, STRANGER = nacl.signing.SigningKey.generate(), nacl.signing.SigningKey.generate()


def nkey(prefix: int, pair: nacl.signing.SigningKey) -> str:
    raw = bytearray([prefix]) + bytes(pair.verify_key)
    return base64.b32encode(raw + nkeys.crc16(raw).to_bytes(2, "little")).decode()


SERVER, USER = nkey(nkeys.PREFIX_BYTE_SERVER, PAIR), nkey(nkeys.PREFIX_BYTE_USER, STRANGER)
ISSUER = Issuer(SEED)


def token(claims: dict[str, Any], pair: nacl.signing.SigningKey = PAIR, alg: str = "ed25519-nkey") -> bytes:
    def part(raw: bytes) -> bytes:
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    signed = part(json.dumps({"typ": "JWT", "alg": alg}).encode()) + b"." + part(json.dumps(claims).encode())
    return signed + b"." + part(pair.sign(signed).signature)


def claims(secret: str = "", number: int = 7, *, inner: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    asked = {
        "type": "authorization_request",
        "version": 2,
        "server_id": {"id": SERVER, "name": "s", "host": "h"},
        "user_nkey": USER,
        "client_info": {"id": number},
        "connect_opts": {"auth_token": secret, "protocol": 1},
        **(inner or {}),
    }
    whole = {"iss": SERVER, "sub": ISSUER.public, "aud": "nats-authorization-request", "exp": int(time.time()) + 60}
    return {**whole, **changes, "nats": asked}


def opened(answer: bytes | str | None) -> dict[str, Any]:
    """The claims of a token that our issuer has signed."""
    assert answer is not None
    text = answer.encode() if isinstance(answer, str) else answer
    signed, _, signature = text.rpartition(b".")
    assert nkeys.from_seed(SEED.encode()).verify(signed, base64.urlsafe_b64decode(signature + b"=="))
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text.split(b".")[1] + b"=="))
    assert found["iss"] == ISSUER.public
    return found


class Servers:
    """`Connections`, in memory. `away`: nobody answers."""

    def __init__(self) -> None:
        self.open: dict[Connection, str] = {}
        self.ended: list[Connection] = []
        self.away = False

    async def of(self, key_id: str) -> set[Connection]:
        await self._ask()
        return {connection for connection, whose in self.open.items() if whose == key_id}

    async def key_ids(self) -> set[str]:
        await self._ask()
        return set(self.open.values())

    async def end(self, connection: Connection) -> None:
        await self._ask()
        self.open.pop(connection, None)
        self.ended.append(connection)

    async def _ask(self) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise ConnectionsUnavailableError("away")


def make_door(*stored: StoredKey, most: int = 2) -> tuple[Door, Servers, MemoryKeys]:
    store, servers, clock = MemoryKeys(*stored), Servers(), SystemClock()
    cache = KeyCache(store.find, clock, ttl_seconds=10, entries=100, is_up=lambda: True)
    return Door(ISSUER, Authenticator(cache, clock, PEPPERS), servers, clock, most_connections=most), servers, store


GOOD = token(claims("secret"))
_HEADER, _BODY, _SIGNATURE = GOOD.split(b".")
HOSTILE = {
    "empty": b"",
    "json": b"{}",
    "bytes": b"\xff\xfe\x00",
    "no base64": b"a.b.c",
    "no parts": b"..",
    "a part more": GOOD + b".x",
    "cut off": GOOD[:-2],
    "unsigned": b".".join([_HEADER, _BODY, b""]),
    "wrongly signed": b".".join([_HEADER, _BODY, _SIGNATURE[::-1]]),
    "huge": b"x" * 1_000_000,
    "nested": b".".join([_HEADER, base64.urlsafe_b64encode(b"[" * 30_000).rstrip(b"="), _SIGNATURE]),
    "no algorithm": token(claims(), alg="none"),
    "signed by somebody else": token(claims(), STRANGER),
    "for another server": token(claims(iss=nkey(nkeys.PREFIX_BYTE_SERVER, STRANGER)), STRANGER),
    "by an account": token(claims(iss=nkey(nkeys.PREFIX_BYTE_ACCOUNT, PAIR))),
    "by nobody": token(claims(iss="ä")),
    "to somebody else": token(claims(sub=SERVER)),
    "for something else": token(claims(aud="something-else")),
    "late": token(claims(exp=int(time.time()) - 1)),
    "without an end": token({name: value for name, value in claims().items() if name != "exp"}),
    "another kind": token(claims(inner={"type": "user"})),
    "a server as the user": token(claims(inner={"user_nkey": SERVER})),
    "a mistyped user": token(claims(inner={"user_nkey": USER[:5] + ("A" if USER[5] != "A" else "B") + USER[6:]})),
    "a negative connection": token(claims(inner={"client_info": {"id": -1}})),
    "wrong options": token(claims(inner={"connect_opts": [1]})),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_request_that_is_not_a_servers_to_us_is_not_answered(hostile: bytes) -> None:
    with pytest.raises(BadTokenError):
        ISSUER.read(hostile, time.time())
    door, _, _ = make_door()
    assert await door.answer(hostile) is None


def test_a_request_is_read_and_shows_no_secret() -> None:
    request = ISSUER.read(token(claims("secret")), time.time())
    assert request == ConnectRequest(SERVER, 7, USER, "secret")
    assert "secret" not in repr(request)
    password = ISSUER.read(token(claims(inner={"connect_opts": {"user": "x", "pass": "word"}})), time.time())
    assert password.secret == "word"


@pytest.mark.parametrize("seed", ["", "SA", "nonsense", nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()])
def test_only_the_seed_of_an_account_signs(seed: str) -> None:
    with pytest.raises(ValueError, match="account key"):
        Issuer(seed)


async def test_a_valid_key_gets_its_own_subjects_until_its_end() -> None:
    api_key, stored = new_key(expires_at=utc(time.time() + 1000))
    door, _, _ = make_door(stored)
    answer = await door.answer(token(claims(api_key)))
    assert answer is not None
    assert api_key.encode() not in answer
    outer = opened(answer)
    assert (outer["sub"], outer["aud"]) == (USER, SERVER)
    user = opened(outer["nats"]["jwt"])
    allowed = subjects.door_permissions(stored.key_id)
    assert user["nats"]["pub"] == {"allow": list(allowed.publish)}
    assert user["nats"]["sub"] == {"allow": list(allowed.subscribe)}
    assert (user["sub"], user["aud"], user["name"]) == (USER, subjects.ACCOUNT, f"key:{stored.key_id}")
    assert stored.expires_at is not None
    assert user["exp"] == int(stored.expires_at.timestamp())


async def test_refusals_say_why_to_the_server_alone() -> None:
    good, stored = new_key()
    revoked, gone = new_key(revoked_at=utc(time.time() - 1))
    detect_only, narrow = new_key(scopes=("detect",))
    door, servers, store = make_door(stored, gone, narrow)
    for secret, code in (
        ("", ErrorCode.INVALID_CREDENTIALS),
        (keys.generate(), ErrorCode.INVALID_CREDENTIALS),
        (keys.generate(stored.key_id), ErrorCode.INVALID_CREDENTIALS),
        (revoked, ErrorCode.INVALID_CREDENTIALS),
        (detect_only, ErrorCode.FORBIDDEN),
    ):
        answered = opened(await door.answer(token(claims(secret))))["nats"]
        assert (answered.get("error"), "jwt" in answered) == (code, False)
    servers.away = True
    assert opened(await door.answer(token(claims(good))))["nats"]["error"] == ErrorCode.STAGE_UNAVAILABLE
    store.away, servers.away = True, False
    assert opened(await door.answer(token(claims(keys.generate()))))["nats"]["error"] == ErrorCode.STAGE_UNAVAILABLE


async def test_no_more_connections_than_a_key_may_have_even_at_once() -> None:
    api_key, stored = new_key()
    door, _, _ = make_door(stored, most=2)
    answers = await asyncio.gather(*(door.answer(token(claims(api_key, number))) for number in range(5)))
    admitted = [opened(answer)["nats"] for answer in answers]
    assert sum("jwt" in each for each in admitted) == 2
    assert {each["error"] for each in admitted if "error" in each} == {ErrorCode.OVERLOADED}
    other, its = new_key()
    door, servers, _ = make_door(its, most=2)
    servers.open = {Connection(SERVER, number): "somebody-else" for number in range(5)}
    servers.open[Connection(SERVER, 8)] = its.key_id
    assert "jwt" in opened(await door.answer(token(claims(other, 9))))["nats"]
    assert opened(await door.answer(token(claims(other, 10))))["nats"]["error"] == ErrorCode.OVERLOADED


async def test_a_change_ends_what_is_listed_and_what_was_let_in_a_moment_ago() -> None:
    api_key, stored = new_key()
    door, servers, _ = make_door(stored)
    listed, others = Connection(SERVER, 1), Connection(SERVER, 2)
    servers.open = {listed: stored.key_id, others: "somebody-else"}
    await door.answer(token(claims(api_key, 3)))  # the server has not listed it yet
    servers.away = True
    running = asyncio.create_task(door.run())
    try:
        door.end(stored.key_id)
        await asyncio.sleep(0.05)
        assert servers.ended == []
        servers.away = False  # … and it is done again
        async with asyncio.timeout(5):
            while len(servers.ended) < 2:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    assert set(servers.ended) == {listed, Connection(SERVER, 3)}
    assert set(servers.open) == {others}


async def test_the_sweep_ends_connections_of_keys_that_are_no_longer_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.auth.door.SWEEP_SECONDS", 0.05)
    _, good = new_key()
    _, bad = new_key(revoked_at=utc(time.time() - 1))
    _, narrow = new_key(scopes=("detect",))
    door, servers, _ = make_door(good, bad, narrow)
    servers.open = {Connection(SERVER, n): key.key_id for n, key in enumerate((good, bad, narrow))}
    servers.open[Connection(SERVER, 3)] = keys.new_key_id()  # no such key
    running = asyncio.create_task(door.run())
    try:
        async with asyncio.timeout(5):
            while len(servers.open) > 1:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    assert list(servers.open.values()) == [good.key_id]
