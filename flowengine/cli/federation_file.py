"""The file of `flow up`: one federation on one machine, as TOML. Reading it touches nothing else."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from flowengine.api.links import LimitWindow, LinkRequest
from flowengine.api.people import TenantRequest
from flowengine.api.schema import Name, SitePath, in_words
from flowengine.api.sites import Fact, SiteRequest
from flowengine.cli.limit import parse_rate, parse_window
from flowengine.errors import NotFound, UsageError

__all__ = ["Federation", "SiteEntry", "read_federation"]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class CoordinatorEntry(_Strict):
    """How the coordinator runs; the defaults are for one machine."""

    listen: str = "127.0.0.1:0"
    state: str = "sqlite"
    policies: str = ""
    lease_s: Annotated[int, Meta(ge=1, le=86400)] = 300


class RootEntry(_Strict):
    """A folder that a site offers."""

    path: str
    name: SitePath = "/data"
    access: Literal["read", "write", "read-write"] = "read-write"
    budget: str = ""


class SiteEntry(_Strict):
    """A site: what it offers, where its agent listens (empty: it only dials out), its facts."""

    name: Name
    root: Annotated[list[RootEntry], Meta(min_length=1)]
    listen: str = "127.0.0.1:0"
    max_tasks: Annotated[int, Meta(ge=1, le=1000)] = 4
    facts: dict[str, bool | int | str | list[str]] = {}


class _LinkEntry(_Strict):
    source: Name
    target: Name
    capacity: str = ""
    rtt_ms: float | None = None
    cost_per_gb: float = 0.0


class _LimitEntry(_Strict):
    scope: str
    rate: str
    windows: list[str] = []


class _TenantEntry(_Strict):
    name: Name
    weight: float = 1.0
    max_running: int | None = None


class _File(_Strict):
    site: Annotated[list[SiteEntry], Meta(min_length=1)]
    coordinator: CoordinatorEntry = msgspec.field(default_factory=CoordinatorEntry)
    link: list[_LinkEntry] = []
    limit: list[_LimitEntry] = []
    tenant: list[_TenantEntry] = []


@dataclass
class Federation:
    """What a file describes; paths are absolute.

    Attributes:
        links: declared links as (source, target, request).
        limits: (scope, rate, windows).
    """

    path: Path
    coordinator: CoordinatorEntry
    sites: list[SiteEntry]
    links: list[tuple[str, str, LinkRequest]] = field(default_factory=list)
    limits: list[tuple[str, int | None, list[LimitWindow]]] = field(default_factory=list)
    tenants: list[TenantRequest] = field(default_factory=list)

    def site_request(self, site: SiteEntry) -> SiteRequest:
        """What the coordinator is told about a site; the file is the source of its facts."""
        now = datetime.now(UTC)
        facts: dict[str, Fact | None] = {
            name: Fact(value=value, source=self.path.name, as_of=now) for name, value in site.facts.items()
        }
        return SiteRequest(facts=facts, max_tasks=site.max_tasks)


_DESCRIBED: Final = "docs/reference/federation-file.md describes the file"


def read_federation(path: Path) -> Federation:
    """The federation that a file describes.

    Raises:
        NotFound: there is no such file.
        UsageError: it says something that cannot be meant.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
        found = msgspec.convert(data, _File)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", hint="flow demo makes one to try") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}", hint=_DESCRIBED) from None
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {in_words(error)}", hint=_DESCRIBED) from None
    base = path.resolve().parent
    names = [site.name for site in found.site]
    _refuse_twice(path, "site", names)
    for site in found.site:
        _refuse_twice(path, f"root of site {site.name}", [root.name for root in site.root])
        for root in site.root:
            root.path = str(base / root.path)
    for link in found.link:
        for end in (link.source, link.target):
            if end not in names:
                raise UsageError(
                    f"{path}: a link names site {end!r}, which is not there",
                    hint=f"sites are {', '.join(names)}",
                )
    if found.coordinator.policies:
        found.coordinator.policies = str(base / found.coordinator.policies)
    return Federation(
        path=path.resolve(),
        coordinator=found.coordinator,
        sites=found.site,
        links=[(link.source, link.target, _link(link)) for link in found.link],
        limits=[
            (entry.scope, parse_rate(entry.rate), [parse_window(text) for text in entry.windows])
            for entry in found.limit
        ],
        tenants=[
            TenantRequest(name=entry.name, weight=entry.weight, max_running=entry.max_running)
            for entry in found.tenant
        ],
    )


def _link(entry: _LinkEntry) -> LinkRequest:
    capacity = parse_rate(entry.capacity) if entry.capacity else None
    return LinkRequest(capacity_bits_per_s=capacity, rtt_ms=entry.rtt_ms, cost_per_gb=entry.cost_per_gb)


def _refuse_twice(path: Path, what: str, names: list[Any]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: {what} {name!r} stands there twice", hint="give each its own name")
