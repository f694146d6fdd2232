"""Folders that nobody touched, looked at many to a call: what is known of them, when it is not, and what a scan tells then."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scans import Told, scan
from support import mounted, roomy_folder
from transfers import data, entry

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.manifest import Entry
from flowengine.store import leaves, many, scan_cache
from flowengine.store import scan as scanning
from flowengine.store.leaves import KnownLeaf, known_leaves
from flowengine.store.many import Stat, open_listed
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_cache import DirectoryPart, ScanCache
from flowengine.store.scan_events import Batch, DirectoryEntered
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import STAGING_NAME

STAGING = os.fsdecode(STAGING_NAME)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ScanCache]:
    """A cache that is not new: a new one knows without asking that it knows nothing."""
    state = tmp_path / "state"
    state.mkdir()
    first = ScanCache(DEFAULT_PROFILE.name, str(state))
    first.save_directory(0, 0, [DirectoryPart(b"?", b"?")])
    first.close()
    made = ScanCache(DEFAULT_PROFILE.name, str(state))
    yield made
    made.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


def file(path: Path, content: bytes | None = None) -> Path:
    """A file of its own bytes, in folders that are made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(path.name) * 9 if content is None else content)
    return path


def look(
    cache: ScanCache,
    root: Path,
    names: Sequence[bytes | str],
    entries: Sequence[bytes] | None = None,
    seen: Sequence[Stat] | None = None,
) -> list[KnownLeaf | None]:
    """What is known of some folders; no descriptor is left open by asking."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = os.listdir("/proc/self/fd")
    try:
        found = known_leaves(
            cache, fd, [os.fsencode(name) for name in names], LARGE_OBJECT_BYTES, STAGING_NAME, entries, seen
        )
        assert os.listdir("/proc/self/fd") == before
        return found
    finally:
        os.close(fd)


def entries_of(found: Sequence[KnownLeaf | None]) -> list[list[Entry] | None]:
    return [None if one is None else one.block.entries for one in found]


def remember(cache: ScanCache, folder: Path, *entries: Entry) -> bytes:
    """Let the cache have a folder as it stands, with these entries; gives their encoding."""
    fd = os.open(folder.parent, os.O_RDONLY)
    own, st, listing = open_listed(fd, os.fsencode(folder.name), LARGE_OBJECT_BYTES)
    os.close(own)
    os.close(fd)
    encoded = encode_entries([*entries])
    cache.save_directory(st.st_dev, st.st_ino, [DirectoryPart(listing.proof, encoded)])
    return encoded


# --- what is known ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_folders_that_nobody_touched_are_known_with_their_stat_and_files(
    root: Path, cache: ScanCache
) -> None:
    names = [b"a", b"\xff\xfe not UTF-8", b"new\nline", b"n" * 255, b"z"]
    for number, name in enumerate(names):
        folder = root / os.fsdecode(name)
        for inner in names[: number + 1]:
            file(folder / os.fsdecode(inner))
        folder.chmod(0o750 + number)
    file(root / "z" / "empty", b"")
    told = scan(f"{root}/", cache=cache)
    found = look(cache, root, names)
    assert [one.st if one else None for one in found] == [
        Stat.of((root / os.fsdecode(name)).stat()) for name in names
    ]
    scanned: dict[bytes, list[Entry]] = {}
    for event in told.events:
        if event[0] == "entry":
            scanned.setdefault(os.path.basename(os.path.dirname(event[1])), []).append(event[2])
    assert entries_of(found) == [scanned[name] for name in names]
    # In whatever order they are asked for, and however often.
    assert entries_of(look(cache, root, [b"z", b"a", b"gone", b"z"])) == [
        scanned[b"z"], scanned[b"a"], None, scanned[b"z"]
    ]  # fmt: skip
    assert look(cache, root, []) == []


@pytest.mark.usefixtures("way")
def test_what_the_cache_knows_nothing_of_is_not_listed_where_the_stat_is_told(
    root: Path, cache: ScanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", "d"):
        file(root / name / "f")
    scan(f"{root}/", cache=cache)
    (root / "d").rename(root.parent / "what d was")  # so nothing gets its inode
    for name in ("d", "new"):
        (root / name).mkdir()
    file(root / "b" / "g")
    names = [b"new", b"a", b"b", b"c", b"d"]
    seen = [Stat.of((root / os.fsdecode(name)).stat()) for name in names]
    listed: list[bytes] = []
    really = leaves._list

    def listing(parent: int, some: Sequence[bytes], *args: Any) -> Any:
        listed.extend(some)
        return really(parent, some, *args)

    monkeypatch.setattr(leaves, "_list", listing)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        told = known_leaves(cache, fd, names, LARGE_OBJECT_BYTES, STAGING_NAME, None, seen)
        assert [one is not None for one in told] == [False, True, False, True, False]
        assert listed == [b"a", b"b", b"c"]
        assert entries_of(told) == entries_of(look(cache, root, names))
        # What was told may be old: what stands there now decides, and is told.
        (root / "a").chmod(0o700)
        again = known_leaves(cache, fd, names, LARGE_OBJECT_BYTES, STAGING_NAME, None, seen)
        assert again[1] is not None
        assert again[1].st == Stat.of((root / "a").stat())
        shutil.move(root / "c", root / "elsewhere")
        shutil.move(root / "b", root / "c")
        again = known_leaves(cache, fd, names, LARGE_OBJECT_BYTES, STAGING_NAME, None, seen)
        assert [one is not None for one in again] == [False, True, False, False, False]
        listed.clear()
        nothing = [seen[0]._replace(st_ino=1 << 62)]
        assert known_leaves(cache, fd, [b"a"], LARGE_OBJECT_BYTES, STAGING_NAME, None, nothing) == [None]
        assert listed == []
    finally:
        os.close(fd)


def test_no_more_is_taken_from_the_cache_than_is_looked_at(
    root: Path, cache: ScanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:03d}" for number in range(3 * leaves._TOGETHER)]
    for name in names:
        file(root / name / "f")
    scan(f"{root}/", cache=cache)
    seen = [Stat.of((root / name).stat()) for name in names]
    assert None not in look(cache, root, names, seen=seen)
    taken: list[int] = []
    really = cache.whole_directories

    def taking(dev: int, inos: Sequence[int]) -> dict[int, DirectoryPart]:
        taken.extend(inos)
        return really(dev, inos)

    monkeypatch.setattr(cache, "whole_directories", taking)
    monkeypatch.setattr(leaves, "_MANY_PROOFS", 100)
    found = look(cache, root, names, seen=seen)
    assert [one is not None for one in found] == [number < leaves._TOGETHER for number in range(len(names))]
    assert taken == [st.st_ino for st in seen[: leaves._TOGETHER]]


def test_both_ways_know_the_same(root: Path, cache: ScanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, happened in [*BEFORE.items(), *AFTER.items()]:
        for inner in "ab":
            file(root / name / inner)
        if name in BEFORE:
            happened(root / name)
    scan(f"{root}/", cache=cache)
    names = [*AFTER, *BEFORE, "same", "gone"]
    for inner in "ab":
        file(root / "same" / inner)
    scan(f"{root}/", cache=cache)
    for name, happened in AFTER.items():
        happened(root / name)
    offered = [encode_entries([]), *[remember_entries(root / "same")] * (len(names) - 2), b"\xc1 no entries"]

    def all_of() -> list[Any]:
        return [
            None if one is None else (one.st, one.block.data, one.block.segments)
            for one in (*look(cache, root, names), *look(cache, root, names, offered))
        ]

    assert many.is_compiled()
    compiled = all_of()
    monkeypatch.setattr(many, "_library", None)
    assert all_of() == compiled
    known = [name for name, one in zip(names * 2, compiled, strict=True) if one is not None]
    assert known == [*STILL_KNOWN, "same", "same"]


def remember_entries(folder: Path) -> bytes:
    """The encoded files of a folder, of one chunk each."""
    return encode_entries(
        [
            Entry(
                os.fsencode(path.name),
                0,
                stat.S_IMODE(path.stat().st_mode),
                path.stat().st_mtime_ns,
                path.stat().st_size,
                entry(b"x", path.read_bytes()).chunks,
            )
            for path in sorted(folder.iterdir())
        ]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_proofs_of_many_files_and_of_few_behind_them_are_each_their_own(root: Path, cache: ScanCache) -> None:
    """More bytes than the library has room for at first, and again as much."""
    counts = {"a": 1, "b": 1500, "c": 2, "d": 3500, "e": 3}
    for name, count in counts.items():
        for number in range(count):
            file(root / name / f"{number:05d}-{name}", b"")
    told = scan(f"{root}/", cache=cache)
    assert told.objects == sum(counts.values())
    found = look(cache, root, [*counts])
    assert [one.block.count if one else None for one in found] == [*counts.values()]


# --- when nothing is known --------------------------------------------------------------------------------------

Happened = Callable[[Path], object]


def replaced_by_link(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    folder.symlink_to(folder.rename(elsewhere / folder.name))


def replaced_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"a file")


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    file(path / "in")


def written_alike(path: Path) -> None:
    """As long as before, and with the time that it had."""
    st = path.stat()
    path.write_bytes(bytes(st.st_size))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def linked_from_outside(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    os.link(folder / "a", outside / f"{folder.name} again")


def replaced_by_copy(folder: Path) -> None:
    """Another folder with the same files in it: its files are where they were, but the cache has it under another inode."""
    kept = folder.rename(folder.with_name("kept"))
    folder.mkdir()
    for path in kept.iterdir():
        path.rename(folder / path.name)
    kept.rename(folder.parent.parent / f"kept {folder.name}")


def removed(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def touched(*paths: Path) -> None:
    for path in paths:
        os.utime(path, ns=(3, 4))


def large(folder: Path) -> None:
    with open(folder / "large", "wb") as made:
        made.truncate(LARGE_OBJECT_BYTES)


BEFORE: dict[str, Happened] = {
    "holds a large file": large,
    "holds a folder": lambda folder: (folder / "below").mkdir(),
    "holds a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "holds a link": lambda folder: (folder / "link").symlink_to("a"),
    "holds a file with another name outside": linked_from_outside,
    "holds a file with another name": lambda folder: os.link(folder / "a", folder / "c"),
    "holds a staging folder": lambda folder: (folder / STAGING).mkdir(),
    "holds a file of the reserved name": lambda folder: (folder / STAGING).write_bytes(b"x"),
    "holds nothing": lambda folder: removed(*folder.iterdir()),
}
"""What was so when the folder was scanned, and is still as it was."""

AFTER: dict[str, Happened] = {
    "is gone": shutil.rmtree,
    "is a file": replaced_by_file,
    "is a link to what it was": replaced_by_link,
    "is another one": replaced_by_copy,
    "has a new file": lambda folder: file(folder / "c"),
    "has a file less": lambda folder: (folder / "a").unlink(),
    "has no file any more": lambda folder: removed(*folder.iterdir()),
    "has a file of another name": lambda folder: (folder / "a").rename(folder / "aa"),
    "has two that swapped names": lambda folder: (
        (folder / "a").rename(folder / "c"),
        (folder / "b").rename(folder / "a"),
        (folder / "c").rename(folder / "b"),
    ),
    "has a file that was written": lambda folder: written_alike(folder / "a"),
    "has a file of another mode": lambda folder: (folder / "b").chmod(0o600),
    "has a file of another time": lambda folder: os.utime(folder / "b", ns=(1, 1)),
    "has a file with another name now": linked_from_outside,
    "has a large file now": large,
    "has a folder now": lambda folder: (folder / "below").mkdir(),
    "has a pipe now": lambda folder: os.mkfifo(folder / "pipe"),
    "has a staging folder now": lambda folder: (folder / STAGING).mkdir(),
    # And what is no reason: the files are as they were.
    "has another mode itself": lambda folder: folder.chmod(0o700),
    "has another time itself": lambda folder: os.utime(folder, ns=(1, 1)),
    "had a file that came and went": lambda folder: file(folder / "c").unlink(),
}
"""What became of the folder since it was scanned."""

STILL_KNOWN = ["has another mode itself", "has another time itself", "had a file that came and went"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("why", [*BEFORE, *AFTER])
def test_a_folder_that_is_not_as_it_was_or_holds_more_than_small_files_is_not_known(
    root: Path, cache: ScanCache, why: str
) -> None:
    for name in ("first", why, "last"):
        file(root / name / "a")
        file(root / name / "b")
    if why in BEFORE:
        BEFORE[why](root / why)
    scan(f"{root}/", cache=cache)
    if why in AFTER:
        AFTER[why](root / why)
    found = look(cache, root, ["first", why, "last"])
    assert [one is not None for one in found] == [True, why in STILL_KNOWN, True]
    if why in STILL_KNOWN:
        assert found[1] is not None
        assert found[1].st == Stat.of((root / why).stat())


@pytest.mark.usefixtures("way")
def test_what_the_cache_has_in_parts_or_not_to_its_end_is_not_known(root: Path, cache: ScanCache) -> None:
    for name in ("parts", "partial", "behind", "none", "whole", "odd"):
        file(root / name / "a")
    scan(f"{root}/", cache=cache)
    st = {path.name: path.stat() for path in root.iterdir()}
    rows = {name: cache.directory(one.st_dev, one.st_ino) for name, one in st.items()}
    dev = st["whole"].st_dev
    for name in ("parts", "partial", "none"):
        cache.save_directory(dev, st[name].st_ino, [])
    cache.save_directory(dev, st["parts"].st_ino, rows["parts"] * 2)
    cache.add_directory_part(dev, st["partial"].st_ino, 1, rows["partial"][0])
    cache.add_directory_part(dev, st["behind"].st_ino, 1, rows["behind"][0])
    cache.save_directory(dev, st["odd"].st_ino, [DirectoryPart(rows["odd"][0].stats, b"\xc1 no entries")])
    known = look(cache, root, ["parts", "partial", "behind", "none", "odd", "whole"])
    assert entries_of(known[:-1]) == [None] * 5
    assert known[-1] is not None


@pytest.mark.usefixtures("way")
def test_a_file_system_that_is_mounted_there_is_another_one(
    root: Path, cache: ScanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cannot be mounted by everybody: the library's word for its number is changed."""
    for name in "abc":
        file(root / name / "f")
    scan(f"{root}/", cache=cache)
    listed = leaves._list

    def look_elsewhere(*args: Any) -> list[tuple[Stat, bytes] | None]:
        a, b, c = listed(*args)
        assert b is not None
        return [a, (b[0]._replace(st_dev=b[0].st_dev + 1), b[1]), c]

    monkeypatch.setattr(leaves, "_list", look_elsewhere)
    assert [one is not None for one in look(cache, root, "abc")] == [True, False, True]
    seen = [Stat.of((root / name).stat()) for name in "abc"]
    assert [one is not None for one in look(cache, root, "abc", seen=seen)] == [True, False, True]


