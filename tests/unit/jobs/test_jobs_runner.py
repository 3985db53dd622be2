from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import pytest

from libs.common.contracts import DetectItems, ItemResult, ItemResults, JobResult, Span
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs import core, runner
from services.jobs.core import MAX_FAILURES
from services.jobs.runner import Pace, Runner
from tests.unit.jobs.fakes import (
    BENIGN,
    BROKEN,
    JOB,
    KEY,
    MALICIOUS,
    RATE,
    VERDICT,
    FakeBackend,
    FakeQueues,
    FakeRecords,
    FakeResults,
    clock_at,
    record,
)

MAX_RUN_MS = 3_600_000
AWAY = PortcullisError(ErrorCode.STAGE_UNAVAILABLE)


class Kit:
    def __init__(self, message_items: int = 32) -> None:
        self.records = FakeRecords()
        self.queues = FakeQueues()
        self.results = FakeResults()
        self.backend = FakeBackend()
        self.clock = clock_at(1_000_000)
        self.runner = self.replica(message_items)

    def replica(self, message_items: int = 32) -> Runner:
        """One more, beside the first."""
        return Runner(
            self.records,
            self.queues,
            self.results,
            self.backend,
            self.clock,
            Pace(slots=2, message_items=message_items, keep_seconds=5, max_run_ms=MAX_RUN_MS),
            rng=random.Random(3),
            sleep=self.sleep,
        )

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def submit(self, *texts: str | None, **values: object) -> None:
        self.records.put(record(total=len(texts), created_ms=1_000_000, updated_ms=1_000_000, **values))
        self.queues.fill(*texts)

    async def round(self, replica: Runner | None = None, most: int = 32) -> bool:
        """A look, a turn, and time for whatever was put off; whether there was work."""
        each = replica or self.runner
        await each.look()
        turn = each._schedule.take(self.clock.monotonic(), most)
        try:
            return turn is not None and await each.turn(*turn)
        finally:
            if turn is not None:
                each._schedule.done(*turn[:2])
            self.clock.advance(2)

    async def rounds(self, replica: Runner | None = None, most: int = 100) -> None:
        """Until the job is over."""
        for _ in range(most):
            if self.records.of().over:
                return
            await self.round(replica)
        pytest.fail(f"not over after {most} rounds: {self.records.of()}")


@pytest.fixture
def kit() -> Kit:
    return Kit()


def failing(*texts: str, failure: ItemResult | PortcullisError) -> Callable[[str], ItemResult | PortcullisError]:
    return lambda text: failure if text in texts else BENIGN


# --- all is well ---------------------------------------------------------------------------------------------------------


async def test_a_job_from_its_queue_to_its_end(kit: Kit) -> None:
    kit.submit("a", "bad", "c", threshold=0.3, detailed=True)
    kit.backend.verdict = lambda text: MALICIOUS if text == "bad" else BENIGN
    assert await kit.round()
    assert kit.records.of().state == "running"
    await kit.rounds()
    ended = kit.records.of()
    assert (ended.state, ended.done, ended.malicious, ended.failed) == ("done", 3, 1, 0)
    assert kit.results.of() == {0: BENIGN, 1: MALICIOUS, 2: BENIGN}
    assert [entry.id for _, entry in kit.results.stored.values()] == ["id-0", "id-1", "id-2"]
    (message,) = kit.backend.messages
    assert (message.key_id, message.threshold, message.detailed, message.rate_degraded) == (KEY, 0.3, True, False)
    assert await kit.queues.all() == []
    assert kit.results.announced == []


