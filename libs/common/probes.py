"""What an orchestrator asks a process: does it run, does it take work? Told over HTTP, on the port of the metrics.

The edge's own `/health/ready` says whether a detection would be answered, by anybody: were that a probe, a stage that is away
would take every edge out of its balancer, and callers would get no answer at all in place of one that says what is wrong. These
two are about this process alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

LIVE_PATH: Final = "/health/live"
"""200 while the event loop turns; 503: it has not for `STALE_SECONDS`, and a new process would help."""
READY_PATH: Final = "/health/ready"
"""200 while this process takes messages: it has what it needs to start, is connected to NATS and has not been told to stop."""
STALE_SECONDS: Final = 10.0

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ProcessHealth:
    """The state of this process; asked from another thread than the one that keeps it."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.takes_work: Callable[[], bool] = lambda: False
        """Set by whoever runs the service; a read of flags, nothing that waits."""
        self._monotonic = monotonic
        self._beat_at = monotonic()

    def beat(self) -> None:
        """The event loop has come round."""
        self._beat_at = self._monotonic()

    @property
    def live(self) -> bool:
        return self._monotonic() - self._beat_at < STALE_SECONDS

    @property
    def ready(self) -> bool:
        return self.live and self.takes_work()


def beside(application: Wsgi, health: ProcessHealth) -> Wsgi:
    """`application`, and the two probes on paths of their own."""
    probes = {LIVE_PATH: lambda: health.live, READY_PATH: lambda: health.ready}

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        probe = probes.get(environ["PATH_INFO"])
        if probe is None:
            return application(environ, start_response)
        good = probe()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if good else b"no\n"]

    return answer
