"""`./run bench normaliser`: how long the normaliser takes for 100 000 characters of texts that are hard on it.

Processor time of this process, the best of several runs, after the tables have been built; what comes after the normaliser
(the tokenizer, which is not ours, and the cutting into windows) is timed apart, and counts every view that the normaliser made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from services.fallback_model import characters
from services.fallback_model.engine import load_tokenizer, read_card
from services.fallback_model.lexicon import Lexicon
from services.fallback_model.normalise import normalise
from services.fallback_model.paths import DEFAULT_MODEL
from services.fallback_model.windows import Windower
from tests.bench import patterns

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of processor time for one text, and what became of it."""

    name: str
    normalise: float
    tokenise: float
    cut: float
    views: int
    windows: int
    complete: bool


def best(work: Callable[[], T], runs: int) -> tuple[T, float]:
    """What the work returns, and the milliseconds of its fastest run."""
    spent = []
    for _ in range(runs):
        began = time.process_time()
        result = work()
        spent.append((time.process_time() - began) * 1000)
    return result, min(spent)


def measure(name: str, size: int, runs: int, lexicon: Lexicon, windower: Windower) -> Timed:
    text = patterns.pattern(name, size)
    normalised, first = best(lambda: normalise(text, lexicon, spelt=True), runs)
    encoded, second = best(lambda: [windower.ids(view.text) for view in normalised.views], 1)
    windows, third = best(lambda: [window for ids in encoded for window in windower.cut(ids)], runs)
    return Timed(name, first, second, third, len(normalised.views), len(windows), normalised.complete)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run bench normaliser", description=__doc__)
    parser.add_argument("--size", type=int, default=100_000, help="characters of a text (default: 100 000)")
    parser.add_argument("--runs", type=int, default=5, help="of which the fastest counts (default: 5)")
    parser.add_argument("--only", default="", help="only patterns with this in their names")
    chosen = parser.parse_args(arguments)
    card = read_card(DEFAULT_MODEL)
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    lexicon = Lexicon.of_vocabulary(tokenizer.get_vocab())
    windower = Windower(tokenizer, card.max_tokens, card.overlap)
    characters.warm()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{chosen.size} characters, milliseconds of processor time")
    table.add_column("text", no_wrap=True)
    for title in ("normalise", "tokenizer", "windowing", "views", "windows", "complete"):
        table.add_column(title, justify="right")
    slowest = 0.0
    for name in patterns.NAMES:
        if chosen.only in name:
            one = measure(name, chosen.size, chosen.runs, lexicon, windower)
            slowest = max(slowest, one.normalise)
            times = (f"{milliseconds:.1f}" for milliseconds in (one.normalise, one.tokenise, one.cut))
            table.add_row(one.name, *times, str(one.views), str(one.windows), "yes" if one.complete else "no")
    console = Console(highlight=False, width=max(100, Console().width))
    console.print(table)
    console.print(f"slowest: {slowest:.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
