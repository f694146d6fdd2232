"""When a target is served by another target, and when it is served by the transfer's source after all. Pure.

Invariants
    - Whatever becomes of the feeder, the fed target is served: nothing that lasts keeps it waiting.
    - What policy took away at a target is not brought there again by another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flowengine.api.transfers import Endpoint, TransferRequest
from flowengine.coordinator.rules.paths import clean
from flowengine.coordinator.rules.states import POLICY_ENDS

__all__ = ["Feeder", "falls_back", "lost", "may_be_fed", "source_of", "waits_for"]

MAX_TARGETS: Final = 8
"""Among more targets nobody looks for who could serve whom."""
PATIENCE_S: Final = 10.0
"""How long a fed task bears that something keeps its feeder from beginning, or itself from reading there."""
_OWN_DOING: Final = frozenset({"draining", "paused", "lease-ended", "grant-expired", "grant-replayed"})
"""Reasons with which a fed target gives its task back that say nothing of the feeder."""
_SOON: Final = frozenset({"", "no-agent-claimed-yet", "feed", "paused"})


@dataclass(frozen=True, slots=True)
class Feeder:
    """The task that brings to its target what another one then gets from there, while it is not done.

    `begun` is whether an agent ever took it.
    """

    task: str
    target_site: str
    target_path: str
    state: str
    begun: bool = False
    wait_name: str = ""
    wait_since: float = 0.0


def may_be_fed(request: TransferRequest) -> bool:
    """Whether targets of a request may serve each other at all.

    Only plain copies to several sites are: what deletes, looks or verifies is about the source, and a deadline was
    promised on ways from there.
    """
    sites = [target.site for target in request.targets]
    return (
        request.mode == "copy"
        and 2 <= len(sites) <= MAX_TARGETS
        and len({request.source.site, *sites}) == len(sites) + 1
        and request.deadline is None
        and not request.options.delete
        and not request.options.dry_run
    )


def source_of(fed_by: str, request: TransferRequest) -> Endpoint:
    """From where a task reads: what landed at the target of the task that feeds it, else the transfer's source.

    What came from `SRC/` is the contents of a folder there as well. What came from `SRC` may be a file or a folder, and the
    feeding site looks which.
    """
    if not fed_by:
        return request.source
    landed = request.targets[int(fed_by.rpartition(".")[2]) - 1]
    path = clean(landed.path)
    return Endpoint(site=landed.site, path=f"{path}/" if request.source.path.endswith("/") else path)


def waits_for(target: str, feeder: str, path: str) -> tuple[str, str, str]:
    """Name, words and end of the wait of a target for the site that serves it.

    Args:
        path: where the feeder's own copy lands.
    """
    return (
        "feed",
        f"{target} is served by {feeder}, whose own copy is not complete yet",
        f"{feeder}:{path} is complete, or the source serves {target} itself because {feeder} cannot",
    )


def falls_back(state: str, reason: str, moved: bool) -> bool:
    """Whether an attempt of a fed task that ended so is followed by one from the transfer's source.

    Args:
        state: the task's from now on.
        moved: whether anything had arrived.
    """
    if state not in ("waiting", "failed"):
        return False
    if moved and reason in POLICY_ENDS:
        return False
    return reason not in _OWN_DOING


def lost(feeder: Feeder | None, site_state: str, wait_name: str, wait_since: float, now: float) -> str:
    """Why a fed task that waits is to be served from the source, in words; empty where it goes on waiting.

    Args:
        feeder: None where it is done.
        site_state: of the site that feeds.
        wait_name, wait_since: what the fed task itself waits for.
    """
    if site_state != "online":
        return f"its site is {site_state}"
    if feeder is None:
        held = wait_name == "source-path" and now - wait_since > PATIENCE_S
        return "somebody else writes there" if held else ""
    if feeder.state in ("failed", "cancelled"):
        return f"its own copy {feeder.state}"
    if feeder.state == "waiting" and feeder.begun:
        return "its own copy was begun and given up"
    if feeder.state == "waiting" and feeder.wait_name not in _SOON and now - feeder.wait_since > PATIENCE_S:
        return f"its own copy waits ({feeder.wait_name})"
    return ""
