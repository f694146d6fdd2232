"""What a source may offer of what its scan finds: judged before a word of it is said to the peer.

Goal
    A source that may give only some of what could lie in its folder gives nothing else, whoever writes there meanwhile.
Plan
    Each event of the scan is shown to an admission, which raises where it is not to be offered: the session ends by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import msgspec

from flowengine.errors import Denied, IntegrityError
from flowengine.manifest import DIRECTORY, FILE, Entry, ManifestReader
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    Event,
    LargeBegun,
    LargeEnded,
    LargePiece,
    ScanFailed,
)
from flowengine.store.sealed_open import check_held
from flowengine.trust.sealed import parse_object_name

__all__ = ["Admission", "OnlySealed", "OnlyVersion"]


class Admission(Protocol):
    """Raises where an event is not to be offered; events come in the scan's order."""

    def __call__(self, event: Event) -> None: ...


class OnlyVersion:
    """Admits what a version consists of, in its order; something may be missing, nothing may be added or changed.

    A source shows it the events of its scan; a target what it is offered, by the methods (`transfer.vouched`).

    Args:
        manifest: of the version.
        refusal: the error for what is not of the version.

    Raises:
        IntegrityError: something else came (reason "feed-differs").
    """

    def __init__(self, manifest: ManifestReader, refusal: Callable[[], IntegrityError]) -> None:
        self._manifest = manifest
        self._refusal = refusal
        self._entries = manifest.walk()
        self._folders: list[bytes] = []
        self._chunks: Iterator[bytes] = iter(())
        self._known = b""

    def __call__(self, event: Event) -> None:
        match event:
            case DirectoryEntered(name, _):
                self.enter(name)
            case DirectoryLeft():
                self.leave()
            case Batch(entries=entries):
                self.entries(entries)
            case LargeBegun(entry, _):
                self.large_begin(entry)
            case LargePiece(piece):
                self.large_chunks(piece.packed)
            case LargeEnded(reason, _):
                self.large_end(whole=not reason)
            case ScanFailed():
                raise self._refusal()

    def enter(self, name: bytes) -> None:
        """A directory begins; the first one is the root."""
        if not self._folders:
            self._folders.append(b"")
            return
        found = next(self._entries, None)
        above = self._folders[-1]
        if found is None or found[0] != above or (found[1].kind, found[1].name) != (DIRECTORY, name):
            raise self._refusal()
        self._folders.append(above + b"/" + name if above else name)

    def leave(self) -> None:
        """The current directory ends."""
        self._folders.pop()

    def entries(self, entries: list[Entry]) -> None:
        """The next whole entries of the current directory."""
        for entry in entries:
            self._expect(entry)

    def large_begin(self, entry: Entry) -> None:
        """A large object begins."""
        known = self._expect(entry)
        self._chunks, self._known = self._manifest.chunks(self._folders[-1], known), b""

    def large_chunks(self, packed: bytes) -> None:
        """More chunks of it."""
        while len(self._known) < len(packed):
            if (more := next(self._chunks, b"")) == b"":
                raise self._refusal()
            self._known += more
        if not self._known.startswith(packed):
            raise self._refusal()
        self._known = self._known[len(packed) :]

    def large_end(self, *, whole: bool) -> None:
        """It ends; not whole where it could not be read."""
        if not whole or self._known or next(self._chunks, b""):
            raise self._refusal()

    def _expect(self, entry: Entry) -> Entry:
        """The version's own entry, where it says the same; of a large object but for its chunks."""
        found = next(self._entries, None)
        if found is None or found[0] != self._folders[-1]:
            raise self._refusal()
        known = found[1]
        if known != entry and (entry.chunks or _bare(known) != entry):
            raise self._refusal()
        return known


def _bare(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, chunks=b"", runs=b"", depth=0)


class OnlySealed:
    """Admits sealed objects, and folders that are called as theirs are.

    Args:
        names: of the one folder that was named, which its asker knows.

    Raises:
        Denied: something came that is not sealed (reason "sealed-mixed"); its name is not in the message.
    """

    def __init__(self, names: Collection[bytes]) -> None:
        self._names = names
        self._depth = 0

    def __call__(self, event: Event) -> None:
        match event:
            case DirectoryEntered(name, _):
                if self._depth > 1 or (self._depth and name not in self._names):
                    self._check_name(name)
                self._depth += 1
            case DirectoryLeft():
                self._depth -= 1
            case Batch(entries=entries):
                for entry in entries:
                    self._check(entry, event.path_of(entry))
            case LargeBegun(entry, path):
                self._check(entry, path)
            case ScanFailed(path, _, _):
                self._check_name(path.rpartition(b"/")[2])

    def _check_name(self, name: bytes) -> None:
        if parse_object_name(name) is None:
            raise _mixed()

    def _check(self, entry: Entry, path: bytes) -> None:
        if entry.kind != FILE:
            raise _mixed()
        folder, _, name = path.rpartition(b"/")
        try:
            check_held(folder, name)
        except IntegrityError:
            raise _mixed() from None


def _mixed() -> Denied:
    return Denied(
        "something that is not sealed lies among what this site holds sealed: it may not be sent on as it is",
        hint="at this site: move away what is called otherwise than by 26 letters and digits, or does not begin with "
        "flowseal; then ask again",
        reason="sealed-mixed",
    )
