"""Small objects that arrive: verified and written whole from the lane's buffer, or put together where they come apart.

Goal
    A small object costs a handful of system calls, many of them one call.
Plan
    What came of an offer is verified as a whole. Files of a block go the way of `transfer.landing_blocks`; other whole
    objects are written many to a call; one whose chunks arrive apart gets a sink that fills up.
Invariants
    - Nothing is written of a run before all of the run was hashed.
"""

from __future__ import annotations

import os
from collections.abc import Container
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from flowengine.chunking import CHUNK_BYTES, ID_BYTES, lengths_of, packed_size, right_chunks
from flowengine.manifest import Entry
from flowengine.store.filesystem import local_error
from flowengine.store.many import write_files
from flowengine.transfer.landing_blocks import deliver_block, wrong_chunk
from flowengine.transfer.places import Place
from flowengine.transfer.sinks import (
    NO_ENTRY,
    WANTED,
    SmallObject,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.timing import Stage
from flowengine.wire.messages import LARGE_OBJECT_BYTES

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = ["deliver_small", "place_small", "want_whole"]

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def want_whole(landing: Landing, offer: SmallOffer, indexes: list[int], hints: Container[int]) -> list[int]:
    """Want entries of one chunk that is nowhere at hand; gives those that are wanted, and on their way, so.

    Args:
        hints: chunks of the offer that are known to lie elsewhere at the target.
    """
    entries, first, wanted = offer.entries, offer.first, offer.wanted
    whole: list[int] = []
    names: list[bytes] = []
    with landing.lock:
        inflight, recent = landing.inflight, landing.recent
        for index in indexes:
            entry, chunk = entries[index], first[index]
            identity = entry.chunks[4:]
            if (
                len(identity) == ID_BYTES
                and identity not in inflight
                and identity not in recent
                and chunk not in hints
                and entry.size < LARGE_OBJECT_BYTES
            ):
                inflight[identity] = None
                wanted[chunk] = WANTED
                names.append(entry.name)
                whole.append(index)
        landing.opened_all(offer.directory, names)
    return whole


def deliver_small(
    landing: Landing,
    offer: SmallOffer,
    index: int,
    count: int,
    plain: memoryview,
    stages: tuple[Stage, Stage],
) -> int:
    """Verify and write chunks of small objects; gives how many bytes of `plain` they take.

    Raises:
        IntegrityError: a chunk has not the hash that it was offered with.
        OSError: as the file system says.
    """
    verify, write = stages
    if (
        offer.block is not None
        and not offer.sinks
        and not offer.block.mode_bits & landing.masked
        and (files := offer.whole_files(index, count)) is not None
    ):
        return deliver_block(landing, offer, offer.block.part(*files), index, plain, stages)
    begin = perf_counter_ns()
    parts = _verify_small(offer, index, count, plain)
    begin = verify.since(begin)
    directory, entries, sinks = offer.directory, offer.entries, offer.sinks
    path, small_name = directory.path + b"/" if directory.path else b"", landing.staging.small_name
    arrived: list[tuple[bytes, int, Place | None]] = []
    whole: list[tuple[Entry, str]] = []
    what: list[tuple[int, int, int, int]] = []
    at = 0
    for owner, number, chunks, size in parts:
        entry = entries[owner]
        packed = entry.chunks
        if chunks * CHUNK_BYTES != len(packed) or owner in sinks:
            sink = _small_sink(landing, offer, owner)
            before = sum(lengths_of(packed[: number * CHUNK_BYTES]))
            run = packed[number * CHUNK_BYTES : (number + chunks) * CHUNK_BYTES]
            location: Place | None = None
            if not sink.failed:
                sink.put(before, plain[at : at + size], run)
                location = path + entry.name, sink.staged, before
            arrived.append((run, at, location))
            landing.add(sink, size)
        else:
            staged = small_name()
            whole.append((entry, staged))
            what.append((at, size, entry.mode, entry.mtime_ns))
            arrived.append((packed, at, (path + entry.name, staged, 0)))
        at += size
    complete = _write_whole(landing, directory, whole, what, plain)
    if complete:
        landing.publishable.put(("smalls", directory, NO_ENTRY, complete))
    landing.arrived(arrived, plain)
    write.since(begin)
    return at


def _verify_small(
    offer: SmallOffer, index: int, count: int, plain: memoryview
) -> list[tuple[int, int, int, int]]:
    """Check all chunks of a run: per object (which, its first chunk here, how many, their bytes)."""
    entries, owners = offer.entries, offer.owners
    parts: list[tuple[int, int, int, int]] = []
    packed: list[bytes] = []
    number, end = index, index + count
    while number < end:
        owner = owners[number]
        chunks = entries[owner].chunks
        first = number - offer.first[owner]
        taken = min(end - number, len(chunks) // CHUNK_BYTES - first)
        here = chunks[first * CHUNK_BYTES : (first + taken) * CHUNK_BYTES]
        parts.append((owner, first, taken, packed_size(here)))
        packed.append(here)
        number += taken
    right = right_chunks(plain, b"".join(packed))
    if right != count:
        raise wrong_chunk(offer.directory, entries[owners[index + right]])
    return parts


def _write_whole(
    landing: Landing,
    directory: TargetDirectory,
    whole: list[tuple[Entry, str]],
    what: list[tuple[int, int, int, int]],
    plain: memoryview,
) -> list[tuple[Entry, str]]:
    """Write objects to their staging files; gives those that could be given their attributes."""
    if not whole:
        return whole
    # The staging folder is this user's alone, so a file may have its own mode from the start.
    if not [entry for entry, _ in whole if entry.mode & landing.masked or entry.extra]:
        write_files(landing.staging.fd, [staged for _, staged in whole], what, plain, landing.umask)
        return whole
    complete: list[tuple[Entry, str]] = []
    for (entry, staged), (at, size, _, _) in zip(whole, what, strict=True):
        refused = _write_small(landing, staged, entry, plain[at : at + size])
        if refused:
            landing.fail(directory, entry.name, "attributes", refused)
        else:
            complete.append((entry, staged))
    return complete


def _small_sink(landing: Landing, offer: SmallOffer, owner: int) -> SmallObject:
    """The staging file of a small object whose chunks arrive apart; made by the first of them."""
    with landing.lock:
        sink = offer.sinks.get(owner)
        if sink is None:
            sink = offer.sinks[owner] = SmallObject(offer.directory, offer.entries[owner], landing.staging)
            landing.sinks.add(sink)
        return sink


def _write_small(landing: Landing, staged: str, entry: Entry, data: memoryview) -> str:
    """Write a whole small object to its staging file; what the system refused of its attributes."""
    fd = os.open(staged, _CREATE, 0o600, dir_fd=landing.staging.fd)
    try:
        done = os.write(fd, data)
        while done < len(data):
            done += os.write(fd, data[done:])
        return landing.dress(fd, entry)
    finally:
        os.close(fd)


def place_small(landing: Landing, directory: TargetDirectory, entry: Entry, data: bytes) -> None:
    """Land a small object that is open with bytes that were found at the target and verified."""
    view = memoryview(data)
    staged = landing.staging.small_name()
    try:
        refused = _write_small(landing, staged, entry, view)
    except OSError as error:
        raise local_error(error, "cannot write into", directory.path or b".") from error
    landing.arrived([(entry.chunks, 0, (directory.child(entry.name), staged, 0))], view)
    landing.counters.bytes_reused += len(view)
    if refused:
        landing.fail(directory, entry.name, "attributes", refused)
    else:
        landing.publishable.put(("small", directory, entry, staged))
