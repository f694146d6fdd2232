"""What a target does with folders that came in one message: which it wants together, which it enters, how it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio.testing
from transfers import data, entry

from flowengine.chunking import CHUNK_BYTES, DEFAULT_PROFILE, chunk_id
from flowengine.errors import ProtocolError
from flowengine.manifest import Entry, Header, ManifestBuilder
from flowengine.store.many import open_listed
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_cache import DirectoryPart, ScanCache
from flowengine.store.staging import Staging
from flowengine.transfer import placing_small, placing_subtrees
from flowengine.transfer.control import Control
from flowengine.transfer.copying import Copier
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.landing import Landing
from flowengine.transfer.placement import Placement
from flowengine.transfer.placing import Placer
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import TargetDirectory
from flowengine.transfer.subtrees import SubtreesOffer, want_subtrees
from flowengine.transfer.timing import StageClock
from flowengine.wire.control import ControlDecoder
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    MAX_OFFER_ENTRIES,
    WANT_ALL,
    WANT_NONE,
    WANT_SOME,
    DirectoryBegin,
    DirectoryEnd,
    Folder,
    Options,
    Subtrees,
    Want,
)

ALL, NONE = Want(WANT_ALL), Want(WANT_NONE)


def all_of(offers: int) -> Want:
    return Want(WANT_ALL, whole=offers)


def none_of(offers: int) -> Want:
    return Want(WANT_NONE, whole=offers)


class Target:
    """A target that was told of its root and holds what the test puts there; nothing that it wants arrives.

    Attributes:
        did: paths that were entered, and tuples of those that were wanted together.
        wants: its answers.
        remembered: which chunks its index knows.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, options: Options | None = None) -> None:
        ours, _ = trio.testing.memory_stream_pair()
        self.path = root
        self.root = os.open(root, os.O_RDONLY)
        self.staging = Staging(self.root, os.fsencode(root))
        self.counters = Counters()
        self.did: list[str | tuple[str, ...]] = []
        self.wants: list[Want] = []
        self.answered: list[int] = []
        self.remembered: set[bytes] = set()
        self.extras: list[tuple[bytes, list[bytes]]] = []
        options = options or Options()
        clock, control = StageClock(), Control(ours, ControlDecoder())
        self.landing = Landing(
            self.staging, control, self.counters, clock, apply_extra=None, pace=lambda size: None
        )
        begun = self.landing.directory_begun

        def begin(directory: TargetDirectory) -> None:
            if directory.parent is not None:
                self.did.append(os.fsdecode(directory.path))
            begun(directory)

        def want(landing: Landing, offer: SubtreesOffer) -> None:
            self.did.append(tuple(map(os.fsdecode, offer.paths)))
            want_subtrees(landing, offer)

        monkeypatch.setattr(self.landing, "directory_begun", begin)
        monkeypatch.setattr(placing_subtrees, "want_subtrees", want)
        self.placement = Placement(
            self.landing,
            Copier(self.landing, self.root, clock),
            self.root,
            DEFAULT_PROFILE,
            options,
            None,
            self.counters,
            ManifestRecorder(ManifestBuilder(None, Header(DEFAULT_PROFILE, owner=options.owner))),
            self._answer,
            open_index=lambda: self,  # type: ignore[arg-type, return-value]
        )
        self.placer = Placer(self.placement, lambda path, names: self.extras.append((path, names)))

    def _answer(self, want: Want, offers: int) -> None:
        self.wants.append(want)
        self.answered.append(offers)

    def find(self, root_fd: int, packed: bytes) -> dict[int, tuple[bytes, int]]:
        """As the index does."""
        ids = [packed[at + 4 : at + CHUNK_BYTES] for at in range(0, len(packed), CHUNK_BYTES)]
        return {number: (b"elsewhere", 0) for number, one in enumerate(ids) if one in self.remembered}

    def enter(self, *names: str) -> None:
        """Enter the root and folders below it, one by one."""
        for name in ("", *names):
            self.placer.handle(DirectoryBegin(os.fsencode(name)))
        self.did.clear()

    def offer(self, *folders: Folder) -> None:
        self.placer.handle(Subtrees([*folders]))

    def close(self) -> None:
        self.landing.close()
        self.staging.close(remove=True)
        os.close(self.root)


