"""Jobs at the edge, on stages that answer as they are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from libs.common import contracts, subjects
from libs.common.contracts import FieldError, JobAppend, JobCreate, JobOpened, JobRequest, JobSeal, Message, Reply, raw
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import asking, jobs
from tests.unit.edge.fakes import JOB, KEY, RATE, VERDICT, FakeStages, gate_of, job_answer, refusal

KEYED = {"X-API-Key": KEY}
LATER = {**KEYED, "Prefer": "respond-async"}
LINES = {**LATER, "Content-Type": "application/x-ndjson"}
ID = JOB.job_id


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"id": f"id{number}", "text": text}).encode() + b"\n" for number, text in enumerate(texts))


def asked(stages: FakeStages) -> list[JobRequest]:
    return [message for _, message, _ in stages.asked if isinstance(message, JobRequest)]


def operations(stages: FakeStages) -> list[str]:
    return [message.operation for message in asked(stages)]


def payload(stages: FakeStages, operation: str, kind: Any) -> list[Any]:
    return [msgspec.json.decode(each.payload, type=kind) for each in asked(stages) if each.operation == operation]


def answering(**replies: Reply) -> Callable[[Message], Reply]:
    """Other answers than when all is well, by operation."""

    def answer(message: Message) -> Reply:
        assert isinstance(message, JobRequest)
        return replies.get(message.operation) or job_answer(message)

    return answer


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:portcullis:problem:{code}"
    return document


# --- submission ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["list", "lines"])
async def test_a_batch_that_is_to_be_answered_later_is_202_with_its_place(
    client: httpx.AsyncClient, stages: FakeStages, way: str
) -> None:
    if way == "list":
        document = {"requests": [{"id": "id0", "text": "a"}, {"id": "id1", "text": "b"}], "config": {"detailed_response": True}}
        response = await client.post("/v1/detect/batch", json=document, headers=LATER)
    else:
        query = {"detailed_response": "true"}
        response = await client.post("/v1/detect/batch", content=lines("a", "b"), params=query, headers=LINES)
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{ID}"
    assert response.headers["preference-applied"] == "respond-async"
    assert response.headers["x-ratelimit-limit-minute"] == "70"
    assert response.json() == {
        "id": ID, "state": "running", "total": 3, "done": 2, "malicious": 1, "failed": 1, "items_per_second": 2.5,
        "estimated_end_at": "2026-01-01T00:00:02.000Z", "created_at": "2026-01-01T00:00:00.000Z",
        "started_at": "2026-01-01T00:00:01.000Z", "finished_at": None, "reason": None, "webhook": None,
    }  # fmt: skip
    assert operations(stages) == ["create", "append", "seal"]
    (append,) = payload(stages, "append", JobAppend)
    assert (append.job_id, append.first_index) == (ID, 0)
    assert [(item.id, item.text) for item in append.items] == [("id0", "a"), ("id1", "b")]
    (seal,) = payload(stages, "seal", JobSeal)
    assert (seal.total, seal.detailed, seal.webhook_url) == (2, True, None)
    assert stages.repeatable[subjects.JOBS_REQUEST]


async def test_items_are_handed_on_a_bounded_message_at_a_time(client: httpx.AsyncClient, stages: FakeStages) -> None:
    texts = [f"text {number}" for number in range(600)] + ["x" * 90_000] * 5
    assert (await client.post("/v1/detect/batch", content=lines(*texts), headers=LINES)).status_code == 202
    appends = payload(stages, "append", JobAppend)
    assert [item.text for append in appends for item in append.items] == texts
    assert [append.first_index for append in appends] == [
        sum(len(before.items) for before in appends[:place]) for place in range(len(appends))
    ]
    assert max(len(append.items) for append in appends) <= contracts.MAX_JOB_APPEND
    assert max(sum(len(item.text) for item in append.items) for append in appends) <= jobs.APPEND_CHARACTERS
    assert payload(stages, "seal", JobSeal)[0].total == 605


async def test_every_request_of_a_submission_has_a_name_of_its_own(client: httpx.AsyncClient, stages: FakeStages) -> None:
    await client.post("/v1/detect/batch", content=lines("a"), headers=LINES)
    tokens = [token for _, token in stages.tokens]
    assert None not in tokens
    assert len(set(tokens)) == 3


async def test_an_idempotency_key_is_passed_on_as_a_hash_and_the_digest_tells_bodies_apart(
    client: httpx.AsyncClient, stages: FakeStages
) -> None:
    headers = {**LINES, "Idempotency-Key": "my-key"}
    for content, query in ((lines("a"), {}), (lines("a"), {}), (lines("b"), {}), (lines("a"), {"confidence_threshold": "0.2"})):
        assert (await client.post("/v1/detect/batch", content=content, params=query, headers=headers)).status_code == 202
    assert {each.idempotency for each in payload(stages, "create", JobCreate)} == {hashlib.sha256(b"my-key").hexdigest()}
    first, second, third, fourth = (seal.digest for seal in payload(stages, "seal", JobSeal))
    assert first == second
    assert len({first, third, fourth}) == 3


async def test_a_submission_that_was_accepted_before_is_not_stored_again(client: httpx.AsyncClient, stages: FakeStages) -> None:
    opened = Reply(result=raw(JobOpened(job_id=ID, sealed=True)), rate=RATE)
    stages.behaviours[subjects.JOBS_REQUEST] = answering(create=opened)
    response = await client.post("/v1/detect/batch", content=lines("a"), headers={**LINES, "Idempotency-Key": "my-key"})
    assert response.status_code == 202
    assert operations(stages) == ["create", "seal"]


async def test_another_body_under_the_same_key_is_409(client: httpx.AsyncClient, stages: FakeStages) -> None:
    stages.behaviours[subjects.JOBS_REQUEST] = answering(seal=refusal(ErrorCode.CONFLICT))
    problem(await client.post("/v1/detect/batch", content=lines("a"), headers=LINES), 409, "conflict")


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "ümlaut"])
async def test_an_idempotency_key_that_is_none_is_422_and_nothing_is_begun(
    client: httpx.AsyncClient, stages: FakeStages, key: str
) -> None:
    headers = {**LINES, "Idempotency-Key": key.encode("latin-1")}
    document = problem(
        await client.post("/v1/detect/batch", content=lines("a"), headers=headers),  # type: ignore[arg-type]
        422,
        "invalid_field",
    )
    assert document["errors"][0]["field"] == "Idempotency-Key"
    assert asked(stages) == []


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"text":"a"}\n{"text":""}\n', 422, "invalid_field"),
        (b'{"text":"a"}\n{"te\n', 400, "bad_request"),
        (b"", 422, "invalid_field"),
    ],
)
async def test_what_cannot_be_read_refuses_the_whole_and_is_given_up(
    client: httpx.AsyncClient, stages: FakeStages, content: bytes, status: int, code: str
) -> None:
    problem(await client.post("/v1/detect/batch", content=content, headers=LINES), status, code)
    assert operations(stages)[-1] == "cancel"
    assert "seal" not in operations(stages)


async def test_a_job_that_was_accepted_is_not_given_up_when_its_repetition_cannot_be_read(
    client: httpx.AsyncClient, stages: FakeStages
) -> None:
    opened = Reply(result=raw(JobOpened(job_id=ID, sealed=True)), rate=RATE)
    stages.behaviours[subjects.JOBS_REQUEST] = answering(create=opened)
    problem(await client.post("/v1/detect/batch", content=b'{"text":""}\n', headers=LINES), 422, "invalid_field")
    assert operations(stages) == ["create"]


async def test_items_that_do_not_fit_are_refused_with_the_reason_and_given_up(
    client: httpx.AsyncClient, stages: FakeStages
) -> None:
    stages.behaviours[subjects.JOBS_REQUEST] = answering(append=refusal(ErrorCode.PAYLOAD_TOO_LARGE))
    problem(await client.post("/v1/detect/batch", content=lines("a"), headers=LINES), 413, "payload_too_large")
    assert operations(stages) == ["create", "append", "cancel"]


async def test_a_seal_whose_answer_is_missing_gives_nothing_up(client: httpx.AsyncClient, stages: FakeStages) -> None:
    stages.behaviours[subjects.JOBS_REQUEST] = answering(seal=refusal(ErrorCode.DEADLINE_EXCEEDED))
    problem(await client.post("/v1/detect/batch", content=lines("a"), headers=LINES), 504, "deadline_exceeded")
    assert operations(stages) == ["create", "append", "seal"]


async def test_a_webhook_is_passed_on_and_its_secret_shown(client: httpx.AsyncClient, stages: FakeStages) -> None:
    webhook = contracts.JobWebhook(url="https://example.com/", secret="whsec_x")
    sealed = Reply(result=raw(msgspec.structs.replace(JOB, webhook=webhook)), rate=RATE)
    stages.behaviours[subjects.JOBS_REQUEST] = answering(seal=sealed)
    document = {"requests": [{"text": "a"}], "webhook": {"url": "https://example.com/"}}
    responses = [
        await client.post("/v1/detect/batch", json=document, headers=LATER),
        await client.post("/v1/detect/batch", content=lines("a"), params={"webhook_url": "https://example.com/"}, headers=LINES),
    ]
    for response in responses:
        assert response.json()["webhook"] == {"url": "https://example.com/", "secret": "whsec_x"}
    assert {seal.webhook_url for seal in payload(stages, "seal", JobSeal)} == {"https://example.com/"}


async def test_a_webhook_that_is_refused_names_the_field(client: httpx.AsyncClient, stages: FakeStages) -> None:
    fields = (FieldError(field="webhook.url", message="Expected a public address"),)
    stages.behaviours[subjects.JOBS_REQUEST] = answering(seal=refusal(ErrorCode.INVALID_FIELD, fields=fields))
    document = problem(await client.post("/v1/detect/batch", content=lines("a"), headers=LINES), 422, "invalid_field")
    assert document["errors"] == [{"field": "webhook.url", "message": "Expected a public address"}]


async def test_who_may_not_submit_is_refused_before_anything_is_stored(client: httpx.AsyncClient, stages: FakeStages) -> None:
    problem(
        await client.post("/v1/detect/batch", content=lines("a"), headers={k: v for k, v in LINES.items() if k != "X-API-Key"}),
        401,
        "invalid_credentials",
    )
    assert asked(stages) == []
    stages.behaviours[subjects.JOBS_REQUEST] = refusal(ErrorCode.FORBIDDEN)
    problem(await client.post("/v1/detect/batch", content=lines("a"), headers=LINES), 403, "forbidden")
    assert operations(stages) == ["create"]


# --- reading -------------------------------------------------------------------------------------------------------------


async def test_a_job(client: httpx.AsyncClient, stages: FakeStages) -> None:
    response = await client.get(f"/v1/jobs/{ID}", headers=KEYED)
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["state"], response.json()["done"]) == (ID, "running", 2)
    assert response.headers["x-ratelimit-remaining-minute"] == "69"
    assert operations(stages) == ["get"]


async def test_the_secret_of_a_webhook_is_left_out_where_it_is_not_shown(client: httpx.AsyncClient, stages: FakeStages) -> None:
    webhook = contracts.JobWebhook(url="https://example.com/")
    stages.behaviours[subjects.JOBS_REQUEST] = answering(get=Reply(result=raw(msgspec.structs.replace(JOB, webhook=webhook))))
    assert (await client.get(f"/v1/jobs/{ID}", headers=KEYED)).json()["webhook"] == {"url": "https://example.com/"}


async def test_the_list_of_jobs(client: httpx.AsyncClient, stages: FakeStages) -> None:
    response = await client.get("/v1/jobs", params={"limit": "5", "before": ID}, headers=KEYED)
    assert [job["id"] for job in response.json()["jobs"]] == [ID]
    assert response.json()["next_before"] == ID
    assert payload(stages, "list", contracts.JobList) == [contracts.JobList(before=ID, limit=5)]
    await client.get("/v1/jobs", headers=KEYED)
    assert payload(stages, "list", contracts.JobList)[1] == contracts.JobList(limit=jobs.DEFAULT_JOBS)


async def test_results_as_lines(client: httpx.AsyncClient, stages: FakeStages) -> None:
    response = await client.get(f"/v1/jobs/{ID}/results", headers=KEYED)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["x-ratelimit-limit-minute"] == "70"
    good, bad = [json.loads(line) for line in response.text.splitlines()]
    assert (good["cursor"], good["index"], good["id"], good["is_malicious"]) == ("7", 0, "id0", True)
    assert "spans" not in good
    assert (bad["cursor"], bad["index"], bad["error"]["code"]) == ("8", 1, "internal")
    assert payload(stages, "results", contracts.JobResults) == [contracts.JobResults(job_id=ID, after=0, limit=jobs.PAGE)]


async def test_results_have_the_details_that_the_job_was_submitted_with(client: httpx.AsyncClient, stages: FakeStages) -> None:
    detailed = Reply(result=raw(msgspec.structs.replace(JOB, detailed=True)), rate=RATE)
    stages.behaviours[subjects.JOBS_REQUEST] = answering(get=detailed)
    response = await client.get(f"/v1/jobs/{ID}/results", headers=KEYED)
    assert json.loads(response.text.splitlines()[0])["spans"]


def pages(stages: FakeStages, count: int, *, breaks_at: int | None = None) -> None:
    """So many results; page `breaks_at` cannot be had."""

    def answer(message: Message) -> Reply:
        assert isinstance(message, JobRequest)
        if message.operation != "results":
            return job_answer(message)
        if breaks_at is not None and len(payload(stages, "results", contracts.JobResults)) > breaks_at:
            raise PortcullisError(ErrorCode.DEADLINE_EXCEEDED)
        query = msgspec.json.decode(message.payload, type=contracts.JobResults)
        found = range(query.after + 1, min(count, query.after + query.limit) + 1)
        result = contracts.ItemResult(verdict=VERDICT)
        return Reply(
            result=raw(
                contracts.JobResultPage(
                    results=tuple(
                        contracts.StoredJobResult(cursor=place, result=contracts.JobResult(index=place - 1, result=result))
                        for place in found
                    ),
                    more=query.after + query.limit < count,
                )
            )
        )

    stages.behaviours[subjects.JOBS_REQUEST] = answer


@pytest.mark.parametrize(
    ("query", "expected"),
    [({}, (1, 1200)), ({"after": "1100"}, (1101, 1200)), ({"limit": "700"}, (1, 700)), ({"after": "5", "limit": "3"}, (6, 8))],
)
async def test_results_are_passed_on_page_by_page(
    client: httpx.AsyncClient, stages: FakeStages, query: dict[str, str], expected: tuple[int, int]
) -> None:
    pages(stages, 1200)
    response = await client.get(f"/v1/jobs/{ID}/results", params=query, headers=KEYED)
    cursors = [int(json.loads(line)["cursor"]) for line in response.text.splitlines()]
    assert cursors == list(range(expected[0], expected[1] + 1))


async def test_no_results_is_an_empty_answer(client: httpx.AsyncClient, stages: FakeStages) -> None:
    pages(stages, 0)
    response = await client.get(f"/v1/jobs/{ID}/results", headers=KEYED)
    assert (response.status_code, response.text) == (200, "")


async def test_a_failure_before_the_first_line_is_an_answer_and_in_the_middle_the_end(stages: FakeStages) -> None:
    gate = gate_of(stages)
    sent: list[MutableMapping[str, Any]] = []

    async def keep(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: MutableMapping[str, Any]) -> None:
            sent.append(message)
            await send(message)

        await gate(scope, receive, noted)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(keep), base_url="http://localhost:8000") as client:
        pages(stages, 1200, breaks_at=0)
        problem(await client.get(f"/v1/jobs/{ID}/results", headers=KEYED), 504, "deadline_exceeded")
        stages.asked.clear()
        sent.clear()
        pages(stages, 1200, breaks_at=1)
        with pytest.raises(AssertionError):  # httpx's: the answer has no end
            await client.get(f"/v1/jobs/{ID}/results", headers=KEYED)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (sent[1]["body"].count(b"\n"), sent[1]["more_body"]) == (jobs.PAGE, True)


async def test_a_job_is_cancelled(client: httpx.AsyncClient, stages: FakeStages) -> None:
    response = await client.delete(f"/v1/jobs/{ID}", headers=KEYED)
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert operations(stages) == ["cancel"]


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/results"), ("DELETE", "")])
async def test_jobs_that_do_not_exist(client: httpx.AsyncClient, stages: FakeStages, method: str, path: str) -> None:
    problem(await client.request(method, f"/v1/jobs/no-such-job{path}", headers=KEYED), 404, "not_found")
    assert asked(stages) == []
    stages.behaviours[subjects.JOBS_REQUEST] = refusal(ErrorCode.NOT_FOUND)
    problem(await client.request(method, f"/v1/jobs/{ID}{path}", headers=KEYED), 404, "not_found")
    problem(await client.request(method, f"/v1/jobs/{ID}{path}"), 401, "invalid_credentials")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("?limit=0", "limit"), ("?limit=101", "limit"), ("?limit=x", "limit"), ("?limit=", "limit"), ("?before=x", "before"),
        (f"/{ID}/results?after=-1", "after"), (f"/{ID}/results?after=x", "after"), (f"/{ID}/results?after=", "after"),
        (f"/{ID}/results?limit=0", "limit"), (f"/{ID}/results?limit=100001", "limit"), (f"/{ID}/results?limit=1.5", "limit"),
    ],
)  # fmt: skip
async def test_a_query_that_cannot_be_read_is_422(client: httpx.AsyncClient, stages: FakeStages, path: str, field: str) -> None:
    document = problem(await client.get(f"/v1/jobs{path}", headers=KEYED), 422, "invalid_field")
    assert document["errors"][0]["field"] == field
    assert asked(stages) == []


# --- asking again --------------------------------------------------------------------------------------------------------


async def test_what_is_away_for_a_moment_is_asked_again(
    client: httpx.AsyncClient, stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PAUSE_SECONDS", (0.001, 0.001))
    failures: list[PortcullisError | Reply] = [
        PortcullisError(ErrorCode.STAGE_UNAVAILABLE),
        refusal(ErrorCode.STAGE_UNAVAILABLE),
        refusal(ErrorCode.INTERNAL),
    ]

    def answer(message: Message) -> Reply:
        if failures:
            failure = failures.pop(0)
            if isinstance(failure, PortcullisError):
                raise failure
            return failure
        return job_answer(message)

    stages.behaviours[subjects.JOBS_REQUEST] = answer
    assert (await client.get(f"/v1/jobs/{ID}", headers=KEYED)).status_code == 200
    assert operations(stages) == ["get"] * 4


async def test_what_stays_away_is_503_when_the_time_is_over(
    client: httpx.AsyncClient, stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PAUSE_SECONDS", (0.001, 0.001))

    def away(_: Message) -> Reply:
        stages.clock.advance(3)
        return refusal(ErrorCode.STAGE_UNAVAILABLE)

    stages.behaviours[subjects.JOBS_REQUEST] = away
    problem(await client.get(f"/v1/jobs/{ID}", headers=KEYED), 503, "stage_unavailable")
    assert len(asked(stages)) == 4  # ten seconds


async def test_a_refusal_is_not_asked_again(client: httpx.AsyncClient, stages: FakeStages) -> None:
    stages.behaviours[subjects.JOBS_REQUEST] = refusal(ErrorCode.OVERLOADED, retry_after=10)
    response = await client.get(f"/v1/jobs/{ID}", headers=KEYED)
    problem(response, 429, "overloaded")
    assert response.headers["retry-after"] == "10"
    assert len(asked(stages)) == 1
