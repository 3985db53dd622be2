"""Jobs on a real NATS, from the call at the edge to the stored results."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from nats.js.errors import NotFoundError
from standardwebhooks.webhooks import Webhook

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common.clock import SystemClock
from libs.common.contracts import ItemResult, JobItem, JobResult
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import JOB_DEAD_STREAM, JOB_ITEMS_STREAM, JOB_RESULTS_STREAM, job_subject
from services.jobs import command
from services.jobs.adapters import JetStreamQueues, JetStreamRecords, JetStreamResults
from services.jobs.core import Queue
from tests.conftest import free_port, running
from tests.integration.jobs_kit import KEY_ID, LINES, VERDICT, Around, System, lines, replica, system, until
from tests.integration.test_edge import KEYED


@pytest.fixture
def server(tmp_path: Path, nats_passwords: dict[str, str]) -> Iterator[Server]:
    """A server of the test's own: a replica runs every job that it finds."""
    with running(servers.nats(tmp_path / "nats", free_port(), nats_passwords)) as each:
        yield each


@pytest.fixture
async def kit(server: Server, nats_passwords: dict[str, str]) -> AsyncIterator[System]:
    async with system(server, nats_passwords) as each:
        yield each


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


async def empty(kit: System) -> bool:
    """No job is open, and no item is kept."""
    items = await kit.js.stream_info(JOB_ITEMS_STREAM)
    return not await kit.js.consumers_info(JOB_ITEMS_STREAM) and not items.state.messages


async def queue_of(kit: System, job_id: str) -> Queue:
    queue = await JetStreamQueues(kit.stream).one(KEY_ID, job_id)
    assert queue is not None
    return queue


# --- all is well ---------------------------------------------------------------------------------------------------------


async def test_a_job_from_its_submission_to_its_results(kit: System) -> None:
    given = [*texts(300), "ignore all"]
    async with replica(kit.fleet):
        response = await kit.client.post("/v1/detect/batch", content=lines(*given), headers=LINES)
        assert response.status_code == 202
        job_id = response.json()["id"]
        assert response.headers["location"] == f"/v1/jobs/{job_id}"
        job = await kit.wait(job_id)
        assert job == {**job, "state": "done", "total": 301, "done": 301, "malicious": 1, "failed": 0}
        found = await kit.results(job_id)
        assert sorted(line["index"] for line in found) == list(range(301))
        assert {line["index"]: line["id"] for line in found} == {place: f"id-{place}" for place in range(301)}
        assert [line["index"] for line in found if line["is_malicious"]] == [300]
        assert sum(granted for _, granted in kit.around.taken) == 301
        await until(lambda: empty(kit))
    listed = await kit.js.stream_info(JOB_RESULTS_STREAM)
    assert listed.state.messages == 301


async def test_two_replicas_share_a_job(kit: System) -> None:
    kit.around.gate.clear()
    async with replica(kit.fleet, jobs_slots=1, jobs_message_items=8), replica(kit.fleet, jobs_slots=1, jobs_message_items=8):
        job_id = await kit.submit(lines(*texts(200)))

        async def both() -> bool:
            return len(kit.around.messages) == 2  # one message at a time each, and nobody answers

        await until(both)
        kit.around.gate.set()
        assert (await kit.wait(job_id))["done"] == 200
    assert kit.around.judged == Counter(texts(200))


async def test_results_are_read_on_from_a_cursor(kit: System) -> None:
    async with replica(kit.fleet):
        job_id = await kit.submit(lines(*texts(50)))
        await kit.wait(job_id)
        everything = await kit.results(job_id)
        cursor, found = "0", []
        while page := await kit.results(job_id, after=cursor, limit="7"):
            assert len(page) <= 7
            found += page
            cursor = page[-1]["cursor"]
        assert found == everything
        assert await kit.results(job_id, after=everything[-1]["cursor"]) == []


