"""`./run bench compare A B`: two revisions, pair by pair.

Each is checked out into a git worktree of its own with an environment of its own, and both stacks are up all the time; they are
loaded by turns for some seconds each (A B, B A, A B …) by the load generator of this checkout. What is told is the median of the
pairs' ratios, B over A, and where it lies with 95 % confidence: what else the machine does falls on both of a pair, and does not
look like a difference. An interval that holds 1 tells none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.home import ROOT
from tests.bench import generator
from tests.bench.figures import compared
from tests.bench.load import BenchError
from tests.bench.overhead import engine_environment
from tests.bench.report import CPU, P50, P99, RATE, Report, default_folder, values_of
from tests.bench.systems import engine, portcullis
from tests.bench.turns import side_by_side

FEWEST_PAIRS = 6
"""Below that no interval of 95 % can be had from pairs."""


@contextmanager
def checkout(name: str, folder: Path) -> Iterator[Path]:
    """A worktree of this revision with what it needs to run. Raises `BenchError`."""
    _said("git", "worktree", "add", "--detach", "--quiet", str(folder), name)
    try:
        # Each has its own environment: the lock may differ, and `uv` is what ./run brings.
        _said("uv", "sync", "--frozen", "--quiet", "--all-packages", "--no-dev", folder=folder)
        yield folder
    finally:
        _said("git", "worktree", "remove", "--force", str(folder))


def _said(*command: str, folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(command[:3])}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="./run bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", metavar="A", help="a revision: a commit, a branch, a tag")
    parser.add_argument("second", metavar="B")
    parser.add_argument(
        "--engine", choices=("stub", "model"), default="stub", help="one that answers at once, or the shipped model"
    )
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=12, help=f"at least {FEWEST_PAIRS} for an interval (default: 12)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn (default: 3)")
    chosen = parser.parse_args(arguments)
    generator.raise_file_limit()
    title = f"{chosen.first} (A) and {chosen.second} (B), {chosen.callers} callers, {chosen.engine}"
    report = Report("compare", title, plotted=(RATE, P50, CPU))
    try:
        with ExitStack() as entered:
            folder = Path(entered.enter_context(tempfile.TemporaryDirectory(prefix="pc-compare-")))
            environment = engine_environment(entered.enter_context(engine()).url) if chosen.engine == "stub" else {}
            stacks = {}
            for side, name in (("A", chosen.first), ("B", chosen.second)):
                root = entered.enter_context(checkout(name, folder / side))
                python = str(root / ".venv/bin/python")
                stacks[side] = entered.enter_context(portcullis(environment, root=root, python=python))
            found = uvloop.run(side_by_side(stacks, chosen.callers, chosen.seconds, chosen.pairs))
    except (aiohttp.ClientError, BenchError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 1
    for side, stretches in found.items():
        report.add(side, title, values_of(stretches))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for heading in ("", "A", "B", "B over A, 95 %", ""):
        table.add_column(heading, justify="right")
    for figure in (RATE, P50, P99, CPU):
        a, b = (report.row(side, title) for side in ("A", "B"))
        interval = compared(a.values[figure], b.values[figure])
        report.notes.append(f"{figure}: {interval}")
        known = "differs" if interval.tells else "no difference seen"
        table.add_row(figure, f"{a.spread(figure).median:.2f}", f"{b.spread(figure).median:.2f}", str(interval), known)
    Console(highlight=False).print(table)
    report.save(default_folder())
    return 0
