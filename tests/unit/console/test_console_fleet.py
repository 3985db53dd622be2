"""The fleet as the console sees it, from answers to STATS as nats-py writes them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from libs.common import micro, subjects
from libs.common.contracts import BreakerChanged, BreakerReport, BreakerState, BreakerStatus, Reply, encode, raw
from services.console.fleet import GONE_SECONDS, HISTORY, HTTP_DETECT, MAX_GONE, MAX_NEWS, Fleet, Flow, Picture, Stage


def endpoint(
    subject: str, requests: int, errors: int = 0, *, spent_ms: float = 0, queue_group: str = "q", **data: Any
) -> dict[str, Any]:
    return {
        "name": subject.replace(".", "-"),
        "subject": subject,
        "queue_group": queue_group,
        "num_requests": requests,
        "num_errors": errors,
        "last_error": "",
        "processing_time": int(spent_ms * 1e6),
        "average_processing_time": 0,
        "data": {"in_flight": 0, "queued": 0, "p50_ms": None, "p99_ms": None, "refused": 0} | data,
    }


def stats(service: str, replica: str = "a", *endpoints: dict[str, Any], **metadata: str) -> bytes:
    return msgspec.json.encode(
        {
            "type": "io.nats.micro.v1.stats_response",
            "name": f"portcullis-{service}".replace("_", "-"),
            "id": f"{service}-{replica}",
            "version": "0.1.0",
            "started": "2026-01-01T00:00:00.000Z",
            "metadata": {micro.STATUS: "ok", micro.INSTANCE: f"{service}-{replica}-instance"}
            | {key.replace("__", "."): value for key, value in metadata.items()},
            "endpoints": list(endpoints),
        }
    )


class Watched:
    """A fleet that is looked at once a second."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.now = 100.0

    def look(self, *answers: bytes, seconds: float = 1.0) -> Picture:
        self.now += seconds
        self.fleet.look(answers, self.now, self.now * 1000)
        return self.picture()

    def picture(self) -> Picture:
        return self.fleet.picture(self.now * 1000, connected=True)


def stage(picture: Picture, name: str) -> Stage:
    return next(each for each in picture.stages if each.name == name)


def limiter(requests: int, errors: int = 0, **data: Any) -> dict[str, Any]:
    return endpoint(subjects.DETECT_AUTHENTICATED, requests, errors, **data)


def test_rates_are_of_the_last_ten_seconds() -> None:
    watched = Watched()
    for second in range(31):
        count = second * 5 if second < 20 else 100 + (second - 20) * 50
        picture = watched.look(stats("limiter", "a", limiter(count)))
    assert stage(picture, "limiter").flow.rate == pytest.approx(50)
    assert watched.look(stats("limiter", "a", limiter(650))).stages[2].flow.rate == pytest.approx(50)


def test_refusals_and_failures_are_told_apart() -> None:
    watched = Watched()
    watched.look(stats("limiter", "a", limiter(0)))
    picture = watched.look(stats("limiter", "a", limiter(100, 30, refused=28, in_flight=3, queued=4)))
    flow = stage(picture, "limiter").flow
    assert (flow.rate, flow.failed, flow.refused, flow.in_flight, flow.queued) == (100, 2, 28, 3, 4)


def test_what_only_serves_the_running_of_things_is_not_counted() -> None:
    watched = Watched()
    broadcast = endpoint(subjects.BREAKERS_LIST, 0, queue_group="")
    watched.look(stats("detector_proxy", "a", broadcast))
    picture = watched.look(stats("detector_proxy", "a", endpoint(subjects.BREAKERS_LIST, 50, queue_group="")))
    assert stage(picture, "detector_proxy").flow.rate == 0


def test_replicas_add_up_and_the_worst_percentile_counts() -> None:
    watched = Watched()
    watched.look(stats("limiter", "a", limiter(0)), stats("limiter", "b", limiter(0)))
    picture = watched.look(
        stats("limiter", "a", limiter(30, p50_ms=2.0, p99_ms=5.0)), stats("limiter", "b", limiter(10, p50_ms=6.0, p99_ms=80.0))
    )
    flow = stage(picture, "limiter").flow
    assert (flow.rate, flow.p50_ms, flow.p99_ms) == (40, 3.0, 80.0)
    assert [replica.flow.p99_ms for replica in stage(picture, "limiter").replicas] == [5.0, 80.0]


