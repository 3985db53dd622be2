"""What Linux offers a process of the stack: an end with the one that started it, and patience about its turn."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h; the setting survives exec."""


def be_patient() -> None:
    """Have this process, and what it becomes, wait for a processor until whoever runs there pauses or has had its turn.

    A stage that writes to NATS wakes it, and an ordinary process that wakes is given the processor of the one that woke it: each
    message changed processes several times more than its path is long. SCHED_BATCH (sched(7)) does without that, so a stage ends
    what it has in hand, and NATS finds several messages at once. No effect on other systems than Linux and where it is forbidden.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def die_with_parent(signal_number: signal.Signals, parent_pid: int | None = None) -> None:
    """Have the kernel send `signal_number` to this process when its parent dies, however that happens.

    With `parent_pid`: end at once when that parent has already gone. Other systems than Linux: no effect.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number))
    if parent_pid is not None and os.getppid() != parent_pid:
        raise SystemExit(1)
