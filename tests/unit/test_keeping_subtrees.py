"""Folders that stand at the target as they are offered: they are not entered, and it is as if they had been."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import stats_of
from test_splitting_subtrees import ALL, NONE, Make, Target, all_of, folder, make, new, none_of
from transfers import data, entry

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import ProtocolError
from flowengine.manifest import Entry, Header, ManifestBuilder
from flowengine.store.leaves import KnownLeaf, known_leaves
from flowengine.store.many import open_listed
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_cache import DirectoryPart, ScanCache
from flowengine.transfer import placing_subtrees
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.placing_subtrees import each_of
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Folder,
    Options,
)
from flowengine.wire.paths import STAGING_NAME

__all__ = ["make"]  # the fixture

pytestmark = [pytest.mark.trio, pytest.mark.usefixtures("way")]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ScanCache]:
    made = ScanCache(DEFAULT_PROFILE.name, str(tmp_path))
    yield made
    made.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which folders were looked at together."""
    found: list[list[str]] = []

    def asking(cache: ScanCache, parent: int, names: Sequence[bytes], *args: Any) -> list[KnownLeaf | None]:
        found.append([*map(os.fsdecode, names)])
        # The stat of each is told, so that none is listed in vain.
        assert [st.st_ino for st in args[3]] == [
            os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino for name in names
        ]
        return known_leaves(cache, parent, names, *args)

    monkeypatch.setattr(placing_subtrees, "known_leaves", asking)
    return found


def content(path: str) -> bytes:
    return data(sum(os.fsencode(path)) + 77 * len(path), 200 + len(path))


def offered(path: str, *names: str, mode: int = 0o755, file_mode: int = 0o640) -> Folder:
    """A folder of files that are all like no other."""
    files = [
        entry(os.fsencode(name), content(f"{path}/{name}"), mode=file_mode) for name in sorted(names or "f")
    ]
    return folder(path, *files, mode=mode)


class Standing:
    """Makes what is offered stand at a target, known to its scan cache."""

    def __init__(self, target: Target, cache: ScanCache) -> None:
        self.target = target
        self.cache = target.placement.cache = cache

    def __call__(self, path: str, *names: str, known: bool = True, **modes: int) -> Folder:
        told = offered(path, *names, **modes)
        place = self.target.path / path
        place.mkdir(parents=True, exist_ok=True)
        entries = EncodedOffer(told.entries).decode().entries
        for one in entries:
            file = place / os.fsdecode(one.name)
            file.write_bytes(content(f"{path}/{os.fsdecode(one.name)}"))
            file.chmod(one.mode)
            os.utime(file, ns=(0, one.mtime_ns))
        if known:
            self.know(path, entries)
        self.dress(path, told.mode)
        return told

    def know(self, path: str, entries: list[Entry]) -> None:
        fd, st, listing = open_listed(self.target.root, os.fsencode(path), LARGE_OBJECT_BYTES, STAGING_NAME)
        os.close(fd)
        self.cache.save_directory(
            st.st_dev, st.st_ino, [DirectoryPart(listing.proof, encode_entries(entries))]
        )

    def dress(self, path: str, mode: int = 0o755) -> None:
        """Give a folder the mode and time that it is offered with."""
        (self.target.path / path).chmod(mode)
        os.utime(self.target.path / path, ns=(0, 0))


@pytest.fixture
def stand(make: Make, cache: ScanCache) -> Callable[..., Standing]:
    def make_one(options: Options | None = None) -> Standing:
        return Standing(make(options=options), cache)

    return make_one


Stand = Callable[..., Standing]


def finished(target: Target) -> bytes:
    """The version of what was offered, once the root is left."""
    target.placer.handle(DirectoryEnd(0o755, 5))
    return target.placement.recorder.finish().version_id


def version(*folders: Folder, owner: bool = False) -> bytes:
    """The version of a root with these folders, as it is recorded step by step."""
    recorder = ManifestRecorder(ManifestBuilder(None, Header(DEFAULT_PROFILE, owner=owner)))
    recorder.enter(b"")
    for message in each_of([*folders]):
        if isinstance(message, DirectoryBegin):
            recorder.enter(message.name)
        elif isinstance(message, EncodedOffer):
            recorder.entries(message.decode().entries)
        else:
            recorder.leave(message.mode, message.mtime_ns, message.extra)
    recorder.leave(0o755, 5, b"")
    return recorder.finish().version_id


