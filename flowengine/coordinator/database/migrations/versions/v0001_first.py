"""The first form of the tables.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "certificates",
        sa.Column("serial", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.Text(), nullable=False),
        sa.Column("not_after", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("revoked", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_certificates")),
    )
    op.create_index(op.f("ix_certificates_revoked"), "certificates", ["revoked"], unique=False)
    op.create_index(op.f("ix_certificates_site"), "certificates", ["site"], unique=False)
    op.create_table(
        "counters",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("transfer", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("site", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("user", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("tenant", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("data", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("wake", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
    )
    op.create_index("ix_events_at", "events", ["at"], unique=False)
    op.create_index("ix_events_site_seq", "events", ["site", "seq"], unique=False)
    op.create_index("ix_events_transfer_seq", "events", ["transfer", "seq"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("status", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("body", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("user", "key", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_created", "idempotency", ["created"], unique=False)
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("expires", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("used", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_join_tokens")),
    )
    op.create_table(
        "limits",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("rate_bits_per_s", sa.BigInteger(), nullable=True),
        sa.Column("windows", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("changed", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("changed_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("scope", name=op.f("pk_limits")),
    )
    op.create_table(
        "links",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("capacity_bits_per_s", sa.BigInteger(), nullable=True),
        sa.Column("rtt_ms", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("cost_per_gb", sa.Double(), nullable=False),
        sa.Column("as_of", sa.Double(), nullable=True),
        sa.Column("source_of_values", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("source", "target", name=op.f("pk_links")),
    )
    op.create_table(
        "looks",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("expires", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_looks")),
    )
    op.create_index(op.f("ix_looks_site"), "looks", ["site"], unique=False)
    op.create_table(
        "settings",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_settings")),
    )
    op.create_table(
        "sites",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("since", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("facts", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("roots", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("addresses", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("software", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("boot", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=True),
        sa.Column("max_tasks", sa.BigInteger(), server_default=sa.text("4"), nullable=False),
        sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("agent_draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("cert_serial", sa.Text(), nullable=True),
        sa.Column("key_sha256", sa.Text(), nullable=True),
        sa.Column("cert_not_before", sa.Double(), nullable=True),
        sa.Column("cert_not_after", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('expected', 'online', 'offline', 'draining', 'revoked')", name=op.f("ck_sites_state")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sites")),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("max_running", sa.BigInteger(), nullable=True),
        sa.Column("max_queued", sa.BigInteger(), nullable=True),
        sa.Column("max_bytes_per_day", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tenants")),
    )
    op.create_table(
        "transfers",
        sa.Column("seq", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("message", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("since", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("ended", sa.Double(), nullable=True),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("source_site", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("mode", sa.Text(), server_default=sa.text("'copy'"), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("cancelled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("begun", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("landed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("decisions", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("policy_digest", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.CheckConstraint(
            "state IN ('requested', 'started', 'suspended', 'completed', 'terminated', 'quarantined', 'purged')",
            name=op.f("ck_transfers_state"),
        ),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name=op.f("fk_transfers_tenant")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_transfers")),
        sa.UniqueConstraint("id", name=op.f("uq_transfers_id")),
    )
    op.create_index("ix_transfers_state_seq", "transfers", ["state", "seq"], unique=False)
    op.create_index("ix_transfers_tenant_seq", "transfers", ["tenant", "seq"], unique=False)
    op.create_table(
        "usage",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("tasks", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name=op.f("fk_usage_tenant")),
        sa.PrimaryKeyConstraint("tenant", "minute", name=op.f("pk_usage")),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("disabled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("role IN ('admin', 'operator', 'user', 'auditor')", name=op.f("ck_users_role")),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name=op.f("fk_users_tenant")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_users")),
    )
    op.create_table(
        "landed",
        sa.Column("transfer", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["transfer"], ["transfers.id"], name=op.f("fk_landed_transfer")),
        sa.PrimaryKeyConstraint("transfer", "seq", name=op.f("pk_landed")),
    )
    op.create_table(
        "tasks",
        sa.Column("seq", _SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("transfer", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("mode", sa.Text(), server_default=sa.text("'copy'"), nullable=False),
        sa.Column("source_site", sa.Text(), nullable=False),
        sa.Column("source_path", sa.Text(), nullable=False),
        sa.Column("target_site", sa.Text(), nullable=False),
        sa.Column("target_path", sa.Text(), nullable=False),
        sa.Column("driver", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("holder", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("boot", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("claimed", sa.Double(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("reported", sa.Double(), nullable=True),
        sa.Column("ready_at", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("holder_seq", sa.BigInteger(), server_default=sa.text("-1"), nullable=False),
        sa.Column("peer_seq", sa.BigInteger(), server_default=sa.text("-1"), nullable=False),
        sa.Column("counters", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("rate_bits_per_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("bottleneck", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("wait_name", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("wait_text", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("wait_ends", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("wait_since", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("message", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("hint", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("version_id", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("receipt", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("grant_until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "state IN ('waiting', 'running', 'done', 'failed', 'cancelled')", name=op.f("ck_tasks_state")
        ),
        sa.ForeignKeyConstraint(["transfer"], ["transfers.id"], name=op.f("fk_tasks_transfer")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tasks")),
        sa.UniqueConstraint("id", name=op.f("uq_tasks_id")),
    )
    op.create_index(op.f("ix_tasks_source_site"), "tasks", ["source_site"], unique=False)
    op.create_index("ix_tasks_state_driver", "tasks", ["state", "driver"], unique=False)
    op.create_index(op.f("ix_tasks_target_site"), "tasks", ["target_site"], unique=False)
    op.create_index(op.f("ix_tasks_transfer"), "tasks", ["transfer"], unique=False)
    op.create_table(
        "tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("created", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("expires", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_used", sa.Double(), nullable=True),
        sa.Column("comment", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name=op.f("fk_tokens_user")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
    )
    op.create_index(op.f("ix_tokens_user"), "tokens", ["user"], unique=False)


def downgrade() -> None:
    raise NotImplementedError("there is nothing before it")
