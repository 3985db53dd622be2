"""`portcullis detect`"""

from __future__ import annotations

import sys

import click
from rich.text import Text

from portcullis_client.cli import terminal
from portcullis_client.cli.session import BENIGN, EXIT_CODES, MALICIOUS, Complaint, Session, pass_session
from portcullis_client.types import Verdict

threshold_option = click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="From which probability on a text is malicious.  [default: the model's own]",
)

_CONTEXT_CHARACTERS = 200


@click.command(epilog=EXIT_CODES, short_help="Judge one text.")
@click.argument("text")
@threshold_option
@click.option("-d", "--detailed", is_flag=True, help="Say why: which part of the text, and what it hides behind.")
@click.option("--json", "as_json", is_flag=True, help="The verdict as one line of JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No output: the exit code is the verdict.")
@pass_session
def detect(session: Session, text: str, threshold: float | None, detailed: bool, as_json: bool, quiet: bool) -> int:
    """Judge one TEXT; "-" reads it from standard input."""
    if text == "-":
        text = _standard_input()
    if not text:
        raise Complaint("the text is empty")
    with session.client() as client:
        try:
            verdict = client.detect(text, threshold=threshold, detailed=detailed)
        except ValueError as error:
            raise Complaint(str(error)) from None
    if as_json:
        terminal.print_json(terminal.fields_of(verdict, detailed=detailed))
    elif not quiet:
        _show(verdict, text)
    return MALICIOUS if verdict.is_malicious else BENIGN


def _standard_input() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise Complaint("standard input is not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _show(verdict: Verdict, text: str) -> None:
    line = Text.assemble(("MALICIOUS", "bold red") if verdict.is_malicious else ("benign", "bold green"))
    line.append(f"  {verdict.confidence:.3f}")
    if verdict.threat_types:
        line.append("  " + terminal.printable(", ".join(verdict.threat_types)), "yellow")
    line.append(f"  {terminal.printable(verdict.endpoint)}", "dim")
    if verdict.processing_time_ms is not None:
        line.append(f"  {verdict.processing_time_ms:.0f} ms", "dim")
    terminal.out.print(line)
    if verdict.degraded:
        terminal.out.print(Text("degraded: the gateway could not use its first engine, or all of its limiter", "yellow"))
    if verdict.coverage is not None and verdict.coverage.truncated:
        terminal.out.print(Text("truncated: only a part of the text was read", "yellow"))
    if verdict.reason:
        terminal.out.print(Text(terminal.printable(verdict.reason)))
    for span in verdict.spans:
        part = text[span.start : span.end]
        shortened = part if len(part) <= _CONTEXT_CHARACTERS else part[: _CONTEXT_CHARACTERS - 1] + "…"
        said = f"  {span.start}-{span.end}  {span.score:.3f}  "
        terminal.out.print(Text.assemble((said, "dim"), terminal.printable(shortened)))
    for transform in verdict.transforms:
        terminal.out.print(Text(f"  undone: {terminal.printable(transform.name)}, {transform.count}x", "dim"))
