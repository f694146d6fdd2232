"""Bundles that come into force, label statements that owners signed, and agreements that authorities did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Table, and_, select

from flowengine.api.policies import AgreementInfo, LabelInfo, PolicyBundle
from flowengine.coordinator.database.policies import (
    ABOUT_BUNDLES,
    BundleAbout,
    newest,
    show_agreement,
    show_bundle,
    show_label,
)
from flowengine.coordinator.database.tables import AnyRow, agreements, bundles, labels, sites
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import FlowError, IntegrityError, UsageError
from flowengine.policy.agreements import ANYBODY, Agreement, may_say, speaks_for
from flowengine.policy.bundle import verify
from flowengine.policy.model import Authority, PolicySet
from flowengine.policy.parse import load
from flowengine.trust.agreement import verify_agreement
from flowengine.trust.labels import verify_labels

__all__ = ["activate", "keep_agreement", "keep_label"]


def activate(
    writing: Writing, content: bytes, trusted: Mapping[str, Sequence[Ed25519PublicKey]], user: str
) -> PolicyBundle:
    """Put a bundle in force, here and, as they hear of it, at all agents.

    Raises:
        FlowError: not signed by both roles, expired, not newer than any before, or its policies cannot be read.
    """
    if not trusted:
        raise FlowError(
            "this coordinator trusts no keys that sign policies",
            hint="start it with --policy-owner-key and --security-key",
            reason="conflict",
        )
    try:
        opened = verify(content, trusted, int(writing.now))
    except IntegrityError as error:
        raise UsageError(error.message, hint=error.hint) from None
    in_force, _ = newest(writing.connection)
    if opened.version <= in_force:
        raise FlowError(
            f"bundle version {opened.version} is not newer than {in_force}, which is or was in force",
            hint="to go back, build the old content with a new version",
            reason="conflict",
        )
    policies = load(opened.files).policies
    if not policies:
        raise UsageError("the bundle holds no policy", hint="build it from the policies' folder")
    about = BundleAbout(
        [(role, key) for role, key, _ in opened.signatures], [policy.id for policy in policies]
    )
    writing.connection.execute(
        bundles.insert().values(
            version=opened.version,
            digest=opened.digest,
            not_after=opened.not_after,
            content=content,
            about=json_text(msgspec.to_builtins(about)),
            activated=writing.now,
            activated_by=user,
        )
    )
    row = writing.connection.execute(select(*ABOUT_BUNDLES).where(bundles.c.version == opened.version)).one()
    shown = show_bundle(row, opened.version)
    writing.emit(
        "policy.activated",
        user=user,
        version=opened.version,
        digest=opened.digest,
        signed_by=[role for role, _ in shown.signed_by],
        wake=_all_sites(writing),
    )
    return shown


def keep_label(writing: Writing, document: bytes, owners: Mapping[str, bytes], user: str) -> LabelInfo:
    """Take an owner's statement and hand it on to all agents.

    Raises:
        AuthenticationError: it is not signed with the key of an owner whom the policies name.
        FlowError: a later one of this owner on this root is there already (reason "conflict").
    """
    said = verify_labels(document, owners)
    about = {"owner": said.owner, "site": said.site, "path": said.path}
    shown = f"{said.owner} on {said.site}:{said.path}"
    row = _keep(writing, labels, about, said.number, document, user, shown, "flow label sign")
    writing.emit(
        "label.set",
        site=said.site,
        user=user,
        owner=said.owner,
        path=said.path,
        number=said.number,
        labels=sorted(said.labels),
        wake=_all_sites(writing),
    )
    return show_label(row)


def keep_agreement(writing: Writing, document: bytes, policies: PolicySet | None, user: str) -> AgreementInfo:
    """Take an authority's agreement and hand it on to all agents.

    Args:
        policies: those in force; None where there are none.

    Raises:
        AuthenticationError: it is not signed with the key of an authority whom the policies name.
        FlowError: a later statement with its id is there already (reason "conflict"), or it cannot count.
    """
    authorities = {} if policies is None else policies.authorities
    said = verify_agreement(document, authorities)
    assert policies is not None
    _check_agreement(said, policies, authorities[said.authority])
    about = {"authority": said.authority, "id": said.id}
    shown = f"{said.authority} on {said.id}"
    row = _keep(writing, agreements, about, said.number, document, user, shown, "flow agreement sign")
    writing.emit(
        "agreement.set",
        user=user,
        authority=said.authority,
        agreement=said.id,
        number=said.number,
        withdrawn=said.withdrawn,
        wake=_all_sites(writing),
    )
    return show_agreement(row)


def _keep(
    writing: Writing,
    table: Table,
    about: Mapping[str, str],
    number: int,
    document: bytes,
    user: str,
    shown: str,
    made_by: str,
) -> AnyRow:
    """Keep a statement in place of an earlier one about the same; gives its row.

    Args:
        about: the columns that tell what it is about, and whose word it is.
        shown, made_by: the same in words, and the command that signs one.

    Raises:
        FlowError: a later one is there already (reason "conflict").
    """
    here = and_(*(table.c[name] == value for name, value in about.items()))
    before = writing.connection.execute(select(table.c.number).where(here)).scalar()
    if before is not None and before >= number:
        raise FlowError(
            f"statement {number} of {shown} is not later than {before}",
            hint=f"sign it again with a higher number: {made_by} --number",
            reason="conflict",
        )
    values = {
        "serial": writing.count_up("label"),
        "number": number,
        "document": document,
        "added": writing.now,
        "added_by": user,
    }
    if before is None:
        writing.connection.execute(table.insert().values(**values, **about))
    else:
        writing.connection.execute(table.update().where(here).values(**values))
    return writing.connection.execute(select(table).where(here)).one()


def _check_agreement(said: Agreement, policies: PolicySet, authority: Authority) -> None:
    """Refuse what could never count, before somebody relies on it."""
    for name in said.facts:
        if not may_say(authority, name):
            raise UsageError(
                f"{said.authority} may not say {name}",
                hint="authorities.toml of the bundle says which facts it may",
            )
    for site, path in said.roots:
        if not speaks_for(authority, site, path):
            raise UsageError(
                f"{said.authority} does not speak for {site}:{path}",
                hint="authorities.toml of the bundle says for whose data it does",
            )
    for name in sorted(said.recipients - {ANYBODY}):
        if name not in policies.sites or not policies.sites[name].key:
            raise UsageError(
                f"the policies pin no key of site {name}, so nobody could prove to be this party",
                hint="add it to sites.toml of the bundle, with its key",
            )


def _all_sites(writing: Writing) -> list[str]:
    return list(writing.connection.execute(select(sites.c.name).where(sites.c.state != "revoked")).scalars())
