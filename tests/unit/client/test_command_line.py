"""The command line, against a played gateway: exit codes, one line for an error, and scans that are taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
import pyarrow as pa
import pyarrow.parquet
import pytest

from portcullis_client import Client
from portcullis_client.cli import session
from portcullis_client.cli.main import cli
from tests.unit.client.kit import JOB, KEY, VERDICT, Gateway, Handler, item_problem, ndjson, problem, result, summary, texts_of


class Shell:
    """`portcullis …` as a user types it: exit code, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setenv("PORTCULLIS_API_KEY", KEY)

    def __call__(self, handler: Handler, *arguments: object) -> tuple[int, str, str]:
        played = partial(Client, transport=httpx.MockTransport(handler), sleep=lambda _: None)
        self._monkeypatch.setattr(session, "Client", played)
        code = session.run(cli, [str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def answer(**fields: Any) -> Gateway:
    return Gateway(httpx.Response(200, json=VERDICT | fields))


# --- detect --------------------------------------------------------------------------------------------------------------


def test_the_exit_code_is_the_verdict(shell: Shell) -> None:
    code, out, err = shell(answer(), "detect", "bad")
    assert (code, err) == (1, "")
    assert out.startswith("MALICIOUS  0.920  jailbreak")
    code, out, _ = shell(answer(is_malicious=False, confidence=0.01, threat_types=[]), "detect", "good")
    assert code == 0
    assert out.startswith("benign  0.010")
    assert shell(answer(), "detect", "-q", "bad") == (1, "", "")


def test_json_is_the_gateways_answer(shell: Shell) -> None:
    assert json.loads(shell(answer(), "detect", "--json", "bad")[1]) == VERDICT


def test_a_degraded_verdict_says_so(shell: Shell) -> None:
    assert "degraded" in shell(answer(degraded=True), "detect", "bad")[1]


def test_a_text_does_not_steer_the_terminal(shell: Shell) -> None:
    text = "\x1b]0;owned\x07\x1b[2J[bold]näive[/bold]"
    spans = [{"start": 0, "end": len(text), "score": 0.9}]
    _, out, _ = shell(answer(reason="Because.", spans=spans), "detect", "-d", text)
    assert r"\x1b]0;owned\x07\x1b[2J[bold]näive[/bold]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (problem("no_engine", 503, detail="No detection engine can answer at the moment."), "No detection engine"),
        (problem("rate_limited", 429, retry_after=7200), "try again in 2.0 h (request id r9)"),
        (problem("invalid_credentials", 401), "the key in PORTCULLIS_API_KEY is not valid"),
        (
            httpx.ConnectError("[Errno 111] Connection refused"),
            "Connection refused; is the gateway up, and",
        ),
        (httpx.Response(200, text="hello"), "is this the address of a Portcullis gateway?"),
    ],
)
def test_an_error_is_one_line_and_never_benign(shell: Shell, reply: httpx.Response | Exception, said: str) -> None:
    code, out, err = shell(Gateway(*[reply] * 5), "detect", "x")
    assert (code, out) == (3, "")
    (line,) = err.splitlines()
    assert line.startswith("portcullis: ")
    assert said in line