def folder(path: str, *files: Entry | bytes, mode: int = 0o755) -> Folder:
    """A folder, and files in it: `f0`, `f1` and so on where only their bytes are given."""
    entries = [
        entry(b"f%d" % number, *filter(None, [one])) if isinstance(one, bytes) else one
        for number, one in enumerate(files)
    ]
    encoded = encode_entries(entries) if entries else b""
    return Folder(path.count("/"), os.fsencode(path.rpartition("/")[2]), mode, 0, encoded)


def new(path: str, mode: int = 0o755) -> Folder:
    """A folder with a file that is like no other."""
    return folder(path, data(sum(os.fsencode(path)) + len(path) * 1000, 300 + len(path)), mode=mode)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Target]]:
    """Makes a target at the root that is given by what it holds: path → bytes, None for a folder."""
    made: list[Target] = []

    def make_one(holds: dict[str, bytes | None] | None = None, options: Options | None = None) -> Target:
        root = tmp_path / "root"
        root.mkdir()
        for name, content in (holds or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                (root / name).mkdir(exist_ok=True)
            else:
                (root / name).write_bytes(content)
        made.append(Target(root, monkeypatch, options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


pytestmark = pytest.mark.trio
Make = Callable[..., Target]


# --- what is wanted together ------------------------------------------------------------------------------------


async def test_what_is_all_new_is_wanted_together(make: Make) -> None:
    target = make()
    target.enter()
    target.offer(new("a"), new("a/b"), folder("a/c"), new("d"))
    assert target.did == [("a", "a/b", "a/c", "d")]
    assert target.wants == [all_of(3)]
    assert target.answered == [3]
    assert target.placement.number == 3


@pytest.mark.parametrize("there", [None, b"a file"])
async def test_a_folder_that_stands_there_is_entered_and_those_around_it_are_wanted_together(
    make: Make, there: bytes | None
) -> None:
    target = make({"c": there})
    target.enter()
    target.offer(new("a"), new("a/in"), new("b"), new("c"), new("c/in"), new("c/on"), new("d"), folder("e"))
    assert target.did == [("a", "a/in", "b"), "c", ("c/in", "c/on"), ("d", "e")]
    assert target.wants == [all_of(3), ALL, all_of(2), all_of(1)]
    assert target.answered == [3, 1, 2, 1]
    assert sorted(target.landing.offers) == [0, 3, 4, 6]


async def test_what_stands_there_within_one_that_does_is_entered_as_well(make: Make) -> None:
    target = make({"a/b/c": None, "a/x": b"a file"})
    target.enter()
    target.offer(
        new("a"), new("a/a"), new("a/b"), new("a/b/a"), new("a/b/b"), new("a/b/c"), new("a/c"), new("b")
    )
    assert target.did == ["a", "a/a", "a/b", ("a/b/a", "a/b/b"), "a/b/c", "a/c", "b"]
    assert target.wants == [ALL, ALL, ALL, all_of(2), ALL, ALL, ALL]


async def test_of_names_that_stand_elsewhere_none_is_taken_for_one_that_stands_here(make: Make) -> None:
    target = make({"a/b": None, "d": None})
    target.enter()
    target.offer(new("b"), new("c"), new("c/a"), new("c/d"))
    assert target.did == [("b", "c", "c/a", "c/d")]


async def test_a_nested_folder_with_a_chunk_that_came_before_is_entered_and_those_around_it(
    make: Make,
) -> None:
    target = make()
    target.enter()
    twin = entry(b"twin", b"own" * 100, b"twice" * 100)
    target.offer(
        new("a"),
        folder("b", b"twice" * 100),
        new("c"),
        new("c/a"),
        new("c/b"),
        folder("c/b/x", twin),
        new("c/c"),
        new("c/d"),
        new("d"),
        new("e"),
    )
    assert target.did == [("a", "b"), "c", "c/a", "c/b", "c/b/x", ("c/c", "c/d"), ("d", "e")]
    some = Want(WANT_SOME, b"\x01")
    assert target.wants == [all_of(2), ALL, ALL, ALL, some, all_of(2), all_of(2)]
    # The chunk comes once: who needs it a second time waits for it.
    assert len(target.landing.inflight[chunk_id(b"twice" * 100)] or []) == 1


async def test_of_two_folders_with_the_same_files_the_first_is_wanted_with_others_and_the_second_entered(
    make: Make,
) -> None:
    target = make()
    target.enter()
    same = data(1, 400), data(2, 500)
    target.offer(new("a"), folder("b", *same), new("c"), folder("d", *same), new("e"), new("f"))
    assert target.did == [("a", "b", "c"), "d", ("e", "f")]
    assert target.wants == [all_of(3), NONE, all_of(2)]
    assert target.counters.bytes_reused == 0  # they arrive first
    for one in same:
        assert len(target.landing.inflight[chunk_id(one)] or []) == 1


async def test_a_chunk_that_comes_twice_in_one_folder_lets_that_be_entered_and_no_other(make: Make) -> None:
    target = make()
    target.enter()
    target.offer(
        new("a"), new("b"), folder("c", b"twice" * 99, data(3, 10), b"twice" * 99), new("d"), new("e")
    )
    assert target.did == [("a", "b"), "c", ("d", "e")]
    assert target.wants == [all_of(2), Want(WANT_SOME, b"\x03"), all_of(2)]


async def test_what_is_on_its_way_from_an_earlier_message_is_not_wanted_again(make: Make) -> None:
    target = make()
    target.enter()
    first = new("a"), folder("b", data(7, 900))
    target.offer(*first)
    target.offer(new("c"), folder("d", data(7, 900)), new("e"), new("f"))
    assert target.did == [("a", "b"), "c", "d", ("e", "f")]
    assert target.wants == [all_of(2), ALL, NONE, all_of(2)]
    assert sorted(target.landing.offers) == [0, 2, 4]


async def test_files_that_the_index_knows_let_their_folder_be_entered(make: Make) -> None:
    target = make()
    target.enter()
    target.remembered = {chunk_id(data(5, 700)), chunk_id(b"last" * 100)}
    target.offer(
        new("a"),
        folder("a/none"),
        new("b"),
        folder("c"),
        folder("c/x", data(4, 600), data(5, 700), data(6, 800)),
        new("c/y"),
        new("d"),
        folder("e", entry(b"long", b"first" * 100, b"last" * 100)),
    )
    assert target.did == [("a", "a/none", "b"), "c", "c/x", "c/y", "d", "e"]
    assert target.wants == [all_of(2), Want(WANT_SOME, b"\x05"), ALL, ALL, Want(WANT_SOME, b"\x01")]


@pytest.mark.parametrize(
    ("file", "entered"),
    [
        (entry(b"known", data(1, 400)), True),  # its name and size
        (entry(b"known", data(1, 401)), False),
        (entry(b"other", data(1, 400)), False),
        (entry(b"other", data(1, 5000)), True),  # its size, which is not so little
        (entry(b"grown", data(1, 2000)), True),  # its name, and enough to be another version
    ],
)
async def test_files_that_may_lie_there_under_another_name_let_their_folder_be_entered(
    make: Make, file: Entry, entered: bool
) -> None:
    target = make({"attic/known": data(9, 400), "attic/grown": data(8, 600), "attic/large": data(9, 5000)})
    target.enter()
    target.offer(new("a"), new("b"), folder("c", file), new("d"), new("e"))
    if entered:
        assert target.did == [("a", "b"), "c", ("d", "e")]
    else:
        assert target.did == [("a", "b", "c", "d", "e")]
    assert sum(want.whole or 1 for want in target.wants) == 5
    # What may be another version is asked for finer.
    assert [want.finer for want in target.wants if want.finer] == ([b"\x01"] if file.size == 2000 else [])


async def test_a_folder_below_one_that_moved_is_entered_whatever_is_in_it(make: Make) -> None:
    target = make({"attic/known": data(9, 400), "attic/in/odd": data(10, 77)})
    target.enter()
    target.offer(folder("a", entry(b"known", data(9, 400))), folder("b", data(3, 4)), new("c"))
    assert target.did == ["a", ("b", "c")]
    assert target.wants == [NONE, all_of(2)]
    target.offer(new("d"), new("e"))
    target.did.clear()
    # All of this came behind the message that showed where the folder was.
    target.placement.lookalikes.won(b"f", b"known", b"attic/known")
    target.offer(new("f"), new("f/in"), new("f/on"), new("f/up"), new("g"), new("h"))
    assert target.did == ["f", "f/in", ("f/on", "f/up"), ("g", "h")]


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1644])
async def test_files_with_bits_that_are_set_one_by_one_let_their_folder_be_entered(
    make: Make, mode: int
) -> None:
    target = make(options=Options(owner=True))
    target.enter()
    odd = entry(b"odd", data(1, 50), mode=mode)
    target.offer(new("a"), new("b"), folder("c", data(2, 60), odd), new("d"), new("e"))
    assert target.did == [("a", "b"), "c", ("d", "e")]
    assert target.wants == [all_of(2), ALL, all_of(2)]


async def test_entries_that_are_no_block_let_their_folder_be_entered(make: Make) -> None:
    target = make()
    target.enter()
    link = Entry(b"link", 1, 0o777, 0, 0, b"", b"elsewhere")
    target.offer(new("a"), new("b"), folder("c", entry(b"file", data(1, 50)), link), new("d"), new("e"))
    assert target.did == [("a", "b"), "c", ("d", "e")]
    assert target.wants == [all_of(2), ALL, all_of(2)]


async def test_one_folder_alone_is_entered(make: Make) -> None:
    target = make({"b": None, "d": None})
    target.enter()
    target.offer(new("a"), new("b"), new("c"), new("d"), folder("e"), new("e/x"))
    assert target.did == ["a", "b", "c", "d", ("e", "e/x")]
    assert target.wants == [ALL, ALL, ALL, ALL, all_of(1)]


async def test_folders_without_files_between_such_that_stand_there_are_entered_and_not_answered(
    make: Make,
) -> None:
    target = make({"c": None})
    target.enter()
    target.offer(folder("a"), folder("a/x"), folder("b"), new("c"), folder("d"), folder("e"))
    assert target.did == ["a", "a/x", "b", "c", "d", "e"]
    assert target.wants == [ALL]
    assert target.placement.number == 1


async def test_empty_files_are_wanted_together_by_an_answer_that_asks_for_no_byte(make: Make) -> None:
    target = make({"c": None})
    target.enter()
    target.offer(folder("a", b""), folder("b", b"", b""), new("c"), folder("d", b""), new("e"))
    assert target.did == [("a", "b"), "c", ("d", "e")]
    assert target.wants == [none_of(2), ALL, all_of(2)]
    assert target.placement.number == 5


async def test_the_current_directory_may_be_deep(make: Make) -> None:
    target = make({"x/y/b/old": b"old", "b": None})
    target.enter("x", "y")
    target.offer(new("a"), new("a/in"), new("b"), new("b/in"), new("b/on"), new("c"), new("d"))
    assert target.did == [
        ("x/y/a", "x/y/a/in"), "x/y/b", ("x/y/b/in", "x/y/b/on"), ("x/y/c", "x/y/d")
    ]  # fmt: skip
    offers = [target.landing.offers[number] for number in (0, 3, 5)]
    assert [
        (one.directory.path, [place.depth for place in one.folders])
        for one in offers
        if isinstance(one, SubtreesOffer)
    ] == [(b"x/y", [0, 1]), (b"x/y/b", [0, 0]), (b"x/y", [0, 0])]


async def test_more_files_than_an_offer_may_have_are_wanted_folder_by_folder(make: Make) -> None:
    target = make()
    target.enter()
    half = MAX_OFFER_ENTRIES // 2
    files = [[entry(b"%d-%04d" % (place, n), b"%d %d" % (place, n)) for n in range(half)] for place in (0, 1)]
    target.offer(folder("a", *files[0]), folder("b", *files[1]))
    target.offer(folder("c", *(entry(b"x%d" % n, b"x%d" % n) for n in range(9))), new("d"))
    one_more = [entry(b"y%04d" % n, b"y%d" % n) for n in range(half + 1)]
    more = [entry(b"z%04d" % n, b"z%d" % n) for n in range(half)]
    target.offer(folder("e", *one_more), folder("f", *more))
    assert target.did == [("a", "b"), ("c", "d"), "e", "f"]


async def test_what_is_wanted_together_is_not_deleted_for_being_extra(make: Make) -> None:
    target = make({"b/old": b"old", "z": None}, Options(delete=True))
    target.enter()
    target.offer(new("a"), new("a/z"), new("b"), new("c"), new("d"))
    root = target.landing.directories[b""]
    assert root.offered == {b"a", b"b", b"c", b"d"}
    assert not root.unchanged_all
    target.placer.handle(DirectoryEnd(0o755, 0))
    assert target.extras == [(b"b", [b"old"]), (b"", [b"z"])]


# --- where nothing may be wanted together -----------------------------------------------------------------------


async def test_after_a_halt_nothing_is_wanted_and_all_is_answered_at_once(make: Make) -> None:
    target = make()
    target.enter()
    halt_landing(target.landing, "ended")
    target.offer(new("a"), new("a/b"), new("c"))
    assert target.wants == [none_of(3)]
    assert target.answered == [3]
    assert target.landing.offers == {}
    assert not any(isinstance(one, tuple) for one in target.did)


async def test_a_dry_run_enters_all_and_makes_nothing(make: Make) -> None:
    target = make(options=Options(dry_run=True))
    target.enter()
    target.offer(new("a"), new("a/b"), new("c"))
    assert target.did == ["a", "a/b", "c"]
    assert [want.kind for want in target.wants] == [WANT_NONE] * len(target.wants)
    assert sum(want.whole or 1 for want in target.wants) == 3
    assert target.counters.bytes_payload == sum(301 + 2 * (number == 1) for number in range(3))
    assert [name for name in os.listdir(target.path) if name != ".flow-staging"] == []


async def test_a_version_that_is_published_at_once_is_wanted_folder_by_folder(make: Make) -> None:
    target = make(options=Options(publish="atomic"))
    target.enter()
    target.offer(new("a"), new("a/b"), new("c"))
    assert target.did == ["a", "a/b", "c"]
    assert target.wants == [ALL, ALL, ALL]


# --- lies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders",
    [
        [new("a"), new("c"), new("b")],  # names must rise
        [new("a"), new("a")],
        [new("a"), new("b"), new("b/d"), new("b/c"), new("e")],
        [new("a"), new("b", mode=0o4755)],  # nobody asked for owners
        [new("a"), folder("b", entry(b"x", b"own", mode=0o4755))],
        [new("a"), folder("b", entry(b"x", bytes(LARGE_OBJECT_BYTES)))],
        [new("a"), folder("b", entry(b".flow-staging", b"x"))],
        [new("a"), folder("b", entry(b"y", b"x"), entry(b"x", b"y"))],
        [new("a"), Folder(0, b"b", 0o755, 0, b"no entries")],
        [new("a"), folder("b", Entry(b"x", 0, 0o644, 0, 7, entry(b"x", b"six").chunks))],
    ],
)
@pytest.mark.parametrize("stands", [False, True])
async def test_a_source_that_lies_is_refused_wherever_it_lies(
    make: Make, folders: list[Folder], stands: bool
) -> None:
    target = make({"a": None} if stands else {})
    target.enter()
    with pytest.raises(ProtocolError):
        target.offer(*folders)
    assert sum(target.answered) <= 2
    names = {name for name in os.listdir(target.path) if name != ".flow-staging"}
    assert names <= {"a", "b", "c"}
    for name in names:  # nothing lands of what was wanted
        assert all(entries == [] for _, _, entries in os.walk(target.path / name))


