"""What a target takes from another target: the version that the source's receipt names, and not a byte beside it.

Goal
    A site that passes a version on, and lies, can leave nothing at the site that it serves: no file that the version does
    not have, no other content, and nothing in place of what stood there.
Plan
    The grant names the version. Before it offers anything the feeder shows the version's manifest, which vouches for
    itself: its end names the version, and each page of it has the hash that the page above has. Each offer is compared
    with it, entry by entry and chunk by chunk, before anything is made, wanted or taken from elsewhere for it.
Invariants
    - Nothing is placed before the manifest is whole and of the version that was named.
    - What is placed is of the version; what is missing shows at the end, by the version id of what came.
    - The manifest is kept on disk where it is large, and never more than `MAX_MANIFEST_BYTES` of it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final

from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import Block, Entry, ManifestBuilder, ManifestReader
from flowengine.store.filesystem import local_error
from flowengine.transfer.admission import OnlyVersion
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.units import format_bytes
from flowengine.wire.messages import MAX_MANIFEST_BYTES, Folder

__all__ = ["VouchedRecorder"]

_IN_MEMORY_BYTES: Final = 16 << 20
_DIFFERS: Final = "feed-differs"


class VouchedRecorder(ManifestRecorder):
    """Records what is offered as every target does, and lets nothing pass that a version does not have.

    Every method raises an IntegrityError (reason "feed-differs") for what is not of the version.

    Args:
        version_id: of the version.
        folder: where its manifest is kept meanwhile.
    """

    def __init__(self, builder: ManifestBuilder, version_id: bytes, folder: str) -> None:
        super().__init__(builder)
        self._version_id = version_id
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=folder)  # noqa: SIM115 - see `close`
        self._bytes = 0
        self._only: OnlyVersion | None = None

    def show(self, data: bytes, *, last: bool) -> None:
        """The next bytes of the manifest.

        Raises:
            IntegrityError: it is damaged, or of another version (reason "feed-differs").
            ProtocolError: it has no end, or begins again.
            LocalError: it cannot be kept.
        """
        self._bytes += len(data)
        if self._only is not None or self._bytes > MAX_MANIFEST_BYTES:
            raise ProtocolError(
                f"the source shows a manifest twice, or one of more than {format_bytes(MAX_MANIFEST_BYTES)}",
                hint="update both sides; if that is so, the source errs or lies",
            )
        try:
            self._file.write(data)
        except OSError as error:
            raise local_error(error, "cannot keep a manifest in", self._folder.encode()) from error
        if not last:
            return
        try:
            manifest = ManifestReader(self._read, self._bytes, self._version_id)
        except (IntegrityError, ProtocolError) as error:
            raise _differs(
                f"its manifest is not of the version that it is to pass on: {error.message}"
            ) from error
        self._only = OnlyVersion(manifest, lambda: _differs("it offers what the version does not have"))

    def close(self) -> None:
        """Let the manifest go."""
        self._file.close()

    def _read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    @contextlib.contextmanager
    def _comparing(self) -> Iterator[OnlyVersion]:
        """The version; what is wrong with its manifest shows as it is read, and is told as what differs is."""
        if self._only is None:
            raise _differs("it offers something before it has shown the version's manifest")
        try:
            yield self._only
        except (IntegrityError, ProtocolError) as error:
            if error.reason == _DIFFERS:
                raise
            raise _differs(f"the manifest that it shows is none: {error.message}") from error

    def enter(self, name: bytes) -> None:
        with self._comparing() as version:
            version.enter(name)
        super().enter(name)

    def entries(self, entries: list[Entry], *, check: bool = True) -> None:
        with self._comparing() as version:
            version.entries(entries)
        super().entries(entries, check=check)

    def block(self, block: Block) -> None:
        with self._comparing() as version:
            version.entries(block.entries)
        super().block(block)

    def leaves(self, leaves: Sequence[tuple[Folder, Block | None]]) -> None:
        for folder, block in leaves:
            self.enter(folder.name)
            if block is not None:
                self.block(block)
            self.leave(folder.mode, folder.mtime_ns, b"")

    def large_begin(self, entry: Entry) -> None:
        with self._comparing() as version:
            version.large_begin(entry)
        super().large_begin(entry)

    def large_chunks(self, packed: bytes) -> None:
        with self._comparing() as version:
            version.large_chunks(packed)
        super().large_chunks(packed)

    def large_end(self, *, keep: bool) -> Entry | None:
        with self._comparing() as version:
            version.large_end(whole=keep)
        return super().large_end(keep=keep)

    def leave(self, mode: int, mtime_ns: int, extra: bytes) -> None:
        with self._comparing() as version:
            version.leave()
        super().leave(mode, mtime_ns, extra)


def _differs(why: str) -> IntegrityError:
    return IntegrityError(
        f"the site that was to pass a version on does not give that version: {why}",
        hint="nothing of it landed, and the source itself serves this site; look at the agent of the other one",
        reason=_DIFFERS,
    )
