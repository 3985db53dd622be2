"""Keys and usage counts in PostgreSQL, and the announcement of changes on the bus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, date, datetime
from typing import Any, Final, cast

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import sqlalchemy.exc
from sqlalchemy import (
    ARRAY,
    URL,
    BigInteger,
    ColumnElement,
    Date,
    DateTime,
    String,
    and_,
    bindparam,
    delete,
    event,
    func,
    make_url,
    or_,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from libs.common import telemetry, tracing
from libs.common.bus import Bus
from libs.common.clock import Clock
from libs.common.contracts import DayUsage, KeyChanged, Scope
from libs.common.errors import PortcullisError
from libs.common.service import ConfigurationError
from libs.common.subjects import EVENT_KEY_CHANGED, USAGE_STREAM
from services.auth import metrics
from services.auth.cache import STALE_SECONDS, KeyCache
from services.auth.core import (
    KeyChanges,
    LeftBehind,
    Match,
    Position,
    StoredKey,
    StoreRefusesError,
    StoreUnavailableError,
    Usage,
    UsageBatch,
)
from services.auth.models import ApiKey, KeyDay, KeyTotals, UsagePosition
from services.auth.ports import PositionMovedError, UsageLedger

log = logging.getLogger(__name__)

POOL_TIMEOUT_SECONDS: Final = 0.5
CONNECT_TIMEOUT_SECONDS: Final = 2.0
STATEMENT_TIMEOUT_SECONDS: Final = 2.0
OPERATION_TIMEOUT_SECONDS: Final = 5.0
"""Over a whole transaction; the shorter ones above should have ended it long before."""
CHECK_TIMEOUT_SECONDS: Final = 1.0
CHECK_SLICES: Final = 4
MIGRATION_TIMEOUT_SECONDS: Final = 300.0
_BEGAN: Final = "portcullis.began"
_POSTGRES: Final = (("db.system.name", "postgresql"),)
USAGE_LOCK: Final = 0x706F_7274_7573_6167
"""Key of the advisory lock of the replica that counts usage: "portusag"."""


def engine_url(url: str) -> URL:
    """A libpq-style URL as SQLAlchemy and asyncpg take it. Raises `ConfigurationError`."""
    try:
        parsed = make_url(url)
    except sqlalchemy.exc.ArgumentError:
        # SQLAlchemy's sentence holds the URL, and the URL a password.
        raise ConfigurationError("PORTCULLIS_DATABASE_URL cannot be read; postgresql://user:password@host:port/name") from None
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise ConfigurationError("PORTCULLIS_DATABASE_URL must begin with postgresql://")
    query = dict(parsed.query)
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    return parsed.set(drivername="postgresql+asyncpg", query=query)


def make_engine(url: URL, *, pool_size: int | None, statement_timeout_seconds: float = STATEMENT_TIMEOUT_SECONDS) -> AsyncEngine:
    """An engine with a timeout on everything. `pool_size` None: connections are not kept."""
    milliseconds = str(int(statement_timeout_seconds * 1000))
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pool_size is not None:
        pool = {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": pool_size,
            "max_overflow": 0,
            "pool_timeout": POOL_TIMEOUT_SECONDS,
            "pool_pre_ping": True,
        }
    engine = create_async_engine(
        url,
        **pool,
        connect_args={
            "timeout": CONNECT_TIMEOUT_SECONDS,
            # The server's timeout is the gentle one; this one is for a server that hangs.
            "command_timeout": statement_timeout_seconds + 0.5,
            "server_settings": {
                "application_name": "portcullis-auth",
                "statement_timeout": milliseconds,
                "lock_timeout": milliseconds,
                "idle_in_transaction_session_timeout": str(int(OPERATION_TIMEOUT_SECONDS * 1000)),
                # A replica whose machine is gone must not hold the lock on the usage counts for hours.
                "tcp_keepalives_idle": "5",
                "tcp_keepalives_interval": "2",
                "tcp_keepalives_count": "3",
                "timezone": "UTC",
                "jit": "off",
            },
        },
    )
    _measure(engine)
    return engine


def watch_pool(engine: AsyncEngine, name: str, size: int) -> None:
    """Show how many of an engine's connections are in use, as the pool `name`."""
    pool = cast(AsyncAdaptedQueuePool, engine.pool)
    telemetry.CONNECTIONS.labels(name).set_function(pool.checkedout)
    telemetry.CONNECTIONS_LIMIT.labels(name).set(size)


