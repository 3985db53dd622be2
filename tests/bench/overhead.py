"""`./run bench overhead`: what the gateway costs, with an engine that answers a constant at once.

The same load, on the same processors, in turn on: the engine itself; the same checks written as one FastAPI application, as one
process and as two; Portcullis with each stage in a process of its own, and with all of them together in one process for each
processor. Closed loops tell the throughput of so many callers; open loops the latency at a given rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

import uvloop

from tests.bench.figures import Spread, ratios
from tests.bench.generator import Work
from tests.bench.load import made
from tests.bench.report import CPU, P50, RATE, Bar, Report, callers_setting, values_of
from tests.bench.systems import DISTINCT_REQUESTS, Served, Stack, System, engine, key_of, loaded, monolith, portcullis
from tests.bench.turns import WARM_UP_SECONDS, Options, closed, in_turn, opened

LEVELS = (1, 8, 32, 128)
BUSY = 32
ENGINE_CALLS = 512
"""At a time: more than there are callers, or some texts would be the fallback's."""
HALF = 0.5
ENGINE, ONE, TWO = "engine alone", "FastAPI, 1 process", "FastAPI, 2 processes"
APART, TOGETHER = "Portcullis", "Portcullis, together"


def engine_environment(url: str) -> dict[str, str]:
    """For a stack that asks the stub engine."""
    return {
        "PORTCULLIS_ENGINE_KIND": "detect",
        "PORTCULLIS_ENGINE_URL": url,
        "PORTCULLIS_ENGINE_MAX_CONCURRENCY": str(ENGINE_CALLS),
    }


def run(options: Options) -> Report:
    with (
        engine() as stub,
        portcullis(engine_environment(stub.url)) as apart,
        portcullis(engine_environment(stub.url), together=True) as together,
        monolith(apart, stub.url, 1) as one,
        monolith(apart, stub.url, 2) as two,
    ):
        return uvloop.run(_measure(options, stub, {APART: apart, TOGETHER: together}, {ONE: one, TWO: two}))


async def _measure(options: Options, stub: Served, stacks: Mapping[str, Stack], monoliths: Mapping[str, Served]) -> Report:
    report = Report("overhead", "Overhead: an engine that answers at once")
    supply = made(DISTINCT_REQUESTS)

    def beside(served: Served) -> dict[str, float]:
        servers = stacks[APART].cpu()  # whose PostgreSQL and Redis they use
        return {"gateway": served.cpu(), "postgres": servers["postgres"], "redis": servers["redis"]}

    async with AsyncExitStack() as entered:
        keys = {name: await entered.enter_async_context(key_of(stack)) for name, stack in stacks.items()}
        systems = [
            await entered.enter_async_context(system)
            for system in (
                loaded(ENGINE, stub.port, lambda: {"engine": stub.cpu()}, supply),
                *(loaded(name, one.port, partial(beside, one), supply, [keys[APART]]) for name, one in monoliths.items()),
                *(loaded(name, stack.port, stack.cpu, supply, [keys[name]]) for name, stack in stacks.items()),
            )
        ]
        levels = options.levels or LEVELS
        for callers in levels:
            work = dict.fromkeys(_names(systems), closed(callers, options.seconds))
            await _add(report, systems, callers_setting(callers), work, options)
        busy = callers_setting(min(levels, key=lambda level: abs(level - BUSY)))
        peaks = {name: report.row(name, busy).spread(RATE).median for name in _names(systems)}
        rate = min(peaks.values()) * HALF
        same = dict.fromkeys(_names(systems), opened(rate, options.seconds))
        await _add(report, systems, f"open, {rate:.0f}/s", same, options)
        # Not of the engine alone, whose peak is the load generator's.
        own = {name: opened(peak * HALF, options.seconds) for name, peak in peaks.items() if name != ENGINE}
        await _add(report, systems[1:], "open, half of its own peak", own, options)
    for name in stacks:
        _judge(report, name, callers_setting(min(levels)), busy)
    return report


def _names(systems: Sequence[System]) -> list[str]:
    return [system.name for system in systems]


async def _add(report: Report, systems: Sequence[System], setting: str, work: Mapping[str, Work], options: Options) -> None:
    found = await in_turn(systems, work, options.repeats, closed(8, WARM_UP_SECONDS))
    for name in _names(systems):
        report.add(name, setting, values_of(found[name]))


def _judge(report: Report, name: str, alone: str, busy: str) -> None:
    """The bars: each round's ratio to the one-process gateway, on the same processors a moment before or after."""

    def against(figure: str, setting: str, other: str) -> Spread:
        mine, its = report.row(name, setting).values[figure], report.row(other, setting).values[figure]
        return Spread.of(ratios(mine, its))

    def own(figure: str, setting: str) -> Spread:
        return report.row(name, setting).spread(figure)

    for other in (ONE, TWO):
        throughput, median = against(RATE, busy, other), against(P50, alone, other)
        report.bars.append(Bar(f"{name}: throughput at {busy}, of that of {other}", throughput, 4.0, at_least=True))
        report.bars.append(Bar(f"{name}: median at {alone}, of that of {other}", median, 0.5, at_least=False))
    report.bars.append(Bar(f"{name}: processor ms of all stages at {busy}", own(CPU, busy), 0.8, at_least=False))
    report.bars.append(Bar(f"{name}: requests/s at {busy}", own(RATE, busy), 1500.0, at_least=True))
    report.bars.append(Bar(f"{name}: median ms at {alone}", own(P50, alone), 2.5, at_least=False))
