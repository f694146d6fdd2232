"""What is asked of a target's other files for whole folders: whether any may be alike, where a folder was, and for how long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from transfers import data, entry

from flowengine.transfer import lookalikes as module
from flowengine.transfer.lookalikes import Lookalikes

TRIES = 64
"""How often looking is in vain before it ends."""
WON = 4
MOST = 256


class Looking(Lookalikes):
    """Counts how often a folder is looked for."""

    def __init__(self, root: Path) -> None:
        self.fd = os.open(root, os.O_RDONLY)
        super().__init__(self.fd, lambda path: False)
        self.looked: list[bytes] = []

    def _is_there(self, folder: bytes) -> bool:
        self.looked.append(folder)
        return super()._is_there(folder)

    def may_hold_one(self, folder: bytes, name: bytes, size_bytes: int) -> bool:
        return self.may_hold(folder, [name], [size_bytes])

    def fail(self, tries: int) -> None:
        """Try another file of the same name and size so often, in vain; there must be one of 100 bytes, `vain`."""
        for number in range(tries):
            assert self.content(b"new", entry(b"vain", data(number, 100))) is None

    def guess_in_vain(self, guesses: int) -> int:
        """Ask so often for another version of `version`, which none turns out to be; gives how often there was one."""
        one = entry(b"version", data(1, 2000))
        found = 0
        for _ in range(guesses):
            if (version := self.version_of(b"new", one)) is not None and version[1] is not None:
                self.guess()
                self.judge(version[1], right=False)
                found += 1
        return found

    def guess_right(self) -> None:
        """Find that a folder's file is another version of one of its name, and forget where it was."""
        self.guess()
        self.judge((b"elsewhere", b"another", b"old/version"), right=True)


@pytest.fixture
def looking(tmp_path: Path) -> Iterator[Looking]:
    """In `old`: a file of 100 bytes, one of 1500, one of 5000; in `old/below` another."""
    old = tmp_path / "old"
    (old / "below" / "deep").mkdir(parents=True)
    (old / "vain").write_bytes(data(1000, 100))
    (old / "version").write_bytes(data(1001, 1500))
    (old / "large").write_bytes(data(1002, 5000))
    (old / "below" / "inner").write_bytes(data(1003, 300))
    made = Looking(tmp_path)
    assert made.known()
    yield made
    os.close(made.fd)


# --- what may be alike ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size_bytes", "may"),
    [
        (b"vain", 100, True),  # name and size
        (b"vain", 101, False),  # the name alone says nothing of so little
        (b"other", 100, False),  # nor does the size
        (b"other", 5000, True),  # from 4 KiB on it does
        (b"other", 5001, False),
        (b"version", 1023, False),
        (b"version", 1024, True),  # from 1 KiB on it may be another version of what has its name
        (b"vain", 1024, False),  # but not of what is so small
        (b"other", 1500, False),
        (b"empty", 0, False),
    ],
)
def test_a_folder_may_be_known_by_names_and_sizes_of_its_files(
    looking: Looking, name: bytes, size_bytes: int, may: bool
) -> None:
    assert looking.may_hold_one(b"new", name, size_bytes) is may
    # One file among many is enough, and what is asked of one is not answered by another.
    rest = [(b"a", 7), (b"b", 8_000_000)]
    names, sizes = zip(*rest, (name, size_bytes), strict=True)
    assert looking.may_hold(b"new", names, sizes) is may
    assert looking.may_hold(b"new", names[::-1], sizes[::-1]) is may


def test_name_and_size_are_those_of_one_offered_file(looking: Looking) -> None:
    assert not looking.may_hold(b"new", [b"vain", b"other"], [99, 100])
    assert not looking.may_hold(b"new", [b"version", b"other"], [999, 1400])


def test_nothing_may_be_alike_before_anything_is_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    made = Looking(tmp_path)
    try:
        assert not made.may_hold_one(b"new", b"file", 5000)
        assert made.known()
        assert made.may_hold_one(b"new", b"file", 5000)
    finally:
        os.close(made.fd)


def test_asking_for_a_folder_costs_no_try_and_no_guess(looking: Looking) -> None:
    for _ in range(MOST):
        assert looking.may_hold_one(b"new", b"vain", 100)
        assert looking.may_hold_one(b"new", b"version", 2000)


# --- budgets ----------------------------------------------------------------------------------------------------


def test_after_so_many_tries_in_vain_no_folder_is_looked_at_for_its_sizes(looking: Looking) -> None:
    looking.fail(TRIES - 1)
    assert looking.may_hold_one(b"new", b"vain", 100)
    assert looking.may_hold_one(b"new", b"other", 5000)
    looking.fail(1)
    assert not looking.may_hold_one(b"new", b"vain", 100)
    assert not looking.may_hold_one(b"new", b"other", 5000)
    # Nor is a file, though it be the same.
    assert looking.content(b"new", entry(b"vain", data(1000, 100))) is None
    assert looking.may_hold_one(b"new", b"version", 2000)  # guesses are counted by themselves


