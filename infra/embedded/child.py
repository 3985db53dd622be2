"""Becomes a supervised program: its environment from a private file, a pause when it keeps dying, and death with its parent.

Started by its path with `python -I -S`, so it imports the standard library only and costs some 20 ms. It also starts a single
service with the environment that the running stack gave it (`just service NAME`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.embedded.process import be_patient, die_with_parent

WINDOW_SECONDS = 10.0
FREE_STARTS = 3
PAUSE_STEP_SECONDS = 0.5
PAUSE_CAP_SECONDS = 2.5
KEPT_STARTS = 50


def pause_seconds(starts: list[float], now: float) -> float:
    """How long to wait before another start, given the earlier ones (epoch seconds).

    Nothing while fewer than `FREE_STARTS` lie in the last `WINDOW_SECONDS`; then more with each, to a cap that brings back a
    killed service in less than 5 s, always: a supervisor that gives up needs a human.
    """
    recent = sum(1 for start in starts if 0 <= now - start < WINDOW_SECONDS)
    return min(PAUSE_CAP_SECONDS, PAUSE_STEP_SECONDS * max(0, recent + 1 - FREE_STARTS))


def read_environment(path: Path) -> dict[str, str]:
    """A private environment file: one JSON object of strings."""
    environment: dict[str, str] = json.loads(path.read_text())
    return environment


def record_start(path: Path) -> None:
    """Wait if this program keeps dying, then note the start: one line with the epoch seconds and our process id."""
    lines = path.read_text().splitlines()[-KEPT_STARTS:] if path.exists() else []
    time.sleep(pause_seconds([float(line.split()[0]) for line in lines], time.time()))
    lines.append(f"{time.time():.3f} {os.getpid()}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="child")
    parser.add_argument("--environment", type=Path, help="JSON file; what is set already wins with --optional")
    parser.add_argument("--optional", action="store_true", help="the file may be missing, and yields to what is set")
    parser.add_argument("--starts", type=Path, help="where to note the starts")
    parser.add_argument("--parent-signal", default="TERM", help="what to send to the program when its parent dies")
    parser.add_argument("--parent-pid-variable", help="the variable that holds the parent's process id")
    parser.add_argument("--metrics-ports", help="PORTCULLIS_METRICS_PORT of each replica, separated by commas")
    parser.add_argument("--number", type=int, default=0, help="which replica this is")
    parser.add_argument("--patient", action="store_true", help="see infra.embedded.process.be_patient")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if arguments.parent_pid_variable is not None:
        parent_pid = int(os.environ[arguments.parent_pid_variable])
        die_with_parent(signal.Signals[f"SIG{arguments.parent_signal}"], parent_pid)
    environment = dict(os.environ)
    if arguments.environment is not None:
        if not arguments.optional:
            environment.update(read_environment(arguments.environment))
        elif arguments.environment.exists():
            environment = read_environment(arguments.environment) | environment
    if arguments.metrics_ports is not None:
        environment["PORTCULLIS_METRICS_PORT"] = arguments.metrics_ports.split(",")[arguments.number]
    if arguments.starts is not None:
        record_start(arguments.starts)
    if arguments.patient:
        be_patient()
    os.execvpe(arguments.command[0], arguments.command, environment)  # noqa: S606


if __name__ == "__main__":
    main()