async def test_whoever_takes_the_last_items_looks_at_once_whether_the_job_is_over(kit: Kit) -> None:
    kit.submit(*(f"text {number}" for number in range(40)))
    judged = asyncio.Event()
    kit.backend.verdict = lambda _: BENIGN
    await kit.round(most=32)
    assert not kit.runner._look.is_set()
    ask = kit.backend.judge

    async def slowly(message: DetectItems) -> ItemResults:
        await judged.wait()
        return await ask(message)

    await kit.runner.look()
    kit.backend.judge = slowly  # type: ignore[method-assign, assignment]
    turns = [asyncio.create_task(kit.runner.turn(KEY, JOB, most)) for most in (4, 32)]
    while len(kit.runner._hands.get(JOB, ())) < len(turns):
        await asyncio.sleep(0)
    turns.append(asyncio.create_task(kit.runner.turn(KEY, JOB, 32)))  # finds nothing
    assert not await turns[2]
    assert not kit.runner._look.is_set()  # others have some of it in hand
    judged.set()
    await asyncio.gather(*turns)
    assert kit.runner._look.is_set()


async def test_the_end_is_announced_when_there_is_a_webhook(kit: Kit) -> None:
    kit.submit("a", webhook_url="https://example.com", webhook_secret="s")
    await kit.rounds()
    assert kit.results.announced == [JOB]


async def test_messages_are_bounded_and_two_replicas_share_a_job() -> None:
    kit = Kit(message_items=4)
    texts = [f"text {number}" for number in range(40)]
    kit.submit(*texts)
    other = kit.replica(4)
    while not kit.records.of().over:
        await kit.round(most=8)
        await kit.round(other, most=8)
    assert sorted(text for message in kit.backend.judged for text in message) == sorted(texts)
    assert max(map(len, kit.backend.judged)) == 4


async def test_a_submission_that_is_not_complete_is_not_run_and_given_up_when_nothing_comes(kit: Kit) -> None:
    kit.records.put(record(state="open", total=0, digest="", updated_ms=1_000_000))
    kit.queues.fill("a")
    assert not await kit.round()
    kit.clock.advance(runner.ABANDONED_SECONDS - 10)
    kit.records.put(msgspec.structs.replace(kit.records.of(), updated_ms=int(kit.clock.now() * 1000)))  # more has come
    kit.clock.advance(runner.ABANDONED_SECONDS - 10)
    await kit.round()
    assert kit.records.of().state == "open"
    kit.clock.advance(20)
    await kit.round()
    assert kit.records.of().state == "cancelled"
    assert await kit.queues.all() == []


async def test_a_queue_without_a_record_is_removed_in_time(kit: Kit) -> None:
    kit.queues.fill("a")
    kit.queues.created_ms = 1_000_000
    await kit.round()
    assert len(await kit.queues.all()) == 1  # its record may be about to be made
    kit.clock.advance(runner.ABANDONED_SECONDS)
    await kit.round()
    assert await kit.queues.all() == []


# --- items that come back ------------------------------------------------------------------------------------------------


async def test_a_redelivered_item_with_a_result_is_acknowledged_and_not_judged_again(kit: Kit) -> None:
    kit.submit("a", "b", "c")
    queue = kit.queues.of()
    queue.in_hand, queue.ready = {0, 1}, {0, 1}  # somebody had them, and died
    await kit.results.store(KEY, JOB, JobResult(index=0, result=MALICIOUS))
    await kit.rounds()
    assert sorted(text for message in kit.backend.judged for text in message) == ["b", "c"]
    assert kit.results.of()[0] == MALICIOUS  # the first stays
    assert (kit.records.of().done, kit.records.of().malicious) == (3, 1)
    assert sum(kit.backend.taken) == 3


async def test_a_result_that_is_stored_and_not_acknowledged_is_not_stored_again(kit: Kit) -> None:
    kit.submit(*(f"text {number}" for number in range(20)))
    kit.queues.acknowledgement = AWAY
    with pytest.raises(PortcullisError):
        await kit.round()
    assert len(kit.results.of()) == 20
    kit.queues.acknowledgement = None
    kit.backend.verdict = lambda _: MALICIOUS
    await kit.rounds(kit.replica())
    assert set(map(id, kit.results.of().values())) == {id(BENIGN)}
    assert (kit.records.of().state, kit.records.of().done, kit.records.of().malicious) == ("done", 20, 0)
    assert len(kit.backend.judged) == 1


