"""NDJSON in pieces."""

from __future__ import annotations


class Lines:
    """Cuts pieces into lines at newlines alone: U+2028 and its like, at which `str.splitlines` cuts, may be in a string."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes, without those that are blank."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line for line in lines if line and not line.isspace()]
