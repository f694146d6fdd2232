"""Policy: bundles in force, labels by data owners, agreements by authorities, and approvals by people."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from flowengine.api.schema import Name, Request, Resource

__all__ = [
    "AgreementInfo",
    "AgreementUpload",
    "ApprovalGiven",
    "ApprovalRequest",
    "GivenApproval",
    "LabelInfo",
    "LabelUpload",
    "PolicyBundle",
    "PolicyBundleContent",
    "PolicyBundleUpload",
]


class PolicyBundleUpload(Request):
    """A signed bundle (base64 of its file) that is to be in force from now on, here and at all agents."""

    content: bytes


class PolicyBundle(Resource):
    """A policy bundle that is or was in force; the highest version is."""

    version: int
    digest: str
    not_after: datetime
    activated: datetime
    activated_by: Name
    signed_by: list[tuple[str, str]]
    policies: list[str]
    in_force: bool


class PolicyBundleContent(Resource):
    """A part of a bundle's file (base64) from `offset` on; the file has `size_bytes`."""

    version: int
    digest: str
    content: bytes
    offset: int = 0
    size_bytes: int = 0


class LabelUpload(Request):
    """A label statement as its owner signed it (base64)."""

    document: bytes


class LabelInfo(Resource):
    """A label statement: what an owner says of the data below a root of a site. `serial` orders statements here."""

    serial: int
    owner: str
    site: Name
    path: str
    number: int
    labels: list[str]
    contracts: list[str]
    facts: dict[str, Any]
    issued: datetime
    expires: datetime | None
    withdrawn: bool
    added: datetime
    added_by: str


class AgreementUpload(Request):
    """An agreement as its authority signed it (base64)."""

    document: bytes


class AgreementInfo(Resource):
    """What an authority says was agreed for data below roots of sites that go to recipients. `serial` orders them here."""

    serial: int
    authority: str
    id: str
    number: int
    roots: list[str]
    recipients: list[str]
    facts: dict[str, Any]
    issued: datetime
    expires: datetime | None
    withdrawn: bool
    added: datetime
    added_by: str


class GivenApproval(Resource):
    """One person's yes."""

    who: str
    given: datetime
    until: datetime


class ApprovalRequest(Resource):
    """What people have to approve before it may move, and who has.

    Attributes:
        handle: names just this question.
        dataset, duties_digest: digests that an approval is bound to.
        duties: what the recipient takes on, each as JSON.
        groups: whose approval counts; `people`: how many at least, where a duty says so.
        rules: what would permit it.
    """

    handle: str
    created: datetime
    source: Name
    path: str
    recipient: Name
    requester: Name
    dataset: str
    duties_digest: str
    purpose: str = ""
    duties: list[str] = []
    groups: list[str] = []
    people: int = 0
    rules: str = ""
    given: list[GivenApproval] = []


class ApprovalGiven(Request):
    """A signed approval (docs/spec/certificates.md), made by `flow approve`."""

    document: bytes
