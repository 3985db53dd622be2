"""What a part of the benchmark says: tables, bars, JSON, plots; and the turns in which it measures."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
from rich.console import Console

from services.auth.core import is_key_id
from tests.bench.alone import by_tokens
from tests.bench.figures import Spread, Stretch
from tests.bench.generator import Load, Run
from tests.bench.report import CPU, FAILED, RATE, Bar, Report, values_of
from tests.bench.scale import _key_id, prose
from tests.bench.systems import System
from tests.bench.turns import in_turn
from tests.conftest import wait_until


def stretch(rate: float, **cpu: float) -> Stretch:
    return Stretch(rate, 1.0, 2.0, 3.0, answered=10, failed=1, degraded=2, late=0.0, generator=0.05, cpu=cpu)


def report() -> Report:
    made = Report("part", "Title")
    made.add("Portcullis", "32 callers", values_of([stretch(200, edge=0.5, auth=0.25), stretch(100, edge=0.7, auth=0.25)]))
    made.add("engine alone", "32 callers", {RATE: [5000.0]})
    made.bars.append(Bar("throughput", Spread(2.0, 1.0, 4.0), 4.0, at_least=True))
    made.bars.append(Bar("time", Spread(2.0, 1.0, 4.0), 4.0, at_least=False))
    return made


def test_values_are_by_repeat_and_what_was_not_judged_as_meant_counts_as_failed() -> None:
    values = report().row("Portcullis", "32 callers").values
    assert values[RATE] == [200, 100]
    assert values[CPU] == pytest.approx([0.75, 0.95])
    assert values[FAILED] == [3, 3]
    assert values["CPU ms, edge"] == [0.5, 0.7]


def test_a_bar_is_met_by_the_median() -> None:
    assert [bar.met for bar in report().bars] == [False, True]


def test_the_tables_show_medians_with_both_ends_and_each_stage() -> None:
    said = io.StringIO()
    report().show(Console(file=said, width=200))
    text = said.getvalue()
    assert "150 (100–200)" in text
    assert "throughput: 2.00 (1.00 to 4.00), should be ≥ 4: not met" in text
    assert "time: 2.00 (1.00 to 4.00), should be ≤ 4: met" in text
    stages = text[text.index("processor time by stage") :]
    assert "edge" in stages
    assert "engine alone" not in stages  # of which no stage is known


def test_json_has_every_value_and_the_plot_is_written_twice(tmp_path: Path) -> None:
    written = report().save(tmp_path)
    assert {path.name for path in written} == {"part.json", "part.png", "part.html"}
    document = json.loads((tmp_path / "part.json").read_text())
    assert document["rows"][0]["values"][RATE] == [200, 100]
    assert [bar["met"] for bar in document["bars"]] == [False, True]
    assert document["machine"]["processors"] >= 1
    assert (tmp_path / "part.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "part.html").read_text()
    assert "engine alone" in page
    assert '<script src="http' not in page  # it is whole without a network


async def test_systems_take_turns_and_warm_up_does_not_count() -> None:
    said: list[str] = []

    class Quiet(Load):
        def __init__(self, name: str) -> None:
            self.name = name

    def work(word: str, answered: int) -> object:
        async def run(load: Load) -> Run:
            assert isinstance(load, Quiet)
            said.append(f"{word} {load.name}")
            done = Run(seconds=1.0)
            done.latencies.extend([1.0] * answered)
            return done

        return run

    used = iter(range(100))
    systems = [System(name, Quiet(name), lambda: {"stage": float(next(used))}) for name in ("a", "b")]
    measured = dict.fromkeys(("a", "b"), work("measure", 10))
    found = await in_turn(systems, measured, 2, work("warm", 99))  # type: ignore[arg-type]
    assert said == ["warm a", "measure a", "warm b", "measure b", "warm b", "measure b", "warm a", "measure a"]
    assert [one.answered for one in found["a"]] == [10, 10]
    assert found["a"][0].cpu == {"stage": 100.0}  # a second between two readings, over ten requests


async def test_whoever_is_not_measured_is_stopped() -> None:
    processes = {name: await asyncio.create_subprocess_exec("sleep", "60") for name in ("a", "b")}

    def states() -> dict[str, bool]:
        """Whether each is stopped."""
        return {name: psutil.Process(each.pid).status() == psutil.STATUS_STOPPED for name, each in processes.items()}

    async def until(**stopped: bool) -> None:
        await asyncio.to_thread(wait_until, lambda: states() == stopped, what=str(stopped))  # a signal takes its time

    turns = iter([{"a": False, "b": True}, {"a": False, "b": True}, {"a": True, "b": False}, {"a": True, "b": False}])

    async def run(_: Load) -> Run:
        await until(**next(turns))
        done = Run(seconds=1.0)
        done.latencies.append(1.0)
        return done

    systems = [System(name, cast(Load, None), dict, lambda pid=each.pid: [pid]) for name, each in processes.items()]  # type: ignore[misc]
    try:
        await in_turn(systems, dict.fromkeys(processes, run), 1, run, lambda: until(a=True, b=True))
        await until(a=False, b=False)
        assert next(turns, None) is None
    finally:
        for each in processes.values():
            each.kill()
            await each.wait()


def test_batches_hold_at_most_so_many_tokens_with_their_padding() -> None:
    rows = [np.zeros(size, dtype=np.int64) for size in (2, 3, 3, 10, 4, 300)]
    batches = [[len(row) for row in batch] for batch in by_tokens(rows, 12)]
    assert batches == [[2, 3, 3], [10], [4], [300]]
    assert by_tokens([], 12) == []


def test_prose_has_its_length_and_no_two_parts_alike() -> None:
    text = prose(10_000, seed=1)
    assert len(text) == 10_000
    assert text == prose(10_000, seed=1)
    parts = [text[at : at + 200] for at in range(0, 10_000, 200)]
    assert len(set(parts)) == len(parts)


def test_made_up_keys_are_keys_and_never_the_same_twice() -> None:
    ids = [_key_id(number) for number in (*range(10_000), 999_999)]
    assert len(set(ids)) == len(ids)
    assert all(is_key_id(each) for each in ids)
    assert ids != sorted(ids)
