"""Sites: what they offer, what is known about them, how they join, and the folders that they show."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from flowengine.api.schema import Name, Request, Resource, SitePath, Size, Word

__all__ = [
    "Certificate",
    "Fact",
    "JoinToken",
    "JoinTokenRequest",
    "Listing",
    "ListingEntry",
    "Root",
    "Site",
    "SitePolicy",
    "SiteRequest",
]


class Fact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An attribute's value, who says so, and as of when. Attributes are those that policies name."""

    value: bool | int | str | list[str]
    source: Word
    as_of: datetime


class Root(Resource):
    """A folder that a site offers: its name in paths, and what may be done below it."""

    name: SitePath
    access: Literal["read", "write", "read-write"]
    budget_bytes: Size | None = None
    used_bytes: Size | None = None
    free_bytes: Size | None = None


class Certificate(Resource):
    """A site's current certificate; `key_sha256` names its identity key (SHA-256 of the SubjectPublicKeyInfo)."""

    serial: str
    key_sha256: str
    not_before: datetime
    not_after: datetime


class SitePolicy(Resource):
    """The policies that a site's agent decides by, as it says itself.

    Attributes:
        version, digest: of the bundle in force there; 0 and empty without one.
        takes: whether the site trusts anybody to sign bundles.
        problem: why it has not the newest.
        labels: serial up to which it has read label statements.
        required: whether nothing moves there without a bundle.
        max_offline_s: for how long transfers go on there without a word from the coordinator; null: as its policies say.
    """

    version: int = 0
    digest: str = ""
    takes: bool = False
    problem: str = ""
    labels: int = 0
    required: bool = False
    max_offline_s: float | None = None


class Site(Resource):
    """A place with storage: what it offers, how to reach it, what is known about it.

    `addresses` are where its agent's data port answers ("host:port"); empty for one that only dials out.
    """

    name: Name
    state: Literal["expected", "online", "offline", "draining", "revoked"]
    since: datetime
    facts: dict[str, Fact] = {}
    roots: list[Root] = []
    addresses: list[str] = []
    software: str = ""
    last_seen: datetime | None = None
    certificate: Certificate | None = None
    max_tasks: int = 4
    running_tasks: int = 0
    can: list[str] | None = None
    policy: SitePolicy = msgspec.field(default_factory=SitePolicy)


class SiteRequest(Request):
    """A new site, or changes to one: what is left out stays. Facts replace those of the same name; null removes one."""

    name: Name | None = None
    facts: dict[Word, Fact | None] = {}
    max_tasks: Annotated[int, Meta(ge=1, le=1000)] | None = None
    draining: bool | None = None


class JoinTokenRequest(Request):
    """A one-time token with which the agent of `site` enrols."""

    site: Name
    valid_s: Annotated[int, Meta(ge=60, le=86400)] = 900


class JoinToken(Resource):
    """Shown once: carries the coordinator's address and the CA's fingerprint."""

    token: str
    site: Name
    expires: datetime


class ListingEntry(Resource):
    """One entry of a folder at a site."""

    name: str
    kind: Literal["file", "directory", "link", "other"]
    size_bytes: int
    mtime: datetime


class Listing(Resource):
    """A folder at a site as its agent sees it now."""

    site: Name
    path: str
    entries: list[ListingEntry]
    complete: bool = True
