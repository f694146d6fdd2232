"""The target's side of the second, finer cut: which chunks are asked for finer, and what is taken from where they stood.

Goal
    An edit costs about its own bytes on the wire. Where nothing is alike, little is lost by having looked.
Plan
    A wanted chunk beside reused ones, or of a small object that replaces another, is asked for *finer*. The source
    offers its fine chunks; those found in the part of the old file where it stood are taken from there, the rest is
    wanted. What is put together is checked against the coarse id and goes the way of any chunk that arrived.
Invariants
    - Old bytes are copied out when they are compared, so it does not matter what becomes of the old file later.
    - At most `_MAX_REFINING_BYTES` are being put together.
"""

from __future__ import annotations

from typing import Final

from flowengine.chunking.fine import FINE_BYTES, FineCutter, fine_lengths, fine_profile
from flowengine.errors import ProtocolError
from flowengine.transfer.halting import leave_out
from flowengine.transfer.landing_fine import begin_refining, finish_refinement
from flowengine.transfer.lookalikes import Guess
from flowengine.transfer.placement import Placement
from flowengine.transfer.sinks import FINER, WANTED, FineOffer, Refinement, Region, RunOffer, SmallOffer
from flowengine.units import MIB
from flowengine.wire.messages import MAX_FINE_CHUNKS, Finer

__all__ = ["Refiner", "regions_beside"]

_MAX_REFINING_BYTES: Final = 32 * MIB
_LEAST_BYTES: Final = 1024
"""A chunk below this is not worth asking about."""
_LEFT_CHUNKS: Final = 1
_RIGHT_CHUNKS: Final = 4
"""Of a long run of wanted chunks, the first holds the end of what stood before, the last ones, until cuts agree again,
the beginning of what follows."""
_SHORT_RUN: Final = 8
_LEAST_TRIED_BYTES: Final = 8 * MIB
_LEAST_SHARE: Final = 16
"""Looking ends in a session when, after so many bytes, less than one in so many was found."""

_RIGHT_SHARE: Final = 4
"""A file of which only the name said that it is alike was so, when more than one byte in so many was found in it."""


def regions_beside(
    lengths: list[int], places: list[int], wanted: bytearray, left: int, old_bytes: int
) -> dict[int, tuple[int, int]]:
    """Where the bytes of wanted chunks that lie beside reused ones may be in the old file: chunk → (start, stop).

    Args:
        places: offset in the old file for each chunk that was found there, else -1.
        left: where in the old file that ends what was found just before the first chunk; -1 for nothing.

    >>> regions_beside([10, 10, 10], [0, -1, 25], bytearray([0, 1, 0]), -1, 100)
    {1: (10, 25)}
    """
    found: dict[int, tuple[int, int]] = {}
    count = len(lengths)
    at = 0
    while at < count:
        if wanted[at] != WANTED:
            at += 1
            continue
        end = at
        while end < count and wanted[end] == WANTED:
            end += 1
        before = left if at == 0 else places[at - 1] + lengths[at - 1] if places[at - 1] >= 0 else -1
        after = places[end] if end < count else -1
        size = sum(lengths[at:end])
        short = end - at <= _SHORT_RUN
        if short and before >= 0 and after >= 0 and before <= after <= before + 2 * size + MIB:
            if after > before:
                found |= dict.fromkeys(range(at, end), (before, after))
        else:
            if 0 <= before < old_bytes:
                stop = end if short and after < 0 else at + _LEFT_CHUNKS
                for index in range(at, min(stop, end)):
                    found[index] = (before, min(old_bytes, before + 2 * sum(lengths[at : index + 1])))
            if after > 0:
                for index in range(max(at, end - _RIGHT_CHUNKS), end):
                    found[index] = (max(0, after - 2 * sum(lengths[index:end])), after)
        at = end
    return found


