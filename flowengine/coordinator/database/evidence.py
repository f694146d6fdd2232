"""The coordinator's chain of evidence, in its database, and the checkpoints of agents' chains.

One chain for all coordinators of a federation: a record takes the next number in the transaction of what it is about,
so either both are there or neither. On PostgreSQL a counter's row is locked meanwhile.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, delete, func, select

from flowengine.coordinator.database.policies import part_of
from flowengine.coordinator.database.tables import (
    AnyRow,
    checkpoints,
    evidence,
    evidence_bundles,
    evidence_values,
)
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import AuthenticationError
from flowengine.evidence.bodies import check_body, checkpoint_body
from flowengine.evidence.chain import Head, Record, begin_chain, next_record, read_record
from flowengine.evidence.checkpoint import Checkpoint, read_checkpoint, sign_checkpoint, verify_checkpoint
from flowengine.evidence.heads import contradiction
from flowengine.evidence.private import conceal
from flowengine.evidence.suites import DEFAULT_SUITE, find_suite
from flowengine.policy.bundle import open_bundle

__all__ = [
    "AGENT", "Chain", "find_bundle", "keep_bundle", "list_checkpoints", "list_records", "take_checkpoint",
]  # fmt: skip

AGENT: Final = "coordinator"
KEEP_CHECKPOINTS: Final = 1000
"""Of each chain; a newer one says all that an older one does of what came before both."""

Rng = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Chain:
    """How the coordinator records.

    Args:
        key: of keyed digests.
        rng: random bytes.
    """

    key: bytes
    rng: Rng

    def append(self, writing: Writing, kind: str, body: Mapping[str, object]) -> Record:
        """Add a record in a transaction.

        Raises:
            ValueError: the body is not what its kind needs.
        """
        check_body(kind, body)
        _lock(writing)
        head = _head(writing.connection)
        if head is None:
            first, head = begin_chain(AGENT, self.rng(16), writing.now)
            _insert(writing, first)
        concealed, kept = conceal(body, head.suite, self.key, self.rng)
        record, _ = next_record(head, kind, concealed, writing.now)
        for one in kept:
            writing.connection.execute(
                evidence_values.insert().values(digest=one.digest, name=one.name, value=json_text(one.value))
            )
        _insert(writing, record)
        return record

    def checkpoint(self, writing: Writing, signer: tuple[bytes, bytes]) -> bytes:
        """Sign for what no checkpoint covers yet; empty where there is nothing."""
        _lock(writing)
        head = _head(writing.connection)
        if head is None:
            return b""
        since = _unsigned(writing.connection)
        if not since or (len(since) == 1 and _is_checkpoint(writing.connection, head.seq)):
            return b""
        document = sign_checkpoint(head, since, writing.now, *signer)
        found, _ = read_checkpoint(document)
        self.append(writing, "checkpoint", checkpoint_body(found, base64.b64encode(document).decode("ascii")))
        return document


def _lock(writing: Writing) -> None:
    """Be the only one who adds to the chain until the commit; before the counter of events, which comes last."""
    if writing.locks_rows:
        writing.count_up("evidence")


def _insert(writing: Writing, record: Record) -> None:
    writing.connection.execute(
        evidence.insert().values(
            seq=record.seq,
            kind=record.kind,
            transfer=str(record.get("transfer") or ""),
            hash=record.hash,
            line=record.line.decode(),
        )
    )


def _head(connection: Connection) -> Head | None:
    last = connection.execute(select(evidence).order_by(evidence.c.seq.desc()).limit(1)).first()
    if last is None:
        return None
    first = connection.execute(select(evidence.c.line).where(evidence.c.seq == 1)).scalar_one()
    begun = read_record(str(first).encode(), find_suite(DEFAULT_SUITE))
    return Head(AGENT, begun.hash, find_suite(begun.get("suite")), last.seq, last.hash)


def _is_checkpoint(connection: Connection, seq: int) -> bool:
    kind: str = connection.execute(select(evidence.c.kind).where(evidence.c.seq == seq)).scalar_one()
    return kind == "checkpoint"


def _unsigned(connection: Connection) -> list[str]:
    """Hashes of the records that no checkpoint covers."""
    signed = connection.execute(
        select(func.max(evidence.c.seq)).where(evidence.c.kind == "checkpoint")
    ).scalar()
    # The record of a checkpoint stands right behind the last record that it signs for.
    query = select(evidence.c.hash).where(evidence.c.seq >= (signed or 0)).order_by(evidence.c.seq)
    return [str(row) for row in connection.execute(query).scalars()]


def list_records(connection: Connection, after: int, limit: int) -> list[str]:
    """Lines of the coordinator's chain behind a number."""
    query = select(evidence.c.line).where(evidence.c.seq > after).order_by(evidence.c.seq).limit(limit)
    return [str(line) for line in connection.execute(query).scalars()]


