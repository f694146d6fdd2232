"""The parts of a staging folder, in which runs of small objects stand: who gets which, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transfers import block_of, entry

from flowengine.store.runs import part_of, place_run, staging_name, staging_number, write_run
from flowengine.store.staging import Staging

PARTS = ("r.0", "r.1", "r.2", "r.3")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where the staging folder of the target comes to stand."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / ".flow-staging"


@pytest.fixture
def stage(there: Path) -> Iterator[Callable[[], Staging]]:
    """Opens it."""
    root = os.open(there.parent, os.O_RDONLY)
    yield lambda: Staging(root, os.fsencode(there.parent))
    os.close(root)


def write(staging: Staging, first: int, *contents: bytes) -> None:
    """Make the files of a run."""
    block = block_of(*(entry(b"%d" % number, content) for number, content in enumerate(contents)))
    write_run(staging.part(first), first, block.columns.packed, memoryview(b"".join(contents)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("part", [0, 1, 3])
def test_a_run_is_made_in_the_part_that_its_number_says_and_placed_from_there(
    there: Path, stage: Callable[[], Staging], part: int
) -> None:
    staging = stage()
    first = staging_number(part, 254)
    write(staging, first, b"1", b"22")
    made = [there / PARTS[part] / staging_name(first + number) for number in range(2)]
    assert [path.name for path in made] == ["fe", "ff"]
    assert [path.read_bytes() for path in made] == [b"1", b"22"]
    assert staging.find(first + 1) == ("ff", staging.part(first))
    to = os.open(there.parent, os.O_RDONLY)
    block = block_of(entry(b"a", b"1"), entry(b"b", b"22"))
    rows, _, failed = place_run(staging.part(first), first, block, to)
    os.close(to)
    assert rows is not None
    assert failed == []
    staging.close(remove=False)
    assert {path.name: path.read_bytes() for path in there.parent.iterdir()} == {"a": b"1", "b": b"22"}


def test_parts_take_turns_and_no_name_is_given_twice(stage: Callable[[], Staging]) -> None:
    staging = stage()
    firsts = [staging.run_numbers(3) for _ in range(8)]
    assert sorted(map(part_of, firsts[:4])) == [0, 1, 2, 3]
    assert [*map(part_of, firsts[:4])] == [*map(part_of, firsts[4:])]
    names = [staging_name(first + number) for first in firsts for number in range(3)]
    assert len({*names}) == len(names)
    alone = staging.small_name(), staging.small_name()
    assert alone[0] != alone[1]
    assert staging.find(alone[0]) == (alone[0], staging.fd)
    staging.close(remove=False)


def test_what_was_left_in_parts_is_swept_and_what_waits_beside_them_stays(
    there: Path, stage: Callable[[], Staging]
) -> None:
    killed = stage()
    write(killed, killed.run_numbers(2), b"left", b"over")
    (there / killed.small_name()).write_bytes(b"left over")
    (there / "l.waits").write_bytes(b"waits")
    (there / "sealed").mkdir()
    (there / "sealed" / "object").write_bytes(b"sealed")
    killed.close(remove=False)
    assert len([*there.glob("r.*/*")]) == 2, "as a process that is killed leaves it"
    again = stage()
    assert {path.name for path in there.iterdir()} == {"lock", "l.waits", "sealed", *PARTS}
    assert [*there.glob("r.*/*")] == []
    again.close(remove=False)
    assert {path.name for path in there.iterdir()} == {"lock", "l.waits", "sealed"}
    last = stage()
    write(last, last.run_numbers(1), b"given up")
    last.close(remove=True)
    assert {path.name for path in there.iterdir()} == {"sealed"}, "it is not staging's"
    assert (there / "sealed" / "object").read_bytes() == b"sealed"


def test_links_are_not_followed_neither_before_nor_while_it_is_open(
    there: Path, tmp_path: Path, stage: Callable[[], Staging]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1").write_bytes(b"of somebody")
    there.mkdir(mode=0o700)
    for name in PARTS:
        (there / name).symlink_to(elsewhere)
    staging = stage()
    assert [(there / name).is_symlink() for name in PARTS] == [False] * 4
    for name in PARTS:
        (there / name).rename(there / f"away-{name}")
        (there / name).symlink_to(elsewhere)
    for _ in PARTS:
        write(staging, staging.run_numbers(1), b"of the run")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"1": b"of somebody"}
    staging.close(remove=True)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"1": b"of somebody"}


def test_what_cannot_be_removed_from_a_parts_place_is_set_aside(
    there: Path, stage: Callable[[], Staging]
) -> None:
    stuck = there / "r.1" / "a folder"
    stuck.mkdir(parents=True)
    (stuck / "file").write_bytes(b"of somebody")
    (there / "r.1" / "left").write_bytes(b"left over")
    staging = stage()
    write(staging, staging_number(1, 7), b"1")
    assert (there / "r.1" / "7").read_bytes() == b"1"
    staging.close(remove=False)
    (aside,) = there.glob("r.stuck-*")
    assert [path.name for path in aside.iterdir()] == ["a folder"]
    assert (aside / "a folder" / "file").read_bytes() == b"of somebody"


def test_no_descriptor_is_left_open(there: Path, stage: Callable[[], Staging]) -> None:
    before = os.listdir("/proc/self/fd")
    stage().close(remove=False)
    stage().close(remove=True)
    there.mkdir()
    (there / "lock").mkdir()
    with pytest.raises(Exception, match="lock"):
        stage()
    assert len(os.listdir("/proc/self/fd")) == len(before)
