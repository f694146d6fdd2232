"""One line on what a transfer waits for, or what makes it no faster, and the facts behind it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from flowengine.api.transfers import Transfer, Wait, Why
from flowengine.coordinator.rules.queue import STANDS_STILL
from flowengine.units import format_bytes, format_duration, format_rate

__all__ = ["explain"]


def explain(transfer: Transfer, now: float, plan: Mapping[str, list[str]] | None = None) -> Why:
    """The answer to `flow why`: waits first, for what waits moves not at all; then the slowest stage.

    Of several waits the line tells the one that has lasted longest.

    Args:
        plan: by target, what the planner says of it, in words; not told of what stands still.
    """
    still = {
        task.target.site
        for task in transfer.tasks
        if task.state == "waiting" and task.wait is not None and task.wait.name in STANDS_STILL
    }
    binding = {task.target.site: task.binds for task in transfer.tasks if task.binds}
    waits = [task.wait for task in transfer.tasks if task.state == "waiting" and task.wait is not None]
    bottlenecks = {
        task.target.site: task.bottleneck
        for task in transfer.tasks
        if task.state == "running" and task.bottleneck
    }
    return Why(
        transfer=transfer.id,
        state=transfer.state,
        line=_line(transfer, waits, bottlenecks, binding, datetime.fromtimestamp(now, UTC)),
        waits=waits,
        bottlenecks=bottlenecks,
        plan={
            site: lines
            for site, lines in (plan or {}).items()
            if transfer.ended is None and site not in still
        },
    )


def _disposals(transfer: Transfer) -> str:
    """What became of what had arrived, for each target."""
    words = []
    for task in transfer.tasks:
        found = task.disposal
        if found is None or found.state == "none":
            continue
        what = f"{found.objects} objects of {format_bytes(found.size_bytes)} that had landed, and what was under way"
        became = f"are in quarantine as {found.name}" if found.state == "quarantined" else "were destroyed"
        words.append(f"at {task.target.site} {what} {became}")
    return "".join(f"; {word}" for word in words)


def _line(
    transfer: Transfer,
    waits: list[Wait],
    bottlenecks: dict[str, str],
    binding: dict[str, str],
    now: datetime,
) -> str:
    if transfer.state == "completed":
        return "it is complete: everything is verified and durable at every target"
    if transfer.state in ("quarantined", "purged"):
        return f"policy ended it ({transfer.reason}): {transfer.message}" + _disposals(transfer)
    if transfer.state == "terminated":
        return f"it ended ({transfer.reason}): {transfer.message}"
    if transfer.reason == "paused":
        since = format_duration((now - transfer.since).total_seconds())
        return f"a user paused it {since} ago; flow transfer resume {transfer.id} goes on"
    running = [task for task in transfer.tasks if task.state == "running"]
    if running:
        rate = sum(task.rate_bits_per_s for task in running)
        behind = [
            f"{task.target.site} waits, for {_ago(task.wait, now)}: {task.wait.text}; ends when {task.wait.ends_when}"
            for task in transfer.tasks
            if task.state == "waiting" and task.wait is not None and task.wait.name in ("feed", *STANDS_STILL)
        ]
        if not any(task.rate_bits_per_s or task.bottleneck for task in running):
            begun = f"{len(running)} of {len(transfer.tasks)} tasks have begun; no report on their speed yet"
            return "; ".join([begun, *behind])
        slow = "; ".join(f"to {site} the bottleneck is {what}" for site, what in sorted(bottlenecks.items()))
        held = "; ".join(f"to {site} {what}" for site, what in sorted(binding.items()))
        said = [f"it moves at {format_rate(rate / 8)}", held, slow, *behind]
        return "; ".join(part for part in said if part)
    if not waits:
        return "it waits for an agent to claim it"
    longest = min(waits, key=lambda wait: wait.since)
    return (
        f"it waits ({longest.name}, for {_ago(longest, now)}): {longest.text}; ends when {longest.ends_when}"
    )


def _ago(wait: Wait, now: datetime) -> str:
    return format_duration(max(0.0, (now - wait.since).total_seconds()))
