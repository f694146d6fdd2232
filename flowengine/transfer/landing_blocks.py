"""Files that stay a block from the offer to the publisher: wanted whole, verified and written by the run.

The account of what is open stays `transfer.landing`'s, and its invariants hold here as well.
"""

from __future__ import annotations

from itertools import repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING

from flowengine.chunking import right_chunks
from flowengine.errors import IntegrityError
from flowengine.manifest import Block, Entry
from flowengine.store.runs import write_run
from flowengine.transfer.places import LandedRun
from flowengine.transfer.sinks import NO_ENTRY, WANTED, SmallOffer, TargetDirectory, waited_for
from flowengine.transfer.timing import Stage
from flowengine.units import show_path

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = ["deliver_block", "want_block", "wrong_chunk"]


def want_block(landing: Landing, offer: SmallOffer) -> bool:
    """Want all of an offer that is a block, if nothing of it is at hand or on its way; whether that was so."""
    assert offer.block is not None
    ids = dict.fromkeys(offer.ids)
    if len(ids) != len(offer.wanted):
        return False
    names = offer.block.names
    with landing.lock:
        if not (landing.inflight.keys().isdisjoint(ids) and landing.recent.keys().isdisjoint(ids)):
            return False
        landing.inflight.update(ids)
        offer.wanted[:] = bytes([WANTED]) * len(ids)
        landing.opened_all(offer.directory, names)
    return True


def deliver_block(
    landing: Landing,
    offer: SmallOffer,
    block: Block,
    index: int,
    plain: memoryview,
    stages: tuple[Stage, Stage],
) -> int:
    """Verify and write whole files of an offer that is a block; gives how many bytes of `plain` they take.

    Args:
        block: these files alone.
        index: their first chunk among those of the offer.

    Raises:
        IntegrityError: a chunk has not the hash that it was offered with.
        OSError: as the file system says.
    """
    verify, write = stages
    end = index + block.chunks
    ids = offer.ids[index:end]
    begin = perf_counter_ns()
    right = right_chunks(plain, block.columns.chunks)
    if right != len(ids):
        raise wrong_chunk(offer.directory, offer.entries[offer.owners[index + right]])
    begin = verify.since(begin)
    number = landing.staging.run_numbers(block.count)
    write_run(landing.staging.part(number), number, block.columns.packed, plain, landing.umask)
    landing.publishable.put(("block", offer.directory, NO_ENTRY, (block, number)))
    run = LandedRun(offer.directory.path, block, number)
    with landing.lock:
        waiters = [*map(landing.inflight.pop, ids, repeat(None))]
        landing.recent.update(zip(ids, repeat(run), strict=False))
        landing.forget_oldest()
    if any(waiters):
        landing.serve([*waited_for(block.columns.chunks, 0, waiters)], plain)
    write.since(begin)
    return block.size_bytes


def wrong_chunk(directory: TargetDirectory, entry: Entry) -> IntegrityError:
    """The error for bytes that are not what was offered."""
    return IntegrityError(
        f"a chunk of {show_path(directory.child(entry.name))} does not have the hash it was offered with",
        hint="nothing of it was used; if it repeats, the source's memory or disk is faulty, or it lies",
    )
