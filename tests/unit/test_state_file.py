"""A site's state files: secret, versioned, written whole or not at all."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from flowengine.errors import LocalError
from flowengine.store.state_file import StateFile

SCHEMA = "CREATE TABLE IF NOT EXISTS thing (name TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID;"


def opened(path: Path, version: int = 1) -> StateFile:
    return StateFile(str(path), "the list of things", SCHEMA, version=version, if_unusable="restore it")


def fill(file: StateFile, size_bytes: int = 0, *, fails: bool = False) -> None:
    with file.write() as db:
        db.execute("INSERT INTO thing VALUES ('a', x'')")
        db.execute("INSERT INTO thing VALUES ('c', zeroblob(?))", (size_bytes,))
        if fails:
            raise KeyError


def names(file: StateFile) -> list[str]:
    return [row[0] for row in file.rows("SELECT name FROM thing ORDER BY name")]


def test_nobody_else_can_read_it_nor_its_log(tmp_path: Path) -> None:
    file = opened(tmp_path / "deep" / "things")
    with file.write() as db:
        db.execute("INSERT INTO thing VALUES ('a', x'')")
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "deep").iterdir()}
    assert set(found.values()) == {0o600}
    assert {"things", "things-wal"} <= set(found)
    file.close()


def test_what_was_committed_is_there_for_the_next_who_opens_it(tmp_path: Path) -> None:
    first = opened(tmp_path / "things")
    with first.write() as db:
        db.execute("INSERT INTO thing VALUES ('a', x'')")
    assert names(opened(tmp_path / "things")) == ["a"]


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    file = opened(tmp_path / "things")
    with pytest.raises(KeyError):
        fill(file, fails=True)
    with file.write() as db:  # the lock was given back
        db.execute("INSERT INTO thing VALUES ('b', x'')")
    assert names(file) == ["b"]


def test_what_does_not_fit_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    file = opened(tmp_path / "things")
    with file.write() as db:
        db.execute("PRAGMA max_page_count = 8")
    with pytest.raises(LocalError) as raised:
        fill(file, size_bytes=1_000_000)
    assert "the list of things" in raised.value.message
    assert "full" in raised.value.message
    assert "make room" in (raised.value.hint or "")
    assert names(file) == []


def test_another_version_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    opened(tmp_path / "things", version=2).close()
    before = (tmp_path / "things").read_bytes()
    with pytest.raises(LocalError, match="its format is 2, not 1") as raised:
        opened(tmp_path / "things")
    assert "restore it" in (raised.value.hint or "")
    assert (tmp_path / "things").read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "things").write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(LocalError, match="cannot be used") as raised:
        opened(tmp_path / "things")
    assert raised.value.hint == "restore it"


def test_one_in_memory_ends_with_its_owner() -> None:
    file = StateFile(":memory:", "the list of things", SCHEMA, if_unusable="restore it")
    with file.write() as db:
        db.execute("INSERT INTO thing VALUES ('a', x'')")
    assert names(file) == ["a"]
    file.close()
    with pytest.raises(LocalError):
        file.rows("SELECT 1")


def test_two_that_have_it_open_wait_for_each_other(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "things"), opened(tmp_path / "things")
    with first.write() as db:
        db.execute("INSERT INTO thing VALUES ('a', x'')")
    with second.write() as db:
        db.execute("INSERT INTO thing VALUES ('b', x'')")
    assert names(first) == names(second) == ["a", "b"]
    assert sqlite3.connect(tmp_path / "things").execute("PRAGMA user_version").fetchone() == (1,)
