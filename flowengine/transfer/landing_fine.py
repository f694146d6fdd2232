"""Chunks that are put together from fine ones as these arrive.

Goal
    What comes of a finer cut becomes a chunk like any other, or ends as one that was lost.
Plan
    Fine chunks are verified and copied into the chunk's buffer, by any lane. Who brings the last one verifies the whole
    and delivers it as if it had arrived.
Invariants
    - Only one thread finds that nothing remains: bytes are counted inside the lock.
    - A chunk of which a fine one was lost is *dead*: it has no buffer, and the other fine ones, which may be in a lane's
      hands just then or come later, are verified and go nowhere. It cannot become whole, since the lost one is not counted.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

from flowengine.chunking.fine import FINE_BYTES, fine_id
from flowengine.errors import IntegrityError
from flowengine.transfer.sinks import NOT_WANTED, FineOffer, Refinement
from flowengine.transfer.timing import Stage

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = ["begin_refining", "deliver_fine", "drop_refinement", "finish_refinement"]


def deliver_fine(
    landing: Landing, offer: FineOffer, index: int, count: int, plain: memoryview, stages: tuple[Stage, Stage]
) -> int:
    """Verify fine chunks and put them where they belong; gives how many bytes of `plain` they take.

    Raises:
        IntegrityError: a chunk, or what was put together from it, has not the hash that it was offered with.
        FlowError: the disk refused.
    """
    verify, _ = stages
    packed = offer.packed
    begin = perf_counter_ns()
    at = 0
    arrived: dict[int, int] = {}
    for number in range(index, index + count):
        start = number * FINE_BYTES
        length = int.from_bytes(packed[start : start + 4], "little")
        data = plain[at : at + length]
        owner = offer.owners[number]
        if len(data) != length or fine_id(data) != packed[start + 4 : start + FINE_BYTES]:
            raise IntegrityError(
                "a fine chunk does not have the hash it was offered with",
                hint="nothing of it was used; if it repeats, the source's memory or disk is faulty, or it lies",
            )
        offset = offer.offsets[number]
        # Looked at once: `lose` may take it away at any moment, and what is then written goes nowhere.
        buffer = offer.refinements[owner].buffer
        if buffer:
            buffer[offset : offset + length] = data
        arrived[owner] = arrived.get(owner, 0) + length
        at += length
    verify.since(begin)
    with landing.lock:
        for owner, size in arrived.items():
            offer.refinements[owner].remaining -= size
        touched = [offer.refinements[owner] for owner in arrived]
        whole = [one for one in touched if not one.remaining and not one.dead]
    for refinement in whole:
        finish_refinement(landing, refinement)
    return at


def begin_refining(landing: Landing, size_bytes: int) -> None:
    """So many bytes more of chunks are being put together from fine ones."""
    with landing.lock:
        landing.refining_bytes += size_bytes


def finish_refinement(landing: Landing, refinement: Refinement) -> None:
    """A chunk was put together from fine ones: from here on it is one that arrived.

    Raises:
        IntegrityError: it does not have the hash that the chunk was offered with.
        FlowError: the disk refused.
    """
    offer, index = refinement.offer, refinement.index
    landing.deliver_chunks(offer, index, 1, refinement.buffer, landing.stages())
    with landing.lock:
        drop_refinement(landing, refinement)


def drop_refinement(landing: Landing, refinement: Refinement) -> None:
    """Forget a refinement; inside the lock."""
    offer = refinement.offer
    refinement.buffer = memoryview(b"")
    refinement.dead = True
    landing.refining_bytes -= refinement.size_bytes
    offer.wanted[refinement.index] = NOT_WANTED
    offer.open -= 1
    if not offer.open:
        landing.offers.pop(refinement.number, None)
