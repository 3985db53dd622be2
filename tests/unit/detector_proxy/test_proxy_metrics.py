"""What the proxy counts of engines and verdicts."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from prometheus_client import REGISTRY

from libs.common.clock import ManualClock
from libs.common.context import RequestContext, new_request_id, new_traceparent
from libs.common.contracts import DetectPayload, Verdict
from services.detector_proxy.metrics import count_verdict
from services.detector_proxy.ports import EngineError
from tests.unit.detector_proxy.fakes import FakeEngine, HeldEngine, guarded

PAYLOAD = DetectPayload(text="Hello")
CONTEXT = RequestContext(int((time.time() + 5) * 1000), new_request_id(), new_traceparent())


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"portcullis_{name}", labels) or 0.0


async def test_durations_are_of_calls_that_were_made_by_their_result() -> None:
    clock = ManualClock()

    def counts() -> tuple[float, float]:
        return (
            sample("engine_duration_seconds_count", role="primary", result="ok"),
            sample("engine_duration_seconds_count", role="primary", result="failed"),
        )

    ok, failed = counts()
    await guarded(FakeEngine(), clock).detect(PAYLOAD, CONTEXT, 1)
    broken = guarded(FakeEngine(EngineError("unreachable")), clock)
    with pytest.raises(EngineError, match="unreachable"):
        await broken.detect(PAYLOAD, CONTEXT, 1)
    with pytest.raises(EngineError, match="no_time"):
        await broken.detect(PAYLOAD, CONTEXT, 0)
    assert counts() == (ok + 1, failed + 1)


async def test_calls_under_way_are_shown_with_their_limit() -> None:
    engine = HeldEngine()
    one = guarded(engine, ManualClock(), max_concurrency=3)
    asked = [asyncio.create_task(one.detect(PAYLOAD, CONTEXT, 5)) for _ in range(2)]
    await asyncio.sleep(0)
    assert sample("engine_in_flight", role="primary", lane="single") == 2
    assert sample("engine_in_flight_limit", role="primary", lane="single") == 3
    engine.release.set()
    await asyncio.gather(*asked)
    assert sample("engine_in_flight", role="primary", lane="single") == 0


def test_verdicts_and_their_threats_are_counted() -> None:
    verdict = Verdict(
        is_malicious=True,
        confidence=0.9,
        threat_types=("jailbreak", "injection"),
        endpoint="m",
        degraded=False,
        coverage=None,
    )
    labels = {"verdict": "malicious", "degraded": "true"}
    before, jailbreaks = sample("verdicts_total", **labels), sample("threats_total", threat="jailbreak")
    count_verdict(msgspec.structs.replace(verdict, degraded=True))
    assert sample("verdicts_total", **labels) == before + 1
    assert sample("threats_total", threat="jailbreak") == jailbreaks + 1
