"""`./run bench model`: the shipped model on a mix of lengths, next to onnxruntime alone and to LitServe with the same model.

onnxruntime alone is the limit: the same texts, prepared beforehand, on as many threads as there are processors, and no load
generator beside it, in batches or text by text, whichever is faster; for each round what it did before and after it. Whatever
is not measured is stopped meanwhile: LitServe uses a quarter of a processor while it waits. It serves the same file with its
batching on, one worker of one thread for each processor, with the same normaliser, tokenizer and windows; it checks no key and
no limit. It is installed into an environment of its own when it is missing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import uvloop

from infra.embedded.home import ROOT, free_port, locate_home
from services.fallback_model import processors
from tests.bench.alone import Alone, by_tokens
from tests.bench.figures import Spread, ratios
from tests.bench.load import BenchError, made
from tests.bench.report import P99, RATE, Bar, Report, callers_setting, values_of
from tests.bench.systems import Served, Stack, key_of, loaded, portcullis, server
from tests.bench.turns import Options, closed, in_turn, opened

LEVELS = (1, 8, 32)
DISTINCT_TEXTS = 300
"""Ten rounds of the mix of lengths."""
WARM_UP_SECONDS = 1.0
SHARE_OF_PEAK = 0.6
LIT_BATCH, LIT_WAIT_SECONDS = 16, 0.005
"""LitServe's `max_batch_size` and `batch_timeout`."""
ALONE, ALONE_EACH, LITSERVE, PORTCULLIS = "onnxruntime alone, batches", "onnxruntime alone, by text", "LitServe", "Portcullis"
REQUIREMENTS = Path(__file__).with_name("litserve.txt")


def run(options: Options) -> Report:
    with portcullis({}, together=options.together) as stack, litserve() as other:
        return uvloop.run(_measure(options, stack, other))


@contextmanager
def litserve() -> Iterator[Served]:
    """LitServe with the shipped model. Raises `BenchError` when it cannot be had."""
    port, workers = free_port(), processors.usable()
    command = [_environment(), "-m", "tests.bench.lit", *map(str, (port, workers, LIT_BATCH, LIT_WAIT_SECONDS))]
    with server("LitServe", command, port, {"PYTHONPATH": str(ROOT)}) as process:
        yield Served(port, process.pid)


def _environment() -> str:
    """The interpreter of the environment with LitServe, which is made when it is missing or out of date."""
    uv = shutil.which("uv")
    if uv is None:
        raise BenchError("uv is missing; start this with ./run bench model")
    folder = locate_home(dict(os.environ)).path / "venvs/litserve"
    python = str(folder / "bin/python")
    exported = [uv, "export", "--frozen", "--quiet", "--no-hashes", "--no-header", "--no-emit-workspace"]
    wanted = _said([*exported, "--package", "portcullis-fallback-model"]) + REQUIREMENTS.read_text()
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        _said([uv, "venv", "--quiet", "--clear", str(folder)])
        _said([uv, "pip", "install", "--quiet", "--python", python, "--requirement", "-"], wanted)
        installed.write_text(wanted)
    return python


def _said(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"LitServe could not be installed: {done.stderr.strip()[-300:]}")
    return done.stdout


async def _measure(options: Options, stack: Stack, other: Served) -> Report:
    report = Report("model", "The shipped model, short and long texts")
    supply = made(DISTINCT_TEXTS)
    alone = await asyncio.to_thread(Alone)
    rows, each = alone.rows(supply), alone.each(supply)
    tokens = alone.best_tokens(rows)
    report.notes.append(
        f"{len(supply)} texts, {len(rows)} windows, {sum(map(len, rows)) / len(supply):.0f} tokens a text; "
        f"onnxruntime alone in batches of {tokens} tokens, sorted by length"
    )
    limits: dict[str, list[float]] = {ALONE: [], ALONE_EACH: []}

    async def measure_alone() -> None:
        for name, batches in ((ALONE, by_tokens(rows, tokens)), (ALONE_EACH, each)):
            limits[name].append(len(supply) / await asyncio.to_thread(alone.seconds, batches))

    async with (
        key_of(stack) as key,
        loaded(LITSERVE, other.port, lambda: {"LitServe": other.cpu()}, supply, path="/predict", pids=lambda: [other.pid]) as lit,
        loaded(PORTCULLIS, stack.port, stack.cpu, supply, [key], pids=stack.pids) as ours,
    ):
        systems = [lit, ours]
        levels = options.levels or LEVELS
        for callers in levels:
            setting = callers_setting(callers)
            for values in limits.values():
                values.clear()
            work = dict.fromkeys((LITSERVE, PORTCULLIS), closed(callers, options.seconds))
            found = await in_turn(systems, work, options.repeats, closed(callers, WARM_UP_SECONDS), measure_alone)
            for name, values in limits.items():
                report.add(name, setting, {RATE: [statistics.mean(pair) for pair in pairwise(values)]})
            for name, stretches in found.items():
                report.add(name, setting, values_of(stretches))
        busy = callers_setting(max(levels))
        peak = min(report.row(system.name, busy).spread(RATE).median for system in systems)
        rate = peak * SHARE_OF_PEAK
        calm = f"open, {rate:.0f}/s"
        work = dict.fromkeys((LITSERVE, PORTCULLIS), opened(rate, options.seconds))
        found = await in_turn(systems, work, options.repeats, closed(4, WARM_UP_SECONDS))
        for name, stretches in found.items():
            report.add(name, calm, values_of(stretches))
    alone.close()
    _judge(report, busy, calm)
    return report


def _judge(report: Report, busy: str, calm: str) -> None:
    mine, its = report.row(PORTCULLIS, busy).values, report.row(LITSERVE, busy).values
    limit = max((report.row(name, busy) for name in (ALONE, ALONE_EACH)), key=lambda row: row.spread(RATE).median).values[RATE]
    report.bars += [
        Bar(f"throughput at {busy}, of onnxruntime alone", Spread.of(ratios(mine[RATE], limit)), 0.75, at_least=True),
        Bar(f"throughput at {busy}, of LitServe's", Spread.of(ratios(mine[RATE], its[RATE])), 1.0, at_least=True),
        Bar(f"p99 at {busy}, of LitServe's", Spread.of(ratios(mine[P99], its[P99])), 1.0, at_least=False),
        Bar(
            f"p99, {calm}, of LitServe's",
            Spread.of(ratios(report.row(PORTCULLIS, calm).values[P99], report.row(LITSERVE, calm).values[P99])),
            1.0,
            at_least=False,
        ),
    ]
