"""The parts of the benchmark from end to end, on fakes: the stub engine, in a thread, stands for every system."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.embedded.home import ROOT
from tests.bench import __main__ as bench
from tests.bench import overhead, scale, turns
from tests.bench.report import CPU, RATE
from tests.bench.stub import Stub
from tests.bench.turns import Options

QUICK = Options(seconds=0.03, repeats=2)


class FakeStack:
    """`cpu` grows by a tenth of a second each time that it is asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.pid = 0
        self._asked = 0

    def cpu(self) -> dict[str, float]:
        self._asked += 1
        return {"edge": self._asked / 10, "postgres": 0.0, "redis": 0.0}


class FakeServer(FakeStack):
    def cpu(self) -> float:  # type: ignore[override]  # of one process
        return 0.0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where the stub answers everything at once."""
    loop = asyncio.new_event_loop()
    serving = threading.Thread(target=loop.run_forever)
    serving.start()
    server = asyncio.run_coroutine_threadsafe(loop.create_server(Stub, "127.0.0.1", 0), loop).result()
    yield server.sockets[0].getsockname()[1]
    server.close()
    loop.call_soon_threadsafe(loop.stop)
    serving.join()
    loop.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, port: int) -> list[tuple[dict[str, str], dict[str, int]]]:
    """Environment and scale of each stack that was started."""
    stacks: list[tuple[dict[str, str], dict[str, int]]] = []

    @contextmanager
    def stack(
        environment: Mapping[str, str], replicas: Mapping[str, int] | None = None, *, together: bool = False
    ) -> Iterator[FakeStack]:
        stacks.append((dict(environment), dict(replicas or {}) | ({"together": 1} if together else {})))
        yield FakeStack(port)

    @contextmanager
    def served(*_: Any) -> Iterator[FakeServer]:
        yield FakeServer(port)

    @asynccontextmanager
    async def key(_: Any) -> AsyncIterator[str]:
        yield "key"

    for module in (overhead, scale):
        monkeypatch.setattr(module, "portcullis", stack)
        monkeypatch.setattr(module, "engine", served)
    for module in (overhead, scale, turns):
        monkeypatch.setattr(module, "key_of", key)
        monkeypatch.setattr(module, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(overhead, "monolith", served)
    return stacks


def test_every_stage_is_compared_with_one_of_each(started: list[tuple[dict[str, str], dict[str, int]]]) -> None:
    report = scale.replicas(QUICK)
    scaled = [replicas for _, replicas in started if replicas]
    stages = ("edge", "auth", "limiter", "detector_proxy", "fallback_model")
    assert scaled == [{stage: count} for stage in stages for count in (2, 4)]
    # The model's own stage is measured with the model; all others with the engine that answers at once.
    assert [bool(environment) for environment, _ in started] == [True] * 9 + [False] * 3
    row = report.row("more", "4 × limiter")
    assert len(row.values[RATE]) == 2
    assert row.spread(CPU).median > 0
    assert len(report.notes) == 10


def test_connections_are_all_opened_and_compared_with_the_fewest(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "CONNECTIONS", (16, 40))
    report = scale.connections(QUICK)
    assert [row.setting for row in report.rows] == ["16 open", "40 open"]
    assert [bar.what for bar in report.bars] == ["processor time, 40 connections, of 16"]


def test_time_by_length_is_told_as_a_power(started: list[Any]) -> None:
    report = scale.length(QUICK)
    assert [row.setting for row in report.rows] == [f"{size} characters" for size in (100, 1_000, 10_000, 100_000)]
    assert [bar.bound for bar in report.bars] == [1.1, 1.1]


def test_overhead_has_each_system_in_each_setting_and_its_bars(started: list[Any]) -> None:
    report = overhead.run(Options(seconds=0.03, repeats=2, levels=(1, 32)))
    assert [layout for _, layout in started] == [{}, {"together": 1}]
    systems = ["engine alone", "FastAPI, 1 process", "FastAPI, 2 processes", "Portcullis", "Portcullis, together"]
    assert [row.system for row in report.rows if row.setting == "32 callers"] == systems
    assert [row.system for row in report.rows if row.setting == "open, half of its own peak"] == systems[1:]
    assert sum(row.setting.startswith("open, ") for row in report.rows) == 9
    assert all(len(row.values[RATE]) == 2 for row in report.rows)
    assert len(report.bars) == 14
    assert sum(bar.what.startswith("Portcullis, together: ") for bar in report.bars) == 7


def test_a_part_can_be_measured_of_stages_that_share_processes(
    started: list[tuple[dict[str, str], dict[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scale, "CONNECTIONS", (16, 40))
    arguments = ["connections", "--together", "--seconds", "0.03", "--repeats", "1", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert [layout for _, layout in started] == [{"together": 1}]
    assert "the stages together" in capsys.readouterr().out
    assert (tmp_path / "connections-together.json").exists()
    for part in ("replicas", "overhead"):
        with pytest.raises(SystemExit):
            bench.main([part, "--together"])
        assert f"{part} measures stages in processes of their own" in capsys.readouterr().err


def test_the_benchmark_does_without_what_only_tests_need() -> None:
    # `./run bench` installs no pytest; importing any part must not ask for it.
    command = "import sys; sys.modules['pytest'] = None; import tests.bench.__main__"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT)
