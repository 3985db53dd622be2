from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from libs.common.contracts import ErrorBody
from libs.common.errors import ErrorCode
from services.jobs import core
from services.jobs.core import CREDIT_LIFE_SECONDS, MAX_FAILURES, SUSPECT_AFTER, Doubts, Outcome, Purse, Queue, Schedule
from tests.unit.jobs.fakes import BENIGN, BROKEN, JOB, MALICIOUS, record

ITEM = (JOB, 0)
AWAY = ErrorCode.STAGE_UNAVAILABLE
BEGIN_MS = 1_800_000_000_000


# --- counting ------------------------------------------------------------------------------------------------------------


def test_results_are_counted_by_position_and_the_last_one_ends_the_job() -> None:
    begun = core.count(record(), [(7, "benign"), (9, "malicious")], 1000)
    assert (begun.state, begun.done, begun.malicious, begun.failed, begun.position) == ("running", 2, 1, 0, 9)
    assert (begun.started_ms, begun.finished_ms) == (1000, None)
    ended = core.count(begun, [(12, "failed"), (20, "benign")], 3000)
    assert (ended.state, ended.done, ended.malicious, ended.failed, ended.position) == ("done", 4, 1, 1, 20)
    assert (ended.started_ms, ended.finished_ms) == (1000, 3000)


def test_nothing_new_changes_nothing() -> None:
    before = record(done=2, position=9, state="running")
    assert core.count(before, [], 5000) is before


def test_what_is_stored_after_a_cancellation_is_counted_and_the_job_stays_cancelled() -> None:
    cancelled = core.end(record(done=1, position=1), "cancelled", None, 500)
    counted = core.count(cancelled, [(2, "malicious"), (3, "benign"), (4, "benign")], 900)
    assert (counted.state, counted.done, counted.malicious, counted.position) == ("cancelled", 4, 1, 4)
    assert counted.finished_ms == 500


def test_a_job_that_has_had_its_time_fails() -> None:
    assert core.expire(record(created_ms=1000), 3000, 2000) is None
    expired = core.expire(record(created_ms=1000), 3001, 2000)
    assert expired is not None
    assert (expired.state, expired.finished_ms) == ("failed", 3001)
    assert expired.reason


def test_a_record_survives_being_written_down() -> None:
    full = record(webhook_url="https://example.com", webhook_secret="s", started_ms=1, threshold=0.4)
    assert msgspec.json.decode(msgspec.json.encode(full), type=core.JobRecord) == full


# --- speed ---------------------------------------------------------------------------------------------------------------


def steady(per_second: int, seconds: int, total: int = 1_000_000) -> core.JobRecord:
    job = core.started(record(total=total), BEGIN_MS)
    place = 0
    for second in range(1, seconds + 1):
        outcomes: list[tuple[int, Outcome]] = [(place + offset + 1, "benign") for offset in range(per_second)]
        place += per_second
        job = core.count(job, outcomes, BEGIN_MS + second * 1000)
    return job


def test_speed_and_end_of_a_steady_job() -> None:
    status = core.status_of(steady(10, 30, total=1000), BEGIN_MS + 30_000)
    assert status.items_per_second == pytest.approx(10)
    assert status.estimated_end_at == core.iso(BEGIN_MS + 100_000) == "2027-01-15T08:01:40.000Z"


def test_speed_forgets_what_was_minutes_ago() -> None:
    job = steady(100, 30)
    for second in range(31, 331):
        job = core.count(job, [(job.position + 1, "benign")], BEGIN_MS + second * 1000)
        if second > 30 + 120:  # the older mark is at most two spans back
            assert core.status_of(job, job.updated_ms).items_per_second == pytest.approx(1, rel=0.05)
            assert 60_000 <= job.updated_ms - job.mark_ms <= 121_000


def test_a_job_that_waits_for_its_keys_limits_becomes_slower_and_its_end_is_not_in_the_past() -> None:
    job = steady(60, 1, total=180)
    for waited in (1, 30, 59):
        status = core.status_of(job, BEGIN_MS + 1000 + waited * 1000)
        assert status.items_per_second == pytest.approx(60 / (1 + waited), abs=0.001)
        assert status.estimated_end_at is not None
        assert status.estimated_end_at > core.iso(BEGIN_MS + 1000 + waited * 1000)


def test_a_job_that_has_not_begun_has_no_speed_and_one_that_is_over_that_of_the_whole() -> None:
    assert core.status_of(record(), 0).items_per_second is None
    assert core.status_of(core.started(record(), 10), 20).estimated_end_at is None
    ended = core.count(core.started(record(), 1000), [(place, "benign") for place in range(1, 5)], 3000)
    status = core.status_of(ended, 9000)
    assert (status.items_per_second, status.estimated_end_at) == (2.0, None)


