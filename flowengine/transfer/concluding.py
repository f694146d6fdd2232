"""The end of a session at the target: what is deleted, made durable, kept and told once all has landed or failed.

Goal
    A session is called complete only if it is, and nothing is deleted on the word of half a source.
Plan
    In this order: what stands here and not at the source goes, if that was asked for and all else is well; then all is
    made durable, then published where it is published at once; then what is remembered of it is kept.
Invariants
    - Nothing is deleted where anything failed, the source was not read whole, or it is empty.
    - What the next command counts on is on disk before the receipt goes out.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field

from flowengine.store.atomic import AtomicTree
from flowengine.store.filesystem import READ_FOLDER, open_beneath, sync_filesystem
from flowengine.store.landed import LandedManifest
from flowengine.store.scan_cache import ScanCache
from flowengine.transfer.landing import Landing
from flowengine.transfer.placing import Placer
from flowengine.transfer.publishing import Publisher
from flowengine.transfer.session import Session
from flowengine.transfer.timing import bottleneck_line
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import Finish

__all__ = ["Conclusion", "TargetOutcome", "remove_tree"]


@dataclass
class TargetOutcome:
    """How a session ended at the target.

    Attributes:
        state: "completed", or "incomplete" when some objects failed or the source could not be read whole.
        failures: (path, reason, message), those reported by the source included.
        extras: what stands at the target and not at the source, as paths; deleted if that was asked for.
        bottleneck: the one line that says what limited the transfer.
    """

    state: str
    version_id: bytes
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)
    extras: list[bytes] = field(default_factory=list)
    bottleneck: str = ""


class Conclusion:
    """Brings a session to its end.

    Args:
        record: as of `TargetRoot`.

    Attributes:
        extras: what stands at the target and not at the source: (folder, names); filled by the placer.
    """

    def __init__(
        self,
        session: Session,
        record: LandedManifest | None,
        root_fd: int,
        caches: tuple[ScanCache | None, ScanCache | None],
        landing: Landing,
        publisher: Publisher,
    ) -> None:
        self._session = session
        self._record = record
        self._root_fd = root_fd
        self._caches = caches
        self._landing = landing
        self._publisher = publisher
        self.extras: list[tuple[bytes, list[bytes]]] = []

    def reach(
        self,
        tree: AtomicTree | None,
        placer: Placer,
        finish: Finish,
        source_failures: list[tuple[bytes, str, str]],
    ) -> TargetOutcome:
        """Everything landed or failed: delete what is to be deleted, make it durable, keep the manifest; for a thread.

        Args:
            tree: where the version is published at once.
            finish: what the source said of the end.
            source_failures: what it could not give.
        """
        options, landing = self._session.options, self._landing
        extras = [path + b"/" + name if path else name for path, names in self.extras for name in names]
        failed = bool(source_failures or landing.failures)
        # A folder that was not read whole names no extras: that nothing was deleted in it must be said as well.
        if not options.dry_run and (
            (extras and (options.delete or tree is not None))
            or (options.delete and (failed or not finish.complete))
        ):
            refusal = self._why_not_delete(finish, failed)
            if refusal:
                landing.report(b".", "delete-refused", refusal)
            else:
                self._delete()
        # Both ends may have a word on one object; the source's comes first and is kept.
        told = {failure[0]: failure for failure in [*landing.failures, *source_failures]}
        failures = list(told.values())
        state = "completed" if not failures and finish.complete else "incomplete"
        if not options.dry_run:
            if tree is not None:
                if state == "completed":
                    tree.publish(None if placer.root_is_one_directory else 0o755)
            elif self._publisher.needs_final_sync or extras:
                sync_filesystem(self._root_fd)
            self._publisher.memory.flush_index(last=True)
            for cache in self._caches:  # before the receipt: who runs the next command counts on it
                if cache is not None:
                    cache.flush()
            if self._record is not None:
                if state == "completed":
                    self._record.commit(beside=not placer.root_is_one_directory)
                else:
                    self._record.abandon()
        return TargetOutcome(state, finish.version_id, failures, extras, self._bottleneck())

    def _why_not_delete(self, finish: Finish, failed: bool) -> str:
        if not self._session.options.delete:
            return (
                "the target holds what the source does not have, and publishing at once replaces the whole folder: "
                "add --delete to agree, or publish object by object"
            )
        if not finish.objects:
            return "nothing was deleted: the source is empty, which is more often a mistake than a wish"
        if failed or not finish.complete:
            return "nothing was deleted: the source was not read whole, or some objects failed"
        return ""

    def _delete(self) -> None:
        filters = FilterSet.from_wire(self._session.options.filters)
        for path, names in self.extras:
            fd = (
                open_beneath(self._root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
                if path
                else os.dup(self._root_fd)
            )
            try:
                before = os.fstat(fd)
                for name in names:
                    try:
                        if remove_tree(fd, name, path + b"/" + name if path else name, filters):
                            self._landing.counters.objects_deleted += 1
                    except OSError as error:
                        self._landing.report(
                            path + b"/" + name if path else name, "local", f"cannot delete: {error.strerror}"
                        )
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            finally:
                os.close(fd)

    def _bottleneck(self) -> str:
        source: dict[str, int] = {}
        threads = self._session.clock.threads()
        for name, value in self._session.peer_counters().items():
            if name.startswith("busy."):
                source[name[5:]] = value
            elif name.startswith("threads."):
                threads[name[8:]] = value
        return bottleneck_line(
            source, self._session.clock.busy_ms(), self._session.clock.elapsed_s(), threads
        )


def remove_tree(parent_fd: int, name: bytes, path: bytes, filters: FilterSet) -> bool:
    """Remove a name and what is below it, but for what a filter hides; whether all of it is gone.

    Args:
        path: of the name, from the target's root, as filters see it.
    """
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent_fd)
        return True
    if not filters:
        shutil.rmtree(os.fsdecode(name), dir_fd=parent_fd)
        return True
    gone = True
    fd = os.open(name, READ_FOLDER, dir_fd=parent_fd)
    try:
        for below in [os.fsencode(item) for item in os.listdir(fd)]:
            is_dir = stat.S_ISDIR(os.stat(below, dir_fd=fd, follow_symlinks=False).st_mode)
            child = path + b"/" + below
            gone = filters.allows(child, is_dir) and remove_tree(fd, below, child, filters) and gone
    finally:
        os.close(fd)
    if gone:
        os.rmdir(name, dir_fd=parent_fd)
    return gone
