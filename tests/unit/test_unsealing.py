"""Opening in a place of a site: cancelled it leaves off and nothing half open is seen; what fails is told as it is."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from sealing import seal_into

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import LocalError
from flowengine.manifest import FILE, Entry, Header, ManifestBuilder
from flowengine.store.landed import LandedManifest
from flowengine.store.sealed_open import Opened
from flowengine.transfer.handing import Ended
from flowengine.transfer.keeper import hear_end
from flowengine.transfer.line import Line, line_pair
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.trust.sealed import SealingKey
from flowengine.units import MIB
from flowengine_agent.acting import OwnHands
from flowengine_agent.config import OfferedFolder
from flowengine_agent.hands import OBJECTS_AT_ONCE
from flowengine_agent.mover import Objects, Unseal, Where, _operate
from flowengine_agent.roots import Place, Roots
from flowengine_agent.spool import RowSpool

SECRET = bytes(range(32))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    for number in range(12):
        (source / str(number)).write_bytes(os.urandom(1000))
    incoming = data / ".flow-staging/sealed"
    incoming.mkdir(parents=True)
    seal_into(f"{source}/", incoming, SealingKey(SECRET))
    return Roots([OfferedFolder(str(data), "/data", "read-write")]).find("/data/", "write")


def nobody(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
    """Keeps no account."""


async def unsealed(place: Place, secret: bytes = SECRET, landed: Any = nobody, named: Any = nobody) -> Opened:
    return await OwnHands(Roots([])).unseal(
        place, [secret], xattrs=False, owner=False, landed=landed, named=named
    )


@pytest.mark.trio
async def test_it_opens_and_leaves_nothing_behind(place: Place) -> None:
    opened = await unsealed(place)
    assert (opened.objects, opened.failures) == (12, [])
    assert len(os.listdir(place.real_path)) == 12


@pytest.mark.trio
async def test_who_cancels_waits_for_no_more_than_what_is_under_way(place: Place) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await unsealed(place)
    assert scope.cancelled_caught
    opened = await unsealed(place)
    assert opened.objects == 12


@pytest.mark.trio
async def test_what_fails_is_told_as_it_is(place: Place) -> None:
    opened = await unsealed(place, bytes(32))
    assert {reason for _, reason, _ in opened.failures} == {"integrity"}
    assert "did not name" in opened.failures[0][2]
    assert (await unsealed(Place(place.root, b"nowhere", True))).objects == 0
    incoming = Path(place.root.folder.path) / ".flow-staging/sealed"
    incoming.rename(incoming.with_name("elsewhere"))
    assert (await unsealed(place)).objects == 0
    incoming.write_bytes(b"no folder")
    assert (await unsealed(place)).objects == 0


@pytest.mark.trio
async def test_what_is_not_on_account_gets_no_name(place: Place) -> None:
    def full(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
        raise LocalError("the disk of the state folder is full")

    with pytest.raises(LocalError):
        await unsealed(place, landed=full)
    assert os.listdir(place.real_path) == [b".flow-staging"]
    told: list[tuple[bytes, int]] = []

    def note(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
        assert not {name for name, _ in rows} & set(os.listdir(place.real_path))
        told.extend(rows)

    await unsealed(place, landed=note)
    assert sorted(told) == sorted((b"%d" % number, 1000) for number in range(12))


@pytest.mark.trio
async def test_a_mover_has_the_agent_take_note_first(place: Place) -> None:
    ours, theirs = line_pair()
    line = Line(ours, "the mover ended")
    told: list[tuple[bytes, int]] = []

    def note(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
        assert os.listdir(place.real_path) == [b".flow-staging"]
        told.extend(rows)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_operate, theirs, Roots([place.root.folder], as_account=True))
        line.post(msgspec.msgpack.encode(Unseal(Where.of(place), [SECRET], False, False)))
        await line.flush()
        named: list[tuple[bytes, int]] = []
        end = await hear_end(line, note, named.extend)
    assert isinstance(end, Ended), end
    assert msgspec.msgpack.decode(end.outcome, type=Opened).objects == len(told) == 12
    assert sorted(named) == sorted(told)
    line.close()


@pytest.mark.slow
@pytest.mark.trio
async def test_what_is_opened_is_told_some_at_a_time_and_kept_nowhere(place: Place) -> None:
    incoming = Path(place.root.folder.path) / ".flow-staging/sealed"
    source = incoming.parent.parent.parent / "more"
    source.mkdir()
    for number in range(100, 200):
        (source / str(number)).write_bytes(b"x")
    seal_into(f"{source}/", incoming, SealingKey(SECRET))
    noted: list[list[tuple[bytes, int]]] = []
    named: list[list[tuple[bytes, int]]] = []

    def name(rows: list[tuple[bytes, int]]) -> None:
        assert {path for path, _ in rows} <= set(os.listdir(os.fsencode(place.real_path)))
        named.append(rows)

    opened = await unsealed(place, landed=lambda rows, wrong="": noted.append(rows), named=name)
    assert opened.objects == 112
    assert max(map(len, named)) <= max(map(len, noted)) <= 64
    assert sorted(chain(*named)) == sorted(chain(*noted))
    # What is sent back, or stays in memory, does not grow with them.
    assert len(msgspec.msgpack.encode(opened)) < 100


@pytest.mark.trio
async def test_what_fails_is_noted_and_never_named(place: Place) -> None:
    (Path(place.real_path.decode()) / "3").mkdir()
    named: list[tuple[bytes, int]] = []
    opened = await unsealed(place, named=named.extend)
    assert [(path, reason) for path, reason, _ in opened.failures] == [(b"3", "in-the-way")]
    assert len(named) == opened.objects == 11
    assert b"3" not in dict(named)


def kept_version(place: Place, count: int) -> None:
    """The manifest of a version of so many objects is kept, as one that landed."""
    record = LandedManifest(place.real_path)
    recorder = ManifestRecorder(ManifestBuilder(record.begin(), Header(DEFAULT_PROFILE)))
    recorder.enter(b"")
    recorder.entries([Entry(b"%07d" % number, FILE, 0o644, 0, 0) for number in range(count)], check=False)
    recorder.leave(0o755, 0, b"")
    recorder.finish()
    record.commit(beside=False)


@pytest.mark.trio
@pytest.mark.parametrize("by_mover", [False, True])
async def test_objects_of_a_version_are_told_some_at_a_time(
    place: Place, by_mover: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    kept_version(place, 3 * OBJECTS_AT_ONCE + 1)
    told: list[list[tuple[bytes, int]]] = []

    def note(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
        told.append(rows)

    if by_mover:
        ours, theirs = line_pair()
        line = Line(ours, "the mover ended")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_operate, theirs, Roots([place.root.folder], as_account=True))
            line.post(msgspec.msgpack.encode(Objects(Where.of(place))))
            await line.flush()
            end = await hear_end(line, note)
        assert isinstance(end, Ended), end
        assert msgspec.msgpack.decode(end.outcome) is None
        line.close()
    else:
        await OwnHands(Roots([])).objects(place, note)
    assert [len(rows) for rows in told] == [OBJECTS_AT_ONCE] * 3 + [1]
    assert [path for path, _ in chain(*told)] == [
        b"%07d" % number for number in range(3 * OBJECTS_AT_ONCE + 1)
    ]


def test_memory_does_not_grow_with_what_is_spooled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path))
    path = b"p" * 1000

    def most_bytes(count: int) -> int:
        tracemalloc.start()
        try:
            with contextlib.closing(RowSpool()) as spool:
                for number in range(count):
                    spool.add([(path + b"%d" % (number + at), at) for at in range(64)])
                assert sum(map(len, spool.parts())) == 64 * count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # 5 MB and 10 MB of rows: beyond what is kept in memory all of it is on disk.
    assert abs(most_bytes(160) - most_bytes(80)) < MIB
