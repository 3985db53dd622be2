"""supervisord with three habits of our own.

- The edge's listening socket stays open while no edge runs, so that callers wait in its queue instead of being refused
  (supervisor closes a socket with the last process that uses it).
- A process that ends is started again in the same turn of the loop, not up to a second later.
- With `PORTCULLIS_DIE_WITH_PARENT` set, it stops when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from supervisor.medusa.asyncore_25 import ExitNow
from supervisor.options import ServerOptions
from supervisor.process import FastCGIProcessGroup
from supervisor.supervisord import Supervisor

from infra.embedded.process import die_with_parent

DIE_WITH_PARENT_VARIABLE = "PORTCULLIS_DIE_WITH_PARENT"
"""Holds the process id of the parent."""

SUPERVISOR_PID_VARIABLE = "PORTCULLIS_SUPERVISOR_PID"
"""Set for the children, so that each can tell whether its parent is still there."""


class HoldingSupervisor(Supervisor):  # type: ignore[misc]  # supervisor has no types
    """See the module."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._held: list[Any] = []

    def add_process_group(self, config: Any) -> bool:
        added: bool = super().add_process_group(config)
        group = self.process_groups[config.name]
        if added and isinstance(group, FastCGIProcessGroup):
            self._held.append(group.socket_manager.get_socket())
        return added

    def ordered_stop_groups_phase_1(self) -> None:
        # Once we stop, nobody will serve the queue any more: the socket goes with the last edge.
        self._held.clear()
        super().ordered_stop_groups_phase_1()

    def tick(self, now: float | None = None) -> None:
        super().tick(now)
        for group in self.process_groups.values():
            group.transition()


def main(arguments: list[str]) -> None:
    parent = os.environ.pop(DIE_WITH_PARENT_VARIABLE, None)
    if parent is not None:
        die_with_parent(signal.SIGTERM, int(parent))
    os.environ[SUPERVISOR_PID_VARIABLE] = str(os.getpid())
    options = ServerOptions()
    options.realize(arguments)
    options.first = True
    with contextlib.suppress(ExitNow):  # how its loop ends
        HoldingSupervisor(options).main()
    options.close_httpservers()
    options.close_logger()


if __name__ == "__main__":
    main(sys.argv[1:])
