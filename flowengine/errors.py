"""The whole exception tree, its reason codes, and what they mean to a process that exits.

One class exists per thing that somebody catches apart from its parent. The *reason* is the stable word that
goes into JSON output, logs and HTTP answers; `EXIT_CODES` maps reasons to exit codes, once, here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = [
    "EXIT_CODES",
    "AuthenticationError",
    "Denied",
    "Exit",
    "FlowError",
    "IntegrityError",
    "LocalError",
    "NotFound",
    "PeerError",
    "PolicyInvalid",
    "ProtocolError",
    "TemporaryError",
    "UsageError",
    "exit_code",
]


class Exit(IntEnum):
    """Exit codes of every command; stable, documented in docs/reference/exit-codes.md."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    AUTHENTICATION = 4
    DENIED = 5
    INTEGRITY = 6
    SOME_OBJECTS_FAILED = 7
    TEMPORARY = 75
    INTERRUPTED = 130


class FlowError(Exception):
    """Root of all errors that this library raises on purpose.

    Args:
        message: What, where and why, in one sentence; never a secret.
        hint: What to do next, in one sentence; empty when the message says it all.
        reason: Stable machine-readable word; a class default where None.
        context: Facts of the case as JSON-able values (paths decoded with `units.show_path`).
    """

    reason: str = "failed"
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", reason: str | None = None, **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if reason is not None:
            self.reason = reason
        self.context = context

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.hint}" if self.hint else self.message

    def as_dict(self) -> dict[str, object]:
        """The error as JSON-able data: reason, message, hint, retryable, context."""
        return {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            "context": self.context,
        }


class UsageError(FlowError):
    """The caller asked for something that makes no sense; nothing was touched."""

    reason = "usage"


class NotFound(FlowError):
    """A path, manifest or name that was asked for does not exist."""

    reason = "not-found"


class AuthenticationError(FlowError):
    """A secret, certificate or fingerprint was missing or wrong."""

    reason = "authentication"


class Denied(FlowError):
    """A policy or a read-only, jailed door refused."""

    reason = "denied"


class PolicyInvalid(FlowError):
    """Policy files say something that cannot be meant; none of them is loaded. Context: `problems`."""

    reason = "policy-invalid"


class IntegrityError(FlowError):
    """Bytes are not what their hash, tag or manifest says."""

    reason = "integrity"


class LocalError(FlowError):
    """The operating system here refused: permissions, disk, limits."""

    reason = "local"


class TemporaryError(FlowError):
    """Nothing is wrong that the same command, run again later, would not mend."""

    reason = "temporary"
    retryable = True


class PeerError(FlowError):
    """The other side reported a failure of its own."""

    reason = "peer"


class ProtocolError(FlowError):
    """The peer broke the protocol: a lie, a forgery or a bug. Never retried on the same connection."""

    reason = "protocol"


EXIT_CODES: Final[dict[str, Exit]] = {
    "failed": Exit.FAILED,
    "usage": Exit.USAGE,
    "not-found": Exit.NOT_FOUND,
    "authentication": Exit.AUTHENTICATION,
    "coordinator-forged": Exit.AUTHENTICATION,
    "not-enrolled": Exit.AUTHENTICATION,
    "certificate-expired": Exit.AUTHENTICATION,
    "certificate-forged": Exit.AUTHENTICATION,
    "certificate-revoked": Exit.AUTHENTICATION,
    "certificate-unknown": Exit.AUTHENTICATION,
    "grant-expired": Exit.AUTHENTICATION,
    "grant-forged": Exit.AUTHENTICATION,
    "grant-not-yet-valid": Exit.AUTHENTICATION,
    "grant-other-party": Exit.AUTHENTICATION,
    "grant-other-path": Exit.AUTHENTICATION,
    "grant-replayed": Exit.AUTHENTICATION,
    "grant-superseded": Exit.AUTHENTICATION,
    "denied": Exit.DENIED,
    "policy-denied": Exit.DENIED,
    "policy-stopped": Exit.DENIED,
    "policy-unheard": Exit.DENIED,
    "policy-approval": Exit.DENIED,
    "policy-onward": Exit.DENIED,
    "policy-kept": Exit.DENIED,
    "policy-missing": Exit.DENIED,
    "policy-expired": Exit.DENIED,
    "release-missing": Exit.DENIED,
    "release-forged": Exit.AUTHENTICATION,
    "release-other": Exit.AUTHENTICATION,
    "release-expired": Exit.AUTHENTICATION,
    "release-stripped": Exit.DENIED,
    "agreement-forged": Exit.AUTHENTICATION,
    "agreement-unknown-authority": Exit.AUTHENTICATION,
    "label-forged": Exit.AUTHENTICATION,
    "label-unknown-owner": Exit.AUTHENTICATION,
    "grant-used-up": Exit.DENIED,
    "not-offered": Exit.DENIED,
    "account-unmapped": Exit.DENIED,
    "conflict": Exit.FAILED,
    "no-route": Exit.FAILED,
    "deadline": Exit.FAILED,
    "fence-superseded": Exit.FAILED,
    "wrong-method": Exit.USAGE,
    "wrong-media-type": Exit.USAGE,
    "too-large": Exit.USAGE,
    "quota": Exit.TEMPORARY,
    "agent-offline": Exit.TEMPORARY,
    "no-evidence": Exit.DENIED,
    "not-sealed": Exit.DENIED,
    "sealed-mixed": Exit.DENIED,
    "sealed-damaged": Exit.INTEGRITY,
    "sealing-key-damaged": Exit.INTEGRITY,
    "sealing-key-missing": Exit.NOT_FOUND,
    "sealing-key-other": Exit.AUTHENTICATION,
    "receipt-forged": Exit.INTEGRITY,
    "approval-forged": Exit.AUTHENTICATION,
    "deletion-forged": Exit.INTEGRITY,
    "evidence": Exit.INTEGRITY,
    "feed-differs": Exit.INTEGRITY,
    "integrity": Exit.INTEGRITY,
    "protocol": Exit.INTEGRITY,
    "unsafe-path": Exit.INTEGRITY,
    "incompatible": Exit.FAILED,
    "some-objects-failed": Exit.SOME_OBJECTS_FAILED,
    "policy-invalid": Exit.FAILED,
    "budget": Exit.FAILED,
    "local": Exit.FAILED,
    "peer": Exit.FAILED,
    "temporary": Exit.TEMPORARY,
    "disk-full": Exit.TEMPORARY,
    "stalled": Exit.TEMPORARY,
    "disconnected": Exit.TEMPORARY,
    "timeout": Exit.TEMPORARY,
    "busy": Exit.TEMPORARY,
    "policy-behind": Exit.TEMPORARY,
    "policy-window": Exit.TEMPORARY,
    "policy-offline": Exit.TEMPORARY,
    "interrupted": Exit.INTERRUPTED,
}


def exit_code(error: BaseException) -> Exit:
    """The exit code for an error: by its reason, `FAILED` for a reason that the table does not name.

    >>> exit_code(NotFound("no such path"))
    <Exit.NOT_FOUND: 3>
    """
    if isinstance(error, FlowError):
        return EXIT_CODES.get(error.reason, Exit.FAILED)
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    return Exit.FAILED
