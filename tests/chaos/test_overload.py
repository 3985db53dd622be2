"""Twice as much as the stack can do: it goes on doing what it can, in time, and tells the others at once.

The short form asks for ratios that hold on a machine with other things to do. `PORTCULLIS_TEST_OVERLOAD_SECONDS=120` gives the
long form, whose bars are meant for a machine that does nothing else; docs/operations/overload.md has its figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from libs.common.retries import FLOOR_PER_SECOND, SHARE
from tests.chaos.kit import Stack, wait_for_detection
from tests.chaos.overload import Callers, Volley, calling

LONG_SECONDS = float(os.environ.get("PORTCULLIS_TEST_OVERLOAD_SECONDS", "0"))
DEADLINE_SECONDS = 10.0 if LONG_SECONDS else 3.0
OVERLOAD_SECONDS = LONG_SECONDS or 8.0
PEAK_SECONDS = 10.0 if LONG_SECONDS else 3.0
GOODPUT_SHARE = 0.8 if LONG_SECONDS else 0.5
NORMAL_SECONDS = 10.0
OURS_SECONDS = 1.0
"""What an answer may be late by for want of a processor, here or there."""
PEAK_CALLERS = 16


QUICK, REFUSED = "refused within 50 ms", "refused"


def _counted(stack: Stack) -> Mapping[str, float]:
    """What all processes count, by family; and how quickly the edge has refused texts, by its own clock."""
    totals: defaultdict[str, float] = defaultdict(float)
    for group in json.loads((stack.home / "prometheus" / "targets.json").read_text()):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
                for family in text_string_to_metric_families(page.read().decode()):
                    totals[family.name] += sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
                    if family.name == "portcullis_http_request_duration_seconds":
                        refused = [
                            sample
                            for sample in family.samples
                            if (sample.labels["route"], sample.labels["status_class"]) == ("/v1/detect", "4xx")
                        ]
                        totals[QUICK] += sum(sample.value for sample in refused if sample.labels.get("le") == "0.05")
                        totals[REFUSED] += sum(sample.value for sample in refused if sample.name.endswith("_count"))
    return totals


async def _normal_again(load: Callers, rate: float) -> tuple[float, Volley]:
    """Seconds until a light load is answered in full; and how it was."""
    began = time.monotonic()
    while True:
        volley = await load.open(rate, 1.0)
        if set(volley.statuses()) == {200} or time.monotonic() - began > NORMAL_SECONDS + 1:
            return time.monotonic() - began, volley


async def test_twice_the_capacity_is_done_as_well_as_can_be_and_the_rest_refused_at_once(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    async with calling(stack, DEADLINE_SECONDS) as load:
        await load.closed(PEAK_CALLERS, 1.0)  # warm
        peak = await load.closed(PEAK_CALLERS, PEAK_SECONDS)
        calm = await load.open(0.2 * peak.goodput, 2.0)
        before = await asyncio.to_thread(_counted, stack)
        over = await load.open(2 * peak.goodput, OVERLOAD_SECONDS)
        after = await asyncio.to_thread(_counted, stack)
        normal_seconds, normal = await _normal_again(load, 0.2 * peak.goodput)
        later = await load.closed(PEAK_CALLERS, PEAK_SECONDS)
    counted = {name: after[name] - before[name] for name in after}
    retries = counted["portcullis_pool_retries"] + counted["portcullis_requests_resent"]
    volleys = {"peak": peak, "calm": calm, "twice the peak": over, "after": normal, "peak again": later}
    for name, volley in volleys.items():
        print(f"{name}: {volley.summary()}")
    quick = counted[QUICK] / max(1.0, counted[REFUSED])
    print(f"normal after {normal_seconds:.1f} s; {retries:.0f} retries, {counted['portcullis_shed']:.0f} refused by the edge")
    print(f"{quick:.2%} of the refusals within 50 ms by the edge's clock; load of the machine {os.getloadavg()[0]:.1f}")

    assert all(shot.correct for volley in volleys.values() for shot in volley.shots)
    assert set(over.statuses()) <= {200, 429, 503, 504}, over.summary()
    # Before and after: what else the machine does is not the same for two minutes.
    assert over.goodput >= GOODPUT_SHARE * (peak.goodput + later.goodput) / 2, over.summary()
    assert over.latency(1, 200) <= DEADLINE_SECONDS + OURS_SECONDS, over.summary()
    assert all(shot.retry_after and int(shot.retry_after) >= 1 for shot in over.shots if shot.status in (429, 503))
    # Refused without work or waiting: no part of the time that a verdict takes. Most of all by the edge itself.
    assert over.latency(0.5, 429, 503) <= 0.5 * over.latency(0.5, 200), over.summary()
    # (Until the edge has found its limit, workers do it.)
    assert counted["portcullis_shed"] >= 0.25 * (over.statuses()[429] + over.statuses()[503]), counted
    assert over.statuses()[503] + over.statuses()[504] <= 0.1 * len(over.shots), over.summary()
    assert retries <= max(FLOOR_PER_SECOND * (over.seconds + 10), SHARE * len(over.shots)), retries
    assert normal_seconds <= NORMAL_SECONDS, normal.summary()
    assert set(normal.statuses()) == {200}, normal.summary()
    if LONG_SECONDS:
        assert over.latency(0.99, 200) <= 2.0, over.summary()
        # What callers see of it has their own share in it, on one machine with the rest.
        assert quick >= 0.99, quick
