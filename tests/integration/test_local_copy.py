"""`flow cp` and `flow sync` between two local paths: exact copies, and nothing done twice."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from support import MIB, Flow, assert_same, random_file, rich_tree, small_tree, stats_of, touched_files

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return rich_tree(tmp_path / "source")


def changed_stats(before: dict[bytes, tuple[int, ...]], target: Path) -> set[bytes]:
    """Paths whose stat changed; the root's own ctime shows that a staging folder stood in it for a while."""
    after = stats_of(target)
    root = os.fsencode(target) + b"/."
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} - {root}


def test_everything_arrives_as_it_was(flow: Flow, tree: Path, tmp_path: Path) -> None:
    done = flow("cp", f"{tree}/", tmp_path / "target", "--json").data
    assert (done["state"], done["objects_failed"]) == ("completed", 0)
    assert_same(tree, tmp_path / "target")
    assert not (tmp_path / "target" / ".flow-staging").exists()


def test_holes_stay_holes(flow: Flow, tree: Path, tmp_path: Path) -> None:
    flow("cp", f"{tree}/", tmp_path / "target")
    for name in ("sparse", "hole-only"):
        there, here = os.stat(tree / name), os.stat(tmp_path / "target" / name)
        assert here.st_blocks <= there.st_blocks + 2048, name
    assert os.stat(tmp_path / "target" / "hole-only").st_blocks * 512 < MIB


def test_a_folder_of_programs_arrives_and_a_second_sync_reads_and_sends_nothing(
    flow: Flow, tmp_path: Path
) -> None:
    source = tmp_path / "lib"
    shutil.copytree(
        sysconfig.get_paths()["stdlib"],
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test"),
    )
    first = flow("sync", f"{source}/", tmp_path / "target", "--json").data
    assert_same(source, tmp_path / "target")
    before = stats_of(tmp_path / "target")
    with touched_files(source, tmp_path / "target") as touched:
        again = flow("sync", f"{source}/", tmp_path / "target", "--json").data
    assert touched.read == set()
    # A large file may be opened to see that it is the one that the cache knows.
    assert all(os.path.getsize(path) >= MIB for path in touched.opened)
    assert again["objects_unchanged"] == again["objects"] == first["objects"]
    assert again["bytes_sent"] < 0.01 * first["bytes"]
    assert again["version"] == first["version"]
    assert changed_stats(before, tmp_path / "target") == set()


def test_what_is_opened_and_read_is_seen(tmp_path: Path) -> None:
    small_tree(tmp_path / "a", 3)
    with touched_files(tmp_path / "a") as touched:
        (tmp_path / "a" / "d0000" / "f1").read_bytes()
        (tmp_path / "a" / "d0000" / "f2").open("rb").close()
    f1, f2 = (os.fsencode(tmp_path / "a" / "d0000" / name) for name in ("f1", "f2"))
    assert (touched.opened, touched.read) == ({f1, f2}, {f1})