def _measure(engine: AsyncEngine) -> None:
    def begin(connection: Any, *_: Any) -> None:
        connection.info[_BEGAN] = time.perf_counter()

    def end(connection: Any, *_: Any) -> None:
        metrics.POSTGRES_DURATION.observe(time.perf_counter() - connection.info.pop(_BEGAN))

    event.listen(engine.sync_engine, "before_cursor_execute", begin)
    event.listen(engine.sync_engine, "after_cursor_execute", end)


# SQLSTATEs that tell of the connection rather than of the statement: classes 08 (connection), 53 (insufficient resources), 57
# (operator intervention: shutdown, starting up, statement timeout), 55P03 (lock timeout), and for `_REFUSES` 28 (invalid
# authorization), 3D000 (no such database). https://www.postgresql.org/docs/current/errcodes-appendix.html
_AWAY: Final = ("08", "53", "57", "55P03")
_REFUSES: Final = ("28", "3D000")


@contextmanager
def translated() -> Iterator[None]:
    """Turn every way in which PostgreSQL is away into `StoreUnavailableError`; anything else is a bug and stays what it is."""
    try:
        yield
    except sqlalchemy.exc.TimeoutError:
        raise StoreUnavailableError("no free connection to PostgreSQL") from None
    except sqlalchemy.exc.DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or ""
        internal = f"PostgreSQL: {type(error.orig).__name__} {state}"
        if state.startswith(_REFUSES):
            raise StoreRefusesError(internal) from None
        if error.connection_invalidated or isinstance(error, sqlalchemy.exc.InterfaceError) or state.startswith(_AWAY):
            raise StoreUnavailableError(internal) from None
        raise
    except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError) as error:
        # From asyncpg itself, past SQLAlchemy. TimeoutError is an OSError.
        raise StoreUnavailableError(f"PostgreSQL: {type(error).__name__}") from None