# --- with what they are to have ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("offered", "known"),
    [
        ([entry(b"f", data(1, 100)), entry(b"g", data(2, 100))], True),
        ([entry(b"f", data(1, 100)), entry(b"g", data(3, 100))], False),  # which the cache knows better
        ([entry(b"f", data(1, 100)), entry(b"g", data(2, 100), mode=0o600)], False),
        ([entry(b"f", data(1, 100)), entry(b"g", data(2, 101))], False),
        ([entry(b"f", data(1, 100)), entry(b"h", data(2, 100))], False),
        ([entry(b"f", data(1, 100))], False),
        ([entry(b"f", data(1, 100)), entry(b"g", data(2, 100)), entry(b"h", b"")], False),
        ([Entry(b"f", 1, 0o777, 0, 0, b"", b"g"), entry(b"g", data(2, 100))], False),
        ([], False),
        (None, False),
    ],
)
def test_only_folders_with_just_the_files_that_they_are_to_have_are_known(
    root: Path, cache: ScanCache, offered: list[Entry] | None, known: bool
) -> None:
    own = [entry(b"f", data(1, 100)), entry(b"g", data(2, 100))]
    encoded = b"\xc1 no entries" if offered is None else encode_entries(offered)
    right = []
    for name in "abc":
        for one, seed in zip(own, (1, 2), strict=True):
            path = file(root / name / os.fsdecode(one.name), data(seed, 100))
            path.chmod(one.mode)
            os.utime(path, ns=(0, one.mtime_ns))
        right.append(remember(cache, root / name, *own))
    found = look(cache, root, "abc", [right[0], encoded, right[2]])
    assert [one is not None for one in found] == [True, known, True]


