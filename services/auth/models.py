"""The tables. A change here needs a migration (`alembic -c services/auth/alembic.ini revision --autogenerate -m …`)."""

from __future__ import annotations

from datetime import date as date_type
from datetime import datetime

from sqlalchemy import ARRAY, BigInteger, Column, DateTime, ForeignKey, Index, LargeBinary, String
from sqlmodel import Field, SQLModel


class ApiKey(SQLModel, table=True):
    """A key. What counts its usage is kept apart, so that counting never waits for an administrator, nor the reverse."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_created_at_key_id", "created_at", "key_id"),)

    key_id: str = Field(sa_column=Column(String(12), primary_key=True))
    name: str = Field(sa_column=Column(String(100), nullable=False))
    scopes: list[str] = Field(sa_column=Column(ARRAY(String(16)), nullable=False))
    limit_minute: int
    limit_day: int
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    verifier: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    previous_verifier: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    previous_valid_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    pepper_id: str | None = Field(default=None, sa_column=Column(String(8)))
    previous_pepper_id: str | None = Field(default=None, sa_column=Column(String(8)))


class KeyTotals(SQLModel, table=True):
    """What a key has been used for in all."""

    __tablename__ = "key_totals"

    key_id: str = Field(sa_column=Column(String(12), ForeignKey("api_keys.key_id"), primary_key=True))
    requests: int = Field(sa_column=Column(BigInteger, nullable=False))
    malicious: int = Field(sa_column=Column(BigInteger, nullable=False))
    last_used_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))


class KeyDay(SQLModel, table=True):
    """What a key has been used for on one UTC day."""

    __tablename__ = "key_days"

    key_id: str = Field(sa_column=Column(String(12), ForeignKey("api_keys.key_id"), primary_key=True))
    day: date_type = Field(primary_key=True, index=True)
    requests: int = Field(sa_column=Column(BigInteger, nullable=False))
    malicious: int = Field(sa_column=Column(BigInteger, nullable=False))


class UsagePosition(SQLModel, table=True):
    """Up to where a stream of events is in the counts; written in the same transaction as they are."""

    __tablename__ = "usage_positions"

    stream: str = Field(sa_column=Column(String(64), primary_key=True))
    created: str = Field(sa_column=Column(String(64), nullable=False))
    sequence: int = Field(sa_column=Column(BigInteger, nullable=False))
