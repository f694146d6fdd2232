"""Agreements as documents: an authority's signed word on what was agreed for data that go to some sites.

An authority signs with an Ed25519 key under the domain "flowengine agreement 1"; who may sign which facts for whose data
stands in the policy bundle (`authorities.toml`). A coordinator keeps agreements and hands them on, and can make none.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import AuthenticationError
from flowengine.policy.agreements import ANYBODY, Agreement
from flowengine.policy.model import Authority
from flowengine.trust.statements import Fact, Form, root_problem, values_of
from flowengine.units import is_name

__all__ = [
    "AGREEMENT_DOMAIN", "MAX_NAMED", "AgreementStatement", "peek_agreement", "sign_agreement", "verify_agreement",
]  # fmt: skip

AGREEMENT_DOMAIN: Final = "flowengine agreement 1"
MAX_NAMED: Final = 100
"""Roots, recipients and facts that one statement may name, of each."""
_MAX_ID: Final = 100


class AgreementStatement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an authority says. Times are Unix seconds.

    Attributes:
        authority: name in the bundle's `authorities.toml`.
        id: what the parties call the agreement.
        number: counts up with each statement of this authority with this id.
        roots: whose data, as `site:/path` with all below it; `*` for any site.
        recipients: sites that receive under it; `*` for any.
        facts: what was agreed, by attribute; times in Unix seconds.
        issued, expires: from when and until when it counts; None: until a later one.
        withdrawn: it counts no more.
    """

    authority: str
    id: str
    number: int
    issued: int
    roots: list[str]
    recipients: list[str]
    facts: dict[str, Fact] = {}
    expires: int | None = None
    withdrawn: bool = False


def sign_agreement(said: AgreementStatement, key: Ed25519PrivateKey) -> bytes:
    """The statement as it travels.

    Raises:
        UsageError: it says something that nobody would accept.
    """
    return _FORM.sign(said, key)


def verify_agreement(document: bytes, authorities: Mapping[str, Authority]) -> Agreement:
    """The agreement in a document, if it is signed with the key of the authority whom it names.

    Raises:
        AuthenticationError: nobody of this name speaks here (reason "agreement-unknown-authority"), or it is not signed
            with that key, or is none (reason "agreement-forged").
    """
    said = peek_agreement(document)
    authority = authorities.get(said.authority)
    if authority is None:
        raise AuthenticationError(
            f"agreement {said.id!r} is by {said.authority!r}, whom the policies do not name as an authority",
            hint="authorities.toml of the bundle lists them; a newer bundle may be on its way",
            reason="agreement-unknown-authority",
        )
    if not _FORM.is_signed_by(document, authority.key):
        raise AuthenticationError(
            f"agreement {said.id!r} is not signed with the key of {said.authority!r}",
            hint="the authority signs it again: flow agreement sign",
            reason="agreement-forged",
        )
    roots = tuple(
        (site, path.rstrip("/") or "/") for site, _, path in (text.partition(":") for text in said.roots)
    )
    return Agreement(
        said.id, said.authority, authority.key, said.number, roots, frozenset(said.recipients), values_of(said.facts),
        said.issued, said.expires, said.withdrawn, sha256(document).hexdigest(),
    )  # fmt: skip


def peek_agreement(document: bytes) -> AgreementStatement:
    """What a statement says, before anything of it may be believed.

    Raises:
        AuthenticationError: it is none (reason "agreement-forged").
    """
    return _FORM.peek(document)


def _problem(said: AgreementStatement) -> str:
    if not said.authority or not 0 < len(said.id) <= _MAX_ID or not said.id.isprintable():
        return "it names no authority, or has no id of printable letters"
    if max(len(said.roots), len(said.recipients), len(said.facts)) > MAX_NAMED:
        return f"it has more than {MAX_NAMED} roots, recipients or facts"
    if not said.roots or not said.recipients:
        return "it covers no data, or names nobody who receives them"
    for text in said.roots:
        site, _, path = text.partition(":")
        if (site != ANYBODY and not is_name(site)) or root_problem(path):
            return f"{text[:200]!r} is no root like paris:/data/cohort"
    odd = [name for name in said.recipients if name != ANYBODY and not is_name(name)]
    if odd:
        return f"{odd[0][:60]!r} is no site"
    return ""


_FORM: Final = Form(AgreementStatement, AGREEMENT_DOMAIN, "an agreement", "agreement-forged", _problem)
