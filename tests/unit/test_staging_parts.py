"""The parts of a staging folder, in which small objects stand: who gets which, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transfers import block_of, entry

from flowengine.errors import FlowError, LocalError
from flowengine.store.runs import place_run, staging_name, staging_number, staging_part, write_run
from flowengine.store.staging import PARTS, Staging

ALL_PARTS = {staging_part(part) for part in range(PARTS)}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[[], Staging]]:
    """Opens the staging folder of `target`."""
    (tmp_path / "target").mkdir()
    root = os.open(tmp_path / "target", os.O_RDONLY)
    yield lambda: Staging(root, os.fsencode(tmp_path / "target"))
    os.close(root)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("part", [0, 1, PARTS - 1])
def test_a_run_is_made_in_the_part_that_its_number_says_and_placed_from_there(
    tmp_path: Path, stage: Callable[[], Staging], part: int
) -> None:
    staging, target = stage(), tmp_path / "target"
    first = staging_number(part, 254)
    block = block_of(entry(b"a", b"1"), entry(b"b", b"22"))
    write_run(staging.fd, first, block.columns.packed, memoryview(b"122"))
    made = [target / ".flow-staging" / staging_name(first + number) for number in range(2)]
    assert [path.read_bytes() for path in made] == [b"1", b"22"]
    assert [path.name for path in made] == ["fe", "ff"]
    assert {path.parent.name for path in made} == {staging_part(part)}
    to = os.open(target, os.O_RDONLY)
    rows, _, failed = place_run(staging.fd, first, block, to)
    os.close(to)
    assert rows is not None
    assert failed == []
    assert [(target / name).read_bytes() for name in ("a", "b")] == [b"1", b"22"]
    staging.close(remove=False)
    assert {path.name for path in target.iterdir()} == {"a", "b"}


def test_parts_take_turns_and_no_name_is_given_twice(stage: Callable[[], Staging]) -> None:
    staging = stage()
    firsts = [staging.small_numbers(3) for _ in range(2 * PARTS)]
    assert [staging_name(first).partition("/")[0] for first in firsts[:PARTS]] == [
        staging_name(first).partition("/")[0] for first in firsts[PARTS:]
    ]
    names = [staging_name(first + number) for first in firsts for number in range(3)] + [staging.small_name()]
    assert len({*names}) == len(names)
    assert {name.partition("/")[0] for name in names} == ALL_PARTS
    staging.close(remove=False)


def test_what_was_left_in_parts_is_swept_and_what_waits_beside_them_stays(
    tmp_path: Path, stage: Callable[[], Staging]
) -> None:
    there = tmp_path / "target" / ".flow-staging"
    killed = stage()
    (there / staging_name(killed.small_numbers(1))).write_bytes(b"left over")
    (there / "l.waits").write_bytes(b"waits")
    (there / "sealed").mkdir()
    (there / "sealed" / "object").write_bytes(b"sealed")
    (there / "s.9").write_bytes(b"of an earlier version")
    killed.close(remove=False)
    assert [*there.glob("s.*/*")] != [], "what may be wanted stays with the folder"
    again = stage()
    assert [*there.glob("s.*/*")] == []
    assert {path.name for path in there.iterdir()} == {"lock", "l.waits", "sealed", *ALL_PARTS}
    again.close(remove=False)
    assert {path.name for path in there.iterdir()} == {"lock", "l.waits", "sealed"}
    last = stage()
    (there / staging_name(last.small_numbers(1))).write_bytes(b"in the way of nobody")
    last.close(remove=True)
    assert {path.name for path in there.iterdir()} == {"sealed"}, "it is not staging's"
    assert (there / "sealed" / "object").read_bytes() == b"sealed"


def test_links_in_the_place_of_parts_are_not_followed(tmp_path: Path, stage: Callable[[], Staging]) -> None:
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "target" / ".flow-staging"
    elsewhere.mkdir()
    (elsewhere / "1").write_bytes(b"of somebody")
    there.mkdir(mode=0o700)
    for part in ALL_PARTS:
        (there / part).symlink_to(elsewhere)
    staging = stage()
    assert [(there / part).is_symlink() for part in ALL_PARTS] == [False] * PARTS
    staging.close(remove=True)
    assert [path.read_bytes() for path in elsewhere.iterdir()] == [b"of somebody"]


def test_a_part_that_cannot_be_made_is_told_and_lets_go_of_the_folder(
    tmp_path: Path, stage: Callable[[], Staging]
) -> None:
    stuck = tmp_path / "target" / ".flow-staging" / staging_part(1) / "a folder" / "in it"
    stuck.mkdir(parents=True)
    with pytest.raises(FlowError, match="cannot make the parts of") as told:
        stage()
    assert isinstance(told.value, LocalError)
    stuck.rmdir()
    stuck.parent.rmdir()
    stage().close(remove=True)
    assert [*(tmp_path / "target").iterdir()] == []