def test_durations_are_those_of_single_texts_as_long_as_there_are_any() -> None:
    watched = Watched()

    def edge(detect: Any, batch: Any) -> bytes:
        return stats(
            "edge",
            "a",
            endpoint(HTTP_DETECT, 10, p50_ms=detect, p99_ms=detect),
            endpoint("http-batch", 1, p50_ms=batch, p99_ms=batch),
        )

    assert stage(watched.look(edge(7.0, 60_000.0)), "edge").flow.p99_ms == 7.0
    assert stage(watched.look(edge(None, 60_000.0)), "edge").flow.p99_ms == 60_000.0


def test_without_percentiles_the_mean_is_there() -> None:
    watched = Watched()
    without = {"in_flight": 0}
    watched.look(stats("limiter", "a", limiter(0) | {"data": None}))
    picture = watched.look(stats("limiter", "a", limiter(10, spent_ms=30) | {"data": without}))
    assert stage(picture, "limiter").flow == Flow(rate=10, mean_ms=3.0)


def test_a_counter_that_went_back_is_no_negative_rate() -> None:
    watched = Watched()
    watched.look(stats("limiter", "a", limiter(1000, 10)))
    flow = stage(watched.look(stats("limiter", "a", limiter(3))), "limiter").flow
    assert (flow.rate, flow.failed) == (0, 0)


# --- who is there --------------------------------------------------------------------------------------------------------


def test_a_replica_that_falls_silent_is_shown_as_gone_and_then_forgotten() -> None:
    watched = Watched()
    watched.look(stats("limiter", "a", limiter(0)), stats("limiter", "b", limiter(0)))
    once = stage(watched.look(stats("limiter", "a", limiter(1))), "limiter")
    assert [each.presence for each in once.replicas] == ["up", "up"]  # one lost answer may be a busy moment
    picture = watched.look(stats("limiter", "a", limiter(2)))
    limiters = stage(picture, "limiter")
    assert [(each.instance, each.presence) for each in limiters.replicas] == [
        ("limiter-a-instance", "up"),
        ("limiter-b-instance", "gone"),
    ]
    assert (limiters.up, limiters.status) == (1, "ok")
    assert limiters.flow.rate == stage(picture, "limiter").replicas[0].flow.rate
    assert (picture.news[0].kind, picture.news[0].subject) == ("gone", "limiter")
    later = watched.look(stats("limiter", "a", limiter(3)), seconds=GONE_SECONDS + 1)
    assert len(stage(later, "limiter").replicas) == 1


def test_a_replica_that_has_said_goodbye_has_left() -> None:
    watched = Watched()
    watched.look(stats("auth", "a"))
    watched.fleet.leaves("auth-a-instance")
    picture = watched.look()
    assert (stage(picture, "auth").replicas[0].presence, stage(picture, "auth").status) == ("left", "down")
    assert picture.news[0].kind == "left"


def test_a_replica_that_comes_back_is_up_again() -> None:
    watched = Watched()
    watched.look(stats("auth", "a"))
    watched.look()
    assert stage(watched.look(), "auth").replicas[0].presence == "gone"
    picture = watched.look(stats("auth", "a"))
    assert stage(picture, "auth").replicas[0].presence == "up"
    assert [each.what for each in picture.news] == ["auth-a-i is back", "auth-a-i is gone"]


def test_who_comes_later_is_news_and_who_was_there_is_not() -> None:
    watched = Watched()
    assert watched.look(stats("auth", "a")).news == ()
    assert [each.kind for each in watched.look(stats("auth", "a"), stats("auth", "b")).news] == ["came"]


