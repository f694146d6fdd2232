"""Whether a stored plan may still be followed, and what it says of who serves whom. Pure."""

from __future__ import annotations

import msgspec

from flowengine.api.plans import Plan
from flowengine.api.transfers import TransferRequest
from flowengine.coordinator.database.tables import AnyRow
from flowengine.coordinator.planning.picture import Picture, links_of_plan
from flowengine.coordinator.planning.problem import overlay_of
from flowengine.coordinator.rules.feeding import may_be_fed
from flowengine.errors import Denied, FlowError, NotFound

__all__ = ["check_chosen", "chosen_feeds"]


def check_chosen(
    row: AnyRow | None,
    request: TransferRequest,
    tenant: str,
    picture: Picture,
    now: float,
    permitted: frozenset[str],
) -> Plan:
    """The stored plan that a request names, if nothing that it leads over has gone since.

    Args:
        row: of the table of plans; None where there is none of that id.
        now: Unix seconds.
        permitted: relays that policy lets pass the data on.

    Raises:
        NotFound, FlowError, Denied: as of `Asking.chosen`.
    """
    if row is None or row.tenant != tenant or row.expires < now:
        raise NotFound(
            f"there is no plan {request.plan}",
            hint="plans are kept for an hour: plan again",
            plan=request.plan,
        )
    planned = msgspec.json.decode(row.request, type=TransferRequest)
    for name in ("source", "targets", "mode", "labels", "purpose", "priority"):
        if getattr(planned, name) != getattr(request, name):
            raise FlowError(
                f"plan {request.plan} is for another transfer: its {name} is {getattr(planned, name)!r}",
                hint="plan this transfer, and use that plan's id",
                reason="conflict",
            )
    plan = msgspec.json.decode(row.body, type=Plan)
    between = sorted({site for way in plan.ways for site in way.sites[1:-1]})
    for site in between:
        facts = picture.sites.get(site)
        if facts is None or not facts.relays:
            raise FlowError(
                f"plan {request.plan} leads over {site}, which does not relay any more",
                hint="plan again",
                reason="conflict",
            )
        if site not in permitted:
            raise Denied(
                f"plan {request.plan} leads over {site}, and policy does not permit that any more",
                hint="plan again",
                site=site,
            )
    pairs = [(request.source.site, target.site) for target in request.targets]
    pairs += [(feed.feeder, feed.target) for feed in plan.feeds]
    there = {link.label for link in overlay_of(picture, pairs).links}
    gone = sorted(links_of_plan(plan) - there)
    if gone:
        raise FlowError(
            f"plan {request.plan} uses {', '.join(gone)}, which is not there any more",
            hint="plan again",
            reason="conflict",
        )
    return plan


def chosen_feeds(request: TransferRequest, plan: Plan) -> dict[int, int]:
    """Targets of a request that others serve by a stored plan, each with its feeder, by position."""
    if not may_be_fed(request):
        return {}
    at = {target.site: index for index, target in enumerate(request.targets)}
    return {at[feed.target]: at[feed.feeder] for feed in plan.feeds}