class Refiner:
    """Asks for chunks to be cut finer, and answers what comes of it. For use by the placer's thread."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._cutter = FineCutter(placement.profile)
        self._most_bytes = MAX_FINE_CHUNKS * fine_profile(placement.profile).minimum
        self._asked: dict[int, list[Refinement]] = {}
        self._region: Region | None = None
        self._places: dict[bytes, int] = {}
        self._data = b""
        self._tried_bytes = self._found_bytes = 0

    def ask(
        self, number: int, offer: RunOffer | SmallOffer, chunks: dict[int, tuple[int, bytes, Region]]
    ) -> None:
        """Mark chunks of an offer, before it is answered, to be asked for finer, as far as that is worth it.

        Args:
            chunks: index → (length, packed chunk, where its bytes may be), of chunks that are wanted.
        """
        landing = self._placement.landing
        if self._tried_bytes > _LEAST_TRIED_BYTES and self._found_bytes * _LEAST_SHARE < self._tried_bytes:
            return
        if landing.is_short_of_directories():
            return  # each waits for the answer, which comes behind what is about to be opened
        asked: list[Refinement] = []
        total = 0
        for index, (length, one, region) in sorted(chunks.items()):
            room = min(self._most_bytes, _MAX_REFINING_BYTES - landing.refining_bytes) - total
            if length < _LEAST_BYTES or length > room:
                continue
            offer.wanted[index] = FINER
            asked.append(Refinement(number, offer, index, length, one, region))
            total += length
        for _ in {one.region.guess for one in asked} - {None}:
            self._placement.lookalikes.guess()
        if asked:
            self._asked[number] = asked
            begin_refining(landing, total)

    def offered(self, message: Finer) -> None:
        """Answer the fine chunks of what was asked for.

        Raises:
            ProtocolError: they are not the fine chunks of just those.
        """
        number = self._placement.next_number()
        refinements = self._asked.pop(message.offer, None)
        packed = message.chunks
        count = len(packed) // FINE_BYTES
        if refinements is None or len(packed) % FINE_BYTES or count > MAX_FINE_CHUNKS:
            raise ProtocolError("the source offered a finer cut that was not asked for, or is none")
        lengths = fine_lengths(packed)
        offer = FineOffer(packed, refinements)
        at = 0
        for owner, refinement in enumerate(refinements):
            offset = 0
            while offset < refinement.size_bytes and at < count and lengths[at]:
                offer.owners.append(owner)
                offer.offsets.append(offset)
                offset += lengths[at]
                at += 1
            if offset != refinement.size_bytes:
                raise ProtocolError(
                    f"the finer cut of a chunk of {refinement.size_bytes} bytes comes to {offset}"
                )
        if at != count:
            raise ProtocolError("the source offered a finer cut of more than was asked for")
        self._fill(offer, lengths)
        landing = self._placement.landing
        if landing.halted:
            leave_out(landing, offer)
        whole = [one for one in refinements if not one.remaining and not one.dead]
        offer.open = offer.wanted.count(WANTED)
        if offer.open:
            landing.offers[number] = offer
        self._placement.answer(offer.wanted)
        for refinement in whole:
            finish_refinement(landing, refinement)

    def _fill(self, offer: FineOffer, lengths: list[int]) -> None:
        """Take what is in the old files; the rest is wanted."""
        for refinement in offer.refinements:
            refinement.buffer = memoryview(bytearray(refinement.size_bytes))
            self._tried_bytes += refinement.size_bytes
        found = 0
        for index, length in enumerate(lengths):
            refinement = offer.refinements[offer.owners[index]]
            place = self._find(refinement.region, offer.packed[index * FINE_BYTES : (index + 1) * FINE_BYTES])
            if place < 0:
                offer.wanted[index] = WANTED
                continue
            offset = offer.offsets[index]
            refinement.buffer[offset : offset + length] = self._data[place : place + length]
            refinement.remaining -= length
            found += length
        self._judge(offer.refinements)
        self._found_bytes += found
        self._placement.counters.bytes_reused += found
        self._region, self._places, self._data = None, {}, b""

    def _judge(self, refinements: list[Refinement]) -> None:
        """Tell of each file of which only the name said that it is alike whether it was."""
        judged: dict[Guess, list[int]] = {}
        for refinement in refinements:
            if refinement.region.guess is not None:
                sums = judged.setdefault(refinement.region.guess, [0, 0])
                sums[0] += refinement.size_bytes
                sums[1] += refinement.size_bytes - refinement.remaining
        for guess, (size, found) in judged.items():
            self._placement.lookalikes.judge(guess, right=found * _RIGHT_SHARE > size)

    def _find(self, region: Region, fine: bytes) -> int:
        """Where a fine chunk is in what was read of a region; -1 where it is not."""
        if region is not self._region:
            self._region = region
            try:
                self._data = region.read()
            except OSError:
                self._data = b""  # gone: then all is wanted
            self._places = self._cutter.places(self._data)
        return self._places.get(fine, -1)
