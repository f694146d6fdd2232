"""The tables, the same on SQLite and PostgreSQL. Times are Unix seconds; lists and records are JSON text.

States are text with a CHECK: a value can be added without rebuilding a type. `migrations` makes these tables; a test
compares the two.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

__all__ = ["AnyRow", "metadata"]

AnyRow: TypeAlias = Any
"""A row of a table: its columns are attributes."""

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Serial: Final = BigInteger().with_variant(Integer, "sqlite")


def _text(name: str, default: str = "") -> Column[str]:
    return Column(name, Text, nullable=False, server_default=text("'" + default + "'"))


def _count(name: str, default: int = 0) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text(str(default)))


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False, server_default=text("false"))


def _time(name: str) -> Column[float]:
    return Column(name, Double, nullable=False, server_default=text("0"))


def _one_of(column: str, *values: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


counters: Final = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),  # "event", "fence", "epoch", "label"
    Column("value", BigInteger, nullable=False),
)
settings: Final = Table(
    "settings",
    metadata,
    Column("name", Text, primary_key=True),  # "ca_sha256": whose federation this database is
    Column("value", Text, nullable=False),
)
tenants: Final = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True),
    Column("weight", Double, nullable=False),
    Column("max_running", BigInteger),
    Column("max_queued", BigInteger),
    Column("max_bytes_per_day", BigInteger),
)
usage: Final = Table(
    "usage",
    metadata,
    Column("tenant", Text, ForeignKey("tenants.name"), primary_key=True),
    Column("minute", BigInteger, primary_key=True),
    _count("size_bytes"),
    _count("tasks"),
)
users: Final = Table(
    "users",
    metadata,
    Column("name", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("tenant", Text, ForeignKey("tenants.name"), nullable=False),
    _flag("disabled"),
    _time("created"),
    _one_of("role", "admin", "operator", "user", "auditor"),
)
tokens: Final = Table(
    "tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user", Text, ForeignKey("users.name"), nullable=False, index=True),
    Column("secret_sha256", Text, nullable=False),
    _time("created"),
    _time("expires"),
    Column("last_used", Double),
    _text("comment"),
)
sites: Final = Table(
    "sites",
    metadata,
    Column("name", Text, primary_key=True),
    Column("state", Text, nullable=False),
    _time("since"),
    _time("created"),
    _text("facts", "{}"),
    _text("roots", "[]"),
    _text("addresses", "[]"),
    _text("software"),
    _text("boot"),
    Column("last_seen", Double),
    _count("max_tasks", 4),
    _flag("draining"),  # what an operator asked for
    _flag("agent_draining"),  # what the agent says of itself
    Column("cert_serial", Text),
    Column("key_sha256", Text),
    Column("cert_not_before", Double),
    Column("cert_not_after", Double),
    _text("relay"),  # what it passes on for others; empty: nothing
    Column("can", Text),  # duties that its agent carries out; null: it has not said
    _text("policy", "{}"),  # what its agent says of its policies
    _one_of("state", "expected", "online", "offline", "draining", "revoked"),
)
certificates: Final = Table(
    "certificates",
    metadata,
    Column("serial", Text, primary_key=True),
    Column("site", Text, nullable=False, index=True),
    Column("key_sha256", Text, nullable=False),
    _time("not_after"),
    Column("revoked", Double, index=True),
)
join_tokens: Final = Table(
    "join_tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("site", Text, nullable=False),
    Column("secret_sha256", Text, nullable=False),
    _text("created_by"),
    _time("expires"),
    Column("used", Double),
)
links: Final = Table(
    "links",
    metadata,
    Column("source", Text, primary_key=True),
    Column("target", Text, primary_key=True),
    Column("capacity_bits_per_s", BigInteger),
    Column("rtt_ms", Double),
    Column("loss", Double),
    Column("cost_per_gb", Double, nullable=False),
    Column("as_of", Double),
    _text("source_of_values"),
)
link_states: Final = Table(
    "link_states",
    metadata,
    Column("source", Text, primary_key=True),
    Column("target", Text, primary_key=True),
    Column("rate_bits_per_s", Double),
    _time("variance"),  # of the rate's natural logarithm, at `measured`
    _time("measured"),
    Column("rtt_ms", Double),
    Column("loss", Double),
    _time("asked"),  # when a probe was asked for last
)
link_history: Final = Table(
    "link_history",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("source", Text, nullable=False),
    Column("target", Text, nullable=False),
    _time("at"),
    Column("kind", Text, nullable=False),
    Column("rate_bits_per_s", Double),
    Column("rtt_ms", Double),
    Column("loss", Double),
    _flag("at_least"),  # the link may carry more: something else held it back
    _one_of("kind", "probe", "transfers"),
    Index("ix_link_history_source_target_at", "source", "target", "at"),
    Index("ix_link_history_at", "at"),
)
maintenance: Final = Table(
    "maintenance",
    metadata,
    Column("id", Text, primary_key=True),
    Column("scope", Text, nullable=False),  # site:A or link:A>B
    _time("starts"),
    _time("ends"),
    _time("drain_s"),
    _text("comment"),
    _text("created_by"),
)
limits: Final = Table(
    "limits",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("rate_bits_per_s", BigInteger),
    _text("windows", "[]"),
    _time("changed"),
    _text("changed_by"),
)
transfers: Final = Table(
    "transfers",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    _text("request"),
    Column("state", Text, nullable=False),
    _text("reason"),
    _text("message"),
    _time("since"),
    _time("created"),
    Column("ended", Double),
    Column("user", Text, nullable=False),
    Column("tenant", Text, ForeignKey("tenants.name"), nullable=False),
    Column("source_site", Text, nullable=False),
    _count("priority"),
    _text("mode", "copy"),
    _flag("paused"),
    _flag("cancelled"),
    _flag("begun"),
    _count("landed"),
    _text("decisions", "[]"),
    _text("policy_digest"),
    Column("deadline", Double),
    _flag("promised"),  # the deadline was admitted
    Column("size_bytes", BigInteger),  # what is expected to move, where somebody knows
    Column("cost_limit_usd", Double),
    _text("plan"),  # the stored plan that it must follow exactly
    _one_of(
        "state",
        "requested",
        "started",
        "suspended",
        "completed",
        "terminated",
        "quarantined",
        "purged",
    ),
    Index("ix_transfers_tenant_seq", "tenant", "seq"),
    Index("ix_transfers_state_seq", "state", "seq"),
)
tasks: Final = Table(
    "tasks",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("transfer", Text, ForeignKey("transfers.id"), nullable=False, index=True),
    Column("tenant", Text, nullable=False),
    _count("priority"),
    _text("mode", "copy"),
    Column("source_site", Text, nullable=False, index=True),
    Column("source_path", Text, nullable=False),
    Column("target_site", Text, nullable=False, index=True),
    Column("target_path", Text, nullable=False),
    Column("driver", Text, nullable=False),  # the site that dials and so claims
    Column("state", Text, nullable=False),
    _flag("paused"),
    _text("holder"),
    _text("boot"),
    _count("fence"),
    _count("epoch"),
    _count("attempts"),
    Column("claimed", Double),
    Column("lease_until", Double),
    Column("reported", Double),
    _time("ready_at"),
    _count("holder_seq", -1),
    _count("peer_seq", -1),
    _text("counters", "{}"),
    Column("rate_bits_per_s", Double, nullable=False, server_default=text("0")),
    _text("bottleneck"),
    _text("wait_name"),
    _text("wait_text"),
    _text("wait_ends"),
    _time("wait_since"),
    _text("reason"),
    _text("message"),
    _text("hint"),
    _text("version_id"),
    _text("receipt"),
    _time("grant_until"),
    _text("flows", "[]"),  # what the holder's links carried of late
    _flag("link_bound"),  # whether nothing but links kept it from more
    _text("disposal"),  # what became at the target of data that may not stay: a state of `Disposal`
    _text("disposed", "{}"),
    _text("fed_by"),  # the task whose target serves this one; empty: the transfer's source does
    _one_of("state", "waiting", "running", "done", "failed", "cancelled"),
    Index("ix_tasks_state_driver", "state", "driver"),
)
plans: Final = Table(
    "plans",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    _time("made"),
    _time("expires"),
    _text("request", "{}"),
    _text("body", "{}"),
    Index("ix_plans_expires", "expires"),
)
plan_state: Final = Table(
    "plan_state",
    metadata,
    Column("name", Text, primary_key=True),  # "current"
    _count("number"),
    _time("made"),
    _text("document"),
)
task_plans: Final = Table(
    "task_plans",
    metadata,
    Column("task", Text, ForeignKey("tasks.id"), primary_key=True),
    _count("number"),
    _text("body", "{}"),
)
leases: Final = Table(
    "leases",
    metadata,
    Column("task", Text, ForeignKey("tasks.id"), primary_key=True),
    Column("site", Text, primary_key=True),
    Column("next", Text, primary_key=True),
    _text("transfer"),
    _count("number"),
    _count("rate_bits_per_s"),
    _time("until"),
    Index("ix_leases_site", "site"),
)
paces: Final = Table(
    "paces",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("source", Text, nullable=False),
    Column("target", Text, nullable=False),
    _time("at"),
    _count("objects"),
    _count("size_bytes"),
    _count("sent_bytes"),
    _time("seconds"),
    _time("rate_bits_per_s"),  # what the plan expected of the way
    Index("ix_paces_source_target_at", "source", "target", "at"),
)
landed: Final = Table(
    "landed",
    metadata,
    Column("transfer", Text, ForeignKey("transfers.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("target", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
events: Final = Table(
    "events",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    _time("at"),
    Column("type", Text, nullable=False),
    _text("transfer"),
    _text("site"),
    _text("user"),
    _text("tenant"),
    _text("data", "{}"),
    _text("wake", "[]"),  # sites whose agents this concerns
    Index("ix_events_transfer_seq", "transfer", "seq"),
    Index("ix_events_site_seq", "site", "seq"),
    Index("ix_events_at", "at"),
)
bundles: Final = Table(
    "bundles",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),  # the highest is in force
    Column("digest", Text, nullable=False),
    _time("not_after"),
    Column("content", LargeBinary, nullable=False),
    _text("about", "{}"),  # what lists show of it, so that they read no content
    _time("activated"),
    _text("activated_by"),
)
labels: Final = Table(
    "labels",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("site", Text, primary_key=True, index=True),
    Column("path", Text, primary_key=True),
    Column("serial", BigInteger, nullable=False, server_default=text("0"), index=True),
    _count("number"),
    Column("document", LargeBinary, nullable=False),
    _time("added"),
    _text("added_by"),
)
agreements: Final = Table(
    "agreements",
    metadata,
    Column("authority", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("serial", BigInteger, nullable=False, server_default=text("0"), index=True),
    _count("number"),
    Column("document", LargeBinary, nullable=False),
    _time("added"),
    _text("added_by"),
)
inherited: Final = Table(
    "inherited",
    metadata,
    Column("site", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("labels", Text, primary_key=True),
    Column("contracts", Text, primary_key=True),
)
looks: Final = Table(
    "looks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("site", Text, nullable=False, index=True),
    Column("path", Text, nullable=False),
    _time("expires"),
    Column("answer", Text),
    _text("kind", "look"),  # "measure", "probe"
    _text("body", "{}"),
)
idempotency: Final = Table(
    "idempotency",
    metadata,
    Column("user", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", Text, nullable=False),
    _count("status"),
    _text("body"),
    _time("created"),
    Index("ix_idempotency_created", "created"),
)
ledger: Final = Table(
    "ledger",
    metadata,
    Column("task", Text, primary_key=True),  # the movement's name: one per target of a transfer
    Column("transfer", Text, nullable=False, index=True),
    Column("controller", Text, nullable=False, index=True),
    Column("party", Text, nullable=False),
    Column("country", Text),
    _text("labels", "[]"),
    Column("persons", BigInteger),
    Column("size_bytes", BigInteger),
    _time("at"),
    Column("expires", Double),  # while it is only reserved
    _text("counts", "{}"),  # what the counters came to with it
)
approval_requests: Final = Table(
    "approval_requests",
    metadata,
    Column("handle", Text, primary_key=True),
    _time("created"),
    _time("expires"),
    Column("source", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("recipient", Text, nullable=False),
    _text("purpose"),
    Column("requester", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("dataset_digest", Text, nullable=False),
    Column("duties_digest", Text, nullable=False),
    _text("duties", "[]"),
    _text("groups", "[]"),
    _count("people"),
    _text("text"),
    Index("ix_approval_requests_expires", "expires"),
)
approvals: Final = Table(
    "approvals",
    metadata,
    Column("handle", Text, ForeignKey("approval_requests.handle"), primary_key=True),
    Column("who", Text, primary_key=True),
    _time("given"),
    _time("until"),
    _text("document"),
    _text("added_by"),
)
evidence: Final = Table(
    "evidence",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    _text("transfer"),
    Column("hash", Text, nullable=False),
    Column("line", Text, nullable=False),
    Index("ix_evidence_transfer", "transfer"),
)
evidence_values: Final = Table(
    "evidence_values",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("value", Text, nullable=False),
)
evidence_bundles: Final = Table(
    "evidence_bundles",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
checkpoints: Final = Table(
    "checkpoints",
    metadata,
    Column("agent", Text, primary_key=True),
    Column("chain", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", Text, primary_key=True),  # two of one record are kept: together they prove a fork
    Column("document", Text, nullable=False),
    _time("at"),
)
