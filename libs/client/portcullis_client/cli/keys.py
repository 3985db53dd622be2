"""`portcullis keys`"""

from __future__ import annotations

import click

from portcullis_client.cli import terminal
from portcullis_client.cli.session import Session, pass_session
from portcullis_client.types import IssuedKey, KeyRecord, Profile

per_minute_option = click.option(
    "--per-minute", type=click.IntRange(min=1), metavar="N", help="Texts in any 60 seconds.  [default: the gateway's]"
)
per_day_option = click.option(
    "--per-day", type=click.IntRange(min=1), metavar="N", help="Texts in any 24 hours.  [default: the gateway's]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.group(short_help="Your own API key.")
def keys() -> None:
    """Your own API key: issue, look at, rotate, revoke."""


@keys.command()
@click.argument("name")
@per_minute_option
@per_day_option
@json_option
@pass_session
def register(session: Session, name: str, per_minute: int | None, per_day: int | None, as_json: bool) -> None:
    """Issue a key called NAME.

    The key alone goes to standard output, so that
    `export PORTCULLIS_API_KEY=$(portcullis keys register "My App")` works.
    """
    with session.client() as client:
        show_issued(client.register(name, rate_limit_per_minute=per_minute, rate_limit_per_day=per_day), as_json=as_json)


@keys.command()
@json_option
@pass_session
def profile(session: Session, as_json: bool) -> None:
    """Your key's limits, what is left of them, and its use."""
    with session.client() as client:
        found = client.profile()
    show_record(found, as_json=as_json)


@keys.command()
@json_option
@pass_session
def rotate(session: Session, as_json: bool) -> None:
    """Issue a new secret for your key; the old one works on for a while."""
    with session.client() as client:
        show_issued(client.rotate(), as_json=as_json)


@keys.command()
@yes_option
@pass_session
def revoke(session: Session, yes: bool) -> None:
    """Revoke your key, for good."""
    with session.client() as client:
        if not yes:
            name = client.profile().name
            click.confirm(f'Revoke the key "{terminal.printable(name)}" for good?', abort=True, err=True)
        client.revoke()
    terminal.say("revoked")


def show_issued(issued: IssuedKey, *, as_json: bool) -> None:
    """The key on standard output, what there is to know about it on standard error."""
    if as_json:
        terminal.print_json({name: getattr(issued, name) for name in issued.__struct_fields__})
        return
    terminal.err.print(
        terminal.facts(
            [
                ("key id", issued.key_id),
                ("name", issued.name),
                ("scopes", issued.scopes),
                ("per minute", issued.rate_limit_per_minute),
                ("per day", issued.rate_limit_per_day),
                ("expires", issued.expires_at),
                ("old key works until", issued.previous_valid_until),
            ]
        )
    )
    terminal.say("The key, shown this once:", "bold")
    terminal.out.print(issued.api_key, markup=False)


def show_record(record: KeyRecord, *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(record)
        return
    minute, day = f"{record.rate_limit_per_minute:,}", f"{record.rate_limit_per_day:,}"
    if isinstance(record, Profile) and record.remaining_this_minute is not None and record.remaining_today is not None:
        minute += f" ({record.remaining_this_minute:,} left)"
        day += f" ({record.remaining_today:,} left)"
    terminal.out.print(
        terminal.facts(
            [
                ("key id", record.key_id),
                ("name", record.name),
                ("scopes", record.scopes),
                ("per minute", minute),
                ("per day", day),
                ("created", record.created_at),
                ("last used", record.last_used_at),
                ("expires", record.expires_at),
                ("revoked", record.revoked_at),
                ("texts judged", record.total_requests),
                ("of them malicious", record.malicious_detections),
            ]
        )
    )
    if record.days:
        days = terminal.table("day (UTC)", "texts", "malicious")
        for usage in record.days:
            days.add_row(usage.date, f"{usage.requests:,}", f"{usage.malicious:,}")
        terminal.out.print(days)
