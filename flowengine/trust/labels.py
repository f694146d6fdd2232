"""Label statements as documents: a data owner's signed word on what lies below a root of a site.

An owner signs with an Ed25519 key under the domain "flowengine label statement 1"; whose key counts for which roots
stands in the policy bundle. The document is kept and handed on as the bytes that were signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import AuthenticationError
from flowengine.policy.labels import FACTS, Labelling
from flowengine.trust.statements import Fact, Form, root_problem, values_of
from flowengine.units import is_name

__all__ = [
    "LABEL_DOMAIN",
    "MAX_LABELS",
    "LabelStatement",
    "peek_labels",
    "sign_labels",
    "verify_labels",
]

LABEL_DOMAIN: Final = "flowengine label statement 1"
MAX_LABELS: Final = 100


class LabelStatement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an owner says. Times are Unix seconds.

    Attributes:
        owner: name in the bundle's `owners.toml`.
        site, path: the root; all below it is covered.
        number: counts up with each statement of this owner on this root.
        labels: all labels of the data, which are thereby complete.
        contracts: all contracts that it is under, likewise.
        facts: further facts of `flowengine.policy.labels.FACTS`, by attribute.
        issued, expires: from when and until when it counts; None: until a later one.
        withdrawn: the owner takes everything back: from now on the data is unlabelled.
    """

    owner: str
    site: str
    path: str
    number: int
    issued: int
    labels: list[str]
    contracts: list[str] = []
    facts: dict[str, Fact] = {}
    expires: int | None = None
    withdrawn: bool = False


def sign_labels(said: LabelStatement, key: Ed25519PrivateKey) -> bytes:
    """The statement as it travels.

    Raises:
        UsageError: it says something that nobody would accept.
    """
    return _FORM.sign(said, key)


def verify_labels(document: bytes, owners: Mapping[str, bytes]) -> Labelling:
    """The statement in a document, if it is signed with the key of the owner whom it names.

    Args:
        owners: public keys (Ed25519, raw) by name, as the bundle has them.

    Raises:
        AuthenticationError: nobody of this name speaks for data here (reason "label-unknown-owner"), or it is not
            signed with the owner's key, or is no statement (reason "label-forged").
    """
    said = peek_labels(document)
    key = owners.get(said.owner)
    if key is None:
        raise AuthenticationError(
            f"a label statement on {said.site}:{said.path} is by {said.owner!r}, whom the policies do not name as owner",
            hint="owners.toml of the bundle lists the owners; a newer bundle may be on its way",
            reason="label-unknown-owner",
        )
    if not _FORM.is_signed_by(document, key):
        raise AuthenticationError(
            f"the label statement on {said.site}:{said.path} is not signed with the key of {said.owner!r}",
            hint="the owner signs it again: flow label set",
            reason="label-forged",
        )
    return Labelling(
        said.owner, key, said.site, said.path, said.number, said.issued, frozenset(said.labels),
        frozenset(said.contracts), values_of(said.facts), said.expires, said.withdrawn, sha256(document).hexdigest(),
    )  # fmt: skip


def peek_labels(document: bytes) -> LabelStatement:
    """What a statement says, before anything of it may be believed.

    Raises:
        AuthenticationError: it is none (reason "label-forged").
    """
    return _FORM.peek(document)


def _problem(said: LabelStatement) -> str:
    if not said.owner or not is_name(said.site):
        return "it names no owner or no site"
    if problem := root_problem(said.path):
        return problem
    if len(said.labels) > MAX_LABELS or len(said.contracts) > MAX_LABELS:
        return f"it has more than {MAX_LABELS} labels or contracts"
    odd = sorted(set(said.facts) - FACTS)
    if odd:
        return f"an owner cannot say {odd[0][:60]!r}; known are {', '.join(sorted(FACTS))}"
    return ""


_FORM: Final = Form(LabelStatement, LABEL_DOMAIN, "a label statement", "label-forged", _problem)