def test_the_secret_of_a_webhook_is_shown_only_where_it_is_asked_for() -> None:
    job = record(webhook_url="https://example.com/", webhook_secret="whsec_x")
    shown, hidden = core.status_of(job, 0, with_secret=True).webhook, core.status_of(job, 0).webhook
    assert shown is not None
    assert hidden is not None
    assert (shown.secret, hidden.secret) == ("whsec_x", None)


# --- ids -----------------------------------------------------------------------------------------------------------------


def test_job_ids_sort_by_time_and_are_the_same_for_the_same_request() -> None:
    ids = [core.new_job_id(deadline, f"origin-{deadline}") for deadline in (1, 999, 1_800_000_000_000, 1_800_000_000_001)]
    assert ids == sorted(ids)
    assert {len(each) for each in ids} == {28}
    assert core.new_job_id(5, "a") == core.new_job_id(5, "a") != core.new_job_id(5, "b")


# --- items ---------------------------------------------------------------------------------------------------------------


def test_outcomes() -> None:
    assert [core.outcome_of(each) for each in (BENIGN, MALICIOUS, BROKEN)] == ["benign", "malicious", "failed"]


def test_a_code_of_a_newer_release_is_taken_for_an_outage() -> None:
    assert core.code_of(ErrorBody(code="from_the_future", detail="")) == AWAY
    assert core.code_of(ErrorBody(code="internal", detail="")) == ErrorCode.INTERNAL


def test_an_item_is_given_up_after_five_failures_of_its_own() -> None:
    doubts = Doubts()
    given_up = [doubts.failed(ITEM, ErrorCode.INTERNAL, attributed=True) for _ in range(MAX_FAILURES)]
    assert given_up == [False] * 4 + [True]


@pytest.mark.parametrize("code", [code for code in ErrorCode if core.is_transient(code)])
def test_an_outage_gives_nothing_up_however_long_it_lasts(code: ErrorCode) -> None:
    doubts = Doubts()
    assert not any(doubts.failed(ITEM, code, attributed=True) for _ in range(1000))


@pytest.mark.parametrize("code", [ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED])
def test_a_refusal_for_want_of_room_casts_no_doubt(code: ErrorCode) -> None:
    doubts = Doubts()
    doubts.failed(ITEM, code, attributed=True)
    assert len(doubts) == 0


def test_an_item_of_several_dead_messages_is_sent_alone_and_given_up_while_others_go_through() -> None:
    doubts = Doubts()
    for _ in range(SUSPECT_AFTER):
        assert not doubts.alone(ITEM)
        doubts.failed(ITEM, AWAY, attributed=False)
    assert doubts.alone(ITEM)
    failures = 0
    while True:
        doubts.succeeded()
        failures += 1
        if doubts.failed(ITEM, AWAY, attributed=True):
            break
    assert failures == MAX_FAILURES


def test_a_suspect_is_unproven_until_something_goes_through() -> None:
    doubts = Doubts()
    for _ in range(SUSPECT_AFTER):
        assert not doubts.unproven(ITEM)
        doubts.failed(ITEM, AWAY, attributed=False)
    assert doubts.unproven(ITEM)
    doubts.succeeded()
    assert not doubts.unproven(ITEM)


def test_a_message_that_is_refused_for_one_of_its_items_is_taken_apart() -> None:
    doubts = Doubts()
    assert not doubts.failed(ITEM, ErrorCode.PAYLOAD_TOO_LARGE, attributed=False)
    assert doubts.alone(ITEM)
    assert [doubts.failed(ITEM, ErrorCode.PAYLOAD_TOO_LARGE, attributed=True) for _ in range(5)] == [False] * 4 + [True]


def test_what_has_its_result_or_whose_job_is_over_is_forgotten() -> None:
    doubts = Doubts()
    for item in ((JOB, 0), (JOB, 1), ("other", 0)):
        doubts.failed(item, ErrorCode.INTERNAL, attributed=True)
    doubts.clear((JOB, 0))
    assert len(doubts) == 2
    doubts.forget_job(JOB)
    assert len(doubts) == 1
    assert doubts.alone(("other", 0))


def test_pauses_of_an_item_double_and_end_at_a_minute() -> None:
    doubts, rng = Doubts(), random.Random(1)
    assert 0.75 <= doubts.retry_seconds(ITEM, rng) <= 1.25
    pauses = []
    for _ in range(10):
        doubts.failed(ITEM, ErrorCode.INTERNAL, attributed=True)
        pauses.append(doubts.retry_seconds(ITEM, rng))
    for expected, pause in zip([1, 2, 4, 8, 16, 32, 60, 60, 60, 60], pauses, strict=True):
        assert 0.75 * expected <= pause <= 1.25 * expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1], [1]),
        ([1] * 7, [3, 3, 1]),
        ([50, 50, 1], [2, 1]),
        ([101], [1]),
        ([1, 101, 1], [1, 1, 1]),
        ([100, 1], [1, 1]),
    ],
)
def test_messages_are_bounded_in_items_and_characters(sizes: list[int], expected: list[int]) -> None:
    assert core.split(sizes, 3, 100) == expected


