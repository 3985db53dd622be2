"""The client and the command line against a running stack, while it is well and while parts of it die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import portcullis_client as pc
from portcullis_client import AsyncClient, Client, Item
from tests.chaos.kit import ATTACK, BENIGN, ROOT, Stack
from tests.conftest import wait_until

PORTCULLIS = ROOT / ".venv" / "bin" / "portcullis"
TEXTS = [ATTACK if number % 3 == 0 else BENIGN for number in range(700)]


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, stack.key, admin_token=stack.secret("PORTCULLIS_ADMIN_TOKEN")) as client:
        yield client


def portcullis(
    stack: Stack, *arguments: str, key: str | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PORTCULLIS, *arguments], env=environment(stack, key), input=stdin, text=True, capture_output=True, timeout=120
    )


def environment(stack: Stack, key: str | None = None) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PORTCULLIS_")}
    return bare | {"PORTCULLIS_URL": stack.url, "PORTCULLIS_API_KEY": stack.key if key is None else key}


def test_one_text(client: Client) -> None:
    verdict = client.detect(ATTACK, detailed=True)
    assert verdict.is_malicious
    assert verdict.threat_types
    assert verdict.reason
    assert verdict.spans[0].end <= len(ATTACK)
    assert not client.detect(BENIGN).is_malicious
    assert not client.detect(ATTACK, threshold=1.0).is_malicious


def test_what_the_gateway_refuses_is_typed(stack: Stack, client: Client) -> None:
    with pytest.raises(pc.InvalidFieldError) as invalid:
        client.detect("")
    assert invalid.value.fields[0].field == "text"
    assert invalid.value.request_id
    with pytest.raises(pc.InvalidFieldError):
        client.detect("x" * 100_001)
    with pytest.raises(pc.NotFoundError):
        client.get_key("nobody")
    with Client(stack.url, "pc_live_wrong") as stranger, pytest.raises(pc.InvalidCredentialsError):
        stranger.profile()
    with Client(stack.url, stack.key) as user, pytest.raises(pc.ForbiddenError):
        user.list_keys()


def test_a_keys_life(stack: Stack, client: Client) -> None:
    issued = client.register("Life", rate_limit_per_minute=5)
    with Client(stack.url, issued.api_key) as own:
        own.detect(BENIGN)
        profile = own.profile()
        assert (profile.key_id, profile.rate_limit_per_minute, profile.remaining_this_minute) == (issued.key_id, 5, 4)
        rotated = own.rotate()
        assert rotated.key_id == issued.key_id
        assert rotated.previous_valid_until is not None
    with Client(stack.url, rotated.api_key) as own:
        own.detect(BENIGN)
        own.revoke()
        with pytest.raises(pc.InvalidCredentialsError):
            own.profile()
    created = client.create_key("Made", scopes=["detect"], rate_limit_per_minute=7)
    assert client.update_key(created.key_id, name="Renamed").name == "Renamed"
    assert client.get_key(created.key_id).rate_limit_per_minute == 7
    client.revoke_key(created.key_id)
    assert client.get_key(created.key_id).revoked_at is not None
    page = client.list_keys(limit=1)
    assert len(page.keys) == 1
    assert page.next_after is not None


def test_many_texts(client: Client) -> None:
    texts = [*TEXTS, "", "half \ud800", "separated\u2028by a line", "long " * 19_000]
    results = client.batch(Item(text=text, id=f"{number}\u2028") for number, text in enumerate(texts))
    assert [(each.index, each.id) for each in results] == [(number, f"{number}\u2028") for number in range(len(texts))]
    assert [each.unwrap().is_malicious for each in results[: len(TEXTS)]] == [text == ATTACK for text in TEXTS]
    *_, empty, half, separated, long = results
    assert isinstance(empty.error, pc.InvalidFieldError)
    assert isinstance(half.error, pc.InvalidFieldError)
    assert separated.verdict is not None
    assert long.unwrap().coverage is not None


async def test_many_at_a_time_with_asyncio(stack: Stack) -> None:
    async with AsyncClient(stack.url, stack.key) as client:
        verdicts = await asyncio.gather(*(client.detect(text) for text in TEXTS[:60]))
        assert [verdict.is_malicious for verdict in verdicts] == [text == ATTACK for text in TEXTS[:60]]
        assert len(await client.batch(TEXTS[:100])) == 100


def test_a_job_and_its_results(client: Client) -> None:
    job = client.submit_job(
        (Item(text=text, id=str(number)) for number, text in enumerate(TEXTS)), idempotency_key=os.urandom(8).hex()
    )
    stored = list(client.results(job.id, follow=True))
    assert sorted(each.index for each in stored) == list(range(len(TEXTS)))
    assert all(each.unwrap().is_malicious == (TEXTS[each.index] == ATTACK) for each in stored)
    finished = client.wait(job.id, timeout_seconds=60)
    assert (finished.state, finished.done, finished.malicious) == ("done", len(TEXTS), TEXTS.count(ATTACK))
    middle = stored[400]
    assert list(client.results(job.id, after=middle.cursor)) == stored[401:]
    assert job.id in {each.id for each in client.jobs().jobs}


def test_one_job_for_one_idempotency_key(client: Client) -> None:
    key = os.urandom(8).hex()
    first = client.submit_job(TEXTS[:3], idempotency_key=key)
    assert client.submit_job(TEXTS[:3], idempotency_key=key).id == first.id
    with pytest.raises(pc.ConflictError):
        client.submit_job(TEXTS[:4], idempotency_key=key)
    client.cancel(first.id)
    assert client.wait(first.id, timeout_seconds=30).finished


def test_the_exit_code_is_the_verdict(stack: Stack) -> None:
    assert portcullis(stack, "detect", BENIGN).returncode == 0
    attack = portcullis(stack, "detect", "--json", "-", stdin=ATTACK + "\n")
    assert (attack.returncode, json.loads(attack.stdout)["is_malicious"]) == (1, True)
    unknown = portcullis(stack, "detect", "x", key="pc_live_unknown")
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (3, "", 1)


def test_a_scan_whose_reader_has_gone_does_not_end_as_benign(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text(f"{BENIGN}\n" * 2000)
    command = f"{PORTCULLIS} scan --quiet {source} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(stack), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (3, 1, "")


def test_detailed_results_of_full_portions_do_not_stand_still(client: Client) -> None:
    """A body is sent whole before any of the answer is read: it must never be the gateway that waits for the reader."""
    texts = [f"{number} {ATTACK} " * 4 for number in range(1500)]
    results = list(client.detect_many(texts, detailed=True))
    assert sorted(each.index for each in results) == list(range(len(texts)))
    assert all(each.unwrap().reason for each in results)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_scan_survives_the_edge_and_its_own_interruption(stack: Stack, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"{ATTACK if number % 3 == 0 else BENIGN} {number}" for number in range(3000)]
    source.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
    command = [str(PORTCULLIS), "scan", str(source), "-o", str(output)]

    scan = subprocess.Popen(command, env=environment(stack), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(lines_of(output)) > 200, what="the first results")
    for pid in stack.pids("edge"):
        stack.signal(pid, signal.SIGKILL)
    seen = len(lines_of(output))
    wait_until(lambda: len(lines_of(output)) > seen + 300, what="results after the edge has died")
    scan.send_signal(signal.SIGINT)
    _, said = scan.communicate(timeout=30)
    assert scan.returncode == 130, said
    assert "the same command goes on from here" in said
    assert "Traceback" not in said

    before = lines_of(output)
    assert len(before) < len(texts)
    again = subprocess.run(command, env=environment(stack), capture_output=True, text=True, timeout=120)
    assert again.returncode == 1, again.stderr
    rows = lines_of(output)
    assert rows[: len(before)] == before
    assert sorted(row["row"] for row in rows) == list(range(1, len(texts) + 1))  # type: ignore[type-var]
    for row in rows:
        assert row["is_malicious"] == texts[int(str(row["row"])) - 1].startswith(ATTACK)


def test_the_client_is_installed_where_nothing_else_is(stack: Stack, tmp_path: Path) -> None:
    environment_path = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment_path], check=True)
    pip = [str(environment_path / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", str(ROOT / "libs" / "client")], check=True, cwd=tmp_path)
    listed = json.loads(subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout)
    names = {package["name"].lower() for package in listed}
    assert "portcullis-client" in names
    assert not names & {"fastapi", "faststream", "nats-py", "redis", "sqlmodel", "onnxruntime", "pyarrow", "portcullis-common"}
    done = subprocess.run(
        [environment_path / "bin" / "portcullis", "detect", ATTACK], env=environment(stack), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 1, done.stderr


def test_the_command_line_from_a_clone(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(ATTACK)
    home = {"PORTCULLIS_HOME": str(stack.home)}
    command = [str(ROOT / "run"), "portcullis", "scan", "prompts.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(stack) | home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["is_malicious"] is True
