"""What a source may offer of what it finds: only the version that was promised, or only what is sealed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio.testing
from sealing import seal_into
from sessions import session_over

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import Denied, FlowError, IntegrityError
from flowengine.store.buffers import BufferPool
from flowengine.store.reading import SEGMENT_BYTES, ObjectReader
from flowengine.store.scan import Scanner
from flowengine.store.scan_events import Event
from flowengine.store.selection import select
from flowengine.transfer.admission import Admission, OnlySealed
from flowengine.transfer.manifests import make_manifest
from flowengine.transfer.session import Counters
from flowengine.trust.sealed import SealingKey
from flowengine.units import MIB
from flowengine.wire.messages import Options
from flowengine_agent.hands import Giving, _only_version

KEY = SealingKey(bytes(32))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "deep/er").mkdir(parents=True)
    (top / "deep/er/small").write_bytes(b"small")
    (top / "deep/large").write_bytes(os.urandom(3 * MIB))
    (top / "link").symlink_to("deep/large")
    (top / "one").write_bytes(b"one")
    os.link(top / "one", top / "two")
    return top


def offered(path: str, admit: Admission) -> tuple[list[Event], FlowError | None]:
    """What a scan would offer before the admission ends it, and by which word."""
    pool = BufferPool(64, SEGMENT_BYTES + DEFAULT_PROFILE.maximum)
    reader = ObjectReader(DEFAULT_PROFILE, pool, 1)
    found: list[Event] = []
    try:
        for event in Scanner(select([os.fsencode(path)]), reader, pool, None).events():
            admit(event)
            found.append(event)
    except FlowError as error:
        return found, error
    finally:
        reader.close()
    return found, None


def only_version(path: str, stack: contextlib.ExitStack) -> Admission:
    selection = select([os.fsencode(path)])
    summary, _ = make_manifest(
        selection, None, profile=DEFAULT_PROFILE.name, options=Options(), cache=None, threads=1, counters=Counters(),
    )  # fmt: skip
    near, _ = trio.testing.memory_stream_pair()
    how = Giving(cached=False, version=summary.version_id)
    admit, _ = _only_version(session_over(near), selection, how, stack)
    return admit


def add(tree: Path) -> None:
    (tree / "deep/er/zz-added").write_bytes(b"of nobody")


def add_large(tree: Path) -> None:
    (tree / "deep/added").write_bytes(os.urandom(3 * MIB))


def add_folder(tree: Path) -> None:
    (tree / "deep/added").mkdir()


def change(tree: Path) -> None:
    (tree / "deep/er/small").write_bytes(b"SMALL")


def change_large(tree: Path) -> None:
    path = tree / "deep/large"
    st = path.stat()
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"other")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def link(tree: Path) -> None:
    (tree / "link").unlink()
    (tree / "link").symlink_to("/etc/passwd")


@pytest.mark.trio
async def test_the_version_that_was_checked_is_admitted_whole(tree: Path) -> None:
    for path in (f"{tree}/", str(tree), str(tree / "deep/large"), str(tree / "one")):
        with contextlib.ExitStack() as stack:
            events, error = offered(path, only_version(path, stack))
            assert error is None
            assert events


@pytest.mark.trio
@pytest.mark.parametrize("meanwhile", [add, add_large, add_folder, change, change_large, link])
async def test_what_changes_between_check_and_reading_is_not_offered(
    tree: Path, meanwhile: Callable[[Path], None]
) -> None:
    with contextlib.ExitStack() as stack:
        admit = only_version(f"{tree}/", stack)
        meanwhile(tree)
        events, error = offered(f"{tree}/", admit)
    assert isinstance(error, IntegrityError)
    assert error.reason == "feed-differs"
    shown = repr(events)
    assert "added" not in shown
    assert "passwd" not in shown


def plain(held: Path) -> None:
    (held / "zz-ward-7").write_bytes(b"in the clear")


def plain_folder(held: Path) -> None:
    (held / "zz-ward-7").mkdir()


def plain_link(held: Path) -> None:
    (held / "zz-ward-7").symlink_to("elsewhere")


def plain_content(held: Path) -> None:
    next(path for path in held.rglob("*") if path.is_file()).write_bytes(b"in the clear")


def plain_large(held: Path) -> None:
    (held / "zz-ward-7").write_bytes(os.urandom(3 * MIB))


@pytest.mark.parametrize("what", [plain, plain_folder, plain_link, plain_content, plain_large])
def test_nothing_plain_is_sent_on_from_among_what_is_sealed(
    tree: Path, tmp_path: Path, what: Callable[[Path], None]
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    seal_into(f"{tree}/", held, KEY)
    for path, names in ((f"{held}/", [b""]), (str(held), [b"held"])):
        assert offered(path, OnlySealed(names))[1] is None
    what(held)
    for path, names in ((f"{held}/", [b""]), (str(held), [b"held"])):
        events, error = offered(path, OnlySealed(names))
        assert isinstance(error, Denied)
        assert error.reason == "sealed-mixed"
        assert "ward" not in repr(events) + str(error)
