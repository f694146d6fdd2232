"""How sites come in and go out: join tokens, certificates, renewal, revocation."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from sqlalchemy import select, update

from flowengine.api.sites import Site, SiteRequest
from flowengine.coordinator.database.catalogue import decode_facts, find_site
from flowengine.coordinator.database.tables import certificates, join_tokens, sites, tasks
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import AuthenticationError, FlowError, NotFound, UsageError
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.certificates import parse_certificate
from flowengine.trust.tokens import JoinSecret

__all__ = ["change_site", "create_site", "keep_join_token", "redeem", "remove_site", "renew", "site_or_error"]


def no_site(name: str) -> NotFound:
    """The error for a site that is not there."""
    return NotFound(f"there is no site {name}", hint="flow site ls lists the sites", site=name)


def site_or_error(writing: Writing, name: str) -> Site:
    """The site as it is now."""
    site = find_site(writing.connection, name)
    if site is None:
        raise no_site(name)
    return site


def create_site(writing: Writing, request: SiteRequest, user: str) -> Site:
    """Expect a new site; a name that was removed may come again."""
    if request.name is None:
        raise UsageError("a new site needs a name", hint="set name to something like berlin-2")
    known = writing.connection.execute(select(sites.c.state).where(sites.c.name == request.name)).scalar()
    if known is not None and known != "revoked":
        raise FlowError(
            f"there is a site {request.name} already", hint="change it with PATCH", reason="conflict"
        )
    values = {"state": "expected", "since": writing.now, "max_tasks": 4, "draining": False, "facts": "{}"}
    if known is None:
        writing.connection.execute(sites.insert().values(name=request.name, created=writing.now, **values))
    else:
        writing.connection.execute(update(sites).where(sites.c.name == request.name).values(**values))
    writing.emit("site.expected", site=request.name, user=user)
    return _apply(writing, request.name, request, user, announce=False)


def change_site(writing: Writing, name: str, request: SiteRequest, user: str) -> Site:
    """Change facts, bounds, or drain."""
    if request.name not in (None, name):
        raise FlowError("a site keeps its name", hint="remove it and enrol a new one", reason="conflict")
    site = site_or_error(writing, name)
    if site.state == "revoked":
        raise FlowError(f"site {name} was removed", hint="flow site token enrols it again", reason="conflict")
    return _apply(writing, name, request, user, announce=True)


def _apply(writing: Writing, name: str, request: SiteRequest, user: str, *, announce: bool) -> Site:
    row = writing.connection.execute(select(sites).where(sites.c.name == name)).one()
    facts = decode_facts(row.facts)
    for attribute, fact in request.facts.items():
        if fact is None:
            facts.pop(attribute, None)
        else:
            facts[attribute] = fact
    values: dict[str, object] = {"facts": json_text(facts)}
    if request.max_tasks is not None:
        values["max_tasks"] = request.max_tasks
    if request.draining is not None:
        values["draining"] = request.draining
        if row.state in ("online", "draining"):
            drains = request.draining or row.agent_draining
            values["state"] = "draining" if drains else "online"
            if values["state"] != row.state:
                values["since"] = writing.now
    writing.connection.execute(update(sites).where(sites.c.name == name).values(**values))
    if announce:
        changed = sorted(
            [
                *request.facts,
                *(field for field in ("max_tasks", "draining") if getattr(request, field) is not None),
            ]
        )
        writing.emit("site.changed", site=name, user=user, wake=[name], changed=changed)
        wake_drivers_of(writing, name)
    return site_or_error(writing, name)


def wake_drivers_of(writing: Writing, name: str) -> None:
    """Wake whoever drives waiting tasks from or to a site."""
    writing.wake.update(
        writing.connection.execute(
            select(tasks.c.driver)
            .distinct()
            .where(tasks.c.state == "waiting", (tasks.c.source_site == name) | (tasks.c.target_site == name))
        ).scalars()
    )


def remove_site(writing: Writing, name: str, user: str) -> None:
    """Revoke a site's certificates and forget its right; its tasks stay and wait by name."""
    site = site_or_error(writing, name)
    if site.state == "revoked":
        return
    writing.connection.execute(
        update(certificates)
        .where(certificates.c.site == name, certificates.c.revoked.is_(None))
        .values(revoked=writing.now)
    )
    writing.connection.execute(
        update(join_tokens)
        .where(join_tokens.c.site == name, join_tokens.c.used.is_(None))
        .values(used=writing.now)
    )
    writing.connection.execute(
        update(sites)
        .where(sites.c.name == name)
        .values(state="revoked", since=writing.now, cert_serial=None, key_sha256=None, addresses="[]")
    )
    everybody = writing.connection.execute(select(sites.c.name)).scalars()
    writing.emit("site.revoked", site=name, user=user, wake=everybody)


