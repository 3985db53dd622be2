"""How many processors this process may use: the container's share, not the host's."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path
from typing import Final

CGROUP: Final = Path("/sys/fs/cgroup")
BULK_NICENESS: Final = 10
"""A tenth of the weight of niceness 0 in the kernel's scheduler."""


def usable(cgroup: Path = CGROUP) -> int:
    """Whole processors, at least 1: the affinity mask, or less where the cgroup (version 2, else 1) has a quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _quota(cgroup)
    return max(1, math.floor(min(allowed, quota) if quota else allowed))


def _quota(cgroup: Path) -> float | None:
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit == "max" or int(limit) <= 0:
        return None
    return int(limit) / int(period)


def layout(sessions: int, threads: int, processors: int) -> tuple[int, int]:
    """Sessions and threads of each; 0 stands for "choose". One thread a session gives the most texts a second."""
    if not sessions:
        sessions = max(1, processors // threads) if threads else processors
    return sessions, threads or max(1, processors // sessions)


def give_way() -> None:
    """Let the calling thread run when nobody else wants the processor, or for a tenth of the time when somebody does.

    What runs in such a thread fills idle processors and is pushed aside at once by a thread of ordinary priority. Linux
    alone has priorities by thread; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BULK_NICENESS)
