"""A folder sealed as a source offers it, and opened again: equal, and nothing that was changed in between passes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sealing import chunks_of, events_of, seal_into

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import AuthenticationError, IntegrityError, LocalError, NotFound, TemporaryError
from flowengine.store.buffers import BufferPool
from flowengine.store.keyring import Keyring
from flowengine.store.reading import SEGMENT_BYTES
from flowengine.store.scan_events import ScanFailed
from flowengine.store.sealed_open import check_held, open_sealed
from flowengine.store.sealed_scan import SealedScanner
from flowengine.store.selection import select
from flowengine.trust.sealed import SealingKey, object_name
from flowengine.trust.sealing_keys import unwrap_key, wrap_key
from flowengine.units import MIB
from flowengine.wire.filters import FilterSet
from flowengine.wire.messages import LARGE_OBJECT_BYTES

KEY = SealingKey(bytes(range(32)))
MARKER = b"a-marker-that-nobody-else-writes"


def make_tree(root: Path) -> None:
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "deep/er" / (MARKER.decode() + ".txt")).write_bytes(MARKER * 10)
    (root / "deep/nothing").write_bytes(b"")
    (root / "large").write_bytes(MARKER + os.urandom(3 * MIB))
    (root / "link").symlink_to("deep/nothing")
    (root / "twin").write_bytes(b"same")
    (root / "other-twin").write_bytes(b"same")
    (root / "deep/er").chmod(0o750)
    (root / "twin").chmod(0o640)
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        content: object = (
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
        found[str(path.relative_to(root))] = (st.st_mode, st.st_mtime_ns, content)
    return found


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    source, held, opened = (tmp_path / name for name in ("source", "held", "opened"))
    for path in (source, held, opened):
        path.mkdir()
    make_tree(source)
    return source, held, opened


def opened_with(held: Path, opened: Path, key: SealingKey = KEY) -> list[tuple[bytes, str, str]]:
    return open_sealed(os.fsencode(held), os.fsencode(opened), lambda _: key).failures


def test_what_was_sealed_opens_equal_and_shows_nothing(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    assert seal_into(f"{source}/", held, KEY) == []
    files = [path for path in held.rglob("*") if path.is_file()]
    assert len(files) == 6 + 4  # an object for each folder, the root's included
    assert all(MARKER not in path.read_bytes() for path in files)
    assert all(len(path.name) == 26 for path in held.rglob("*"))
    for path in files:
        assert check_held(os.fsencode(held), os.fsencode(path.relative_to(held))).key_id == KEY.id
    twins = [path.stat().st_size for path in files]
    assert len({path.read_bytes() for path in files}) == len(twins)  # equal content shows nowhere
    assert opened_with(held, opened) == []
    assert picture(opened) == picture(source)
    assert opened.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_a_part_of_a_held_copy_opens_under_its_whole_path(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(str(source), held, KEY)
    part = held / os.fsdecode(object_name(KEY.object_id(b"source")))
    part /= os.fsdecode(object_name(KEY.object_id(b"source/deep")))
    assert opened_with(part, opened) == []
    assert sorted(os.listdir(opened / "source/deep")) == ["er", "nothing"]


def test_a_second_time_only_what_changed_is_new(places: tuple[Path, Path, Path]) -> None:
    source, _, _ = places
    before = set(chunks_of(events_of(f"{source}/", KEY)[0]))
    assert set(chunks_of(events_of(f"{source}/", KEY)[0])) == before
    with open(source / "large", "r+b") as file:
        file.seek(MIB)
        file.write(b"edited")
    after = set(chunks_of(events_of(f"{source}/", KEY)[0]))
    assert 0 < len(after - before) <= 6  # chunks around one segment, and those with the description
    assert not before & set(chunks_of(events_of(f"{source}/", SealingKey(bytes(32)))[0]))


def test_filters_go_by_the_objects_own_names(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY, filters=FilterSet.from_wire([(False, b"deep/")]))
    assert opened_with(held, opened) == []
    assert not (opened / "deep").exists()
    assert (opened / "twin").exists()


def test_what_cannot_be_read_is_named_here_and_not_there(places: tuple[Path, Path, Path]) -> None:
    source, held, _ = places
    os.mkfifo(source / "pipe")
    said: list[str] = []
    pool = BufferPool(8, SEGMENT_BYTES + DEFAULT_PROFILE.maximum)
    chosen = select([os.fsencode(source / "deep")])
    scanner = SealedScanner(chosen, KEY, DEFAULT_PROFILE, pool, note=said.append)
    shutil.rmtree(source / "deep")
    (failed,) = [event for event in scanner.events() if isinstance(event, ScanFailed)]
    assert b"deep" not in failed.path
    assert seal_into(f"{source}/", held, KEY, note=said.append) == []
    assert [line.split()[0] for line in said] == ["deep", "pipe"]


def test_a_file_that_grew_since_it_was_listed_is_not_read_into_memory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"small")
    asked: list[int] = []

    def pace(size: int) -> None:
        if not asked:
            for name in ("a", "b"):
                os.truncate(tmp_path / name, 1 << 40)
        asked.append(size)

    events, scanner = events_of(f"{tmp_path}/", KEY, pace=pace)
    assert max(asked) <= LARGE_OBJECT_BYTES
    failed = [event for event in events if isinstance(event, ScanFailed)]
    assert [event.reason for event in failed] == ["changed", "changed"]
    assert not scanner.complete


def swap(held: Path) -> None:
    one, other = sorted(path for path in held.iterdir() if path.is_file())[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def cut(held: Path) -> None:
    large = max(held.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(large, large.stat().st_size - 65_584)


def mix(held: Path) -> None:
    """Two segments change places."""
    large = max(held.rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(large.read_bytes())
    length = 65_536 + 48
    one, two = data[48 : 48 + length], data[48 + length : 48 + 2 * length]
    data[48 : 48 + 2 * length] = two + one
    large.write_bytes(data)


def plain(held: Path) -> None:
    (held / "readme").write_bytes(b"in the clear")


@pytest.mark.parametrize("change", [swap, cut, mix, plain])
def test_what_a_holder_changed_is_named_and_not_opened(
    places: tuple[Path, Path, Path], change: Callable[[Path], None]
) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY)
    change(held)
    failures = opened_with(held, opened)
    assert {reason for _, reason, _ in failures} <= {"sealed-damaged", "not-sealed"}
    assert 1 <= len(failures) <= 2
    right = picture(source)
    assert all(right[path][2] == row[2] for path, row in picture(opened).items())


def test_segments_of_two_states_are_not_one_object(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY)
    large = max(held.rglob("*"), key=lambda path: path.stat().st_size)
    old = large.read_bytes()
    with open(source / "large", "r+b") as file:
        file.write(bytes(200_000))
    seal_into(f"{source}/", held, KEY)
    new = bytearray(large.read_bytes())
    new[48 : 48 + 65_584] = old[48 : 48 + 65_584]
    large.write_bytes(new)
    ((_, reason, message),) = opened_with(held, opened)
    assert reason == "sealed-damaged"
    assert "one state" in message
    assert not (opened / "large").exists()


def test_nothing_is_opened_out_of_the_target(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, held, opened = places
    (source / "out").symlink_to("/etc")
    seal_into(f"{source}/", held, KEY)
    (opened / "deep").symlink_to(tmp_path)
    failures = opened_with(held, opened)
    assert {reason for _, reason, _ in failures} == {"unsafe-path", "in-the-way"}
    assert not (tmp_path / "er").exists()
    assert not (opened / "out").is_symlink()


def test_what_it_is_opened_from_goes_last(places: tuple[Path, Path, Path]) -> None:
    """A process that dies then has nothing left that would give folders their modes."""
    source, held, opened = places
    (source / "deep").chmod(0o500)
    seal_into(f"{source}/", held, KEY)
    seen: list[dict[str, tuple[object, ...]]] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "shutil.rmtree" and arguments[0] == os.fsencode(held):
            seen.append(picture(opened))

    sys.addaudithook(watch)
    open_sealed(os.fsencode(held), os.fsencode(opened), lambda _: KEY, consume=True)
    (then,) = seen
    assert {name: row for name, row in then.items() if ".flow-staging" not in name} == picture(source)
    assert picture(opened) == picture(source)
    assert not held.exists()


def test_two_do_not_open_into_one_folder(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY)

    def meanwhile(rows: list[tuple[bytes, int]]) -> None:
        with pytest.raises(TemporaryError) as refused:
            opened_with(held, opened)
        assert refused.value.reason == "busy"

    assert not open_sealed(os.fsencode(held), os.fsencode(opened), lambda _: KEY, note=meanwhile).failures
    assert picture(opened) == picture(source)


def test_who_seals_makes_no_program_of_the_account_that_opens(places: tuple[Path, Path, Path]) -> None:
    """Set-user-id and owner are for those who asked for them, whatever a source sealed."""
    source, held, opened = places
    os.setxattr(source / "twin", "user.note", b"x")
    (source / "twin").chmod(0o6755)
    os.utime(source / "twin", ns=(0, 1))
    seal_into(f"{source}/", held, KEY, xattrs=True, owner=True)
    assert opened_with(held, opened) == []
    assert (opened / "twin").stat().st_mode & 0o7777 == 0o755
    assert os.listxattr(opened / "twin") == []
    again = open_sealed(os.fsencode(held), os.fsencode(opened), lambda _: KEY, xattrs=True, owner=True)
    assert again.failures == []
    assert (opened / "twin").stat().st_mode & 0o7777 == 0o6755
    assert os.getxattr(opened / "twin", "user.note") == b"x"


def test_opening_leaves_off_when_told_to_and_goes_on_later(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY)
    asked = iter(range(100))
    with pytest.raises(TemporaryError) as stopped:
        open_sealed(os.fsencode(held), os.fsencode(opened), lambda _: KEY, stopped=lambda: next(asked) > 20)
    assert stopped.value.reason == "interrupted"
    right = picture(source)
    there = picture(opened)
    assert 0 < sum(row[2] is not None for row in there.values()) < 6
    assert all(right[name][2] == row[2] for name, row in there.items() if ".flow-staging" not in name)
    assert opened_with(held, opened) == []
    assert picture(opened) == right


def test_keys_are_made_once_kept_and_missed_by_name(tmp_path: Path) -> None:
    ring = Keyring(str(tmp_path / "keys"))
    made = ring.key_for("paris", "lab", "/data/a")
    assert Keyring(str(tmp_path / "keys")).key_for("paris", "lab", "/data/a").key.id == made.key.id
    assert ring.key_for("paris", "other", "/data/a").key.id != made.key.id
    assert made.key.secret_bytes().hex() not in repr(made.key)
    (file, _) = sorted((tmp_path / "keys").iterdir(), key=lambda path: made.key.id.hex() not in path.name)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(NotFound) as missing:
        ring.find(bytes(16))
    assert missing.value.reason == "sealing-key-missing"
    file.chmod(0o644)
    with pytest.raises(LocalError, match="others can read it"):
        ring.find(made.key.id)
    file.chmod(0o600)
    text = file.read_text()
    secret = made.key.secret_bytes().hex()
    for damaged in (text[:-20], text.replace(secret, secret[::-1]), "", "{}"):
        file.write_text(damaged)
        with pytest.raises(LocalError, match="damaged") as wrong:
            ring.key_for("paris", "lab", "/data/b")  # no new key beside one that cannot be read
        assert wrong.value.reason == "sealing-key-damaged"
        assert secret not in str(wrong.value)


def test_an_opening_key_that_two_processes_make_at_once_is_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "keys")
    first: list[str] = []

    def meanwhile(size: int) -> bytes:
        first.append(Keyring(folder).opening_key().public)
        return os.urandom(size)

    assert Keyring(folder, rng=meanwhile).opening_key().public == first[0]
    assert Keyring(folder).opening_key().public == first[0]


def test_a_key_is_given_to_one_site_and_to_no_other(tmp_path: Path) -> None:
    paris, berlin, boston = (Keyring(str(tmp_path / name)) for name in ("paris", "berlin", "boston"))
    kept = paris.key_for("paris", "lab", "/data/a")
    document = wrap_key(kept, berlin.opening_key().public)
    assert kept.key.secret_bytes().hex().encode() not in document
    berlin.add(unwrap_key(document, berlin.opening_key(), "a file"))
    assert berlin.find(kept.key.id).path == "/data/a"
    with pytest.raises(Exception, match="opening key"):
        unwrap_key(document, boston.opening_key(), "a file")
    changed = document.replace(b"/data/a", b"/data/b")
    with pytest.raises(Exception, match="changed on its way"):
        unwrap_key(changed, berlin.opening_key(), "a file")


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "data"},
        {"site": "no\nsite"},
        {"tenant": "\x07"},
        {"created": 10**17},
        {"created": -1},
    ],
)
def test_a_wrapped_key_says_nothing_that_no_site_has(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """It is shown to operators, and listed with all others."""
    kept = Keyring(str(tmp_path / "paris")).key_for("paris", "lab", "/data/a")
    for name, value in wrong.items():
        setattr(kept, name, value)
    own = Keyring(str(tmp_path / "berlin")).opening_key()
    with pytest.raises(AuthenticationError) as refused:
        unwrap_key(wrap_key(kept, own.public), own, "a file")
    assert refused.value.reason == "sealing-key-other"


def test_another_key_is_named(places: tuple[Path, Path, Path]) -> None:
    source, held, opened = places
    seal_into(f"{source}/", held, KEY)
    failures = opened_with(held, opened, SealingKey(bytes(32)))
    assert {reason for _, reason, _ in failures} == {"sealing-key-other"}
    assert picture(opened) == {}
    with pytest.raises(IntegrityError, match="no sealed object"):
        check_held(os.fsencode(source), b"twin")
