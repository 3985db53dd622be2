"""`./run auth old-pepper`: which keys an exchange of the pepper has not reached yet."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Final, TextIO

from libs.common import settings as settings_module
from libs.common.service import ConfigurationError
from services.auth.adapters import PostgresKeys, engine_url, make_engine
from services.auth.app import peppers_of
from services.auth.core import StoreUnavailableError, iso, utc
from services.auth.settings import AuthSettings

MOST_KEYS: Final = 1000


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run auth", description="What keys are stored under.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("old-pepper", help="the valid keys that are not known to be stored under PORTCULLIS_KEY_PEPPER")
    parser.parse_args(arguments)
    try:
        asyncio.run(show_left(settings_module.load(AuthSettings), sys.stdout))
    except ConfigurationError as error:
        print(f"portcullis auth: {error}", file=sys.stderr)  # noqa: T201
    except StoreUnavailableError as error:
        print(f"portcullis auth: PostgreSQL cannot be asked ({error.internal})", file=sys.stderr)  # noqa: T201
    else:
        return 0
    return 1


async def show_left(settings: AuthSettings, out: TextIO) -> None:
    """One line for each key, those that were used last first: its id, when it was used last, its name."""
    pepper_id, now = peppers_of(settings).current_id, utc(time.time())
    engine = make_engine(engine_url(settings.database_url.get_secret_value()), pool_size=1)
    try:
        store = PostgresKeys(engine)
        count, found = await store.count_left(pepper_id, now), await store.left(pepper_id, now, MOST_KEYS)
    finally:
        await engine.dispose()
    for key_id, name, used_at in found:
        out.write(f"{key_id}  {iso(used_at) if used_at is not None else 'never used':24}  {name}\n")
    out.write(f"keys not known to be stored under PORTCULLIS_KEY_PEPPER: {count}\n")
