"""Which HTTP status each reason of an error has: the one table, for the coordinator and its clients."""

from __future__ import annotations

from typing import Final

from flowengine.errors import (
    AuthenticationError,
    Denied,
    FlowError,
    IntegrityError,
    NotFound,
    PeerError,
    ProtocolError,
    TemporaryError,
    UsageError,
)

__all__ = ["STATUSES", "TITLES", "error_of", "status_of"]

STATUSES: Final[dict[str, int]] = {
    "usage": 400,
    "protocol": 400,
    "authentication": 401,
    "certificate-expired": 401,
    "certificate-forged": 401,
    "certificate-revoked": 401,
    "certificate-unknown": 401,
    "denied": 403,
    "policy-approval": 403,
    "approval-forged": 401,
    "not-found": 404,
    "wrong-method": 405,
    "conflict": 409,
    "no-route": 409,
    "deadline": 409,
    "fence-superseded": 409,
    "too-large": 413,
    "wrong-media-type": 415,
    "incompatible": 422,
    "evidence": 422,
    "policy-invalid": 422,
    "agreement-forged": 422,
    "agreement-unknown-authority": 422,
    "label-forged": 422,
    "label-unknown-owner": 422,
    "policy-denied": 403,
    "quota": 429,
    "failed": 500,
    "local": 500,
    "peer": 502,
    "temporary": 503,
    "busy": 503,
    "agent-offline": 503,
    "stalled": 504,
}
"""HTTP status by reason; a reason that is not here is a failure of the coordinator (500)."""

TITLES: Final[dict[int, str]] = {
    400: "the request makes no sense",
    401: "not authenticated",
    403: "not permitted",
    404: "not there",
    405: "not with this method",
    409: "in conflict with what is",
    413: "too large",
    415: "not in this media type",
    422: "not understood by this version",
    429: "beyond a quota",
    500: "the coordinator failed",
    502: "the site's agent failed",
    503: "not now",
    504: "no answer in time",
}

_CLASSES: Final[dict[int, type[FlowError]]] = {
    400: UsageError,
    401: AuthenticationError,
    403: Denied,
    404: NotFound,
    405: UsageError,
    409: FlowError,
    413: UsageError,
    415: UsageError,
    422: ProtocolError,
    429: TemporaryError,
    502: PeerError,
    503: TemporaryError,
    504: TemporaryError,
}


def status_of(error: FlowError) -> int:
    """The status that an error is answered with.

    >>> status_of(NotFound("no such transfer"))
    404
    """
    return STATUSES.get(error.reason, 500)


def error_of(
    status: int, reason: str, message: str, hint: str = "", context: dict[str, object] | None = None
) -> FlowError:
    """The error that an answer stands for, as the class that its status names.

    >>> error_of(409, "no-route", "both only dial out").reason
    'no-route'
    """
    kind = IntegrityError if reason == "integrity" else _CLASSES.get(status, FlowError)
    error = kind(message, hint=hint, reason=reason)
    error.context.update(context or {})
    return error
