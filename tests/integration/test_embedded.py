"""The process runner under small programs of our own: what dies comes back, what stops leaves nothing, callers wait."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra.embedded import control, servers, stack
from infra.embedded.home import HOME_VARIABLE, ROOT, Home, free_port, open_home
from tests.conftest import wait_until

# Answers every request on file descriptor 0 with its process id; SIGUSR1 makes it end without stopping first, as a crash.
WEB = """
import http.server, os, signal, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
server.serve_forever()
"""
SLEEP = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(1000)"
# Ignores the polite signal, as a service that hangs.
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('stubborn', flush=True); time.sleep(1000)"
DIES = "import sys; print('no luck today', flush=True); sys.exit(2)"


def program(name: str, source: str, group: str = "services", **fields: object) -> stack.Program:
    # On a command line of one line, as supervisor's configuration wants it.
    return stack.Program(name, (sys.executable, "-c", f"exec({source!r})"), group=group, **fields)  # type: ignore[arg-type]


def left(home: Home) -> list[str]:
    """Command lines of the processes that belong to this home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(HOME_VARIABLE) == str(home.path) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def pid_of(home: Home, name: str) -> int:
    noted = control.starts(home, name)
    return noted[-1][1] if noted else 0


def restarted(home: Home, name: str, old_pid: int) -> bool:
    return pid_of(home, name) not in (0, old_pid)


@contextmanager
def supervised(home: Home, *programs: stack.Program, port: int = 0) -> Iterator[control.Supervisor]:
    """These programs under a supervisor of ours, until the end of the block."""
    stack.write(home, stack.Plan(programs, "127.0.0.1", port))
    supervisor = control.Supervisor(home)
    assert supervisor.pid() is None
    assert supervisor.processes() == []
    process = control.start_supervisor(home, die_with_parent=True)
    names = [f"{one.name}_{number}" for one in programs for number in range(one.replicas)]
    try:
        wait_until(lambda: all(pid_of(home, name) for name in names), what="all programs")
        yield supervisor
    finally:
        process.kill()
        process.wait()
        control.end_leftovers(home)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home({HOME_VARIABLE: str(tmp_path / "home")})


