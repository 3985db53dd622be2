"""`portcullis admin`"""

from __future__ import annotations

from datetime import UTC, datetime

import click

from portcullis_client.cli import terminal
from portcullis_client.cli.keys import json_option, per_day_option, per_minute_option, show_issued, show_record, yes_option
from portcullis_client.cli.session import Session, pass_session
from portcullis_client.types import KeyRecord

scope_option = click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["detect", "batch", "admin"]),
    help="What the key may do; repeatable.",
)


class Moment(click.ParamType):  # type: ignore[type-arg]  # not generic in older releases
    """ISO 8601; without a time zone it is UTC."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not like 2030-01-31 or 2030-01-31T12:00:00Z", param, ctx)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


expires_option = click.option("--expires", "expires_at", type=Moment(), metavar="TIME", help="ISO 8601, UTC.")


@click.group(short_help="All API keys.")
def admin() -> None:
    """All API keys; needs PORTCULLIS_ADMIN_TOKEN, or a key with the scope admin."""


@admin.command("list")
@json_option
@pass_session
def list_keys(session: Session, as_json: bool) -> None:
    """All keys, oldest first."""
    found: list[KeyRecord] = []
    with session.client() as client:
        page = client.list_keys(limit=1000)
        found.extend(page.keys)
        while page.next_after is not None:
            page = client.list_keys(after=page.next_after, limit=1000)
            found.extend(page.keys)
    if as_json:
        for record in found:
            terminal.print_json(record)
        return
    rows = terminal.table("key id", "name", "scopes", "/minute", "/day", "texts", "malicious", "state")
    for record in found:
        rows.add_row(
            record.key_id,
            terminal.printable(record.name),
            ", ".join(record.scopes),
            f"{record.rate_limit_per_minute:,}",
            f"{record.rate_limit_per_day:,}",
            f"{record.total_requests:,}",
            f"{record.malicious_detections:,}",
            _state(record),
        )
    terminal.out.print(rows)


def _state(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= datetime.now(UTC):
        return "expired"
    return "valid"


@admin.command()
@click.argument("key_id")
@json_option
@pass_session
def show(session: Session, key_id: str, as_json: bool) -> None:
    """One key, with its use."""
    with session.client() as client:
        show_record(client.get_key(key_id), as_json=as_json)


@admin.command()
@click.argument("name")
@scope_option
@per_minute_option
@per_day_option
@expires_option
@json_option
@pass_session
def create(
    session: Session,
    name: str,
    scopes: tuple[str, ...],
    per_minute: int | None,
    per_day: int | None,
    expires_at: datetime | None,
    as_json: bool,
) -> None:
    """Issue a key called NAME; the key alone goes to standard output."""
    with session.client() as client:
        issued = client.create_key(
            name,
            scopes=scopes or None,
            rate_limit_per_minute=per_minute,
            rate_limit_per_day=per_day,
            expires_at=expires_at,
        )
    show_issued(issued, as_json=as_json)


@admin.command()
@click.argument("key_id")
@click.option("--name", help="A new name.")
@scope_option
@per_minute_option
@per_day_option
@expires_option
@json_option
@pass_session
def update(
    session: Session,
    key_id: str,
    name: str | None,
    scopes: tuple[str, ...],
    per_minute: int | None,
    per_day: int | None,
    expires_at: datetime | None,
    as_json: bool,
) -> None:
    """Change what is given of a key; the rest stays as it is."""
    with session.client() as client:
        record = client.update_key(
            key_id,
            name=name,
            scopes=scopes or None,
            rate_limit_per_minute=per_minute,
            rate_limit_per_day=per_day,
            expires_at=expires_at,
        )
    show_record(record, as_json=as_json)


@admin.command()
@click.argument("key_id")
@yes_option
@pass_session
def revoke(session: Session, key_id: str, yes: bool) -> None:
    """Revoke a key, for good."""
    with session.client() as client:
        if not yes:
            name = client.get_key(key_id).name
            click.confirm(f'Revoke the key "{terminal.printable(name)}" for good?', abort=True, err=True)
        client.revoke_key(key_id)
    terminal.say("revoked")
