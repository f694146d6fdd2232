"""Policy bundles, label statements, agreements, what copies inherited; what agents say of theirs.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bundles",
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("not_after", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("about", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("activated", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("activated_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_bundles")),
    )
    op.create_table(
        "labels",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("serial", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("number", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("added", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("added_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("owner", "site", "path", name=op.f("pk_labels")),
    )
    op.create_index(op.f("ix_labels_serial"), "labels", ["serial"], unique=False)
    op.create_index(op.f("ix_labels_site"), "labels", ["site"], unique=False)
    op.create_table(
        "agreements",
        sa.Column("authority", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("serial", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("number", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("added", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("added_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("authority", "id", name=op.f("pk_agreements")),
    )
    op.create_index(op.f("ix_agreements_serial"), "agreements", ["serial"], unique=False)
    op.create_table(
        "inherited",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("contracts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("site", "path", "labels", "contracts", name=op.f("pk_inherited")),
    )
    op.add_column("sites", sa.Column("can", sa.Text(), nullable=True))
    op.add_column("sites", sa.Column("policy", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
