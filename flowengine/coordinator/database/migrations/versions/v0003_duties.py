"""What became of data that may not stay, counters over transfers, approvals.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("disposal", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("tasks", sa.Column("disposed", sa.Text(), server_default=sa.text("'{}'"), nullable=False))


def downgrade() -> None:
    raise NotImplementedError("a database is brought forward only: restore a backup from before")
