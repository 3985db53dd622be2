"""Runs `just` and hands a signal to stop to what just runs, and to nobody else.

just takes SIGINT for a key that its children have felt as well, and waits for them: whoever sends it to the one process that
`./run up` is for them (a script, a service manager) would wait in vain. And whatever signal just is sent, it complains. So
the signals end here. Runs on any Python 3.11 without packages, before there is a virtual environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.embedded.process import die_with_parent


def main(command: list[str]) -> int:
    """Run `command` until its end; returns its exit status (128 + number when a signal ended it)."""
    us = os.getpid()
    child = subprocess.Popen(  # noqa: S603
        command,
        process_group=0,  # a Ctrl-C in the terminal reaches us alone
        preexec_fn=lambda: die_with_parent(signal.SIGTERM, us),
    )

    def forward(_: int, __: FrameType | None) -> None:
        listed = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        grandchildren = [int(pid) for pid in listed.read_text().split()] if listed.exists() else []
        for pid in grandchildren or [child.pid]:
            os.kill(pid, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