def test_without_a_key_it_is_said_how_to_get_one(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTCULLIS_API_KEY")
    code, _, err = shell(Gateway(problem("invalid_credentials", 401)), "detect", "x")
    assert code == 3
    assert "no API key: set PORTCULLIS_API_KEY; `portcullis keys register NAME` issues one" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect"],
        ["detect", ""],
        ["detect", "x", "--threshold", "2"],
        ["nonsense"],
        ["--url", "gateway", "detect", "x"],
        ["scan", "/nowhere.csv"],
        ["scan", __file__],
        ["admin", "create", "x", "--expires", "tomorrow"],
    ],
)
def test_usage_is_2(shell: Shell, arguments: list[str]) -> None:
    code, out, err = shell(Gateway(), *arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


def _commands(command: click.Command, *path: str) -> list[tuple[str, ...]]:
    below = command.commands.items() if isinstance(command, click.Group) else ()
    return [path, *(each for name, sub in below for each in _commands(sub, *path, name))]


@pytest.mark.parametrize("path", _commands(cli), ids=" ".join)
def test_every_command_explains_itself(shell: Shell, path: tuple[str, ...]) -> None:
    code, out, err = shell(Gateway(), *path, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: portcullis " + " ".join(path))


# --- scan ----------------------------------------------------------------------------------------------------------------


def judging(request: httpx.Request) -> httpx.Response:
    texts = texts_of(request)
    return ndjson(*(result(i, malicious="bad" in text) for i, text in enumerate(texts)), summary(len(texts)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def brief(rows: list[dict[str, Any]]) -> list[tuple[int, str | None, object]]:
    verdicts = ((row["row"], row["id"], row.get("is_malicious", row.get("error", {}).get("code"))) for row in rows)
    return sorted(verdicts, key=lambda row: row[0])


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"id": [7, 8, 9], "text": ["good", None, "bad\nnews"]}), path)


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.txt", lambda path: path.write_bytes(b"good\r\n\nbad\xe2\x80\xa8news"), [(1, None, False), (3, None, True)]),
        (
            "a.csv",
            lambda path: path.write_text('\ufeffid,text,other\n7,good,x\n8,"bad\nnews, ""quoted""",x\n9\n', encoding="utf-8"),
            [(1, "7", False), (2, "8", True), (3, "9", "no_text")],
        ),
        ("a.tsv", lambda path: path.write_text("text\tid\nbad, news\t7\n"), [(1, "7", True)]),
        (
            "a.jsonl",
            lambda path: path.write_text(
                '{"text": "good", "id": 7}\n\n{"text": "bad"}\n[]\n{\n{"text": 5}\n{"text": "\\ud800"}\n'
            ),
            [(1, "7", False), (3, None, True), *((number, None, "no_text") for number in (4, 5, 6, 7))],
        ),
        ("a.parquet", write_parquet, [(1, "7", False), (2, "8", "no_text"), (3, "9", True)]),
    ],
)
def test_texts_of_every_kind_of_file(
    shell: Shell, tmp_path: Path, name: str, write: Callable[[Path], None], expected: list[tuple[int, str | None, object]]
) -> None:
    write(tmp_path / name)
    code, out, err = shell(judging, "scan", tmp_path / name)
    assert brief([json.loads(line) for line in out.splitlines()]) == expected
    judged = {verdict for _, _, verdict in expected}
    assert code == (3 if "no_text" in judged else 1)
    assert "malicious" in err