def test_a_second_sync_of_every_kind_of_thing_reads_nothing(flow: Flow, tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    flow("sync", f"{tree}/", target)
    before = stats_of(target)
    with touched_files(tree, target) as touched:
        again = flow("sync", f"{tree}/", target, "--json").data
    # Making another name for an inode changes its ctime: the first names are looked at once more.
    assert touched.read <= {os.fsencode(target / name) for name in ("one", f"size-{5 * MIB + 7}")}
    with touched_files(tree, target) as touched:
        flow("sync", f"{tree}/", target)
    assert touched.read == set()
    assert again["objects_unchanged"] == again["objects"]
    assert changed_stats(before, target) == set()


def test_only_the_changed_file_is_read(flow: Flow, tmp_path: Path) -> None:
    source, target = small_tree(tmp_path / "source", 600), tmp_path / "target"
    flow("sync", f"{source}/", target)
    (source / "d0001" / "f300").write_bytes(b"new")
    with touched_files(source, target) as touched:
        done = flow("sync", f"{source}/", target, "--json").data
    changed = os.fsencode(source / "d0001" / "f300")
    assert {path for path in touched.opened if path.startswith(os.fsencode(source))} == {changed}
    assert touched.read == {changed}
    assert done["objects_landed"] == 1
    assert_same(source, target)


@pytest.mark.parametrize("edit", ["change", "insert", "delete", "append"])
def test_an_edit_of_a_large_file_sends_little(flow: Flow, tmp_path: Path, edit: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = random_file(source / "large", 96 * MIB)
    target = tmp_path / "target"
    flow("sync", f"{source}/", target)
    middle = 48 * MIB + 12345
    if edit == "change":
        with open(path, "r+b") as file:
            file.seek(middle)
            byte = file.read(1)[0]
            file.seek(middle)
            file.write(bytes([byte ^ 1]))
    elif edit == "append":
        with open(path, "ab") as file:
            file.write(b"!")
    else:
        data = path.read_bytes()
        path.write_bytes(data[:middle] + (b"!" + data[middle:] if edit == "insert" else data[middle + 1 :]))
        del data
    done = flow("sync", f"{source}/", target, "--json").data
    assert done["bytes_sent"] < MIB
    assert done["bytes_reused"] > 95 * MIB
    assert_same(source, target)


def test_a_moved_file_and_a_second_copy_are_not_sent_again(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    data = random_file(source / "a", 8 * MIB).read_bytes()
    (source / "b").write_bytes(data)
    (source / "c").write_bytes(data[:700_000])
    done = flow("sync", f"{source}/", target, "--json").data
    assert done["bytes_sent"] < 10 * MIB
    assert_same(source, target)


def test_times_and_modes_alone_are_mended_without_sending(flow: Flow, tmp_path: Path) -> None:
    source, target = small_tree(tmp_path / "source", 20), tmp_path / "target"
    random_file(source / "large", 3 * MIB)
    flow("sync", f"{source}/", target)
    for path in (source / "large", source / "d0000" / "f3", source / "d0000"):
        os.utime(path, ns=(7, 123_456_789_012_345_678))
        path.chmod(0o750)
    (target / "d0000" / "f4").chmod(0o777)
    done = flow("sync", f"{source}/", target, "--json").data
    assert done["bytes_sent"] < 100_000
    assert_same(source, target)


@pytest.mark.parametrize("known", [True, False], ids=["known", "forgotten"])
def test_a_tree_that_was_unpacked_anew_is_only_dressed(flow: Flow, tmp_path: Path, known: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in range(12):
        for number in range(5):
            path = source / f"d{folder}" / f"f{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % folder * 1000 * number)  # the first is empty
    for number in range(30):  # more than is compared at once
        random_file(source / "much" / f"f{number}", 100_000, seed=number)
    (source / "d3" / "link").symlink_to("f1")
    os.link(source / "d4" / "f1", source / "d4" / "f1 again")
    flow("cp", f"{source}/", target)
    if not known:
        shutil.rmtree(flow.state)
    for number, path in enumerate(sorted(source.rglob("f*"))):
        os.utime(path, ns=(number, number * 1_000_000_007))
        if number % 7 == 0:
            path.chmod(0o600)
    (source / "d5" / "f2").write_bytes(b"other bytes")
    again = flow("cp", f"{source}/", target, "--json").data
    assert (again["objects_landed"], again["objects_failed"]) == (1, 0)
    assert (again["objects_read_at_target"] == 0) is known
    assert_same(source, target)
    before = {path: path.lstat() for path in target.rglob("*")}
    last = flow("cp", f"{source}/", target, "--json").data
    assert (last["objects_landed"], last["objects_read_at_target"]) == (0, 0)
    assert {path: path.lstat().st_ctime_ns for path in before} == {
        path: st.st_ctime_ns for path, st in before.items()
    }


def test_a_damaged_target_file_is_mended(flow: Flow, tmp_path: Path) -> None:
    source, target = small_tree(tmp_path / "source", 20), tmp_path / "target"
    random_file(source / "large", 4 * MIB)
    flow("sync", f"{source}/", target)
    for path in (target / "large", target / "d0000" / "f3"):
        st = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"\0\1\2\3")
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    flow("sync", f"{source}/", target)
    assert_same(source, target)
    assert "all as it should be" in flow("verify", target).stderr


@pytest.mark.parametrize("publish", ["object", "atomic"])
@pytest.mark.parametrize("options", [["--no-cache"], ["--chunk-size", "1MiB"], ["--streams", "5", "--threads", "3"], ["--compress", "3"]])  # fmt: skip
def test_settings_change_nothing_of_the_result(
    flow: Flow, tree: Path, tmp_path: Path, options: list[str], publish: str
) -> None:
    target = tmp_path / "target"
    flow("sync", f"{tree}/", target, "--publish", publish, *options)
    assert_same(tree, target)
    (tree / "text.txt").write_text("other")
    os.unlink(tree / "zz-hard" / "one-again")
    (tree / "zz-hard" / "one-again").write_bytes(b"no link any more")
    flow("sync", f"{tree}/", target, "--publish", publish, *options)
    assert_same(tree, target)


def test_attributes_and_owners_travel_when_asked(flow: Flow, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    names = ["small", "large", "folder"]
    (source / "small").write_bytes(b"small")
    random_file(source / "large", 2 * MIB)
    for name in names:
        os.setxattr(source / name, "user.flow", f"of {name}".encode())
        if os.geteuid() == 0:
            os.chown(source / name, 1234, 4321)
    options = ["--xattrs", "--owner"] if os.geteuid() == 0 else ["--xattrs"]
    flow("cp", f"{source}/", target, *options)
    for name in names:
        assert os.getxattr(target / name, "user.flow") == f"of {name}".encode()
        there, here = os.stat(source / name), os.stat(target / name)
        assert (here.st_uid, here.st_gid) == (there.st_uid, there.st_gid)
    assert_same(source, target)


def test_the_manifest_is_the_same_bytes_for_any_number_of_threads(
    flow: Flow, tree: Path, tmp_path: Path
) -> None:
    random_file(tree / "large", 50 * MIB + 3, seed=9)
    made = []
    for threads in (1, 2, 3, 7):
        out = tmp_path / f"by-{threads}.flowmanifest"
        flow("manifest", tree, "--no-cache", "--threads", threads, "--output", out)
        made.append(out.read_bytes())
    assert len(set(made)) == 1
    flow("cp", f"{tree}/", tmp_path / "target")
    assert flow("diff", tmp_path / "by-1.flowmanifest", tmp_path / "target").stdout == ""


def test_a_lost_state_folder_costs_reading_and_nothing_else(flow: Flow, tree: Path, tmp_path: Path) -> None:
    random_file(tree / "large", 4 * MIB)
    flow("sync", f"{tree}/", tmp_path / "target", "--delete")
    shutil.rmtree(flow.state)
    again = flow("sync", f"{tree}/", tmp_path / "target", "--delete", "--json").data
    assert (again["objects_landed"], again["objects_deleted"], again["state"]) == (0, 0, "completed")
    assert again["objects_read_at_target"] > 0
    assert again["bytes_sent"] < MIB // 2
    assert_same(tree, tmp_path / "target")
