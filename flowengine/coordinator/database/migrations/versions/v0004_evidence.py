"""The coordinator's own chain of evidence, and checkpoints of the agents' chains.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "checkpoints",
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("chain", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("agent", "chain", "seq", "hash", name=op.f("pk_checkpoints")),
    )
    op.create_table(
        "evidence",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("transfer", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_evidence")),
    )
    op.create_index("ix_evidence_transfer", "evidence", ["transfer"], unique=False)

    op.create_table(
        "evidence_bundles",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_evidence_bundles")),
    )
    op.create_table(
        "evidence_values",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_evidence_values")),
    )
