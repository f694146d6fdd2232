"""Opening in a place of a site: cancelled it leaves off and nothing half open is seen; what fails is told as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from sealing import seal_into

from flowengine.trust.sealed import SealingKey
from flowengine_agent.acting import OwnHands
from flowengine_agent.config import OfferedFolder
from flowengine_agent.roots import Place, Roots

SECRET = bytes(range(32))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    for number in range(30):
        (source / str(number)).write_bytes(os.urandom(1000))
    incoming = data / ".flow-staging/sealed"
    incoming.mkdir(parents=True)
    seal_into(f"{source}/", incoming, SealingKey(SECRET))
    return Roots([OfferedFolder(str(data), "/data", "read-write")]).find("/data/", "write")


@pytest.mark.trio
async def test_it_opens_and_leaves_nothing_behind(place: Place) -> None:
    opened = await OwnHands(Roots([])).unseal(place, [SECRET])
    assert (opened.objects, opened.failures) == (30, [])
    assert len(os.listdir(place.real_path)) == 30


@pytest.mark.trio
async def test_who_cancels_waits_for_no_more_than_what_is_under_way(place: Place) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await OwnHands(Roots([])).unseal(place, [SECRET])
    assert scope.cancelled_caught
    opened = await OwnHands(Roots([])).unseal(place, [SECRET])
    assert opened.objects == 30


@pytest.mark.trio
async def test_what_fails_is_told_as_it_is(place: Place) -> None:
    opened = await OwnHands(Roots([])).unseal(place, [bytes(32)])
    assert {reason for _, reason, _ in opened.failures} == {"integrity"}
    assert "did not name" in opened.failures[0][2]
    assert (await OwnHands(Roots([])).unseal(Place(place.root, b"nowhere", True), [SECRET])).objects == 0
    incoming = Path(place.root.folder.path) / ".flow-staging/sealed"
    incoming.rename(incoming.with_name("elsewhere"))
    assert (await OwnHands(Roots([])).unseal(place, [SECRET])).objects == 0
    incoming.write_bytes(b"no folder")
    assert (await OwnHands(Roots([])).unseal(place, [SECRET])).objects == 0
