"""Policy at this site: nothing leaves, passes or lands here that its own policies do not permit.

Goal
    A coordinator that lies, and a site that lies, can only keep data from moving.
Plan
    The source decides the whole route by its own bundle and signs a *release*. Each relay, and the target before it
    accepts anything, checks that release and decides its own part again. Facts are made by `flowengine.policy.asking`
    from the bundle's pins, the label statements that this site holds, and what grant and release add to them.
Invariants
    - Before a name or a byte of a path leaves, and before one is accepted, a decision was made and recorded.
    - A decision that permits takes effect only after its record is durable.
    - Without a bundle everything passes and says so; where the configuration requires policies it is refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import trio

from flowengine.errors import AuthenticationError, Denied, FlowError
from flowengine.evidence.bodies import activate_body
from flowengine.evidence.obligations import SETTLED_AT_ONCE
from flowengine.policy import Statement
from flowengine.policy.asking import Judged, Matter, Place, ask
from flowengine.policy.explain import explain
from flowengine.policy.labels import Inherited, Labelling, data_statements, uncovered
from flowengine.policy.model import FALSE
from flowengine.policy.reasons import nearest_permit, reasons
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.grant import Grant, Party
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.relay_grant import RelayGrant
from flowengine.trust.release import Release, Sealed
from flowengine_agent.capabilities import capabilities
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.holdings import Holding
from flowengine_agent.knowledge import Knowledge
from flowengine_agent.logs import Log
from flowengine_agent.permits import Carried, Permit
from flowengine_agent.policies import InForce, Policies
from flowengine_agent.recording import (
    EVERYWHERE,
    Entry,
    Owed,
    Recorder,
    approvals_used,
    at_rest,
    duties_owed,
    shown_sealed,
)
from flowengine_agent.releases import checked_release
from flowengine_agent.sealing import check_custody

__all__ = ["Gate"]

RELEASE_S: Final = 300
"""How long a release holds; each new connection asks for a new one."""
GRACE_S: Final = 900
"""How long past its bundle's expiry a transfer that began before may still come to its end."""


