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
    op.create_table(
        "ledger",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("transfer", sa.Text(), nullable=False),
        sa.Column("controller", sa.Text(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("country", sa.Text(), nullable=True),
        sa.Column("labels", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("persons", sa.BigInteger(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("expires", sa.Double(), nullable=True),
        sa.Column("counts", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("task", name=op.f("pk_ledger")),
    )
    op.create_index(op.f("ix_ledger_controller"), "ledger", ["controller"], unique=False)
    op.create_index(op.f("ix_ledger_transfer"), "ledger", ["transfer"], unique=False)
    op.create_table(
        "approval_requests",
        sa.Column("handle", sa.Text(), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("expires", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("recipient", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("requester", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("dataset_digest", sa.Text(), nullable=False),
        sa.Column("duties_digest", sa.Text(), nullable=False),
        sa.Column("duties", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("groups", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("people", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("text", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("handle", name=op.f("pk_approval_requests")),
    )
    op.create_index("ix_approval_requests_expires", "approval_requests", ["expires"], unique=False)
    op.create_table(
        "approvals",
        sa.Column("handle", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("given", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("document", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("added_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.ForeignKeyConstraint(["handle"], ["approval_requests.handle"], name=op.f("fk_approvals_handle")),
        sa.PrimaryKeyConstraint("handle", "who", name=op.f("pk_approvals")),
    )


def downgrade() -> None:
    raise NotImplementedError("a database is brought forward only: restore a backup from before")