def test_what_is_found_earns_more_tries(looking: Looking) -> None:
    looking.fail(TRIES - 1)
    assert looking.content(b"elsewhere", entry(b"vain", data(1000, 100))) == data(1000, 100)
    assert looking.may_hold_one(b"new", b"vain", 100)
    looking.fail(WON)
    assert looking.may_hold_one(b"new", b"vain", 100)
    looking.fail(1)
    assert not looking.may_hold_one(b"new", b"vain", 100)


def test_after_so_many_guesses_in_vain_no_folder_is_looked_at_for_its_names(looking: Looking) -> None:
    assert looking.guess_in_vain(TRIES - 1) == TRIES - 1
    assert looking.may_hold_one(b"new", b"version", 2000)
    assert looking.guess_in_vain(1) == 1
    assert not looking.may_hold_one(b"new", b"version", 2000)
    assert looking.guess_in_vain(1) == 0
    assert looking.may_hold_one(b"new", b"version", 1500)  # that has its size as well


def test_guesses_that_were_right_are_won_back_and_bounded(looking: Looking) -> None:
    assert looking.guess_in_vain(TRIES + 1) == TRIES
    looking.guess_right()
    assert looking.may_hold_one(b"new", b"version", 2000)
    assert looking.guess_in_vain(TRIES) == WON
    for _ in range(MOST):
        looking.guess_right()
    assert looking.guess_in_vain(2 * MOST) == MOST


