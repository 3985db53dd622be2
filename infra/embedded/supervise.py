"""supervisord with four habits of our own.

- The edge's listening socket stays open while no edge runs, so that callers wait in its queue instead of being refused
  (supervisor closes a socket with the last process that uses it).
- A process that ends is noticed and started again at once. Supervisor looks once a second: a signal does not end its poll
  since Python retries interrupted calls (PEP 475), and a new start waits for the next turn.
- What it writes is for its owner's eyes only.
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


class _Wakeup:
    """A pipe that every signal writes to, as supervisor's loop likes its files: it ends the poll."""

    def __init__(self) -> None:
        self.fd, write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        os.read(self.fd, 4096)


class PromptSupervisor(Supervisor):  # type: ignore[misc]  # supervisor has no types
    """See the module."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._held: list[Any] = []
        self._wakeup = _Wakeup()

    def get_process_map(self) -> dict[int, Any]:
        process_map: dict[int, Any] = super().get_process_map()
        process_map[self._wakeup.fd] = self._wakeup
        return process_map

    def runforever(self) -> None:
        self._start_what_should_run()
        super().runforever()

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
        self._start_what_should_run()

    def _start_what_should_run(self) -> None:
        for group in sorted(self.process_groups.values()):
            group.transition()


def main(arguments: list[str]) -> None:
    parent = os.environ.pop(DIE_WITH_PARENT_VARIABLE, None)
    if parent is not None:
        die_with_parent(signal.SIGTERM, int(parent))
    os.environ[SUPERVISOR_PID_VARIABLE] = str(os.getpid())
    os.umask(0o077)  # logs and data are the owner's; supervisor sets its own umask only when it becomes a daemon
    options = ServerOptions()
    options.realize(arguments)
    options.first = True
    options.test = False
    with contextlib.suppress(ExitNow):  # how its loop ends
        PromptSupervisor(options).main()
    options.close_httpservers()
    options.close_logger()


if __name__ == "__main__":
    main(sys.argv[1:])
