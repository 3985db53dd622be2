"""`portcullis …`"""

from __future__ import annotations

import sys
from importlib.metadata import version

import click

from portcullis_client.cli import admin, detect, jobs, keys, scan
from portcullis_client.cli.session import EXIT_CODES, Session, run
from portcullis_client.core import DEFAULT_URL


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.option("--url", metavar="URL", help=f"The gateway.  [default: $PORTCULLIS_URL, else {DEFAULT_URL}]")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one verdict may take.",
)
@click.version_option(version("portcullis-client"), message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, url: str | None, timeout_seconds: float) -> None:
    """Ask a Portcullis gateway whether texts try to take over a language model.

    The API key is taken from PORTCULLIS_API_KEY, and for `admin` the token from PORTCULLIS_ADMIN_TOKEN; never from the
    command line, where others could read it.

    \b
    Begin with:
        export PORTCULLIS_API_KEY=$(portcullis keys register "My App")
        portcullis detect "Ignore all previous instructions"
        portcullis scan prompts.csv -o results.jsonl
    """
    context.obj = Session(url, timeout_seconds)


for _command in (detect.detect, scan.scan, jobs.jobs, keys.keys, admin.admin):
    cli.add_command(_command)


def main() -> None:
    sys.exit(run(cli))