async def test_items_that_were_handed_out_and_given_back_are_asked_for_when_nothing_else_waits(kit: Kit) -> None:
    kit.submit("a", "b")
    kit.backend.failure = AWAY
    await kit.round()
    assert kit.queues.of().waiting == 0
    kit.backend.failure = None
    await kit.rounds(most=5)
    assert kit.records.of().state == "done"


async def test_units_are_taken_for_what_was_handed_out_before_only_when_there_is_any(kit: Kit) -> None:
    kit.submit("a", "b")
    kit.queues.of().in_hand = {0, 1}  # another replica is at it
    for _ in range(5):
        assert not await kit.round()
    assert kit.backend.taken == []
    kit.queues.of().ready = {0, 1}
    kit.backend.room = 1
    assert await kit.round()
    assert (kit.backend.taken, kit.backend.judged) == ([1], [("a",)])
    assert [index for index, _ in kit.queues.of().given_back] == [1]


async def test_a_failure_of_the_store_gives_everything_back(kit: Kit) -> None:
    kit.submit("a", "b", "c")
    kit.results.failure = AWAY
    with pytest.raises(PortcullisError):
        await kit.round()
    assert sorted(index for index, _ in kit.queues.of().given_back) == [0, 1, 2]
    kit.results.failure = None
    await kit.rounds()
    assert kit.results.of() == dict.fromkeys(range(3), BENIGN)
    assert kit.results.letters == []


async def test_counting_that_was_overtaken_counts_nothing_twice(kit: Kit) -> None:
    kit.submit("a", "b", "c")
    await kit.round()
    counted = core.count(kit.records.of(), [(1, "benign"), (2, "benign"), (3, "benign")], 1_002_000)
    kit.records.before_update.append(lambda: kit.records.put(counted))
    await kit.round()
    assert (kit.records.of().state, kit.records.of().done) == ("done", 3)
    await kit.round()
    assert await kit.queues.all() == []


# --- failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [code for code in ErrorCode if core.is_transient(code)])
@pytest.mark.parametrize("of_the_item", [False, True])
async def test_what_may_pass_is_given_back_and_never_counted(kit: Kit, code: ErrorCode, of_the_item: bool) -> None:
    kit.submit("a", "b", "c")
    failure = PortcullisError(code)
    if of_the_item:
        kit.backend.verdict = lambda _: core.error_result(code, "")
    else:
        kit.backend.failure = failure
    for _ in range(50):
        await kit.round()
    assert (kit.results.of(), kit.results.letters) == ({}, [])
    kit.backend.failure, kit.backend.verdict = None, lambda _: BENIGN
    await kit.rounds()
    assert (kit.records.of().state, kit.records.of().failed) == ("done", 0)


async def test_an_item_that_fails_five_times_by_itself_becomes_a_dead_letter_and_an_error(kit: Kit) -> None:
    kit.submit("a", "broken", "c")
    kit.backend.verdict = failing("broken", failure=BROKEN)
    await kit.rounds()
    assert sum("broken" in message for message in kit.backend.judged) == MAX_FAILURES
    (letter,) = kit.results.letters
    assert (letter.key_id, letter.job_id, letter.index, letter.reason) == (KEY, JOB, 1, "internal: It broke.")
    assert letter.item is not None
    assert letter.item.text == "broken"
    result = kit.results.of()[1]
    assert result.error is not None
    assert result.error.code == ErrorCode.INTERNAL
    assert (kit.records.of().state, kit.records.of().done, kit.records.of().failed) == ("done", 3, 1)


