"""Whatever a target holds of a tree: it ends the same whether folders come one by one or many as one, and for the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support import Item, snapshot
from transfers import Done, transfer

from flowengine.chunking import CHUNK_BYTES
from flowengine.manifest import Entry
from flowengine.transfer import gathering
from flowengine.transfer.placing_subtrees import each_of
from flowengine.wire.messages import (
    WANT_ALL,
    EncodedOffer,
    Finer,
    ObjectRun,
    Offer,
    Options,
    Subtrees,
)

CONTENTS = [
    b"",
    *(random.Random(size).randbytes(size) for size in (1, 60, 61, 1023, 1024, 2000, 5000, 90_000)),
    *(random.Random(size + 1).randbytes(size) for size in (60, 1023, 2000, 5000, 90_000)),
    bytes(700_000),  # of which most chunks are the same
]
"""Some are as long as others; no two are alike, so that nothing depends on which of two is placed first."""
FATES = ["absent", "in place", "changed", "other name", "elsewhere", "elsewhere and changed"]
TOPS = "abcde"
FOLDERS = [
    "/".join([top, *below]) for top in TOPS for depth in range(3) for below in product("abc", repeat=depth)
]
PLACES = [os.path.join(folder, name) for folder in ("", *FOLDERS) for name in "xyz"]
MOST_FILES = 24
"""So few, that nothing ends any budget of guesses: each of them may be tried with two others in vain."""


@dataclass
class Case:
    """A tree to be sent, and what of it the target has.

    Attributes:
        files: path → which content; beyond `CONTENTS`, one of its own.
        fates: of each file, what became of it at the target.
        empty: folders in which there is nothing.
        linked: folders with a link in them, so that they are not plain.
        moved: folders of the root that have another name at the target.
    """

    files: dict[str, int]
    fates: list[str]
    empty: list[str]
    linked: list[str]
    moved: list[str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tops, folder = st.sampled_from(TOPS), st.sampled_from(FOLDERS)
    places = st.sampled_from(PLACES)
    names = sorted(draw(st.lists(places, min_size=6, max_size=MOST_FILES, unique=True)))
    count = len(names)
    contents = st.integers(0, len(CONTENTS) - 1) | st.integers(len(CONTENTS), len(CONTENTS) + 1000)
    files = dict(zip(names, draw(st.lists(contents, min_size=count, max_size=count)), strict=True))
    new = draw(st.sets(tops))  # of these the target has nothing
    fates = draw(st.lists(st.sampled_from(FATES), min_size=count, max_size=count))
    fates = ["absent" if name[0] in new else fate for name, fate in zip(names, fates, strict=True)]
    empty = draw(st.lists(folder, max_size=3))
    linked = draw(st.lists(folder, max_size=1))
    moved = draw(st.lists(tops, max_size=1))
    return Case(files, fates, empty, linked, moved)


def content_of(number: int) -> bytes:
    return CONTENTS[number] if number < len(CONTENTS) else random.Random(-number).randbytes(number)


def write(path: Path, data: bytes, *, later_ns: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(1, 1_000_000_000_000_000_000 + len(data) + later_ns))


def write_source(root: Path, case: Case) -> None:
    root.mkdir()
    for name, content in case.files.items():
        write(root / name, content_of(content))
    for name in (*case.empty, *case.linked):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in case.linked:
        (root / name / "link").symlink_to("nowhere")
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        if not path.is_file():
            os.utime(path, ns=(1, 1_000_000_007 * number), follow_symlinks=False)
    os.utime(root, ns=(1, 1))


def write_target(root: Path, case: Case, *, cached: bool) -> None:
    """What the target has: brought, and remembered, or not; and then changed by others."""
    first = root.with_name("first")
    first.mkdir()
    root.mkdir()
    for (name, content), fate in zip(case.files.items(), case.fates, strict=True):
        if fate != "absent":
            write((first if cached else root) / name, content_of(content))
    if cached:
        assert transfer(first, root, cached=True).failures == []
    for number, ((name, content), fate) in enumerate(zip(case.files.items(), case.fates, strict=True)):
        path, data = root / name, content_of(content)
        # What stands in place is replaced while others are looked for: it is as long as before, or which of
        # them is listed would depend on which came first.
        if fate == "changed":
            # Another time, too: where only the content is another, an index is wrong, and a second session mends it.
            changed = b"changed %5d" % number + data[13:] if len(data) > 13 else data
            write(path, changed, later_ns=5_000_000_000)
        elif fate == "other name":
            path.rename(path.with_name(f"old {path.name}"))
        elif fate.startswith("elsewhere"):
            new = root / "attic" / f"{number % 3}" / name
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
            if fate != "elsewhere":
                write(new, data[:500] + b"edited" + data[500:], later_ns=5_000_000_000)
    for name in case.moved:
        if (root / name).exists():
            (root / name).rename(root / f"was {name}")


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """A place for one target, with caches of its own; nothing is told early where the machine is slow."""
    with tempfile.TemporaryDirectory() as name:
        state = {"FLOW_STATE_DIR": os.path.join(name, "state")}
        with mock.patch.dict(os.environ, state), mock.patch.object(gathering, "HELD_NS", 1 << 62):
            yield Path(name)


def offers(done: Done) -> Iterator[list[bytes]]:
    """The ids of the chunks of each offer that was made, in the order of their numbers; of a finer cut none."""
    for message in done.messages:
        said = each_of(message.folders) if isinstance(message, Subtrees) else [message]
        for one in said:
            if isinstance(one, EncodedOffer):
                one = one.decode()
            if isinstance(one, Offer):
                yield ids_of(one.entries)
            elif isinstance(one, ObjectRun | Finer):
                yield []


def ids_of(entries: list[Entry]) -> list[bytes]:
    packed = b"".join(entry.chunks for entry in entries)
    return [packed[at + 4 : at + CHUNK_BYTES] for at in range(0, len(packed), CHUNK_BYTES)]


def is_marked(bits: bytes, index: int) -> bool:
    return bool(int.from_bytes(bits, "little") >> index & 1)


def asked_for(done: Done) -> list[bytes]:
    """The ids of all chunks that the target wanted, or asked to see cut finer, each as often as it did."""
    made = offers(done)
    found: list[bytes] = []
    for want in done.wants:
        ids = [one for _ in range(want.whole or 1) for one in next(made)]
        found += [
            one
            for index, one in enumerate(ids)
            if want.kind == WANT_ALL or is_marked(want.bitmap, index) or is_marked(want.finer, index)
        ]
    assert next(made, None) is None  # each was answered, and none twice
    return found


def sent(case: Case, *, subtrees: bool, cached: bool) -> tuple[Done, dict[bytes, Item]]:
    """How the tree was sent, and what stands at the target then."""
    with world() as place:
        source, target = place / "source", place / "target"
        write_source(source, case)
        write_target(target, case, cached=cached)
        done = transfer(source, target, Options(delete=True), subtrees=subtrees, cached=cached)
        assert done.failures == []
        there = snapshot(target)
        assert there == snapshot(source)
        again = transfer(source, target, Options(delete=True), subtrees=subtrees, cached=cached)
        assert again.target.objects_unchanged == again.target.objects_done == done.target.objects_done
        assert (again.source.bytes_payload, again.target.objects_deleted) == (0, 0)
        assert again.version == done.version
        assert asked_for(again) == []
        return done, there


@given(cases(), st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_target_ends_the_same_and_for_the_same_bytes_whether_folders_come_as_one_or_one_by_one(
    case: Case, cached: bool
) -> None:
    (one, there), (other, also) = (sent(case, subtrees=subtrees, cached=cached) for subtrees in (True, False))
    assert there == also
    assert one.version == other.version
    assert one.source.bytes_payload == other.source.bytes_payload
    for name in ("objects_done", "bytes_done", "objects_unchanged", "bytes_unchanged", "bytes_reused"):
        assert getattr(one.target, name) == getattr(other.target, name), name
    assert sorted(asked_for(one)) == sorted(asked_for(other))
    for done in (one, other):
        found = asked_for(done)
        assert len(set(found)) == len(found)  # no chunk is asked for twice
    event(f"wanted together: {min(one.whole, 3)}")
    event(f"folder by folder: {min(one.told - one.whole, 3)}")