def test_only_so_many_guesses_are_made_before_it_is_known_what_comes_of_them(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_GUESSED", 3)
    one = entry(b"version", data(1, 2000))
    for _ in range(3):
        assert looking.version_of(b"new", one) is not None
        looking.guess()
    assert looking.version_of(b"new", one) is None
    assert not looking.may_hold_one(b"new", b"version", 2000)
    looking.judge((b"new", b"version", b"old/version"), right=False)
    assert looking.may_hold_one(b"new", b"version", 2000)


def test_where_a_guess_was_right_the_folder_is_known_to_have_moved(looking: Looking) -> None:
    found = looking.version_of(b"new", entry(b"version", data(1, 2000)))
    assert found is not None
    assert found[1] is not None
    moves = looking.moves
    looking.judge(found[1], right=True)
    assert looking.moves == moves + 1
    assert looking.beside(b"new/below", b"inner") == (b"old/below/inner", 300)


def test_what_is_no_guess_costs_none(looking: Looking) -> None:
    for _ in range(TRIES + 1):
        assert looking.version_of(b"new", entry(b"version", data(1, 1023))) is None  # too little
        assert looking.version_of(b"new", entry(b"nobody", data(1, 2000))) is None
        assert looking.version_of(b"old", entry(b"version", data(1, 2000))) is None  # that is itself
    looking.won(b"moved", b"vain", b"old/vain")
    for _ in range(TRIES + 1):
        found = looking.version_of(b"moved", entry(b"version", data(1, 2000)))
        assert found == ((b"old/version", 1500), None)
    assert looking.guess_in_vain(1) == 1


def test_only_what_has_nothing_but_the_name_is_a_guess(looking: Looking) -> None:
    one = entry(b"version", data(1, 2000))
    guess = (b"moved", b"version", b"old/version")
    assert looking.version_of(b"moved", one) == ((b"old/version", 1500), guess)
    looking.won(b"moved", b"vain", b"old/vain")
    assert looking.version_of(b"moved", one) == ((b"old/version", 1500), None)
    # A file that is not in the folder which moved is guessed by its name still.
    guess = (b"moved", b"large", b"old/large")
    looking.won(b"moved", b"inner", b"old/below/inner")
    assert looking.version_of(b"moved", entry(b"large", data(1, 2000))) == ((b"old/large", 5000), guess)


def test_a_file_of_the_same_name_and_size_is_tried_before_another_of_its_size(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"twin-{number}").write_bytes(data(number, 6000))
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted" / "name").write_bytes(data(99, 6000))
    found = Looking(tmp_path)
    try:
        assert found.known()
        right, wrong = entry(b"name", data(99, 6000)), entry(b"name", data(100, 6000))
        for _ in range(TRIES // 2 - 1):  # each is two tries: the name, and one of its size
            assert found.content(b"far", wrong) is None
        assert found.content(b"new", right) == data(99, 6000)
        for _ in range(1 + WON // 2):
            assert found.content(b"far", wrong) is None
        assert found.content(b"new", right) is None
    finally:
        os.close(found.fd)


# --- folders that moved -----------------------------------------------------------------------------------------


def test_a_folder_that_moved_is_expected_there_with_all_below_it(looking: Looking) -> None:
    assert not looking.may_hold_one(b"new", b"unheard of", 7)
    looking.won(b"new", b"vain", b"old/vain")
    assert looking.may_hold_one(b"new", b"unheard of", 7)
    assert looking.may_hold_one(b"new/below", b"unheard of", 7)
    assert looking.may_hold_one(b"new/below/deep", b"unheard of", 7)
    assert looking.beside(b"new/below", b"inner") == (b"old/below/inner", 300)
    assert looking.beside(b"new/below", b"outer") is None
    for other in (b"", b"newer", b"ne", b"other/new", b"new/deep", b"new/below/deep/deep"):
        assert not looking.may_hold_one(other, b"unheard of", 7), other


def test_a_folder_that_moved_into_the_root_or_out_of_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_bytes(b"one")
    made = Looking(tmp_path)
    try:
        made.won(b"new", b"file", b"file")
        assert made.may_hold_one(b"new", b"x", 1)
        assert made.may_hold_one(b"new/below", b"x", 1)
        assert not made.may_hold_one(b"new/absent", b"x", 1)
        assert made.beside(b"new", b"file") == (b"file", 3)
        other = Looking(tmp_path)
        try:
            other.won(b"", b"file", b"below/file")
            assert other.may_hold_one(b"", b"x", 1)
            assert not other.may_hold_one(b"below", b"x", 1)
        finally:
            os.close(other.fd)
    finally:
        os.close(made.fd)


def test_a_moved_folder_is_looked_at_though_all_tries_and_guesses_were_in_vain(looking: Looking) -> None:
    looking.fail(TRIES)
    looking.guess_in_vain(TRIES)
    looking.won(b"moved", b"version", b"old/version")
    assert looking.may_hold_one(b"moved", b"anything", 1)
    assert looking.version_of(b"moved", entry(b"version", data(1, 2000))) == (
        (b"old/version", 1500),
        None,
    )


def test_a_folder_that_is_not_where_it_would_have_been_is_looked_for_once(looking: Looking) -> None:
    looking.won(b"new", b"vain", b"old/vain")
    for _ in range(5):
        assert not looking.may_hold_one(b"new/gone", b"x", 1)
    assert len(looking.looked) <= 3
    before = len(looking.looked)
    for number in range(50):  # nor is anything below it
        assert not looking.may_hold_one(b"new/gone/%d/deep" % number, b"x", 1)
    assert len(looking.looked) == before
    assert looking.may_hold_one(b"new/below", b"x", 1)


def test_of_a_path_that_is_absent_the_first_folder_that_is_missing_is_remembered(looking: Looking) -> None:
    looking.won(b"new", b"vain", b"old/vain")
    assert not looking.may_hold_one(b"new/below/gone/far/away", b"x", 1)
    before = len(looking.looked)
    assert not looking.may_hold_one(b"new/below/gone/near", b"x", 1)
    assert len(looking.looked) == before
    assert looking.may_hold_one(b"new/below/deep", b"x", 1)  # its parent is there


def test_a_folder_that_is_there_is_looked_for_once_for_all_its_files(looking: Looking) -> None:
    looking.won(b"new", b"vain", b"old/vain")
    for number in range(50):
        assert looking.may_hold_one(b"new/below", b"%d" % number, 1)
        looking.beside(b"new/below", b"%d" % number)
    assert looking.looked == [b"old/below"]


def test_nothing_is_looked_for_where_nothing_moved(looking: Looking) -> None:
    for number in range(50):
        looking.may_hold_one(b"new/%d" % number, b"x", 1)
        looking.beside(b"new/%d" % number, b"x")
    assert looking.looked == []


def test_of_folders_that_are_absent_no_more_than_so_many_are_remembered(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ABSENT", 10)
    looking.won(b"new", b"vain", b"old/vain")
    most = 0
    for number in range(100):
        assert not looking.may_hold_one(b"new/%d" % number, b"x", 1)
        most = max(most, len(looking._absent))
    assert most == 10
    before = len(looking.looked)
    assert not looking.may_hold_one(b"new/99", b"x", 1)  # the last ones are remembered all the same
    assert len(looking.looked) == before


def test_a_link_in_a_moved_folders_place_is_not_followed(tmp_path: Path, looking: Looking) -> None:
    (tmp_path / "old" / "link").symlink_to("below")
    (tmp_path / "old" / "file").write_bytes(b"no folder")
    looking.won(b"new", b"vain", b"old/vain")
    assert not looking.may_hold_one(b"new/link", b"inner", 7)
    assert not looking.may_hold_one(b"new/file", b"inner", 7)
