"""`./run …` as a user types it, on the real services: what it prints, what it keeps, what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.embedded import servers
from tests.chaos.kit import ROOT, Stack
from tests.conftest import free_port, running

SECRET_FILES = ("nats.conf", "redis.conf", "supervisord.conf", "ports.json", "edge.json")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pc-") as name:
        yield Path(name) / "home"


def detect(stack: Stack, key: str) -> int:
    """The status of a detection through curl, as typed from what `up` prints."""
    completed = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", f"{stack.url}/v1/detect",
         "-H", f"X-API-Key: {key}", "-d", '{"text": "hello"}'],
        capture_output=True, text=True,
    )  # fmt: skip
    return int(completed.stdout)


def started_in_foreground(stack: Stack) -> tuple[subprocess.Popen[str], str]:
    """`./run up`, and what it has printed by the time it is ready."""
    environment = os.environ | {"PORTCULLIS_HOME": str(stack.home), "PORTCULLIS_EDGE_PORT": str(stack.port)}
    process = subprocess.Popen(
        ["./run", "up"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )
    assert process.stdout is not None
    printed = ""
    while "Ctrl-C" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return process, printed


def test_a_life_of_the_stack_from_up_to_ctrl_c_and_up_again(home: Path) -> None:
    stack = Stack(home)
    process, printed = started_in_foreground(stack)
    try:
        # What it prints works as printed.
        key = (home / "secrets" / "demo-key").read_text().strip()
        assert f'-H "X-API-Key: {key}"' in printed
        assert f"curl -X POST http://localhost:{stack.port}/v1/detect" in printed
        verdict = json.loads(next(line for line in printed.splitlines() if "is_malicious" in line))
        assert verdict["degraded"] is False
        assert detect(stack, key) == 200
        assert "nats://127.0.0.1:" in printed

        # Secrets are the owner's.
        assert home.stat().st_mode & 0o066 == 0
        secret = [home / name for name in SECRET_FILES]
        secret += [path for folder in ("secrets", "environments") for path in (home / folder).iterdir()]
        assert len(secret) > 20
        assert [path for path in secret if path.stat().st_mode & 0o777 != 0o600] == []
        assert [path for path in (home / "logs").iterdir() if path.stat().st_mode & 0o077 != 0] == []

        # The other commands know of it.
        again = stack.run("up", check=False)
        assert (again.returncode, again.stdout) == (1, "")
        assert again.stderr.count("\n") == 1
        assert "already running" in again.stderr
        shown = stack.run("status").stdout
        assert "healthy" in shown
        assert all(f"{name}_0" in shown for name in ("edge", "auth", "limiter", "detector_proxy", "fallback_model", "nats"))
        assert "ready" in stack.run("logs", "limiter").stdout
        assert "limiter" in stack.run("logs", "unheard-of", check=False).stderr
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert rest.split() == ["Stopping…", "Stopped."]
    assert process.returncode == 0
    assert stack.processes() == []

    # The same home again, and beside it another one: keys are still known, and the two have nothing in common.
    other = Stack(home.with_name("other"))
    try:
        stack.up()
        other.up()
        assert (home / "secrets" / "demo-key").read_text().strip() == key
        other_key = (other.home / "secrets" / "demo-key").read_text().strip()
        assert [detect(stack, key), detect(stack, other_key), detect(other, other_key)] == [200, 401, 200]
    finally:
        assert "Stopped." in stack.run("down").stdout
        assert "Stopped." in other.run("down").stdout
    assert stack.processes() + other.processes() == []
    assert "Nothing was running." in stack.run("down").stdout
    assert stack.run("status", check=False).returncode == 3


def test_a_server_of_ones_own_is_used_and_the_embedded_one_is_not_started(home: Path) -> None:
    home.mkdir()
    with contextlib.ExitStack() as started:
        nats = started.enter_context(running(servers.nats(home / "nats", free_port(), {"mine": "secret"})))
        redis = started.enter_context(running(servers.redis(home, free_port(), "secret")))
        stack = Stack(
            home / "home",
            environment={
                "PORTCULLIS_NATS_URL": nats.url,
                "PORTCULLIS_NATS_USER": "mine",
                "PORTCULLIS_NATS_PASSWORD": "secret",
                "PORTCULLIS_REDIS_URL": redis.url,
            },
        )
        try:
            stack.up()
            shown = stack.run("status").stdout
        finally:
            stack.run("down", check=False)
    assert "limiter_0" in shown
    assert "postgres_0" in shown
    assert "nats_0" not in shown
    assert "redis_0" not in shown
    assert stack.processes() == []


def test_a_supervisor_that_is_killed_ends_up_too_and_says_so(home: Path) -> None:
    stack = Stack(home)
    process, _ = started_in_foreground(stack)
    os.kill(int((home / "supervisord.pid").read_text()), signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert "the supervisor ended" in rest
    assert process.returncode == 1
    assert stack.processes() == []


def explained(stack: Stack, *arguments: str) -> str:
    """The one line that a command which cannot succeed prints."""
    completed = stack.run("up", "--detach", *arguments, check=False)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    assert completed.stderr.count("\n") == 1, completed.stderr
    assert stack.processes() == []
    return completed.stderr


def test_a_busy_port_is_explained(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = explained(Stack(home, port=port))
    assert f"port {port}" in said
    assert "PORTCULLIS_EDGE_PORT" in said


def test_a_wrong_scale_is_explained(home: Path) -> None:
    assert "there is no service 'postgres'" in explained(Stack(home), "--scale", "postgres=2")


def test_a_home_that_cannot_be_written_is_explained(home: Path) -> None:
    home.parent.joinpath("file").touch()
    assert "set PORTCULLIS_HOME" in explained(Stack(home.parent / "file" / "home"))


def test_a_service_that_keeps_dying_is_named_with_its_last_words(home: Path) -> None:
    stack = Stack(home, environment={"PORTCULLIS_ENGINE_KIND": "oracle", "PORTCULLIS_ENGINE_URL": "http://127.0.0.1:1"})
    completed = stack.run("up", "--detach", check=False)
    assert completed.returncode == 1
    assert "detector_proxy_0 keeps dying" in completed.stderr
    assert "PORTCULLIS_ENGINE_KIND" in completed.stderr
    assert str(home / "logs" / "detector_proxy_0.log") in completed.stderr
    assert stack.processes() == []


def test_python_that_is_too_old_is_explained(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "PORTCULLIS_HOME": str(tmp_path / "home")}
    completed = subprocess.run(["./run", "status"], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.count("\n") == 1
    assert "Python 3.11" in completed.stderr


def test_a_missing_package_index_is_explained(tmp_path: Path) -> None:
    python = subprocess.run(["sh", "-c", "command -v python3"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PORTCULLIS_HOME": str(tmp_path / "home"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:1/simple",
    }
    completed = subprocess.run(["./run", "status"], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert completed.returncode == 1
    assert "package index" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert completed.stderr.count("\n") <= 3