def get(port: int) -> int:
    """The process id of the edge that answered; raises OSError when there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        return int(connection.getresponse().read())


def edge(port: int, replicas: int = 1) -> stack.Program:
    return program("edge", WEB, "edge", replicas=replicas, listen=("127.0.0.1", port))


def test_what_is_killed_comes_back_every_time_however_often(home: Home) -> None:
    with supervised(home, program("limiter", SLEEP)) as supervisor:
        for _ in range(6):
            pid = pid_of(home, "limiter_0")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: restarted(home, "limiter_0", pid), timeout_seconds=5, what="a new process")  # type: ignore[misc]
        (state,) = supervisor.processes()
        assert (state.name, state.state, state.restarts) == ("limiter_0", "running", 6)


def test_a_program_that_cannot_start_is_tried_for_ever_and_paced(home: Home) -> None:
    with supervised(home, program("auth", DIES)) as supervisor:
        wait_until(lambda: len(supervisor.processes()[0].starts) >= 4, what="the fourth start")
        first, *_, last = supervisor.processes()[0].starts
        assert last - first >= 0.5  # the third came at once, the fourth after a pause
        assert "no luck today" in (home.logs / "auth_0.log").read_text()


def test_callers_wait_while_the_only_edge_is_down_and_are_not_refused(home: Home) -> None:
    port = free_port()
    with supervised(home, edge(port), port=port):
        refused: list[OSError] = []
        stopping = threading.Event()
        answered = set()

        def call() -> None:
            while not stopping.is_set():
                try:
                    answered.add(get(port))
                except ConnectionRefusedError as error:
                    refused.append(error)
                except (OSError, http.client.HTTPException, ValueError):
                    continue  # this one was in the hands of the process that was killed

        caller = threading.Thread(target=call)
        caller.start()
        for _ in range(3):
            pid = pid_of(home, "edge_0")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: restarted(home, "edge_0", pid) and pid_of(home, "edge_0") in answered)  # type: ignore[misc]
        stopping.set()
        caller.join()
        assert refused == []


def test_replicas_of_the_edge_share_one_socket(home: Home) -> None:
    port = free_port()
    with supervised(home, edge(port, replicas=2), port=port):
        pids = {pid_of(home, "edge_0"), pid_of(home, "edge_1")}
        os.kill(pid_of(home, "edge_0"), signal.SIGSTOP)  # the other one takes all
        assert {get(port) for _ in range(10)} <= pids - {pid_of(home, "edge_0")}
        os.kill(pid_of(home, "edge_0"), signal.SIGCONT)


def test_a_stop_ends_everything_edge_first_and_even_what_does_not_listen(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "DRAIN_SECONDS", 1)
    port = free_port()
    programs = (program("nats", SLEEP, "servers"), program("auth", STUBBORN), edge(port))
    with supervised(home, *programs, port=port) as supervisor:
        wait_until(lambda: "stubborn" in (home.logs / "auth_0.log").read_text(), what="the stubborn one")
        assert supervisor.shutdown()
        assert left(home) == []
        assert supervisor.pid() is None
        log = (home.logs / "supervisor.log").read_text()
        assert log.index("stopped: edge_0") < log.index("stopped: auth_0") < log.index("stopped: nats_0")
        with pytest.raises(ConnectionRefusedError):
            get(port)


def test_a_killed_supervisor_takes_its_processes_with_it(home: Home) -> None:
    with supervised(home, program("nats", SLEEP, "servers"), program("auth", SLEEP, replicas=2)) as supervisor:
        pid = supervisor.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: left(home) == [], what="the end of all")


def test_what_a_killed_supervisor_leaves_behind_is_ended(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "STOP_SECONDS", 1.5)
    with supervised(home, program("auth", STUBBORN)) as supervisor:
        wait_until(lambda: "stubborn" in (home.logs / "auth_0.log").read_text(), what="the stubborn one")
        pid = supervisor.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: supervisor.pid() is None)
        assert len(left(home)) >= 1
        assert control.end_leftovers(home) == 1
        assert left(home) == []


def test_a_process_of_somebody_else_with_the_same_number_is_left_alone(home: Home) -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        (home.starts / "auth_0").write_text(f"{time.time():.3f} {other.pid}\n")
        assert control.end_leftovers(home) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_supervisor_follows_the_one_who_started_it(home: Home) -> None:
    stack.write(home, stack.Plan((program("auth", SLEEP),), "127.0.0.1", 0))
    start = (
        "import sys, time; from pathlib import Path; from infra.embedded import control; from infra.embedded.home import Home;"
        "control.start_supervisor(Home(Path(sys.argv[1])), die_with_parent=True); time.sleep(1000)"
    )
    starter = subprocess.Popen([sys.executable, "-c", start, str(home.path)], cwd=ROOT)
    try:
        wait_until(lambda: pid_of(home, "auth_0") != 0, what="the program")
        starter.kill()
        starter.wait()
        wait_until(lambda: left(home) == [], what="the end of all")
    finally:
        control.Supervisor(home).shutdown()


def test_the_wheels_hold_the_versions_that_we_pin(tmp_path: Path) -> None:
    commands = {
        servers.NATS_VERSION: (servers.nats(tmp_path / "nats", 1, {}).command[0], "--version"),
        servers.REDIS_VERSION: (servers.redis(tmp_path, 1, "x").command[0], "--version"),
        servers.POSTGRES_VERSION: (str(servers.postgres_binaries() / "postgres"), "--version"),
    }
    for version, command in commands.items():
        assert version in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to drop its rights")
@pytest.mark.parametrize("folder_mode", [0o755, 0o700])
def test_root_runs_postgres_as_somebody_else_even_in_a_private_folder(folder_mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(folder_mode)
        # The programs lie in the checkout, as private as the data.
        wheel = servers.postgres_binaries().parents[1]
        for part in (f"{wheel.name}/pginstall18", f"{wheel.name}.libs"):
            shutil.copytree(wheel.parent / part, folder / part)
        monkeypatch.setattr(servers, "postgres_binaries", lambda: folder / wheel.name / "pginstall18" / "bin")
        server = servers.postgres(folder / "home", free_port(), "secret")
        process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: (folder / "home" / "postgres" / "postmaster.pid").exists(), what="PostgreSQL")
            assert psutil.Process(process.pid).uids().effective != 0
            assert folder.stat().st_mode & 0o777 == folder_mode  # no folder is opened for it
            private = any(not one.stat().st_mode & 0o001 for one in (folder, *folder.parents))
            assert capabilities(process.pid).bit_count() == (1 if private else 0)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)


def capabilities(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)


# As just: waits for its child whatever signal it gets itself. The child ends in order on SIGTERM.
LIKE_JUST = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, lambda *_: None)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
sys.exit(child.wait())
"""
ENDS_WITH_7 = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(1000)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_relay_alone_reaches_what_it_runs(number: signal.Signals) -> None:
    relay = subprocess.Popen(
        [sys.executable, str(ROOT / "infra/embedded/relay.py"), sys.executable, "-c", LIKE_JUST, ENDS_WITH_7],
        stdout=subprocess.PIPE,
    )
    assert relay.stdout is not None
    assert relay.stdout.readline() == b"up\n"
    below = psutil.Process(relay.pid).children(recursive=True)
    relay.send_signal(number)
    try:
        assert psutil.wait_procs(below, timeout=10)[1] == []
        assert relay.wait(10) == (7 if number != signal.SIGKILL else -9)
    finally:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
