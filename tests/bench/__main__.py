"""`./run bench`: how fast Portcullis is, on stacks that it starts for itself, next to what it is measured against.

Parts: `overhead`, `model`, `batch`, and those of `scale`: `replicas`, `length`, `keys`, `sizes`, `connections`; all of them when
none is named. One process makes the load, on the same processors as what it measures; docs/benchmarks.md says how, and what was
found. Besides, each with a --help of its own: `compare A B` measures two revisions pair by pair, `tracing` tells what traces and
metrics cost, `normaliser` times the normaliser alone, `footprint` tells what a detection costs each stage in processor time and
messages, and `scale-out` how much more is done by more workers, with a model that sleeps.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
from rich.console import Console

from tests.bench import batch, compare, footprint, generator, model, normaliser, overhead, scale, scale_out, tracing
from tests.bench.load import BenchError
from tests.bench.report import Report, default_folder
from tests.bench.turns import Options

PARTS: dict[str, Callable[[Options], Report]] = {
    "overhead": overhead.run,
    "model": model.run,
    "batch": batch.run,
    "replicas": scale.replicas,
    "length": scale.length,
    "keys": scale.keyring,
    "sizes": scale.sizes,
    "connections": scale.connections,
}
SCALE = ("replicas", "length", "keys", "sizes", "connections")
LAYOUTS = {"overhead": "stages in processes of their own and together", "replicas": "stages in processes of their own"}
"""Parts that lay out the stages by themselves."""
APART: dict[str, Callable[[list[str]], int]] = {
    "compare": compare.main,
    "tracing": tracing.main,
    "normaliser": normaliser.main,
    "footprint": footprint.main,
    "scale-out": scale_out.main,
}
NARROWEST = 190
"""Columns of a table that can be read; a terminal that has fewer wraps the lines."""


def main(arguments: list[str]) -> int:
    # Whoever is told to stop stops what it has started first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments and (apart := APART.get(arguments[0])) is not None:
        return apart(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="./run bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each stretch of load (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--levels", type=int, nargs="+", default=[], help="callers at a time, for overhead and model")
    parser.add_argument("--together", action="store_true", help="the stages share processes (docs/benchmarks.md)")
    parser.add_argument("--out", type=Path, help="where JSON, PNG and HTML go (default: .portcullis/bench)")
    chosen = parser.parse_args(arguments)
    parts = [name for part in chosen.parts or PARTS for name in (SCALE if part == "scale" else (part,))]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join((*PARTS, 'scale', *APART))}")
    if chosen.together and (of_its_own := [part for part in parts if part in LAYOUTS]):
        part = of_its_own[0]
        parser.error(f"{part} measures {LAYOUTS[part]}: leave --together out, or name other parts")
    options = Options(chosen.seconds, chosen.repeats, tuple(chosen.levels), chosen.together)
    generator.raise_file_limit()
    console = Console(highlight=False, width=max(NARROWEST, Console().width))
    failed = False
    for part in parts:
        try:
            report = PARTS[part](options)
        except (aiohttp.ClientError, BenchError) as error:
            print(f"bench {part}: {error}", file=sys.stderr)
            failed = True
            continue
        if chosen.together:
            report.part += "-together"
            report.title += "; the stages together"
        report.show(console)
        written = report.save(chosen.out or default_folder())
        console.print(f"written: {', '.join(os.path.relpath(path) for path in written)}", soft_wrap=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
