"""Under which pepper each verifier is: unknown of what is there already."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Whatever reads keys waits behind this lock while it waits itself, behind a dump for example. It is tried again.
    op.execute("SET LOCAL lock_timeout = '200ms'")
    op.add_column("api_keys", sa.Column("pepper_id", sa.String(8)))
    op.add_column("api_keys", sa.Column("previous_pepper_id", sa.String(8)))


def downgrade() -> None:
    op.drop_column("api_keys", "previous_pepper_id")
    op.drop_column("api_keys", "pepper_id")