class PostgresKeys:
    """`KeyStore` in PostgreSQL."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def _transaction(self, operation: str, table: str) -> AsyncIterator[AsyncSession]:
        """`operation` and `table`: what it is about, for traces."""
        attributes = (*_POSTGRES, ("db.operation.name", operation), ("db.collection.name", table))
        with translated(), tracing.span(f"{operation} {table}", tracing.CLIENT, attributes):
            async with (
                asyncio.timeout(OPERATION_TIMEOUT_SECONDS),
                AsyncSession(self._engine, expire_on_commit=False) as session,
                session.begin(),
            ):
                yield session

    async def find(self, key_ids: Sequence[str]) -> dict[str, StoredKey]:
        async with self._transaction("SELECT", "api_keys") as session:
            # One array, not a list of parameters: one prepared statement, whatever the number of keys.
            wanted = bindparam("wanted", list(key_ids), type_=ARRAY(String))
            rows = await session.exec(select(ApiKey).where(col(ApiKey.key_id) == func.any(wanted)))
            return {row.key_id: _stored(row) for row in rows}

    async def add(self, key: StoredKey) -> None:
        async with self._transaction("INSERT", "api_keys") as session:
            session.add(
                ApiKey(
                    key_id=key.key_id,
                    name=key.name,
                    scopes=list(key.scopes),
                    limit_minute=key.limit_minute,
                    limit_day=key.limit_day,
                    created_at=key.created_at,
                    expires_at=key.expires_at,
                    verifier=key.verifier,
                    pepper_id=key.pepper_id,
                )
            )

    async def replace_secret(
        self, key_id: str, *, current: Sequence[bytes], new: bytes, pepper_id: str, previous_valid_until: datetime
    ) -> StoredKey | None:
        async with self._transaction("UPDATE", "api_keys") as session:
            # Compared and set in one statement: of two rotations at once, one finds that its secret is not the current one.
            found = await session.exec(
                update(ApiKey)
                .where(col(ApiKey.key_id) == key_id, col(ApiKey.verifier).in_(current), col(ApiKey.revoked_at).is_(None))
                .values(
                    verifier=new,
                    pepper_id=pepper_id,
                    previous_verifier=ApiKey.verifier,
                    previous_pepper_id=ApiKey.pepper_id,
                    previous_valid_until=previous_valid_until,
                )
                .returning(ApiKey)
            )
            return _stored_or_none(found.scalar_one_or_none())

    async def store_anew(self, secret: LeftBehind) -> None:
        verifier, its_id = _COLUMNS[secret.match]
        async with self._transaction("UPDATE", "api_keys") as session:
            # Compared and set in one statement: other replicas do the same, and the secret may have been replaced meanwhile.
            await session.exec(
                update(ApiKey)
                .where(col(ApiKey.key_id) == secret.key_id, verifier == secret.old)
                .values({verifier: secret.new, its_id: secret.pepper_id})
            )

    async def count_left(self, pepper_id: str, now: datetime) -> int:
        async with self._transaction("SELECT", "api_keys") as session:
            return (await session.exec(select(func.count()).select_from(ApiKey).where(*_is_left(pepper_id, now)))).one()

    async def left(self, pepper_id: str, now: datetime, limit: int) -> list[tuple[str, str, datetime | None]]:
        """Ids, names and last uses of the keys that `count_left` counts, those in use first."""
        async with self._transaction("SELECT", "api_keys") as session:
            query = (
                select(ApiKey.key_id, ApiKey.name, KeyTotals.last_used_at)
                .outerjoin(KeyTotals, col(KeyTotals.key_id) == col(ApiKey.key_id))
                .where(*_is_left(pepper_id, now))
                .order_by(col(KeyTotals.last_used_at).desc().nulls_last(), col(ApiKey.key_id))
                .limit(limit)
            )
            return list(await session.exec(query))

    async def revoke(self, key_id: str, at: datetime) -> StoredKey | None:
        async with self._transaction("UPDATE", "api_keys") as session:
            found = await session.exec(
                update(ApiKey)
                .where(col(ApiKey.key_id) == key_id)
                .values(revoked_at=func.coalesce(ApiKey.revoked_at, at))
                .returning(ApiKey)
            )
            return _stored_or_none(found.scalar_one_or_none())

    async def change(self, key_id: str, changes: KeyChanges) -> StoredKey | None:
        values: dict[str, Any] = {
            "name": changes.name,
            "scopes": list(changes.scopes) if changes.scopes is not None else None,
            "limit_minute": changes.limit_minute,
            "limit_day": changes.limit_day,
            "expires_at": changes.expires_at,
        }
        values = {name: value for name, value in values.items() if value is not None}
        async with self._transaction("UPDATE", "api_keys") as session:
            is_it = (col(ApiKey.key_id) == key_id, col(ApiKey.revoked_at).is_(None))
            if not values:
                return _stored_or_none((await session.exec(select(ApiKey).where(*is_it))).one_or_none())
            found = await session.exec(update(ApiKey).where(*is_it).values(**values).returning(ApiKey))
            return _stored_or_none(found.scalar_one_or_none())

    async def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        async with self._transaction("SELECT", "key_totals") as session:
            wanted = bindparam("wanted", list(key_ids), type_=ARRAY(String))
            rows = await session.exec(select(KeyTotals).where(col(KeyTotals.key_id) == func.any(wanted)))
            return {row.key_id: Usage(row.requests, row.malicious, row.last_used_at) for row in rows}

    async def days(self, key_id: str, since: date) -> Usage:
        async with self._transaction("SELECT", "key_days") as session:
            totals = await session.get(KeyTotals, key_id)
            if totals is None:
                return Usage()
            rows = await session.exec(
                select(KeyDay).where(col(KeyDay.key_id) == key_id, col(KeyDay.day) >= since).order_by(col(KeyDay.day))
            )
            days = tuple(DayUsage(date=row.day.isoformat(), requests=row.requests, malicious=row.malicious) for row in rows)
            return Usage(totals.requests, totals.malicious, totals.last_used_at, days)

    async def page(self, after: str | None, limit: int) -> list[StoredKey] | None:
        async with self._transaction("SELECT", "api_keys") as session:
            query = select(ApiKey).order_by(col(ApiKey.created_at), col(ApiKey.key_id)).limit(limit)
            if after is not None:
                last = await session.get(ApiKey, after)
                if last is None:
                    return None
                query = query.where(tuple_(col(ApiKey.created_at), col(ApiKey.key_id)) > tuple_(last.created_at, last.key_id))
            return [_stored(row) for row in await session.exec(query)]


class PostgresCheck:
    """Whether PostgreSQL answers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises `StoreUnavailableError` when there is no answer within CHECK_TIMEOUT_SECONDS."""
        # A check that hangs is not cancelled, which would take a while itself; the next call waits for the same one.
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask())
            # One that still hangs when this process ends has nobody to ask for its outcome, which is no error of asyncio's.
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        # In slices: a process that stands still for a while uses up one of them, and PostgreSQL is not blamed for it.
        for _ in range(CHECK_SLICES):
            await asyncio.wait({self._asking}, timeout=CHECK_TIMEOUT_SECONDS / CHECK_SLICES)
            if self._asking.done():
                break
        else:
            raise StoreUnavailableError("PostgreSQL does not answer")
        asked, self._asking = self._asking, None
        asked.result()

    async def _ask(self) -> None:
        with translated():
            async with asyncio.timeout(OPERATION_TIMEOUT_SECONDS), self._engine.connect() as connection:
                await connection.execute(text("SELECT 1"))


_COLUMNS: Final = {
    Match.CURRENT: (col(ApiKey.verifier), col(ApiKey.pepper_id)),
    Match.PREVIOUS: (col(ApiKey.previous_verifier), col(ApiKey.previous_pepper_id)),
}
"""Where each of a key's secrets is, and the id of its pepper."""


