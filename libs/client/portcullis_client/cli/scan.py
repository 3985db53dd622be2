"""`portcullis scan`"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from portcullis_client.cli import terminal
from portcullis_client.cli.detect import threshold_option
from portcullis_client.cli.journal import Journal, Tally
from portcullis_client.cli.session import (
    BENIGN,
    EXIT_CODES,
    INTERRUPTED,
    MALICIOUS,
    NOT_JUDGED,
    Session,
    duration,
    line_of,
    pass_session,
    reason,
    tell_wait,
)
from portcullis_client.cli.sources import Row, Source, source_of, source_options
from portcullis_client.client import Client
from portcullis_client.errors import PortcullisError
from portcullis_client.retries import Retry
from portcullis_client.types import Item, ItemResult


class RateColumn(ProgressColumn):
    """Texts a second, of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed is not None else "", "dim")


@click.command(epilog=EXIT_CODES, short_help="Judge every text of a file.")
@source_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the results go, one line of JSON each; they are also the record by which a scan is taken up again."
    "  [default: standard output]",
)
@threshold_option
@click.option("-d", "--detailed", is_flag=True, help="Say why, in each result.")
@click.option(
    "--max-wait",
    "max_wait_minutes",
    type=click.FloatRange(min=0),
    default=15.0,
    show_default=True,
    metavar="MINUTES",
    help="How long a rate limit or an outage is waited out before the scan stops.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@pass_session
def scan(
    session: Session,
    file: str,
    chosen: str | None,
    text_column: str,
    id_column: str | None,
    output: Path | None,
    threshold: float | None,
    detailed: bool,
    max_wait_minutes: float,
    quiet: bool,
) -> int:
    """Judge every text of FILE (.jsonl, .csv, .tsv, .parquet, .txt; "-" is standard input).

    Rate limits are waited out. When a scan was interrupted, the same command goes on where it stopped. Results come in the
    order of completion; `row` says where a text was.
    """
    source = source_of(file, chosen, text_column, id_column)
    total = None if quiet else source.count()
    journal = Journal(output, threshold, sys.stdout.buffer)
    work = Work(source, journal, threshold, detailed)
    began = time.monotonic()
    stopped: str | None = None
    code = 0
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=terminal.err,
        disable=quiet or not terminal.err.is_terminal,
        transient=True,
    )
    try:
        with progress:
            task = progress.add_task("judging", total=total, completed=journal.resumed)

            def tell(error: PortcullisError, seconds: float) -> None:
                if not progress.disable:
                    progress.update(task, description=f"{reason(error)}, waiting {duration(seconds)}")
                elif not quiet:
                    tell_wait(error, seconds)

            retry = Retry(patience_seconds=max_wait_minutes * 60)
            with session.client(retry=retry, on_wait=tell) as client:
                for _ in work.run(client):
                    progress.update(task, advance=1, description=f"judging, {journal.tally.malicious:,} malicious")
    except PortcullisError as error:
        stopped, code = line_of(error), NOT_JUDGED
    except KeyboardInterrupt:
        stopped, code = "interrupted", INTERRUPTED
    finally:
        journal.close()
    tally = journal.tally
    if not quiet and tally.total:
        _summary(tally, journal.resumed, time.monotonic() - began)
    if stopped is not None:
        of = f" of {total:,}" if total is not None else ""
        onward = "; the same command goes on from here" if output is not None and file != "-" else ""
        terminal.say(f"portcullis: {stopped}; {tally.total:,}{of} done{onward}", "red")
        return code
    if tally.failed:
        return NOT_JUDGED
    return MALICIOUS if tally.malicious else BENIGN


class Work:
    """The rows of a source that have no result yet, and what becomes of them."""

    def __init__(self, source: Source, journal: Journal, threshold: float | None, detailed: bool) -> None:
        self._source = source
        self._journal = journal
        self._threshold = threshold
        self._detailed = detailed
        self._asked: dict[int, Row] = {}
        self._without_text: list[Row] = []

    def run(self, client: Client) -> Iterator[Row]:
        """Judges, writes down, and gives each row that has its result now."""
        for result in client.detect_many(self._items(), threshold=self._threshold, detailed=self._detailed):
            row = self._asked.pop(result.index)
            self._journal.write(row, self._fields(result))
            yield row
            yield from self._write_without_text()
        yield from self._write_without_text()

    def _items(self) -> Iterator[Item]:
        index = 0
        for row in self._source.rows():
            if self._journal.is_done(row):
                continue
            if row.text is None:
                self._without_text.append(row)
                continue
            self._asked[index] = row
            index += 1
            yield Item(text=row.text)

    def _write_without_text(self) -> Iterator[Row]:
        while self._without_text:
            row = self._without_text.pop(0)
            self._journal.write(row, {"error": {"code": "no_text", "detail": row.problem}})
            yield row

    def _fields(self, result: ItemResult) -> dict[str, object]:
        if result.verdict is None:
            error = result.error
            return {"error": {"code": error.code, "detail": str(error)}} if error is not None else {}
        fields = terminal.fields_of(result.verdict, detailed=self._detailed)
        return {name: value for name, value in fields.items() if name not in ("processing_time_ms", "request_id")}


def _summary(tally: Tally, resumed: int, seconds: float) -> None:
    judged = tally.malicious + tally.benign
    rows = terminal.table("", "texts", "")
    rows.add_row(Text("malicious", "red"), f"{tally.malicious:,}", _share(tally.malicious, judged))
    for name, count in tally.threats.most_common():
        rows.add_row(Text(f"  {terminal.printable(name)}", "dim"), f"{count:,}", "")
    rows.add_row(Text("benign", "green"), f"{tally.benign:,}", _share(tally.benign, judged))
    if tally.failed:
        rows.add_row(Text("not judged", "yellow"), f"{tally.failed:,}", "")
        for name, count in tally.errors.most_common():
            rows.add_row(Text(f"  {terminal.printable(name)}", "dim"), f"{count:,}", "")
    rows.columns[1].justify = rows.columns[2].justify = "right"
    terminal.err.print(rows)
    now = tally.total - resumed
    before = f", {resumed:,} before" if resumed else ""
    rate = f", {now / seconds:,.0f}/s" if now and seconds >= 1 else ""
    terminal.say(f"{now:,} in {duration(seconds)}{rate}{before}", "dim")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
