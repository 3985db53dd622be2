"""What a stage tells of itself."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics

from libs.common import meter, tracing
from libs.common.errors import ErrorCode

SUBJECT = "meter.test"


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"subject": SUBJECT, **labels})


def made(*, in_flight: int = 0, queued: int = 0) -> meter.StageMeter:
    return meter.StageMeter("meter-test", SUBJECT, "q", 7, in_flight=lambda: in_flight, queued=lambda: queued)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_has_a_result(code: ErrorCode) -> None:
    assert meter.result_of(code) in ("refused", "failed")


def test_results_tell_whose_fault_it_is() -> None:
    found = {outcome: meter.result_of(outcome) for outcome in ("ok", "expired", "rate_limited", "invalid_field", "internal")}
    assert found == {
        "ok": "ok",
        "expired": "failed",
        "rate_limited": "refused",
        "invalid_field": "refused",
        "internal": "failed",
    }


def test_stats_and_metrics_agree() -> None:
    stage = made(in_flight=3, queued=2)
    before = value("portcullis_stage_requests_total", outcome="ok") or 0
    for _ in range(3):
        stage.count(meter.OK, 2_000_000)
    stage.count(ErrorCode.RATE_LIMITED, 1_000_000)
    stats = stage.stats()
    assert (stats.num_requests, stats.num_errors, stats.last_error) == (4, 1, "rate_limited")
    assert (stats.processing_time, stats.average_processing_time) == (7_000_000, 1_750_000)
    assert stats.data is not None
    assert (stats.data["in_flight"], stats.data["queued"]) == (3, 2)
    assert stats.data["p50_ms"] == pytest.approx(2, rel=0.07)
    assert value("portcullis_stage_requests_total", outcome="ok") == before + 3
    assert value("portcullis_stage_in_flight") == 3
    assert value("portcullis_stage_queued") == 2
    assert value("portcullis_stage_in_flight_limit") == 7


def test_what_was_turned_away_is_counted_and_says_nothing_of_durations() -> None:
    stage = made()
    before = value("portcullis_stage_duration_seconds_count", result="refused") or 0
    stage.count(ErrorCode.OVERLOADED, None)
    stats = stage.stats()
    assert (stats.num_requests, stats.num_errors) == (1, 1)
    assert stats.data is not None
    assert stats.data["p99_ms"] is None
    assert value("portcullis_stage_duration_seconds_count", result="refused") == before


def test_a_duration_leads_to_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    monkeypatch.setattr(tracing, "current_trace_id", lambda: trace_id)
    made().count(meter.OK, 300_000_000)
    assert f'{{trace_id="{trace_id}"}} 0.3' in open_metrics(REGISTRY).decode()  # type: ignore[no-untyped-call]
    assert trace_id not in generate_latest().decode()  # the public page is of this format
