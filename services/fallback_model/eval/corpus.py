"""Labelled texts, from .jsonl and .jsonl.zst files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import zstandard

NOISY = frozenset({"mosscap", "neuralchemy", "wildguardmix"})
"""Sources in which many labels are wrong."""


@dataclass(frozen=True)
class Row:
    """`label` 1: malicious. `threat` is None for a benign text or where it is not known."""

    text: str
    label: int
    source: str = ""
    threat: str | None = None
    lang: str = ""


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError, naming the line, for a file that does not hold one JSON object with text and label a line."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(raw).read()
    rows = []
    # Not splitlines(): texts hold Unicode's own line separators, which JSON leaves as they are.
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(
                Row(row["text"], int(row.get("label", 0)), row.get("source") or "", row.get("threat"), row.get("lang") or "")
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
    return rows


def find_sets(path: Path) -> dict[str, list[Row]]:
    """Name → rows: the one file, or all files below a directory but the training set, which says nothing."""
    if path.is_file():
        return {_name(path): read_rows(path)}
    files = sorted(file for file in path.rglob("*") if file.name.endswith((".jsonl", ".jsonl.zst")))
    return {_name(file): read_rows(file) for file in files if _name(file) != "train"}


def _name(path: Path) -> str:
    return path.name.removesuffix(".zst").removesuffix(".jsonl")
