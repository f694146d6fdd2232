"""The publisher: makes durable and visible what has been written whole.

Goal
    Nothing is called landed before it is durable under its final name, and a small object costs few system calls.
Plan
    One thread takes what is complete in batches: sync data, rename, sync directories, report. Then it finishes
    directories, and has it remembered what lies where now (`transfer.remembering`).
Invariants
    - `Landed` counts only what was synced before and after its rename.
    - A directory gets its mode and mtime after the last object in it was published.
"""

from __future__ import annotations

import errno
import os
import queue
import stat
from collections.abc import Callable
from time import monotonic, perf_counter_ns
from typing import Final

from flowengine.manifest import Block, Entry
from flowengine.store.filesystem import local_error, open_beneath, sync_filesystem
from flowengine.store.index_log import IndexLog
from flowengine.store.many import Stat, place_files
from flowengine.store.runs import place_folders, place_run
from flowengine.store.scan_cache import ScanCache
from flowengine.transfer.control import Control
from flowengine.transfer.landing import Landing
from flowengine.transfer.remembering import Placed, PlacedBlock, PlacedMemory, PlacedTree
from flowengine.transfer.sinks import LargeObject, TargetDirectory
from flowengine.transfer.subtrees import WRITTEN, SubtreesOffer
from flowengine.transfer.timing import StageClock
from flowengine.units import show_path
from flowengine.wire.messages import Landed

__all__ = ["Publisher"]

_BATCH_OBJECTS: Final = 2048
_BATCH_BYTES: Final = 8 * 1024 * 1024
"""What is written and not published when the process dies is sent again: keep it little."""
_FULL_BATCH_OBJECTS: Final = 8192
_FULL_BATCH_BYTES: Final = 64 * 1024 * 1024
"""Nor does it get more by taking, without waiting, what came while the last batch was synced: so a slow disk syncs less
often."""
_BATCH_WAIT_S: Final = 0.05
_SYNC_EACH: Final = 8
"""Up to so many files of a batch are synced one by one; more of them with one syncfs."""

_Run = tuple[TargetDirectory, list[tuple[Entry, str]]]
"""Small objects of a directory that are written whole, each with the name of its staging file."""
_BlockRun = tuple[TargetDirectory, Block, int]
"""Files of a block that are written whole, with the number of the first one's staging file."""


