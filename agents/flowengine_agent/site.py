"""What all parts of a running agent share: who it is, what it offers, what it remembers."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from functools import cached_property

from flowengine.errors import AuthenticationError
from flowengine.machine import usable_processors
from flowengine.store.grants import GrantLedger
from flowengine.transfer.pacing import Pacer
from flowengine.transfer.session import Session
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.grant import Grant
from flowengine_agent.acting import Acting
from flowengine_agent.config import SiteConfig
from flowengine_agent.coordinator_link import CoordinatorLink
from flowengine_agent.duties import Duties
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.gate import Gate
from flowengine_agent.holdings import Holdings
from flowengine_agent.identity import Identity
from flowengine_agent.journal import Journal
from flowengine_agent.limits import LimitBook
from flowengine_agent.logs import Log
from flowengine_agent.roots import Place, Roots
from flowengine_agent.sealing import Seals
from flowengine_agent.writers import Writers

__all__ = ["Site", "decode_grant"]


@dataclass
class Site:
    """The running agent's common ground.

    Attributes:
        identity: as enrolment stored it.
        trust: the same for the engine, with whom and what it believes now.
        evidence: the chain of what is decided and done here.
        gate: what policy says here to whatever leaves, passes or lands.
        holdings: account of what landed here under duties.
        acting: hands for every requester.
        boot: random id of this run.
        listening: where the data port answers here; None for a site that only dials out.
    """

    config: SiteConfig
    log: Log
    journal: Journal
    roots: Roots
    identity: Identity
    trust: SiteTrust
    link: CoordinatorLink
    limits: LimitBook
    evidence: EvidenceLog
    gate: Gate
    holdings: Holdings
    acting: Acting
    writers: Writers = field(default_factory=Writers)
    boot: str = field(default_factory=lambda: os.urandom(8).hex())
    listening: tuple[str, int] | None = None

    @cached_property
    def duties(self) -> Duties:
        """What is owed for what runs and what landed here."""
        return Duties(self, self.holdings)

    @cached_property
    def seals(self) -> Seals:
        """What is sealed here, and held sealed."""
        return Seals(self)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.config.site

    @property
    def ledger(self) -> GrantLedger:
        """What is remembered of grants."""
        return self.trust.ledger

    @property
    def reader_threads(self) -> int:
        """Threads that read one large object."""
        return self.config.threads or max(1, usable_processors() // 2)

    def hold_rates(self, session: Session, grant: Grant, place: Place) -> None:
        """Bind what a session sends from here by all limits and leases, each link's by its own, and what it reads."""
        session.reads = self.limits.reader(place.root.folder.name)
        session.pacer = self.limits.pacer(grant.transfer, grant.tenant)
        links: dict[str, Pacer] = {}

        def pace_of(near: str) -> Pacer:
            if near not in links:
                links[near] = self.limits.over_link(session.pacer, grant.task, near or grant.target.site)
            return links[near]

        session.pace_of = pace_of

    def use(self, identity: Identity) -> None:
        """Believe and show what enrolment, renewal or a heartbeat brought, from the next connection on."""
        if identity.chain_pem != self.identity.chain_pem:
            self.trust.identity = identity.for_engine()
        self.trust.grant_keys = identity.grant_keys
        self.identity = identity


def decode_grant(text: str) -> bytes:
    """The signed grant that a message of the coordinator carries.

    Raises:
        AuthenticationError: it is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise AuthenticationError(
            "the coordinator sent a grant that cannot be read", reason="grant-forged"
        ) from None
