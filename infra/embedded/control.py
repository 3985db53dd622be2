"""Talks to a home's supervisord: is it there, what runs, stop it. Also ends what a killed supervisord has left behind."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
import xmlrpc.client
from dataclasses import dataclass
from typing import Any, cast

import psutil
from supervisor.xmlrpc import SupervisorTransport

from infra.embedded.home import HOME_VARIABLE, ROOT, Home
from infra.embedded.supervise import DIE_WITH_PARENT_VARIABLE

STOP_SECONDS = 60.0
"""Edge, services and servers stop one after the other, each within 20 s; then supervisord kills."""

_POLL_SECONDS = 0.05


class ControlError(Exception):
    """The supervisor did not do what it was asked; the text is one line."""


@dataclass(frozen=True, slots=True)
class ProcessState:
    """`name`: program and number, as in `limiter_0`. `starts`: epoch seconds of its starts since the stack came up."""

    name: str
    state: str
    pid: int
    starts: tuple[float, ...]

    @property
    def restarts(self) -> int:
        return max(0, len(self.starts) - 1)


class Supervisor:
    """The supervisord of one home. Raises nothing when it is not there: `pid` is None then."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def _call(self, name: str) -> Any:
        """The answer of supervisord, or None when nobody listens or it has just gone."""
        # A transport that could not connect once never does again, so each call has its own.
        transport = SupervisorTransport(None, None, f"unix://{self._home.supervisor_socket()}")
        server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)  # the transport knows the way
        try:
            return getattr(server.supervisor, name)()
        except (OSError, http.client.HTTPException, xmlrpc.client.Error):
            return None
        finally:
            transport.close()

    def pid(self) -> int | None:
        return cast("int | None", self._call("getPID"))

    def processes(self) -> list[ProcessState]:
        """Every process of the stack, in the order of starting."""
        answer: list[dict[str, Any]] = self._call("getAllProcessInfo") or []
        return [
            ProcessState(
                name=info["name"],
                state=info["statename"].lower(),
                pid=info["pid"],
                starts=tuple(start for start, _ in starts(self._home, info["name"])),
            )
            for info in answer
        ]

    def shutdown(self) -> bool:
        """Stop everything and wait for it. False if nothing ran."""
        pid = self.pid()
        if pid is None:
            return False
        self._call("shutdown")
        wait_gone(pid, STOP_SECONDS)
        return True


def starts(home: Home, process: str) -> list[tuple[float, int]]:
    """(epoch seconds, process id) of a process's starts since the stack came up."""
    path = home.starts / process
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(when), int(pid)) for when, pid in (line.split() for line in lines)]


def wait_gone(pid: int, timeout_seconds: float) -> None:
    """Wait until a process that need not be our child has ended."""
    deadline = time.monotonic() + timeout_seconds
    while runs(pid):
        if time.monotonic() > deadline:
            raise ControlError(
                f"process {pid} is still there after {timeout_seconds:.0f} s; look at it, or end it with kill -9 {pid}"
            )
        time.sleep(_POLL_SECONDS)


def runs(pid: int) -> bool:
    """Whether a process is there and more than an entry that nobody has collected yet."""
    try:
        return cast("str", psutil.Process(pid).status()) != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and its children; 0 when it has gone."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def start_supervisor(home: Home, *, die_with_parent: bool) -> subprocess.Popen[bytes]:
    """Start supervisord in a session of its own, so that a Ctrl-C reaches us alone and we stop it in order."""
    # The services' variables come from their private files, each only its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PORTCULLIS_")}
    environment[HOME_VARIABLE] = str(home.path)
    if die_with_parent:
        environment[DIE_WITH_PARENT_VARIABLE] = str(os.getpid())
    with (home.logs / "supervisor.err").open("wb") as errors:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "infra.embedded.supervise", "--configuration", str(home.supervisor_configuration)],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True,
        )  # fmt: skip


def end_leftovers(home: Home) -> int:
    """End the processes of this home whose supervisord was killed; they were told to stop by the kernel. Returns how many."""
    left = []
    for path in home.starts.iterdir() if home.starts.exists() else ():
        found = starts(home, path.name)
        if not found:
            continue
        started, pid = found[-1]
        try:
            process = psutil.Process(pid)
            # The number may belong to somebody else by now: a process of ours has our home, and is as old as our note.
            if process.environ().get(HOME_VARIABLE) == str(home.path) and abs(process.create_time() - started) < 60:
                left.append(process)
        except psutil.Error:
            continue
    for process in left:
        process.send_signal(signal.SIGTERM)
    _, stubborn = psutil.wait_procs(left, timeout=STOP_SECONDS / 3)
    for process in stubborn:
        process.kill()
    psutil.wait_procs(stubborn, timeout=5)
    return len(left)
