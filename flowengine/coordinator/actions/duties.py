"""What agents tell of duties that they carried out: quarantine, destruction."""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from flowengine.api.agents import Disposed
from flowengine.coordinator.database.tables import tasks
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.database.transfers import lock_transfer, settle
from flowengine.coordinator.rules.states import POLICY_ENDS
from flowengine.errors import NotFound

__all__ = ["dispose", "quarantines_of"]

_ORDER = ("", "none", "quarantined", "purged")


def dispose(writing: Writing, site: str, said: Disposed) -> None:
    """Take note of what became of data at a target; what was purged does not come back.

    Raises:
        NotFound: there is no such task with that target.
    """
    transfer = lock_transfer(writing, said.task.rpartition(".")[0])
    row = writing.connection.execute(select(tasks).where(tasks.c.id == said.task)).first()
    if row is None or row.target_site != site:
        raise NotFound(f"there is no task {said.task} to site {site}")
    disposal = said.disposal
    if _ORDER.index(disposal.state) <= _ORDER.index(row.disposal):
        return
    values = {"disposal": disposal.state, "disposed": json_text(disposal)}
    if row.state == "done" and disposal.state != "none":
        values |= {"reason": disposal.cause[:64], "message": disposal.why[:2000]}
    writing.connection.execute(update(tasks).where(tasks.c.id == said.task).values(**values))
    if disposal.state != "none":
        writing.emit(
            f"task.{disposal.state}",
            transfer=row.transfer,
            site=site,
            user=transfer.user,
            tenant=row.tenant,
            task=row.id,
            cause=disposal.cause,
            why=disposal.why,
            objects=disposal.objects,
            size_bytes=disposal.size_bytes,
            certificate=disposal.certificate,
        )
    settle(writing, row.transfer)


def quarantines_of(connection: Connection, site: str) -> dict[str, str]:
    """Tasks to a site that policy ended and of which it has not told what became: with the reason in words."""
    query = select(tasks.c.id, tasks.c.message).where(
        tasks.c.target_site == site,
        tasks.c.state == "failed",
        tasks.c.reason.in_(POLICY_ENDS),
        tasks.c.disposal == "",
    )
    return {row.id: row.message for row in connection.execute(query)}
