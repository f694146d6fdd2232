"""Content that lies at the target under another name is not sent again, whether it is remembered or not."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, Flow, assert_same, random_file, small_tree

from flowengine.transfer.lookalikes import Lookalikes


@contextlib.contextmanager
def looking_at(root: Path) -> Iterator[Lookalikes]:
    """What is looked for below a folder, none of which is new."""
    fd = os.open(root, os.O_RDONLY)
    try:
        yield Lookalikes(fd, lambda path: False)
    finally:
        os.close(fd)


def sent(flow: Flow, source: Path, target: Path) -> int:
    done = flow("cp", f"{source}/", target, "--json").data
    assert done["state"] == "completed"
    return int(done["bytes_sent"])


def test_large_files_with_other_names_in_other_folders(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(4):
        random_file(target / "old" / f"part-{number}", 8 * MIB, seed=number)
        random_file(source / "new" / "place" / f"other-{3 - number}", 8 * MIB, seed=number)
    size = sent(flow, source, target)
    assert size < 4 * 8 * MIB * 0.003
    assert_same(source / "new", target / "new")
    assert len(list((target / "old").iterdir())) == 4


def test_two_large_files_that_changed_places(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, names in ((target, "ab"), (source, "ba")):
        for number, name in enumerate(names):
            random_file(folder / name, 4 * MIB, seed=number)
    sent(flow, source, target)
    assert_same(source, target)


@pytest.mark.parametrize("where", ["append", "middle", "head"])
def test_a_large_file_with_another_name_that_was_edited(flow: Flow, tmp_path: Path, where: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    old = random_file(target / "logs" / "app.log", 8 * MIB).read_bytes()
    cut = {"append": len(old), "middle": len(old) // 2, "head": 10}[where]
    name = "app.log" if where == "head" else "app.log.1"  # by its beginning, or by its name
    (source / "kept").mkdir(parents=True)
    (source / "kept" / name).write_bytes(old[:cut] + b"edited" + old[cut:])
    assert sent(flow, source, target) < 64 * 1024
    assert_same(source / "kept", target / "kept")


def test_a_twin_that_differs_further_on(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    old = bytearray(random_file(target / "one", 24 * MIB).read_bytes())
    old[12 * MIB : 12 * MIB + 10] = b"0123456789"
    source.mkdir()
    (source / "two").write_bytes(old[: 20 * MIB] + b"!" + old[20 * MIB : -1])
    assert sent(flow, source, target) < 128 * 1024
    assert (target / "two").read_bytes() == (source / "two").read_bytes()


def brought(flow: Flow, tmp_path: Path) -> tuple[Path, bytes]:
    """A target to which one large file was brought, so that its chunks are remembered; its bytes."""
    data = random_file(tmp_path / "first" / "one", 32 * MIB).read_bytes()
    sent(flow, tmp_path / "first", tmp_path / "target")
    return tmp_path / "target", data


def test_several_large_files_that_are_remembered_under_other_names(flow: Flow, tmp_path: Path) -> None:
    first, source, target = tmp_path / "first", tmp_path / "source", tmp_path / "target"
    for number in range(4):
        data = random_file(first / "old" / f"{number}", 9 * MIB, seed=number).read_bytes()
        (source / "moved").mkdir(parents=True, exist_ok=True)
        (source / "moved" / f"other-{3 - number}").write_bytes(data)
    sent(flow, first, target)
    assert sent(flow, source, target) < 4 * 9 * MIB * 0.003
    for number in range(4):
        moved = target / "moved" / f"other-{3 - number}"
        assert moved.read_bytes() == (first / "old" / f"{number}").read_bytes()
    assert_same(first / "old", target / "old")


def test_a_remembered_file_that_goes_on_otherwise_is_followed(flow: Flow, tmp_path: Path) -> None:
    target, old = brought(flow, tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    edited = (
        old[: 20 * MIB] + b"inserted" + old[20 * MIB : -8]
    )  # as long as the old one, and begins as it does
    (source / "two").write_bytes(edited)
    assert sent(flow, source, target) < 128 * 1024
    assert (target / "two").read_bytes() == edited
    assert (target / "one").read_bytes() == old


def test_what_is_remembered_of_a_file_that_was_changed_since_is_not_believed(
    flow: Flow, tmp_path: Path
) -> None:
    target, old = brought(flow, tmp_path)
    before = (target / "one").stat()
    with (target / "one").open("r+b") as file:  # behind everybody's back, and to the eye nothing has happened
        file.seek(20 * MIB)
        file.write(b"something else")
    os.utime(target / "one", ns=(before.st_atime_ns, before.st_mtime_ns))
    source = tmp_path / "source"
    source.mkdir()
    (source / "two").write_bytes(old)
    done = flow("cp", f"{source}/", target, "--json").data
    assert (done["state"], done["passes"]) == ("completed", 2)  # the second one knows that the index is wrong
    assert (target / "two").read_bytes() == old


def test_a_tree_of_small_files_under_another_name_with_edits(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    small_tree(target / "release-1", 600, size=3000)
    small_tree(source / "release-2", 600, size=3000)
    edited = sorted(path for path in (source / "release-2").rglob("*") if path.is_file())[::20]
    for path in edited:
        data = path.read_bytes()
        path.write_bytes(data[:1500] + b"edited" + data[1500:])
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert sent(flow, source, target) < total / 10
    assert_same(source / "release-2", target / "release-2")


def words(seed: int, size: int) -> bytes:
    """Text of its own."""
    rng = random.Random(seed)
    return b" ".join(b"%x" % rng.getrandbits(24) for _ in range(size // 6))


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def reused(flow: Flow, source: Path, target: Path) -> float:
    """Which share of a tree was found at the target."""
    done = flow("cp", f"{source}/", target, "--json").data
    assert (done["state"], done["passes"]) == ("completed", 1)
    return float(done["bytes_reused"]) / float(done["bytes"])


def test_a_tree_under_another_name_with_every_file_edited(flow: Flow, tmp_path: Path) -> None:
    """Nothing is the same, so only names say what is alike; there are more of them than guesses to be lost."""
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(600):
        data, path = words(number, 9000), f"d{number // 10:03}/f{number:04}.c"
        put(target / "old-1.0" / path, b"/* (c) 2025 */" + data)
        put(source / "new-1.1" / path, b"/* (c) 2026 someone */" + data)
    assert reused(flow, source, target) > 0.85
    assert_same(source / "new-1.1", target / "new-1.1")


def test_what_is_too_small_to_be_compared_costs_no_guess(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(100):
        put(target / f"a{number:03}" / "__init__.py", words(number, 400))
        put(source / f"b{number:03}" / "__init__.py", words(5000 + number, 1500))
        data = words(9000 + number, 20_000)
        put(target / f"p{number:03}" / f"mod{number}.c", b"/* (c) 2025 */" + data)
        put(source / f"q{number:03}" / f"mod{number}.c", b"/* (c) 2026 someone */" + data)
    assert reused(flow, source, target) > 0.8


def test_of_many_files_of_one_name_the_one_of_the_same_size_is_looked_at(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(200):
        data = words(number, 2000 + 6 * number)
        put(target / f"x{number:03}" / "index.js", data)
        put(source / f"z{number * 37 % 200:03}" / "index.js", data)
    assert reused(flow, source, target) == 1.0


def test_what_is_found_in_one_folder_is_expected_for_those_offered_with_it(
    flow: Flow, tmp_path: Path
) -> None:
    """What moved is deeper than is listed at first: only the first find says where the rest is."""
    source, target = tmp_path / "source", tmp_path / "target"
    small_tree(target / "old" / "a", 4200, size=6, per_folder=4200)
    for root in (target / "old", source / "new"):
        put(root / "a" / "f.c", words(1, 9000))
        for number in range(300):
            put(root / f"k{number // 100}" / f"d{number // 5:03}" / f"f{number}.c", words(number + 2, 6000))
    assert reused(flow, source, target) == 1.0


def test_files_that_have_only_the_name_of_others_are_wanted_together(tmp_path: Path) -> None:
    for number in range(300):
        put(tmp_path / f"old{number}" / "__init__.py", words(number, 30 + 2 * number))
    with looking_at(tmp_path) as lookalikes:
        assert lookalikes.known()
        size = len(words(7, 44))
        assert lookalikes.may_hold(b"new", [b"__init__.py"], [size])  # one is as long
        assert not lookalikes.may_hold(b"new", [b"other.py", b"__init__.py"], [size, 1023])
        assert lookalikes.may_hold(b"new", [b"__init__.py"], [1024])  # it may be another version


def test_a_target_with_few_descriptors_does_not_wait_for_what_is_behind(flow: Flow, tmp_path: Path) -> None:
    """Folders wait for finer cuts, and those come behind the folders that wait for room."""
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(400):
        data, path = words(number, 3000), f"d{number:03}/f"
        put(target / "old" / path, b"/* (c) 2025 */" + data)
        put(source / "new" / path, b"/* (c) 2026 someone */" + data)
    limited = Flow(flow.state, prefix=["prlimit", "--nofile=400:400"], env=flow.env)
    assert reused(limited, source, target) > 0
    assert_same(source / "new", target / "new")


def test_where_sizes_are_equal_and_content_is_not_looking_ends(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    rng = random.Random(1)
    for folder in (source / "new", target / "old"):
        folder.mkdir(parents=True)
        for number in range(500):
            (folder / f"{folder.name}-{number}").write_bytes(rng.randbytes(5000))
    done = flow("cp", f"{source}/", target, "--json").data
    assert done["bytes_sent"] < 500 * 5000 * 1.05
    assert_same(source / "new", target / "new")


def test_nothing_is_looked_at_outside_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    random_file(outside / "secret", 5000)
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "link").symlink_to(outside)
    (root / "secret").symlink_to(outside / "secret")
    (root / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(root / "pipe")
    with looking_at(root) as lookalikes:
        lookalikes.expect(1 << 30)
        assert not lookalikes.known()
        assert lookalikes.open(b"secret") is None
        assert lookalikes.open(b"folder/link/secret") is None
        assert lookalikes.open(b"pipe") is None


def test_listing_stops_at_what_the_new_bytes_are_worth(tmp_path: Path) -> None:
    for number in range(60):
        small_tree(tmp_path / f"{number:02}", 100, size=10, per_folder=100)
    with looking_at(tmp_path) as lookalikes:
        assert lookalikes.known()
        first = lookalikes.entries
        assert first < 60 * 100
        lookalikes.expect(1 << 30)
        lookalikes.known()
        assert lookalikes.entries > 60 * 100 > first