async def test_an_item_that_ends_whoever_works_on_it_is_isolated_and_takes_nobody_with_it(kit: Kit) -> None:
    kit.submit(*(f"text {number}" for number in range(20)), "poison")
    kit.backend.verdict = failing("poison", failure=AWAY)
    await kit.rounds()
    assert [letter.index for letter in kit.results.letters] == [20]
    assert sum(result.verdict is not None for result in kit.results.of().values()) == 20
    assert kit.records.of().failed == 1


async def test_an_item_that_ends_whoever_works_on_it_is_found_when_it_is_the_only_one_that_is_left(kit: Kit) -> None:
    kit.submit("poison")
    kit.backend.verdict = failing("poison", failure=AWAY)
    await kit.rounds()
    assert [letter.index for letter in kit.results.letters] == [0]
    assert (runner.PROBE_TEXT,) in kit.backend.judged


async def test_a_suspect_is_not_sent_while_nothing_can_be_judged(kit: Kit) -> None:
    kit.submit("a")
    kit.backend.failure = AWAY
    for _ in range(10):
        await kit.round()
    assert kit.backend.judged.count(("a",)) == core.SUSPECT_AFTER
    assert (runner.PROBE_TEXT,) in kit.backend.judged
    kit.backend.failure = None
    await kit.rounds()
    assert kit.records.of().failed == 0


async def test_a_message_that_is_refused_as_a_whole_is_taken_apart(kit: Kit) -> None:
    kit.submit("a", "huge", "c")
    kit.backend.verdict = failing("huge", failure=PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE))
    await kit.rounds()
    assert [letter.index for letter in kit.results.letters] == [1]
    assert {index for index, result in kit.results.of().items() if result.verdict is not None} == {0, 2}


async def test_an_item_that_cannot_be_read_is_given_up_and_nothing_is_asked_about_it(kit: Kit) -> None:
    kit.submit("a", None)
    await kit.rounds()
    assert [(letter.index, letter.item) for letter in kit.results.letters] == [(1, None)]
    assert kit.backend.judged == [("a",)]


async def test_an_item_is_given_up_also_when_no_dead_letter_can_be_kept(kit: Kit) -> None:
    kit.submit("broken")
    kit.backend.verdict = failing("broken", failure=BROKEN)
    kit.results.letters_full = True
    await kit.rounds()
    assert (kit.records.of().state, kit.records.of().failed) == ("done", 1)


async def test_items_that_were_lost_are_replaced_by_an_error(kit: Kit) -> None:
    kit.submit("a", "b", "c")
    await kit.round(most=1)
    del kit.queues.of().items[1]
    await kit.rounds()
    assert (kit.records.of().state, kit.records.of().done, kit.records.of().failed) == ("done", 3, 1)
    lost = kit.results.of()[1].error
    assert lost is not None
    assert (lost.code, lost.detail) == (ErrorCode.INTERNAL, core.LOST)
    assert [(letter.index, letter.item) for letter in kit.results.letters] == [(1, None)]


async def test_nothing_is_lost_because_a_server_that_was_away_knows_nothing_of_it_yet(kit: Kit) -> None:
    """In a cluster, queue and results are those of the server that was asked; it may have caught up with neither."""
    kit.submit("a", "b")
    kit.queues.seen_empty = True
    for _ in range(3):
        await kit.round()
    assert (kit.results.of(), kit.results.letters) == ({}, [])
    kit.queues.seen_empty = False
    await kit.rounds()
    assert (kit.records.of().done, kit.records.of().failed) == (2, 0)


async def test_what_has_a_result_is_not_lost_because_it_cannot_be_read_yet(kit: Kit) -> None:
    kit.submit("a", "b")
    await kit.round()
    kit.results.unseen = True
    for _ in range(3):
        await kit.round()
    assert kit.results.letters == []
    kit.results.unseen = False
    await kit.rounds()
    assert (kit.records.of().done, kit.records.of().failed) == (2, 0)


async def test_nothing_is_lost_while_somebody_has_it_in_hand(kit: Kit) -> None:
    kit.submit("a", "b")
    kit.queues.of().in_hand = {0, 1}
    for _ in range(20):
        await kit.round()
    assert kit.results.of() == {}


