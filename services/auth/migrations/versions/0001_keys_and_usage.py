"""Keys, their usage, and the position up to which it has been counted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(12), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.String(16)), nullable=False),
        sa.Column("limit_minute", sa.Integer, nullable=False),
        sa.Column("limit_day", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("verifier", sa.LargeBinary, nullable=False),
        sa.Column("previous_verifier", sa.LargeBinary),
        sa.Column("previous_valid_until", sa.DateTime(timezone=True)),
    )
    op.create_index("ix_api_keys_created_at_key_id", "api_keys", ["created_at", "key_id"])
    op.create_table(
        "key_totals",
        sa.Column("key_id", sa.String(12), sa.ForeignKey("api_keys.key_id"), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("malicious", sa.BigInteger, nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "key_days",
        sa.Column("key_id", sa.String(12), sa.ForeignKey("api_keys.key_id"), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("malicious", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_key_days_day", "key_days", ["day"])
    op.create_table(
        "usage_positions",
        sa.Column("stream", sa.String(64), primary_key=True),
        sa.Column("created", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("usage_positions")
    op.drop_table("key_days")
    op.drop_table("key_totals")
    op.drop_table("api_keys")