async def test_a_cancelled_job_stops_and_keeps_what_was_judged(kit: System) -> None:
    kit.around.room = 10
    async with replica(kit.fleet, jobs_message_items=10):
        job_id = await kit.submit(lines(*texts(100)))

        async def judged() -> bool:
            return bool((await kit.job(job_id))["done"] == 10)

        await until(judged)
        response = await kit.client.delete(f"/v1/jobs/{job_id}", headers=KEYED)
        assert response.json() == {**response.json(), "state": "cancelled", "done": 10}
        await until(lambda: empty(kit))
        kit.around.room = float("inf")
        other = await kit.submit(lines("another"))
        await kit.wait(other)
        assert len(await kit.results(job_id)) == 10
        assert (await kit.job(job_id))["state"] == "cancelled"
        listed = (await kit.client.get("/v1/jobs", headers=KEYED)).json()["jobs"]
        assert [job["id"] for job in listed] == [other, job_id]


async def test_the_same_idempotency_key_is_the_same_job_and_another_body_a_conflict(kit: System) -> None:
    async with replica(kit.fleet):
        body = lines(*texts(20))
        first = await kit.submit(body, **{"Idempotency-Key": "one"})
        assert await kit.submit(body, **{"Idempotency-Key": "one"}) == first
        response = await kit.client.post("/v1/detect/batch", content=lines("other"), headers={**LINES, "Idempotency-Key": "one"})
        assert (response.status_code, response.json()["type"]) == (409, "urn:portcullis:problem:conflict")
        assert await kit.submit(body, **{"Idempotency-Key": "two"}) != first
        await kit.wait(first)


async def test_submissions_that_cannot_be_read_do_not_use_up_the_open_jobs(kit: System) -> None:
    async with replica(kit.fleet, jobs_open_per_key=2):
        for _ in range(5):
            response = await kit.client.post("/v1/detect/batch", content=lines("a") + b'{"text":""}\n', headers=LINES)
            assert response.status_code == 422
        await kit.wait(await kit.submit(lines("a")))


# --- pacing --------------------------------------------------------------------------------------------------------------


async def test_a_job_is_paced_by_the_keys_limits(kit: System) -> None:
    kit.around.room = 5
    async with replica(kit.fleet):
        job_id = await kit.submit(lines(*texts(12)))

        async def refused() -> bool:
            return any(granted == 0 for _, granted in kit.around.taken)

        await until(refused)
        assert sum(kit.around.judged.values()) == 5
        kit.around.room = 7
        assert (await kit.wait(job_id))["done"] == 12
    assert sum(granted for _, granted in kit.around.taken) == 12


async def test_a_key_that_is_revoked_fails_the_job(kit: System) -> None:
    kit.around.key_known = False
    async with replica(kit.fleet):
        job = await kit.wait(await kit.submit(lines("a")))
        assert (job["state"], job["done"]) == ("failed", 0)
        assert "key" in job["reason"]
        await until(lambda: empty(kit))


# --- once and only once --------------------------------------------------------------------------------------------------


async def test_two_hundred_results_that_were_stored_and_not_acknowledged_are_each_seen_once(kit: System) -> None:
    """Whoever had the items has died after it stored their results, each time before it could say so."""
    kit.around.room = 0
    async with replica(kit.fleet):
        job_id = await kit.submit(lines(*texts(200)))
    queues, results = JetStreamQueues(kit.stream), JetStreamResults(kit.stream)
    for _ in range(200):
        (delivery,) = await queues.fetch(KEY_ID, job_id, 1, 5)
        await results.store(KEY_ID, job_id, JobResult(index=delivery.index, result=ItemResult(verdict=VERDICT), id="first"))
    seen = await queue_of(kit, job_id)
    assert (seen.waiting, seen.in_hand) == (0, 200)
    kit.around.room = float("inf")
    async with replica(kit.fleet):
        job = await kit.wait(job_id)
        found = await kit.results(job_id)
        await until(lambda: empty(kit))
    assert (job["state"], job["done"], job["failed"]) == ("done", 200, 0)
    assert Counter(line["index"] for line in found) == Counter(range(200))
    assert {line["id"] for line in found} == {"first"}
    assert not kit.around.judged


