"""Many small folders as one at the target: refused, wanted, delivered, lost, halted, placed; and whole transfers of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio.testing
from support import assert_same, snapshot
from transfers import Done, block_of, data, entry, transfer, tree

from flowengine.chunking import chunk_id
from flowengine.errors import IntegrityError, ProtocolError, TemporaryError
from flowengine.manifest import Entry
from flowengine.store.staging import Staging
from flowengine.transfer import gathering, lookalikes, placing_small
from flowengine.transfer.control import Control
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.landing import Landing
from flowengine.transfer.losing import lose
from flowengine.transfer.placing import Placer
from flowengine.transfer.placing_subtrees import check_folders, each_of, offers_of
from flowengine.transfer.publishing import Publisher
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import SmallObject, TargetDirectory
from flowengine.transfer.subtrees import (
    LEFT_OUT,
    WRITTEN,
    SubtreesOffer,
    is_all_new,
    want_subtrees,
)
from flowengine.transfer.timing import StageClock
from flowengine.units import MIB
from flowengine.wire.control import ControlDecoder
from flowengine.wire.messages import (
    MAX_SUBTREES_FOLDERS,
    WANT_NONE,
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Folder,
    Offer,
    Options,
    Subtrees,
)
from flowengine.wire.messages import encode as encode_message
from flowengine.wire.paths import MAX_DEPTH
from flowengine.wire.records import Run

# --- what may be offered ----------------------------------------------------------------------------------------


def directory(path: bytes = b"") -> TargetDirectory:
    return TargetDirectory(path, path.rpartition(b"/")[2], -1, None, created=True)


def folder(depth: int, name: bytes, entries: bytes = b"x") -> Folder:
    return Folder(depth, name, 0o755, 0, entries)


@pytest.mark.parametrize(
    "folders",
    [
        [],
        [folder(0, b"a", b""), folder(0, b"b", b"")],
        [folder(0, b"%d" % number) for number in range(MAX_SUBTREES_FOLDERS + 1)],
        [folder(1, b"a")],
        [folder(-1, b"a")],
        [folder(0, b"a"), folder(2, b"b")],
        [folder(0, b"a"), folder(1, b"b"), folder(0, b"c"), folder(2, b"d")],
        *([folder(0, b"a"), folder(1, name)] for name in (b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256)),
        [folder(0, b".flow-staging")],
        [folder(0, b"a"), folder(1, b".flow-staging")],
        [folder(depth, b"d") for depth in range(MAX_DEPTH)],
        [folder(depth, b"d" * 255) for depth in range(17)],
    ],
)
def test_what_is_no_list_of_whole_subtrees_is_refused(folders: list[Folder]) -> None:
    with pytest.raises(ProtocolError):
        check_folders(directory(), folders, 1)


def test_what_is_as_deep_or_long_as_is_allowed_is_taken() -> None:
    check_folders(directory(), [folder(depth, b"d") for depth in range(MAX_DEPTH - 1)], 1)
    check_folders(directory(), [folder(depth, b"d" * 255) for depth in range(16)], 1)
    check_folders(directory(), [folder(0, b"%d" % number) for number in range(MAX_SUBTREES_FOLDERS)], 1)
    check_folders(directory(), [folder(0, b"a", b""), folder(1, b"b"), folder(1, b"c"), folder(0, b"d")], 1)


def test_depth_and_length_of_the_current_directory_count() -> None:
    deep = [folder(0, b"a"), folder(1, b"b")]
    check_folders(directory(), deep, MAX_DEPTH - 2)
    with pytest.raises(ProtocolError, match="deeper"):
        check_folders(directory(), deep, MAX_DEPTH - 1)
    long = directory(b"/".join([b"d" * 255] * 15))
    check_folders(long, [folder(0, b"d" * 255)], 16)
    with pytest.raises(ProtocolError, match="longer"):
        check_folders(long, [folder(0, b"d" * 255), folder(1, b"b")], 16)


def test_each_of_says_the_same_folder_by_folder() -> None:
    folders = [
        Folder(0, b"a", 0o700, 1, b"A"),
        Folder(1, b"b", 0o701, 2),
        Folder(2, b"c", 0o702, 3, b"C"),
        Folder(1, b"d", 0o703, 4, b"D"),
        Folder(0, b"e", 0o704, 5),
    ]
    said = [
        msg.name if isinstance(msg, DirectoryBegin) else msg.data if isinstance(msg, EncodedOffer) else msg
        for msg in each_of(folders)
    ]
    ends = {one.name: DirectoryEnd(one.mode, one.mtime_ns) for one in folders}
    assert said == [
        b"a", b"A", b"b", b"c", b"C", ends[b"c"], ends[b"b"], b"d", b"D", ends[b"d"], ends[b"a"], b"e", ends[b"e"]
    ]  # fmt: skip
    assert offers_of(Subtrees(folders)) == 3


# --- delivering -------------------------------------------------------------------------------------------------


A, B, C, D, E = (bytes([number]) * (3000 + number) for number in range(1, 6))


class Bench:
    """A landing with one offer, number 0: `x/a` is the chunk A, `x/b` is empty, `x/c` B and C, `x/y/z` D and `w/v` E.

    `x/y/none` has no file; `w/last` is an empty one.
    """

    def __init__(self, root: Path) -> None:
        ours, _ = trio.testing.memory_stream_pair()
        self.path = root
        self.root = os.open(root, os.O_RDONLY)
        self.staging = Staging(self.root, os.fsencode(root))
        self.control = Control(ours, ControlDecoder())
        self.counters = Counters()
        self.landing = Landing(
            self.staging,
            self.control,
            self.counters,
            StageClock(),
            apply_extra=None,
            pace=lambda size: None,
        )
        self.told: list[tuple[bytes, int]] = []
        self.publisher = Publisher(
            self.landing, self.root, self.control, StageClock(), None, tell=self.told.extend
        )
        self.directory = TargetDirectory(b"", b"", os.dup(self.root), None, created=False)
        self.landing.directory_begun(self.directory)
        blocks = [
            block_of(entry(b"a", A), entry(b"b"), entry(b"c", B, C)),
            block_of(entry(b"z", D, mode=0o400)),
            None,
            block_of(entry(b"last"), entry(b"v", E)),
        ]
        shape = [(0, b"x", 0o751), (1, b"y", 0o700), (2, b"none", 0o1777), (0, b"w", 0o500)]
        self.folders = [
            Folder(depth, name, mode, depth + 1, block.data if block is not None else b"")
            for (depth, name, mode), block in zip(shape, blocks, strict=True)
        ]
        self.offer = SubtreesOffer(self.directory, self.folders, blocks)
        self.offer.number = 0
        assert is_all_new(self.landing, self.offer)

    def want(self) -> None:
        want_subtrees(self.landing, self.offer)

    def deliver(self, runs: list[Run], data: bytes) -> None:
        self.landing.deliver(runs, memoryview(data), len(data))

    def publish(self) -> None:
        """What is complete is placed: the thread's body, to its end."""
        self.landing.publishable.put(None)
        self.publisher.run()

    def landed(self) -> list[str]:
        found = [path for path in self.path.rglob("*") if ".flow-staging" not in path.parts]
        return sorted(str(path.relative_to(self.path)) for path in found)

    def staged(self) -> list[str]:
        """The files that are in staging."""
        found = [path for path in (self.path / ".flow-staging").rglob("*") if not path.is_dir()]
        return sorted(path.name for path in found if path.name != "lock")

    def close(self) -> None:
        self.landing.close()
        self.staging.close(remove=True)
        with contextlib.suppress(OSError):
            os.close(self.directory.fd)
        os.close(self.root)


