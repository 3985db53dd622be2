"""Reads the logs of all processes as one: sorted by time, a name before each line, JSON lines made readable."""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

_POLL_SECONDS = 0.2
_TAIL_BYTES = 200_000

# What the servers put before their lines: NATS, Redis, PostgreSQL; and our own JSON, supervisor.
_STAMPS = (
    (re.compile(r"(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+)"), "%Y/%m/%d %H:%M:%S.%f"),
    (re.compile(r"(\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d+)"), "%d %b %Y %H:%M:%S.%f"),
    (re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.,]\d+)"), "%Y-%m-%d %H:%M:%S.%f"),
)


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """`when`: epoch seconds; a line without a time of its own takes that of the line before."""

    when: float
    source: str = field(compare=False)
    text: str = field(compare=False)


def read_line(source: str, text: str, before: float) -> Line:
    """One line of a log; `before`: the time of the one above it."""
    if text.startswith("{"):
        try:
            entry = json.loads(text)
            when = datetime.fromisoformat(entry["time"]).timestamp()
            shown = f"{entry['level']:<7} {entry['message']}"
        except (ValueError, KeyError, TypeError):
            return Line(before, source, text)
        extra = f"  [{entry['request_id']}]" if "request_id" in entry else ""
        trace = f"\n{entry['exception']}" if "exception" in entry else ""
        return Line(when, source, shown + extra + trace)
    for pattern, form in _STAMPS:
        found = pattern.search(text[:60])
        if found:
            stamp = datetime.strptime(found.group(1).replace(",", "."), form)
            zone = UTC if "UTC" in text[:60] else None  # PostgreSQL names its zone, the others write local time
            return Line(stamp.replace(tzinfo=zone).timestamp(), source, text)
    return Line(before, source, text)


def tail(paths: list[Path], lines: int) -> list[Line]:
    """The last `lines` lines of all these logs together, in the order of time."""
    return list(heapq.merge(*(_file_tail(path, lines) for path in paths)))[-lines:]


def _file_tail(path: Path, lines: int) -> list[Line]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        texts = file.read().decode(errors="replace").splitlines()[-lines:]
    found: list[Line] = []
    for text in texts:
        found.append(read_line(path.stem, text, found[-1].when if found else 0.0))
    return sorted(found)


def follow(folder: Path, pattern: str, wait: Callable[[], None] = lambda: time.sleep(_POLL_SECONDS)) -> Iterator[Line]:
    """New lines of the logs in `folder` that match, as they come, for ever; follows rotation and new files.

    `wait` is called when there is nothing new.
    """
    opened: dict[Path, IO[str]] = {}
    for path in folder.glob(pattern):
        opened[path] = path.open(errors="replace")
        opened[path].seek(0, 2)
    while True:
        quiet = True
        for path in sorted(folder.glob(pattern)):
            file = opened.get(path)
            if file is None:
                file = opened[path] = path.open(errors="replace")
            while True:
                position = file.tell()
                text = file.readline()
                if not text.endswith("\n"):  # nothing, or a line that is still being written
                    file.seek(position)
                    break
                quiet = False
                yield read_line(path.stem, text.rstrip("\n"), time.time())
            if path.exists() and path.stat().st_ino != _inode(file):
                file.close()
                opened[path] = path.open(errors="replace")
                quiet = False
        if quiet:
            wait()


def _inode(file: IO[str]) -> int:
    return os.fstat(file.fileno()).st_ino
