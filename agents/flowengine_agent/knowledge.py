"""What this site knows of a transfer besides labels and pins: counters, approvals, and what landed here under duties.

The source counts and reads approvals itself; who stands behind it on the route takes the counters from the release that
the source signed, and reads the approvals again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flowengine.errors import AuthenticationError, Denied
from flowengine.policy.approvals import Approval, Request, open_approvals, valid_approvals
from flowengine.policy.asking import Judged, Matter, Place, ask
from flowengine.policy.counting import larger, movement_of
from flowengine.policy.duties import Terms
from flowengine.policy.facts import Statement
from flowengine.policy.ledger import counters_of
from flowengine.policy.merge import merge
from flowengine.policy.model import Duty
from flowengine.policy.requests import approval_groups, approval_statements, what_to_approve
from flowengine.trust.approval import verify_approval
from flowengine.trust.release import Release
from flowengine_agent.exports import Exports

if TYPE_CHECKING:
    from flowengine_agent.holdings import Holding
    from flowengine_agent.permits import Carried
    from flowengine_agent.policies import InForce

__all__ = ["Knowledge"]


class Knowledge:
    """What the gate asks for before it decides, and holds to after it."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports

    def leaving(
        self, bundle: InForce, carried: Carried, ends: tuple[str, Place], matter: Matter, now: int
    ) -> Matter:
        """The matter of a release with counters and approvals.

        Args:
            ends: the source's name, and the target.
        """
        counts = self._counts(bundle, carried, ends, matter, now)
        return self._with(bundle, carried, ends, matter, now, counts)

    def arriving(
        self,
        bundle: InForce,
        carried: Carried,
        ends: tuple[str, Place],
        matter: Matter,
        release: Release,
        now: int,
    ) -> Matter:
        """The matter of a relay or landing, with the counters that the source signed."""
        counts = larger([dict(release.counts)], now)
        return self._with(bundle, carried, ends, matter, now, counts)

    def _with(
        self,
        bundle: InForce,
        carried: Carried,
        ends: tuple[str, Place],
        matter: Matter,
        now: int,
        counts: list[Statement],
    ) -> Matter:
        matter = replace(matter, also=(*matter.also, *counts))
        groups = approval_groups(bundle.policies)
        if not groups:
            return matter
        request, given = self._request(bundle, carried, ends, matter, now)
        said = approval_statements(groups, given, request, now)
        return replace(matter, also=(*matter.also, *said))

    # --- counters -----------------------------------------------------------------------------------------------

    def _counts(
        self, bundle: InForce, carried: Carried, ends: tuple[str, Place], matter: Matter, now: int
    ) -> list[Statement]:
        if not counters_of(bundle.policies):
            return []
        source, target = ends
        judged = ask(bundle.engine, "land", target, matter, now)
        own = self.exports.counters(bundle.policies, movement_of(carried.task, source, judged), now)
        told = getattr(carried, "counts", {})
        return larger([own, dict(told)] if told else [own], now)

    def reserve(
        self, bundle: InForce, carried: Carried, source: str, judged: Sequence[Judged], now: int
    ) -> None:
        """Count what is about to leave, where a rule counts."""
        landing = next((one for one in judged if one.decision.use in ("land", "hold")), None)
        counted = any(duty.type == "count" for one in judged for duty in one.decision.duties)
        if landing is not None and (counted or counters_of(bundle.policies)):
            self.exports.reserve(movement_of(carried.task, source, landing), now)

    # --- approvals ----------------------------------------------------------------------------------------------

    def _request(
        self, bundle: InForce, carried: Carried, ends: tuple[str, Place], matter: Matter, now: int
    ) -> tuple[Request, list[Approval]]:
        """What approvals have to be about: these data for this recipient under the duties that it would take on."""
        source, target = ends
        request, _ = what_to_approve(bundle.engine, (source, carried.source_path), target, matter, now)
        return request, [approval for _, approval in self._given(bundle, carried, request)]

    @staticmethod
    def _given(bundle: InForce, carried: Carried, request: Request) -> Iterable[tuple[bytes, Approval]]:
        for document in getattr(carried, "approvals", ()):
            try:
                said, approval = verify_approval(document, bundle.policies.approvers)
            except AuthenticationError:
                continue  # of somebody whom the bundle in force does not name any more
            if said.requester == request.requester:
                yield document, approval

    def counting(
        self, bundle: InForce, carried: Carried, ends: tuple[str, Place], matter: Matter, now: int
    ) -> list[tuple[bytes, Approval]]:
        """The approvals that count now for what is to move, each with its document."""
        if not approval_groups(bundle.policies):
            return []
        source, target = ends
        request, _ = what_to_approve(bundle.engine, (source, carried.source_path), target, matter, now)
        given = list(self._given(bundle, carried, request))
        valid = valid_approvals((approval for _, approval in given), request, now)
        return [one for one in given if one[1] in valid]

    def check(
        self,
        bundle: InForce,
        carried: Carried,
        ends: tuple[str, Place],
        matter: Matter,
        judged: Sequence[Judged],
        landed: Sequence[Holding],
        now: int,
    ) -> None:
        """Hold a permit to the duties that have to be met before the first byte.

        Args:
            landed: what lies at the source's path and came under duties.

        Raises:
            Denied: approvals are missing (reason "policy-approval"), or what landed here may not be passed on
                ("policy-onward").
        """
        for duty in (duty for one in judged for duty in one.decision.duties if duty.type == "approve"):
            request, given = self._request(bundle, carried, ends, matter, now)
            missing = open_approvals(duty, given, request, now)
            if missing:
                raise Denied(
                    f"{', '.join(duty.origins)} asks for approval first: {'; '.join(missing)}",
                    hint="flow approval ls shows the request; flow approve HANDLE signs a yes",
                    reason="policy-approval",
                )
        for holding in landed:
            check_onward(holding, judged)


def check_onward(holding: Holding, judged: Sequence[Judged]) -> None:
    """Whether what landed under a duty `onward` may leave again.

    Raises:
        Denied: it may not; or not without duties that the recipient does not take on (reason "policy-onward").
    """
    onward = holding.terms.onward
    who = ", ".join(name for duty in holding.duties if duty.type == "onward" for name in duty.origins)
    what = f"what landed at {holding.path} with transfer {holding.transfer}"
    if onward == "forbid":
        raise Denied(f"{who} forbids to pass on {what}", reason="policy-onward")
    if onward != "same-duties":
        return
    taken: list[Duty] = [
        duty for one in judged if one.decision.use in ("land", "hold") for duty in one.decision.duties
    ]
    inherited = [duty for duty in holding.duties if duty.type not in ("stop", "quarantine")]
    alone, both = merge(taken), merge([*taken, *inherited])
    if both.collision is not None or _demands(alone.duties) != _demands(both.duties):
        raise Denied(
            f"{who} lets {what} be passed on under the same duties only, and the recipient does not take them all on",
            reason="policy-onward",
        )


def _demands(duties: Sequence[Duty]) -> Terms:
    return replace(Terms.of(duties), duties=())