# --- what is kept -----------------------------------------------------------------------------------------------


async def test_what_stands_unchanged_is_kept_and_all_else_is_entered_or_wanted_in_order(
    stand: Stand, asked: list[list[str]]
) -> None:
    standing = stand(Options(delete=True))
    target = standing.target
    folders = [
        standing("a"),
        standing("b", "f", "g"),
        standing("c"),
        new("d"),
        new("e"),
        new("e/in"),
        standing("f"),
        folder("g"),
        standing("g/p"),
        new("g/q"),
        new("g/r"),
        standing("g/s"),
        standing("h"),
        standing("i"),
        new("j"),
        new("k"),
        standing("l"),
    ]
    (target.path / "c" / "f").write_bytes(b"another")
    (target.path / "h" / "f").chmod(0o600)
    for path in ("c", "g", "h"):
        standing.dress(path)
    (target.path / "extra").mkdir()
    target.enter()
    before = stats_of(target.path / "a"), stats_of(target.path / "g" / "s"), stats_of(target.path / "l")
    target.offer(*folders)
    assert target.did == ["c", ("d", "e", "e/in"), "g", ("g/q", "g/r"), "h", ("j", "k")]
    # a and b; c, which has another file; d, e and what is in it; f and p; q and r; s, h and i; j and k; l
    assert target.wants == [
        none_of(2), ALL, all_of(3), none_of(2), all_of(2), none_of(3), all_of(2), NONE
    ]  # fmt: skip
    assert sum(target.answered) == target.placement.number == 16
    assert asked == [["a", "b", "c", "f", "h", "i", "l"], ["p", "s"]]
    root = target.landing.directories[b""]
    assert root.offered == {*b"a b c d e f g h i j k l".split()}
    assert (
        stats_of(target.path / "a"), stats_of(target.path / "g" / "s"), stats_of(target.path / "l")
    ) == before  # fmt: skip
    assert finished(target) == version(*folders)
    assert target.extras == [(b"", [b"extra"])]


async def test_what_is_kept_is_counted_as_what_is_entered_and_found_unchanged(
    stand: Stand,
) -> None:
    standing = stand()
    target = standing.target
    folders = [standing("a", "f", "g", "h"), standing("b"), standing("c", "x", "y")]
    sizes = [one.size for told in folders for one in EncodedOffer(told.entries).decode().entries]
    target.enter()
    target.offer(*folders)
    assert target.did == []
    assert target.wants == [none_of(3)]
    assert target.answered == [3]
    assert target.placement.number == 3
    kept = target.counters
    assert (kept.objects_unchanged, kept.bytes_unchanged) == (len(sizes), sum(sizes)) == (6, sum(sizes))
    assert (kept.objects_done, kept.bytes_done) == (len(sizes), sum(sizes))
    assert kept.objects_read == kept.bytes_payload == 0
    assert finished(target) == version(*folders)


async def test_what_was_not_there_when_its_parent_was_entered_is_not_looked_at(
    stand: Stand, asked: list[list[str]]
) -> None:
    standing = stand()
    target = standing.target
    target.enter()
    target.offer(standing("a"), standing("b"), new("c"), new("d"))
    assert target.did == ["a", "b", ("c", "d")]
    assert asked == []


async def test_folders_kept_in_one_message_and_the_next_are_numbered_on(stand: Stand) -> None:
    standing = stand()
    target = standing.target
    first = [standing("a"), standing("b"), new("c"), new("d"), standing("e")]
    second = [standing("f"), new("g"), new("h"), standing("i"), new("j"), new("k")]
    target.enter()
    target.offer(*first)
    target.offer(*second)
    assert target.did == [("c", "d"), ("g", "h"), ("j", "k")]
    assert target.wants == [none_of(2), all_of(2), NONE, NONE, all_of(2), NONE, all_of(2)]
    assert sorted(target.landing.offers) == [2, 6, 9]
    assert finished(target) == version(*first, *second)


async def test_leaves_within_folders_that_stand_there_are_looked_at_together(
    stand: Stand, asked: list[list[str]]
) -> None:
    standing = stand()
    target = standing.target
    folders = [folder("a")]
    folders += [standing(f"a/{number:02d}") for number in range(30)]
    folders += [folder("b"), folder("b/x"), standing("b/x/p"), standing("b/x/q"), new("b/y"), standing("c")]
    for path in ("b/x", "b", "a"):
        standing.dress(path)
    target.enter()
    target.offer(*folders)
    assert target.did == ["a", "b", "b/x", "b/y"]
    assert asked == [["c"], [f"{number:02d}" for number in range(30)], [], ["p", "q"]]
    assert finished(target) == version(*folders)