def test_columns_are_chosen(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("key,prompt\nk1,good\n")
    code, out, _ = shell(judging, "scan", path, "--text-column", "prompt", "--id-column", "key", "-q")
    assert (code, json.loads(out)["id"]) == (0, "k1")
    code, _, err = shell(judging, "scan", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "has no column 'text'; choose with --text-column among: key, prompt" in err


@pytest.mark.parametrize("content", [b"\xff\xfe", b'id,text\n1,"never closed'])
def test_what_is_not_what_it_is_called_is_one_line(shell: Shell, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    code, _, err = shell(judging, "scan", path, "--text-column", "text")
    assert (code, err.count("\n")) == (2, 1)


def test_a_scan_that_was_interrupted_goes_on_where_it_was(shell: Shell, tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"text {number}\n" for number in range(600)))
    interrupted = Gateway(judging, KeyboardInterrupt())
    code, _, err = shell(interrupted, "scan", source, "-o", output)
    assert code == 130
    assert "interrupted; 256 of 600 done; the same command goes on from here" in err

    with output.open("ab") as file:
        file.write(b'{"row": 257, "id": nu')  # the power went while it was written
    asked: list[str] = []

    def counting(request: httpx.Request) -> httpx.Response:
        asked.extend(texts_of(request))
        return judging(request)

    code, _, err = shell(counting, "scan", source, "-o", output)
    assert code == 0
    assert asked == [f"text {number}" for number in range(256, 600)]
    assert sorted(row["row"] for row in rows_of(output)) == list(range(1, 601))
    assert "344 in" in err
    assert "256 before" in err

    before = output.read_bytes()
    assert shell(Gateway(), "scan", source, "-o", output)[0] == 0  # nothing is left to ask
    assert output.read_bytes() == before


def test_what_failed_in_passing_is_asked_again_and_what_is_at_fault_is_not(shell: Shell, tmp_path: Path) -> None:
    source, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "late"}\n{"text": ""}\n{"text": "good"}\n')
    late = {"index": 0, "id": None, "error": item_problem("no_engine", 503)}
    empty = {"index": 1, "id": None, "error": item_problem("invalid_field", 422)}
    first = Gateway(ndjson(late, empty, result(2), summary(3)), *[ndjson(late, summary(1))] * 4)
    assert shell(first, "scan", source, "-o", output)[0] == 3
    assert brief(rows_of(output)) == [(1, None, "no_engine"), (2, None, "invalid_field"), (3, None, False)]
    again = Gateway(judging)
    assert shell(again, "scan", source, "-o", output)[0] == 3
    assert texts_of(again.requests[0]) == ["late"]
    assert brief(rows_of(output)) == [(1, None, False), (2, None, "invalid_field"), (3, None, False)]


def test_results_of_something_else_are_left_alone(shell: Shell, tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out.jsonl"
    source.write_text("good\nbad\n")
    assert shell(judging, "scan", source, "-o", output)[0] == 1
    results = output.read_bytes()

    source.write_text("other\nbad\n")
    code, _, err = shell(Gateway(), "scan", source, "-o", output, "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert "row 1 differs" in err
    source.write_text("good\nbad\n")
    code, _, err = shell(Gateway(), "scan", source, "-o", output, "--threshold", "0.5")
    assert (code, "another --threshold" in err) == (2, True)
    code, _, err = shell(Gateway(), "scan", source, "-o", source)
    assert (code, "is no results file" in err) == (2, True)
    assert (output.read_bytes(), source.read_text()) == (results, "good\nbad\n")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out.jsonl"}


def test_a_limit_that_lasts_ends_the_scan_with_what_there_is(shell: Shell, tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out.jsonl"
    source.write_text("good\nbad\n")
    day = item_problem("rate_limited", 429, retry_after=1)
    refusal = problem("rate_limited", 429, retry_after=1)
    refusal.headers["ratelimit"] = '"minute";r=9;t=0, "day";r=0;t=36000'
    code, _, err = shell(Gateway(ndjson(result(0), summary(1, day)), refusal), "scan", source, "-o", output)
    assert code == 3
    assert "try again in 10.0 h" in err
    assert "1 of 2 done; the same command goes on from here" in err
    assert brief(rows_of(output)) == [(1, None, False)]


def test_an_output_that_cannot_be_written_is_one_line(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("good\n")
    code, _, err = shell(Gateway(), "scan", source, "-o", tmp_path / "missing" / "out.jsonl", "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert "No such file or directory" in err


# --- keys and jobs -------------------------------------------------------------------------------------------------------


def test_only_the_key_goes_to_standard_output(shell: Shell) -> None:
    issued = {
        "api_key": KEY, "key_id": "k1", "name": "App", "scopes": ["detect"], "rate_limit_per_minute": 60,
        "rate_limit_per_day": 10_000, "created_at": "2026-11-25T10:00:00Z", "expires_at": None,
    }  # fmt: skip
    code, out, err = shell(Gateway(httpx.Response(201, json=issued)), "keys", "register", "App")
    assert (code, out) == (0, KEY + "\n")
    assert KEY not in err
    assert json.loads(shell(Gateway(httpx.Response(201, json=issued)), "keys", "rotate", "--json")[1])["api_key"] == KEY


def test_revoking_asks_first(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(httpx.Response(204))
    assert shell(gateway, "keys", "revoke", "--yes")[0] == 0
    assert [(request.method, request.url.path) for request in gateway.requests] == [("DELETE", "/auth/key")]


def test_a_job_is_submitted_with_the_rows_as_ids(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a", "id": "x"}\n\n{"text": "b"}\n')
    gateway = Gateway(httpx.Response(202, json=JOB))
    code, out, _ = shell(gateway, "jobs", "submit", source)
    assert (code, out) == (0, f"{JOB['id']}\n")
    sent = [json.loads(line) for line in gateway.requests[0].content.splitlines()]
    assert sent == [{"id": "x", "text": "a"}, {"id": "3", "text": "b"}]
    source.write_text('{"text": 5}\n')
    code, _, err = shell(Gateway(), "jobs", "submit", source)
    assert (code, "row 1: no text in 'text'" in err) == (2, True)


def test_a_jobs_end_is_its_exit_code(shell: Shell) -> None:
    def end(**fields: object) -> Gateway:
        return Gateway(httpx.Response(200, json=JOB | {"state": "done", "done": 3} | fields))

    assert shell(end(), "jobs", "wait", "j")[0] == 0
    assert shell(end(malicious=1), "jobs", "wait", "j")[0] == 1
    assert shell(end(malicious=1, failed=1), "jobs", "wait", "j")[0] == 3
    assert shell(end(state="cancelled"), "jobs", "wait", "j")[0] == 3
    code, _, err = shell(Gateway(*[httpx.Response(200, json=JOB)] * 9), "jobs", "wait", "j", "--for", "1")
    assert (code, "is running: 1 of 3 done" in err) == (3, True)


def test_job_results_are_appended_behind_the_last_whole_line(shell: Shell, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(b'{"cursor": "4", "index": 0}\n{"cursor": "5", "ind')
    gateway = Gateway(ndjson(result(1, cursor="5", id="x"), {"index": 2, "cursor": "6", "error": item_problem("no_engine", 503)}))
    assert shell(gateway, "jobs", "results", "j", "-o", output)[0] == 0
    assert gateway.requests[0].url.params["after"] == "4"
    assert [row["cursor"] for row in rows_of(output)] == ["4", "5", "6"]
    assert rows_of(output)[2]["error"]["code"] == "no_engine"
    output.write_text("something else\n")
    assert shell(Gateway(), "jobs", "results", "j", "-o", output)[0] == 2
    assert output.read_text() == "something else\n"
