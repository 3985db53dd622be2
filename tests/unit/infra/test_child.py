from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.embedded import child
from infra.embedded.child import PAUSE_CAP_SECONDS, WINDOW_SECONDS, pause_seconds

NOW = 1_000_000.0


def test_a_program_that_dies_now_and_then_starts_at_once() -> None:
    assert pause_seconds([], NOW) == 0
    assert pause_seconds([NOW - 5, NOW - 1], NOW) == 0
    assert pause_seconds([NOW - 5.0 * n for n in range(1, 200)], NOW) == 0


def test_a_program_that_keeps_dying_is_paced() -> None:
    pauses = [pause_seconds([NOW - 0.5 * n for n in range(1, count + 1)], NOW) for count in range(2, 12)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0
    assert pauses[1] > 0
    assert pauses[-1] == PAUSE_CAP_SECONDS


@given(st.lists(st.floats(NOW - 100, NOW + 100), max_size=60))
def test_the_pause_is_bounded_and_old_starts_do_not_count(starts: list[float]) -> None:
    pause = pause_seconds(starts, NOW)
    assert 0 <= pause <= PAUSE_CAP_SECONDS < 5
    assert pause == pause_seconds([start for start in starts if NOW - WINDOW_SECONDS < start <= NOW], NOW)


def test_the_starts_are_noted_and_the_note_stays_short(tmp_path: Path) -> None:
    note = tmp_path / "limiter_0"
    note.write_text("".join(f"{n}.000 {n}\n" for n in range(1, 100)))
    child.record_start(note)
    lines = note.read_text().splitlines()
    assert len(lines) == child.KEPT_STARTS + 1
    assert int(lines[-1].split()[1]) == os.getpid()


def environment_of_child(tmp_path: Path, *arguments: str, **environment: str) -> dict[str, str]:
    file = tmp_path / "environment.json"
    file.write_text('{"PORTCULLIS_A": "file", "PORTCULLIS_B": "file"}')
    file.chmod(0o600)
    output = subprocess.run(
        [sys.executable, "-I", "-S", str(child.__file__), "--environment", str(file), *arguments, "--", "env"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return dict(line.split("=", 1) for line in output.splitlines() if line.startswith("PORTCULLIS"))


def test_the_file_decides_for_a_supervised_program_and_yields_for_one_started_by_hand(tmp_path: Path) -> None:
    path = os.environ["PATH"]
    assert environment_of_child(tmp_path, PATH=path, PORTCULLIS_A="mine") == {"PORTCULLIS_A": "file", "PORTCULLIS_B": "file"}
    by_hand = environment_of_child(tmp_path, "--optional", PATH=path, PORTCULLIS_A="mine")
    assert by_hand == {"PORTCULLIS_A": "mine", "PORTCULLIS_B": "file"}


def test_a_program_started_by_hand_needs_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    command = [sys.executable, "-I", "-S", str(child.__file__), "--optional", "--environment", str(missing), "--", "true"]
    assert subprocess.run(command).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's scheduler")
@pytest.mark.parametrize(("arguments", "policy"), [((), os.SCHED_OTHER), (("--patient",), os.SCHED_BATCH)])
def test_a_patient_program_is_one_by_the_time_that_it_starts(arguments: tuple[str, ...], policy: int) -> None:
    tell = (sys.executable, "-c", "import os; print(os.sched_getscheduler(0))")
    command = [sys.executable, "-I", "-S", str(child.__file__), *arguments, "--", *tell]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) == policy


def test_each_replica_has_a_metrics_port_of_its_own(tmp_path: Path) -> None:
    found = environment_of_child(tmp_path, "--metrics-ports", "9100,9200,9300", "--number", "2", PATH=os.environ["PATH"])
    assert found["PORTCULLIS_METRICS_PORT"] == "9300"
