"""Scans as tests look at them: what was told, whatever batches and pieces it came in, and the version that it makes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.manifest import Header, ManifestBuilder
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
from flowengine.store.selection import select
from flowengine.transfer.recorder import ManifestRecorder

__all__ = ["Told", "scan"]


@dataclass
class Told:
    """What a scan told.

    Attributes:
        events: in order; of a batch each entry with its place, of a large object all its chunks together.
        objects, size_bytes, complete: as the scanner has them at its end.
        version: the id of what was told.
    """

    events: list[tuple[Any, ...]] = field(default_factory=list)
    objects: int = 0
    size_bytes: int = 0
    complete: bool = True
    version: bytes = b""


def scan(
    *paths: Path | str | bytes,
    cache: ScanCache | None = None,
    files_from: list[bytes] | None = None,
    seen: Callable[[object], None] = lambda event: None,
    **options: Any,
) -> Told:
    """Scan a selection to its end; what was learned is in the cache then.

    Args:
        paths: as of a command: with a slash at the end the contents of a folder.
        seen: shown each event before it is taken note of.
        options: of the scanner.
    """
    selection = select([os.fsencode(path) for path in paths], files_from)
    pool = BufferPool(8, SEGMENT_BYTES + DEFAULT_PROFILE.maximum)
    reader = ObjectReader(DEFAULT_PROFILE, pool, 1)
    scanner = Scanner(selection, reader, pool, cache, **options)
    header = Header(DEFAULT_PROFILE, xattrs=options.get("xattrs", False), owner=options.get("owner", False))
    recorder = ManifestRecorder(ManifestBuilder(None, header))
    told = Told()
    try:
        for event in scanner.events():
            seen(event)
            _note(told.events, recorder, event)
    finally:
        reader.close()
        if cache is not None:
            cache.flush()
    told.objects, told.size_bytes, told.complete = scanner.objects, scanner.size_bytes, scanner.complete
    told.version = recorder.finish().version_id
    return told


def _note(events: list[tuple[Any, ...]], recorder: ManifestRecorder, event: object) -> None:
    match event:
        case Batch():
            recorder.batch(event)
            events += [("entry", event.path_of(one), one) for one in event.entries]
            if event.buffer is not None:
                event.buffer.release()
        case LargeBegun(entry, path):
            recorder.large_begin(entry)
            events += [("large", path, entry), ("chunks", b"")]
        case LargePiece(piece):
            recorder.large_chunks(piece.packed)
            events[-1] = ("chunks", events[-1][1] + piece.packed)
            if piece.buffer is not None:
                piece.buffer.release()
        case LargeEnded(reason, _):
            recorder.large_end(keep=not reason)
            events.append(("large ended", reason))
        case DirectoryEntered(name, path):
            recorder.enter(name)
            events.append(("enter", name, path))
        case DirectoryLeft(mode, mtime_ns, extra, complete, apply):
            recorder.leave(mode, mtime_ns, extra)
            events.append(("leave", mode, mtime_ns, extra, complete, apply))
        case ScanFailed(path, reason, _):
            events.append(("failed", path, reason))
