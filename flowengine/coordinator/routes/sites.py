"""Sites: what they offer, how they join, the folders that they show."""

from __future__ import annotations

from typing import Final

from flowengine.api.schema import Page
from flowengine.api.sites import JoinToken, JoinTokenRequest, Listing, Site, SiteRequest
from flowengine.coordinator.routes.queries import FilesQuery, PageQuery
from flowengine.coordinator.routes.route import ASKING, OPERATOR, READING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "GET",
        "/v1/sites",
        "list_sites",
        "All sites",
        READING,
        response=Page,
        items=Site,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/sites",
        "create_site",
        "Expect a new site",
        OPERATOR,
        SiteRequest,
        Site,
        status=201,
        also=("conflict",),
        creates=True,
    ),
    Route("GET", "/v1/sites/{site}", "get_site", "One site", READING, response=Site),
    Route(
        "PATCH",
        "/v1/sites/{site}",
        "change_site",
        "Change facts or bounds, drain",
        OPERATOR,
        SiteRequest,
        Site,
        also=("conflict",),
    ),
    Route(
        "DELETE",
        "/v1/sites/{site}",
        "remove_site",
        "Revoke its certificate and forget its right",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/sites/{site}/files",
        "list_files",
        "A folder as the site's agent sees it now",
        ASKING,
        response=Listing,
        query=FilesQuery,
        also=("agent-offline", "stalled", "peer", "policy-denied"),
    ),
    Route(
        "POST",
        "/v1/join-tokens",
        "create_join_token",
        "A one-time token with which an agent enrols",
        OPERATOR,
        JoinTokenRequest,
        JoinToken,
        status=201,
        also=("conflict", "not-found"),
        creates=True,
    ),
)
