"""A mistake to be found: it takes three branches, one after the other, to get there, and no seed takes the first."""

from __future__ import annotations

from collections.abc import Iterator


def run(data: bytes) -> None:
    if data[:1] != b"{":
        return
    if data[1:2] != b"!":
        return
    if data[2:3] == b"}":
        raise ValueError("planted")


def seeds() -> Iterator[bytes]:
    yield b"nothing"