async def test_a_result_that_is_stored_twice_stays_the_first(kit: System) -> None:
    async with replica(kit.fleet):
        job_id = await kit.submit(lines("a"))
        await kit.wait(job_id)
        (before,) = await kit.results(job_id)
        await JetStreamResults(kit.stream).store(
            KEY_ID, job_id, JobResult(index=0, result=ItemResult(verdict=VERDICT), id="late")
        )
        assert await kit.results(job_id) == [before]


async def test_an_item_that_is_appended_again_is_one_whatever_the_window_of_deduplication(kit: System) -> None:
    """Nothing is sent that the window could recognise: what is stored under the item's own subject decides."""
    kit.around.room = 0
    async with replica(kit.fleet):
        job_id = await kit.submit(lines("a", "b"))
        subject = job_subject(KEY_ID, job_id, "items", 0)
        stored = await kit.js.get_msg(JOB_ITEMS_STREAM, subject=subject, direct=True)
        assert "Nats-Msg-Id" not in (stored.headers or {})
        before = (await kit.js.stream_info(JOB_ITEMS_STREAM)).state.last_seq
        await JetStreamQueues(kit.stream).append(KEY_ID, job_id, 0, [JobItem(text="a", id="id-0"), JobItem(text="other")])
        assert (await kit.js.stream_info(JOB_ITEMS_STREAM)).state.last_seq == before
        kit.around.room = float("inf")
        await kit.wait(job_id)
        assert Counter(line["index"] for line in await kit.results(job_id)) == Counter([0, 1])
    assert kit.around.judged == Counter(["a", "b"])


async def test_items_that_come_back_when_nothing_else_waits_are_judged(kit: System) -> None:
    kit.around.away = True
    async with replica(kit.fleet):
        job_id = await kit.submit(lines("a", "b"))

        async def tried() -> bool:
            return len(kit.around.messages) >= 2

        await until(tried)
        kit.around.away = False
        job = await kit.wait(job_id)
    assert (job["state"], job["failed"]) == ("done", 0)


async def test_what_a_replica_had_in_hand_when_it_was_lost_is_judged_by_another(kit: System) -> None:
    kit.around.room = 0
    async with replica(kit.fleet):
        job_id = await kit.submit(lines(*texts(20)))
    assert len(await JetStreamQueues(kit.stream).fetch(KEY_ID, job_id, 20, 5)) == 20  # and is never heard of again
    kit.around.room = float("inf")
    async with replica(kit.fleet):
        assert (await kit.wait(job_id))["done"] == 20
    assert kit.around.judged == Counter(texts(20))


async def test_a_job_that_waits_outlives_the_server(tmp_path: Path, nats_passwords: dict[str, str]) -> None:
    server = servers.nats(tmp_path / "nats", free_port(), nats_passwords)
    around = Around(room=0)
    with running(server):
        async with system(server, nats_passwords, around) as kit, replica(kit.fleet):
            job_id = await kit.submit(lines(*texts(50)))
    with running(server):
        async with system(server, nats_passwords, Around()) as kit, replica(kit.fleet):
            assert (await kit.wait(job_id))["done"] == 50


async def test_a_stream_that_is_full_refuses_the_submission_and_what_was_accepted_stays(kit: System) -> None:
    kit.around.room = 0
    async with replica(kit.fleet, jobs_items_stream_bytes=1024**2, jobs_max_bytes=4 * 1024**2):
        accepted = await kit.submit(lines(*texts(20)))
        response = await kit.client.post("/v1/detect/batch", content=lines(*["x" * 50_000] * 40), headers=LINES)
        assert (response.status_code, response.json()["type"]) == (429, "urn:portcullis:problem:overloaded")
        assert [queue.job_id for queue in await JetStreamQueues(kit.stream).all()] == [accepted]
        kit.around.room = float("inf")
        assert (await kit.wait(accepted))["done"] == 20


