"""`./run up | down | status | logs | backup | restore`: the embedded stack on one machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded import backup, control, logs, stack, welcome
from infra.embedded.home import HOME_VARIABLE, ROOT, Home, HomeError, locate_home, open_home
from infra.embedded.process import die_with_parent
from infra.embedded.servers import ServerError
from libs.common import VERSION
from libs.common.subjects import SERVICES

READY_SECONDS = 60.0
DYING_STARTS = 4
"""A process that was started this often before the stack was ready will not come up by itself."""

LOG_LINES_SHOWN = 12

_ORDER = (*SERVICES, *stack.SERVERS)


class UpError(Exception):
    """The stack did not come up; the text says why and where to look."""


class StoppedError(Exception):
    """The signal to stop came."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run", description="Portcullis on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up", help="start everything, stay in the foreground")
    up_parser.add_argument("--detach", action="store_true", help="return when ready")
    up_parser.add_argument("--scale", action="append", default=[], metavar="SERVICE=N", help="how many of a service; repeatable")
    up_parser.add_argument("--together", action="store_true", help="all that a request passes shares a process")
    commands.add_parser("down", help="stop everything")
    commands.add_parser("status", help="what runs")
    logs_parser = commands.add_parser("logs", help="the last lines of all logs, or of one service's")
    logs_parser.add_argument("service", nargs="?")
    logs_parser.add_argument("-f", "--follow", action="store_true", help="and go on with new ones")
    logs_parser.add_argument("-n", "--lines", type=int, default=50)
    for name, explained in (
        ("backup", "keep everything in a folder, while it is stopped"),
        ("restore", "bring it back from there"),
    ):
        commands.add_parser(name, help=explained).add_argument("folder", type=Path)
    arguments = parser.parse_args()
    os.umask(0o077)  # what is made in the home is its owner's
    try:
        match arguments.command:
            case "up":
                scale = stack.parse_scale(arguments.scale)
                return up(dict(os.environ), detach=arguments.detach, scale=scale, together=arguments.together)
            case "down":
                return down(locate_home(dict(os.environ)))
            case "status":
                return status(locate_home(dict(os.environ)))
            case "backup":
                return save(open_home(dict(os.environ)), arguments.folder)
            case "restore":
                return bring_back(open_home(dict(os.environ)), arguments.folder)
            case _:
                return show_logs(locate_home(dict(os.environ)), arguments.service, arguments.lines, follow=arguments.follow)
    except (HomeError, ServerError, stack.StackError, control.ControlError, backup.BackupError, UpError) as error:
        print(f"portcullis: {error}", file=sys.stderr)
    except StoppedError:  # while we were stopping for another reason
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        home = locate_home(dict(os.environ)).path
        print(f"portcullis: {error.strerror}: {error.filename or home}; the data is in {HOME_VARIABLE}={home}", file=sys.stderr)
    return 1


# --- up ----------------------------------------------------------------------------------------------------------------------


def up(environment: dict[str, str], *, detach: bool, scale: dict[str, int], together: bool) -> int:
    """Start everything; returns 0 when it was stopped in order (or, with `detach`, when it is ready).

    130, as a shell would say, when it was stopped before it was ready.
    """
    status = 130
    if not detach:
        die_with_parent(signal.SIGTERM)
    _stop_on_signals()
    with contextlib.ExitStack() as cleanup:
        try:
            process = _start(open_home(environment), environment, scale, cleanup, detach=detach, together=together)
            status = 0
            if detach:
                cleanup.pop_all()
                return status
            if process.wait() != 0:
                raise UpError("the supervisor ended:\n" + _last_lines(locate_home(environment), "supervisor.*"))
        except StoppedError:
            print("\nStopping…", flush=True)
    print("Stopped.", flush=True)
    return status


def _start(
    home: Home,
    environment: dict[str, str],
    scale: dict[str, int],
    cleanup: contextlib.ExitStack,
    *,
    detach: bool,
    together: bool,
) -> subprocess.Popen[bytes]:
    """Start the stack, and greet when it has answered; returns its supervisor. What was started is stopped by `cleanup`."""
    began = time.monotonic()
    supervisor = control.Supervisor(home)
    with home.lock():
        if supervisor.pid() is not None:
            raise UpError(f"already running in {_short(home)}; see ./run status, or stop it with ./run down")
        control.end_leftovers(home)
        for path in home.starts.iterdir():
            path.unlink()
        plan = stack.plan(home, environment, scale, together=together)
        stack.write(home, plan)
        external = stack.external_hosts(environment)
        print(f"Starting Portcullis {VERSION}" + (f" with your {', your '.join(external)}" if external else ""), flush=True)
        process = control.start_supervisor(home, die_with_parent=not detach)
        cleanup.callback(_stop, home, process)
        base_url = f"http://{_reachable(plan.edge_host)}:{plan.edge_port}"
        try:
            key, verdict = welcome.insist(
                lambda: welcome.greet(home, base_url), READY_SECONDS, lambda: _check_alive(home, supervisor, process)
            )
        except welcome.NotReadyError as error:
            raise UpError(_explain(home, supervisor, str(error))) from None
    seconds = time.monotonic() - began
    print(_greeting(home, base_url, plan.nats_url, key, verdict, seconds, detach=detach), flush=True)
    return process


