"""Policy bundles, label statements and what copies inherited: queries and their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Column, ColumnElement, Connection, LargeBinary, Select, Table, func, select

from flowengine.api.policies import AgreementInfo, LabelInfo, PolicyBundle
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import AnyRow, agreements, bundles, inherited, labels
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import AuthenticationError
from flowengine.policy.agreements import Agreement
from flowengine.policy.labels import Inherited, overlaps
from flowengine.policy.model import Authority
from flowengine.trust.agreement import AgreementStatement, peek_agreement, verify_agreement
from flowengine.trust.labels import LabelStatement, peek_labels

__all__ = [
    "ABOUT_BUNDLES",
    "PART_BYTES",
    "BundleAbout",
    "agreement_rows",
    "believed_agreements",
    "bundle_part",
    "inherit",
    "inherited_by",
    "label_rows",
    "newest",
    "part_of",
    "show_agreement",
    "show_bundle",
    "show_label",
    "statement_rows",
]  # fmt: skip


class BundleAbout(msgspec.Struct):
    """What lists show of a bundle beside its row."""

    signed_by: list[tuple[str, str]] = []
    policies: list[str] = []


ABOUT_BUNDLES: Final = tuple(column for column in bundles.c if column.name != "content")
"""All of a bundle's row but its file."""
PART_BYTES: Final = 384 * 1024
"""How much of a file goes into one answer, before base64."""


def bundle_part(connection: Connection, version: int, offset: int) -> AnyRow | None:
    """A part of a bundle's file, with the whole size."""
    return connection.execute(
        select(bundles.c.version, bundles.c.digest, *part_of(bundles.c.content, offset)).where(
            bundles.c.version == version
        )
    ).first()


def part_of(column: Column[bytes], offset: int) -> tuple[ColumnElement[bytes], ColumnElement[int]]:
    """A part of a column's bytes, and how many there are in all."""
    part = func.substr(column, offset + 1, PART_BYTES, type_=LargeBinary)
    return part.label("content"), func.length(column).label("size_bytes")


def newest(connection: Connection) -> tuple[int, int]:
    """Version of the bundle in force, serial of the last signed statement (labels, agreements); 0 where there is none."""
    bundle = connection.execute(select(func.max(bundles.c.version))).scalar()
    serials = (
        connection.execute(select(func.max(table.c.serial))).scalar() for table in (labels, agreements)
    )
    return int(bundle or 0), max(int(serial or 0) for serial in serials)


def show_bundle(row: AnyRow, in_force: int) -> PolicyBundle:
    """A bundle as the API shows it."""
    about = msgspec.json.decode(row.about, type=BundleAbout)
    return PolicyBundle(
        version=row.version,
        digest=row.digest,
        not_after=moment(row.not_after),
        activated=moment(row.activated),
        activated_by=row.activated_by,
        signed_by=about.signed_by,
        policies=about.policies,
        in_force=row.version == in_force,
    )


def _said(row: AnyRow, said: LabelStatement | AgreementStatement) -> dict[str, Any]:
    """What lists show of labels and agreements alike."""
    return {
        "serial": row.serial,
        "number": said.number,
        "facts": dict(said.facts),
        "issued": moment(said.issued),
        "expires": optional_moment(said.expires),
        "withdrawn": said.withdrawn,
        "added": moment(row.added),
        "added_by": row.added_by,
    }


def show_label(row: AnyRow) -> LabelInfo:
    """A label statement as the API shows it."""
    said = peek_labels(row.document)
    return LabelInfo(
        owner=said.owner,
        site=said.site,
        path=said.path,
        labels=said.labels,
        contracts=said.contracts,
        **_said(row, said),
    )


def show_agreement(row: AnyRow) -> AgreementInfo:
    """An agreement as the API shows it."""
    said = peek_agreement(row.document)
    return AgreementInfo(
        authority=said.authority,
        id=said.id,
        roots=said.roots,
        recipients=said.recipients,
        **_said(row, said),
    )


def _rows(table: Table, after: int, limit: int) -> Select[Any]:
    return select(table).where(table.c.serial > after).order_by(table.c.serial).limit(limit)


def label_rows(connection: Connection, after: int, limit: int, site: str | None = None) -> Sequence[AnyRow]:
    """Label statements in the order of their serials."""
    query = _rows(labels, after, limit)
    return connection.execute(query if site is None else query.where(labels.c.site == site)).all()


def agreement_rows(connection: Connection, after: int, limit: int) -> Sequence[AnyRow]:
    """Agreements in the order of their serials."""
    return connection.execute(_rows(agreements, after, limit)).all()


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
