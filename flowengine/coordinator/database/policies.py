"""Policy bundles, label statements and what copies inherited: queries and their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from sqlalchemy import Connection, func, select

from flowengine.api.resources import AgreementInfo, LabelInfo, PolicyBundle
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import AnyRow, agreements, bundles, inherited, labels
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import AuthenticationError
from flowengine.policy.agreements import Agreement
from flowengine.policy.bundle import open_bundle
from flowengine.policy.labels import Inherited, overlaps
from flowengine.policy.model import Authority
from flowengine.policy.parse import load
from flowengine.trust.agreement import peek_agreement, verify_agreement
from flowengine.trust.labels import peek_labels

__all__ = [
    "agreement_rows", "believed_agreements", "inherit", "inherited_by", "label_rows", "newest", "show_agreement",
    "show_bundle", "show_label", "statement_rows",
]  # fmt: skip


def newest(connection: Connection) -> tuple[int, int]:
    """Version of the bundle in force, serial of the last signed statement (labels, agreements); 0 where there is none."""
    bundle = connection.execute(select(func.max(bundles.c.version))).scalar()
    serials = (
        connection.execute(select(func.max(table.c.serial))).scalar() for table in (labels, agreements)
    )
    return int(bundle or 0), max(int(serial or 0) for serial in serials)


def show_bundle(row: AnyRow, in_force: int) -> PolicyBundle:
    """A bundle as the API shows it."""
    opened = open_bundle(row.content)
    return PolicyBundle(
        version=row.version,
        digest=row.digest,
        not_after=moment(row.not_after),
        activated=moment(row.activated),
        activated_by=row.activated_by,
        signed_by=[(role, key) for role, key, _ in opened.signatures],
        policies=[policy.id for policy in load(opened.files).policies],
        in_force=row.version == in_force,
    )


def show_label(row: AnyRow) -> LabelInfo:
    """A label statement as the API shows it."""
    said = peek_labels(row.document)
    return LabelInfo(
        serial=row.serial,
        owner=said.owner,
        site=said.site,
        path=said.path,
        number=said.number,
        labels=said.labels,
        contracts=said.contracts,
        facts=dict(said.facts),
        issued=moment(said.issued),
        expires=optional_moment(said.expires),
        withdrawn=said.withdrawn,
        added=moment(row.added),
        added_by=row.added_by,
    )


def label_rows(connection: Connection, after: int, limit: int, site: str | None = None) -> Sequence[AnyRow]:
    """Label statements in the order of their serials."""
    query = select(labels).where(labels.c.serial > after).order_by(labels.c.serial).limit(limit)
    return connection.execute(query if site is None else query.where(labels.c.site == site)).all()


def show_agreement(row: AnyRow) -> AgreementInfo:
    """An agreement as the API shows it."""
    said = peek_agreement(row.document)
    return AgreementInfo(
        serial=row.serial,
        authority=said.authority,
        id=said.id,
        number=said.number,
        roots=said.roots,
        recipients=said.recipients,
        facts=dict(said.facts),
        issued=moment(said.issued),
        expires=optional_moment(said.expires),
        withdrawn=said.withdrawn,
        added=moment(row.added),
        added_by=row.added_by,
    )


def agreement_rows(connection: Connection, after: int, limit: int) -> Sequence[AnyRow]:
    """Agreements in the order of their serials."""
    query = select(agreements).where(agreements.c.serial > after).order_by(agreements.c.serial).limit(limit)
    return connection.execute(query).all()


def statement_rows(connection: Connection, after: int, limit: int) -> list[AnyRow]:
    """Serial and document of label statements and agreements alike, in the order of their serials."""
    rows = [*label_rows(connection, after, limit), *agreement_rows(connection, after, limit)]
    return sorted(rows, key=lambda row: int(row.serial))[:limit]


def believed_agreements(connection: Connection, authorities: Mapping[str, Authority]) -> list[Agreement]:
    """The agreements that authorities of the policies in force have signed."""
    found = []
    for document in connection.execute(select(agreements.c.document)).scalars():
        with contextlib.suppress(AuthenticationError):  # of an authority that is none any more
            found.append(verify_agreement(document, authorities))
    return found


def inherit(writing: Writing, site: str, path: str, words: Iterable[str], contracts: Iterable[str]) -> None:
    """Remember with which labels something lands below a path of a site."""
    writing.connection.execute(
        writing.insert(inherited)
        .values(
            site=site,
            path=path.rstrip("/") or "/",
            labels=json_text(sorted(set(words))),
            contracts=json_text(sorted(set(contracts))),
        )
        .on_conflict_do_nothing()
    )


def inherited_by(connection: Connection, site: str, path: str) -> list[Inherited]:
    """What data at a path of a site has from where it came from."""
    rows = connection.execute(select(inherited).where(inherited.c.site == site)).all()
    return [
        Inherited(frozenset(msgspec.json.decode(row.labels)), frozenset(msgspec.json.decode(row.contracts)))
        for row in rows
        if overlaps(row.path, path)
    ]
