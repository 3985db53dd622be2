"""Ending a background task for certain."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.5


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel `task` and wait until it has ended; if it had failed before, that is logged, not raised.

    Asks more than once: before Python 3.12 `asyncio.wait_for`, which nats-py waits with, loses a cancellation that arrives
    together with what it waits for (bpo-37658), and the task goes on as if nothing had been said.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_SECONDS)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a task in the background had failed: %s: %s", type(error).__name__, error)
