"""Whole subtrees of a version that another target passes on: nothing of them is taken that the version does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from test_splitting_subtrees import Make, all_of, folder, make, new
from transfers import block_of, data, entry

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import IntegrityError
from flowengine.manifest import Block, Header, ManifestBuilder
from flowengine.store.encoded import parse_block
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.vouched import VouchedRecorder
from flowengine.wire.messages import DirectoryEnd, Folder

__all__ = ["make"]  # the fixture

EVIL = folder("x", b"of the feeder").entries
FOLDERS = [
    new("a"),
    new("b"),
    new("b/p"),
    folder("b/q"),
    new("b/r"),
    folder("c"),
    new("d"),
    new("e"),
]


def blocks_of(folders: list[Folder]) -> list[Block | None]:
    return [parse_block(one.entries) if one.entries else None for one in folders]


def begin(recorder: ManifestRecorder) -> None:
    recorder.enter(b"")
    recorder.block(block_of(entry(b"top", b"top")))


def record(recorder: ManifestRecorder, folders: list[Folder]) -> bytes:
    """Files of the root, then folders of it, in two parts, and one by itself; the version id."""
    begin(recorder)
    recorder.subtrees(folders[:6], blocks_of(folders[:6]))
    recorder.leaves([*zip(folders[6:], blocks_of(folders[6:]), strict=True)])
    recorder.enter(b"last")
    recorder.block(block_of(entry(b"f", b"last")))
    recorder.leave(0o755, 0, b"")
    recorder.leave(0o755, 0, b"")
    return recorder.finish().version_id


def refused(recorder: ManifestRecorder, folders: list[Folder]) -> bool:
    """Whether folders are refused as they are taken note of, and not by what comes behind them."""
    begin(recorder)
    with pytest.raises(IntegrityError) as caught:
        recorder.subtrees(folders, blocks_of(folders))
    return caught.value.reason == "feed-differs"


def vouching_for(version: bytes, folder: Path) -> VouchedRecorder:
    return VouchedRecorder(ManifestBuilder(None, Header(DEFAULT_PROFILE)), version, str(folder))


@pytest.fixture
def vouched(tmp_path: Path) -> Iterator[VouchedRecorder]:
    """A recorder that was shown the version of `FOLDERS`."""
    shown: list[bytes] = []
    version = record(ManifestRecorder(ManifestBuilder(shown.append, Header(DEFAULT_PROFILE))), FOLDERS)
    with closing(vouching_for(version, tmp_path)) as made:
        made.show(b"".join(shown), last=True)
        yield made


def changed(number: int, **changes: object) -> list[Folder]:
    found = list(FOLDERS)
    was = found[number]
    fields = {"depth": was.depth, "name": was.name, "mode": 0o755, "mtime_ns": 0, "entries": was.entries}
    found[number] = Folder(**(fields | changes))  # type: ignore[arg-type]
    return found


def test_what_is_of_the_version_passes(vouched: VouchedRecorder) -> None:
    assert record(vouched, FOLDERS) == vouched._version_id


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_other_files_in_any_folder_are_refused(vouched: VouchedRecorder, number: int) -> None:
    assert refused(vouched, changed(number, entries=EVIL)[: number + 1])


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_a_folder_of_another_name_is_refused(vouched: VouchedRecorder, number: int) -> None:
    assert refused(vouched, changed(number, name=FOLDERS[number].name + b"+")[: number + 1])


@pytest.mark.parametrize("added", [folder("aa"), folder("aa", b"of the feeder")])
def test_a_folder_that_the_version_does_not_have_is_refused(vouched: VouchedRecorder, added: Folder) -> None:
    assert refused(vouched, [FOLDERS[0], added])


def test_what_stands_here_is_refused_as_well_where_it_is_not_of_the_version(vouched: VouchedRecorder) -> None:
    begin(vouched)
    evil = Folder(0, b"a", 0o755, 0, EVIL)
    with pytest.raises(IntegrityError) as caught:
        vouched.leaves([*zip([evil], blocks_of([evil]), strict=True)])
    assert caught.value.reason == "feed-differs"


def test_nothing_is_taken_before_the_version_was_shown(tmp_path: Path) -> None:
    for folders in ([FOLDERS[0]], FOLDERS[1:5]):
        with closing(vouching_for(bytes(32), tmp_path)) as blind:
            ManifestRecorder.enter(blind, b"")
            with pytest.raises(IntegrityError) as caught:
                blind.subtrees(folders, blocks_of(folders))
        assert caught.value.reason == "feed-differs"


@pytest.mark.trio
@pytest.mark.parametrize("lie", [False, True])
async def test_of_subtrees_with_a_lie_in_them_nothing_is_wanted(
    make: Make, tmp_path: Path, lie: bool
) -> None:
    folders = [new("a"), new("b"), new("b/c"), new("d")]
    shown: list[bytes] = []
    recorder = ManifestRecorder(ManifestBuilder(shown.append, Header(DEFAULT_PROFILE)))
    recorder.enter(b"")
    recorder.subtrees(folders, blocks_of(folders))
    recorder.leave(0o755, 0, b"")
    version = recorder.finish().version_id
    target = make()
    with closing(vouching_for(version, tmp_path)) as vouching:
        vouching.show(b"".join(shown), last=True)
        target.placement.recorder = vouching
        target.enter()
        if lie:
            folders[3] = folder("d", data(7, 500))
            with pytest.raises(IntegrityError) as caught:
                target.offer(*folders)
            assert caught.value.reason == "feed-differs"
            assert target.wants == []
            assert target.landing.offers == {}
        else:
            target.offer(*folders)
            assert target.wants == [all_of(4)]
            target.placer.handle(DirectoryEnd(0o755, 0))
            assert vouching.finish().version_id == version


def test_whatever_records_compares_first() -> None:
    """A way to record that the version knows nothing of would let pass what it does not have."""
    by_others = {"batch", "subtrees", "finish"}  # which record by those below
    ways = {name for name in vars(ManifestRecorder) if not name.startswith("_")} - by_others
    assert ways <= vars(VouchedRecorder).keys()
