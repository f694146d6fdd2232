"""Data that a site may keep and may not read: sealed where they come from, held as they are, opened where they may land.

Goal
    A site that only holds never sees plaintext, and nobody has to think of it: the grant says so, the source seals.
Plan
    A grant with the condition "hold" makes its source seal what it sends, with a key of its own for the path that is
    given away, unless what lies there is held and sealed already. The source's signed release names the keys. A target
    that holds looks at every object that lands; one that may read them and has the keys lets them land out of sight and
    opens them.
Invariants
    - Under "hold" nothing leaves as it is; what arrives otherwise goes to quarantine.
    - What is opened is on account before it has its name: whatever ends that, its duties hold for it.
    - No key leaves this site's folder of keys but wrapped, by its operator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from flowengine.errors import Denied, FlowError, IntegrityError, NotFound, UsageError
from flowengine.policy.asking import Judged
from flowengine.policy.model import PolicySet
from flowengine.store.keyring import Keyring
from flowengine.transfer.handing import Landed
from flowengine.trust.grant import Grant
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.release import Sealed
from flowengine.trust.sealed import SUITE, SealingKey
from flowengine.units import show_path
from flowengine.wire.messages import Options
from flowengine_agent.spool import RowSpool

if TYPE_CHECKING:
    from flowengine_agent.acting import Hands
    from flowengine_agent.hands import Way
    from flowengine_agent.permits import Carried, Permit
    from flowengine_agent.reporting import TaskReporter
    from flowengine_agent.roots import Place
    from flowengine_agent.site import Site

__all__ = ["Arrival", "Seals", "check_custody"]


def check_custody(policies: PolicySet, judged: Sequence[Judged], sealed: Sequence[Sealed]) -> None:
    """Refuse a permit to hold whose duty names the countries of the keys, where one of them is kept elsewhere.

    Raises:
        Denied: it is, or nobody has pinned where (reason "policy-denied").
    """
    for one in (one for one in judged if one.decision.use == "hold"):
        for duty in one.decision.duties:
            countries = duty.get("keys_in") if duty.type == "encrypt" else None
            if not isinstance(countries, tuple):
                continue
            for key in sealed:
                pinned = policies.sites.get(key.site)
                country = pinned.facts.get("site.country") if pinned is not None else None
                if country not in countries:
                    raise Denied(
                        f"{', '.join(duty.origins)} wants the keys of what {one.place.name} holds in "
                        f"{', '.join(map(str, countries[:40]))}; site {key.site}, which keeps key {key.key}, is "
                        + (f"in {country}" if country else "pinned to no country"),
                        hint="seal at a site that lies there, or pin its country in sites.toml of the bundle",
                        reason="policy-denied",
                    )


class Seals:
    """What this site seals, and what it holds sealed."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.keyring = Keyring(os.path.join(site.config.state, "sealing"))

    def leaving(self, carried: Carried) -> list[Sealed]:
        """The keys with which what leaves under a grant is sealed; empty where it leaves as it is. For a thread.

        Raises:
            LocalError: the key cannot be read, or made.
            Denied: part of what was asked for is held and part of it is not.
        """
        held = self.held(carried.source_path)
        if held or arrival_use(carried.required) != "hold":
            return held
        kept = self.keyring.key_for(self._site.name, carried.tenant, _plain(carried.source_path))
        return [Sealed(SUITE, kept.key.id.hex(), self._site.name)]

    def held(self, site_path: str) -> list[Sealed]:
        """The keys of what lies at a path, where all of it is held for others.

        Raises:
            Denied: only something below it is (reason "sealed-mixed").
        """
        from flowengine_agent.duties import release_of

        try:
            place = self._site.roots.find(site_path, "read")
        except FlowError:
            return []  # it is refused for that
        found: list[Sealed] = []
        below = ""
        for holding in self._site.holdings.covering(place.root.folder.name, place.path):
            if not holding.terms.at_rest:
                continue
            inside = holding.folder in (b"", place.path) or place.path.startswith(holding.folder + b"/")
            release = release_of(holding)
            if not inside:
                below = holding.path
            elif release is not None:
                found += [one for one in release.sealed if one not in found]
        if below and not found:
            raise Denied(
                f"{site_path} has other things beside what this site holds sealed at {below}",
                hint=f"ask for {below} by itself",
                reason="sealed-mixed",
            )
        return found

    def sealing(self, grant: Grant) -> tuple[bytes, bool]:
        """The secret of the key with which the source of a session seals, and whether what lies there is sealed already.

        The secret is empty where it leaves as it is. For a thread.
        """
        if self.held(grant.source_path):
            return b"", True
        if arrival_use(grant.required) != "hold":
            return b"", False
        kept = self.keyring.key_for(self._site.name, grant.tenant, _plain(grant.source_path))
        return kept.key.secret_bytes(), False

    def arrival(self, grant: Grant, permit: Permit, options: Options) -> Arrival:
        """How what comes under a grant is to land.

        Raises:
            NotFound: it is to be opened, and this site does not have the key (reason "sealing-key-missing").
            UsageError: it is asked for in a way that sealed objects do not allow.
        """
        sealed = permit.release.sealed if permit.release is not None else []
        if arrival_use(grant.required) == "hold":
            self._refuse(options.publish == "atomic", "published at once: objects are looked at as they land")
            return Arrival("hold")
        if not sealed or grant.dry_run:
            return Arrival()
        self._refuse(
            grant.mode == "verify", "verified against what is open: verify from the source to the holder"
        )
        self._refuse(options.delete, "opened into a mirror: copy without deleting")
        self._refuse(options.publish == "atomic", "published at once: it is opened object by object")
        secrets = tuple(self._find(one, grant).secret_bytes() for one in sealed)
        opening = partial(self._site.duties.opening, grant, permit)
        return Arrival("open", secrets, options.xattrs, options.owner, opening)

    @staticmethod
    def _refuse(asked: bool, why: str) -> None:
        if asked:
            raise UsageError(f"sealed objects cannot be {why}")

    def _find(self, one: Sealed, grant: Grant) -> SealingKey:
        try:
            return self.keyring.find(bytes.fromhex(one.key)).key
        except (NotFound, ValueError):
            mine = one.site == self._site.name
            raise NotFound(
                f"{grant.source.site}:{grant.source_path} is sealed with key {one.key[:64]} of site {one.site}, which "
                f"{self._site.name} does not have",
                hint=f"restore it to {self.keyring.folder} from a backup: without it nothing opens these objects"
                if mine
                else f"at {one.site}: flowengine-agent keys give {one.key[:64]}; here: flowengine-agent keys take",
                reason="sealing-key-missing",
            ) from None


