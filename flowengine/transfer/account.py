"""What is open at the target in one session: objects on their way, directories not finished, and what failed.

Goal
    Each object comes to an end, is told of once, and its directory is finished after the last of its objects.
Plan
    Whoever begins an object enters it; whoever ends it, well or not, strikes it out. The end of a directory is put into
    the publisher's queue by whoever strikes out the last object of it. A placer that is far ahead waits for room.
Invariants
    - Whoever sees that nothing of a directory is open finds its end in the publisher's queue already.
    - A path fails once.
    - What is open is counted, and neither objects nor descriptors of directories grow without bound.
"""

from __future__ import annotations

import os
import queue
import resource
import threading
from collections.abc import Callable
from typing import Final

from flowengine.manifest import Entry
from flowengine.transfer.control import Control
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import NO_ENTRY, TargetDirectory
from flowengine.transfer.subtrees import LEFT_OUT, SubtreesOffer
from flowengine.wire.messages import DirectoryEnd, Failed

__all__ = ["OpenAccount"]

_MAX_OPEN_OBJECTS: Final = 32_768
"""Objects that may be on their way before the placer takes no more offers."""


class OpenAccount:
    """The account of what is open; any thread. `transfer.landing` delivers into it.

    Attributes:
        lock: of all that threads share in one session's landing.
        room: on that lock; told whenever something that is waited for ended.
        publishable: what is complete, for the publisher: (kind, directory, entry, staging name or sink); of kind
            "smalls" the last is a list of (entry, staging name), of kind "block" a block and the number of the staging
            file of its first file, of kind "subtrees" the offer.
        links: hard links that wait for their first name; kept by the publisher.
        closing: nothing more will be offered.
        stopped: nobody is to wait for the publisher any more.
        settled: called once all that was opened has landed or failed.
    """

    def __init__(self, control: Control, counters: Counters) -> None:
        self.control = control
        self.counters = counters
        self.lock = threading.Lock()
        self.room = threading.Condition(self.lock)
        self.stopped = False
        self.directories: dict[bytes, TargetDirectory] = {}
        self.failures: list[tuple[bytes, str, str]] = []
        self.failed_paths: set[bytes] = set()
        # One thread takes from it: with several, a SimpleQueue's `get` with a timeout may wait for ever (see SendingLane).
        self.publishable: queue.SimpleQueue[tuple[str, TargetDirectory, Entry, object] | None] = (
            queue.SimpleQueue()
        )
        self.links: list[tuple[TargetDirectory, Entry]] = []
        self.closing = False
        self.settled: Callable[[], None] = lambda: None
        self._open_objects = 0
        self._max_directories = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    # --- objects ------------------------------------------------------------------------------------------------

    def opened(self, directory: TargetDirectory, name: bytes) -> None:
        """An object is on its way."""
        with self.lock:
            directory.open_names.add(name)
            self._open_objects += 1

    def opened_all(self, directory: TargetDirectory, names: list[bytes]) -> None:
        """Many objects are on their way; inside the lock."""
        directory.open_names.update(names)
        self._open_objects += len(names)

    def landed(self, objects: list[tuple[TargetDirectory, list[bytes]]]) -> None:
        """Objects that were open landed: per directory their names."""
        with self.lock:
            for directory, names in objects:
                before = len(directory.open_names)
                directory.open_names.difference_update(names)
                done = before - len(directory.open_names)
                self._open_objects -= done
                if done and directory.end is not None and not directory.open_names:
                    # Inside the lock: whoever sees that nothing is open finds this in the queue already.
                    self.publishable.put(("directory", directory, NO_ENTRY, None))
            idle = self.closing and self._open_objects == 0
            self.room.notify_all()
        if self.links and objects:
            self.publishable.put(("links", objects[0][0], NO_ENTRY, None))
        if idle and objects:
            self.settled()

    def done(self, directory: TargetDirectory, name: bytes) -> None:
        """An object that was open landed, failed, or was found to be right already."""
        with self.lock:
            if name not in directory.open_names:
                return
            directory.open_names.discard(name)
            self._open_objects -= 1
            if self._open_objects == _MAX_OPEN_OBJECTS:
                self.room.notify_all()
            if directory.end is not None and not directory.open_names:
                self.publishable.put(("directory", directory, NO_ENTRY, None))
            idle = self.closing and self._open_objects == 0
        if self.links:  # one of them may have waited for just this
            self.publishable.put(("links", directory, NO_ENTRY, None))
        if idle:
            self.settled()

    def subtrees_opened(self, offer: SubtreesOffer) -> None:
        """All files of an offer are on their way; inside the lock."""
        offer.directory.open_names.add(offer.token)
        self._open_objects += offer.files

    def given_up(self) -> None:
        """A file of such an offer is not on its way any more; inside the lock."""
        self._open_objects -= 1

    def subtrees_closed(self, offer: SubtreesOffer) -> None:
        """What was still open of such an offer was placed, or failed."""
        directory = offer.directory
        with self.lock:
            self._open_objects -= offer.files - offer.states.count(LEFT_OUT)
            directory.open_names.discard(offer.token)
            if directory.end is not None and not directory.open_names:
                self.publishable.put(("directory", directory, NO_ENTRY, None))
            idle = self.closing and self._open_objects == 0
            self.room.notify_all()
        if idle:
            self.settled()

    def close_offering(self) -> None:
        """Nothing more will be opened; `settled` is called once all that is open is done."""
        with self.lock:
            self.closing = True
            idle = self._open_objects == 0
        if idle:
            self.settled()

    def fail(self, directory: TargetDirectory, name: bytes, reason: str, message: str) -> None:
        """An open object will not land in this session."""
        self.report(directory.child(name), reason, message)
        self.done(directory, name)

    def report(self, path: bytes, reason: str, message: str) -> None:
        """Count and tell a failure; the object must not be open."""
        with self.lock:
            if path in self.failed_paths:
                return
            self.failed_paths.add(path)
            self.failures.append((path, reason, message))
            self.counters.objects_failed += 1
        self.control.post(Failed(path, reason, message))

    def ready(self, kind: str, directory: TargetDirectory, entry: Entry, what: object) -> None:
        """Hand an object that is complete to the publisher."""
        self.publishable.put((kind, directory, entry, what))

    def wait_for_objects(self) -> None:
        """Hold the placer back while very many objects are open: tiny ones cost no credit, but each costs memory."""
        with self.lock:
            while self._open_objects > _MAX_OPEN_OBJECTS and not self.stopped:
                self.room.wait()

    # --- directories --------------------------------------------------------------------------------------------

    def directory_begun(self, directory: TargetDirectory) -> None:
        """A directory was entered; its parent stays open at least as long as it."""
        with self.lock:
            self.directories[directory.path] = directory
            if directory.parent is not None:
                # Names have no slash, so this cannot meet an object of the parent.
                directory.parent.open_names.add(directory.name + b"/")

    def directory_skipped(self, directory: TargetDirectory) -> None:
        """A directory that was entered holds nothing open and is not to be finished."""
        with self.lock:
            self.directories.pop(directory.path, None)
            parent = directory.parent
            if parent is not None:
                parent.open_names.discard(directory.name + b"/")
        if directory.fd >= 0:
            os.close(directory.fd)

    def directory_ended(self, directory: TargetDirectory, end: DirectoryEnd) -> None:
        """No more entries of this directory will be offered."""
        with self.lock:
            quiet = not directory.open_names and directory.is_as(end)
            if not quiet:
                directory.end = end
                if not directory.open_names:
                    self.publishable.put(("directory", directory, NO_ENTRY, None))
        if quiet:  # there is nothing to make durable: no other thread need hear of it
            self.directory_skipped(directory)

    def directory_closed(self, directory: TargetDirectory) -> None:
        """A directory was finished; its descriptor is about to be closed."""
        with self.lock:
            self.directories.pop(directory.path, None)
            self.room.notify_all()

    def wait_for_directories(self, in_use: int) -> None:
        """Hold the placer back while too many directories are open: each costs a descriptor.

        Args:
            in_use: those that the placer itself is in; they are not waited for.
        """
        with self.lock:
            while len(self.directories) - in_use > self._max_directories and not self.stopped:
                self.room.wait()

    def is_short_of_directories(self) -> bool:
        """Whether so many are open that one more that waits for what the source has yet to say may be one too many."""
        return 2 * len(self.directories) > self._max_directories

    def let_go(self) -> None:
        """Nobody is to wait for the publisher any more: it may have failed."""
        with self.lock:
            self.stopped = True
            self.room.notify_all()

    def stop(self) -> None:
        """Let the publisher end after what is queued, and nobody wait for it any more."""
        self.let_go()
        self.publishable.put(None)
