"""The tokens of NATS's auth callout: what a server asks about a client that connects, and what it is answered.

Both are JWTs signed with nkeys (ed25519), in the form that nats-server's jwt/v2 reads and writes; every check that this library
would make of a request is made here. No I/O.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Annotated, Any, Final

import msgspec
import nacl.exceptions
import nacl.signing
import nkeys
from msgspec import Meta

from libs.common.subjects import ACCOUNT, Permissions

AUDIENCE: Final = "nats-authorization-request"
MAX_TOKEN_BYTES: Final = 64 * 1024
ALGORITHM: Final = "ed25519-nkey"
CONNECTION_TYPES: Final = ("STANDARD", "WEBSOCKET")
_KEY_BYTES: Final = 32


class BadTokenError(Exception):
    """It does not come from a NATS server, or not for us, or too late; the text says why, and holds nothing of it."""


class _Header(msgspec.Struct):
    typ: str
    alg: str


class _Server(msgspec.Struct):
    id: str


class _Client(msgspec.Struct):
    id: Annotated[int, Meta(ge=0)]


class _Presented(msgspec.Struct):
    auth_token: str = ""
    password: str = msgspec.field(default="", name="pass")


class _Asked(msgspec.Struct):
    type: str
    server_id: _Server
    user_nkey: str
    client_info: _Client
    connect_opts: _Presented


class _Claims(msgspec.Struct):
    iss: str
    sub: str
    aud: str
    exp: int
    nats: _Asked


class ConnectRequest(msgspec.Struct, frozen=True):
    """A client wants to connect. `user`: the public key that the server has made up for it. `connection`: its number there.

    `secret`: what it presents as its token, or else as its password (without a user, or with any that is not a service's).
    """

    server: str
    connection: int
    user: str
    secret: str

    def __repr__(self) -> str:
        return f"ConnectRequest(server={self.server!r}, connection={self.connection})"


_HEADER = msgspec.json.Decoder(_Header)
_CLAIMS = msgspec.json.Decoder(_Claims)
_encode = msgspec.json.Encoder().encode


class Issuer:
    """Reads requests and signs answers, with the account key whose public part the server's configuration names."""

    def __init__(self, seed: str) -> None:
        """Raises ValueError when `seed` is not that of an account key."""
        try:
            prefix, _ = nkeys.decode_seed(seed.encode())
            if prefix != nkeys.PREFIX_BYTE_ACCOUNT:
                raise ValueError("the seed is not that of an account key (SA…)")
            self._pair = nkeys.from_seed(seed.encode())
            self.public: str = self._pair.public_key.decode()
        except (nkeys.NkeysError, IndexError):
            raise ValueError("this is not the seed of an account key (SA…)") from None

    def read(self, token: bytes, now: float) -> ConnectRequest:
        """What the server asks. `now`: epoch seconds. Raises `BadTokenError`."""
        if len(token) > MAX_TOKEN_BYTES:
            raise BadTokenError("too long")
        parts = token.split(b".")
        if len(parts) != 3:
            raise BadTokenError("not a token")
        try:
            header, claims = _HEADER.decode(_unpadded(parts[0])), _CLAIMS.decode(_unpadded(parts[1]))
            signature = _unpadded(parts[2])
        except (ValueError, RecursionError):  # msgspec's, UnicodeDecodeError and binascii's are ValueErrors
            raise BadTokenError("cannot be read") from None
        if header.typ.upper() != "JWT" or header.alg != ALGORITHM:
            raise BadTokenError("of another kind")
        asked = claims.nats
        try:
            nacl.signing.VerifyKey(_public(claims.iss, nkeys.PREFIX_BYTE_SERVER)).verify(parts[0] + b"." + parts[1], signature)
        except (nacl.exceptions.CryptoError, ValueError):
            raise BadTokenError("not signed by a server") from None
        if claims.iss != asked.server_id.id:
            raise BadTokenError("signed by another server than the one that asks")
        if claims.aud != AUDIENCE or claims.sub != self.public or asked.type != "authorization_request":
            raise BadTokenError("not for us")
        if claims.exp <= now:
            raise BadTokenError("expired")
        try:
            _public(asked.user_nkey, nkeys.PREFIX_BYTE_USER)
        except ValueError:
            raise BadTokenError("without a user") from None
        presented = asked.connect_opts
        return ConnectRequest(
            asked.server_id.id, asked.client_info.id, asked.user_nkey, presented.auth_token or presented.password
        )

    def admit(
        self,
        request: ConnectRequest,
        name: str,
        permissions: Permissions,
        now: float,
        *,
        until: float | None,
    ) -> bytes:
        """The answer that lets the client in, until then (epoch s; None: for as long as it is not ended).

        nats-server does not apply the limits of a user that a callout lets in; those of the server's configuration hold.
        """
        user = {
            "pub": {"allow": permissions.publish},
            "sub": {"allow": permissions.subscribe},
            "subs": -1,
            "data": -1,
            "payload": -1,
            "allowed_connection_types": CONNECTION_TYPES,
            "type": "user",
            "version": 2,
        }
        claims: dict[str, Any] = {"sub": request.user, "aud": ACCOUNT, "name": name, "nats": user}
        if until is not None:
            claims["exp"] = int(until)
        return self._answer(request, now, jwt=self._sign(claims, now).decode())

    def refuse(self, request: ConnectRequest, reason: str, now: float) -> bytes:
        """The answer that does not. `reason`: for the server's log; the client is told nothing but that it is refused."""
        return self._answer(request, now, error=reason)

    def _answer(self, request: ConnectRequest, now: float, **what: str) -> bytes:
        answer = {**what, "type": "authorization_response", "version": 2}
        return self._sign({"sub": request.user, "aud": request.server, "nats": answer}, now)

    def _sign(self, claims: dict[str, Any], now: float) -> bytes:
        whole = {"jti": secrets.token_hex(16), "iat": int(now), "iss": self.public, **claims}
        signed = _without_padding(_encode({"typ": "JWT", "alg": ALGORITHM})) + b"." + _without_padding(_encode(whole))
        return signed + b"." + _without_padding(self._pair.sign(signed))


def _public(text: str, prefix: int) -> bytes:
    """The 32 bytes of a public nkey of this kind. Raises ValueError."""
    raw = base64.b32decode(text.encode("ascii"))
    if len(raw) != 1 + _KEY_BYTES + 2 or raw[0] != prefix:
        raise ValueError("of another kind")
    if nkeys.crc16(bytearray(raw[:-2])) != int.from_bytes(raw[-2:], "little"):
        raise ValueError("mistyped")
    return raw[1:-2]


def _unpadded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _without_padding(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