async def test_the_current_directory_may_be_deep(stand: Stand) -> None:
    standing = stand()
    target = standing.target
    told = [standing("x/y/a"), new("x/y/b"), new("x/y/b/c"), standing("x/y/d")]
    folders = [Folder(one.depth - 2, one.name, one.mode, one.mtime_ns, one.entries) for one in told]
    target.enter("x", "y")
    target.offer(*folders)
    assert target.did == [("x/y/b", "x/y/b/c")]
    assert target.wants == [NONE, all_of(2), NONE]


# --- what is not ------------------------------------------------------------------------------------------------

Happened = Callable[[Standing], object]


def rewritten(standing: Standing) -> None:
    """As long as before, with the time that it had."""
    path = standing.target.path / "m" / "f"
    st = path.stat()
    path.write_bytes(bytes(st.st_size))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def forgotten(standing: Standing) -> None:
    st = (standing.target.path / "m").stat()
    standing.cache.save_directory(st.st_dev, st.st_ino, [])


def partial(standing: Standing) -> None:
    st = (standing.target.path / "m").stat()
    (part,) = standing.cache.directory(st.st_dev, st.st_ino)
    standing.cache.add_directory_part(st.st_dev, st.st_ino, 1, part)


def of_other_bytes(standing: Standing) -> None:
    one = EncodedOffer(offered("m").entries).decode().entries[0]
    standing.know("m", [entry(b"f", data(5, one.size), mode=one.mode)])


def linked(standing: Standing) -> None:
    """It has another name; and the cache knows it so."""
    os.link(standing.target.path / "m" / "f", standing.target.path / "z-other-name")
    standing.know("m", EncodedOffer(offered("m").entries).decode().entries)


def link_to_folder(standing: Standing) -> None:
    root = standing.target.path
    (root / "m").rename(root / "moved")
    (root / "m").symlink_to("moved")


CHANGED: dict[str, Happened] = {
    "rewritten": rewritten,
    "of other bytes": of_other_bytes,
    "forgotten": forgotten,
    "partial": partial,
    "linked": linked,
    "link to a folder": link_to_folder,
    "file mode": lambda standing: (standing.target.path / "m" / "f").chmod(0o600),
    "file time": lambda standing: os.utime(standing.target.path / "m" / "f", ns=(9, 9)),
    "file more": lambda standing: (standing.target.path / "m" / "g").write_bytes(b"more"),
    "file less": lambda standing: (standing.target.path / "m" / "f").unlink(),
    "other name": lambda standing: (standing.target.path / "m" / "f").rename(
        standing.target.path / "m" / "e"
    ),
    "folder more": lambda standing: (standing.target.path / "m" / "below").mkdir(),
    "staging folder": lambda standing: (standing.target.path / "m" / os.fsdecode(STAGING_NAME)).mkdir(),
    "pipe more": lambda standing: os.mkfifo(standing.target.path / "m" / "pipe"),
    "link more": lambda standing: (standing.target.path / "m" / "link").symlink_to("f"),
}


@pytest.mark.parametrize("change", CHANGED)
async def test_a_folder_that_is_not_as_the_cache_has_it_is_entered(
    stand: Stand, asked: list[list[str]], change: str
) -> None:
    standing = stand()
    folders = [standing(name) for name in "lmn"]
    CHANGED[change](standing)
    if change != "link to a folder":
        standing.dress("m")
    target = standing.target
    target.enter()
    target.offer(*folders)
    assert target.did == ["m"]
    assert sum(target.answered) == target.placement.number == 3
    assert asked == [["l", "m", "n"]]
    assert finished(target) == version(*folders)


@pytest.mark.parametrize(("mode", "mtime_ns"), [(0o700, 0), (0o755, 1), (0o1755, 0), (0o2755, 0)])
async def test_a_folder_of_another_mode_or_time_is_entered_and_gets_its_own(
    stand: Stand, mode: int, mtime_ns: int
) -> None:
    standing = stand()
    folders = [standing(name) for name in "lmn"]
    target = standing.target
    (target.path / "m").chmod(mode)
    os.utime(target.path / "m", ns=(0, mtime_ns))
    target.enter()
    target.offer(*folders)
    assert target.did == ["m"]
    assert target.wants == [none_of(3)]
    assert finished(target) == version(*folders)