@dataclass(frozen=True)
class Arrival:
    """How one task's data land.

    Attributes:
        way: as they are, looked at (hold), or out of sight first (open).
        secrets: of the keys that open them.
        xattrs, owner: whether what is opened gets these.
        watched: policy's eye on them while they are opened; gives what takes note of each before it has its name.
    """

    way: Way = "plain"
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    xattrs: bool = False
    owner: bool = False
    watched: Callable[[], AbstractContextManager[Landed]] = lambda: nullcontext(lambda rows, wrong="": None)

    async def open(self, hands: Hands, place: Place, reporter: TaskReporter) -> bool:
        """Open what landed out of sight; False where it landed as it stays.

        What is there now is told to the coordinator once all of it is: stopped halfway it is opened, and told, again.

        Raises:
            IntegrityError: something could not be opened (each is named); what could is there.
        """
        if self.way != "open":
            return False
        reporter.standing.wait = "what was sealed is being opened"
        reporter.changed()
        with closing(RowSpool()) as spool:
            with self.watched() as landed:
                opened = await hands.unseal(
                    place,
                    list(self.secrets),
                    xattrs=self.xattrs,
                    owner=self.owner,
                    landed=landed,
                    named=spool.add,
                )
            reporter.standing.wait = ""
            for rows in spool.parts():
                reporter.landed([(show_path(name), size) for name, size in rows])
        if opened.failures:
            path, _, message = opened.failures[0]
            raise IntegrityError(
                f"{len(opened.failures)} sealed objects could not be opened; the first: {show_path(path)}: {message}",
                hint="take another held copy, or the source itself; what could be opened is in place",
                reason="sealed-damaged",
                failures=[
                    {"path": show_path(path), "reason": reason, "message": message}
                    for path, reason, message in opened.failures[:100]
                ],
            )
        return True


def _plain(site_path: str) -> str:
    return site_path.rstrip("/") or "/"
