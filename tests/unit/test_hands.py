"""What an account keeps in quarantine: in the folder that it wrote to, since it may be able to write nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowengine_agent.config import OfferedFolder
from flowengine_agent.hands import hide, purge
from flowengine_agent.roots import Place, Roots


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Roots([OfferedFolder(str(tmp_path), "/data", "read-write")], as_account=True).find(
        "/data/her/set", "write"
    )


def test_what_landed_is_hidden_where_it_landed_and_destroyed_there(tmp_path: Path, place: Place) -> None:
    top = tmp_path / "her/set"
    (top / "deep").mkdir(parents=True)
    (top / "deep/x").write_bytes(b"12345")
    (top / ".flow-staging").mkdir()
    (top / ".flow-staging/l.1").write_bytes(b"123")
    (tmp_path / "her/.set.flow-next").mkdir()
    (tmp_path / "her/.set.flow-next/y").write_bytes(b"1234567")
    assert hide(place, "t-1", [b"deep/x", b"gone"], staging=True) == (1, 5)
    assert hide(place, "t-1", [b"deep/x"], staging=True) == (1, 5)  # as after a kill
    assert sorted(path.name for path in tmp_path.iterdir()) == ["her"]
    assert sorted(path.name for path in (tmp_path / "her").iterdir()) == ["set"]
    assert sorted(path.name for path in top.iterdir()) == [".flow-staging"]
    assert purge(place, "t-1") == 10
    assert list(top.iterdir()) == []
    assert purge(place, "t-1") == 0


def test_a_version_that_was_never_published_is_hidden_beside_it(tmp_path: Path, place: Place) -> None:
    (tmp_path / "her/.set.flow-next").mkdir(parents=True)
    (tmp_path / "her/.set.flow-next/y").write_bytes(b"1234567")
    assert hide(place, "t-2", [], staging=True) == (0, 0)
    assert [path.name for path in (tmp_path / "her").iterdir()] == [".flow-staging"]
    assert purge(place, "t-2") == 7
    assert list((tmp_path / "her").iterdir()) == []


def test_nothing_is_made_where_nothing_was(tmp_path: Path, place: Place) -> None:
    assert hide(place, "t-3", [b"x"], staging=True) == (0, 0)
    assert purge(place, "t-3") == 0
    assert list(tmp_path.iterdir()) == []
