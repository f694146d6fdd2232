"""Policy: bundles in force, labels, agreements."""

from __future__ import annotations

from typing import Final

from flowengine.api.policies import (
    AgreementInfo,
    AgreementUpload,
    LabelInfo,
    LabelUpload,
    PolicyBundle,
    PolicyBundleContent,
    PolicyBundleUpload,
)
from flowengine.api.schema import Page
from flowengine.coordinator.routes.queries import LabelsQuery, PageQuery, PartQuery
from flowengine.coordinator.routes.route import ASKING, OPERATOR, READING, SEEING, Route
from flowengine.policy.bundle import MAX_BUNDLE_BYTES

__all__ = ["ROUTES"]

_BUNDLE_BODY_BYTES: Final = MAX_BUNDLE_BYTES * 4 // 3 + 4096
"""A bundle in base64, and what stands around it."""

ROUTES: Final = (
    Route(
        "GET",
        "/v1/policies",
        "list_bundles",
        "Policy bundles that are or were in force, newest first",
        READING,
        response=Page,
        items=PolicyBundle,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/policies",
        "activate_bundle",
        "Put a signed bundle in force, here and at all agents",
        OPERATOR,
        PolicyBundleUpload,
        PolicyBundle,
        status=201,
        also=("conflict", "policy-invalid"),
        creates=True,
        max_body_bytes=_BUNDLE_BODY_BYTES,
    ),
    Route(
        "GET",
        "/v1/policies/{version}",
        "get_bundle",
        "A part of a bundle's file",
        SEEING,
        response=PolicyBundleContent,
        query=PartQuery,
    ),
    Route(
        "GET",
        "/v1/labels",
        "list_labels",
        "Label statements of data owners",
        READING,
        response=Page,
        items=LabelInfo,
        query=LabelsQuery,
    ),
    Route(
        "POST",
        "/v1/labels",
        "set_label",
        "Hand a data owner's signed statement to all agents",
        ASKING,
        LabelUpload,
        LabelInfo,
        status=201,
        also=("conflict", "label-forged", "label-unknown-owner"),
        creates=True,
    ),
    Route(
        "GET",
        "/v1/agreements",
        "list_agreements",
        "Agreements that authorities signed",
        READING,
        response=Page,
        items=AgreementInfo,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/agreements",
        "set_agreement",
        "Hand an authority's signed agreement to all agents",
        OPERATOR,
        AgreementUpload,
        AgreementInfo,
        status=201,
        also=("conflict", "agreement-forged", "agreement-unknown-authority"),
        creates=True,
    ),
)
