"""What people see: standard output for results, standard error for everything else; colour on a terminal only."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from portcullis_client.calls import encode
from portcullis_client.types import Verdict

_WIDE = 200
"""Columns where nobody looks: a file or a pipe gets lines, and tables that are not cut."""

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
err = Console(highlight=False, soft_wrap=True, stderr=True)

_DETAILS = ("reason", "spans", "transforms", "timings")


def say(line: str, style: str = "") -> None:
    """A line for people."""
    err.print(Text(line, style))


def print_json(document: Any) -> None:
    """One line of JSON on standard output."""
    out.file.write(encode(document).decode() + "\n")
    out.file.flush()


def printable(text: str) -> str:
    """A text without what would steer the terminal that it is shown on."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text)


def fields_of(verdict: Verdict, *, detailed: bool) -> dict[str, Any]:
    """A verdict as the gateway writes it."""
    names = [name for name in verdict.__struct_fields__ if detailed or name not in _DETAILS]
    return {name: getattr(verdict, name) for name in names}


def table(*headings: str) -> Table:
    """The first column, which identifies, is never cut."""
    made = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    made.columns[0].no_wrap, made.columns[0].overflow = True, "ignore"
    return made


def facts(rows: list[tuple[str, Any]]) -> Table:
    """Names and values, one pair a line; without those that are None."""
    found = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        if value is not None:
            found.add_row(Text(name, "dim"), Text(shown(value)))
    return found


def shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.3g}"
        case tuple():
            return ", ".join(shown(each) for each in value)
    return printable(str(value))