class Publisher:
    """Publishes what a `Landing` has complete; its `run` is the body of a thread.

    Attributes:
        memory: what scan cache and chunk index are told of what was placed.
        let_go: closes the old files of a large object that was published.
        make_way: removes a folder that stands where an object must be; None where nothing may be removed.
        needs_final_sync: some finished directories wait for one sync of the file system at the end.
    """

    def __init__(
        self,
        landing: Landing,
        root_fd: int,
        control: Control,
        clock: StageClock,
        cache: ScanCache | None,
        *,
        index_log: IndexLog | None = None,
        tell: Callable[[list[tuple[bytes, int]]], None] | None = None,
    ) -> None:
        self._landing = landing
        self._tell = tell
        self._staging = landing.staging
        self._ready = landing.publishable
        self._counters = landing.counters
        self._root_fd = root_fd
        self._control = control
        self._clock = clock
        self.memory = PlacedMemory(landing, cache, index_log)
        self._finished_directories = 0
        self.needs_final_sync = False
        self.make_way: Callable[[TargetDirectory, bytes], bool] | None = None
        self.let_go: Callable[[LargeObject], None] = LargeObject.drop_old

    def run(self) -> None:
        """Publish what is ready, in batches, until `stop`; blocks."""
        stage = self._clock.stage("sync")
        while True:
            first = self._ready.get()
            if first is None:
                return
            batch = [first]
            count, size = _measure(first)
            ended = False
            while count < _FULL_BATCH_OBJECTS and size < _FULL_BATCH_BYTES:
                waits = count < _BATCH_OBJECTS and size < _BATCH_BYTES and not self._landing.closing
                try:
                    item = self._ready.get(timeout=_BATCH_WAIT_S if waits else 0)
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                    break
                batch.append(item)
                more = _measure(item)
                count, size = count + more[0], size + more[1]
            begin = perf_counter_ns()
            self._publish(batch)
            stage.since(begin)
            if ended:
                return

    def _publish(self, batch: list[tuple[str, TargetDirectory, Entry, object]]) -> None:
        smalls = _smalls(batch)
        blocks = [(d, *what) for kind, d, _, what in batch if kind == "block" and isinstance(what, tuple)]
        trees = [what for kind, _, _, what in batch if kind == "subtrees" and isinstance(what, SubtreesOffer)]
        larges = [
            large
            for kind, _, _, large in batch
            if kind == "large" and isinstance(large, LargeObject) and self._may_publish(large)
        ]
        self._sync_checkpoints(batch)
        self._sync_data(smalls, blocks, larges, trees)
        placed = self._place_smalls(smalls)
        placed_blocks = self._place_blocks(blocks, placed)
        touched = {directory.fd: directory for directory, entries, _ in placed if entries}
        touched.update({directory.fd: directory for directory, _, _ in placed_blocks})
        each = sum([len(tree.folders) for tree in trees]) <= _SYNC_EACH
        placed_trees = [self._place_tree(tree, sync=each) for tree in trees]
        touched.update({tree.directory.fd: tree.directory for tree in trees})
        landed: list[tuple[TargetDirectory, Entry]] = []
        for large in larges:
            assert large.staged is not None
            if self._rename(large.staged.name, large.directory, large.entry):
                landed.append((large.directory, large.entry))
                touched[large.directory.fd] = large.directory
        made = self._make_links(batch)
        landed += made
        touched.update({directory.fd: directory for directory, _ in made})
        try:
            self._sync_directories(self._with_new_parents(list(touched.values())), all_at_once=not each)
        except OSError as error:
            raise local_error(error, "cannot sync", next(iter(touched.values())).path or b".") from error
        for large in larges:
            assert large.staged is not None
            if not large.failed:
                large.staged.forget_journal()
                large.staged.close()
                self.let_go(large)
                self._landing.disown(large)
        placed += [(directory, [entry], [self._look(directory, entry)]) for directory, entry in landed]
        self.memory.add(placed)
        self.memory.add_blocks(placed_blocks)
        self.memory.add_trees(placed_trees)
        if self._tell is not None and (placed or placed_blocks or placed_trees):
            self._tell(
                [(d.child(entry.name), entry.size) for d, entries, _ in placed for entry in entries]
                + [
                    (d.child(entry.name), entry.size)
                    for d, block, _ in placed_blocks
                    for entry in block.entries
                ]
                + [row for tree in placed_trees for row in tree.landed()]
            )
        self._count(placed, placed_blocks, placed_trees)
        self._control.post(Landed(self._counters.objects_done, self._counters.bytes_done))
        self._landing.landed(
            [(d, [entry.name for entry in entries]) for d, entries, _ in placed]
            + [(d, block.names) for d, block, _ in placed_blocks]
        )
        for tree in trees:
            self._landing.subtrees_closed(tree)
        for kind, directory, _, _ in batch:
            if kind == "directory" and self._landing.directories.get(directory.path) is directory:
                self._finish_directory(directory)
        if self._landing.links and not placed and not placed_blocks and not placed_trees:
            self._drop_links()

    def _sync_checkpoints(self, batch: list[tuple[str, TargetDirectory, Entry, object]]) -> None:
        """Make durable what arrived so far of large objects that are far from whole."""
        for kind, _, _, what in batch:
            if kind == "checkpoint":
                assert isinstance(what, LargeObject)
                if not what.failed and what.staged is not None and what.remaining:
                    try:
                        what.staged.sync()
                    except OSError as error:
                        raise local_error(
                            error, "cannot sync", what.directory.child(what.entry.name)
                        ) from error
                    what.synced_at = monotonic()  # it may have taken long, and the disk is to rest as long

    def _make_links(
        self, batch: list[tuple[str, TargetDirectory, Entry, object]]
    ) -> list[tuple[TargetDirectory, Entry]]:
        """Make symbolic links, and hard links whose first name is there; gives those that were made."""
        hard = self._landing.links + [(d, e) for kind, d, e, _ in batch if kind == "hardlink"]
        made = [(d, e) for kind, d, e, _ in batch if kind == "symlink" and self._make_link(d, e)]
        self._landing.links = []
        for directory, entry in hard:
            verdict = self._make_hard_link(directory, entry)
            if verdict is None:
                self._landing.links.append((directory, entry))
            elif verdict:
                made.append((directory, entry))
        return made

    def _count(self, placed: list[Placed], blocks: list[PlacedBlock], trees: list[PlacedTree]) -> None:
        counters = self._counters
        counters.objects_done += sum([len(entries) for _, entries, _ in placed])
        counters.objects_done += sum([block.count for _, block, _ in blocks])
        counters.bytes_done += sum([entry.size for _, entries, _ in placed for entry in entries])
        counters.bytes_done += sum([block.size_bytes for _, block, _ in blocks])
        counters.objects_done += sum([tree.objects for tree in trees])
        counters.bytes_done += sum([tree.size_bytes for tree in trees])

    def _place_blocks(self, blocks: list[_BlockRun], placed: list[Placed]) -> list[PlacedBlock]:
        """Give the files of blocks their names; what is not placed whole is added to `placed`."""
        found: list[PlacedBlock] = []
        for directory, block, first in blocks:
            rows, stats, failed = place_run(self._staging.part(first), first, block, directory.fd)
            if rows is not None:
                found.append((directory, block, rows))
                continue
            lost = {n for n in failed if not self._rename(first + n, directory, block.entries[n])}
            kept = [
                (e, st) for n, (e, st) in enumerate(zip(block.entries, stats, strict=True)) if n not in lost
            ]
            if kept:
                placed.append((directory, [entry for entry, _ in kept], [st for _, st in kept]))
        return found

    def _place_tree(self, tree: SubtreesOffer, *, sync: bool) -> PlacedTree:
        """Make the folders of an offer of whole subtrees, and give the files in them their names."""
        directory, names = tree.directory, tree.columns.names
        try:
            placed = place_folders(
                directory.fd,
                tree.folders,
                self._staging.part(tree.staged),
                tree.staged,
                names,
                tree.left_out,
                sync=sync,
            )
        except OSError as error:
            raise local_error(error, "cannot place folders in", directory.path or b".") from error
        for number, code in enumerate(placed.folder_errors) if any(placed.folder_errors) else ():
            above = tree.parents[number]
            # Below one that could not be made only the files are told.
            if code and (above < 0 or placed.folder_errors[above] <= 0):
                done = "make the folder" if code > 0 else "set mode or time of the folder"
                self._tell_refused(tree.paths[number], code, f"cannot {done}")
        for number, code in enumerate(placed.errors):
            if code > 0:
                self._tell_refused(tree.path_of(number), code, "cannot place")
        return PlacedTree(tree, placed)

    def _tell_refused(self, path: bytes, code: int, done: str) -> None:
        """Report what the system refused for one path; a full disk is no fault of it and suspends the transfer."""
        wrapped = local_error(OSError(abs(code), os.strerror(abs(code))), done, path)
        if wrapped.retryable:
            raise wrapped
        self._landing.report(path, wrapped.reason, wrapped.message)

    def _place_smalls(self, smalls: list[_Run]) -> list[Placed]:
        """Give small objects their names; those that have them now, by directory."""
        moves = [(staged, d.fd, entry.name) for d, run in smalls for entry, staged in run]
        stats, failed = place_files(self._staging.fd, moves)
        lost = {at for at in failed if not self._rename_again(smalls, at)}
        placed: list[Placed] = []
        at = 0
        for directory, run in smalls:
            here = range(at, at + len(run))
            at += len(run)
            if lost.isdisjoint(here):
                placed.append((directory, [entry for entry, _ in run], stats[here.start : here.stop]))
            else:
                kept = [(entry, stats[n]) for n, (entry, _) in zip(here, run, strict=True) if n not in lost]
                placed.append((directory, [entry for entry, _ in kept], [st for _, st in kept]))
        return [one for one in placed if one[1]]

    def _rename_again(self, smalls: list[_Run], number: int) -> bool:
        """What was not renamed may stand behind a folder, or says why it cannot be."""
        for directory, run in smalls:
            if number < len(run):
                entry, staged = run[number]
                return self._rename(staged, directory, entry)
            number -= len(run)
        raise AssertionError("unreachable")

    @staticmethod
    def _look(directory: TargetDirectory, entry: Entry) -> Stat | None:
        try:
            return Stat.of(os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False))
        except OSError:
            return None

    def _drop_links(self) -> None:
        """Hard links whose first name is not on its way any more and never came: they fail."""
        waiting, self._landing.links = self._landing.links, []
        for directory, entry in waiting:
            if self._is_open(entry.link):
                self._landing.links.append((directory, entry))
            else:
                self._landing.fail(
                    directory, entry.name, "link", f"its first name {show_path(entry.link)} did not land"
                )

    def _is_open(self, path: bytes) -> bool:
        parent, _, name = path.rpartition(b"/")
        with self._landing.lock:
            directory = self._landing.directories.get(parent)
            return directory is not None and name in directory.open_names

    def _may_publish(self, large: LargeObject) -> bool:
        """Dress a complete large object; False where it failed after all."""
        assert large.staged is not None
        if large.basis is not None and large.basis.trusted and not large.basis.unchanged():
            # What was copied from it was hashed before it changed, or after: nobody knows.
            large.staged.discard()
            self._landing.fail_sink(
                large, "stale", "the file it replaces was written to while it was copied from"
            )
            return False
        refused = self._landing.dress(large.staged.fd, large.entry)
        if refused:
            self._landing.fail_sink(large, "attributes", refused)
        return not refused

    def _sync_small(self, staged: str | int) -> None:
        name, folder = self._staging.find(staged)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        except PermissionError:  # its own mode forbids reading, to everybody but root
            sync_filesystem(self._staging.fd)
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_data(
        self,
        smalls: list[_Run],
        blocks: list[_BlockRun],
        larges: list[LargeObject],
        trees: list[SubtreesOffer],
    ) -> None:
        try:
            for large in larges:
                assert large.staged is not None
                os.fsync(large.staged.fd)
            count = sum([len(run) for _, run in smalls]) + sum([block.count for _, block, _ in blocks])
            count += sum([tree.files for tree in trees])
            if count > _SYNC_EACH:
                sync_filesystem(self._staging.fd)
            else:
                for _, run in smalls:
                    for _, staged in run:
                        self._sync_small(staged)
                for _, block, first in blocks:
                    for number in range(first, first + block.count):
                        self._sync_small(number)
                for tree in trees:
                    for number in range(tree.files):
                        if tree.states[number] == WRITTEN:
                            self._sync_small(tree.staged + number)
        except OSError as error:
            raise local_error(error, "cannot sync", b"the target") from error

    def _sync_directories(self, directories: list[TargetDirectory], *, all_at_once: bool) -> None:
        if all_at_once or len(directories) > _SYNC_EACH:
            sync_filesystem(self._staging.fd)
        else:
            for directory in directories:
                os.fsync(directory.fd)

    def _with_new_parents(self, directories: list[TargetDirectory]) -> list[TargetDirectory]:
        """The directories and those in which they, or directories above them, were made and not yet synced."""
        found = {id(directory): directory for directory in directories}
        for directory in directories:
            below = directory
            while below.created and not below.linked and below.parent is not None:
                below.linked = True
                below = below.parent
                found[id(below)] = below
        return list(found.values())

    def _rename(self, staged: str | int, directory: TargetDirectory, entry: Entry) -> bool:
        name, folder = self._staging.find(staged)
        places = {"src_dir_fd": folder, "dst_dir_fd": directory.fd}
        try:
            try:
                os.rename(name, entry.name, **places)
            except IsADirectoryError:
                if self.make_way is None or not self.make_way(directory, entry.name):
                    raise
                os.rename(name, entry.name, **places)
            return True
        except OSError as error:
            self._raise_if_full(error, directory, entry)
            self._landing.fail(directory, entry.name, "local", _why_not_placed(error))
            return False

    @staticmethod
    def _raise_if_full(error: OSError, directory: TargetDirectory, entry: Entry) -> None:
        """A full disk is no fault of one object: it suspends the transfer."""
        wrapped = local_error(error, "cannot place", directory.child(entry.name))
        if wrapped.retryable:
            raise wrapped from error

    def _make_link(self, directory: TargetDirectory, entry: Entry) -> bool:
        staged = self._staging.small_name()
        try:
            os.symlink(entry.link, staged.encode(), dir_fd=self._staging.fd)
            os.utime(
                staged, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=self._staging.fd, follow_symlinks=False
            )
        except OSError as error:
            self._raise_if_full(error, directory, entry)
            self._landing.fail(directory, entry.name, "local", error.strerror or str(error))
            return False
        return self._rename(staged, directory, entry)

    def _make_hard_link(self, directory: TargetDirectory, entry: Entry) -> bool | None:
        """Link to the first name; None while that is still on its way."""
        if self._is_open(entry.link):
            return None
        if entry.link in self._landing.failed_paths:
            self._landing.fail(
                directory, entry.name, "link", f"its first name {show_path(entry.link)} did not land"
            )
            return False
        staged = self._staging.small_name()
        parent, _, name = entry.link.rpartition(b"/")
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            # Component by component: the kernel would follow a link in the middle out of the root.
            fd = open_beneath(self._root_fd, parent, flags) if parent else os.dup(self._root_fd)
            try:
                before = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISREG(before.st_mode):
                    raise OSError(errno.EINVAL, "it is not a file")
                os.link(
                    name, staged.encode(), src_dir_fd=fd, dst_dir_fd=self._staging.fd, follow_symlinks=False
                )
            finally:
                os.close(fd)
        except OSError as error:
            self._landing.fail(
                directory, entry.name, "link", f"cannot link to {show_path(entry.link)}: {error.strerror}"
            )
            return False
        placed = self._rename(staged, directory, entry)
        if placed:
            self.memory.relinked(entry, before, directory)
        if placed:  # rename(2) between two names of one inode does nothing and leaves the first
            try:
                os.unlink(staged, dir_fd=self._staging.fd)
            except FileNotFoundError:
                pass
        return placed

    def _sync_finished(self, directory: TargetDirectory) -> None:
        """A few directories are synced one by one; more of them at the end, with one syncfs."""
        self._finished_directories += 1
        if self._finished_directories <= _SYNC_EACH:
            for one in self._with_new_parents([directory]):
                os.fsync(one.fd)
        else:
            self.needs_final_sync = True

    def _finish_directory(self, directory: TargetDirectory) -> None:
        end = directory.end
        assert end is not None
        try:
            if end.apply:
                st = os.fstat(directory.fd)
                if end.extra and self._landing.apply_extra is not None:
                    self._landing.apply_extra(directory.fd, end.extra)
                if stat.S_IMODE(st.st_mode) != end.mode:
                    os.fchmod(directory.fd, end.mode)
                if st.st_mtime_ns != end.mtime_ns:
                    os.utime(directory.fd, ns=(end.mtime_ns, end.mtime_ns))
                if (
                    directory.created
                    or stat.S_IMODE(st.st_mode) != end.mode
                    or st.st_mtime_ns != end.mtime_ns
                ):
                    self._sync_finished(directory)
            self.memory.finish(directory)
        except OSError as error:
            self._landing.report(
                directory.path or b".", "local", f"cannot set mode or time: {error.strerror}"
            )
        finally:
            self._landing.directory_closed(directory)
            os.close(directory.fd)
            self.memory.forget(directory)
            parent = directory.parent
            if parent is not None:
                with self._landing.lock:
                    parent.open_names.discard(directory.name + b"/")
                    ready = parent.end is not None and not parent.open_names
                if ready:
                    self._finish_directory(parent)


def _smalls(batch: list[tuple[str, TargetDirectory, Entry, object]]) -> list[_Run]:
    """The small objects of a batch, one run for those of a directory that come together."""
    runs: list[_Run] = []
    for kind, directory, entry, what in batch:
        if kind == "smalls" and isinstance(what, list):
            run = what
        elif kind == "small" and isinstance(what, str):
            run = [(entry, what)]
        else:
            continue
        if runs and runs[-1][0] is directory:
            runs[-1] = (directory, runs[-1][1] + run)
        else:
            runs.append((directory, run))
    return runs


def _measure(item: tuple[str, TargetDirectory, Entry, object]) -> tuple[int, int]:
    """(objects, bytes) that an item of the queue stands for."""
    kind, _, entry, what = item
    if isinstance(what, SubtreesOffer):
        return what.files, what.size_bytes
    if kind == "block" and isinstance(what, tuple):
        return what[0].count, what[0].size_bytes
    if kind == "smalls" and isinstance(what, list):
        return len(what), sum([one.size for one, _ in what])
    return 1, entry.size


def _why_not_placed(error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return "a folder of this name is in the way at the target; remove it or sync with --delete"
    return error.strerror or str(error)