class Gate:
    """Decides at this site.

    Args:
        trust: who this site is, and the federation's CA.
        policies: the bundle in force, labels, inheritance.
        evidence: where decisions are kept; None: only the log tells them.
        clock: Unix seconds.
    """

    def __init__(
        self,
        trust: SiteTrust,
        policies: Policies,
        log: Log,
        *,
        evidence: EvidenceLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._trust = trust
        self.policies = policies
        self._log = log
        self.evidence = evidence
        self._clock = clock
        self._activating = trio.Lock()
        self.recorder = Recorder(self.me.site, log, evidence, self._digest, clock=clock)
        self.can: frozenset[str] = capabilities()
        """Duties that this agent carries out."""
        self.knowledge: Knowledge | None = None
        """What else is known here of a transfer: counters, approvals."""
        self.other_names: Callable[[str], Sequence[str]] = lambda path: ()
        """Other site paths under which the same data are offered here."""
        self.clock_error_ms: Callable[[], int] = lambda: 0
        """How far the clock may be off."""
        self.landed: Callable[[str], Sequence[Holding]] = lambda path: ()
        """What lies at a path here and came under duties."""
        self.sealed: Callable[[Carried], Sequence[Sealed]] = lambda carried: ()
        """The keys with which what leaves here under a grant is sealed."""

    @property
    def me(self) -> Party:
        """This site."""
        return self._trust.identity.party

    def _digest(self) -> str:
        return "" if self.policies.in_force is None else self.policies.in_force.bundle.digest

    # --- the four points ----------------------------------------------------------------------------------------

    async def release(self, grant: Grant | RelayGrant, route: Sequence[Party] = ()) -> Permit:
        """Let data of this site leave over a route: decisions, and the signed release as the permit's `document`.

        Where this site has no policies, both are empty.

        Args:
            route: all sites from this one to the target; straight to the target where empty.

        Raises:
            Denied: policy does not permit it (reason "policy-denied", "policy-missing", "policy-expired").
        """
        bundle = await self._bundle("release", grant, grant.source.site)
        sealed = tuple(await trio.to_thread.run_sync(self.sealed, grant))
        if bundle is None:
            return Permit(sealed=sealed)
        route = list(route) or [grant.source, grant.target]
        now = self._clock()
        labellings = self.policies.labellings(grant.source.site, grant.source_path, now)
        matter = self._leaving(bundle, grant, route)
        asked = _whole_route(route, arrival_use(grant.required))
        permit = await self._decide(bundle, "release", grant, route, matter, asked, leaves=sealed)
        counts = self._take_on(bundle, grant, route, matter, permit.judged)
        labels, contracts = (
            _texts(permit.judged[0], "data.labels"),
            _texts(permit.judged[0], "data.contracts"),
        )
        document = self._trust.identity.sign_release(
            Release(
                transfer=grant.transfer,
                task=grant.task,
                fence=grant.fence,
                route=route,
                source_path=grant.source_path,
                target_path=grant.target_path,
                issued=int(now),
                expires=int(now) + RELEASE_S,
                labels=labels,
                contracts=contracts,
                statements=[bytes.fromhex(one.digest) for one in labellings],
                requester=grant.requester,
                purpose=grant.purpose,
                bundle=bundle.bundle.digest,
                bundle_version=bundle.bundle.version,
                decisions=list(permit.decisions),
                duties=sorted({duty.type for one in permit.judged for duty in one.decision.duties}),
                counts=counts,
                sealed=list(sealed),
            )
        )
        return replace(permit, document=document, route=tuple(route), counts=counts, sealed=sealed)

    async def relay(self, carried: Carried, route: Sequence[Party], document: bytes) -> Permit:
        """Let sealed data pass through this site.

        Args:
            route: of the relay grant, from the source to the target.
            document: the source's release.

        Raises:
            Denied: policy does not permit it.
            AuthenticationError: the release is missing, forged, or another's.
        """
        here = next((hop for hop, party in enumerate(route) if party == self.me), 0)
        if not 0 < here < len(route) - 1:
            raise AuthenticationError("this site is no relay of that route", reason="release-other")
        return await self._arriving("relay", carried, route, document, here)

    async def land(self, grant: Grant, document: bytes, route: Sequence[Party] = ()) -> Permit:
        """Accept data at this site; before the first offer is looked at.

        Args:
            document: the source's release.
            route: as of `release`.

        Raises:
            Denied: policy does not permit it.
            AuthenticationError: the release is missing, forged, or another's.
        """
        route = list(route) or [grant.source, grant.target]
        permit = await self._arriving("land", grant, route, document, len(route) - 1)
        if permit.release is not None and not grant.dry_run and grant.mode != "verify":
            self.policies.inherit(grant.target_path, permit.release.labels, permit.release.contracts)
        return permit

    async def arrive(self, carried: Carried, route: Sequence[Party], document: bytes) -> Permit:
        """Accept streams over one more route; what is in them `land` decides on.

        Args:
            route, document: as of `relay`.

        Raises:
            Denied, AuthenticationError: as of `relay`.
        """
        return await self._arriving("land", carried, route, document, len(route) - 1)

    async def publish(self, grant: Grant, permit: Permit, landed: Mapping[str, object]) -> None:
        """Confirm what landed, by what is known at the end; chunks that were here already count as copied.

        Args:
            permit: as `land` gave it.
            landed: the target's counters and version, for the record.

        Raises:
            Denied: policy does not permit it any more.
        """
        if permit.bundle is None and self.policies.in_force is None:
            return
        route = permit.route or (grant.source, grant.target)
        await self._arriving("publish", grant, route, permit.document, len(route) - 1)
        await self.record_landed(grant, permit, landed)

    async def record_landed(
        self, grant: Grant, permit: Permit, landed: Mapping[str, object], stopped: str = ""
    ) -> None:
        """Put it on the record what landed, and what became of the duties that this site had meanwhile.

        Args:
            landed: as of `publish`.
            stopped: by which mild stop it came to its end; empty for none.
        """
        if permit.bundle is None and self.policies.in_force is None:
            return
        await self.recorder.moved(
            "landed",
            grant,
            f"{grant.target.site}:{grant.target_path}",
            permit.owed,
            root="" if stopped and landed.get("state") != "completed" else str(landed.get("version_id", "")),
            objects=_count(landed.get("objects")),
            size_bytes=_count(landed.get("bytes")),
            proofs={**EVERYWHERE, "isolate": {"chunk_index": "not used"}} | at_rest(grant, permit),
            counted={name: value for name, value in landed.items() if name != "version_id"},
            **shown_sealed(permit.release.sealed if permit.release is not None else ()),
            **({"stopped": stopped} if stopped else {}),
        )

    def review(
        self, point: str, carried: Carried, route: Sequence[Party], release: Release | None
    ) -> tuple[Judged, ...]:
        """Decide again what runs at this site, by what is known now; records nothing.

        Args:
            point: "release", "relay" or "land".
            release: the source's, as it was checked when it began; None at the source itself.

        Raises:
            FlowError: it cannot be decided: no policies where some are required, or they expired.
        """
        bundle = self.policies.in_force
        if bundle is None:
            if self.policies.required or self.policies.problem:
                raise self._missing()
            return ()
        if bundle.is_expired(self._clock() - GRACE_S):
            raise self._expired(bundle)
        if release is None:
            matter = self._leaving(bundle, carried, route)
            asked = _whole_route(route, arrival_use(carried.required))
            judged = tuple(self._judge(bundle, route, matter, asked))
            if all(one.decision.permit for one in judged):
                self._check(bundle, carried, route, matter, judged)
            return judged
        labellings = self.policies.labellings(route[0].site, carried.source_path, self._clock())
        matter = self._matter(bundle, carried, route, labellings, release=release)
        matter = self._behind(bundle, carried, route, matter, release)
        here = next(hop for hop, party in enumerate(route) if party == self.me)
        use = point if point == "relay" else arrival_use(carried.required)
        return tuple(self._judge(bundle, route, matter, [(use, here)]))

    @property
    def least_offline_s(self) -> float | None:
        """The least time without coordinator that a policy in force permits, whatever it is about; None without any."""
        if self.policies.in_force is None:
            return None
        return min((policy.max_offline_s for policy in self.policies.in_force.engine.enforced), default=None)

    def max_offline_s(self, judged: Sequence[Judged]) -> float | None:
        """For how long what was permitted so goes on without a word from the coordinator; None for ever."""
        found = [
            trace.policy.max_offline_s
            for one in judged
            for trace in one.decision.traces
            if trace.scope != FALSE
        ]
        return min(found, default=None)

    # --- how ----------------------------------------------------------------------------------------------------

    async def _bundle(self, point: str, carried: Carried, source: str) -> InForce | None:
        """The bundle to decide by; None where there is none, was none, and none is required.

        A bundle that is here and cannot be used (its file is gone or damaged, or it was made for another version) does
        not leave the site without policies: it denies.
        """
        found = self.policies.in_force
        if found is None:
            if not self.policies.required and not self.policies.problem:
                self._log.debug("no policy at this site", point=point, task=carried.task)
                return None
            error = self._missing()
            await self.recorder.keep(self.recorder.refused(point, carried, source, error))
            raise error
        grace = GRACE_S if point == "publish" else 0
        if found.is_expired(self._clock() - grace):
            error = self._expired(found)
            await self.recorder.keep(self.recorder.refused(point, carried, source, error))
            raise error
        await self.activated(found)
        return found

    def _missing(self) -> Denied:
        return Denied(
            f"site {self.me.site} decides by policies and has none that it can use"
            + (f": {self.policies.problem}" if self.policies.problem else ""),
            hint="an operator activates a bundle: flow policy bundle push",
            reason="policy-missing",
        )

    def _expired(self, bundle: InForce) -> Denied:
        return Denied(
            f"the policies in force at {self.me.site}, version {bundle.bundle.version}, have expired",
            hint="build, sign and push a new bundle",
            reason="policy-expired",
        )

    async def activated(self, found: InForce) -> None:
        """Put it on the record, once, that a bundle came into force, and keep the bundle beside what it decided."""
        if self.evidence is None:
            return
        async with self._activating:
            if self.evidence.bundle == found.bundle.digest:
                return
            await self.evidence.keep_bundle(found.content)
            body = activate_body(
                found.bundle.digest,
                found.bundle.version,
                found.bundle.not_after,
                [(role, key) for role, key, _ in found.bundle.signatures],
                replaces=self.evidence.bundle,
            )
            await self.recorder.keep(("policy.activate", body))

    def _matter(
        self,
        bundle: InForce,
        carried: Carried,
        route: Sequence[Party],
        labellings: Sequence[Labelling],
        inherited: Sequence[Inherited] = (),
        *,
        release: Release | None = None,
    ) -> Matter:
        """What is known of the data and of what was agreed for them.

        A release only adds labels: what owners state besides is known behind the source as it is there, and the source
        itself, which knows what copies its data are made of, has decided too.
        """
        now = int(self._clock())
        source = (route[0].site, carried.source_path)
        data = data_statements(
            bundle.policies,
            labellings,
            *source,
            now,
            added=[*carried.labels, *(release.labels if release is not None else ())],
            contracts=[*carried.contracts, *(release.contracts if release is not None else ())],
            inherited=inherited,
        )
        _, recipient = _ends(route)
        agreed = self.policies.agreed(source, recipient, now)
        return Matter(tuple(data), recipient, carried.requester, carried.purpose, tuple(agreed))

    async def _arriving(
        self, point: str, carried: Carried, route: Sequence[Party], document: bytes, here: int
    ) -> Permit:
        bundle = await self._bundle(point, carried, route[0].site)
        if bundle is None:
            return Permit()
        try:
            release, labellings = checked_release(
                self._trust,
                self.policies,
                carried,
                route,
                document,
                here,
                self._clock(),
                ends=point == "publish",
            )
        except FlowError as error:
            await self.recorder.keep(self.recorder.refused(point, carried, route[0].site, error))
            raise
        matter = self._matter(bundle, carried, route, labellings, release=release)
        matter = self._behind(bundle, carried, route, matter, release)
        use = "relay" if point == "relay" else arrival_use(carried.required)
        permit = await self._decide(bundle, point, carried, route, matter, [(use, here)])
        if release.bundle != bundle.bundle.digest:
            self._log.warning(
                "two sites have different policies; both permit",
                task=carried.task,
                source=release.bundle_version,
                here=bundle.bundle.version,
            )
        return replace(permit, release=release, document=document, route=tuple(route))

    async def _decide(
        self,
        bundle: InForce,
        point: str,
        carried: Carried,
        route: Sequence[Party],
        matter: Matter,
        asked: Sequence[tuple[str, int]],
        *,
        leaves: Sequence[Sealed] | None = None,
    ) -> Permit:
        """Decide uses at hops of a route; all are recorded, the first that is denied is raised.

        What is permitted is recorded along with the duties that this site takes on, and the approvals it rests on.

        Args:
            leaves: at the source, which holds it to the duties that come before the first byte: the keys with which
                what leaves is sealed.
        """
        judged = self._judge(bundle, route, matter, asked)
        ids = [os.urandom(8).hex() for _ in judged]
        entries = [
            self.recorder.decided(bundle, point, carried, route, one, name, self.clock_error_ms())
            for one, name in zip(judged, ids, strict=True)
        ]
        for one, name in zip(judged, ids, strict=True):
            if not one.decision.permit:
                await self.recorder.keep(*entries)
                raise self._denied(bundle, point, carried, one, name)
        try:
            if leaves is not None:
                self._check(bundle, carried, route, matter, judged)
                check_custody(bundle.policies, judged, leaves)
        except Denied as error:
            await self.recorder.keep(*entries, self.recorder.refused(point, carried, route[0].site, error))
            raise
        taken: tuple[Owed, ...] = ()
        if point != "publish":  # what was taken on before is settled then
            taken = duties_owed(point, carried, judged, ids, self.me.site, int(self._clock()))
            entries += self._approved(bundle, carried, route, matter)
            for duty in taken:
                entries.append(duty.entry("accepted"))
                if duty.duty.type in SETTLED_AT_ONCE:
                    entries.append(duty.entry("fulfilled"))
        await self.recorder.keep(*entries)
        return Permit(bundle, tuple(judged), tuple(ids), taken)

    def _approved(
        self, bundle: InForce, carried: Carried, route: Sequence[Party], matter: Matter
    ) -> list[Entry]:
        """The records of the approvals that count."""
        if self.knowledge is None:
            return []
        now = int(self._clock())
        return approvals_used(carried, self.knowledge.counting(bundle, carried, _ends(route), matter, now))

    def _leaving(self, bundle: InForce, carried: Carried, route: Sequence[Party]) -> Matter:
        """What is known at the source of what is to leave."""
        labellings = self.policies.labellings(route[0].site, carried.source_path, self._clock())
        inherited = self.policies.inherited(carried.source_path)
        known = True
        for path in self.other_names(carried.source_path):  # one folder, offered under several names
            there = self.policies.labellings(route[0].site, path, self._clock())
            known = known and not uncovered(bundle.policies, there, route[0].site, path)
            inherited += self.policies.inherited(path)
            inherited += [Inherited(one.labels, one.contracts, f"label:{one.owner}") for one in there]
        matter = self._matter(bundle, carried, route, labellings, inherited)
        if not known:
            matter = replace(matter, data=())
        if self.knowledge is None:
            return matter
        return self.knowledge.leaving(bundle, carried, _ends(route), matter, int(self._clock()))

    def _behind(
        self, bundle: InForce, carried: Carried, route: Sequence[Party], matter: Matter, release: Release
    ) -> Matter:
        """What is known behind the source, with what it signed of its counters."""
        if self.knowledge is None:
            return matter
        return self.knowledge.arriving(bundle, carried, _ends(route), matter, release, int(self._clock()))

    def _check(
        self,
        bundle: InForce,
        carried: Carried,
        route: Sequence[Party],
        matter: Matter,
        judged: Sequence[Judged],
    ) -> None:
        """Hold a permit of the source to the duties that come before the first byte; raises `Denied`."""
        if self.knowledge is not None:
            landed = self.landed(carried.source_path)
            now = int(self._clock())
            self.knowledge.check(bundle, carried, _ends(route), matter, judged, landed, now)

    def _take_on(
        self,
        bundle: InForce,
        grant: Grant | RelayGrant,
        route: Sequence[Party],
        matter: Matter,
        judged: Sequence[Judged],
    ) -> dict[str, int]:
        """Begin to count what leaves; gives what the counters come to.

        It is counted by the grant of its two ends, however many routes it takes.
        """
        moves = isinstance(grant, Grant) and not grant.dry_run and grant.mode != "verify"
        if self.knowledge is not None and moves:
            self.knowledge.reserve(bundle, grant, route[0].site, judged, int(self._clock()))
        return {
            word.attribute: word.value
            for word in matter.also
            if word.kind == "ledger" and isinstance(word.value, int)
        }

    def _judge(
        self, bundle: InForce, route: Sequence[Party], matter: Matter, asked: Sequence[tuple[str, int]]
    ) -> list[Judged]:
        now = int(self._clock())
        judged = []
        for use, hop in asked:
            party = route[hop]
            own = party == self.me
            said = (Statement("site.spill", "memory-only", "engine", now),) if own and use == "relay" else ()
            place = Place(party.site, party.key_sha256, said, self.can if own else None)
            before = route[hop - 1] if hop else None
            sender = None if before is None else Place(before.site, before.key_sha256)
            error_ms = self.clock_error_ms()
            judged.append(ask(bundle.engine, use, place, matter, now, before=sender, clock_error_ms=error_ms))
        return judged

    def _denied(self, bundle: InForce, point: str, carried: Carried, one: Judged, name: str) -> Denied:
        decision = one.decision
        why = reasons(decision)
        near = [rule.rule.name for trace in decision.traces if (rule := nearest_permit(trace)) is not None]
        missing = f" Missing: {', '.join(why.missing)}." if why.missing else ""
        self._log.warning(
            "policy denies", point=point, task=carried.task, use=decision.use, at=one.place.name,
            because=list(why.because), missing=list(why.missing), decision=name,
        )  # fmt: skip
        return Denied(
            f"policy at {self.me.site} (version {bundle.bundle.version}) does not permit to {decision.use} these "
            f"data at {one.place.name}: {explain(bundle.engine, decision)}{missing}",
            hint=f"nothing moves until a rule, a fact or a label changes; decision {name} is in the evidence of "
            f"{self.me.site}",
            reason="policy-denied",
            use=decision.use,
            site=one.place.name,
            rule=list(why.because),
            missing=list(why.missing),
            nearest=near,
            decision=name,
        )


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _ends(route: Sequence[Party]) -> tuple[str, Place]:
    return route[0].site, Place(route[-1].site, route[-1].key_sha256)


def _whole_route(route: Sequence[Party], arrives: str) -> list[tuple[str, int]]:
    last = len(route) - 1
    return [("release", 0), *(("relay", hop) for hop in range(1, last)), (arrives, last)]


def _texts(one: Judged, attribute: str) -> list[str]:
    value = one.known.facts.get(attribute)
    return sorted(value) if isinstance(value, frozenset) else []
