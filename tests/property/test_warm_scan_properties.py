"""Whatever becomes of a tree between two scans: the second tells what one tells that remembers nothing, and the same version."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from itertools import product
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scans import Told, scan

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.store import scan as scanning
from flowengine.store.leaves import KnownLeaf, known_leaves
from flowengine.store.scan_cache import ScanCache
from flowengine.wire.messages import LARGE_OBJECT_BYTES

TOPS = ["a", "b", "c"]
FOLDERS = [
    *TOPS,
    *(f"{TOPS[number % 3]}/{name}" for number, name in enumerate("cdefghijklmnopqrstu")),
    *map("/".join, product("a", "cf", "lmnop")),
    *map("/".join, product("b", "d", "l", "klm")),
]
"""Most of them are plain, side by side, and stand between others where the contents of several are taken together."""
NAMES = ["1", "2", "3", os.fsdecode(b"\xff"), "n" * 255]
FILES = [os.path.join(folder, name) for folder in FOLDERS for name in NAMES]

folders, files = st.sampled_from(FOLDERS), st.sampled_from(FILES)
Edit = tuple[str, str, str]
EDITS = st.tuples(
    st.sampled_from(
        [
            "write", "write alike", "write large", "mode", "time", "remove", "rename", "hard link", "link", "folder", "pipe",
            "folder mode", "folder time", "remove folder", "rename folder", "link folder", "swap folders",
        ]
    ),
    files,
    files,
)  # fmt: skip


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make(root: Path, kind: str, one: str, other: str) -> None:
    """Do something to a tree; where it cannot be done, nothing."""
    path, to = root / one, root / other
    folder, aside = path.parent, root / "aside"
    match kind:
        case "write":
            write(root, one, os.fsencode(other))
        case "write alike":
            was = path.stat()
            path.write_bytes(bytes(was.st_size))
            os.utime(path, ns=(1, was.st_mtime_ns))
        case "write large":
            write(root, one, b"large")
            os.truncate(path, LARGE_OBJECT_BYTES)
        case "mode":
            path.chmod(0o600)
        case "time":
            os.utime(path, ns=(1, 7))
        case "remove":
            path.unlink()
        case "rename":
            path.rename(to)
        case "hard link":
            os.link(path, to)
        case "link":
            path.unlink(missing_ok=True)
            path.symlink_to(other)
        case "folder":
            path.mkdir(parents=True)
        case "pipe":
            os.mkfifo(path)
        case "folder mode":
            folder.chmod(0o7750)
        case "folder time":
            os.utime(folder, ns=(1, 7))
        case "remove folder":
            shutil.rmtree(folder)
        case "rename folder":
            folder.rename(to)
        case "link folder":
            folder.rename(aside)
            folder.symlink_to(aside)
        case "swap folders":
            folder.rename(aside)
            to.parent.rename(folder)
            aside.rename(to.parent)


def edit(root: Path, edits: list[Edit]) -> None:
    for one in edits:
        with contextlib.suppress(OSError):
            make(root, *one)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    held=st.lists(files, max_size=20, unique=True),
    odd=st.sets(folders),
    before=st.lists(EDITS, max_size=6),
    after=st.lists(EDITS, max_size=6),
    roots=st.sampled_from([[""], ["a/", "b/", "c/"], ["a", "b/", "c/"]]),
)
def test_a_scan_with_a_memory_tells_what_one_without_it_tells(
    held: list[str], odd: set[str], before: list[Edit], after: list[Edit], roots: list[str]
) -> None:
    many = 0

    def asking(*args: object) -> list[KnownLeaf | None]:
        nonlocal many
        found = known_leaves(*args)  # type: ignore[arg-type]
        many += sum(one is not None for one in found)
        return found

    def warm() -> Told:
        scanning.known_leaves = asking  # type: ignore[assignment, attr-defined]
        try:
            return scan(*paths, cache=cache)
        finally:
            scanning.known_leaves = known_leaves  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as place:
        root, state = Path(place, "root"), Path(place, "state")
        state.mkdir()
        for top in TOPS:
            (root / top).mkdir(parents=True)
        for name in (*held, *(os.path.join(folder, "0") for folder in FOLDERS if folder not in odd)):
            write(root, name, os.fsencode(name))
        edit(root, before)
        paths = [f"{root}/{name}" for name in roots if name.rstrip("/") in os.listdir(root) or not name]
        cache = ScanCache(DEFAULT_PROFILE.name, str(state))
        try:
            cold = warm()
            assert cold == scan(*paths)
            assert warm() == cold
            edit(root, after)
            paths = [path for path in paths if os.path.isdir(path)]
            fresh = scan(*paths)
            event("changed" if fresh != cold else "the same")
            for _ in range(2):
                assert warm() == fresh
        finally:
            cache.close()
    event("many at once" if many > 20 else "few or none at once")
