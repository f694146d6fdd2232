"""Opening in a place of a site: cancelled it leaves off and nothing half open is seen; what fails is told as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from sealing import seal_into

from flowengine.errors import LocalError
from flowengine.store.sealed_open import Opened
from flowengine.transfer.handing import Ended
from flowengine.transfer.keeper import hear_end
from flowengine.transfer.line import Line, line_pair
from flowengine.trust.sealed import SealingKey
from flowengine_agent.acting import OwnHands
from flowengine_agent.config import OfferedFolder
from flowengine_agent.mover import Unseal, Where, _operate
from flowengine_agent.roots import Place, Roots

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


async def unsealed(place: Place, secret: bytes = SECRET, landed: Any = nobody) -> Opened:
    return await OwnHands(Roots([])).unseal(place, [secret], xattrs=False, owner=False, landed=landed)


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
        end = await hear_end(line, note)
    assert isinstance(end, Ended), end
    assert msgspec.msgpack.decode(end.outcome, type=Opened).objects == len(told) == 12
    line.close()
