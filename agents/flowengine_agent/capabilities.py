"""What this agent on this host can do: the list of this version, and what the host adds."""

from __future__ import annotations

from cryptography.hazmat.backends.openssl import backend

from flowengine.policy.duties import AGENT_CAN

__all__ = ["capabilities"]


def capabilities() -> frozenset[str]:
    """Words of `flowengine.policy.obligations.CAPABILITIES`, as the heartbeat advertises them.

    The name of the FIPS suite is used only where the OpenSSL that this process is linked to runs in FIPS mode.
    """
    fips = bool(getattr(backend, "_fips_enabled", False))
    return AGENT_CAN | ({"suite.aes-256-gcm-fips"} if fips else frozenset())
