"""Parties that lie: a coordinator that signs what it likes, a source that shows what it likes; and keys to sign policies."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sites import Coordinator, SiteAgent

from flowengine.policy.bundle import ROLES, build, sign
from flowengine.store.grants import GrantLedger
from flowengine.store.secret_files import read_secret
from flowengine.transfer.sites import SiteIdentity, SiteTrust
from flowengine.trust.certificates import issue_site, load_authority, make_key, make_request
from flowengine.trust.grant import Grant, GrantKey, Party
from flowengine.trust.labels import LabelStatement, sign_labels
from flowengine.trust.relay_grant import RelayGrant
from flowengine_agent.identity import load_identity

__all__ = ["LyingCoordinator", "LyingGate", "PolicyKeys", "evidence_of", "identity_of"]


@dataclass
class PolicyKeys:
    """The two roles' keys, and a data owner's."""

    roles: dict[str, Ed25519PrivateKey] = field(
        default_factory=lambda: {role: Ed25519PrivateKey.generate() for role in ROLES}
    )
    owner: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def site_lines(self) -> list[str]:
        """The [policy] table of a site.toml."""
        return [
            "[policy]",
            "required = true",
            *(f'{role.replace("-", "_")} = ["{_public(key)}"]' for role, key in self.roles.items()),
        ]

    def options(self, folder: Path) -> list[str]:
        """What a coordinator is started with."""
        found = []
        for role, key in self.roles.items():
            path = folder / f"{role}.pub"
            path.write_text(_public(key))
            found += [f"--{role}-key", str(path)]
        return found

    def bundle(self, files: Mapping[str, str], version: int, valid_s: int = 3600) -> bytes:
        """A bundle, signed by both roles."""
        content = build({n: t.encode() for n, t in files.items()}, version, int(time.time()) + valid_s)
        for role, key in self.roles.items():
            content = sign(content, role, key)
        return content

    @property
    def owner_public(self) -> str:
        """The owner's key as owners.toml has it."""
        return _public(self.owner)

    def statement(self, place: str, *labels: str, number: int = 1, **more: Any) -> bytes:
        """The owner's word on a place."""
        site, _, path = place.partition(":")
        fields: dict[str, Any] = {"owner": "hospital", "issued": int(time.time()) - 1, "labels": list(labels)}
        said = LabelStatement(site=site, path=path, number=number, **(fields | more))
        return sign_labels(said, self.owner)


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def identity_of(agent: SiteAgent) -> SiteIdentity:
    """Key and certificate of an agent, as whoever took over its host has them."""
    found = load_identity(str(agent.state / "identity"))
    assert found is not None
    return found.for_engine()


class LyingCoordinator:
    """Has a coordinator's keys, and signs what it is told to."""

    def __init__(self, coordinator: Coordinator) -> None:
        secrets = coordinator.folder / "secrets"
        self.key = GrantKey(read_secret(str(secrets / "grant.key")))
        self.authority = load_authority(
            read_secret(str(secrets / "ca.key")), read_secret(str(secrets / "ca.pem")).decode()
        )

    def minted(self, site: str) -> SiteIdentity:
        """A new key with a good certificate in a site's name."""
        key = make_key(os.urandom)
        pem = issue_site(self.authority, make_request(key, site), site, time.time(), os.urandom)
        return SiteIdentity(pem, key, self.authority.certificate_pem)

    def grant(self, source: Party, target: Party, **changes: Any) -> Grant:
        """A grant for /data/cohort/ to /data/in; the target dials, unless changed."""
        now = int(time.time())
        fields: dict[str, Any] = {
            "id": os.urandom(16), "transfer": "t-forged", "task": f"t-forged.{os.urandom(3).hex()}", "fence": 1000,
            "epoch": 1, "issued": now, "expires": now + 300, "source": source, "target": target, "dial": "target",
            "route": [source.site, target.site], "source_path": "/data/cohort/", "target_path": "/data/in",
            "mode": "copy", "secret": os.urandom(32), "requester": "admin",
        }  # fmt: skip
        return Grant(**(fields | changes))

    def trust(self, identity: SiteIdentity) -> SiteTrust:
        """Of an agent that has this identity."""
        return SiteTrust(identity, {self.key.id: self.key.public}, GrantLedger(":memory:"))


@dataclass(frozen=True)
class _Shown:
    document: bytes = b""


@dataclass(frozen=True)
class LyingGate:
    """Policy of a party that asks nobody: as a source it shows the document that it was given."""

    document: bytes = b""

    async def release(self, grant: RelayGrant | None) -> _Shown:
        return _Shown(self.document)

    async def relay(self, grant: RelayGrant, ticket: bytes) -> _Shown:
        return _Shown()

    async def land(self, grant: RelayGrant, ticket: bytes) -> _Shown:
        return _Shown()

    async def passed(self, grant: RelayGrant, consent: object, size_bytes: int) -> None:
        """It says nothing of it."""

    @contextlib.contextmanager
    def held(self, grant: RelayGrant, consent: object) -> Iterator[None]:
        yield


def evidence_of(agent: SiteAgent) -> list[dict[str, Any]]:
    """All that an agent has on record."""
    return [
        json.loads(line)
        for segment in sorted((agent.state / "evidence" / "chain").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
