"""Chains on disk: what was recorded is there, whatever happened in between."""

import base64
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from chains import NOW, pki

from flowengine.errors import AuthenticationError, Denied, FlowError, IntegrityError, LocalError
from flowengine.evidence.bodies import approval_body, stop_body
from flowengine.evidence.chain import Record
from flowengine.evidence.checkpoint import verify_checkpoint
from flowengine.policy.bundle import build
from flowengine.store.chain_files import ChainFiles
from flowengine_agent.evidence import EvidenceLog


def stop(number: int) -> tuple[str, dict[str, object]]:
    return "stop", stop_body("drain", "denied", transfer=f"tr-{number}")


class Clock:
    """A clock that goes on by a second a look."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        self.now += 1
        return self.now


def opened(folder: Path, site: str = "alpha", **more: int) -> ChainFiles:
    return ChainFiles(str(folder), f"site:{site}", now=Clock(), **more)  # type: ignore[arg-type]


def lines(folder: Path) -> list[bytes]:
    found = []
    for path in sorted((folder / "chain").iterdir()):
        data = path.read_bytes()
        assert not data or data.endswith(b"\n")
        found += data.splitlines()
    return found


def test_a_chain_goes_on_where_it_ended(tmp_path: Path) -> None:
    files = opened(tmp_path)
    made = files.append([stop(1), stop(2)])
    files.close()
    files = opened(tmp_path)
    assert files.head.hash == made[-1].hash
    (third,) = files.append([stop(3)])
    assert (third.seq, third.prev) == (4, made[-1].hash)
    assert [record.line for record in (*made, third)] == lines(tmp_path)[1:]
    files.close()


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    os.umask(0o022)
    files = opened(tmp_path / "evidence")
    files.append([("approval", approval_body("a1", "given", by="eve"))])
    for path in (tmp_path / "evidence").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert "eve" not in b"".join(lines(tmp_path / "evidence")).decode()
    assert "eve" in (tmp_path / "evidence" / "values.jsonl").read_text()
    files.close()


def test_one_process_writes(tmp_path: Path) -> None:
    files = opened(tmp_path)
    with pytest.raises(LocalError, match="another process"):
        opened(tmp_path)
    files.close()
    opened(tmp_path).close()


def test_a_chain_is_one_agents(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(LocalError, match="site:alpha"):
        opened(tmp_path, "beta")


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_torn_record_is_cut_off_and_said(tmp_path: Path, left: int) -> None:
    files = opened(tmp_path)
    kept, torn = files.append([stop(1), stop(2)])
    files.close()
    path = next((tmp_path / "chain").iterdir())
    whole = path.read_bytes()
    tail = (torn.line + b"\n")[:left]
    path.write_bytes(whole[: -len(torn.line) - 1] + tail)
    files = opened(tmp_path)
    assert files.cut_bytes == len(tail)
    assert (files.head.seq, files.head.hash != torn.hash) == (3, True)
    assert kept.line in lines(tmp_path)
    assert b'"kind":"recovery"' in lines(tmp_path)[-1]
    assert b'"cut_bytes":%d' % len(tail) in lines(tmp_path)[-1]
    files.close()


def test_blocks_that_were_never_written_are_cut_off(tmp_path: Path) -> None:
    files = opened(tmp_path)
    files.append([stop(1)])
    files.close()
    path = next((tmp_path / "chain").iterdir())
    path.write_bytes(path.read_bytes() + bytes(4096))
    files = opened(tmp_path)
    assert (files.cut_bytes, files.head.seq) == (4096, 3)
    files.close()


def test_death_during_the_very_first_record(tmp_path: Path) -> None:
    opened(tmp_path).close()
    path = next((tmp_path / "chain").iterdir())
    path.write_bytes(path.read_bytes()[:20])
    files = opened(tmp_path)
    assert files.head.seq == 1
    files.close()


@pytest.mark.parametrize("what", ["altered", "removed", "swapped", "first"])
def test_what_no_crash_leaves_is_not_mended(tmp_path: Path, what: str) -> None:
    files = opened(tmp_path)
    files.append([stop(1), stop(2), stop(3)])
    files.close()
    path = next((tmp_path / "chain").iterdir())
    rows = path.read_bytes().splitlines(keepends=True)
    if what == "altered":
        rows[2] = rows[2].replace(b"drain", b"plain")
    elif what == "removed":
        del rows[2]
    elif what == "swapped":
        rows[2], rows[3] = rows[3], rows[2]
    else:
        del rows[0]
    path.write_bytes(b"".join(rows))
    with pytest.raises(IntegrityError) as refused:
        opened(tmp_path)
    assert refused.value.reason == "evidence"
    assert path.read_bytes() == b"".join(rows), "nothing of it may be touched"


def test_checkpoints_cover_all_since_the_last(tmp_path: Path) -> None:
    keys = pki()
    files = opened(tmp_path)
    files.append([stop(1), stop(2)])
    first = files.checkpoint(keys.signer("alpha"))
    assert files.checkpoint(keys.signer("alpha")) == first, "nothing new, nothing signed"
    files.append([stop(3)])
    files.close()
    files = opened(tmp_path)
    assert (files.checkpoint_document, files.unsigned) == (first, 1)
    second = files.checkpoint(keys.signer("alpha"))
    one, two = (verify_checkpoint(document, keys.anchors)[0] for document in (first, second))
    assert (one.first, one.seq, two.first, two.seq) == (1, 3, 4, 5)
    files.close()


def test_files_are_begun_behind_checkpoints(tmp_path: Path) -> None:
    keys = pki()
    files = opened(tmp_path, segment_bytes=1000)
    for number in range(4):
        files.append([stop(number)] * 3)
        files.checkpoint(keys.signer("alpha"))
        files.close()
        files = opened(tmp_path, segment_bytes=1000)
    chain = files.head.chain
    names = sorted(path.name for path in (tmp_path / "chain").iterdir())
    assert names == [f"{first:012d}.jsonl" for first in (1, 6, 10, 14, 18)]
    (record,) = files.append([stop(9)])
    assert record.seq == 18
    found, _ = verify_checkpoint(files.checkpoint(keys.signer("alpha")), keys.anchors)
    assert (found.first, found.seq, found.chain) == (17, 18, chain)
    files.close()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB: writing fails as on a full disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_denies_and_leaves_a_whole_chain(tmp_path: Path) -> None:
    files = opened(tmp_path)
    made: list[Record] = []

    def fill() -> None:
        while True:
            made.extend(files.append([stop(len(made))]))

    with pytest.raises(Denied) as refused:
        fill()
    assert refused.value.reason == "no-evidence"
    assert lines(tmp_path)[1:] == [record.line for record in made]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    (record,) = files.append([stop(7)])
    assert record.prev == made[-1].hash, "with room again the chain goes on"
    files.close()


def test_bundles_are_kept_by_their_digest(tmp_path: Path) -> None:
    files = opened(tmp_path)
    content = build({"a.toml": b"x"}, 1, int(NOW))
    digest = files.keep_bundle(content)
    assert files.keep_bundle(content) == digest
    (path,) = (tmp_path / "bundles").iterdir()
    assert (path.name, path.read_bytes()) == (digest.removeprefix("sha256:") + ".bundle", content)
    with pytest.raises(IntegrityError):
        files.keep_bundle(b"no bundle")
    files.close()


# --- the agent's log ---------------------------------------------------------------------------------------------


def log_in(folder: Path, site: str = "alpha") -> EvidenceLog:
    return EvidenceLog(str(folder), site, lambda: pki().signer(site), now=Clock())


@pytest.mark.trio
async def test_who_records_together_shares_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_in(tmp_path)
    synced = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), sync(fd))[1])
    numbers: list[int] = []

    async def one(number: int) -> None:
        record = await log.record(*stop(number))
        assert record.get("transfer") == f"tr-{number}"
        assert record.line in lines(tmp_path), "on the disk when it returns"
        numbers.append(record.seq)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(one, number)
    assert sorted(numbers) == list(range(2, 52))
    assert len(synced) <= 3
    log.close()


@pytest.mark.trio
async def test_a_wrong_body_hurts_its_caller_only(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    failed = []

    async def wrong() -> None:
        try:
            await log.record("stop", {"transfer": "x"})
        except ValueError as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.record, *stop(1))
        nursery.start_soon(wrong)
        nursery.start_soon(log.record, *stop(2))
    assert (len(failed), log.head.seq) == (1, 3)
    log.close()


@pytest.mark.trio
async def test_who_is_cancelled_before_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.record(*stop(1))
    await log.record(*stop(2))
    assert log.head.seq == 2
    log.close()


@pytest.mark.trio
async def test_a_peers_checkpoint_becomes_a_record(tmp_path: Path) -> None:
    keys = pki()
    ours, theirs = log_in(tmp_path / "a"), log_in(tmp_path / "b", "beta")
    await theirs.record(*stop(1))
    document = await theirs.checkpoint()
    found = await ours.note_peer(document, keys.anchors, site="beta")
    assert found.as_peer() == {
        "agent": "site:beta", "chain": theirs.head.chain, "seq": 2, "hash": found.hash,
    }  # fmt: skip
    assert base64.b64encode(document) in lines(tmp_path / "a")[-1]
    with pytest.raises(AuthenticationError):
        await ours.note_peer(document, keys.anchors, site="gamma")
    with pytest.raises(FlowError):
        await ours.note_peer(b"", keys.anchors, site="beta")
    assert ours.head.seq == 2
    ours.close()
    theirs.close()


@pytest.mark.trio
async def test_checkpoints_are_made_by_themselves(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    assert autojump_clock.rate == 0
    log = log_in(tmp_path)
    handed: list[bytes] = []
    came = trio.Event()

    def hand_out(document: bytes) -> None:
        handed.append(document)
        came.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run, hand_out)
        await log.record(*stop(1))
        await came.wait()
        seq = log.head.seq
        for _ in range(10):  # minutes in which nothing is recorded
            autojump_clock.jump(60)
            await trio.testing.wait_all_tasks_blocked()
        assert (len(handed), log.head.seq) == (1, seq), "none where nothing was recorded"
        nursery.cancel_scope.cancel()
    log.close()
