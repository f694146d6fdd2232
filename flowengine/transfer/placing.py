"""Decides, offer by offer, what is at hand at the target and what is wanted.

Goal
    A cold copy, a resume, a delta and a repair are one code path: what is in place, in staging, on its way or
    elsewhere at hand is never asked for.
Plan
    One thread takes the source's messages in order. For each directory it lists what stands there and asks the scan
    cache about it; for each entry it compares, for each chunk it looks in place, in staging, among what is on its way
    or has just arrived, and in the file that is replaced. The rest is wanted. Copies go to the copier threads.
    `placing_small` and `placing_large` do so for the two kinds of objects; here are the directories.
Invariants
    - Offers are answered in order, each exactly once.
    - An entry name reaches the file system only after the manifest's and the path validator's checks.
    - A dry run answers "none" to everything and touches nothing.
    - With `rename` the target asked for one file under one name: nothing else is touched in the folder it lands in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from flowengine.errors import ProtocolError
from flowengine.store.filesystem import READ_FOLDER, local_error
from flowengine.store.many import list_folder
from flowengine.store.proofs import recall, split_proof
from flowengine.transfer.placement import Placement
from flowengine.transfer.placing_large import LargePlacer
from flowengine.transfer.placing_small import SmallPlacer
from flowengine.transfer.placing_subtrees import SubtreesPlacer
from flowengine.transfer.refining import Refiner
from flowengine.transfer.sinks import TargetDirectory
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Finer,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Subtrees,
)
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME, check_name

__all__ = ["Placer"]


class Placer:
    """The target's answer to each message of the source. For use by one thread.

    Args:
        extras: given (directory path, names) of what stands at the target and was not offered.
    """

    def __init__(
        self,
        placement: Placement,
        extras: Callable[[bytes, list[bytes]], None],
        *,
        folds_names: bool = False,
    ) -> None:
        self._placement = placement
        self._refiner = Refiner(placement)
        self._small = SmallPlacer(placement, self._refiner)
        self._large = LargePlacer(placement, self._refiner)
        self._subtrees = SubtreesPlacer(placement, self.handle, self._current)
        self._extras = extras
        self._filters = FilterSet.from_wire(placement.options.filters)
        self._only = placement.options.rename
        self._folds_names = folds_names
        self._stack: list[TargetDirectory] = []
        self.root_is_one_directory = True
        self.root_is_left = False

    # --- messages -----------------------------------------------------------------------------------------------

    def handle(self, message: Message | EncodedOffer) -> None:
        """Act on one message.

        Raises:
            ProtocolError: it contradicts the protocol, the limits or itself.
            FlowError: the local system refused in a way that ends the session.
        """
        match message:
            case EncodedOffer():
                if self._large.inside or self._only or not self._small.offer_block(self._current(), message):
                    self.handle(message.decode())
            case Offer():
                directory = self._current()
                if self._large.inside:
                    raise ProtocolError("the source offered entries inside a large object")
                if self._only:
                    self._check_only([entry.name for entry in message.entries])
                self._small.offer(directory, message)
            case ObjectRun():
                self._large.run(message)
            case Finer():
                self._refiner.offered(message)
            case ObjectBegin():
                if self._only:
                    self._check_only([message.entry.name])
                self._large.begin(self._current(), message.entry)
            case ObjectEnd():
                self._large.end(message)
            case DirectoryBegin():
                self._directory_begin(message.name)
            case DirectoryEnd():
                self._directory_end(message)
            case Subtrees(folders):
                if self._large.inside:
                    raise ProtocolError("the source offered folders inside a large object")
                if self._only:  # refused with the first
                    self._check_only([folders[0].name + b"/"] if folders else [])
                self._subtrees.offer(folders, len(self._stack))

    def _check_only(self, names: list[bytes]) -> None:
        if names != [self._only]:
            other = next((name for name in names if name != self._only), self._only)
            raise ProtocolError(
                f"the source was to send one file as {show_path(self._only)} and offered {show_path(other[:200])}",
                hint="is it still a file? Then the source errs or lies",
            )

    def stop(self) -> None:
        """Let the placer's thread not wait for copies any more. For any thread."""
        self._large.stop()

    def _current(self) -> TargetDirectory:
        if not self._stack:
            raise ProtocolError("the source offered something outside any directory")
        return self._stack[-1]

    # --- directories --------------------------------------------------------------------------------------------

    def _directory_begin(self, name: bytes) -> None:
        if self._large.inside:
            raise ProtocolError("the source entered a directory inside a large object")
        self._placement.recorder.enter(name)
        if not self._stack:
            directory = TargetDirectory(
                b"",
                b"",
                os.dup(self._placement.root_fd) if self._placement.root_fd >= 0 else -1,
                None,
                created=False,
            )
        else:
            if self._only:
                self._check_only([name + b"/"])
            parent = self._stack[-1]
            check_name(name, reserved=(STAGING_NAME,))
            if len(self._stack) >= MAX_DEPTH or len(parent.path) + len(name) + 1 > MAX_PATH_BYTES:
                raise ProtocolError(
                    f"the path {show_path(parent.child(name))} is deeper or longer than allowed"
                )
            if parent.offered is not None:
                parent.offered.add(name)
            path = parent.child(name)
            self._placement.landing.wait_for_directories(len(self._stack))
            if self._placement.collides(parent, name):
                directory = TargetDirectory(path, name, -1, parent, created=False)
            else:
                fd, created = self._make_directory(parent, name, path)
                directory = TargetDirectory(path, name, fd, parent, created=created)
        if (self._placement.options.delete and not self._only) or self._placement.atomic:
            directory.offered = set()
        if self._folds_names:
            directory.keys = {}
        if directory.fd >= 0 and not directory.created:
            self._list(directory)
        self._placement.landing.directory_begun(directory)
        self._stack.append(directory)

    def _make_directory(self, parent: TargetDirectory, name: bytes, path: bytes) -> tuple[int, bool]:
        """(descriptor, whether it is new); -1 where it cannot be had: then all below it fails by name."""
        if parent.fd < 0:
            return -1, False
        try:
            if not self._placement.dry and not parent.has_folder(name):
                try:
                    os.mkdir(name, 0o700, dir_fd=parent.fd)
                    return os.open(name, READ_FOLDER, dir_fd=parent.fd), True
                except FileExistsError:
                    pass
            try:
                return os.open(name, READ_FOLDER, dir_fd=parent.fd), False
            except FileNotFoundError:
                return -1, False
            except OSError:
                if self._placement.dry:
                    return -1, False
                if stat.S_ISDIR(os.stat(name, dir_fd=parent.fd, follow_symlinks=False).st_mode):
                    raise
                os.unlink(name, dir_fd=parent.fd)  # a file or link stands where the source has a folder
                os.mkdir(name, 0o700, dir_fd=parent.fd)
                return os.open(name, READ_FOLDER, dir_fd=parent.fd), True
        except OSError as error:
            wrapped = local_error(error, "cannot make the folder", path)
            if wrapped.retryable:
                raise wrapped from error
            self._placement.landing.report(path, wrapped.reason, wrapped.message)
            return -1, False

    def _list(self, directory: TargetDirectory) -> None:
        """What stands in the directory now, and what the scan cache knows of it."""
        directory.st = os.fstat(directory.fd)
        listing = directory.listing = list_folder(directory.fd, LARGE_OBJECT_BYTES, STAGING_NAME)
        if listing.error is not None:
            raise local_error(listing.error, "cannot list", directory.path or b".") from listing.error
        if directory.parent is not None and not self._placement.dry and listing.marked is not None:
            self._placement.landing.staging.check_not_written(b"/proc/self/fd/%d" % directory.fd)
        if self._placement.cache is None or not len(listing.smalls):
            return
        hit, known = recall(self._placement.cache, directory.st, listing.proof)
        if hit is not None:
            directory.recall(hit)
        elif known:
            for name, proof in zip(listing.smalls.names, split_proof(listing.proof), strict=True):
                entry = known.get(proof)
                if entry is not None:
                    directory.known[name] = entry

    def _directory_end(self, message: DirectoryEnd) -> None:
        directory = self._current()
        if self._large.inside:
            raise ProtocolError("the source closed a directory inside a large object")
        if directory.parent is None:
            if self._only and message.apply:
                raise ProtocolError("the source was to send one file, and says how its folder is to be")
            self.root_is_one_directory = message.apply
            self.root_is_left = True
        self._placement.check_mode(message.mode)
        self._placement.recorder.leave(message.mode, message.mtime_ns, message.extra)
        self._stack.pop()
        if directory.offered is not None and message.complete:
            extra = [
                name
                for name in directory.existing
                if name not in directory.offered and self._may_delete(directory, name)
            ]
            if extra:
                self._extras(directory.path, sorted(extra))
        if self._placement.dry or directory.fd < 0:
            self._placement.landing.directory_skipped(directory)
            return
        if directory.learned:
            self._keep_learned(directory)
        self._placement.landing.directory_ended(directory, message)

    def _keep_learned(self, directory: TargetDirectory) -> None:
        """Tell the scan cache what was read of a directory in which nothing else happened; else the publisher does."""
        cache, st = self._placement.cache, directory.st
        part = directory.part() if directory.unchanged_all and cache is not None and st is not None else None
        if part is None:
            directory.unchanged_all = False
        elif cache is not None and st is not None:
            cache.save_directory(st.st_dev, st.st_ino, [part])

    def _may_delete(self, directory: TargetDirectory, name: bytes) -> bool:
        """What a filter hides from the transfer is safe from it."""
        st = directory.existing[name]
        return self._filters.allows(directory.child(name), stat.S_ISDIR(st.st_mode))