def _stop_on_signals() -> None:
    """The first signal to stop raises StoppedError, wherever we are; further ones change nothing."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise StoppedError

    for number in numbers:
        signal.signal(number, stop)


def _stop(home: Home, process: subprocess.Popen[bytes]) -> None:
    """Stop what `up` has started."""
    process.terminate()
    try:
        process.wait(control.STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # the children are told by the kernel
    control.end_leftovers(home)


def _check_alive(home: Home, supervisor: control.Supervisor, process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        raise UpError("the supervisor ended:\n" + _last_lines(home, "supervisor.*"))
    for state in supervisor.processes():
        if len(state.starts) >= DYING_STARTS:
            log = f"{state.name}.log"
            raise UpError(
                f"{state.name} keeps dying; the end of its log ({_short(home, 'logs', log)}):\n" + _last_lines(home, log)
            )


def _last_lines(home: Home, pattern: str) -> str:
    lines = logs.tail(sorted(home.logs.glob(pattern)), LOG_LINES_SHOWN)
    return "\n".join(f"  {line.text}" for line in lines) or "  (nothing)"


def _explain(home: Home, supervisor: control.Supervisor, said: str) -> str:
    down = [state.name for state in supervisor.processes() if state.state != "running"]
    about = f"; not running: {', '.join(down)}" if down else ""
    return f"not ready after {READY_SECONDS:.0f} s ({said}){about}; the logs are in {_short(home, 'logs')}"


def _short(home: Home, *parts: str) -> str:
    """A path in the home, relative to the checkout when it lies there."""
    path = home.path.joinpath(*parts)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _reachable(host: str) -> str:
    """A host that a client here can connect to, for one to listen on."""
    return "localhost" if host in ("0.0.0.0", "127.0.0.1", "localhost") else host  # noqa: S104


def _greeting(
    home: Home, base_url: str, nats_url: str | None, key: str, verdict: dict[str, Any], seconds: float, *, detach: bool
) -> str:
    nats = f"\nJobs over NATS, with the key as the token: {nats_url} (docs/nats.md)" if nats_url is not None else ""
    stop = "./run down stops it" if detach else "Ctrl-C stops it"
    return f"""
Portcullis is up at {base_url} after {seconds:.1f} s.

Your demo key:  {key}

Try it:

  curl -X POST {base_url}/v1/detect \\
    -H "X-API-Key: {key}" \\
    -d '{json.dumps({"text": welcome.FIRST_TEXT})}'

It has just answered:

  {json.dumps(verdict)}

See it work: {base_url}/console   API: {base_url}/docs   Health: {base_url}/health{nats}
Data, logs and the admin token are in {_short(home)}. See also ./run status and ./run logs -f; {stop}."""


# --- down, status, logs ------------------------------------------------------------------------------------------------------


def down(home: Home) -> int:
    """Stop everything, also what a killed supervisor has left behind."""
    stopped = control.Supervisor(home).shutdown()
    left = control.end_leftovers(home)
    print("Stopped." if stopped or left else "Nothing was running.")
    return 0


def status(home: Home) -> int:
    """A table of the processes and a line about health. Exit status 0 if healthy or degraded, 3 if nothing runs, 1 otherwise."""
    supervisor = control.Supervisor(home)
    states = supervisor.processes()
    if not states:
        print(f"Portcullis is not running in {_short(home)}; start it with ./run up")
        return 3
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("process", "state"):
        table.add_column(title)
    for title in ("pid", "up", "restarts", "memory"):
        table.add_column(title, justify="right")
    for state in sorted(states, key=lambda state: _ORDER.index(state.name.rpartition("_")[0])):
        memory = f"{control.memory_bytes(state.pid) / 1e6:.0f} MB" if state.pid else ""
        up_for = _duration(time.time() - state.starts[-1]) if state.pid and state.starts else ""
        style = None if state.state == "running" else "red"
        table.add_row(state.name, state.state, str(state.pid or ""), up_for, str(state.restarts or ""), memory, style=style)
    console = Console(highlight=False)
    console.print(table)
    edge = json.loads(home.edge_address.read_text())
    base_url = f"http://{_reachable(edge['host'])}:{edge['port']}"
    answer = welcome.call(base_url, "/health")
    word = answer.body.get("status", "no answer")
    console.print(f"{base_url}  {word}")
    console.print(f"{base_url}/console")
    if nats_url := edge.get("nats"):
        console.print(f"{nats_url}  for clients with an API key")
    return 0 if answer.status == 200 else 1


# --- backup, restore ---------------------------------------------------------------------------------------------------------


def save(home: Home, folder: Path) -> int:
    """Write a backup, and say what is in it."""
    with home.lock():
        kept = backup.backup(home, folder.absolute())
    print(f"{folder} holds {', '.join(kept)}. It has every secret and the texts of waiting jobs: keep it as you keep those.")
    return 0


def bring_back(home: Home, folder: Path) -> int:
    """Fill an empty home from a backup."""
    with home.lock():
        kept = backup.restore(home, folder.absolute())
    print(f"Restored {', '.join(kept)} into {_short(home)}; start it with ./run up")
    return 0


# --- what they share ---------------------------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h`, `5 d`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def show_logs(home: Home, service: str | None, lines: int, *, follow: bool) -> int:
    """Print the last lines of the logs that belong to `service` (or to one process of it), or of all."""
    pattern = f"{service}*.log" if service else "*.log"
    paths = sorted(home.logs.glob(pattern))
    if not paths:
        known = sorted({path.stem for path in home.logs.glob("*.log")})
        print(
            f"portcullis: no log of {service}; there are {', '.join(known)}" if known else "portcullis: no logs yet",
            file=sys.stderr,
        )
        return 1
    width = max(len(path.stem) for path in paths)
    for line in logs.tail(paths, lines):
        _print_line(line, width)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for line in logs.follow(home.logs, pattern):
                _print_line(line, width)
    return 0


def _print_line(line: logs.Line, width: int) -> None:
    clock = time.strftime("%H:%M:%S", time.localtime(line.when))
    print(f"{clock} {line.source:<{width}}  {line.text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
