"""A small federation without a coordinator process: its CA and grant key, and sites that trust them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flowengine.store.grants import GrantLedger
from flowengine.transfer.sites import SiteIdentity, SiteTrust
from flowengine.trust.certificates import Authority, issue_site, make_authority, make_key, make_request
from flowengine.trust.grant import Grant, GrantKey

__all__ = ["Federation"]


@dataclass
class Federation:
    """What a coordinator holds, and the sites that joined."""

    authority: Authority = field(default_factory=lambda: make_authority(time.time(), os.urandom))
    grant_key: GrantKey = field(default_factory=lambda: GrantKey.make(os.urandom))

    def identity(self, site: str, *, now: float | None = None, valid_s: int = 3600) -> SiteIdentity:
        """A new identity of a site."""
        key = make_key(os.urandom)
        certificate = issue_site(
            self.authority,
            make_request(key, site),
            site,
            time.time() if now is None else now,
            os.urandom,
            valid_s=valid_s,
        )
        return SiteIdentity(certificate, key, self.authority.certificate_pem)

    def site(self, name: str, ledger: str = ":memory:", clock: Callable[[], float] = time.time) -> SiteTrust:
        """A site's agent, as far as trust goes."""
        keys = {self.grant_key.id: self.grant_key.public}
        return SiteTrust(self.identity(name), keys, GrantLedger(ledger), clock=clock)

    def grant(self, source: SiteTrust, target: SiteTrust, **changes: Any) -> Grant:
        """A grant from one site to the other: the target dials and pulls /data/ to /in, unless changed."""
        now = int(time.time())
        fields: dict[str, Any] = {
            "id": os.urandom(16), "transfer": "transfer-1", "task": "task-1", "fence": 1_000, "epoch": 1,
            "issued": now, "expires": now + 300, "source": source.identity.party,
            "target": target.identity.party, "dial": "target",
            "route": [source.identity.site, target.identity.site],
            "source_path": "/data/", "target_path": "/in", "mode": "copy", "secret": os.urandom(32),
        }  # fmt: skip
        return Grant(**(fields | changes))

    def signed(self, source: SiteTrust, target: SiteTrust, **changes: Any) -> bytes:
        """The same, signed."""
        return self.grant_key.sign(self.grant(source, target, **changes))