async def test_a_name_that_came_before_is_refused_before_anything_of_it_is_wanted(make: Make) -> None:
    target = make()
    target.enter()
    target.offer(new("b"), new("c"))
    with pytest.raises(ProtocolError, match="rise"):
        target.offer(new("a"), new("d"))
    assert target.wants == [all_of(2)]
    assert sorted(target.landing.offers) == [0]
    assert len(target.did) == 1


# --- answers of nothing -----------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are believed to stay as they were read, however new they are."""
    monkeypatch.setattr(placing_small, "RACY_NS", -(1 << 62))


@pytest.mark.usefixtures("settled")
async def test_all_that_nothing_is_wanted_of_is_answered_together_in_its_place(make: Make) -> None:
    kept = {f"{name}/f0": data(number, 100 + number) for number, name in enumerate("abdegh")}
    target = make(kept)

    def same(name: str) -> Folder:
        return folder(name, kept[f"{name}/f0"])

    target.enter()
    target.offer(same("a"), same("b"), new("c"), same("d"), same("e"), folder("f"), same("g"), same("h"))
    assert target.wants == [none_of(2), ALL, none_of(4)]
    assert target.answered == [2, 1, 4]
    assert target.did == list("abcdefgh")
    assert target.placement.number == 7


@pytest.mark.usefixtures("settled")
async def test_before_what_is_wanted_together_comes_what_nothing_is_wanted_of(make: Make) -> None:
    kept = data(1, 100)
    target = make({"a/f0": kept, "d/f0": kept})
    target.enter()
    target.offer(folder("a", kept), new("b"), new("c"), folder("d", kept), new("e"), new("f"))
    assert target.wants == [NONE, all_of(2), NONE, all_of(2)]


