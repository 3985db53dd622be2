"""What one stage has to tell of itself: to Prometheus, and to whoever asks `$SRV.STATS` (NATS ADR-32)."""

from __future__ import annotations

import time
from collections.abc import Callable

from nats.micro.service import EndpointInfo, EndpointStats
from prometheus_client import Counter, Histogram

from libs.common import telemetry
from libs.common.errors import CATALOGUE, ErrorCode
from libs.common.recent import RecentDurations

OK = "ok"
REFUSED = "refused"
FAILED = "failed"
EXPIRED = "expired"
"""The outcome of a message whose deadline has passed: dropped, or given up in the middle."""


def result_of(outcome: str) -> str:
    """`ok`; `refused`, when the message itself gave the reason (4xx at the edge); `failed`, when this system did."""
    if outcome == OK:
        return OK
    if outcome == EXPIRED:
        return FAILED
    return REFUSED if CATALOGUE[ErrorCode(outcome)].status < 500 else FAILED


class EndpointMeter:
    """What an endpoint of this process tells `$SRV.STATS`. `in_flight`: being worked on; `queued`: nobody works on it yet."""

    def __init__(
        self, name: str, subject: str, queue_group: str, *, in_flight: Callable[[], int], queued: Callable[[], int]
    ) -> None:
        self.subject = subject
        self.requests = 0
        self.last_error = ""
        self._name = name
        self._queue_group = queue_group
        self._in_flight = in_flight
        self._queued = queued
        self._failed = 0
        self._refused = 0
        self._processing_ns = 0
        self._recent = RecentDurations()

    def add(self, result: str, spent_ns: int | None) -> None:
        """`result`: as of `result_of`. `spent_ns` None: turned away before any work, which says nothing about durations."""
        self.requests += 1
        self._failed += result == FAILED
        self._refused += result == REFUSED
        if spent_ns is not None:
            self._processing_ns += spent_ns
            self._recent.add(spent_ns, time.perf_counter_ns())

    def info(self) -> EndpointInfo:
        return EndpointInfo(name=self._name, subject=self.subject, queue_group=self._queue_group, metadata={})

    def stats(self) -> EndpointStats:
        """`data`: what waits and is under way now, and percentiles of about the last 10 s in milliseconds (null: no messages).

        `refused`: how many of the errors, ever, were the message's own fault.
        """
        now_ns = time.perf_counter_ns()
        return EndpointStats(
            name=self._name,
            subject=self.subject,
            queue_group=self._queue_group,
            num_requests=self.requests,
            num_errors=self._failed + self._refused,
            processing_time=self._processing_ns,
            average_processing_time=self._processing_ns // self.requests if self.requests else 0,
            last_error=self.last_error,
            data={
                "in_flight": self._in_flight(),
                "queued": self._queued(),
                "refused": self._refused,
                "p50_ms": self._recent.percentile_ms(0.5, now_ns),
                "p99_ms": self._recent.percentile_ms(0.99, now_ns),
            },
        )


class StageMeter(EndpointMeter):
    """Counts of one subject in this process, for Prometheus too. `limit`: how many messages it works on at most."""

    def __init__(
        self, name: str, subject: str, queue_group: str, limit: int, *, in_flight: Callable[[], int], queued: Callable[[], int]
    ) -> None:
        super().__init__(name, subject, queue_group, in_flight=in_flight, queued=queued)
        # `labels()` costs more than the counting; outcomes are few.
        self._series: dict[str, tuple[str, Counter, Histogram]] = {}
        telemetry.STAGE_IN_FLIGHT.labels(subject).set_function(in_flight)
        telemetry.STAGE_QUEUED.labels(subject).set_function(queued)
        telemetry.STAGE_LIMIT.labels(subject).set(limit)
        self._of(OK)
        for trouble in (ErrorCode.OVERLOADED, ErrorCode.INTERNAL):
            # From the start: the first of a series that appears with it is no increase, and there are alerts on these.
            telemetry.STAGE_REQUESTS.labels(subject, trouble)

    def count(self, outcome: str, spent_ns: int | None) -> None:
        """One message, done with; `spent_ns` as of `add`."""
        result, requests, durations = self._of(outcome)
        requests.inc()
        if outcome != OK:
            self.last_error = outcome
        if spent_ns is not None:
            durations.observe(spent_ns / 1e9, telemetry.exemplar())
        self.add(result, spent_ns)

    def _of(self, outcome: str) -> tuple[str, Counter, Histogram]:
        series = self._series.get(outcome)
        if series is None:
            result = result_of(outcome)
            series = self._series[outcome] = (
                result,
                telemetry.STAGE_REQUESTS.labels(self.subject, outcome),
                telemetry.STAGE_DURATION.labels(self.subject, result),
            )
        return series
