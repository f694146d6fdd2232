"""What the gate decides on, and what it gives to whoever asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flowengine.policy.asking import Judged
from flowengine.trust.grant import Party
from flowengine.trust.release import Release, Sealed
from flowengine_agent.policies import InForce
from flowengine_agent.recording import Owed

__all__ = ["Carried", "Permit"]


class Carried(Protocol):
    """What grants and relay grants say alike of a transfer."""

    @property
    def transfer(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def fence(self) -> int: ...
    @property
    def source_path(self) -> str: ...
    @property
    def target_path(self) -> str: ...
    @property
    def labels(self) -> list[str]: ...
    @property
    def contracts(self) -> list[str]: ...
    @property
    def purpose(self) -> str: ...
    @property
    def requester(self) -> str: ...
    @property
    def policy_digest(self) -> bytes: ...
    @property
    def tenant(self) -> str: ...
    @property
    def required(self) -> list[str]: ...


@dataclass(frozen=True)
class Permit:
    """What this site's policies permitted.

    Attributes:
        bundle: they were; None where this site has none.
        judged: the decisions, each with its place.
        decisions: their ids, in the same order.
        owed: which of their duties this site carries out.
        counts: what the counters came to, at the source.
        release: the source's, as it was checked; None at the source itself.
        document: that release as it came.
        route: for which it is.
        sealed: at the source, the keys with which what leaves is sealed; empty where it leaves as it is.
    """

    bundle: InForce | None = None
    judged: tuple[Judged, ...] = ()
    decisions: tuple[str, ...] = ()
    owed: tuple[Owed, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    release: Release | None = None
    document: bytes = b""
    route: tuple[Party, ...] = ()
    sealed: tuple[Sealed, ...] = ()