@pytest.mark.usefixtures("way")
def test_what_was_touched_is_not_known_though_it_looks_as_it_is_to_be(root: Path, cache: ScanCache) -> None:
    """Names, sizes, modes and times are those that are offered: only the cache's proof says that a byte may differ."""
    one = entry(b"a", data(1, 100))
    for name in "ab":
        path = file(root / name / "a", data(1, 100))
        path.chmod(one.mode)
        os.utime(path, ns=(0, one.mtime_ns))
    right = [remember(cache, root / name, one) for name in "ab"]
    written_alike(root / "b" / "a")
    assert Stat.of((root / "b" / "a").stat()).st_mtime_ns == one.mtime_ns
    assert [leaf is not None for leaf in look(cache, root, "ab", right)] == [True, False]


@pytest.mark.usefixtures("way")
def test_bits_that_a_scan_does_not_tell_are_seen_where_files_are_to_be_without_them(
    root: Path, cache: ScanCache
) -> None:
    """The cache has the entries that are offered, and the proof of what stands there: a program that runs as its owner."""
    for name in "abc":
        file(root / name / "f").chmod(0o4755 if name == "b" else 0o755)
    scan(f"{root}/", cache=cache)
    found = look(cache, root, "abc")
    assert [[one.mode for one in found_one or ()] for found_one in entries_of(found)] == [[0o755]] * 3
    offered = [encode_entries(one or []) for one in entries_of(found)]
    assert [one is not None for one in look(cache, root, "abc", offered)] == [True, False, True]


