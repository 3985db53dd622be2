"""`portcullis jobs`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from portcullis_client.calls import encode
from portcullis_client.cli import terminal
from portcullis_client.cli.detect import threshold_option
from portcullis_client.cli.keys import json_option
from portcullis_client.cli.session import EXIT_CODES, MALICIOUS, NOT_JUDGED, Complaint, Session, pass_session
from portcullis_client.cli.sources import Source, source_of, source_options
from portcullis_client.client import Client
from portcullis_client.types import Item, ItemResult, Job


@click.group(short_help="Many texts, judged in the gateway's own time.")
def jobs() -> None:
    """Many texts, judged in the gateway's own time and within your key's limits."""


@jobs.command(epilog=EXIT_CODES)
@source_options
@threshold_option
@click.option("-d", "--detailed", is_flag=True, help="Say why, in each result.")
@click.option("--idempotency-key", metavar="KEY", help="Submitted again with the same key, it is the same job.")
@click.option("--webhook", "webhook_url", metavar="URL", help="Told when the job is over (Standard Webhooks).")
@click.option("--wait", "wait_for_it", is_flag=True, help="Wait until it has finished.")
@pass_session
def submit(
    session: Session,
    file: str,
    chosen: str | None,
    text_column: str,
    id_column: str | None,
    threshold: float | None,
    detailed: bool,
    idempotency_key: str | None,
    webhook_url: str | None,
    wait_for_it: bool,
) -> int:
    """Submit every text of FILE; the job's id goes to standard output.

    Where a row has no id, the number of the row takes its place.
    """
    source = source_of(file, chosen, text_column, id_column)
    with session.client() as client:
        try:
            job = client.submit_job(
                _items(source),
                threshold=threshold,
                detailed=detailed,
                idempotency_key=idempotency_key,
                webhook_url=webhook_url,
            )
        except ValueError as error:
            raise Complaint(f"{file}: {error}") from None
        terminal.say(f"{job.total:,} texts submitted", "dim")
        if job.webhook is not None and job.webhook.secret is not None:
            terminal.say(f"The webhook's secret, shown this once: {job.webhook.secret}")
        terminal.out.print(job.id, markup=False)
        return _waited(client, job.id, None, terminal.err) if wait_for_it else 0


def _items(source: Source) -> Iterator[Item]:
    for row in source.rows():
        if row.text is None:
            raise ValueError(f"row {row.number}: {row.problem}")
        yield Item(text=row.text, id=row.id if row.id is not None else str(row.number))


@jobs.command("list")
@click.option("-n", "--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@json_option
@pass_session
def list_jobs(session: Session, limit: int, as_json: bool) -> None:
    """Your latest jobs, newest first."""
    with session.client() as client:
        page = client.jobs(limit=limit)
    if as_json:
        for job in page.jobs:
            terminal.print_json(job)
        return
    rows = terminal.table("job", "state", "done", "of", "malicious", "failed", "submitted")
    for job in page.jobs:
        counts = (f"{count:,}" for count in (job.done, job.total, job.malicious, job.failed))
        rows.add_row(job.id, job.state, *counts, terminal.shown(job.created_at))
    terminal.out.print(rows)


@jobs.command()
@click.argument("job_id")
@json_option
@pass_session
def show(session: Session, job_id: str, as_json: bool) -> None:
    """How far a job is."""
    with session.client() as client:
        _show(client.job(job_id), terminal.out, as_json=as_json)


@jobs.command()
@click.argument("job_id")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append to this file, after what it has already.  [default: standard output]",
)
@click.option("--after", metavar="CURSOR", help="Only what comes after this cursor.")
@click.option("-f", "--follow", is_flag=True, help="Until the job has finished.")
@pass_session
def results(session: Session, job_id: str, output: Path | None, after: str | None, follow: bool) -> None:
    """The results so far, one line of JSON each, in the order of completion."""
    if output is None:
        with session.client() as client:
            for result in client.results(job_id, after=after, follow=follow):
                terminal.print_json(_document(result))
        return
    with output.open("a+b") as file, session.client() as client:
        cursor = _last_cursor(file, output)
        for result in client.results(job_id, after=cursor if after is None else after, follow=follow):
            file.write(encode(_document(result)) + b"\n")
            file.flush()


class _Cursor(msgspec.Struct):
    cursor: str


def _last_cursor(file: IO[bytes], path: Path) -> str | None:
    """The cursor of the last whole line; a line that was interrupted is cut off. Raises `Complaint`."""
    cursor, end = None, 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            file.truncate(end)
            break
        end += len(line)
        try:
            cursor = msgspec.json.decode(line, type=_Cursor).cursor
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Complaint(f"{path} is no file of job results (line {number}): choose another one") from None
    return cursor


@jobs.command()
@click.argument("job_id")
@pass_session
def cancel(session: Session, job_id: str) -> None:
    """Cancel a job; what it has judged stays."""
    with session.client() as client:
        client.cancel(job_id)
        _show(client.job(job_id), terminal.out)


@jobs.command(epilog=EXIT_CODES)
@click.argument("job_id")
@click.option("--for", "seconds", type=click.FloatRange(min=0), metavar="SECONDS", help="At most so long.")
@pass_session
def wait(session: Session, job_id: str, seconds: float | None) -> int:
    """Wait until a job has finished, and say how it went."""
    with session.client() as client:
        return _waited(client, job_id, seconds, terminal.out)


def _waited(client: Client, job_id: str, seconds: float | None, console: Console) -> int:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=terminal.err,
        disable=not terminal.err.is_terminal,
        transient=True,
    )
    with progress:
        task = progress.add_task("waiting", total=None)

        def tell(job: Job) -> None:
            progress.update(task, total=job.total, completed=job.done, description=job.state)

        job = client.wait(job_id, timeout_seconds=seconds, on_progress=tell)
    _show(job, console)
    if job.state != "done" or job.failed:
        return NOT_JUDGED
    return MALICIOUS if job.malicious else 0


def _show(job: Job, console: Console, *, as_json: bool = False) -> None:
    if as_json:
        terminal.print_json(job)
        return
    console.print(
        terminal.facts(
            [
                ("job", job.id),
                ("state", job.state),
                ("reason", job.reason),
                ("done", f"{job.done:,} of {job.total:,}"),
                ("malicious", job.malicious),
                ("not judged", job.failed),
                ("submitted", job.created_at),
                ("started", job.started_at),
                ("finished", job.finished_at),
                ("texts a second", None if job.finished else job.items_per_second),
                ("expected end", None if job.finished else job.estimated_end_at),
            ]
        )
    )


def _document(result: ItemResult) -> dict[str, object]:
    document: dict[str, object] = {"cursor": result.cursor, "index": result.index, "id": result.id}
    if result.verdict is not None:
        verdict = result.verdict
        detailed = verdict.reason is not None or bool(verdict.timings)
        document |= {
            name: value
            for name, value in terminal.fields_of(verdict, detailed=detailed).items()
            if name not in ("processing_time_ms", "request_id")
        }
    elif result.error is not None:
        document["error"] = {"code": result.error.code, "detail": str(result.error)}
    return document
