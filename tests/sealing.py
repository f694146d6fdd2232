"""Sealed trees without a transfer: what a source would offer, written to a folder as a target would."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flowengine.chunking import CHUNK_BYTES, DEFAULT_PROFILE, chunk_id
from flowengine.store.buffers import BufferPool
from flowengine.store.reading import SEGMENT_BYTES
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
from flowengine.store.sealed_scan import SealedScanner
from flowengine.store.selection import select
from flowengine.trust.sealed import SealingKey

__all__ = ["chunks_of", "events_of", "seal_into"]


def events_of(source: str, key: SealingKey, **options: Any) -> tuple[list[Event], SealedScanner]:
    """All events of a sealed scan; buffers are never given back, so few bytes may be scanned."""
    pool = BufferPool(64, SEGMENT_BYTES + DEFAULT_PROFILE.maximum)
    scanner = SealedScanner(select([os.fsencode(source)]), key, DEFAULT_PROFILE, pool, **options)
    return list(scanner.events()), scanner


def _rows(packed: bytes) -> list[tuple[int, bytes]]:
    return [
        (int.from_bytes(packed[at : at + 4], "little"), packed[at + 4 : at + CHUNK_BYTES])
        for at in range(0, len(packed), CHUNK_BYTES)
    ]


def chunks_of(events: list[Event]) -> list[bytes]:
    """Ids of all chunks, in order."""
    found = []
    for event in events:
        if isinstance(event, Batch):
            found += [name for entry in event.entries for _, name in _rows(entry.chunks)]
        elif isinstance(event, LargePiece):
            found += [name for _, name in _rows(event.piece.packed)]
    return found


def seal_into(source: str, target: Path, key: SealingKey, **options: Any) -> list[ScanFailed]:
    """Write what a source would offer; checks chunks, sizes and the order of names on the way."""
    events, _ = events_of(source, key, **options)
    folders = [target]
    last = [b""]
    failures = []
    large: Path | None = None
    size = 0
    for event in events:
        match event:
            case DirectoryEntered(name, _):
                folders.append(folders[-1] / os.fsdecode(name) if name else target)
                folders[-1].mkdir(parents=True, exist_ok=True)
                last.append(b"")
            case DirectoryLeft():
                folders.pop()
                last.pop()
            case Batch():
                assert event.buffer is not None
                for entry, start in zip(event.entries, event.starts, strict=True):
                    assert entry.name > last[-1]
                    last[-1] = entry.name
                    data = bytes(event.buffer.view[start : start + entry.size])
                    _check(data, entry.chunks)
                    (folders[-1] / os.fsdecode(entry.name)).write_bytes(data)
            case LargeBegun(entry, _):
                assert entry.name > last[-1]
                last[-1] = entry.name
                large, size = folders[-1] / os.fsdecode(entry.name), entry.size
                large.write_bytes(b"")
            case LargePiece():
                assert large is not None
                assert event.piece.buffer is not None
                data = bytes(event.piece.buffer.view[: event.piece.size_bytes])
                _check(data, event.piece.packed)
                with open(large, "ab") as file:
                    file.write(data)
            case LargeEnded(reason, _):
                assert large is not None
                if reason:
                    large.unlink()
                else:
                    assert large.stat().st_size == size
            case ScanFailed():
                failures.append(event)
    return failures


def _check(data: bytes, packed: bytes) -> None:
    at = 0
    for length, name in _rows(packed):
        assert chunk_id(data[at : at + length]) == name
        at += length
    assert at == len(data)