# --- whose turn it is ----------------------------------------------------------------------------------------------------


def queue(key: str, job: str, waiting: int = 1000) -> Queue:
    return Queue(key, job, waiting, 0)


def served(schedule: Schedule, turns: int, now: float = 0.0) -> list[tuple[str, str]]:
    """Whose turns they were, each over before the next begins."""
    found = []
    for _ in range(turns):
        turn = schedule.take(now, 10)
        assert turn is not None
        key, job, _ = turn
        schedule.done(key, job)
        found.append((key, job))
    return found


def test_a_key_with_many_jobs_gets_no_more_than_one_with_one() -> None:
    schedule = Schedule(2)
    schedule.refresh([queue("many", f"job{number}") for number in range(9)] + [queue("one", "job")])
    turns = served(schedule, 36)
    assert sum(key == "one" for key, _ in turns) == 18
    assert {job for key, job in turns if key == "many"} == {f"job{number}" for number in range(9)}
    assert all(before[0] != after[0] for before, after in pairwise(turns))


def test_the_key_with_fewer_messages_in_flight_is_first() -> None:
    schedule = Schedule(2)
    schedule.refresh([queue("a", "1"), queue("b", "1")])
    first, second = schedule.take(0, 10), schedule.take(0, 10)
    assert {turn[0] for turn in (first, second) if turn is not None} == {"a", "b"}


def test_a_job_has_at_most_so_many_messages_in_flight() -> None:
    schedule = Schedule(2)
    schedule.refresh([queue("a", "1")])
    assert schedule.take(0, 10) is not None
    assert schedule.take(0, 10) is not None
    assert schedule.take(0, 10) is None
    schedule.done("a", "1")
    assert schedule.take(0, 10) == ("a", "1", 10)


def test_no_more_is_taken_than_waits() -> None:
    schedule = Schedule(2)
    schedule.refresh([queue("a", "1", 13)])
    assert [schedule.take(0, 10), schedule.take(0, 10)] == [("a", "1", 10), ("a", "1", 3)]
    schedule.done("a", "1")
    assert schedule.take(0, 10) is None


def test_blocked_keys_and_jobs_wait_their_time_and_a_refresh_does_not_free_them() -> None:
    schedule = Schedule(2)
    queues = [queue("a", "1"), queue("b", "1"), queue("b", "2")]
    schedule.refresh(queues)
    schedule.block_key("a", 5.0)
    schedule.block_job("b", "1", 3.0)
    schedule.refresh(queues)
    assert set(served(schedule, 4, 2.9)) == {("b", "2")}
    assert set(served(schedule, 4, 3.0)) == {("b", "1"), ("b", "2")}
    assert ("a", "1") in served(schedule, 1, 5.0)


def test_what_is_dropped_waits_for_the_next_look() -> None:
    schedule = Schedule(2)
    schedule.refresh([queue("a", "1")])
    schedule.drop("a", "1")
    assert schedule.take(0, 10) is None
    schedule.refresh([queue("a", "1")])
    assert schedule.take(0, 10) is not None


# --- units ---------------------------------------------------------------------------------------------------------------


def test_units_that_were_not_used_are_used_next() -> None:
    purse = Purse()
    purse.put("a", 5, 0.0)
    assert purse.take("b", 3, 1.0) == (0, 1.0)
    assert purse.take("a", 3, 1.0) == (3, 0.0)
    assert purse.take("a", 3, 1.0) == (2, 0.0)
    assert purse.take("a", 3, 1.0) == (0, 1.0)


def test_units_last_as_long_as_the_window_in_which_they_count_however_often_they_come_back() -> None:
    purse = Purse()
    purse.put("a", 5, 0.0)
    for now in range(0, int(CREDIT_LIFE_SECONDS) + 1, 10):
        units, since = purse.take("a", 5, float(now))
        assert units == 5
        purse.put("a", units, since)
    assert purse.take("a", 5, CREDIT_LIFE_SECONDS + 1)[0] == 0


def test_younger_units_outlast_older_ones() -> None:
    purse = Purse()
    purse.put("a", 5, 0.0)
    purse.put("a", 7, 50.0)
    assert purse.take("a", 100, 70.0) == (7, 50.0)


# --- webhooks ------------------------------------------------------------------------------------------------------------


def test_pauses_between_attempts_grow_fivefold_up_to_an_hour() -> None:
    assert [core.webhook_pause_seconds(attempt) for attempt in range(1, 9)] == [1, 5, 25, 125, 625, 3125, 3600, 3600]
