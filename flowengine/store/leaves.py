"""Looks at folders of files that nobody touched since they were scanned or written, many to a call.

Goal
    Finding no change in a folder costs what the system takes to list it and look at its files, and little beside.
Plan
    One call of the library lists some folders that stand side by side, one question to the scan cache has what is known of
    all of these, and what proves that it still holds is compared as bytes.
Invariants
    - A folder is known only where all that is in it is as the scan cache has it: small files, of one name each, and nothing else.
    - What is not known is looked at by itself, as if nobody had looked before.
    - What one call holds is bounded: folders behind many files are not looked at by it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

from flowengine.compiled import Scratch
from flowengine.manifest import Block
from flowengine.store.encoded import parse_block, same_files
from flowengine.store.many import STAT, AnyStat, Stat, library, open_listed
from flowengine.store.scan_cache import DirectoryPart, ScanCache

__all__ = ["KnownLeaf", "known_leaves"]

_LEAF: Final = struct.Struct(STAT.format + "qq")
"""`Leaf` of `_many.c`: the folder's own stat, whether it is plain, bytes of its proof."""


_TOGETHER: Final = 32
"""Folders of which all that the cache has is held at a time."""
_MANY_PROOFS: Final = 256 << 10
"""Bytes of proofs after which no more folders are looked at, as in `_many.c`."""


class KnownLeaf(NamedTuple):
    """A folder with none in it, and its files, as the scan cache has them."""

    st: Stat
    block: Block


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.leaves = Scratch()


_thread = _PerThread()


def known_leaves(
    cache: ScanCache,
    parent: int,
    names: Sequence[bytes],
    large_bytes: int,
    marked: bytes,
    entries: Sequence[bytes] | None = None,
    seen: Sequence[AnyStat] | None = None,
) -> list[KnownLeaf | None]:
    """Which folders of an open one stand there as the scan cache knows them; no link is followed, and none is left open.

    Args:
        large_bytes: files of this size and more are large.
        marked: a name that none of them may have in it.
        entries: of each folder the encoded files that it is to have, with their modes and times; None for whatever it has.
        seen: the stat of each folder, by whoever looked last: one that the cache then knows nothing of is not listed.

    Returns:
        None for each folder of which that cannot be said.
    """
    if not names:
        return []
    dev = os.fstat(parent).st_dev  # another is a mount point's
    known: list[KnownLeaf | None] = [None] * len(names)
    proof_bytes = 0
    for start in range(0, len(names), _TOGETHER):
        chosen: Sequence[int] = range(start, min(start + _TOGETHER, len(names)))
        kept: dict[int, DirectoryPart] = {}
        if seen is not None:
            kept = cache.whole_directories(dev, [seen[number].st_ino for number in chosen])
            chosen = [number for number in chosen if seen[number].st_ino in kept]
            if not chosen:
                continue
        told = None if entries is None else [entries[number] for number in chosen]
        found = _list(parent, [names[number] for number in chosen], large_bytes, marked, told)
        if seen is None:
            inos = [leaf[0].st_ino for leaf in found if leaf is not None and leaf[0].st_dev == dev]
            kept = cache.whole_directories(dev, inos) if inos else {}
        for number, leaf in zip(chosen, found, strict=True):
            if leaf is None:
                continue
            st, proof = leaf
            proof_bytes += len(proof)
            part = kept.get(st.st_ino) if st.st_dev == dev else None
            if part is None or part.stats != proof:
                continue
            if entries is not None and part.entries != entries[number]:
                continue
            block = parse_block(part.entries)
            known[number] = None if block is None else KnownLeaf(st, block)
        if proof_bytes >= _MANY_PROOFS:
            break
    return known


def _list(
    parent: int, names: Sequence[bytes], large_bytes: int, marked: bytes, entries: Sequence[bytes] | None
) -> list[tuple[Stat, bytes] | None]:
    """Of each folder its stat and the proof of its files; None where something else stands in it, or it cannot be looked at."""
    compiled, count = library(), len(names)
    if compiled is None:
        found: list[tuple[Stat, bytes] | None] = []
        proof_bytes = 0
        for number, name in enumerate(names):
            leaf = None
            if proof_bytes < _MANY_PROOFS:
                leaf = _list_one(
                    parent, name, large_bytes, marked, None if entries is None else entries[number]
                )
            proof_bytes += 0 if leaf is None else len(leaf[1])
            found.append(leaf)
        return found
    place = _thread.leaves.room(count * _LEAF.size)
    proofs = compiled.flow_leaves(
        parent,
        b"\0".join(names),
        count,
        large_bytes,
        marked,
        None if entries is None else (ctypes.c_char_p * count)(*entries),
        None if entries is None else (ctypes.c_int64 * count)(*map(len, entries)),
        place,
    )
    if not proofs:
        return [None] * count
    try:
        leaves: list[tuple[Stat, bytes] | None] = []
        at = proofs
        for told in _LEAF.iter_unpack(ctypes.string_at(place, count * _LEAF.size)):
            plain, size = told[-2:]
            leaves.append((Stat._make(told[:-2]), ctypes.string_at(at, size)) if plain else None)
            at += size
        return leaves
    finally:
        compiled.flow_free_proofs(proofs)


def _list_one(
    parent: int, name: bytes, large_bytes: int, marked: bytes, entries: bytes | None
) -> tuple[Stat, bytes] | None:
    try:
        fd, st, listing = open_listed(parent, name, large_bytes, marked)
    except OSError:
        return None
    os.close(fd)
    if (
        any(map(len, listing[1:4]))
        or listing.marked is not None
        or listing.error is not None
        or listing.linked
    ):
        return None
    if entries is not None:
        block = parse_block(entries)
        if block is None or not same_files(block, listing.smalls, attributes=True):
            return None
    return st, listing.proof