def keep_join_token(writing: Writing, secret: JoinSecret, expires: float, user: str) -> None:
    """Keep a join token's digest; a site of that name is expected from now on."""
    known = writing.connection.execute(select(sites.c.state).where(sites.c.name == secret.site)).scalar()
    if known is None or known == "revoked":
        create_site(writing, SiteRequest(name=secret.site), user)
    writing.connection.execute(
        join_tokens.insert().values(
            id=secret.id,
            site=secret.site,
            secret_sha256=secret.digest(),
            created_by=user,
            expires=expires,
        )
    )
    writing.emit("site.token", site=secret.site, user=user, expires=expires)


def redeem(
    writing: Writing, token: JoinSecret, issue: Callable[[str], str], software: str
) -> tuple[str, str]:
    """Use up a join token and issue the site's certificate.

    A site that joins again with a new key replaces what it had: the old certificates are revoked.

    Args:
        issue: makes the certificate (PEM) for a site.

    Returns:
        The site's name and its certificate.

    Raises:
        AuthenticationError: unknown, used up or expired; which of them is not told apart from a wrong secret.
    """
    row = writing.connection.execute(select(join_tokens).where(join_tokens.c.id == token.id)).first()
    refused = AuthenticationError(
        "this join token is not valid: unknown, used up, or too old",
        hint="ask an operator for a new one: flow site token NAME",
    )
    if row is None or not hmac.compare_digest(row.secret_sha256, token.digest()):
        raise refused
    taken = writing.connection.execute(
        update(join_tokens)
        .where(
            join_tokens.c.id == token.id, join_tokens.c.used.is_(None), join_tokens.c.expires > writing.now
        )
        .values(used=writing.now)
    )
    if taken.rowcount != 1:
        raise refused
    certificate = issue(row.site)
    facts = parse_certificate(certificate)
    writing.connection.execute(
        update(certificates)
        .where(certificates.c.site == row.site, certificates.c.revoked.is_(None))
        .values(revoked=writing.now)
    )
    _keep(writing, row.site, facts)
    writing.connection.execute(
        update(sites)
        .where(sites.c.name == row.site)
        .values(state="offline", since=writing.now, software=software, boot="")
    )
    everybody = writing.connection.execute(select(sites.c.name)).scalars()
    writing.emit(
        "site.joined", site=row.site, wake=everybody, key_sha256=facts.key_sha256, serial=facts.serial
    )
    return row.site, certificate


def renew(writing: Writing, site: str, issue: Callable[[str], str]) -> str:
    """A new certificate for a site's same key; the old one ends by its date."""
    certificate = issue(site)
    facts = parse_certificate(certificate)
    _keep(writing, site, facts)
    writing.emit("site.renewed", site=site, serial=facts.serial, until=facts.not_after.isoformat())
    return certificate


def _keep(writing: Writing, site: str, facts: CertificateFacts) -> None:
    not_after = facts.not_after.timestamp()
    writing.connection.execute(
        certificates.insert().values(
            serial=facts.serial, site=site, key_sha256=facts.key_sha256, not_after=not_after
        )
    )
    writing.connection.execute(
        update(sites)
        .where(sites.c.name == site)
        .values(
            cert_serial=facts.serial,
            key_sha256=facts.key_sha256,
            cert_not_before=facts.not_before.timestamp(),
            cert_not_after=not_after,
        )
    )
