"""What is known of links, plans and leases.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:

    op.create_table(
        "link_history",
        sa.Column("seq", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("rate_bits_per_s", sa.Double(), nullable=True),
        sa.Column("rtt_ms", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("at_least", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint("kind IN ('probe', 'transfers')", name=op.f("ck_link_history_kind")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_link_history")),
    )
    op.create_index("ix_link_history_at", "link_history", ["at"], unique=False)
    op.create_index(
        "ix_link_history_source_target_at", "link_history", ["source", "target", "at"], unique=False
    )

    op.create_table(
        "link_states",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("rate_bits_per_s", sa.Double(), nullable=True),
        sa.Column("variance", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("measured", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("rtt_ms", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("asked", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("source", "target", name=op.f("pk_link_states")),
    )
    op.create_table(
        "maintenance",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("starts", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("ends", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("drain_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("comment", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("created_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_maintenance")),
    )
    op.create_table(
        "paces",
        sa.Column("seq", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("objects", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("sent_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("rate_bits_per_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_paces")),
    )
    op.create_index("ix_paces_source_target_at", "paces", ["source", "target", "at"], unique=False)

    op.create_table(
        "plan_state",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("made", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("document", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_plan_state")),
    )
    op.create_table(
        "plans",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("made", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("expires", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("request", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("body", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
    )
    op.create_index("ix_plans_expires", "plans", ["expires"], unique=False)

    op.create_table(
        "leases",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("next", sa.Text(), nullable=False),
        sa.Column("transfer", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("number", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("rate_bits_per_s", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_leases_task")),
        sa.PrimaryKeyConstraint("task", "site", "next", name=op.f("pk_leases")),
    )
    op.create_index("ix_leases_site", "leases", ["site"], unique=False)

    op.create_table(
        "task_plans",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("body", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_task_plans_task")),
        sa.PrimaryKeyConstraint("task", name=op.f("pk_task_plans")),
    )
    op.add_column("looks", sa.Column("kind", sa.Text(), server_default=sa.text("'look'"), nullable=False))
    op.add_column("looks", sa.Column("body", sa.Text(), server_default=sa.text("'{}'"), nullable=False))

    op.add_column("sites", sa.Column("relay", sa.Text(), server_default=sa.text("''"), nullable=False))

    op.add_column("tasks", sa.Column("flows", sa.Text(), server_default=sa.text("'[]'"), nullable=False))
    op.add_column(
        "tasks", sa.Column("link_bound", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )

    op.add_column("transfers", sa.Column("deadline", sa.Double(), nullable=True))
    op.add_column(
        "transfers", sa.Column("promised", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.add_column("transfers", sa.Column("size_bytes", sa.BigInteger(), nullable=True))
    op.add_column("transfers", sa.Column("cost_limit_usd", sa.Double(), nullable=True))
    op.add_column("transfers", sa.Column("plan", sa.Text(), server_default=sa.text("''"), nullable=False))


def downgrade() -> None:
    raise NotImplementedError("a database is brought forward only: restore a backup from before")
