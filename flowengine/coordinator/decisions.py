"""What residency policy says to a request, before anything moves."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, select

from flowengine.api.resources import Decision, Plan, PlanRequest, TransferRequest
from flowengine.coordinator.database.tables import AnyRow, sites

__all__ = ["Decider"]


class Decider:
    """Decides requests by the policies of a directory; without one nothing is forbidden, and decisions say so."""

    def decide(
        self, request: TransferRequest, rows: Mapping[str, AnyRow], now: float
    ) -> tuple[list[Decision], str]:
        """The decisions on all uses of the data, and the digest of the policies (hexadecimal)."""
        uses = [("leave", request.source.site), *(("land", target.site) for target in request.targets)]
        return [Decision(use=use, site=site, verdict="none") for use, site in uses], ""

    def plan(self, connection: Connection, asked: PlanRequest, now: float) -> Plan:
        """Verdict, direct routes and an estimate from what is known of the links."""
        names = [asked.request.source.site, *(target.site for target in asked.request.targets)]
        rows = {row.name: row for row in connection.execute(select(sites).where(sites.c.name.in_(names)))}
        decisions, _ = self.decide(asked.request, rows, now)
        return Plan(
            permitted=not any(decision.verdict == "deny" for decision in decisions),
            decisions=decisions,
            routes=[[names[0], target] for target in names[1:]],
            size_bytes=asked.size_bytes,
        )
