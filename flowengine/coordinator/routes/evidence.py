"""Evidence: checkpoints of the sites' chains, and the coordinator's own chain."""

from __future__ import annotations

from typing import Final

from flowengine.api.evidence import EvidenceBundle, EvidenceCheckpoint, EvidenceRecord
from flowengine.api.schema import Page
from flowengine.coordinator.routes.queries import CheckpointsQuery, PageQuery, PartQuery
from flowengine.coordinator.routes.route import SEEING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "GET",
        "/v1/evidence/checkpoints",
        "list_checkpoints",
        "Checkpoints of the sites' chains of evidence, newest first",
        SEEING,
        response=Page,
        items=EvidenceCheckpoint,
        query=CheckpointsQuery,
    ),
    Route(
        "GET",
        "/v1/evidence/records",
        "list_evidence",
        "The coordinator's own chain of evidence",
        SEEING,
        response=Page,
        items=EvidenceRecord,
        query=PageQuery,
    ),
    Route(
        "GET",
        "/v1/evidence/bundles/{digest}",
        "get_evidence_bundle",
        "Policies that decisions of the coordinator name",
        SEEING,
        response=EvidenceBundle,
        query=PartQuery,
    ),
)