async def test_a_result_that_is_too_long_for_a_page_is_an_error(kit: Kit) -> None:
    kit.submit("a")
    spans = tuple(Span(start=0, end=1, score=0.123456789) for _ in range(30_000))
    long = ItemResult(verdict=msgspec.structs.replace(VERDICT, spans=spans))
    kit.backend.verdict = lambda _: long
    await kit.rounds()
    error = kit.results.of()[0].error
    assert error is not None
    assert error.code == ErrorCode.PAYLOAD_TOO_LARGE
    assert kit.records.of().failed == 1


# --- units ---------------------------------------------------------------------------------------------------------------


async def test_no_more_is_judged_than_the_limits_allow(kit: Kit) -> None:
    kit.submit("a", "b", "c", "d")
    kit.backend.room = 3
    for _ in range(10):
        await kit.round()
    assert kit.backend.judged == [("a", "b", "c")]
    assert kit.records.of().state == "running"
    kit.backend.room = 10
    await kit.rounds()
    assert sum(kit.backend.taken) == 4


@pytest.mark.parametrize(
    ("remaining_day", "reset_minute", "reset_day", "blocked"),
    [(9, 4.0, 900.0, 4.0), (0, 4.0, 20.0, 20.0), (0, 4.0, 900.0, 30.0), (9, 0.0, 900.0, 0.05)],
)
async def test_a_key_whose_limits_are_used_up_waits_until_there_is_room(
    kit: Kit, remaining_day: int, reset_minute: float, reset_day: float, blocked: float
) -> None:
    kit.submit("a")
    kit.backend.room = 0
    kit.backend.rate = msgspec.structs.replace(RATE, remaining_day=remaining_day, reset_minute=reset_minute, reset_day=reset_day)
    began = kit.clock.monotonic()
    assert not await kit.round()
    await kit.runner.look()
    assert kit.runner._schedule.take(began + blocked - 0.001, 1) is None
    assert kit.runner._schedule.take(began + blocked, 1) == (KEY, JOB, 1)


async def test_units_of_items_without_a_result_are_used_for_the_next_try(kit: Kit) -> None:
    kit.submit("a", "b")
    kit.backend.failure = AWAY
    await kit.round()
    kit.backend.failure = None
    await kit.rounds()
    assert kit.backend.taken == [2]


async def test_a_verdict_whose_storing_is_in_doubt_has_used_its_unit(kit: Kit) -> None:
    """It may have been stored; were its unit used again, the key would have more results than its limits allow."""
    kit.submit("a", "b")
    kit.backend.room = 2
    store = kit.results.store

    async def stored_and_not_told(key_id: str, job_id: str, result: JobResult) -> None:
        await store(key_id, job_id, result)
        if result.index == 1:
            raise AWAY

    kit.results.store = stored_and_not_told  # type: ignore[method-assign]
    with pytest.raises(PortcullisError):
        await kit.round()
    kit.results.store = store  # type: ignore[method-assign]
    assert kit.runner._purse.take(KEY, 10, kit.clock.monotonic())[0] == 0
    await kit.rounds()
    assert kit.results.of() == {0: BENIGN, 1: BENIGN}


@pytest.mark.parametrize("code", [ErrorCode.INVALID_CREDENTIALS, ErrorCode.FORBIDDEN])
async def test_a_key_that_is_gone_fails_the_job_and_what_has_been_judged_is_counted(kit: Kit, code: ErrorCode) -> None:
    kit.submit("a", "b", "c", webhook_url="https://example.com", webhook_secret="s")
    assert await kit.round(most=2)
    kit.backend.refusal = PortcullisError(code)
    await kit.rounds()
    failed = kit.records.of()
    assert (failed.state, failed.reason, failed.done) == ("failed", core.KEY_GONE, 2)
    assert await kit.queues.all() == []
    assert kit.results.announced == [JOB]


