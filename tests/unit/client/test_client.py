"""Calls, errors and repetitions, against a played gateway; each with the client for threads and the one for asyncio."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import portcullis_client as pc
from portcullis_client import AsyncClient, Client, Item, Retry, errors
from portcullis_client.types import IssuedKey
from tests.unit.client.kit import JOB, KEY, VERDICT, Face, Gateway, ndjson, problem, result

Make = Callable[..., Face]
VERDICT_ANSWER = httpx.Response(200, json=VERDICT)


def test_a_detection(face: Make) -> None:
    gateway = Gateway(httpx.Response(200, json=VERDICT | {"new_field": 1, "threat_types": ["new_threat"]}))
    verdict = face(gateway).detect("Hëllo", threshold=0.25, detailed=True)
    assert (verdict.is_malicious, verdict.confidence, verdict.threat_types) == (True, 0.92, ("new_threat",))
    assert verdict.coverage == pc.Coverage(tokens=9, windows=1, truncated=False)
    (request,) = gateway.requests
    assert (request.method, str(request.url)) == ("POST", "http://gateway/v1/detect")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-request-timeout"] == "10"
    sent = json.loads(request.content)
    assert sent == {"text": "Hëllo", "config": {"confidence_threshold": 0.25, "detailed_response": True}}


def test_nothing_is_said_of_what_is_left_to_the_gateway(face: Make) -> None:
    gateway = Gateway(VERDICT_ANSWER)
    face(gateway).detect("x")
    assert json.loads(gateway.requests[0].content) == {"text": "x"}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("bad_request", 400, pc.BadRequestError),
        ("invalid_credentials", 401, pc.InvalidCredentialsError),
        ("forbidden", 403, pc.ForbiddenError),
        ("not_found", 404, pc.NotFoundError),
        ("conflict", 409, pc.ConflictError),
        ("payload_too_large", 413, pc.PayloadTooLargeError),
        ("unsupported_media_type", 415, pc.UnsupportedMediaTypeError),
        ("invalid_field", 422, pc.InvalidFieldError),
        ("rate_limited", 429, pc.RateLimitedError),
        ("overloaded", 429, pc.OverloadedError),
        ("headers_too_large", 431, pc.HeadersTooLargeError),
        ("stage_unavailable", 503, pc.UnavailableError),
        ("no_engine", 503, pc.UnavailableError),
        ("internal", 503, pc.UnavailableError),
        ("deadline_exceeded", 504, pc.DeadlineExceededError),
        ("of_a_later_release", 409, pc.ConflictError),
    ],
)
def test_every_code_has_its_class(face: Make, code: str, status: int, kind: type[pc.PortcullisError]) -> None:
    client = face(Gateway(problem(code, status, retry_after=7)), retry=Retry(attempts=1))
    with pytest.raises(pc.PortcullisError) as caught:
        client.detect("x")
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.status, error.request_id, error.retry_after) == (code, status, "r9", 7)


def test_every_code_of_the_gateway_is_known() -> None:
    from libs.common.errors import ErrorCode  # the client itself must not import it

    assert {code.value for code in ErrorCode} == set(errors._BY_CODE)


def test_an_invalid_field_is_named(face: Make) -> None:
    wrong = {"field": "text", "message": "Expected `str` of length >= 1"}
    client = face(Gateway(problem("invalid_field", 422, errors=[wrong])))
    with pytest.raises(pc.InvalidFieldError, match=r"D\. \(text: Expected") as caught:
        client.detect("")
    assert caught.value.fields == (pc.FieldProblem(**wrong),)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"is_malicious": "no"}),
        httpx.Response(200, json={}),
        httpx.Response(301, headers={"location": "https://elsewhere/"}),
        httpx.Response(502, text="Bad Gateway"),
        httpx.Response(418, content=b"\xff"),
    ],
)
def test_an_answer_of_another_server_is_no_verdict(face: Make, answer: httpx.Response) -> None:
    with pytest.raises(pc.UnexpectedAnswerError):
        face(Gateway(answer)).detect("x")


# --- repetitions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setback",
    [
        problem("rate_limited", 429, retry_after=3),
        problem("overloaded", 429, retry_after=3),
        problem("stage_unavailable", 503, retry_after=3),
        httpx.Response(503, text="from a proxy", headers={"retry-after": "3"}),
    ],
)
def test_retry_after_is_honoured(face: Make, setback: httpx.Response) -> None:
    client = face(Gateway(setback, setback, VERDICT_ANSWER))
    assert client.detect("x").is_malicious
    assert len(client.slept) == 2
    assert all(3 <= seconds <= 3.75 for seconds in client.slept)
    assert client.slept[0] != client.slept[1]


@pytest.mark.parametrize(
    "setback",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("late"),
        httpx.ReadTimeout("late"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("broke off"),
    ],
)
def test_lost_connections_are_repeated_with_growing_pauses(face: Make, setback: Exception) -> None:
    client = face(Gateway(setback, setback, setback, VERDICT_ANSWER))
    assert client.detect("x").is_malicious
    assert [0.25 <= client.slept[0] <= 0.5, 0.5 <= client.slept[1] <= 1, 1 <= client.slept[2] <= 2] == [True] * 3


def test_attempts_are_bounded(face: Make) -> None:
    gateway = Gateway(*[httpx.ConnectError("[Errno 111] Connection refused")] * 3)
    with pytest.raises(pc.ConnectionFailedError, match="http://gateway cannot be reached: Connection refused") as caught:
        face(gateway, retry=Retry(attempts=3)).detect("x")
    assert not caught.value.sent
    assert len(gateway.requests) == 3


def test_a_pause_beyond_the_budget_is_not_made(face: Make) -> None:
    gateway = Gateway(problem("rate_limited", 429, retry_after=20), problem("rate_limited", 429, retry_after=20))
    client = face(gateway, retry=Retry(budget_seconds=30))
    with pytest.raises(pc.RateLimitedError):
        client.detect("x")
    assert len(client.slept) == 1


def test_until_a_unit_is_free_is_known_better_by_ratelimit_than_by_retry_after(face: Make) -> None:
    refusal = problem("rate_limited", 429, retry_after=2)
    refusal.headers["ratelimit"] = '"minute";r=3;t=0, "day";r=0;t=7200'
    with pytest.raises(pc.RateLimitedError) as caught:
        face(Gateway(refusal)).detect("x")
    assert caught.value.retry_after == 7200


@pytest.mark.parametrize("answer", [problem("invalid_field", 422), problem("deadline_exceeded", 504)])
def test_what_will_not_get_better_is_not_repeated(face: Make, answer: httpx.Response) -> None:
    gateway = Gateway(answer)
    with pytest.raises(pc.PortcullisError):
        face(gateway).detect("x")
    assert len(gateway.requests) == 1


ISSUED = {
    "api_key": KEY, "key_id": "k1", "name": "App", "scopes": ["detect"], "rate_limit_per_minute": 60,
    "rate_limit_per_day": 10_000, "created_at": "2026-11-25T10:00:00.000Z", "expires_at": None,
}  # fmt: skip


@pytest.mark.parametrize("setback", [httpx.ReadTimeout("late"), httpx.ReadError("reset"), problem("internal", 503)])
def test_what_may_have_been_done_is_not_done_twice(face: Make, setback: httpx.Response | Exception) -> None:
    gateway = Gateway(setback, httpx.Response(201, json=ISSUED))
    with pytest.raises(pc.PortcullisError):
        face(gateway).register("App")
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("setback", [httpx.ConnectError("refused"), problem("rate_limited", 429, retry_after=1)])
def test_what_was_certainly_not_done_is_done_again(face: Make, setback: httpx.Response | Exception) -> None:
    gateway = Gateway(setback, httpx.Response(201, json=ISSUED))
    assert face(gateway).register("App").api_key == KEY
    assert len(gateway.requests) == 2


def test_pauses_are_told(face: Make) -> None:
    told: list[tuple[str, float]] = []
    client = face(
        Gateway(problem("overloaded", 429, retry_after=1), VERDICT_ANSWER),
        on_wait=lambda error, seconds: told.append((error.code, seconds)),
    )
    client.detect("x")
    assert told == [("overloaded", client.slept[0])]


# --- secrets -------------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_repr_and_no_log(face: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = Gateway(httpx.ReadError("reset"), problem("invalid_credentials", 401))
    with pytest.raises(pc.InvalidCredentialsError) as caught:
        face(gateway).detect("secret text")
    shown = [repr(Client(api_key=KEY)), repr(AsyncClient(api_key=KEY)), repr(caught.value), repr(gateway.requests[0].headers)]
    shown += [
        repr(pc.Webhook(url="https://hooks", secret=KEY)),
        repr(IssuedKey(api_key=KEY, **_plain())),
        str(IssuedKey(api_key=KEY, **_plain())),
        caplog.text,
    ]
    assert not [text for text in shown if KEY in text or "secret text" in text]


def _plain() -> dict[str, Any]:
    from datetime import UTC, datetime

    return {
        "key_id": "k1",
        "name": "n",
        "scopes": (),
        "rate_limit_per_minute": 1,
        "rate_limit_per_day": 1,
        "created_at": datetime.now(UTC),
    }


@pytest.mark.parametrize("key", ["pc_live_ä", "a\nX-Other: b", "a\x00"])
def test_a_key_that_is_none_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="API key holds") as caught:
        Client(api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", ["gateway", "ftp://gateway", "http://", "http://gateway:port"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(ValueError, match="address must be like"):
        Client(url)


def test_where_and_who_come_from_the_environment(face: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTCULLIS_URL", "https://elsewhere:8443/base/")
    monkeypatch.setenv("PORTCULLIS_API_KEY", " from-environment\n")
    gateway = Gateway(VERDICT_ANSWER)
    face(gateway, url=None, api_key=None).detect("x")
    assert str(gateway.requests[0].url) == "https://elsewhere:8443/base/v1/detect"
    assert gateway.requests[0].headers["authorization"] == "Bearer from-environment"


def test_a_half_surrogate_is_no_text(face: Make) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        face(Gateway()).detect("\ud800")


# --- keys ----------------------------------------------------------------------------------------------------------------


def test_admin_calls_use_the_admin_token_and_others_do_not(face: Make) -> None:
    gateway = Gateway(httpx.Response(200, json={"keys": [], "next_after": "k9"}), VERDICT_ANSWER)
    client = face(gateway, admin_token="root")
    assert client.list_keys(after="k/1", limit=5).next_after == "k9"
    client.detect("x")
    assert str(gateway.requests[0].url) == "http://gateway/admin/keys?after=k%2F1&limit=5"
    assert [request.headers["authorization"] for request in gateway.requests] == ["Bearer root", f"Bearer {KEY}"]


def test_names_in_paths_stay_names(face: Make) -> None:
    gateway = Gateway(httpx.Response(204))
    face(gateway).revoke_key("../keys?x")
    assert gateway.requests[0].url.raw_path == b"/admin/keys/..%2Fkeys%3Fx"


def test_only_what_is_given_is_changed(face: Make) -> None:
    record = {name: value for name, value in ISSUED.items() if name != "api_key"}
    gateway = Gateway(httpx.Response(200, json=record))
    assert face(gateway).update_key("k1", rate_limit_per_minute=5).key_id == "k1"
    assert (gateway.requests[0].method, json.loads(gateway.requests[0].content)) == ("PATCH", {"rate_limit_per_minute": 5})


# --- jobs ----------------------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_once_however_often_it_is_sent(face: Make) -> None:
    gateway = Gateway(httpx.ReadError("reset"), problem("overloaded", 429, retry_after=1), httpx.Response(202, json=JOB))
    job = face(gateway).submit_job(["a", Item(text="b", id="7")], threshold=0.5, webhook_url="https://hooks/x?y")
    assert (job.id, job.finished) == ("0" * 28, False)
    assert len({(request.headers["idempotency-key"], request.content) for request in gateway.requests}) == 1
    request = gateway.requests[-1]
    assert request.headers["prefer"] == "respond-async"
    assert request.headers["content-type"] == "application/x-ndjson"
    assert int(request.headers["content-length"]) == len(request.content)
    assert [json.loads(line) for line in request.content.splitlines()] == [{"text": "a"}, {"id": "7", "text": "b"}]
    assert dict(request.url.params) == {"confidence_threshold": "0.5", "webhook_url": "https://hooks/x?y"}


def test_a_large_job_comes_from_a_file_and_can_be_sent_again(face: Make) -> None:
    text = "x" * 10_000
    gateway = Gateway(httpx.ReadError("reset"), httpx.Response(202, json=JOB))
    face(gateway).submit_job(text for _ in range(300))
    assert len(gateway.requests[0].content) == len(gateway.requests[1].content) > 3_000_000


def test_waiting_for_a_job(face: Make) -> None:
    running, done = httpx.Response(200, json=JOB), httpx.Response(200, json=JOB | {"state": "done", "done": 3})
    seen: list[int] = []
    client = face(Gateway(running, running, done))
    assert client.wait("j", on_progress=lambda job: seen.append(job.done)).done == 3
    assert (seen, client.slept) == ([1, 1], [0.5, 0.75])


def test_waiting_for_a_job_in_vain(face: Make) -> None:
    client = face(Gateway(*[httpx.Response(200, json=JOB)] * 5))
    with pytest.raises(pc.JobUnfinishedError, match="is running: 1 of 3 done"):
        client.wait("j", timeout_seconds=2)
    assert sum(client.slept) == pytest.approx(2)


def test_results_go_on_where_the_connection_broke_off(face: Make) -> None:
    def breaks_off(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=_Broken(json.dumps(result(4, cursor="11")).encode() + b"\n" + b'{"index": 5, "cur'))

    gateway = Gateway(breaks_off, problem("stage_unavailable", 503, retry_after=1), ndjson(result(5, cursor="12")))
    results = face(gateway).results("j", after="10")
    assert [(each.index, each.cursor) for each in results] == [(4, "11"), (5, "12")]
    assert [request.url.params["after"] for request in gateway.requests] == ["10", "11", "11"]


def test_following_a_job_misses_nothing_that_is_stored_last(face: Make) -> None:
    running, done = httpx.Response(200, json=JOB), httpx.Response(200, json=JOB | {"state": "done"})
    gateway = Gateway(running, ndjson(result(0, cursor="1")), done, ndjson(result(1, cursor="2")))
    assert [each.cursor for each in face(gateway).results("j", follow=True)] == ["1", "2"]


class _Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, start: bytes) -> None:
        self._start = start

    def __iter__(self) -> Any:
        yield self._start
        raise httpx.RemoteProtocolError("peer closed connection")

    async def __aiter__(self) -> Any:
        yield self._start
        raise httpx.RemoteProtocolError("peer closed connection")


# --- both ----------------------------------------------------------------------------------------------------------------


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
