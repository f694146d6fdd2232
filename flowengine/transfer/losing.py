"""What becomes of wanted chunks that the source says it cannot serve any more: their objects fail, by name.

Goal
    A file that went, or changed, at the source costs its own objects and those that wait for its chunks, and no others.
Plan
    In the lock each chunk is judged by its mark and struck off; who needs it is found out there. They fail outside of it.
Invariants
    - What a lane has in hand (`CLAIMED`) arrives, whatever the source says of it. So an offer of which a lane holds
      something stays open, and a chunk is never both delivered and lost.
    - A lane may be at work on *other* chunks of the same object or the same refinement. It finds the sink failed, or
      the refinement without a buffer (`transfer.landing_fine`), and writes nothing of use; files of what failed stay
      until the session ends, so it never writes into another's.
    - An object with a chunk that was lost never becomes complete: the bytes of that chunk stay among `remaining`. So a
      lane that makes the sink of an object just when it fails leaves a staging file, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowengine.chunking import CHUNK_BYTES
from flowengine.errors import ProtocolError
from flowengine.transfer.landing_fine import drop_refinement
from flowengine.transfer.sinks import (
    NOT_WANTED,
    UNWANTED,
    WANTED,
    FineOffer,
    RunOffer,
    Sink,
    SmallOffer,
    TargetDirectory,
)
from flowengine.transfer.subtrees import OUT, SubtreesOffer, give_up_files, place_if_complete

if TYPE_CHECKING:
    from flowengine.transfer.landing import Landing

__all__ = ["lose"]


def lose(landing: Landing, number: int, index: int, count: int, reason: str, message: str) -> None:
    """The source cannot serve chunks that were wanted: their objects, and all that wait for them, fail."""
    offer = landing.offers.get(number)
    if offer is None or index < 0 or count < 1 or index + count > len(offer.wanted):
        raise ProtocolError(f"the source gave up chunks of offer {number}, which is not open")
    victims: list[Sink] = []
    names: list[tuple[TargetDirectory, bytes]] = []
    paths: list[bytes] = []
    with landing.lock:
        for chunk in range(index, index + count):
            mark = offer.wanted[chunk]
            if mark not in (WANTED, UNWANTED):
                continue
            offer.wanted[chunk] = NOT_WANTED
            offer.open -= 1
            if mark == UNWANTED:
                continue
            if isinstance(offer, SubtreesOffer):
                victims += _lose_file(landing, offer, chunk, paths)
                continue
            if not isinstance(offer, FineOffer):
                _lose_chunk(landing, offer, chunk, victims, names)
                continue
            refinement = offer.refinements[offer.owners[chunk]]
            if not refinement.dead:
                _lose_chunk(landing, refinement.offer, refinement.index, victims, names)
                drop_refinement(landing, refinement)
        if not offer.open:
            landing.offers.pop(number, None)
    for sink in victims:
        landing.fail_sink(sink, reason, message)
    for directory, name in names:
        landing.fail(directory, name, reason, message)
    for path in paths:
        landing.report(path, reason, message)
    if isinstance(offer, SubtreesOffer):
        place_if_complete(landing, offer)


def _lose_file(landing: Landing, offer: SubtreesOffer, chunk: int, paths: list[bytes]) -> list[Sink]:
    """The file that a chunk is of, which lies in one of many folders, will not land; gives who else needs the chunk."""
    file = offer.owner(chunk)
    if offer.states[file] == OUT:
        give_up_files(landing, offer, [file])
        paths.append(offer.path_of(file))
    return [sink for sink, _ in landing.inflight.pop(offer.ids[chunk], None) or []]


def _lose_chunk(
    landing: Landing,
    offer: SmallOffer | RunOffer,
    chunk: int,
    victims: list[Sink],
    names: list[tuple[TargetDirectory, bytes]],
) -> None:
    """Who needs a chunk that will not come; inside the lock."""
    if isinstance(offer, RunOffer):
        packed, at = offer.packed, chunk
        victims.append(offer.target)
    else:
        owner = offer.owners[chunk]
        packed, at = offer.entries[owner].chunks, chunk - offer.first[owner]
        if owner in offer.sinks:
            victims.append(offer.sinks[owner])
        else:
            names.append((offer.directory, offer.entries[owner].name))
    identity = packed[at * CHUNK_BYTES + 4 : (at + 1) * CHUNK_BYTES]
    victims += [sink for sink, _ in landing.inflight.pop(identity, None) or []]
