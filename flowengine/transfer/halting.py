"""A halt: objects of which something has landed come to their end, no other begins.

Goal
    What a policy's `finish-file` promises, to the object and at once, however much was offered and asked for.
Plan
    The target decides, since it alone knows of what something is here. At the moment of the halt it fails every open
    object of which nothing is, marks the chunks that it wanted for them as unwanted, and tells the source. The source
    sends nothing of those, offers nothing more, and finishes. Where the source is the one that halts, it asks the
    target and holds back meanwhile what has not begun to leave (`transfer.leaving`).
Invariants
    - Bytes that were on their way to an object that was given up reach no file.
    - A chunk that an object under way shares with one that was given up still comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from flowengine.chunking import CHUNK_BYTES
from flowengine.transfer.landing_fine import drop_refinement
from flowengine.transfer.leaving import HALTED
from flowengine.transfer.sinks import (
    CLAIMED,
    FINER,
    NOT_WANTED,
    UNWANTED,
    WANTED,
    FineOffer,
    LargeObject,
    RunOffer,
    Sink,
    SmallObject,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.subtrees import (
    LEFT_OUT,
    SubtreesOffer,
    files_not_begun,
    give_up_files,
    place_if_complete,
)
from flowengine.wire.records import Run

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = ["halt_landing", "leave_out"]


def halt_landing(landing: Landing, why: str) -> list[Run]:
    """Give up all open objects of which nothing is here; gives the chunks that are not wanted any more.

    The placer, which may be in the middle of an offer, calls it again before the next one.
    """
    names: list[tuple[TargetDirectory, bytes]] = []
    offering: list[tuple[TargetDirectory, bytes]] = []
    many: list[SubtreesOffer] = []
    with landing.lock:
        landing.halted = landing.halted or why
        claimed = _claimed(landing)
        for sink in landing.sinks:
            if not sink.failed and sink.remaining == sink.entry.size and sink not in claimed:
                sink.failed = True
                # Told by name, though all of them have one reason: the source need not read it to its end.
                known_by_name = isinstance(sink, LargeObject) and not sink.sealed
                (offering if known_by_name else names).append((sink.directory, sink.entry.name))
        for offer in list(landing.offers.values()):  # the placer adds to them without the lock
            if isinstance(offer, SmallOffer):
                names += _fail_whole(landing, offer)
            elif isinstance(offer, SubtreesOffer):
                give_up_files(landing, offer, files_not_begun(offer))
                many.append(offer)
        unwanted = _unwant(landing)
    for directory, name in offering:
        landing.fail(directory, name, HALTED, landing.halted)
    for directory, name in names:
        landing.done(directory, name)
    for offer in many:
        place_if_complete(landing, offer)
    landing.report(b".", HALTED, landing.halted)
    return unwanted


def leave_out(landing: Landing, offer: FineOffer) -> None:
    """Want nothing of an offer of fine chunks for objects that were given up since they were asked for."""
    with landing.lock:
        for owner, refinement in enumerate(offer.refinements):
            if refinement.dead or not _is_given_up(refinement.sink):
                continue
            for index, of in enumerate(offer.owners):
                if of == owner:
                    offer.wanted[index] = NOT_WANTED
            drop_refinement(landing, refinement)


def _claimed(landing: Landing) -> set[Sink]:
    """The sinks for which a lane has just something in hand."""
    found: set[Sink] = set()
    for offer in list(landing.offers.values()):
        if CLAIMED not in offer.wanted:
            continue
        if isinstance(offer, RunOffer):
            found.add(offer.target)
        elif isinstance(offer, SmallOffer):
            found |= {
                sink for owner, sink in offer.sinks.items() if CLAIMED in offer.wanted[offer.chunks_of(owner)]
            }
    return found


def _fail_whole(landing: Landing, offer: SmallOffer) -> Iterator[tuple[TargetDirectory, bytes]]:
    """Objects of an offer that have no sink yet and of which no chunk has come; from here on each has one, which failed."""
    for owner, entry in enumerate(offer.entries):
        marks = offer.wanted[offer.chunks_of(owner)]
        if owner in offer.sinks or not marks or marks.count(WANTED) + marks.count(FINER) < len(marks):
            continue
        sink = offer.sinks[owner] = SmallObject(offer.directory, entry, landing.staging)
        sink.failed = True
        yield offer.directory, entry.name


def _is_given_up(sink: Sink | None) -> bool:
    return sink is not None and sink.failed


def _unwant(landing: Landing) -> list[Run]:
    """Mark what is wanted for objects that failed, and for nothing else; gives it as runs."""
    found: list[Run] = []
    for number, offer in list(landing.offers.items()):
        for index, mark in enumerate(offer.wanted):
            if mark != WANTED:
                continue
            if isinstance(offer, SubtreesOffer):
                given_up, one = offer.states[offer.owner(index)] == LEFT_OUT, offer.ids[index]
            else:
                sink, one = _what_for(offer, index)
                given_up = _is_given_up(sink)
            if given_up and not _is_awaited(landing, one):
                offer.wanted[index] = UNWANTED
                landing.inflight.pop(one, None)
        marked = [index for index, mark in enumerate(offer.wanted) if mark == UNWANTED]
        for _, group in groupby(enumerate(marked), lambda pair: pair[1] - pair[0]):
            run = [index for _, index in group]
            found.append((number, run[0], len(run)))
        if isinstance(offer, FineOffer):
            _drop_refinements(landing, offer)
    return found


def _what_for(offer: SmallOffer | RunOffer | FineOffer, index: int) -> tuple[Sink | None, bytes]:
    """What a chunk is for, and the id of the chunk that is put together from it where that is another."""
    if isinstance(offer, FineOffer):
        refinement = offer.refinements[offer.owners[index]]
        return refinement.sink, refinement.one[4:]
    if isinstance(offer, RunOffer):
        return offer.target, offer.packed[index * CHUNK_BYTES + 4 : (index + 1) * CHUNK_BYTES]
    owner = offer.owners[index]
    at = index - offer.first[owner]
    return offer.sinks.get(owner), offer.entries[owner].chunks[at * CHUNK_BYTES + 4 : (at + 1) * CHUNK_BYTES]


def _is_awaited(landing: Landing, identity: bytes) -> bool:
    """Whether an object that is under way gets this chunk from the one that it was wanted for."""
    return any(not sink.failed for sink, _ in landing.inflight.get(identity) or ())


def _drop_refinements(landing: Landing, offer: FineOffer) -> None:
    """Forget what is put together for objects that were given up, but for what a lane has in hand."""
    for owner, refinement in enumerate(offer.refinements):
        marks = [offer.wanted[index] for index, of in enumerate(offer.owners) if of == owner]
        if UNWANTED in marks and CLAIMED not in marks and not refinement.dead:
            drop_refinement(landing, refinement)
