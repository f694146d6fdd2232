"""What is named becomes what lands: SRC and SRC/, several, single files, filters, lists, removal, dry runs.

What depends on the way runs between two local paths, as a push and as a pull; the rest locally.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import (
    MIB,
    Flow,
    Result,
    assert_same,
    random_file,
    small_tree,
    snapshot,
    stats_of,
    wait_until,
    wait_until_nobody_writes,
)

pytestmark = pytest.mark.slow

Move = Callable[..., Result]
"""move(command, sources below `source`, target below `target`, *options)"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    small_tree(root / "a", 6, per_folder=3)
    small_tree(root / "b", 4, seed=2)
    (root / "file.txt").write_bytes(b"a single file")
    random_file(root / "large.bin", 2 * MIB)
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    root = tmp_path / "target"
    root.mkdir()
    return root


ways = pytest.mark.parametrize("move", ["local", "push", "pull"], indirect=True)


@pytest.fixture
def move(request: pytest.FixtureRequest, flow: Flow, source: Path, target: Path) -> Iterator[Move]:
    def local(command: str, sources: list[str], to: str, *options: object, code: int | None = 0) -> Result:
        return flow(command, *[f"{source}/{name}" for name in sources], f"{target}/{to}", *options, code=code)

    way = getattr(request, "param", "local")
    if way == "local":
        yield local
        return
    served = target if way == "push" else source
    with flow.serving(served) as ticket:
        base, _, secret = ticket.format_secret_url().partition("#")
        base = base.rstrip("/")

        def push(command: str, sources: list[str], to: str, *options: object, code: int | None = 0) -> Result:
            names = [f"{source}/{name}" for name in sources]
            done = flow(command, *names, f"{base}/{to}#{secret}", *options, code=code)
            wait_until_nobody_writes(target)
            return done

        def pull(command: str, sources: list[str], to: str, *options: object, code: int | None = 0) -> Result:
            done = Result(0, "", "")
            for name in sources:
                done = flow(command, f"{base}/{name}#{secret}", f"{target}/{to}", *options, code=code)
            return done

        yield push if way == "push" else pull


def names(root: Path) -> set[str]:
    return {os.fsdecode(path) for path in snapshot(root)} - {""}


@ways
def test_with_a_slash_the_contents_land(move: Move, source: Path, target: Path) -> None:
    move("cp", ["a/"], "new/deep")
    assert_same(source / "a", target / "new" / "deep")


@ways
def test_without_a_slash_the_folder_itself_lands(move: Move, source: Path, target: Path) -> None:
    move("cp", ["a"], "new")
    assert os.listdir(target / "new") == ["a"]
    assert_same(source / "a", target / "new" / "a")


@ways
def test_several_sources_land_beside_each_other(move: Move, source: Path, target: Path) -> None:
    (target / "stays").write_bytes(b"stays")
    move("cp", ["a", "b", "file.txt"], "")
    assert sorted(os.listdir(target)) == ["a", "b", "file.txt", "stays"]
    assert_same(source / "a", target / "a")
    assert_same(source / "b", target / "b")
    assert (target / "file.txt").read_bytes() == b"a single file"


@ways
@pytest.mark.parametrize("name", ["file.txt", "large.bin"])
def test_a_file_gets_a_new_name(move: Move, source: Path, target: Path, name: str) -> None:
    move("cp", [name], "renamed")
    assert os.listdir(target) == ["renamed"]
    there, here = os.stat(source / name), os.stat(target / "renamed")
    assert (target / "renamed").read_bytes() == (source / name).read_bytes()
    assert (here.st_mtime_ns, here.st_mode) == (there.st_mtime_ns, there.st_mode)


def test_a_file_replaces_a_file(move: Move, source: Path, target: Path) -> None:
    (target / "old").write_bytes(b"what was there")
    move("cp", ["file.txt"], "old")
    assert (target / "old").read_bytes() == b"a single file"


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_file_lands_in_a_folder(move: Move, target: Path, slash: str) -> None:
    (target / "folder").mkdir()
    move("cp", ["file.txt"], f"folder{slash}")
    assert (target / "folder" / "file.txt").read_bytes() == b"a single file"