async def test_files_with_bits_that_are_set_one_by_one_let_their_folder_be_entered(stand: Stand) -> None:
    standing = stand(Options(owner=True))
    folders = [standing("l"), standing("m", file_mode=0o4755), standing("n")]
    target = standing.target
    target.enter()
    target.offer(*folders)
    assert target.did == ["m"]
    assert finished(target) == version(*folders, owner=True)


async def test_a_folder_without_files_is_entered(stand: Stand, asked: list[list[str]]) -> None:
    standing = stand()
    (standing.target.path / "m").mkdir()
    folders = [standing("l"), folder("m"), standing("n")]
    standing.dress("m")
    target = standing.target
    target.enter()
    target.offer(*folders)
    assert target.did == ["m"]
    assert asked == [["l", "n"]]
    assert target.wants == [none_of(2)]
    assert finished(target) == version(*folders)


async def test_a_folder_that_gets_one_in_it_is_entered_though_its_files_stand_there(
    stand: Stand, asked: list[list[str]]
) -> None:
    standing = stand()
    folders = [standing("l"), standing("m"), new("m/in"), standing("n")]
    target = standing.target
    target.enter()
    target.offer(*folders)
    assert target.did == ["m", "m/in"]
    assert asked == [["l", "n"]]
    assert finished(target) == version(*folders)


@pytest.mark.parametrize("why", ["dry run", "atomic", "folds names", "no cache", "halted"])
async def test_where_folders_are_entered_one_by_one_none_is_looked_at_with_others(
    stand: Stand, asked: list[list[str]], why: str
) -> None:
    options = {"dry run": Options(dry_run=True), "atomic": Options(publish="atomic")}.get(why)
    standing = stand(options)
    folders = [standing(name) for name in "lmn"]
    target = standing.target
    if why == "no cache":
        target.placement.cache = None
    target.placer._folds_names = why == "folds names"
    target.enter()
    if why == "halted":
        halt_landing(target.landing, "ended")
    before = stats_of(target.path)
    target.offer(*folders)
    assert asked == []
    assert target.did == ["l", "m", "n"]
    assert sum(target.answered) == 3
    assert {path: one for path, one in stats_of(target.path).items() if b"flow-staging" not in path} == {
        path: one for path, one in before.items() if b"flow-staging" not in path
    }
    assert finished(target) == version(*folders)


@pytest.mark.parametrize("options", [Options(), Options(delete=True)])
async def test_a_folder_with_a_file_that_is_not_offered_is_entered_and_that_is_told(
    stand: Stand, options: Options
) -> None:
    standing = stand(options)
    folders = [standing("l"), standing("m", "f", "old"), standing("n")]
    folders[1] = offered("m", "f")
    target = standing.target
    target.enter()
    target.offer(*folders)
    assert target.did == ["m"]
    finished(target)
    assert target.extras == ([(b"m", [b"old"])] if options.delete else [])


# --- lies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["acb", "aab", "bca", "abb"])
async def test_names_that_do_not_rise_are_refused_though_all_stands_there(stand: Stand, order: str) -> None:
    standing = stand()
    made = {name: standing(name) for name in "abc"}
    target = standing.target
    target.enter()
    with pytest.raises(ProtocolError, match="rise"):
        target.offer(*(made[name] for name in order))


async def test_what_came_before_may_not_come_again_though_it_stands_there(stand: Stand) -> None:
    standing = stand()
    made = [standing("a"), standing("b")]
    target = standing.target
    target.enter()
    target.offer(*made)
    with pytest.raises(ProtocolError, match="rise"):
        target.offer(*made)


@pytest.mark.parametrize("garbage", [b"\xc1", b"\x91", b"\x90", b"\xdd\xff\xff\xff\xff", b"\xdc\x00\x10"])
async def test_garbage_for_entries_of_a_folder_that_stands_there_is_refused(
    stand: Stand, garbage: bytes
) -> None:
    standing = stand()
    folders = [standing("a"), standing("b"), standing("c")]
    target = standing.target
    target.enter()
    lie = Folder(0, b"b", 0o755, 0, garbage)
    with pytest.raises(ProtocolError):
        target.offer(folders[0], lie, folders[2])