def _is_left(pepper_id: str, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        col(ApiKey.revoked_at).is_(None),
        or_(col(ApiKey.expires_at).is_(None), col(ApiKey.expires_at) > now),
        or_(
            col(ApiKey.pepper_id).is_distinct_from(pepper_id),
            and_(col(ApiKey.previous_valid_until) > now, col(ApiKey.previous_pepper_id).is_distinct_from(pepper_id)),
        ),
    )


def _stored(row: ApiKey) -> StoredKey:
    return StoredKey(
        key_id=row.key_id,
        name=row.name,
        scopes=tuple(cast("Scope", scope) for scope in row.scopes),  # nothing but scopes is ever written there
        limit_minute=row.limit_minute,
        limit_day=row.limit_day,
        created_at=row.created_at,
        verifier=row.verifier,
        previous_verifier=row.previous_verifier,
        previous_valid_until=row.previous_valid_until,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        pepper_id=row.pepper_id,
        previous_pepper_id=row.previous_pepper_id,
    )


def _stored_or_none(row: ApiKey | None) -> StoredKey | None:
    return _stored(row) if row is not None else None


# --- usage ---------------------------------------------------------------------------------------------------------------


class PostgresLedgers:
    """`UsageLedgers`: whoever holds an advisory lock in PostgreSQL counts.

    The lock belongs to a connection, and the counts are written on that very connection: a replica that has lost the lock
    cannot write. That the position is compared as it is moved protects the counts even where a connection pooler between
    auth and PostgreSQL makes session locks meaningless.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[UsageLedger | None]:
        with translated():
            async with self._engine.connect() as connection:
                async with asyncio.timeout(OPERATION_TIMEOUT_SECONDS), connection.begin():
                    held = await connection.scalar(select(func.pg_try_advisory_lock(USAGE_LOCK)))
                if not held:
                    yield None
                    return
                try:
                    yield PostgresLedger(connection)
                finally:
                    # The lock goes with the connection, which must not get back into the pool with it.
                    await connection.invalidate()


class PostgresLedger:
    """`UsageLedger` on the connection that holds the lock."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        async with asyncio.timeout(OPERATION_TIMEOUT_SECONDS), self._connection.begin():
            yield self._connection

    async def position(self) -> Position | None:
        async with self._transaction() as connection:
            row = (
                await connection.execute(
                    select(col(UsagePosition.created), col(UsagePosition.sequence)).where(
                        col(UsagePosition.stream) == USAGE_STREAM
                    )
                )
            ).one_or_none()
            return Position(row.created, row.sequence) if row is not None else None

    async def write(self, batch: UsageBatch, before: Position | None, after: Position) -> None:
        async with self._transaction() as connection:
            await self._move(connection, before, after)
            if batch.totals:
                await connection.execute(
                    _ADD_DAYS,
                    {
                        "key_ids": [key_id for key_id, _ in batch.days],
                        "days": [day for _, day in batch.days],
                        "requests": [tally.requests for tally in batch.days.values()],
                        "malicious": [tally.malicious for tally in batch.days.values()],
                    },
                )
                await connection.execute(
                    _ADD_TOTALS,
                    {
                        "key_ids": list(batch.totals),
                        "last_used_at": [datetime.fromtimestamp(t.last_ms / 1000, UTC) for t in batch.totals.values()],
                        "requests": [tally.requests for tally in batch.totals.values()],
                        "malicious": [tally.malicious for tally in batch.totals.values()],
                    },
                )

    async def forget_days_before(self, day: date) -> None:
        async with self._transaction() as connection:
            await connection.execute(delete(KeyDay).where(col(KeyDay.day) < day))

    async def _move(self, connection: AsyncConnection, before: Position | None, after: Position) -> None:
        values = {"created": after.created, "sequence": after.sequence}
        if before is None:
            first = insert(UsagePosition).values(stream=USAGE_STREAM, **values).on_conflict_do_nothing()
            moved = await connection.execute(first)
        else:
            moved = await connection.execute(
                update(UsagePosition)
                .where(
                    col(UsagePosition.stream) == USAGE_STREAM,
                    col(UsagePosition.created) == before.created,
                    col(UsagePosition.sequence) == before.sequence,
                )
                .values(**values)
            )
        if moved.rowcount != 1:
            raise PositionMovedError


