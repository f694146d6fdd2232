"""Users, tokens, tenants, and what people have to approve."""

from __future__ import annotations

from typing import Final

from flowengine.api.people import Tenant, TenantRequest, Token, TokenRequest, User, UserRequest
from flowengine.api.policies import ApprovalGiven, ApprovalRequest
from flowengine.api.schema import Page
from flowengine.coordinator.routes.queries import PageQuery
from flowengine.coordinator.routes.route import ADMIN, ASKING, READING, SEEING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "GET",
        "/v1/users",
        "list_users",
        "All users",
        SEEING,
        response=Page,
        items=User,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/users",
        "create_user",
        "Make a user",
        ADMIN,
        UserRequest,
        User,
        status=201,
        also=("conflict", "not-found"),
        creates=True,
    ),
    Route(
        "PATCH",
        "/v1/users/{user}",
        "change_user",
        "Change role, tenant, or disable",
        ADMIN,
        UserRequest,
        User,
        also=("conflict",),
    ),
    Route(
        "GET",
        "/v1/tokens",
        "list_tokens",
        "Own API tokens; all for admins and auditors",
        READING,
        response=Page,
        items=Token,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/tokens",
        "create_token",
        "A new API token; its secret is shown once",
        READING,
        TokenRequest,
        Token,
        status=201,
        also=("not-found",),
        creates=True,
    ),
    Route("DELETE", "/v1/tokens/{token}", "remove_token", "Revoke a token", READING, status=204),
    Route(
        "GET",
        "/v1/tenants",
        "list_tenants",
        "All tenants",
        SEEING,
        response=Page,
        items=Tenant,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/tenants",
        "create_tenant",
        "Make a tenant",
        ADMIN,
        TenantRequest,
        Tenant,
        status=201,
        also=("conflict",),
        creates=True,
    ),
    Route(
        "PATCH",
        "/v1/tenants/{tenant}",
        "change_tenant",
        "Change share and bounds",
        ADMIN,
        TenantRequest,
        Tenant,
        also=("conflict",),
    ),
    Route(
        "GET",
        "/v1/approvals",
        "list_approvals",
        "What people have to approve, and who has; newest first",
        READING,
        response=Page,
        items=ApprovalRequest,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/approvals/{handle}",
        "approve",
        "Give a signed approval",
        ASKING,
        ApprovalGiven,
        ApprovalRequest,
        also=("conflict", "approval-forged"),
    ),
    Route(
        "DELETE",
        "/v1/approvals/{handle}/{approver}",
        "withdraw_approval",
        "Take an approval back; what runs on it is stopped",
        ASKING,
        response=ApprovalRequest,
    ),
)