@ways
def test_a_file_lands_in_a_new_folder(move: Move, target: Path) -> None:
    move("cp", ["file.txt"], "made/")
    assert (target / "made" / "file.txt").read_bytes() == b"a single file"


@ways
def test_a_missing_source_is_named(move: Move, target: Path) -> None:
    done = move("cp", ["nothing-here"], "x", code=3)
    assert "nothing-here" in done.stderr
    assert "next:" in done.stderr
    assert not (target / "x").exists()


@ways
def test_include_and_exclude_decide_in_order(move: Move, source: Path, target: Path) -> None:
    (source / "a" / "keep.log").write_bytes(b"k")
    (source / "a" / "drop.log").write_bytes(b"d")
    move("sync", ["a/"], "", "--include", "keep.log", "--exclude", "*.log", "--exclude=d0001")
    assert "keep.log" in names(target)
    assert not {"drop.log", "d0001"} & names(target)
    assert "d0000/f0" in names(target)


def test_only_listed_paths_land(move: Move, source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("d0000/f1\nd0001\n# a comment\n")
    move("sync", ["a/"], "", "--files-from", tmp_path / "list")
    assert names(target) == {"d0000", "d0000/f1", "d0001", "d0001/f3", "d0001/f4", "d0001/f5"}


@ways
def test_a_list_restricts_a_folder_named_without_slash(
    move: Move, source: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "list").write_bytes(b"d0000/f1\0")
    move("sync", ["a"], "", "--files-from", tmp_path / "list")
    assert names(target) == {"a", "a/d0000", "a/d0000/f1"}


def test_a_listed_path_that_is_missing_is_named(
    move: Move, source: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text("d0000/f1\nd0000/never\nnor/this\n")
    done = move("sync", ["a/"], "", "--files-from", tmp_path / "list", "--json", code=7)
    assert {row["path"] for row in done.data["failures"]} == {"d0000/never", "nor"}
    assert "d0000/f1" in names(target)


@ways
def test_delete_removes_what_the_source_has_not(move: Move, source: Path, target: Path) -> None:
    move("sync", ["a/"], "")
    (target / "extra").write_bytes(b"e")
    (target / "d0000" / "extra").write_bytes(b"e")
    (target / "extra-folder" / "deep").mkdir(parents=True)
    (target / "extra-folder" / "deep" / "file").write_bytes(b"e")
    (target / "extra-link").symlink_to("/etc")
    move("sync", ["a/"], "")
    assert "extra-folder/deep/file" in names(target)
    done = move("sync", ["a/"], "", "--delete", "--json")
    assert done.data["objects_deleted"] == 4
    assert_same(source / "a", target)
    assert os.path.isdir("/etc")


def test_delete_keeps_what_a_filter_hides(move: Move, source: Path, target: Path) -> None:
    move("sync", ["a/"], "")
    (target / "mine.keep").write_bytes(b"k")
    (target / "d0000" / "mine.keep").write_bytes(b"k")
    (target / "extra" / "deep").mkdir(parents=True)
    (target / "extra" / "deep" / "mine.keep").write_bytes(b"k")
    (target / "extra" / "goes").write_bytes(b"g")
    move("sync", ["a/"], "", "--delete", "--exclude", "*.keep")
    found = names(target)
    assert {"mine.keep", "d0000/mine.keep", "extra/deep/mine.keep"} <= found
    assert "extra/goes" not in found


def test_delete_with_a_list_keeps_what_is_not_listed(
    move: Move, source: Path, target: Path, tmp_path: Path
) -> None:
    move("sync", ["a/"], "")
    before = names(target)
    (target / "d0001" / "extra").write_bytes(b"e")
    (tmp_path / "list").write_text("d0000/f1\nd0001\n")
    move("sync", ["a/"], "", "--files-from", tmp_path / "list", "--delete")
    assert names(target) == before


def test_delete_refuses_an_empty_source(move: Move, source: Path, target: Path) -> None:
    (source / "nothing").mkdir()
    (target / "precious").write_bytes(b"p")
    done = move("sync", ["nothing/"], "", "--delete", code=7)
    assert "source is empty" in done.stderr
    assert names(target) == {"precious"}


@ways
def test_delete_refuses_when_something_failed(move: Move, source: Path, target: Path) -> None:
    os.mkfifo(source / "a" / "pipe")
    (target / "precious").write_bytes(b"p")
    done = move("sync", ["a/"], "", "--delete", code=7)
    assert "nothing was deleted" in done.stderr
    assert "pipe" in done.stderr
    assert {"precious", "d0000/f0"} <= names(target)


def test_delete_makes_way_for_a_file_where_a_folder_was(move: Move, source: Path, target: Path) -> None:
    (target / "d0000" / "f0" / "inside").mkdir(parents=True)
    done = move("sync", ["a/"], "", code=7)
    assert "folder of this name is in the way" in done.stderr
    assert (target / "d0000" / "f0" / "inside").is_dir()
    move("sync", ["a/"], "", "--delete")
    assert_same(source / "a", target)


def test_a_folder_replaces_a_file_and_a_link(move: Move, source: Path, target: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "d0000").write_bytes(b"a file")
    (target / "d0001").symlink_to(outside)
    move("sync", ["a/"], "")
    assert_same(source / "a", target)
    assert os.listdir(outside) == []


def test_a_file_replaces_a_link_and_not_what_it_points_to(
    move: Move, source: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"outside")
    (target / "d0000").mkdir()
    (target / "d0000" / "f0").symlink_to(tmp_path / "outside")
    move("sync", ["a/"], "")
    assert (tmp_path / "outside").read_bytes() == b"outside"
    assert_same(source / "a", target)


@ways
def test_a_dry_run_changes_nothing_and_foretells(move: Move, source: Path, target: Path) -> None:
    move("sync", ["a/"], "")
    (source / "a" / "d0000" / "f0").write_bytes(b"x" * 5000)
    random_file(source / "a" / "new-large", 3 * MIB)
    (source / "a" / "new-folder").mkdir()
    (source / "a" / "new-folder" / "in").write_bytes(b"y" * 700)
    (target / "extra").write_bytes(b"e")
    before = stats_of(target)
    dry = move("sync", ["a/"], "", "--delete", "--dry-run", "--json").data
    assert stats_of(target) == before
    assert dry["bytes_to_send"] == 5000 + 3 * MIB + 700
    assert dry["objects_unchanged"] == 5
    wet = move("sync", ["a/"], "", "--delete", "--json").data
    assert wet["objects_landed"] == 3
    assert wet["objects_deleted"] == 1
    assert_same(source / "a", target)


def test_a_dry_run_into_nothing_makes_nothing(move: Move, source: Path, target: Path) -> None:
    dry = move("cp", ["a/", "large.bin"][:1], "new/place", "--dry-run", "--json").data
    assert dry["bytes_to_send"] == dry["bytes"] > 0
    assert names(target) == set()


@ways
def test_atomic_publishing_replaces_the_whole(move: Move, source: Path, target: Path) -> None:
    move("sync", ["a/"], "site", "--publish", "atomic")
    assert_same(source / "a", target / "site")
    (target / "site" / "extra").write_bytes(b"e")
    done = move("sync", ["a/"], "site", "--publish", "atomic", code=7)
    assert "--delete" in done.stderr
    assert "extra" in names(target / "site")
    move("sync", ["a/"], "site", "--publish", "atomic", "--delete")
    assert_same(source / "a", target / "site")
    # A server that was pushed to drops its lock behind its last word.
    wait_until(lambda: os.listdir(target) == ["site"], "nothing beside what was published")
