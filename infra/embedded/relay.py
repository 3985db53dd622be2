"""Runs a command and hands it a signal that only we were sent.

`just` takes SIGINT for a key that its children have felt as well, and waits for them. Whoever sends it to the one process that
`./run up` is for them (a script, a service manager) would wait in vain. Runs on any Python 3.11 without packages.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

if __package__:
    from infra.embedded.process import die_with_parent
else:  # started by its path, before any virtual environment exists
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from process import die_with_parent  # type: ignore[import-not-found, no-redef]


def main(command: list[str]) -> int:
    """Run `command` until its end; returns its exit status (128 + number when a signal ended it)."""
    us = os.getpid()
    child = subprocess.Popen(command, preexec_fn=lambda: die_with_parent(signal.SIGTERM, us))  # noqa: PLW1509, S603

    def forward(_: int, __: FrameType | None) -> None:
        child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
