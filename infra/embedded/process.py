"""What Linux offers so that no process outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h; the setting survives exec."""


def die_with_parent(signal_number: signal.Signals, parent_pid: int | None = None) -> None:
    """Have the kernel send `signal_number` to this process when its parent dies, however that happens.

    With `parent_pid`: end at once when that parent has already gone. Other systems than Linux: no effect.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number))
    if parent_pid is not None and os.getppid() != parent_pid:
        raise SystemExit(1)
