"""Approvals as documents: one person's signed yes to exactly one data set, recipient, purpose and set of duties.

An approver signs with an Ed25519 key under the domain "flowengine approval 1"; who may approve, with which key and for
which groups, stands in the policy bundle (`approvers.toml`). A coordinator carries approvals and can make none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import AuthenticationError
from flowengine.policy.approvals import Approval
from flowengine.policy.model import Approver
from flowengine.trust.envelope import is_signed_by, open_envelope, seal_signed

__all__ = ["APPROVAL_DOMAIN", "Yes", "sign_approval", "verify_approval"]

APPROVAL_DOMAIN: Final = "flowengine approval 1"


class Yes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an approver says yes to. Times are Unix seconds.

    Attributes:
        who: name in the bundle's `approvers.toml`.
        dataset: digest of the data set as it was shown (`policy.requests.dataset_digest`).
        recipient: site that is to receive it.
        purpose: what for; empty where none was stated.
        duties: digest of the duties that the recipient takes on (`policy.approvals.duties_digest`).
        requester: who asked; nobody approves the own request.
        given, until: from when and until when it holds.
    """

    who: str
    dataset: str
    recipient: str
    duties: str
    requester: str
    given: int
    until: int
    purpose: str = ""


def sign_approval(said: Yes, key: Ed25519PrivateKey) -> bytes:
    """The approval as it travels."""
    return seal_signed(APPROVAL_DOMAIN, msgspec.msgpack.encode(said), key)


def verify_approval(document: bytes, approvers: Mapping[str, Approver]) -> tuple[Yes, Approval]:
    """The approval in a document, if it is signed with the key of the approver whom it names.

    Raises:
        AuthenticationError: nobody of that name approves here, or it is not signed with that key (reason
            "approval-forged").
    """
    envelope = open_envelope(document, APPROVAL_DOMAIN, "approval-forged", "approval")
    try:
        said = msgspec.msgpack.decode(envelope.payload, type=Yes)
        approver = approvers[said.who]
        if not is_signed_by(envelope, approver.key):
            raise ValueError
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, KeyError):
        raise AuthenticationError(
            "the approval is not signed with the key of anybody who may approve",
            hint="approvers.toml of the bundle in force names who may, and with which key",
            reason="approval-forged",
        ) from None
    groups = frozenset(approver.groups)
    return said, Approval(
        said.who, groups, said.dataset, said.recipient, said.purpose, said.duties, said.given, said.until
    )