@pytest.mark.usefixtures("settled")
async def test_what_nothing_is_wanted_of_is_answered_with_its_message_and_not_later(make: Make) -> None:
    kept = data(1, 100)
    target = make({f"{name}/f0": kept for name in "abcd"})
    target.enter()
    target.offer(folder("a", kept), folder("b", kept))
    assert target.wants == [none_of(2)]
    target.offer(folder("c", kept), new("c/x"))
    assert target.wants == [none_of(2), NONE, ALL]
    # And what comes by itself is answered by itself.
    for message in placing_subtrees.each_of([folder("d", kept)]):
        target.placer.handle(message)
    assert target.wants == [none_of(2), NONE, ALL, NONE]
    assert target.answered == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("offered", "entered"),
    [
        (entry(b"f", data(1, 100)), False),
        (entry(b"f", data(2, 100)), True),  # other bytes with the size, mode and time of what stands there
        (entry(b"f", data(1, 100), mode=0o600), True),
        (entry(b"g", data(3, 100)), True),
    ],
)
async def test_only_what_stands_there_as_it_is_offered_is_not_entered(
    make: Make, tmp_path: Path, offered: Entry, entered: bool
) -> None:
    known = entry(b"f", data(1, 100))
    target = make({"c/f": data(1, 100)})
    there = target.path / "c"
    (there / "f").chmod(known.mode)
    os.utime(there / "f", ns=(0, known.mtime_ns))
    os.utime(there, ns=(0, 0))
    there.chmod(0o755)
    cache = target.placement.cache = ScanCache(DEFAULT_PROFILE.name, str(tmp_path))
    fd, st, listing = open_listed(target.root, b"c", LARGE_OBJECT_BYTES)
    os.close(fd)
    cache.save_directory(st.st_dev, st.st_ino, [DirectoryPart(listing.proof, encode_entries([known]))])
    target.enter()
    target.offer(new("a"), new("b"), folder("c", offered), new("d"), new("e"))
    assert ("c" in target.did) is entered
    # What has other bytes is asked for.
    assert (ALL in target.wants) is (offered.chunks != known.chunks)
    cache.close()
