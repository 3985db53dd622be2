from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from infra.embedded.logs import follow, read_line, tail

JSON_LINE = json.dumps(
    {"time": "2026-11-23T18:30:43.250Z", "level": "WARNING", "service": "auth", "message": "slow", "request_id": "abc"}
)
UTC_TIME = datetime.fromisoformat("2026-11-23T18:30:43.250+00:00").timestamp()
LOCAL_TIME = datetime.fromisoformat("2026-11-23T18:30:43.250").timestamp()


@pytest.mark.parametrize(
    ("text", "when"),
    [
        (JSON_LINE, UTC_TIME),
        ("2026-11-23 18:30:43.250 UTC [11620] LOG:  ready", UTC_TIME),
        ("[11618] 2026/11/23 18:30:43.250000 [INF] Server is ready", LOCAL_TIME),
        ("30110:M 23 Nov 2026 18:30:43.250 * Ready to accept connections", LOCAL_TIME),
        ("2026-11-23 18:30:43,250 INFO spawned: 'limiter_0' with pid 11264", LOCAL_TIME),
        ("Traceback (most recent call last):", 5.0),
        ('{"time": "not a time"}', 5.0),
        ("{not json", 5.0),
        ("", 5.0),
    ],
)
def test_every_kind_of_line_gets_its_time(text: str, when: float) -> None:
    assert read_line("x", text, before=5.0).when == pytest.approx(when)


def test_our_own_lines_are_made_readable() -> None:
    assert read_line("auth_0", JSON_LINE, 0).text == "WARNING slow  [abc]"


def test_logs_are_read_as_one_in_the_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("2026-11-23 18:00:01.000 UTC first\n  its trace\n2026-11-23 18:00:05.000 UTC third\n")
    (tmp_path / "b.log").write_text("2026-11-23 18:00:03.000 UTC second\n")
    paths = [tmp_path / "b.log", tmp_path / "a.log"]
    assert [line.text[-6:].strip() for line in tail(paths, 10)] == ["first", "trace", "second", "third"]
    assert [line.source for line in tail(paths, 2)] == ["b", "a"]


def test_following_shows_new_lines_whole_and_survives_rotation(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n")

    def append(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    def rotate() -> None:
        log.rename(tmp_path / "a.log.1")
        append(log, "after the rotation\n")

    steps = iter(
        [
            lambda: append(log, "half a "),
            lambda: append(log, "line\n"),
            lambda: append(tmp_path / "b.log", "a new process\n"),
            rotate,
        ]
    )
    lines = follow(tmp_path, "*.log", wait=lambda: next(steps)())
    assert [next(lines).text for _ in range(3)] == ["half a line", "a new process", "after the rotation"]