FOLDERS = ["w", "x", "x/y", "x/y/none"]
FILES = ["w/last", "w/v", "x/a", "x/b", "x/c", "x/y/z"]


@contextlib.contextmanager
def wanted(root: Path) -> Iterator[Bench]:
    with contextlib.closing(Bench(root)) as bench:
        bench.want()
        yield bench


@pytest.mark.trio
async def test_nothing_is_to_be_seen_until_all_is_here_and_then_all_of_it(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        assert bench.landing.publishable.empty()
        bench.deliver([(0, 3, 1), (0, 0, 1)], D + A)
        bench.deliver([(0, 1, 2)], B + C)
        assert bench.landing.publishable.empty()
        assert bench.landed() == []
        assert bench.directory.open_names == {bench.offer.token}
        bench.deliver([(0, 4, 1)], E)
        assert bench.landing.offers == {}
        assert bench.landing.inflight == {}
        bench.publish()
        assert bench.landed() == sorted(FOLDERS + FILES)
        contents = {"w/last": b"", "w/v": E, "x/a": A, "x/b": b"", "x/c": B + C, "x/y/z": D}
        for name, data in contents.items():
            path = tmp_path / name
            assert path.read_bytes() == data
            assert path.stat().st_mtime_ns == len(path.name) - 5
            assert path.stat().st_mode & 0o7777 == (0o400 if name == "x/y/z" else 0o640)
        for name, mode, mtime_ns in (
            ("w", 0o500, 1),
            ("x", 0o751, 1),
            ("x/y", 0o700, 2),
            ("x/y/none", 0o1777, 3),
        ):
            st = (tmp_path / name).stat()
            assert (st.st_mode & 0o7777, st.st_mtime_ns) == (mode, mtime_ns)
        size = sum(map(len, (A, B, C, D, E)))
        assert (bench.counters.objects_done, bench.counters.bytes_done) == (6, size)
        assert bench.told == [
            (b"x/a", len(A)), (b"x/b", 0), (b"x/c", len(B + C)), (b"x/y/z", len(D)), (b"w/last", 0), (b"w/v", len(E))
        ]  # fmt: skip
        assert bench.directory.open_names == set()
        assert bench.staged() == []
        assert bench.landing.failures == []


@pytest.mark.trio
async def test_the_folder_around_them_is_finished_after_them(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        bench.landing.directory_ended(bench.directory, DirectoryEnd(0o711, 99))
        settled: list[bool] = []
        bench.landing.settled = lambda: settled.append(True)
        bench.landing.close_offering()
        assert settled == []
        bench.deliver([(0, 0, 5)], A + B + C + D + E)
        assert settled == []
        bench.publish()
        assert settled == [True]
        # Its end is behind what it waited for.
        bench.publish()
        st = tmp_path.stat()
        assert (st.st_mode & 0o7777, st.st_mtime_ns) == (0o711, 99)


@pytest.mark.trio
async def test_where_a_chunk_that_landed_can_be_read_is_known_before_and_after_it_is_placed(
    tmp_path: Path,
) -> None:
    with wanted(tmp_path) as bench:
        bench.deliver([(0, 0, 5)], A + B + C + D + E)
        for part, path, before in ((A, b"x/a", 0), (C, b"x/c", len(B)), (D, b"x/y/z", 0), (E, b"w/v", 0)):
            found, staged, offset = bench.landing.recent[chunk_id(part)].place_of(chunk_id(part))
            assert (found, offset) == (path, before)
            name, folder = bench.staging.find(staged)
            fd = os.open(name, os.O_RDONLY, dir_fd=folder)
            assert os.pread(fd, len(part), offset) == part
            os.close(fd)
        bench.publish()
        assert (tmp_path / "x" / "c").read_bytes()[len(B) :] == C


@pytest.mark.trio
async def test_who_waits_for_a_chunk_gets_it_when_it_arrives(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        other = SmallObject(bench.directory, entry(b"twin", A, D), bench.staging)
        bench.landing.adopt(other)
        bench.landing.opened(bench.directory, b"twin")
        bench.landing.inflight[chunk_id(A)] = [(other, 0)]
        bench.landing.inflight[chunk_id(D)] = [(other, len(A))]
        bench.deliver([(0, 0, 5)], A + B + C + D + E)
        bench.publish()
        assert (tmp_path / "twin").read_bytes() == A + D
        assert bench.landed() == sorted([*FOLDERS, *FILES, "twin"])


@pytest.mark.trio
async def test_a_chunk_that_is_not_what_it_was_offered_as_is_refused(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        with pytest.raises(IntegrityError, match="x/c"):
            bench.deliver([(0, 0, 3)], A + B + bytes(len(C)))
        assert bench.staged() == []
        assert bench.landed() == []


@pytest.mark.trio
@pytest.mark.parametrize("runs", [[(0, 1, 1)], [(0, 2, 1)], [(0, 0, 2)], [(0, 2, 3)]])
async def test_a_file_that_comes_in_parts_is_refused(tmp_path: Path, runs: list[Run]) -> None:
    parts = [A, B, C, D, E]
    with wanted(tmp_path) as bench:
        data = b"".join(b"".join(parts[index : index + count]) for _, index, count in runs)
        with pytest.raises(ProtocolError, match="in parts"):
            bench.deliver(runs, data)
        assert bench.landed() == []


@pytest.mark.trio
async def test_a_chunk_is_taken_once(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        bench.deliver([(0, 0, 1)], A)
        with pytest.raises(ProtocolError, match="not wanted"):
            bench.deliver([(0, 0, 1)], A)
        for run in ((0, 4, 2), (0, 5, 1), (1, 0, 1)):
            with pytest.raises(ProtocolError):
                bench.deliver([run], E)


@pytest.mark.trio
async def test_files_without_any_byte_wait_for_nothing(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        blocks = [block_of(entry(b"1"), entry(b"2", mode=0o600)), None]
        folders = [Folder(0, b"e", 0o755, 5, b"."), Folder(1, b"f", 0o755, 6)]
        offer = SubtreesOffer(bench.directory, folders, blocks)
        offer.number = 0
        want_subtrees(bench.landing, offer)
        assert bench.landing.offers == {}
        bench.publish()
        assert bench.landed() == ["e", "e/1", "e/2", "e/f"]
        assert bench.counters.objects_done == 2
        assert bench.directory.open_names == set()


@pytest.mark.trio
async def test_an_offer_with_a_chunk_twice_or_one_that_is_at_hand_is_not_all_new(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        one = [Folder(0, b"n", 0o755, 0, b".")]

        def offer(*entries: Entry) -> SubtreesOffer:
            return SubtreesOffer(bench.directory, one, [block_of(*entries)])

        assert is_all_new(bench.landing, offer(entry(b"n", b"new"), entry(b"o", b"newer")))
        assert not is_all_new(bench.landing, offer(entry(b"n", b"new"), entry(b"o", b"new")))
        assert not is_all_new(bench.landing, offer(entry(b"n", b"new", D)))  # on its way
        bench.deliver([(0, 0, 5)], A + B + C + D + E)
        assert not is_all_new(bench.landing, offer(entry(b"n", D)))  # it arrived


# --- losing -----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_file_that_is_lost_fails_by_name_and_costs_no_other(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        lose(bench.landing, 0, 1, 2, "vanished", "it is gone")
        lose(bench.landing, 0, 3, 1, "changed", "it changed")
        assert bench.landing.failures == [
            (b"x/c", "vanished", "it is gone"),
            (b"x/y/z", "changed", "it changed"),
        ]
        bench.deliver([(0, 0, 1), (0, 4, 1)], A + E)
        bench.publish()
        assert bench.landed() == sorted([*FOLDERS, "w/last", "w/v", "x/a", "x/b"])
        assert bench.landing.offers == {}
        assert chunk_id(B) not in bench.landing.recent
        assert (bench.counters.objects_done, bench.counters.bytes_done) == (4, len(A) + len(E))
        assert bench.told == [(b"x/a", len(A)), (b"x/b", 0), (b"w/last", 0), (b"w/v", len(E))]
        assert bench.directory.open_names == set()
        with pytest.raises(ProtocolError, match="not open"):
            lose(bench.landing, 0, 1, 1, "vanished", "it is gone")


@pytest.mark.trio
async def test_the_last_file_that_is_out_may_be_one_that_is_lost(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        bench.deliver([(0, 0, 4)], A + B + C + D)
        assert bench.landing.publishable.empty()
        lose(bench.landing, 0, 4, 1, "vanished", "it is gone")
        bench.publish()
        assert bench.landed() == sorted([*FOLDERS, *(name for name in FILES if name != "w/v")])


@pytest.mark.trio
async def test_who_waits_for_a_chunk_that_is_lost_fails_too(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        other = SmallObject(bench.directory, entry(b"twin", A), bench.staging)
        bench.landing.adopt(other)
        bench.landing.opened(bench.directory, b"twin")
        bench.landing.inflight[chunk_id(A)] = [(other, 0)]
        lose(bench.landing, 0, 0, 1, "vanished", "it is gone")
        assert sorted(path for path, _, _ in bench.landing.failures) == [b"twin", b"x/a"]
        bench.deliver([(0, 1, 4)], B + C + D + E)
        bench.publish()
        assert not (tmp_path / "x" / "a").exists()
        assert not (tmp_path / "twin").exists()
        assert bench.directory.open_names == set()


@pytest.mark.trio
async def test_nothing_is_open_any_more_once_every_file_is_lost(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        folders = [Folder(0, b"n", 0o755, 0, b".")]
        offer = SubtreesOffer(bench.directory, folders, [block_of(entry(b"1", b"one"), entry(b"2", b"two"))])
        offer.number = 0
        want_subtrees(bench.landing, offer)
        settled: list[bool] = []
        bench.landing.settled = lambda: settled.append(True)
        bench.landing.close_offering()
        lose(bench.landing, 0, 0, 2, "vanished", "it is gone")
        assert [path for path, _, _ in bench.landing.failures] == [b"n/1", b"n/2"]
        bench.publish()
        assert bench.landed() == ["n"]  # the folder itself is there, as it would be by itself
        assert settled == [True]
        assert bench.directory.open_names == set()
        assert bench.landing.inflight == {}


@pytest.mark.trio
async def test_an_empty_file_is_durable_before_it_is_placed_and_made_once(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        block = block_of(entry(b"p", A, B), entry(b"q"), entry(b"r", C, D), entry(b"s", E))
        offer = SubtreesOffer(bench.directory, [Folder(0, b"n", 0o755, 0, b".")], [block])
        offer.number = 0
        want_subtrees(bench.landing, offer)
        lose(bench.landing, 0, 0, 1, "vanished", "it is gone")
        lose(bench.landing, 0, 3, 1, "vanished", "it is gone")
        bench.deliver([(0, 4, 1)], E)
        assert offer.states == bytes([LEFT_OUT, WRITTEN, LEFT_OUT, WRITTEN])
        bench.landing.deliver(
            [(0, 1, 2)], memoryview(bytearray(B + C)), 1
        )  # the other halves were on their way
        bench.publish()
        assert bench.landed() == ["n", "n/q", "n/s"]
        assert bench.staged() == []


@pytest.mark.trio
async def test_only_what_was_written_is_remembered_to_be_at_hand(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        lose(bench.landing, 0, 1, 1, "vanished", "it is gone")
        bench.deliver([(0, 2, 2)], C + D)  # of `x/c`, which will not land, and of `x/y/z`
        assert chunk_id(C) not in bench.landing.recent
        assert chunk_id(D) in bench.landing.recent


@pytest.mark.trio
async def test_a_disk_that_is_full_where_another_object_waits_suspends_the_transfer(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        full = os.open("/dev/full", os.O_RDWR)
        other = SmallObject(bench.directory, entry(b"twin", A), bench.staging)
        other.fd = full
        bench.landing.adopt(other)
        bench.landing.opened(bench.directory, b"twin")
        bench.landing.inflight[chunk_id(A)] = [(other, 0)]
        with pytest.raises(TemporaryError) as told:
            bench.deliver([(0, 0, 1)], A)
        assert told.value.retryable


def test_paths_may_be_asked_for_by_any_thread(tmp_path: Path) -> None:
    blocks = [block_of(entry(b"a", A))] * 200
    folders = [Folder(number % 5, b"%d" % number, 0o755, 0, b".") for number in range(200)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            offer = SubtreesOffer(directory(), folders, blocks)
            with ThreadPoolExecutor(2) as threads:
                found = [*threads.map(lambda one: len(one.paths), [offer] * 8)]
            assert found == [200] * 8
    finally:
        sys.setswitchinterval(before)


# --- halting ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_after_a_halt_what_is_here_lands_and_what_is_not_is_wanted_no_more(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        bench.deliver([(0, 1, 2)], B + C)
        assert halt_landing(bench.landing, "ended") == [(0, 0, 1), (0, 3, 2)]
        bench.deliver([(0, 3, 1), (0, 0, 1)], D + A)  # they were on their way
        lose(bench.landing, 0, 4, 1, "vanished", "it is gone")  # the source's word crosses
        assert bench.landing.offers == {}
        bench.publish()
        # An empty file had not begun either, as far as nobody wrote it.
        assert bench.landed() == sorted([*FOLDERS, "x/c"])
        assert (tmp_path / "x" / "c").read_bytes() == B + C
        assert bench.counters.objects_done == 1
        assert [(path, reason) for path, reason, _ in bench.landing.failures] == [(b".", "policy-stopped")]
        assert bench.directory.open_names == set()
        assert bench.landing.inflight == {}


@pytest.mark.trio
async def test_after_a_halt_nothing_of_an_offer_is_made_of_which_nothing_was_here(tmp_path: Path) -> None:
    with wanted(tmp_path) as bench:
        settled: list[bool] = []
        bench.landing.settled = lambda: settled.append(True)
        bench.landing.close_offering()
        assert halt_landing(bench.landing, "ended") == [(0, 0, 5)]
        assert settled == [True]
        assert bench.directory.open_names == set()
        bench.deliver([(0, 0, 5)], A + B + C + D + E)  # all was on its way
        assert halt_landing(bench.landing, "ended") == []
        bench.publish()
        assert bench.landed() == []
        assert bench.staged() == []
        assert bench.landing.offers == {}


@pytest.mark.trio
async def test_after_a_halt_a_chunk_still_comes_that_something_which_has_begun_waits_for(
    tmp_path: Path,
) -> None:
    with wanted(tmp_path) as bench:
        other = SmallObject(bench.directory, entry(b"twin", A, C), bench.staging)
        bench.landing.adopt(other)
        bench.landing.opened(bench.directory, b"twin")
        bench.landing.inflight[chunk_id(A)] = [(other, 0)]
        bench.landing.inflight[chunk_id(C)] = [(other, len(A))]
        bench.deliver([(0, 0, 1)], A)  # so it has begun; `x/c`, which has the other half, has not
        assert halt_landing(bench.landing, "ended") == [(0, 1, 1), (0, 3, 2)]
        bench.deliver([(0, 1, 2)], B + C)  # half of it is not wanted any more
        bench.deliver([(0, 3, 2)], D + E)
        bench.publish()
        assert (tmp_path / "twin").read_bytes() == A + C
        assert bench.landed() == sorted([*FOLDERS, "twin", "x/a"])
        assert bench.landing.offers == {}


class _HaltsBehind:
    """The landing's lock; a halt comes just when it is let go for the third time."""

    def __init__(self, landing: Landing, at: int) -> None:
        self._lock, self._landing, self._left = landing.lock, landing, at

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._left -= 1
        if not self._left:
            self._landing.halted = "ended"
        self._lock.release()


@pytest.mark.trio
async def test_a_halt_while_an_offer_is_completed_leaves_nothing_half_done(tmp_path: Path) -> None:
    with contextlib.closing(Bench(tmp_path)) as bench:
        offer = SubtreesOffer(
            bench.directory, [Folder(0, b"n", 0o755, 0, b".")], [block_of(entry(b"a", A), entry(b"b"))]
        )
        offer.number = 0
        want_subtrees(bench.landing, offer)
        bench.landing.lock = _HaltsBehind(bench.landing, 3)  # type: ignore[assignment]
        bench.deliver([(0, 0, 1)], A)
        bench.publish()
        assert bench.landed() == ["n", "n/a", "n/b"]
        assert bench.landing.failures == []


# --- placing ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_came_to_stand_in_a_folders_place_fails_it_and_is_not_touched(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    with wanted(root) as bench:
        bench.deliver([(0, 0, 5)], A + B + C + D + E)
        (root / "x").symlink_to(outside)
        bench.publish()
        assert os.listdir(outside) == []
        assert bench.landed() == ["w", "w/last", "w/v", "x"]
        failed = {path for path, _, _ in bench.landing.failures}
        assert failed == {b"x", b"x/a", b"x/b", b"x/c", b"x/y/z"}
        assert (bench.counters.objects_done, bench.counters.bytes_done) == (2, len(E))
        assert bench.directory.open_names == set()


# --- whole transfers --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this test's own; and nothing is told early where the machine is slow."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setattr(gathering, "HELD_NS", 1 << 62)


def test_many_small_folders_arrive_as_they_were_and_most_of_them_as_one(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    done = transfer(source, tmp_path / "target")
    assert_same(source, tmp_path / "target")
    assert done.failures == []
    assert done.offered
    assert done.whole == done.told
    folders = sum(path.is_dir() for path in source.rglob("*"))
    assert sum(map(len, done.offered)) > 0.8 * folders
    files = [path for path in source.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert (done.target.objects_done, done.target.bytes_done) == (len(files), size)
    assert (done.source.objects, done.source.size_bytes) == (len(files), size)
    assert not (tmp_path / "target" / ".flow-staging").exists()


def test_a_source_that_gathers_nothing_gives_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    one = transfer(source, tmp_path / "one")
    other = transfer(source, tmp_path / "other", subtrees=False)
    assert one.whole
    assert other.offered == []
    assert other.whole == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "other") == snapshot(source)
    assert one.version == other.version
    for name in (
        "objects_done",
        "bytes_done",
        "objects_unchanged",
        "objects_failed",
        "bytes_reused",
    ):
        assert getattr(one.target, name) == getattr(other.target, name), name
    assert one.source.bytes_payload == other.source.bytes_payload > 0


@pytest.mark.parametrize("cached", [False, True])
def test_a_second_run_brings_what_changed_and_nothing_else(tmp_path: Path, cached: bool) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    first = transfer(source, target, cached=cached)
    again = transfer(source, target, cached=cached)
    assert again.version == first.version
    assert again.target.objects_unchanged == again.target.objects_done == first.target.objects_done
    assert again.source.bytes_payload == 0
    assert again.whole == 0
    (source / "d003" / "f0").write_bytes(b"another")
    (source / "d010" / "in" / "deeper" / "bottom").unlink()
    (source / "d010" / "in" / "deeper" / "below").mkdir()
    (source / "d010" / "in" / "deeper" / "below" / "file").write_bytes(b"below")
    tree(source / "d011" / "more", 9)
    done = transfer(source, target, Options(delete=True), cached=cached)
    assert done.failures == []
    assert_same(source, target)
    assert done.target.objects_unchanged == first.target.objects_done - 2


@pytest.mark.parametrize(
    "change",
    [
        lambda there: (there / "folder").mkdir(),
        lambda there: (there / "large").write_bytes(bytes(2 * MIB)),
        lambda there: (there / "small").write_bytes(b"not offered"),
        lambda there: (there / "link").symlink_to("f0"),
        lambda there: os.mkfifo(there / "pipe"),
        lambda there: there.chmod(0o700),
        lambda there: os.utime(there, ns=(1, 1)),
        lambda there: (there / "f0").chmod(0o600),
        lambda there: os.utime(there / "f0", ns=(1, 1)),
        lambda there: (there / "f0").write_bytes(b"another"),
        lambda there: (there / "f0").write_bytes(bytes(300)),
        lambda there: (there / "f0").unlink(),
    ],
)
def test_what_changed_in_a_folder_that_stood_as_it_was_is_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    entered: list[bytes] = []
    enter = Placer._directory_begin

    def entering(placer: Placer, name: bytes) -> None:
        entered.append(name)
        enter(placer, name)

    monkeypatch.setattr(Placer, "_directory_begin", entering)
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(20):
        folder = source / f"d{number:02}"
        folder.mkdir(parents=True)
        for name in ("f0", "f1"):
            (folder / name).write_bytes(data(number << 8 | ord(name[1]), 300))
    transfer(source, target, cached=True)
    entered.clear()
    quiet = transfer(source, target, Options(delete=True), cached=True)
    assert quiet.target.objects_unchanged == 40
    assert entered == [b""]  # nothing but the root
    there = target / "d07"
    folder, file = there.stat(), (there / "f0").stat()
    change(there)
    # Nothing but what it is about shows a change.
    for path, before in ((there / "f0", file), (there, folder)):
        if path.exists() and path.stat().st_mtime_ns not in (1, before.st_mtime_ns):
            os.utime(path, ns=(1, before.st_mtime_ns))
    entered.clear()
    done = transfer(source, target, Options(delete=True), cached=True)
    assert entered == [b"", b"d07"]
    if done.failures:  # the index was believed, and is not any more
        assert "stale" in [reason for _, reason, _ in done.failures]
        done = transfer(source, target, Options(delete=True), cached=True)
    assert done.failures == []
    assert_same(source, target)


def test_what_landed_as_one_is_known_to_the_cache_and_not_read_again(tmp_path: Path) -> None:
    """The second run is the other way: what was the target is read by what the publisher told the cache."""
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    transfer(source, target, cached=True)
    done = transfer(target, tmp_path / "third", cached=True)
    assert_same(source, tmp_path / "third")
    assert done.source.objects_read <= 0.1 * done.source.objects


def test_content_that_comes_more_than_once_lands_everywhere(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(40):
        folder = source / f"d{number:02}"
        folder.mkdir(parents=True)
        (folder / "same").write_bytes(data(1, 5000))
        (folder / "own").write_bytes(data(number + 2, 700))
        (folder / "twice").write_bytes(data(number // 2 + 100, 900))
    done = transfer(source, target)
    assert done.failures == []
    assert_same(source, target)
    # A second tree of the same content, in other folders, is had from the first.
    other = tree(source / "zz", 10)
    assert other.is_dir()
    for number in range(40):
        folder = source / f"e{number:02}"
        folder.mkdir()
        (folder / "again").write_bytes(data(number + 2, 700))
    done = transfer(source, target, cached=True)
    assert done.failures == []
    assert_same(source, target)


@pytest.mark.parametrize("what", ["link to a folder", "dangling link", "file", "folder"])
def test_what_stands_at_the_target_in_a_folders_place_gives_way_as_it_does_one_by_one(
    tmp_path: Path, what: str
) -> None:
    source = tree(tmp_path / "source", 150)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f1").write_bytes(b"as it was")
    before = snapshot(outside)
    for name, subtrees in (("one", True), ("other", False)):
        target = tmp_path / name
        target.mkdir()
        there = target / "d007"
        if what == "link to a folder":
            there.symlink_to(outside)
        elif what == "dangling link":
            there.symlink_to("nowhere")
        elif what == "file":
            there.touch()
        else:
            there.mkdir()
            (there / "kept").touch()
        done = transfer(source, target, subtrees=subtrees)
        assert done.failures == []
        if subtrees:  # it comes by itself, with what is in it, and all others do not
            assert done.told - 4 <= done.whole < done.told
        if what == "folder":
            (there / "kept").unlink()
            os.utime(there, ns=(1, (source / "d007").stat().st_mtime_ns))
        assert_same(source, target)
    assert snapshot(outside) == before


@pytest.mark.parametrize("old", [b"", b"old"])
@pytest.mark.parametrize("subtrees", [True, False])
def test_what_the_source_does_not_have_is_deleted_and_what_landed_as_one_is_not(
    tmp_path: Path, subtrees: bool, old: bytes
) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    for name in ("old-folder/deep", "d030x"):
        (target / name).mkdir(parents=True)
        (target / name / "old").write_bytes(old)
    (target / "old-file").write_bytes(old)
    done = transfer(source, target, Options(delete=True), subtrees=subtrees)
    assert done.failures == []
    # What has neither name nor size of what is there comes as one whatever else is there.
    assert bool(done.whole) is subtrees
    assert done.whole == done.told
    assert_same(source, target)
    again = transfer(source, target, Options(delete=True), subtrees=subtrees)
    assert again.target.objects_deleted == 0
    assert_same(source, target)


def test_a_dry_run_makes_nothing_and_says_what_would_be_sent(tmp_path: Path) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    one = transfer(source, target, Options(dry_run=True))
    other = transfer(source, target, Options(dry_run=True), subtrees=False)
    assert not target.exists()
    assert one.whole == 0
    assert one.version == other.version
    assert one.target.bytes_payload == other.target.bytes_payload > 0


def test_a_tree_that_is_published_at_once_is_the_same(tmp_path: Path) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    done = transfer(source, target, Options(publish="atomic"))
    assert done.failures == []
    assert_same(source, target)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_modes_are_those_of_the_source_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(30):
        folder = source / f"d{number:02}"
        folder.mkdir(parents=True)
        for name, mode in (("a", 0o664), ("b", 0o666), ("c", 0o777 if number % 2 else 0o600)):
            (folder / name).write_bytes(data(number << 12 | mode, 99))
            if number != 3:
                (folder / name).chmod(mode)
        folder.chmod(0o775 if number % 2 else 0o2777)
    before = os.umask(mask)
    try:
        done = transfer(source, target)
    finally:
        os.umask(before)
    assert done.failures == []
    assert done.whole == done.told > 0
    found, there = snapshot(source), snapshot(target)
    assert {path: one.mode & 0o1777 for path, one in there.items() if path} == {
        path: one.mode & 0o1777 for path, one in found.items() if path
    }
    assert {path: one.content for path, one in there.items()} == {
        path: one.content for path, one in found.items()
    }


def test_links_and_large_files_between_the_folders_keep_their_places(tmp_path: Path) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    (source / "d012" / "link").symlink_to("../d013/f0")
    (source / "d020" / "large").write_bytes(data(5, 2 * MIB))
    os.link(source / "d013" / "f0", source / "d040" / "hard")
    (source / "root file").write_bytes(b"in no folder")
    done = transfer(source, target)
    assert done.failures == []
    assert done.whole == done.told
    assert len(done.offered) > 1
    assert_same(source, target)


def test_names_that_are_no_text_and_deep_chains_arrive(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (b"\xff\xfe", b"new\nline", b" blank ", b"-dash", b"x" * 255):
        deep = Path(os.fsdecode(os.path.join(os.fsencode(source), name)))
        for _ in range(30):
            deep = deep / "d"
            deep.mkdir(parents=True)
            (deep / os.fsdecode(name)).write_bytes(data(hash(deep) & 0xFFFF, 40))
    done = transfer(source, target)
    assert done.failures == []
    assert done.whole
    assert_same(source, target)


@pytest.mark.parametrize("subtrees", [True, False])
def test_files_that_go_or_change_before_they_are_sent_fail_by_name_and_cost_no_other(
    tmp_path: Path, subtrees: bool
) -> None:
    """What the cache knows is read when it is wanted; it knows best what landed."""
    source, target = tmp_path / "source", tmp_path / "target"
    transfer(tree(tmp_path / "original"), source, cached=True)
    inside = [b""]

    def interfere(message: object) -> None:
        if isinstance(message, DirectoryBegin):
            inside[:] = [message.name]
        elif isinstance(message, Subtrees):
            inside[:] = [one.name for one in message.folders]
        if isinstance(message, EncodedOffer | Subtrees):
            if b"d009" in inside:
                (source / "d009" / "f0").unlink()
            if b"d047" in inside:
                with open(source / "d047" / "chunks", "r+b") as file:
                    file.seek(150_000)
                    file.write(b"changed")

    done = transfer(source, target, cached=True, subtrees=subtrees, before=interfere)
    assert bool(done.whole) is subtrees
    assert sorted((path, reason) for path, reason, _ in done.failures) == [
        (b"d009/f0", "vanished"),
        (b"d047/chunks", "changed"),
    ]
    there, original = snapshot(target), snapshot(tmp_path / "original")
    assert original.keys() - there.keys() == {b"d009/f0", b"d047/chunks"}
    assert all(original[path] == one for path, one in there.items())
    done = transfer(source, target, cached=True, subtrees=subtrees)
    assert done.failures == []
    assert_same(source, target)


def test_every_message_that_was_sent_is_one_that_the_protocol_allows(tmp_path: Path) -> None:
    done = transfer(tree(tmp_path / "source", 400), tmp_path / "target")
    assert len(done.offered) > 2
    for folders in done.offered:
        check_folders(directory(), folders, 1)
        assert len(folders) > 1
        assert len(encode_message(Subtrees(folders))) < MIB
    assert_same(tmp_path / "source", tmp_path / "target")


# --- whole transfers to targets that hold something -------------------------------------------------------------


def answers(done: Done, wanted: bytes) -> list[tuple[bool, int]]:
    """Whether anything is wanted, and of how many offers at once, where it is so of one folder's and of no other's."""
    found: list[tuple[bool, int]] = []
    for message in done.messages:
        inside, nones = [b""], 0
        said = each_of(message.folders) if isinstance(message, Subtrees) else [message]
        for one in said:
            if isinstance(one, DirectoryBegin):
                inside.append(one.name)
            elif isinstance(one, DirectoryEnd):
                inside[1:] = inside[1:-1]
            elif isinstance(one, EncodedOffer | Offer) and inside[-1] != wanted:
                nones += 1
            elif isinstance(one, EncodedOffer | Offer):
                found += [(False, nones)] * bool(nones)
                found.append((True, 1))
                nones = 0
        found += [(False, nones)] * bool(nones)
    return found


def answered(done: Done) -> list[tuple[bool, int]]:
    """The same of what was answered."""
    return [(want.kind != WANT_NONE, want.whole or 1) for want in done.wants]


@pytest.mark.parametrize("cached", [False, True])
def test_a_tree_that_is_unchanged_is_answered_by_one_answer_to_each_message(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_small, "RACY_NS", -(1 << 62))  # what just landed is believed to stay so
    source, target = tree(tmp_path / "source", 200), tmp_path / "target"
    transfer(source, target, cached=cached)
    done = transfer(source, target, cached=cached)
    assert done.source.bytes_payload == 0
    assert answered(done) == answers(done, b"/")  # of no folder
    assert sum(offers for _, offers in answered(done)) > 200
    assert len(done.wants) < 50


def test_a_file_that_changed_parts_the_answers_of_its_message_in_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_small, "RACY_NS", -(1 << 62))
    source, target = tree(tmp_path / "source", 60), tmp_path / "target"
    transfer(source, target)
    (source / "d030" / "f1").write_bytes(data(77, 500))
    done = transfer(source, target)
    expected = answers(done, b"d030")
    assert answered(done) == expected
    at = expected.index((True, 1))
    assert min(offers for _, offers in (expected[at - 1], expected[at + 1])) > 1
    assert done.source.bytes_payload == 500
    assert_same(source, target)


def test_files_that_have_only_names_in_common_with_others_are_soon_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookalikes, "_MOST_GUESSED", 64)
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(300):
        for root, size in ((source / "new", 2000), (target / "old", 1500)):
            folder = root / f"d{number:03}"
            folder.mkdir(parents=True)
            (folder / "index").write_bytes(data(number << 12 | size, size + number % 7))
    one = transfer(source, target)
    assert one.failures == []
    assert one.source.bytes_payload == sum(2000 + number % 7 for number in range(300))
    assert 64 <= sum(bool(want.finer) for want in one.wants) <= 64 + 64
    # Those of one message are all looked at before the first is tried.
    assert 64 <= one.told - one.whole <= 64 + 64 + 2 * max(map(len, one.offered))
    (target / "new").rename(tmp_path / "landed")
    other = transfer(source, target, subtrees=False)
    assert other.source.bytes_payload == one.source.bytes_payload
    assert snapshot(tmp_path / "landed") == snapshot(target / "new")


def test_a_moved_tree_with_edits_in_each_folder_costs_as_much_as_one_by_one(tmp_path: Path) -> None:
    """More folders than there are guesses: one file of each is the same, so it is known where they were."""
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(150):
        for root, word in ((source / "new", b"edited"), (target / "old", b"")):
            folder = root / f"d{number:03}"
            folder.mkdir(parents=True)
            whole = data(number, 3000)
            (folder / "index").write_bytes(whole[:1500] + word + whole[1500:])
            (folder / "same").write_bytes(data(number + 10_000, 600))
    one = transfer(source, target)
    assert one.failures == []
    assert one.whole == 0
    assert sum(bool(want.finer) for want in one.wants) == 150
    assert one.source.bytes_payload < 150 * 3000 / 2
    (target / "new").rename(tmp_path / "landed")
    other = transfer(source, target, subtrees=False)
    assert one.source.bytes_payload == other.source.bytes_payload
    assert snapshot(tmp_path / "landed") == snapshot(target / "new")
