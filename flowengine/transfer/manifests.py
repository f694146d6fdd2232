"""Manifests of what lies on this machine, or behind a ticket: made by reading, for `verify`, `manifest` and `diff`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from flowengine.chunking import profile_named
from flowengine.errors import NotFound
from flowengine.manifest import FLAG_SPARSE, Change, Header, ManifestBuilder, ManifestReader, Summary, diff
from flowengine.store.buffers import BufferPool
from flowengine.store.reading import SEGMENT_BYTES, ObjectReader
from flowengine.store.scan import Scanner
from flowengine.store.scan_cache import ScanCache
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    LargeBegun,
    LargeEnded,
    LargePiece,
    ScanFailed,
)
from flowengine.store.selection import Selection
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters
from flowengine.units import show_path
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import Options

__all__ = ["copy_manifest", "differences", "make_manifest", "open_manifest", "scratch_file"]

Failure = tuple[bytes, str, str]


def make_manifest(
    selection: Selection,
    sink: Callable[[bytes], object] | None,
    *,
    profile: str,
    options: Options,
    cache: ScanCache | None,
    threads: int,
    counters: Counters,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Summary, list[Failure]]:
    """Read a selection and build its manifest.

    Args:
        sink: given the manifest's bytes; None where only the ids are wanted.
        cache: None reads every byte.
        tick: called now and then, for progress.
    """
    chunking = profile_named(profile)
    pool = BufferPool(6, SEGMENT_BYTES + chunking.maximum)
    reader = ObjectReader(chunking, pool, threads)
    scanner = Scanner(
        selection,
        reader,
        pool,
        cache,
        filters=FilterSet.from_wire(options.filters),
        xattrs=options.xattrs,
        owner=options.owner,
    )
    recorder = ManifestRecorder(
        ManifestBuilder(sink, Header(chunking, xattrs=options.xattrs, owner=options.owner))
    )
    failures: list[Failure] = []
    try:
        for event in scanner.events():
            match event:
                case Batch():
                    recorder.batch(event)
                    if event.buffer is not None:
                        event.buffer.release()
                case LargePiece():
                    recorder.large_chunks(event.piece.packed)
                    if event.piece.buffer is not None:
                        event.piece.buffer.release()
                case LargeBegun(entry, _):
                    recorder.large_begin(entry)
                case LargeEnded(reason, _):
                    recorder.large_end(keep=not reason)
                case DirectoryEntered(name, _):
                    recorder.enter(name)
                case DirectoryLeft(mode, mtime_ns, extra, _, _):
                    recorder.leave(mode, mtime_ns, extra)
                case ScanFailed(path, reason, message):
                    failures.append((path, reason, message))
            counters.objects, counters.size_bytes = scanner.objects, scanner.size_bytes
            counters.bytes_read, counters.objects_read = scanner.bytes_read, scanner.objects_read
            tick()
    finally:
        reader.close()
        if cache is not None:
            cache.flush()
    return recorder.finish(), failures


@contextmanager
def scratch_file() -> Iterator[BinaryIO]:
    """A manifest on disk that nobody else sees and that goes away by itself."""
    with tempfile.TemporaryFile(prefix="flow-manifest-") as file:
        yield file


def open_manifest(source: str | bytes | BinaryIO) -> ManifestReader:
    """A reader of a manifest file; the file stays open as long as the reader lives.

    Raises:
        NotFound: there is no such file.
        IntegrityError, ProtocolError: it is damaged or no manifest.
    """
    if isinstance(source, str | bytes):
        try:
            fd = os.open(source, os.O_RDONLY)
        except FileNotFoundError:
            raise NotFound(
                f"there is no manifest {show_path(os.fsencode(source))}", hint="flow manifest PATH writes one"
            ) from None
    else:
        source.flush()
        fd = os.dup(source.fileno())
    return _OpenManifest(fd)


class _OpenManifest(ManifestReader):
    """A reader that owns its file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.file_bytes = os.fstat(fd).st_size
        super().__init__(lambda offset, length: os.pread(fd, length, offset), self.file_bytes)

    def __del__(self) -> None:
        os.close(self.fd)


def copy_manifest(reader: ManifestReader, where: str) -> None:
    """Write the manifest that a reader of `open_manifest` reads to a file, or to stdout for "-"."""
    assert isinstance(reader, _OpenManifest)
    with open(1 if where == "-" else f"{where}.part", "wb", closefd=where != "-") as out:
        for offset in range(0, reader.file_bytes, 1 << 20):
            out.write(os.pread(reader.fd, 1 << 20, offset))
    if where != "-":
        os.replace(f"{where}.part", where)


def differences(before: ManifestReader, after: ManifestReader) -> Iterator[Change]:
    """What differs, apart from where holes lie: that is the file system's business, not the content's."""
    for change in diff(before, after):
        if change.kind == "metadata" and change.before is not None and change.after is not None:
            old, new = change.before, change.after
            if (old.mode, old.mtime_ns, old.extra) == (new.mode, new.mtime_ns, new.extra) and (
                old.flags ^ new.flags
            ) & ~FLAG_SPARSE == 0:
                continue
        yield change
