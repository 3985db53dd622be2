"""Many texts: each gets exactly one result, whatever becomes of the portions in which they are sent."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import portcullis_client as pc
from portcullis_client import AsyncClient, Client, Item, Retry
from portcullis_client.lines import Lines
from portcullis_client.many import MOST_BYTES, MOST_ITEMS
from tests.unit.client.kit import Face, Gateway, item_problem, ndjson, problem, result, summary, texts_of

Make = Callable[..., Face]


def judge_all(request: httpx.Request) -> httpx.Response:
    """In another order than that of asking."""
    texts = texts_of(request)
    return ndjson(*(result(i, malicious="bad" in texts[i]) for i in reversed(range(len(texts)))), summary(len(texts)))


def test_results_come_with_the_place_and_id_of_their_text(face: Make) -> None:
    gateway = Gateway(judge_all)
    results = face(gateway).detect_many(["good", Item(text="bad", id="x")], threshold=0.3, detailed=True)
    assert [(each.index, each.id, each.unwrap().is_malicious) for each in results] == [(1, "x", True), (0, None, False)]
    (request,) = gateway.requests
    assert dict(request.url.params) == {"confidence_threshold": "0.3", "detailed_response": "true"}
    assert (request.headers["content-type"], request.headers["accept"]) == ("application/x-ndjson", "application/x-ndjson")


def test_a_batch_is_in_the_order_of_asking(face: Make) -> None:
    results = face(Gateway(judge_all)).batch(["a", "bad", "c"])
    assert [(each.index, each.unwrap().is_malicious) for each in results] == [(0, False), (1, True), (2, False)]


def test_nothing_is_asked_for_nothing(face: Make) -> None:
    assert face(Gateway()).detect_many([]) == []


def test_portions_are_bounded(face: Make) -> None:
    texts = ["short"] * (MOST_ITEMS + 1) + ["x" * 10_000] * 13 + ["y" * 100_000] * 2
    gateway = Gateway(*[judge_all] * 20)
    assert len(face(gateway).detect_many(texts)) == len(texts)
    assert [text for request in gateway.requests for text in texts_of(request)] == texts
    for request in gateway.requests:
        count = len(texts_of(request))
        assert count <= MOST_ITEMS
        assert count == 1 or len(request.content) <= MOST_BYTES


def test_texts_are_taken_no_faster_than_results_are(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for _ in itertools.count():
            taken += 1
            yield "text"

    with Client("http://gateway", transport=httpx.MockTransport(judge_all)) as client:
        for number, _ in enumerate(client.detect_many(endless()), 1):
            assert taken - number <= 2 * MOST_ITEMS
            if number > 5 * MOST_ITEMS:
                break


async def test_texts_may_come_asynchronously() -> None:
    async def texts() -> AsyncIterator[str]:
        for number in range(300):
            await asyncio.sleep(0)
            yield f"text {number}"

    async with AsyncClient("http://gateway", transport=httpx.MockTransport(judge_all)) as client:
        assert sorted([each.index async for each in client.detect_many(texts())]) == list(range(300))


def test_what_is_no_text_is_the_callers_mistake(face: Make) -> None:
    with pytest.raises(TypeError, match="expected str or Item, got bytes"):
        face(Gateway()).detect_many([b"bytes"])


def test_a_text_at_fault_has_an_error_and_the_others_a_verdict(face: Make) -> None:
    wrong = item_problem("invalid_field", 422, errors=[{"field": "text", "message": "Expected more"}])
    gateway = Gateway(ndjson(result(1), {"index": 0, "id": None, "error": wrong}, summary(2)))
    empty, half, fine = face(gateway).batch(["", "\ud800", "fine"])
    assert isinstance(empty.error, pc.InvalidFieldError)
    assert isinstance(half.error, pc.InvalidFieldError)
    assert (fine.error, fine.index) == (None, 2)
    assert texts_of(gateway.requests[0]) == ["", "fine"]
    with pytest.raises(pc.InvalidFieldError, match="Expected more"):
        empty.unwrap()


# --- setbacks ------------------------------------------------------------------------------------------------------------


def test_a_limit_in_the_middle_is_waited_out_and_only_the_rest_is_sent_again(face: Make) -> None:
    limited = item_problem("rate_limited", 429, retry_after=9)
    gateway = Gateway(ndjson(result(0), {"error": limited, "next_index": 1}, summary(1, limited)), judge_all)
    client = face(gateway)
    assert [each.index for each in client.batch(["a", "b", "c"])] == [0, 1, 2]
    assert texts_of(gateway.requests[1]) == ["b", "c"]
    assert 9 <= client.slept[0] <= 11.25


@pytest.mark.parametrize(
    "setback",
    [
        problem("rate_limited", 429, retry_after=1),
        problem("stage_unavailable", 503, retry_after=1),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        ndjson(result(1)),  # the stream ends without its summary
    ],
)
def test_a_portion_that_failed_is_sent_again(face: Make, setback: httpx.Response | Exception) -> None:
    gateway = Gateway(setback, judge_all)
    client = face(gateway)
    assert [each.index for each in client.batch(["a", "b"])] == [0, 1]
    assert len(client.slept) == 1


def test_a_text_whose_error_may_pass_is_sent_again_and_then_given_up(face: Make) -> None:
    away = {"index": 0, "id": None, "error": item_problem("no_engine", 503, retry_after=2)}
    gateway = Gateway(ndjson(away, result(1), summary(2)), ndjson(away, summary(1)), ndjson(away, summary(1)))
    client = face(gateway, retry=Retry(attempts=3))
    first, second = client.batch(["a", "b"])
    assert (first.error.code, second.error) == ("no_engine", None)
    assert [texts_of(request) for request in gateway.requests] == [["a", "b"], ["a"], ["a"]]


def test_patience_ends_and_begins_anew_with_each_result(face: Make) -> None:
    limited = item_problem("rate_limited", 429, retry_after=50)
    one = ndjson(result(0), summary(1, limited))
    client = face(Gateway(one, one, one, *[problem("rate_limited", 429, retry_after=50)] * 2), retry=Retry(patience_seconds=130))
    with pytest.raises(pc.RateLimitedError):
        client.detect_many(["a", "b", "c", "d"])
    assert len(client.slept) == 4  # after each of three results, and once more; not a third time in a row


def test_a_refused_key_is_told_at_once(face: Make) -> None:
    client = face(Gateway(problem("invalid_credentials", 401)))
    with pytest.raises(pc.InvalidCredentialsError):
        client.detect_many(["a"])
    assert client.slept == []


@pytest.mark.parametrize(
    "lines",
    [
        [result(0), result(0), summary(2)],  # twice
        [result(0), result(5), summary(2)],  # never sent
        [result(0), summary(1)],  # one left out
        [{"index": 0, "is_malicious": "maybe"}],
    ],
)
def test_lines_that_cannot_be_right_are_no_verdicts(face: Make, lines: list[dict[str, object]]) -> None:
    with pytest.raises(pc.UnexpectedAnswerError):
        face(Gateway(ndjson(*lines))).detect_many(["a", "b"])


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 600))
def test_exactly_one_result_each_under_any_setbacks(seed: int, count: int) -> None:
    """The gateway answers some, in any order, then breaks off, refuses, or goes on; each text keeps its own verdict."""
    dice = random.Random(seed)

    def gateway(request: httpx.Request) -> httpx.Response:
        texts = texts_of(request)
        fate = dice.random()
        if fate < 0.2:
            return problem("overloaded", 429, retry_after=1)
        order = dice.sample(range(len(texts)), len(texts))
        if fate < 0.6:
            told = order[: dice.randrange(len(texts) + 1)]
            limited = item_problem("rate_limited", 429, retry_after=1)
            end = [summary(len(told), limited)] if dice.random() < 0.5 else []
            return ndjson(*(result(i, malicious=int(texts[i]) % 3 == 0) for i in told), *end)
        return ndjson(*(result(i, malicious=int(texts[i]) % 3 == 0) for i in order), summary(len(texts)))

    retry = Retry(patience_seconds=1e9)
    with Client("http://gateway", retry=retry, transport=httpx.MockTransport(gateway), sleep=lambda _: None) as client:
        results = client.batch(str(number) for number in range(count))
    assert [each.index for each in results] == list(range(count))
    assert [each.unwrap().is_malicious for each in results] == [number % 3 == 0 for number in range(count)]


# --- lines ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1).filter(lambda line: b"\n" not in line and not line.isspace())), st.randoms())
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], dice: random.Random) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    cutter, found, rest = Lines(), [], whole
    while rest:
        size = dice.randint(1, len(rest))
        found += cutter.add(rest[:size])
        rest = rest[size:]
    assert found == lines


def test_a_line_is_cut_at_newlines_alone() -> None:
    line = '{"id": "a\u2028b\u0085c\x0cd"}'.encode()
    assert Lines().add(line + b"\r\n\n" + b"rest") == [line + b"\r"]
