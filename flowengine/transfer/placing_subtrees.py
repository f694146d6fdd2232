"""Places whole subtrees that are offered as one: wanted as one where nothing of them is at the target, else one by one."""

from __future__ import annotations

from collections.abc import Iterator

from flowengine.errors import ProtocolError
from flowengine.manifest import Block
from flowengine.store.encoded import parse_block
from flowengine.transfer.placement import SET_ID_BITS, Placement
from flowengine.transfer.sinks import TargetDirectory
from flowengine.transfer.subtrees import SubtreesOffer, is_all_new, want_subtrees
from flowengine.units import show_path
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    MAX_OFFER_CHUNKS,
    MAX_OFFER_ENTRIES,
    MAX_SUBTREES_FOLDERS,
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Folder,
    Subtrees,
    passages,
)
from flowengine.wire.paths import MAX_DEPTH, MAX_PATH_BYTES, STAGING_NAME, check_name

__all__ = ["check_folders", "each_of", "offers_of", "want_as_one"]


def offers_of(message: Subtrees) -> int:
    """How many offers it is."""
    return sum([bool(folder.entries) for folder in message.folders])


def check_folders(directory: TargetDirectory, folders: list[Folder], depth: int) -> None:
    """Refuse what is no list of whole subtrees of a directory so deep, before anything of it is done.

    Raises:
        ProtocolError: it contradicts the protocol or its limits.
    """
    if not 0 < len(folders) <= MAX_SUBTREES_FOLDERS or not any(folder.entries for folder in folders):
        raise ProtocolError(
            f"subtrees of {len(folders)} folders were offered; 1 to {MAX_SUBTREES_FOLDERS} are allowed, and files in them"
        )
    above: list[int] = []
    root = len(directory.path)
    for folder in folders:
        if not 0 <= folder.depth <= len(above):
            raise ProtocolError(
                f"the folder {show_path(folder.name)} is offered {folder.depth} below a folder with {len(above)} around it"
            )
        del above[folder.depth :]
        check_name(folder.name, reserved=(STAGING_NAME,))
        above.append((above[-1] if above else root) + 1 + len(folder.name))
        if depth + folder.depth >= MAX_DEPTH or above[-1] > MAX_PATH_BYTES:
            raise ProtocolError(
                f"the path of a folder {show_path(folder.name)} below {show_path(directory.path or b'.')} is deeper or "
                "longer than allowed"
            )


def each_of(folders: list[Folder]) -> Iterator[DirectoryBegin | EncodedOffer | DirectoryEnd]:
    """What says the same folder by folder."""
    for folder, entered in passages(folders):
        if not entered:
            yield DirectoryEnd(folder.mode, folder.mtime_ns)
            continue
        yield DirectoryBegin(folder.name)
        if folder.entries:
            yield EncodedOffer(folder.entries)


def want_as_one(placement: Placement, directory: TargetDirectory, folders: list[Folder]) -> bool:
    """Want all of some subtrees as one offer and answer so; False, and nothing was done, where each is to be looked at.

    Raises:
        ProtocolError: what is offered contradicts itself.
    """
    landing = placement.landing
    if (
        placement.dry
        or placement.atomic
        or directory.fd < 0
        or directory.keys is not None
        or landing.halted
        or _stands_there(directory, folders)
    ):
        return False
    landing.wait_for_objects()
    blocks = _blocks(folders, SET_ID_BITS | landing.masked)
    if blocks is None:
        return False
    offer = SubtreesOffer(directory, folders, blocks)
    if (
        offer.files > MAX_OFFER_ENTRIES
        or len(offer.wanted) > MAX_OFFER_CHUNKS
        or max(offer.sizes) >= LARGE_OBJECT_BYTES
        or b"\0" + STAGING_NAME + b"\0" in b"\0" + offer.columns.names
        or placement.lookalikes.known(offer.size_bytes)
        or placement.remembered(offer.columns.chunks)
        or not is_all_new(landing, offer)
    ):
        return False
    placement.recorder.subtrees(folders, blocks)
    directory.unchanged_all = False
    if directory.offered is not None:
        directory.offered.update([folder.name for folder in folders if not folder.depth])
    offer.number = placement.number
    want_subtrees(landing, offer)
    placement.answer_whole(sum([block is not None for block in blocks]), chunks=len(offer.wanted))
    return True


def _stands_there(directory: TargetDirectory, folders: list[Folder]) -> bool:
    """Whether anything of these names was in the directory when it was entered."""
    if directory.was_empty:
        return False
    existing = directory.existing
    return any(folder.name in existing for folder in folders if not folder.depth)


def _blocks(folders: list[Folder], forbidden_bits: int) -> list[Block | None] | None:
    """The files of each folder; None where they are not all blocks of files that can be made with their modes."""
    blocks: list[Block | None] = []
    for folder in folders:
        block = parse_block(folder.entries) if folder.entries else None
        if folder.entries and (block is None or block.mode_bits & forbidden_bits):
            return None
        blocks.append(block)
    return blocks