# --- what is given up ----------------------------------------------------------------------------------------------------


async def test_items_that_are_given_up_are_listed_and_replayed(kit: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.core.MAX_FAILURES", 2)
    kit.around.broken = frozenset({"broken one", "broken two"})
    async with replica(kit.fleet):
        job_id = await kit.submit(lines("a", "broken one", "b", "broken two"))
        job = await kit.wait(job_id)
        assert (job["state"], job["done"], job["failed"]) == ("done", 4, 2)
        failed = {line["index"]: line for line in await kit.results(job_id) if "error" in line}
        assert {place: line["error"]["code"] for place, line in failed.items()} == {1: "internal", 3: "internal"}

        out = StringIO()
        await command.show(kit.stream, out)
        shown = sorted(out.getvalue().splitlines())
        assert len(shown) == 2
        assert all(KEY_ID in line and job_id in line and "internal: It broke." in line for line in shown)
        assert "broken one" not in out.getvalue()

        kit.around.broken = frozenset()
        with pytest.raises(command.NothingToReplayError):
            await command.replay(kit.stream, SystemClock(), "f" * 28)
        replayed = await command.replay(kit.stream, SystemClock(), job_id)
        job = await kit.wait(replayed)
        assert (job["state"], job["done"], job["failed"]) == ("done", 2, 0)
        assert {line["id"] for line in await kit.results(replayed)} == {"id-1", "id-3"}
        assert (await kit.js.stream_info(JOB_DEAD_STREAM)).state.messages == 0
        assert len(await kit.results(job_id)) == 4  # as they were


def command_environment(server: Server, passwords: dict[str, str]) -> dict[str, str]:
    return {
        "PORTCULLIS_NATS_URL": server.url,
        "PORTCULLIS_NATS_USER": "jobs",
        "PORTCULLIS_NATS_PASSWORD": passwords["jobs"],
    }


async def test_the_command_lists_and_replays_with_the_rights_of_the_service(
    kit: System,
    server: Server,
    nats_passwords: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("services.jobs.core.MAX_FAILURES", 1)
    for name, value in command_environment(server, nats_passwords).items():
        monkeypatch.setenv(name, value)
    kit.around.broken = frozenset({"broken"})
    async with replica(kit.fleet):
        job_id = await kit.submit(lines("broken"))
        await kit.wait(job_id)
        assert await asyncio.to_thread(command.main, ["dead-letters"]) == 0
        assert job_id in capsys.readouterr().out
        kit.around.broken = frozenset()
        assert await asyncio.to_thread(command.main, ["dead-letters", "--replay", job_id]) == 0
        replayed = capsys.readouterr().out.strip()
        assert (await kit.wait(replayed))["state"] == "done"
        assert await asyncio.to_thread(command.main, ["dead-letters", "--replay", job_id]) == 1
        assert "no dead letters" in capsys.readouterr().err


def test_the_command_says_when_nobody_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "CONNECT_SECONDS", 0.3)
    monkeypatch.setenv("PORTCULLIS_NATS_URL", f"nats://127.0.0.1:{free_port()}")
    assert command.main(["dead-letters"]) == 1
    assert "does the stack run?" in capsys.readouterr().err


async def test_a_text_that_ends_whoever_works_on_it_is_given_up_and_the_others_are_judged(
    kit: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.jobs.core.MAX_FAILURES", 2)
    monkeypatch.setattr("services.jobs.runner.PAUSE_SECONDS", (0.05, 0.2))
    kit.around.poison = frozenset({"poison"})
    async with replica(kit.fleet):
        job = await kit.wait(await kit.submit(lines("a", "poison", "b")), seconds=90)
    assert (job["state"], job["done"], job["failed"]) == ("done", 3, 1)


# --- webhooks ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def receiving(statuses: list[int]) -> AsyncIterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """Somebody's server, whose answers are these, and its URL."""
    got: list[tuple[dict[str, str], bytes]] = []

    async def receive(request: web.Request) -> web.Response:
        got.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response(status=statuses.pop(0))

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app, host="127.0.0.1") as receiver:
        yield str(receiver.make_url("/hook")), got


async def test_a_webhook_arrives_signed_and_again_until_it_is_taken(kit: System) -> None:
    async with receiving([500, 200]) as (url, got), replica(kit.fleet, webhook_allow_private=True):
        response = await kit.client.post(
            "/v1/detect/batch", params={"webhook_url": url}, content=lines("a", "ignore"), headers=LINES
        )
        assert response.status_code == 202, response.text
        job_id, secret = response.json()["id"], response.json()["webhook"]["secret"]

        async def taken() -> bool:
            return len(got) == 2

        await until(taken)
        assert "secret" not in (await kit.job(job_id))["webhook"]
        for headers, body in got:
            event = Webhook(secret).verify(body, headers)
            assert event == json.loads(body)
            assert event["type"] == "job.done"
            assert (event["data"]["job_id"], event["data"]["done"], event["data"]["malicious"]) == (job_id, 2, 1)
            assert b"ignore" not in body
        assert len({headers["webhook-id"] for headers, _ in got}) == 1

        async def acknowledged() -> bool:
            return (await kit.js.stream_info("JOB_HOOKS")).state.messages == 0

        await until(acknowledged)


async def test_a_webhook_to_a_private_address_is_refused(kit: System) -> None:
    async with replica(kit.fleet):
        response = await kit.client.post(
            "/v1/detect/batch", params={"webhook_url": "http://127.0.0.1:9/"}, content=lines("a"), headers=LINES
        )
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "webhook.url"
        assert await empty(kit)


# --- the adapters --------------------------------------------------------------------------------------------------------


async def test_streams_are_made_once_and_never_altered(kit: System) -> None:
    async with replica(kit.fleet, jobs_results_stream_bytes=2 * 1024**2):
        pass
    async with replica(kit.fleet, jobs_results_stream_bytes=4 * 1024**2):
        pass
    assert (await kit.js.stream_info(JOB_RESULTS_STREAM)).config.max_bytes == 2 * 1024**2


async def test_a_page_of_results_ends_at_its_bytes_and_holds_at_least_one(kit: System) -> None:
    async with replica(kit.fleet):
        results = JetStreamResults(kit.stream)
        for index in range(10):
            verdict = ItemResult(verdict=VERDICT)
            await results.store(KEY_ID, "f" * 28, JobResult(index=index, result=verdict, id="x" * 200))
        page, more = await results.page(KEY_ID, "f" * 28, 0, 10, 1)
        assert (len(page), more) == (1, True)
        page, more = await results.page(KEY_ID, "f" * 28, page[-1][0], 10, 1_000_000)
        assert (len(page), more) == (9, False)
        assert [index for _, index, _ in await results.outcomes(KEY_ID, "f" * 28, 0, 100)] == list(range(10))
        assert [outcome for _, _, outcome in await results.outcomes(KEY_ID, "f" * 28, 0, 3)] == ["benign"] * 3

        async def readers_gone() -> bool:
            return not await kit.js.consumers_info(JOB_RESULTS_STREAM)

        await until(readers_gone)


async def test_the_store_that_is_away_is_an_outage_and_no_answer(tmp_path: Path, nats_passwords: dict[str, str]) -> None:
    server = servers.nats(tmp_path / "nats", free_port(), nats_passwords)
    with running(server):
        async with system(server, nats_passwords) as kit:
            records = JetStreamRecords(kit.stream)
            with pytest.raises(PortcullisError) as caught:
                await records.get(KEY_ID, "f" * 28)  # no replica has made the streams yet
            assert caught.value.code == ErrorCode.STAGE_UNAVAILABLE
            with pytest.raises(NotFoundError):
                await kit.js.stream_info(JOB_ITEMS_STREAM)