_COUNTS = (
    bindparam("key_ids", type_=ARRAY(String)),
    bindparam("requests", type_=ARRAY(BigInteger)),
    bindparam("malicious", type_=ARRAY(BigInteger)),
)

# The join passes over keys that do not exist; the order keeps two writers from waiting for each other crosswise.
_ADD_DAYS = text(
    """
    INSERT INTO key_days (key_id, day, requests, malicious)
    SELECT key_id, day, added.requests, added.malicious
    FROM unnest(:key_ids, :days, :requests, :malicious) AS added (key_id, day, requests, malicious)
    JOIN api_keys USING (key_id)
    ORDER BY key_id, day
    ON CONFLICT (key_id, day) DO UPDATE
    SET requests = key_days.requests + excluded.requests, malicious = key_days.malicious + excluded.malicious
    """
).bindparams(*_COUNTS, bindparam("days", type_=ARRAY(Date)))

_ADD_TOTALS = text(
    """
    INSERT INTO key_totals (key_id, requests, malicious, last_used_at)
    SELECT key_id, added.requests, added.malicious, added.last_used_at
    FROM unnest(:key_ids, :requests, :malicious, :last_used_at) AS added (key_id, requests, malicious, last_used_at)
    JOIN api_keys USING (key_id)
    ORDER BY key_id
    ON CONFLICT (key_id) DO UPDATE
    SET requests = key_totals.requests + excluded.requests, malicious = key_totals.malicious + excluded.malicious,
        last_used_at = greatest(key_totals.last_used_at, excluded.last_used_at)
    """
).bindparams(*_COUNTS, bindparam("last_used_at", type_=ARRAY(DateTime(timezone=True))))


# --- announcements -------------------------------------------------------------------------------------------------------


class BusAnnouncer:
    """`KeyAnnouncer` on the bus.

    What was announced lately is announced again after a reconnect: it may have been written into a connection that was gone.
    """

    def __init__(self, bus: Bus, cache: KeyCache, clock: Clock) -> None:
        self._bus = bus
        self._cache = cache
        self._clock = clock
        self._recent: deque[tuple[float, str]] = deque(maxlen=4096)

    async def changed(self, key_id: str) -> None:
        self._cache.forget(key_id)
        self._recent.append((self._clock.monotonic(), key_id))
        await self._publish(key_id)

    async def reconnected(self) -> None:
        """Others may have announced something meanwhile, and so may this replica have, in vain."""
        self._cache.clear()
        oldest = self._clock.monotonic() - STALE_SECONDS
        for at, key_id in list(self._recent):
            if at >= oldest:
                await self._publish(key_id)

    async def _publish(self, key_id: str) -> None:
        with contextlib.suppress(PortcullisError):  # no connection: `reconnected` makes up for it
            await self._bus.publish(EVENT_KEY_CHANGED, KeyChanged(key_id=key_id))
