"""Who may look. There is no cookie: a page of somebody else's cannot make a browser show what it may not see."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final, Literal

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_FOREIGN: Final = frozenset({"cross-site", "same-site"})

Verdict = Literal["welcome", "token", "never"]
"""`token`: the admin token is needed, or was wrong. `never`: not from here, or there is no token that could be known."""


class Guard:
    """`is_open`: whoever comes under a loopback name needs no token."""

    def __init__(self, token: str | None, *, is_open: bool) -> None:
        self._digest = _digest(token) if token is not None else None
        self.is_open = is_open

    def host_is_fine(self, headers: Mapping[str, str]) -> bool:
        """An open console answers to loopback names alone: any name in DNS may point to 127.0.0.1 (rebinding)."""
        return not self.is_open or _name(headers.get("host", "")) in LOOPBACK_NAMES

    def judge(self, headers: Mapping[str, str]) -> Verdict:
        """May whoever sends these headers look?"""
        if headers.get("sec-fetch-site") in _FOREIGN:
            return "never"
        # What a proxy has passed on comes from elsewhere, whatever name it gives this machine.
        if self.is_open and self.host_is_fine(headers) and not any(name in headers for name in _FORWARDED):
            return "welcome"
        if self._digest is None:
            return "never"
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self._digest)
        return "welcome" if right else "token"


def _digest(token: str) -> bytes:
    # Digests have one length, so that the time of the comparison tells nothing.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    host = host.lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