# --- what the cache has of many ---------------------------------------------------------------------------------


def part(number: int) -> DirectoryPart:
    return DirectoryPart(b"stats %d" % number, b"entries %d" % number)


def test_many_folders_are_asked_for_in_few_statements(cache: ScanCache) -> None:
    for ino in range(100):
        cache.save_directory(7, ino, [part(ino)])
        cache.save_directory(8, ino, [part(1000 + ino)])
    cache.flush()
    asked: list[str] = []
    cache._db.set_trace_callback(asked.append)
    wanted = [*range(50, 150), 3, 60, 60]
    assert cache.whole_directories(7, wanted) == {ino: part(ino) for ino in (3, *range(50, 100))}
    assert sum("SELECT" in one for one in asked) == 4  # 101 of them
    assert cache.whole_directories(8, [5]) == {5: part(1005)}
    assert cache.whole_directories(9, [5]) == {}
    assert cache.whole_directories(7, []) == {}


def test_numbers_of_all_64_bits_are_given_as_they_were_asked_for(cache: ScanCache) -> None:
    high, highest = 1 << 63, (1 << 64) - 1
    cache.save_directory(highest, high, [part(1)])
    cache.save_directory(highest, highest, [part(2)])
    cache.save_directory(1, 5, [part(3)])
    assert cache.whole_directories(highest, [5, high, highest]) == {high: part(1), highest: part(2)}
    # The library has them as signed ones.
    assert cache.whole_directories(-1, [-high, -1]) == {-high: part(1), -1: part(2)}


