"""Bring the database to the newest schema; safe to be started by several replicas at once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, func, select, text

from services.auth.adapters import MIGRATION_TIMEOUT_SECONDS, make_engine, translated

log = logging.getLogger(__name__)

HEAD: Final = "0002"
"""The newest revision. Known without alembic, whose import costs a start 0.4 s that it hardly ever needs. Numbers, in order."""
MIGRATION_LOCK: Final = 0x706F_7274_6D69_6772
"""Key of the advisory lock under which the schema is changed: "portmigr"."""
SCRIPTS: Final = Path(__file__).parent / "migrations"


async def migrate(url: URL) -> None:
    """Upgrade to HEAD, in one transaction, under a lock that ends with it. A schema that is newer still is left as it is: a
    release works with that of the next one.

    Raises `StoreUnavailableError` when PostgreSQL cannot be reached.
    """
    engine = make_engine(url, pool_size=None, statement_timeout_seconds=MIGRATION_TIMEOUT_SECONDS)
    try:
        with translated():
            async with engine.connect() as connection:
                if not await connection.run_sync(_is_behind):
                    return
                await connection.rollback()
            async with engine.begin() as connection:
                # Whoever comes second waits here, and finds nothing left to do.
                await connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
                if await connection.run_sync(_is_behind):
                    await connection.run_sync(_upgrade)
    finally:
        await asyncio.shield(engine.dispose())


def _is_behind(connection: Connection) -> bool:
    if not connection.scalar(text("SELECT to_regclass('alembic_version')")):
        return True
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision is None or revision < HEAD


def _upgrade(connection: Connection) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # its import alone writes seven lines
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    log.info("the database is at revision %s", HEAD)