async def test_limits_that_cannot_be_asked_fail_nothing(kit: Kit) -> None:
    kit.submit("a")
    kit.backend.refusal = AWAY
    for _ in range(20):
        await kit.round()
    assert kit.records.of().state == "queued"
    kit.backend.refusal = None
    await kit.rounds()
    assert kit.records.of().state == "done"


async def test_pauses_grow_with_outages_and_not_with_all_that_fails_in_one(kit: Kit) -> None:
    kit.submit("a", "b")
    await kit.runner.look()

    async def fails() -> None:
        assert not await kit.runner.turn(KEY, JOB, 1)

    async def paused_seconds() -> float:
        await kit.runner.look()
        began = kit.clock.monotonic()
        while (turn := kit.runner._schedule.take(kit.clock.monotonic(), 1)) is None:
            assert kit.clock.monotonic() < began + 60
            kit.clock.advance(0.01)
        kit.runner._schedule.done(*turn[:2])
        return kit.clock.monotonic() - began

    kit.backend.refusal = AWAY
    pauses = []
    for _ in range(6):
        for _ in range(5):
            await fails()
        pauses.append(await paused_seconds())
    first, longest = runner.PAUSE_SECONDS
    for number, pause in enumerate(pauses):
        expected = min(longest, first * 2**number)
        assert 0.75 * expected <= pause <= 1.25 * expected + 0.02, pauses


async def test_a_job_that_has_had_its_time_fails_with_what_it_has(kit: Kit) -> None:
    kit.submit("a", "b")
    await kit.round(most=1)
    kit.clock.advance(MAX_RUN_MS / 1000)
    await kit.runner.look()
    failed = kit.records.of()
    assert (failed.state, failed.done) == ("failed", 1)
    assert failed.reason is not None
    assert await kit.queues.all() == []


# --- the tasks -----------------------------------------------------------------------------------------------------------


async def test_it_runs_by_itself_and_stops_when_it_is_told(kit: Kit) -> None:
    kit.submit(*(f"text {number}" for number in range(100)))
    running = asyncio.create_task(kit.runner.run())
    async with asyncio.timeout(20):
        while not kit.records.of().over:
            kit.clock.advance(0.5)
            await asyncio.sleep(0.01)
        await kit.runner.finish(running)
    assert running.done()
    assert len(kit.results.of()) == 100


async def test_what_takes_longer_is_kept(kit: Kit) -> None:
    kit.submit("a")
    kept, release = asyncio.Event(), asyncio.Event()
    judge, fetch = kit.backend.judge, kit.queues.fetch

    async def slow(items: object) -> object:
        await release.wait()
        return await judge(items)  # type: ignore[arg-type]

    async def watched(*arguments: object) -> object:
        deliveries = await fetch(*arguments)  # type: ignore[arg-type]
        for delivery in deliveries:
            keep = delivery.keep

            async def noted(keep: object = keep) -> None:
                await keep()  # type: ignore[operator]
                kept.set()

            delivery.keep = noted  # type: ignore[method-assign]
        return deliveries

    kit.backend.judge = slow  # type: ignore[method-assign,assignment]
    kit.queues.fetch = watched  # type: ignore[method-assign,assignment]
    await kit.runner.look()
    turn = asyncio.create_task(kit.runner.turn(KEY, JOB, 1))
    async with asyncio.timeout(10):
        await kept.wait()
        release.set()
        assert await turn


async def test_a_turn_that_is_cut_short_gives_back_what_it_has(kit: Kit) -> None:
    kit.submit("a", "b")
    asked = asyncio.Event()

    async def never(_: object) -> object:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    kit.backend.judge = never  # type: ignore[method-assign,assignment]
    await kit.runner.look()
    turn = asyncio.create_task(kit.runner.turn(KEY, JOB, 2))
    await asked.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert sorted(index for index, _ in kit.queues.of().given_back) == [0, 1]
