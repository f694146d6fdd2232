"""What the gate puts on the record: permits with the duties that come with them in one write, refusals, what moved.

A record is durable when these return. Where a site keeps no evidence, the log tells the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Literal

from flowengine.errors import FlowError
from flowengine.evidence.bodies import (
    DutyState,
    approval_body,
    chunk_root_body,
    obligation_body,
    refusal_body,
)
from flowengine.evidence.decisions import Asked, decision_body
from flowengine.evidence.obligations import SETTLED_BY_MOVING, duty_id, owed
from flowengine.evidence.private import Private
from flowengine.policy.approvals import Approval
from flowengine.policy.asking import Judged
from flowengine.policy.model import Duty
from flowengine.trust.grant import Grant, Party
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.release import Sealed
from flowengine.trust.sealed import SUITE
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.logs import Log

if TYPE_CHECKING:
    from flowengine_agent.permits import Carried, Permit
    from flowengine_agent.policies import InForce

__all__ = [
    "EVERYWHERE",
    "Entry",
    "Owed",
    "Recorder",
    "approvals_used",
    "at_rest",
    "duties_owed",
    "private_counts",
    "shown_sealed",
]

Entry = tuple[str, Mapping[str, object]]
"""Kind and body of a record."""
_PHASES: Final = {"publish": "end"}
EVERYWHERE: Final[Mapping[str, Mapping[str, object]]] = {
    "encrypt": {"suite": "aes-256-gcm", "end_to_end": True},
    "log": {"evidence": "this chain"},
    "onward": {"attached": "to what landed"},
}
"""What shows, at either end, that a duty of every transfer was done."""


@dataclass(frozen=True)
class Owed:
    """A duty that this agent took on with a permit.

    Attributes:
        id: its name in the decision.
        decision: id of the decision.
        since: Unix seconds when it was taken on.
    """

    id: str
    decision: str
    duty: Duty
    transfer: str
    task: str
    since: int = 0

    def entry(self, state: DutyState, proof: Mapping[str, object] | None = None, why: str = "") -> Entry:
        """Its record."""
        return "obligation", obligation_body(
            self.duty, state, id=self.id, transfer=self.transfer, task=self.task, decision_id=self.decision,
            proof=proof, why=why,
        )  # fmt: skip


def at_rest(grant: Grant, permit: Permit) -> dict[str, Mapping[str, object]]:
    """What shows that data which a site may only hold lie there sealed; nothing where they landed otherwise."""
    if arrival_use(grant.required) != "hold" or permit.release is None:
        return {}
    keys = sorted({one.key for one in permit.release.sealed})
    return {"encrypt": {**EVERYWHERE["encrypt"], "at_rest": f"sealed with {SUITE}", "keys": keys}}


def shown_sealed(sealed: Sequence[Sealed]) -> dict[str, object]:
    """How a record tells that what moved was sealed."""
    if not sealed:
        return {}
    return {"sealed": [{"suite": one.suite, "key": one.key, "kept_at": one.site} for one in sealed]}


def duties_owed(
    point: str, carried: Carried, judged: Sequence[Judged], ids: Sequence[str], me: str, now: int
) -> tuple[Owed, ...]:
    """What this site has to do itself of the duties of permits."""
    return tuple(
        Owed(duty_id(index), name, duty, carried.transfer, carried.task, now)
        for one, name in zip(judged, ids, strict=True)
        for index, duty in enumerate(one.decision.duties)
        if owed(point, duty.type, own=one.place.name == me)
    )


def approvals_used(carried: Carried, given: Sequence[tuple[bytes, Approval]]) -> list[Entry]:
    """Records of the approvals by which something is permitted here."""
    return [
        (
            "approval",
            approval_body(
                sha256(document).hexdigest()[:16],
                "used",
                group=", ".join(sorted(yes.groups)),
                by=yes.who,
                binds=yes.binds,
                until=yes.until,
                transfer=carried.transfer,
            )
            | {"task": carried.task},
        )
        for document, yes in given
    ]


class Recorder:
    """Puts on the record what is decided and done at a site.

    Args:
        site: its name.
        evidence: its chain; None: only the log tells.
        bundle: digest of the bundle in force; empty for none.
    """

    def __init__(
        self,
        site: str,
        log: Log,
        evidence: EvidenceLog | None,
        bundle: Callable[[], str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._site = site
        self._log = log
        self._evidence = evidence
        self._bundle = bundle
        self._clock = clock

    async def keep(self, *entries: Entry) -> None:
        """Put something on the record: all of it or nothing, with nothing of others in between.

        Raises:
            Denied: it cannot be made durable (reason "no-evidence").
        """
        if not entries:
            return
        if self._evidence is not None:
            await self._evidence.record_all(entries)
            return
        names = ("point", "task", "use", "site", "decision", "decision_id", "version", "reason", "state")
        for kind, body in entries:
            self._log.info(kind, **{name: body[name] for name in names if name in body})

    def decided(
        self,
        bundle: InForce,
        point: str,
        carried: Carried,
        route: Sequence[Party],
        one: Judged,
        name: str,
        clock_error_ms: int = 0,
    ) -> Entry:
        """The record of a decision: everything that it takes to decide again."""
        hop = route.index(next(party for party in route if party.site == one.place.name))
        asked = Asked(
            point=point,
            phase=_PHASES.get(point, "before-first-byte"),
            site=one.place.name,
            data=f"{route[0].site}:{carried.source_path}",
            bundle=bundle.bundle.digest,
            transfer=carried.transfer,
            task=carried.task,
            hop=hop,
            route=[party.site for party in route],
            purpose=carried.purpose,
            requester=carried.requester,
        )
        body = decision_body(
            bundle.engine,
            one.decision,
            asked,
            decision_id=name,
            resolved=one.known,
            clock_error_ms=clock_error_ms,
        )
        # By whose key the site was known, and by which policies the coordinator says that it planned.
        return "decision", body | {
            "key": one.place.key_sha256, "plan_policies": carried.policy_digest.hex(),
        }  # fmt: skip

    def refused(self, point: str, carried: Carried, source: str, error: FlowError) -> Entry:
        """The record of a refusal that needed no rule."""
        self._log.warning("refused", point=point, task=carried.task, reason=error.reason, why=error.message)
        return "decision", refusal_body(
            os.urandom(8).hex(),
            "land" if point == "publish" else point,
            self._site,
            f"{source}:{carried.source_path}",
            point,
            _PHASES.get(point, "before-first-byte"),
            error.reason,
            error.message,
            bundle=self._bundle(),
            transfer=carried.transfer,
            task=carried.task,
        )

    async def refused_bundle(self, version: int, error: FlowError) -> None:
        """A bundle that the coordinator offers is not taken."""
        body = refusal_body(
            os.urandom(8).hex(), "activate", self._site, f"bundle version {version}", "activate",
            "before-first-byte", error.reason, error.message, bundle=self._bundle(),
        )  # fmt: skip
        await self.keep(("decision", body))

    async def moved(
        self,
        direction: Literal["left", "landed", "passed"],
        carried: Carried,
        path: str,
        owed: Sequence[Owed],
        *,
        root: str = "",
        objects: int = 0,
        size_bytes: int = 0,
        proofs: Mapping[str, Mapping[str, object]] | None = None,
        **more: object,
    ) -> None:
        """Data left, landed or passed: what became of the duties that are done with that, and what moved.

        Args:
            path: as `site:/path`.
            owed: as the permit has them.
            root: version id; empty where it is not known, or not all of it moved.
            proofs: by type of duty, what shows that it was done.
            more: further fields of the record.
        """
        now = int(self._clock())
        settled = [
            one.entry(
                "fulfilled", {"began": one.since, "ended": now} | dict((proofs or {}).get(one.duty.type, {}))
            )
            for one in owed
            if one.duty.type in SETTLED_BY_MOVING
        ]
        body = chunk_root_body(
            transfer=carried.transfer, task=carried.task, direction=direction, path=path, root=root,
            objects=objects, size_bytes=size_bytes,
        )  # fmt: skip
        await self.keep(*settled, ("chunk-root", body | more))


def private_counts(counts: Mapping[str, int]) -> list[dict[str, object]]:
    """Counters as a record holds them: they may count persons."""
    return [{"attr": name, "value": Private(name, value)} for name, value in sorted(counts.items())]