def test_only_what_is_whole_and_one_part_is_given(cache: ScanCache) -> None:
    cache.save_directory(1, 1, [part(1)])
    cache.save_directory(1, 2, [part(1), part(2)])
    cache.add_directory_part(1, 3, 1, part(3))
    cache.save_directory(1, 4, [part(4)])
    cache.add_directory_part(1, 4, 1, part(5))
    cache.add_directory_part(1, 5, 1, part(6))
    cache.save_directory(1, 5, [part(7)])  # what was partial is gone with it
    cache.save_directory(1, 6, [])
    cache.flush()
    assert cache.whole_directories(1, range(9)) == {1: part(1), 5: part(7)}


@pytest.mark.parametrize("what", ["whole", "part"])
def test_what_waits_to_be_written_is_asked_for_as_well(
    cache: ScanCache, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(scan_cache, "_COMMIT_S", 1e9)
    cache.save_directory(1, 1, [part(1)])
    cache.flush()
    if what == "whole":
        cache.save_directory(1, 1, [part(2)])
        cache.save_directory(1, 2, [part(3)])
        assert cache.whole_directories(1, [1, 2]) == {1: part(2), 2: part(3)}
    else:
        cache.add_directory_part(1, 1, 1, part(2))
        assert cache.whole_directories(1, [1, 2]) == {}


def test_what_waits_stays_where_others_are_asked_for(
    cache: ScanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cache, "_COMMIT_S", 1e9)
    cache.save_directory(1, 1, [part(1)])
    written: list[str] = []
    cache._db.set_trace_callback(written.append)
    assert cache.whole_directories(1, [2, 3]) == {}
    assert cache.whole_directories(2, [1]) == {}
    assert not any("INSERT" in one for one in written)


def test_a_new_cache_is_asked_for_nothing_but_what_was_written_to_it(tmp_path: Path) -> None:
    new = ScanCache(DEFAULT_PROFILE.name, str(tmp_path))
    asked: list[str] = []
    new._db.set_trace_callback(asked.append)
    assert new.whole_directories(1, [1, 2, 3]) == {}
    assert not any("FROM directory" in one for one in asked)
    new.save_directory(1, 2, [part(2)])
    assert new.whole_directories(1, [1, 2, 3]) == {2: part(2)}
    new.close()


def test_a_broken_cache_knows_nothing(cache: ScanCache) -> None:
    cache.save_directory(1, 1, [part(1)])
    cache._broken = True
    assert cache.whole_directories(1, [1]) == {}
    cache._broken = False


# --- what a scan tells ------------------------------------------------------------------------------------------


def tree(root: Path) -> Path:
    """Nested folders of files: plain ones beside each other, and others among them."""
    for top in "abc":
        for middle in "abc":
            for number in range(8):
                for name in range(number % 4 + (number == 0)):
                    file(root / top / middle / f"{number}" / f"f{name}", data(number * 9 + name, 50 * number))
                (root / top / middle / f"{number}").mkdir(exist_ok=True)
            file(root / top / middle / "beside", b"beside")
        file(root / top / "only" / "one")
    for number in range(70):
        file(root / "many" / f"{number:02d}" / "f", b"%d" % number)
    file(root / "large" / "among" / "small")
    large(root / "large" / "among")
    file(root / "linked" / "a" / "one")
    os.link(root / "linked" / "a" / "one", root / "linked" / "a" / "two")
    file(root / "linked" / "b" / "other")
    os.link(root / "linked" / "a" / "one", root / "linked" / "c three")
    (root / "links" / "in").mkdir(parents=True)
    (root / "links" / "in" / "link").symlink_to("nowhere")
    file(root / "links" / "in" / "file")
    file(root / "top", b"top")
    return root


EDITS: dict[str, Happened] = {
    "nothing": lambda root: None,
    "a file is written": lambda root: (root / "many/40/f").write_bytes(b"other"),
    "a file is written as long as it was": lambda root: written_alike(root / "many/41/f"),
    "a file comes": lambda root: file(root / "many/33/e"),
    "a file goes": lambda root: (root / "a/b/3/f1").unlink(),
    "the only file goes": lambda root: (root / "many/20/f").unlink(),
    "a file gets another name": lambda root: (root / "a/b/3/f1").rename(root / "a/b/3/zz"),
    "a file moves to another folder": lambda root: (root / "many/05/f").rename(root / "many/60/g"),
    "a file gets another mode": lambda root: (root / "many/10/f").chmod(0o400),
    "a file gets another time": lambda root: os.utime(root / "many/10/f", ns=(1, 2)),
    "a folder gets another mode": lambda root: (root / "many/11").chmod(0o700),
    "a folder gets bits that are not told": lambda root: (root / "many/12").chmod(0o7755),
    "a folder gets another time": lambda root: os.utime(root / "many/13", ns=(1, 2)),
    "a folder comes": lambda root: file(root / "many/065/new"),
    "an empty folder comes": lambda root: (root / "many/500").mkdir(),
    "a folder goes": lambda root: shutil.rmtree(root / "many/69"),
    "the first folder goes": lambda root: shutil.rmtree(root / "many/00"),
    "a folder gets another name": lambda root: (root / "many/14").rename(root / "many/zz"),
    "a folder moves": lambda root: (root / "many/15").rename(root / "b/b/15"),
    "two folders swap names": lambda root: (
        (root / "many/16").rename(root / "aside"),
        (root / "many/17").rename(root / "many/16"),
        (root / "aside").rename(root / "many/17"),
    ),
    "a folder becomes a link": lambda root: replaced_by_link(root / "many/18"),
    "a folder becomes a file": lambda root: replaced_by_file(root / "many/18"),
    "a folder becomes another one": lambda root: replaced_by_copy(root / "many/18"),
    "a file becomes a folder": lambda root: replaced_by_folder(root / "a/a/beside"),
    "a folder gets one in it": lambda root: file(root / "many/19/below/f"),
    "a folder gets a large file": lambda root: large(root / "many/21"),
    "a large file becomes small": lambda root: (root / "large/among/large").write_bytes(b"small"),
    "a folder gets a link": lambda root: (root / "many/22/link").symlink_to("f"),
    "a folder gets a pipe": lambda root: os.mkfifo(root / "many/23/pipe"),
    "a folder gets a staging folder": lambda root: file(root / "many/24" / STAGING / "lock"),
    "a folder gets a file of that name": lambda root: file(root / "many/24" / STAGING),
    "a file gets another name beside": lambda root: os.link(root / "many/25/f", root / "many/25/g"),
    "a file gets another name elsewhere": lambda root: os.link(root / "many/25/f", root / "many/30/a"),
    "a file gets another name outside": lambda root: os.link(root / "many/25/f", root.parent / "outside"),
    "a file loses its other name": lambda root: (root / "linked/c three").unlink(),
    "all names but one go": lambda root: removed(root / "linked/c three", root / "linked/a/two"),
    "odd names come": lambda root: [
        file(root / "many" / os.fsdecode(name) / os.fsdecode(name)) for name in (b"\xff\xfe", b"x" * 255)
    ],
    "many files get another time": lambda root: touched(*root.rglob("f*")),
}  # fmt: skip


UNSEEN = ["nothing", "a file gets another name outside"]


def same(told: Told, fresh: Told) -> None:
    for number, (one, other) in enumerate(zip(told.events, fresh.events, strict=False)):
        assert one == other, f"event {number}"
    assert told == fresh


@pytest.mark.parametrize("edit", EDITS)
def test_a_warm_scan_tells_what_a_fresh_one_tells(root: Path, cache: ScanCache, edit: str) -> None:
    tree(root)
    cold = scan(f"{root}/", cache=cache)
    EDITS[edit](root)
    fresh = scan(f"{root}/")
    assert (fresh == cold) is (edit in UNSEEN)
    for _ in range(2):
        same(scan(f"{root}/", cache=cache), fresh)


class Spy:
    """What a scanner did to look at folders: which it opened by themselves, and what it asked for together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.asked: list[list[str]] = []
        self.known: list[str] = []

        def opening(parent: int, name: bytes, *args: Any) -> Any:
            self.opened.append(os.fsdecode(name))
            return open_listed(parent, name, *args)

        def asking(cache: ScanCache, parent: int, names: Sequence[bytes], *args: Any) -> Any:
            self.asked.append([*map(os.fsdecode, names)])
            found = known_leaves(cache, parent, names, *args)
            self.known += [
                os.fsdecode(name) for name, one in zip(names, found, strict=True) if one is not None
            ]
            return found

        monkeypatch.setattr(scanning, "open_listed", opening)
        monkeypatch.setattr(scanning, "known_leaves", asking)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.usefixtures("way")
def test_of_many_folders_that_nobody_touched_the_first_is_opened_and_the_others_are_looked_at_together(
    root: Path, cache: ScanCache, spy: Spy
) -> None:
    names = [f"{number:03d}" for number in range(200)]
    for name in names:
        file(root / "in" / name / "f")
    scan(f"{root}/", cache=cache)
    assert spy.opened == ["in", *names]
    assert spy.known == []
    spy.opened.clear()
    told = scan(f"{root}/", cache=cache)
    assert spy.opened == ["in", names[0]]
    assert spy.known == names[1:]
    assert len(spy.asked) <= 12
    assert [event[2] for event in told.events if event[0] == "enter"] == [
        b"", b"in", *(b"in/" + os.fsencode(name) for name in names)
    ]  # fmt: skip


@pytest.mark.usefixtures("way")
def test_folders_of_many_parents_are_looked_at_together_from_the_first_on(
    root: Path, cache: ScanCache, spy: Spy
) -> None:
    for top in range(10):
        for number in range(20):
            file(root / f"top{top}" / f"{number:02d}" / "f", b"%d %d" % (top, number))
    scan(f"{root}/", cache=cache)
    spy.opened.clear()
    scan(f"{root}/", cache=cache)
    assert sorted(spy.opened) == ["00", *(f"top{top}" for top in range(10))]


@pytest.mark.usefixtures("way")
def test_a_folder_that_changed_costs_two_looks_and_those_behind_it_not_much_more(
    root: Path, cache: ScanCache, spy: Spy
) -> None:
    names = [f"{number:03d}" for number in range(200)]
    for name in names:
        file(root / name / "f")
    scan(f"{root}/", cache=cache)
    file(root / names[100] / "new")
    spy.opened.clear()
    spy.asked.clear()
    scan(f"{root}/", cache=cache)
    assert spy.opened == [names[0], names[100], names[101]]
    assert sum(map(len, spy.asked)) < len(names) + 64


@pytest.mark.usefixtures("way")
def test_where_something_is_left_out_or_added_each_folder_is_opened(
    root: Path, cache: ScanCache, spy: Spy
) -> None:
    for number in range(9):
        file(root / f"{number}" / "f")
        if number > 2:  # those before are whole, and as the cache has them, whatever is left out
            file(root / f"{number}" / "left out")
        os.setxattr(root / f"{number}" / "f", "user.test", b"%d" % number)
    scan(f"{root}/", cache=cache)
    scan(f"{root}/", cache=cache)
    assert spy.known != []
    ways: list[dict[str, Any]] = [
        {"filters": FilterSet([(False, b"left out")])},
        {"files_from": [b"%d/f" % number for number in range(9)]},
        {"xattrs": True},
        {"owner": True},
    ]
    plain = scan(f"{root}/")
    for options in ways:
        fresh = scan(f"{root}/", **options)
        assert fresh.events != plain.events
        scan(f"{root}/", cache=cache)
        spy.known.clear()
        same(scan(f"{root}/", cache=cache, **options), fresh)
        assert spy.known == []
    # Filters that leave nothing out are none.
    for _ in range(2):
        same(scan(f"{root}/", cache=cache, filters=FilterSet()), plain)
    assert spy.known != []


@pytest.mark.usefixtures("way")
def test_paths_that_are_too_long_are_refused_warm_as_cold(
    root: Path, cache: ScanCache, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for top in ("a", "b" * 40, "c"):
        for number in range(5):
            file(root / top / f"{number}-{'x' * 40}" / "f")
    scan(f"{root}/", cache=cache)  # which knows all of them
    monkeypatch.setattr(scanning, "MAX_PATH_BYTES", 80)
    monkeypatch.setattr(scanning, "MAX_NAME_BYTES", 50)
    fresh = scan(f"{root}/")
    assert sum(event[0] == "failed" for event in fresh.events) == 5
    for _ in range(2):
        spy.known.clear()
        same(scan(f"{root}/", cache=cache), fresh)
        assert len(spy.known) == 9


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("contents", [True, False])
def test_the_folders_of_two_roots_come_in_the_order_of_their_names(
    tmp_path: Path, cache: ScanCache, spy: Spy, contents: bool
) -> None:
    """Whoever stands beside a folder in the transfer may lie in another one here."""
    for number in range(24):
        file(tmp_path / "xyz"[number % 3 if number < 12 else number // 9] / f"{number:02d}" / "f")
    paths = [
        f"{tmp_path}/{root}/{'' if contents else name.name}"
        for root in "xyz"
        for name in (sorted((tmp_path / root).iterdir()) if not contents else [Path()])
    ]
    fresh = scan(*paths)
    assert fresh.objects == 24
    for _ in range(3):
        same(scan(*paths, cache=cache), fresh)
    assert spy.known != []


@pytest.mark.usefixtures("way")
def test_a_scan_that_is_given_up_leaves_nothing_open(root: Path, cache: ScanCache) -> None:
    for number in range(40):
        file(root / "in" / f"{number:02d}" / "f")
    scan(f"{root}/", cache=cache)

    class GivenUp(Exception):
        pass

    before = os.listdir("/proc/self/fd")
    for after in range(2, 40, 5):

        def stop(event: object, after: int = after) -> None:
            if isinstance(event, DirectoryEntered) and event.name == b"%02d" % after:
                raise GivenUp

        with pytest.raises(GivenUp):
            scan(f"{root}/", cache=cache, seen=stop)
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("way")
def test_a_folder_that_changes_meanwhile_is_told_as_it_was_looked_at(root: Path, cache: ScanCache) -> None:
    """Whole as it was, or whole as it is; and the next scan tells it as it is."""
    names = [f"{number:02d}" for number in range(60)]
    for name in names:
        file(root / name / "f")
    was = scan(f"{root}/", cache=cache)

    def change(event: object) -> None:
        if isinstance(event, DirectoryEntered) and event.name == b"20":
            for name in names[15:50:5]:
                file(root / name / "g")
            shutil.rmtree(root / "26")
            replaced_by_link(root / "27")

    told = scan(f"{root}/", cache=cache, seen=change)
    now = scan(f"{root}/")
    either = {(event[0], *map(str, event[1:])) for event in (*was.events, *now.events)}
    assert {(event[0], *map(str, event[1:])) for event in told.events if event[0] != "failed"} <= either
    assert {event[1] for event in told.events if event[0] == "failed"} <= {b"26", b"27"}
    same(scan(f"{root}/", cache=cache), now)


@pytest.mark.slow
def test_large_batches_of_what_is_known_come_in_parts(root: Path, cache: ScanCache) -> None:
    """As many to a batch as where the folder is opened."""
    for name in "abc":
        for number in range(1200):
            file(root / name / f"{number:05d}", b"")
    batches: list[list[int]] = []

    def note(event: object) -> None:
        if isinstance(event, DirectoryEntered):
            batches.append([])
        elif isinstance(event, Batch):
            assert event.recalled
            assert event.buffer is None
            assert len(event.starts) == len(event.entries)
            batches[-1].append(len(event.entries))

    scan(f"{root}/", cache=cache)
    scan(f"{root}/", cache=cache, seen=note)
    assert batches[1] == batches[2] == batches[3]
    assert len(batches[1]) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("slash", ["/", ""])
def test_a_warm_scan_tells_what_a_cold_one_told(root: Path, cache: ScanCache, spy: Spy, slash: str) -> None:
    tree(root)
    cold = scan(f"{root}{slash}", cache=cache)
    same(cold, scan(f"{root}{slash}"))
    assert spy.known == []
    for _ in range(2):
        same(scan(f"{root}{slash}", cache=cache), cold)
    assert len(spy.known) > 100


@pytest.mark.slow
def test_large_folders_are_not_all_held_at_once(
    tmp_path: Path, cache: ScanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan's memory does not grow with the tree: folders of many files are looked at few to a call."""
    count, files, most = 16, 6000, 0

    def asking(*args: Any) -> list[KnownLeaf | None]:
        nonlocal most
        found = known_leaves(*args)
        most = max(most, sum(one.block.count for one in found if one is not None))
        return found

    with roomy_folder(tmp_path) as root:
        for number in range(count):
            (root / f"{number:02d}").mkdir()
            fd = os.open(root / f"{number:02d}", os.O_RDONLY)
            for name in range(files):
                os.close(os.open(f"{name:05d}", os.O_CREAT, dir_fd=fd))
            os.close(fd)
        scan(f"{root}/", cache=cache)
        monkeypatch.setattr(scanning, "known_leaves", asking)
        assert scan(f"{root}/", cache=cache).objects == count * files
    assert most <= 4 * files


@pytest.mark.root
def test_a_mount_point_among_folders_is_told_as_others_are(root: Path, cache: ScanCache, spy: Spy) -> None:
    for number in range(12):
        file(root / f"{number:02d}" / "f")
    with mounted(root / "05") as there, mounted(root / "00"):
        file(there / "in the other one")
        file(root / "00" / "first")
        fresh = scan(f"{root}/")
        for _ in range(3):
            same(scan(f"{root}/", cache=cache), fresh)
        assert spy.known != []
    same(scan(f"{root}/", cache=cache), scan(f"{root}/"))
