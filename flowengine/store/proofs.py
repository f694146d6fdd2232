"""What the scan cache keeps of a directory's small objects: their entries, and what proves that these still hold."""

from __future__ import annotations

import struct

import msgspec

from flowengine.manifest import Block, Entry
from flowengine.store.encoded import parse_block
from flowengine.store.many import AnyStat, Stat, stats_proof
from flowengine.store.scan_cache import ScanCache

__all__ = ["decode_entries", "encode_entries", "recall", "split_proof", "stats_proof", "with_ctime"]

encode_entries = msgspec.msgpack.Encoder().encode
decode_entries = msgspec.msgpack.Decoder(list[Entry]).decode


def split_proof(proof: bytes) -> list[bytes]:
    """Per entry the 40 bytes of numbers and the name, as one comparable key."""
    (count,) = struct.unpack_from("<I", proof)
    names = proof[4 + 40 * count :].split(b"/")
    return [proof[4 + 40 * n : 44 + 40 * n] + names[n] for n in range(count)]


def with_ctime(st: AnyStat, ctime_ns: int) -> Stat:
    """The stat as it would be with another ctime; one that no file has makes a proof that matches nothing."""
    return (st if isinstance(st, Stat) else Stat.of(st))._replace(st_ctime_ns=ctime_ns)


def recall(
    cache: ScanCache, st_dir: AnyStat, proof: bytes
) -> tuple[Block | list[Entry] | None, dict[bytes, Entry]]:
    """What the cache knows of a directory's small objects, of which `proof` is the proof.

    Returns:
        All their entries when nothing changed at all, as a block where they are one; else None and those known, by
        the proof of each (`split_proof(proof)` has the proofs in order).
    """
    parts = cache.directory(st_dir.st_dev, st_dir.st_ino)
    if not parts:
        return None, {}
    try:
        if len(parts) == 1 and parts[0].stats == proof:
            encoded = parts[0].entries
            return parse_block(encoded) or decode_entries(encoded), {}
        known: dict[bytes, Entry] = {}
        for part in parts:
            known.update(zip(split_proof(part.stats), decode_entries(part.entries), strict=True))
        return None, known
    except (msgspec.DecodeError, ValueError, struct.error):
        return None, {}