def test_memory_is_bounded_whoever_comes_and_goes() -> None:
    watched = Watched()
    for number in range(500):
        watched.look(stats("auth", str(number)))
    picture = watched.picture()
    assert len(stage(picture, "auth").replicas) <= MAX_GONE + 4
    assert len(picture.news) == MAX_NEWS
    assert len(watched.fleet.history()["auth"]) == HISTORY


def test_a_curve_has_a_point_for_each_second_however_often_somebody_looks() -> None:
    watched = Watched()
    watched.look(stats("auth", "a", endpoint("auth.v1.check", 0)))
    watched.look(stats("auth", "a", endpoint("auth.v1.check", 50)), seconds=5.0)
    watched.look(stats("auth", "a", endpoint("auth.v1.check", 51)))
    assert [point.rate for point in watched.fleet.history()["auth"]] == [0.0, 10.0, 10.0, 10.0, 10.0, 10.0, 8.5]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b'{"name":"portcullis-auth"}',
        b'{"name":"portcullis-auth","id":7}',
        b'{"name":"somebody-else","id":"x","endpoints":[]}',
        b'{"name":"portcullis-nobody","id":"x"}',
        b'{"name":"portcullis-auth","id":"x","endpoints":[{"name":"e","num_requests":"many"}]}',
    ],
)
def test_answers_that_are_none_are_left_out(answer: bytes) -> None:
    picture = Watched().look(answer, stats("limiter"))
    assert [each.up for each in picture.stages] == [0, 0, 1, 0, 0, 0]


def test_a_stage_is_as_well_as_its_replicas_say() -> None:
    watched = Watched()

    def status(*answers: bytes) -> str:
        return stage(watched.look(*answers), "limiter").status

    assert status() == "down"
    assert status(stats("limiter", "a")) == "ok"
    assert status(stats("limiter", "a"), stats("limiter", "b", status="degraded")) == "degraded"
    assert status(stats("limiter", "a", status="down"), stats("limiter", "b", status="down")) == "down"


# --- engines, breakers, stores -------------------------------------------------------------------------------------------


def test_engine_and_stores_are_the_worst_that_any_replica_knows() -> None:
    def proxy(replica: str, engine: str, breaker: str) -> bytes:
        facts = {"engine__configured": "detect", "engine__name": "mine", "engine__status": engine, "engine__breaker": breaker}
        return stats("detector_proxy", replica, **facts)

    picture = Watched().look(
        proxy("a", "up", "closed"),
        proxy("b", "down", "open"),
        stats("limiter", "a", store__redis="up"),
        stats("limiter", "b", store__redis="down"),
        stats("auth", "a", store__postgres="up"),
    )
    assert (picture.engine.kind, picture.engine.name, picture.engine.status, picture.engine.breaker) == (
        "detect",
        "mine",
        "down",
        "open",
    )
    assert picture.stores == {"nats": "up", "redis": "down", "postgres": "up"}


def report(replica: str, **states: BreakerState) -> bytes:
    statuses = tuple(
        BreakerStatus(name=name, state=state, replica=replica, failures=1, successes=2) for name, state in states.items()
    )
    return encode(Reply(result=raw(BreakerReport(replica=replica, breakers=statuses))))


def test_a_breaker_is_as_open_as_its_most_open_replica_and_the_primary_comes_first() -> None:
    watched = Watched()
    watched.fleet.look_at_breakers(
        [report("b", fallback="closed", primary="half_open"), report("a", primary="open"), b"garbage", encode(Reply())]
    )
    breakers = watched.picture().breakers
    assert [(each.name, each.state, [one.replica for one in each.replicas]) for each in breakers] == [
        ("primary", "open", ["a", "b"]),
        ("fallback", "closed", ["b"]),
    ]


def test_changes_of_breakers_are_news() -> None:
    watched = Watched()
    change = BreakerChanged(name="primary", replica="r" * 16, before="closed", after="half_open", at="", reason="5 failures")
    watched.fleet.breaker_changed(change, 5.0)
    (news,) = watched.picture().news
    assert (news.kind, news.subject, news.what, news.detail) == (
        "breaker",
        "primary",
        "closed → half-open",
        "5 failures (rrrrrrrr)",
    )
