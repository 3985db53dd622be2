"""The results of a scan, one line each: at the same time the record of what has been done, by which it is taken up again."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from portcullis_client.calls import encode
from portcullis_client.cli.session import Complaint
from portcullis_client.cli.sources import Row

_AGAIN = frozenset(
    {"rate_limited", "overloaded", "stage_unavailable", "no_engine", "internal", "deadline_exceeded", "connection_failed"}
)
"""Errors that may pass: such a row is asked about again when the scan is taken up."""


def digest(text: str | None) -> str:
    """What tells a row's text from another one's."""
    return hashlib.sha256((text or "").encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Error(msgspec.Struct, frozen=True):
    code: str


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """What of a line is needed here; there is more in it."""

    row: int
    text_sha256: str
    is_malicious: bool | None = None
    threat_types: tuple[str, ...] = ()
    threshold: float | None = None
    error: _Error | None = None


_LINE = msgspec.json.Decoder(_Line)


@dataclass(slots=True)
class Tally:
    """What is in the results so far."""

    malicious: int = 0
    benign: int = 0
    failed: int = 0
    threats: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.malicious + self.benign + self.failed

    def count(self, line: _Line) -> None:
        if line.error is not None:
            self.failed += 1
            self.errors[line.error.code] += 1
        elif line.is_malicious:
            self.malicious += 1
            self.threats.update(line.threat_types)
        else:
            self.benign += 1


class Journal:
    """Results in `path`, or on `stream`, where nothing is taken up. `tally` counts them all."""

    def __init__(self, path: Path | None, threshold: float | None, stream: IO[bytes] | None = None) -> None:
        """Raises `Complaint` when there is something at `path` that is not the results of this scan."""
        self.tally = Tally()
        self._path = path
        self._threshold = threshold
        self._done: dict[int, str] = {}
        if path is not None:
            if path.exists():
                self._load(path)
            self._file: IO[bytes] = path.open("ab")
        elif stream is not None:
            self._file = stream
        else:
            raise ValueError("neither path nor stream")

    @property
    def resumed(self) -> int:
        """Rows that were done before."""
        return len(self._done)

    def is_done(self, row: Row) -> bool:
        """Whether a row has its result. Raises `Complaint` when that was for another text."""
        known = self._done.get(row.number)
        if known is None:
            return False
        if known != digest(row.text):
            raise Complaint(
                f"{self._path} has the results of other texts (row {row.number} differs): choose another file with -o"
            )
        return True

    def write(self, row: Row, fields: dict[str, Any]) -> None:
        """The line of a row, at once: what is interrupted later is not lost."""
        document = {"row": row.number, "id": row.id, **fields, "text_sha256": digest(row.text)}
        if self._threshold is not None:
            document["threshold"] = self._threshold
        line = encode(document)
        self._file.write(line + b"\n")
        self._file.flush()
        self.tally.count(_LINE.decode(line))

    def close(self) -> None:
        if self._path is not None:
            self._file.close()

    def _load(self, path: Path) -> None:
        """Takes in what is done. A last line that was interrupted, and errors that may pass, are dropped from the file."""
        kept = path.with_name(path.name + ".tmp")
        dropped = False
        with path.open("rb") as old, kept.open("wb") as new:
            for number, raw in enumerate(old, 1):
                if not raw.endswith(b"\n"):
                    dropped = True
                    break
                try:
                    line = _LINE.decode(raw)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    kept.unlink()
                    raise Complaint(f"{path} is no results file (line {number}): choose another file with -o") from None
                if line.threshold != self._threshold:
                    kept.unlink()
                    raise Complaint(f"{path} was made with another --threshold: choose another file with -o")
                if (line.error is not None and line.error.code in _AGAIN) or line.row in self._done:
                    dropped = True
                    continue
                self._done[line.row] = line.text_sha256
                self.tally.count(line)
                new.write(raw)
            new.flush()
            os.fsync(new.fileno())
        if dropped:
            kept.replace(path)
        else:
            kept.unlink()
