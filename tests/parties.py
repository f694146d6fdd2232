"""A small federation without a coordinator process: its CA and grant key, and sites that trust them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowengine.store.grants import GrantLedger
from flowengine.transfer.sites import SiteIdentity, SiteTrust
from flowengine.trust.certificates import Authority, issue_site, make_authority, make_key, make_request
from flowengine.trust.grant import Grant, GrantKey, Party

__all__ = ["Federation", "SiteHost", "party_of"]


def party_of(site: SiteTrust | SiteIdentity) -> Party:
    """A site as grants name it."""
    return site.identity.party if isinstance(site, SiteTrust) else site.party


@dataclass
class SiteHost:
    """A site's data port that runs as a process.

    Attributes:
        folder: with all it knows and serves.
        identity: its certificate.
        log: lines that it logged, once it has ended.
    """

    folder: Path
    identity: SiteIdentity
    port: int = 0
    log: list[str] = field(default_factory=list)


@dataclass
class Federation:
    """What a coordinator holds, and the sites that joined."""

    authority: Authority = field(default_factory=lambda: make_authority(time.time(), os.urandom))
    grant_key: GrantKey = field(default_factory=lambda: GrantKey.make(os.urandom))

    def certificate(self, site: str, *, now: float | None = None, valid_s: int = 3600) -> tuple[str, bytes]:
        """Certificate and key of a site, both PEM."""
        key = make_key(os.urandom)
        request = make_request(key, site)
        moment = time.time() if now is None else now
        return issue_site(self.authority, request, site, moment, os.urandom, valid_s=valid_s), key

    def identity(self, site: str, *, now: float | None = None, valid_s: int = 3600) -> SiteIdentity:
        """A new identity of a site."""
        return SiteIdentity(*self.certificate(site, now=now, valid_s=valid_s), self.authority.certificate_pem)

    def site(self, name: str, ledger: str = ":memory:", clock: Callable[[], float] = time.time) -> SiteTrust:
        """A site's agent, as far as trust goes."""
        keys = {self.grant_key.id: self.grant_key.public}
        return SiteTrust(self.identity(name), keys, GrantLedger(ledger), clock=clock)

    def grant(
        self, source: SiteTrust | SiteIdentity, target: SiteTrust | SiteIdentity, /, **changes: Any
    ) -> Grant:
        """A grant from one site to the other: the target dials and pulls /data/ to /in, unless changed."""
        now = int(time.time())
        one, two = party_of(source), party_of(target)
        fields: dict[str, Any] = {
            "id": os.urandom(16), "transfer": "transfer-1", "task": "task-1", "fence": 1_000, "epoch": 1,
            "issued": now, "expires": now + 300, "source": one, "target": two, "dial": "target",
            "route": [one.site, two.site], "source_path": "/data/", "target_path": "/in", "mode": "copy",
            "secret": os.urandom(32),
        }  # fmt: skip
        return Grant(**(fields | changes))

    def signed(
        self, source: SiteTrust | SiteIdentity, target: SiteTrust | SiteIdentity, /, **changes: Any
    ) -> bytes:
        """The same, signed."""
        return self.grant_key.sign(self.grant(source, target, **changes))

    @contextmanager
    def hosting(self, name: str, folder: Path, *, revoked: list[str] | None = None) -> Iterator[SiteHost]:
        """A site's data port as a process, until the block ends."""
        certificate, key = self.certificate(name)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for file, text in {
            "certificate.pem": certificate, "key.pem": key.decode(), "ca.pem": self.authority.certificate_pem,
            "grant-keys": f"{self.grant_key.id} {self.grant_key.public.hex()}\n",
            "revoked": "\n".join(revoked or []),
        }.items():  # fmt: skip
            (folder / file).write_text(text)
        host = SiteHost(folder, SiteIdentity(certificate, key, self.authority.certificate_pem))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.site_host", str(folder)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            host.port = int(process.stdout.readline())
            yield host
        finally:
            process.terminate()
            host.log = process.communicate()[0].splitlines()
