"""Quarantine: out of sight in one step, never through a link, counted when destroyed, and whole after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from flowengine.errors import UsageError
from flowengine.store.quarantine import NameDigest, Purged, Quarantine, Taken


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    folder = tmp_path / "root"
    (folder / "set/sub").mkdir(parents=True)
    for name, size in (("set/a", 10), ("set/sub/b", 20), ("set/other", 5)):
        (folder / name).write_bytes(bytes(size))
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield folder, fd
    os.close(fd)


def test_objects_and_staging_go_out_of_sight_and_are_counted(root: tuple[Path, int]) -> None:
    folder, fd = root
    (folder / "set/.flow-staging").mkdir()
    (folder / "set/.flow-staging/l.1").write_bytes(b"x" * 30)
    quarantine = Quarantine(fd, "t-1.1")
    assert not quarantine.exists()
    taken = quarantine.take(b"set", [b"a", b"sub/b", b"gone", b"sub"], staging=True)
    assert taken == Taken(objects=2, size_bytes=30, missing=2, staging=True)
    assert sorted(path.name for path in (folder / "set").iterdir()) == ["other"]
    assert (folder / ".flow-staging/quarantine").stat().st_mode & 0o777 == 0o700
    assert quarantine.exists()
    assert quarantine.take(b"set", [b"a"], staging=True) == Taken(missing=1)  # run again after a kill
    purged = quarantine.purge()
    assert purged.files == 3
    assert purged.staged_bytes > 0
    assert not quarantine.exists()
    assert not (folder / ".flow-staging").exists()
    assert quarantine.purge() == Purged()


def test_links_are_moved_and_never_followed(root: tuple[Path, int]) -> None:
    folder, fd = root
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    (folder / "set/link").symlink_to(outside)
    quarantine = Quarantine(fd, "t-1.1")
    assert quarantine.take(b"set", [b"link/file"], staging=False) == Taken(missing=1)
    assert quarantine.take(b"set", [b"link"], staging=False) == Taken(objects=1)
    quarantine.purge()
    assert (outside / "file").read_bytes() == b"x"


def test_the_roots_own_staging_is_taken_but_for_the_quarantine(root: tuple[Path, int]) -> None:
    folder, fd = root
    first = Quarantine(fd, "t-1.1")
    first.take(b"set", [b"other"], staging=False)
    (folder / ".flow-staging/l.1").write_bytes(bytes(7))
    second = Quarantine(fd, "t-2.1")
    assert second.take(b"", [b"set/a"], staging=True) == Taken(objects=1, size_bytes=10, staging=True)
    second.purge()
    assert first.exists()


def test_names_and_digests() -> None:
    digests = set()
    for rows in ([], [(b"a", 1)], [(b"a", 2)], [(b"a", 1), (b"b", 1)]):
        digest = NameDigest()
        digest.add(rows)
        assert digest.objects == len(rows)
        digests.add(digest.hex())
    assert len(digests) == 4
    # As certificates have it: the length of a path, the path, its size.
    assert sha256(b"1:a:1\n1:b:1\n").hexdigest() in digests
    with pytest.raises(UsageError, match="cannot name"):
        Quarantine(0, "../x")