def keep_bundle(writing: Writing, content: bytes) -> str:
    """Keep the policies that decisions name, for as long as the chain speaks of them; their digest."""
    digest = open_bundle(content).digest
    there = select(evidence_bundles.c.digest).where(evidence_bundles.c.digest == digest)
    if writing.connection.execute(there).first() is None:
        writing.connection.execute(evidence_bundles.insert().values(digest=digest, content=content))
    return digest


def find_bundle(connection: Connection, digest: str, offset: int) -> AnyRow | None:
    """A part of the policies of a digest, with the whole size."""
    parts = part_of(evidence_bundles.c.content, offset)
    return connection.execute(select(*parts).where(evidence_bundles.c.digest == digest)).first()


def last_activated(connection: Connection) -> str:
    """Digest of the bundle that the last `policy.activate` names; empty before the first."""
    line = connection.execute(
        select(evidence.c.line)
        .where(evidence.c.kind == "policy.activate")
        .order_by(evidence.c.seq.desc())
        .limit(1)
    ).scalar()
    return "" if line is None else str(msgspec.json.decode(line)["bundle"])


def take_checkpoint(writing: Writing, site: str, document: bytes, anchors_pem: str) -> Checkpoint:
    """Keep a checkpoint of a site's chain, and compare it with those that are here.

    Args:
        site: who hands it in: the site itself, or one that it was shown to.

    Raises:
        AuthenticationError: it is of no site of this federation.
        IntegrityError: it was changed (reason "evidence").
    """
    found, facts = verify_checkpoint(document, anchors_pem)
    if found.agent != f"site:{facts.site}":
        raise AuthenticationError(
            f"site {site} handed in a checkpoint of {found.agent[:80]}", reason="evidence"
        )
    columns = checkpoints.c
    mine = (columns.agent == found.agent, columns.chain == found.chain)
    newest = writing.connection.execute(
        select(checkpoints).where(*mine).order_by(columns.seq.desc()).limit(1)
    ).first()
    near = _near(writing.connection, found)
    if any(head.seq == found.seq and head.hash == found.hash for head in near):
        return found
    why = next((why for head in near if (why := contradiction(head, found))), "")
    if not why and newest is not None and _time(newest.document) < found.time and newest.seq > found.seq:
        why = f"a later checkpoint signs for record {found.seq}, an earlier one had signed for {newest.seq}"
    if why:
        text = base64.b64encode(document).decode("ascii")
        writing.emit(
            "evidence.contradicted",
            site=facts.site,
            chain=found.chain,
            seq=found.seq,
            why=why,
            shown_to=site,
            document=text,
        )  # both documents together prove it
    elif newest is None and facts.site == site and _has_other(writing.connection, found):
        writing.emit("evidence.new-chain", site=site, chain=found.chain)
    writing.connection.execute(
        checkpoints.insert().values(
            agent=found.agent,
            chain=found.chain,
            seq=found.seq,
            hash=found.hash,
            document=base64.b64encode(document).decode("ascii"),
            at=writing.now,
        )
    )
    _forget_old(writing, found)
    return found


def _near(connection: Connection, found: Checkpoint) -> list[Checkpoint]:
    """The checkpoints of a chain just before and behind one, and that on the same record."""
    columns = checkpoints.c
    query = select(checkpoints.c.document).where(columns.agent == found.agent, columns.chain == found.chain)
    before = query.where(columns.seq <= found.seq).order_by(columns.seq.desc()).limit(2)
    behind = query.where(columns.seq > found.seq).order_by(columns.seq).limit(1)
    texts = [*connection.execute(before).scalars(), *connection.execute(behind).scalars()]
    return [read_checkpoint(base64.b64decode(text))[0] for text in texts]


def _time(document: str) -> str:
    return read_checkpoint(base64.b64decode(document))[0].time


def _has_other(connection: Connection, found: Checkpoint) -> bool:
    query = select(checkpoints.c.seq).where(
        checkpoints.c.agent == found.agent, checkpoints.c.chain != found.chain
    )
    return connection.execute(query.limit(1)).first() is not None


def _forget_old(writing: Writing, found: Checkpoint) -> None:
    columns = checkpoints.c
    mine = (columns.agent == found.agent, columns.chain == found.chain)
    oldest = writing.connection.execute(
        select(columns.seq).where(*mine).order_by(columns.seq.desc()).offset(KEEP_CHECKPOINTS - 1).limit(1)
    ).scalar()
    if oldest is not None:
        writing.connection.execute(delete(checkpoints).where(*mine, columns.seq < oldest))


def list_checkpoints(
    connection: Connection, agent: str | None, skip: int, limit: int
) -> list[tuple[Checkpoint, str, float]]:
    """The newest checkpoints here, newest first: what each says, the document in base64, when it came."""
    columns = checkpoints.c
    query = select(checkpoints).order_by(columns.at.desc(), columns.agent, columns.seq.desc())
    query = query.offset(skip).limit(limit)
    if agent is not None:
        query = query.where(checkpoints.c.agent == agent)
    return [
        (read_checkpoint(base64.b64decode(row.document))[0], row.document, row.at)
        for row in connection.execute(query)
    ]
