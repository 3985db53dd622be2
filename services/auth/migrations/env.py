"""How alembic reaches the database: on the connection that `services.auth.migrate` hands it, or on one of its own."""

from __future__ import annotations

import asyncio
import os

from alembic import context
from sqlalchemy import Connection
from sqlmodel import SQLModel

from services.auth import models
from services.auth.adapters import MIGRATION_TIMEOUT_SECONDS, engine_url, make_engine

assert models  # imported for the tables that it adds to the metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


async def run_on_own_connection() -> None:
    url = engine_url(os.environ["PORTCULLIS_DATABASE_URL"])
    engine = make_engine(url, pool_size=None, statement_timeout_seconds=MIGRATION_TIMEOUT_SECONDS)
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    asyncio.run(run_on_own_connection())
