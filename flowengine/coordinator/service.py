"""The coordinator as one object: what its handlers share."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select

from flowengine.coordinator.actions.grants import Terms
from flowengine.coordinator.authority import Secrets
from flowengine.coordinator.database.evidence import Chain
from flowengine.coordinator.database.tables import idempotency
from flowengine.coordinator.database.transactions import PostgresDatabase, SqliteDatabase, Writing
from flowengine.coordinator.decisions import Decider
from flowengine.coordinator.hub import Hub
from flowengine.coordinator.planning.solver import Solver
from flowengine.coordinator.web.calls import Call
from flowengine.errors import FlowError

__all__ = ["Service", "Settings"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a coordinator runs; the defaults are for a federation, tests use shorter times.

    Attributes:
        url: where agents and clients reach it; goes into join tokens.
        lease_s: term of a task's lease.
        offline_s: an agent that was silent for so long is offline.
        poll_s: how often the database is asked for what other coordinators did.
        keep_events_s: events and idempotency keys older than this are forgotten.
    """

    url: str
    lease_s: int = 300
    offline_s: float = 30.0
    poll_s: float = 1.0
    ping_s: float = 15.0
    keep_events_s: float = 90 * 86400.0
    keep_keys_s: float = 86400.0


@dataclass(slots=True)
class Service:
    """What handlers need: database, secrets, policy, who waits, the planner, settings, clock."""

    settings: Settings
    database: SqliteDatabase | PostgresDatabase
    secrets: Secrets
    decider: Decider
    hub: Hub = field(default_factory=Hub)
    clock: Callable[[], float] = time.time
    epoch: int = 0
    leader: bool = False
    stopping: bool = False
    policy_keys: Mapping[str, Sequence[Ed25519PublicKey]] = field(default_factory=dict)
    """Whose signatures count on policy bundles, by role."""
    solver: Solver = field(default_factory=Solver)

    @property
    def chain(self) -> Chain:
        """The coordinator's own chain of evidence."""
        return Chain(self.secrets.evidence_key, os.urandom)

    @property
    def terms(self) -> Terms:
        """What claims are given."""
        return Terms(
            self.settings.lease_s, self.secrets.sign_grant, self.secrets.sign_relay_grant, os.urandom
        )

    def new_transfer_id(self) -> str:
        """An id that nobody can guess and anybody can type."""
        return "t-" + "".join(secrets.choice("0123456789abcdefghjkmnpqrstvwxyz") for _ in range(12))

    async def kept(self, call: Call) -> bytes | None:
        """What a request with the same Idempotency-Key was answered before; None where it is the first."""
        if not call.key:
            return None
        query = select(idempotency).where(
            idempotency.c.user == call.user.name,
            idempotency.c.key == call.key,
            idempotency.c.request_sha256 == _request_digest(call),
        )
        row = await self.database.read(lambda c: c.execute(query).first())
        return None if row is None else str(row.body).encode()

    async def create(
        self, call: Call, work: Callable[[Writing], T | FlowError], *, secret: bool = False
    ) -> T | bytes:
        """Run what creates something, once for each Idempotency-Key.

        Args:
            secret: the answer holds a secret: it is kept sealed.

        Raises:
            FlowError: the key was used with another body (reason "conflict"); or what `work` returned or raised.
        """
        user, key = call.user.name, call.key
        digest = _request_digest(call)
        about = f"{user}/{key}"

        def once(writing: Writing) -> T | FlowError | bytes:
            if key:
                row = writing.connection.execute(
                    select(idempotency).where(idempotency.c.user == user, idempotency.c.key == key)
                ).first()
                if row is not None:
                    if row.request_sha256 != digest:
                        raise FlowError(
                            "this Idempotency-Key was used for another request",
                            hint="use a new key for each thing that is to be made",
                            reason="conflict",
                        )
                    return (self.secrets.unseal(row.body, about) if secret else row.body).encode()
            result = work(writing)
            if key and not isinstance(result, FlowError):
                body = msgspec.json.encode(result).decode()
                writing.connection.execute(
                    idempotency.insert().values(
                        user=user,
                        key=key,
                        request_sha256=digest,
                        status=call.route.status,
                        body=self.secrets.seal(body, about) if secret else body,
                        created=writing.now,
                    )
                )
            return result

        result = await self.database.write(once)
        if isinstance(result, FlowError):
            raise result
        return result


def _request_digest(call: Call) -> str:
    return sha256(call.route.name.encode() + b"\0" + call.raw).hexdigest()
