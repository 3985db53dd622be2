"""The form of an API key: `pc_live_<id>_<secret><checksum>`.

`id` (12 characters, public) finds the record, `secret` (32 characters, 190 random bits) proves it, `checksum` (6 characters,
CRC-32 over everything before it) refuses a mistyped key without a look-up and lets secret scanners recognise a key for certain;
the same form as GitHub's tokens (github.blog, "Behind GitHub's new authentication token formats", 2021).
All characters are base 62.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass, field

PREFIX = "pc_live_"
ID_LENGTH = 12
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PATTERN = re.compile(
    rf"{PREFIX}([0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH}}}([0-9A-Za-z]{{{CHECKSUM_LENGTH}}})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: its public id and the SHA-256 of the whole key in hex. Neither its repr nor its fields hold the key."""

    key_id: str
    digest: str = field(repr=False)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    value = zlib.crc32(body.encode("ascii"))
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        value, digit = divmod(value, 62)
        digits = _ALPHABET[digit] + digits
    return digits


def new_key_id() -> str:
    return _random(ID_LENGTH)


def generate(key_id: str | None = None) -> str:
    """A new key; with `key_id`, a new secret for an existing record."""
    body = f"{PREFIX}{key_id or new_key_id()}_{_random(SECRET_LENGTH)}"
    return body + _checksum(body)


def parse(key: str) -> ParsedKey | None:
    """The parts of a well-formed key whose checksum is right; None for anything else."""
    match = _PATTERN.fullmatch(key)
    if match is None or _checksum(key[:-CHECKSUM_LENGTH]) != match.group(2):
        return None
    return ParsedKey(key_id=match.group(1), digest=digest(key))


def digest(secret: str) -> str:
    """SHA-256 in hex: the form in which a key or an admin token crosses the bus."""
    return hashlib.sha256(secret.encode()).hexdigest()
