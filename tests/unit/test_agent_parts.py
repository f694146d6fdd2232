"""Parts of the agent that need no other process: the journal, the writers' guard, the roots, the limits."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock, call

import msgspec
import pytest
import trio
import trio.testing

from flowengine.api.agents import (
    Command,
    DrainCommand,
    HeartbeatReply,
    Lease,
    LimitsCommand,
    PoliciesCommand,
    Report,
    RevocationsCommand,
    TaskGrant,
    WorkCommand,
)
from flowengine.api.links import Limit, LimitWindow
from flowengine.api.transfers import Counters, Endpoint, LandedObject, TransferOptions
from flowengine.errors import Denied, FlowError, LocalError, NotFound, TemporaryError
from flowengine.transfer.serve import ServedRoot
from flowengine_agent.config import OfferedFolder
from flowengine_agent.daemon import _Agent
from flowengine_agent.journal import Journal
from flowengine_agent.limits import LimitBook
from flowengine_agent.roots import OfferedRoot, Roots
from flowengine_agent.site import Site
from flowengine_agent.tasks import HeldTasks, _Run
from flowengine_agent.writers import Writers


def granted(task: str, fence: int) -> TaskGrant:
    return TaskGrant(
        task=task,
        transfer="t",
        fence=fence,
        role="target",
        mode="copy",
        source=Endpoint(site="a", path="/data/x"),
        target=Endpoint(site="b", path="/data/y"),
        peer_address="h:1",
        grant="",
        lease_s=300,
        options=TransferOptions(),
    )


def report(fence: int, seq: int = 0, state: str = "running") -> Report:
    return Report(fence=fence, seq=seq, state=state, counters=Counters())  # type: ignore[arg-type]


# --- journal ----------------------------------------------------------------------------------------------------


def test_a_task_is_held_until_its_end_is_journalled(tmp_path: Path) -> None:
    path = str(tmp_path / "state/journal.sqlite")
    journal = Journal(path)
    journal.hold(granted("one", 5), 1000.0)
    journal.extend("one", 4, 9999.0)  # of an earlier claim: nothing
    journal.extend("one", 5, 2000.0)
    again = Journal(path)  # as after kill -9
    (held,) = again.held()
    assert (held.granted.task, held.granted.fence, held.lease_until) == ("one", 5, 2000.0)
    again.conclude("one", report(5, state="done"), 1.0)
    last = Journal(path)
    assert last.held() == []
    assert last.untold() == [("one", 5)]
    conclusion = last.conclusion("one", 5)
    assert conclusion is not None
    assert conclusion.state == "done"
    last.told("one", 5)
    assert last.untold() == []
    assert os.stat(path).st_mode & 0o077 == 0


def test_what_landed_goes_into_one_report_and_is_not_lost_with_it(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.sqlite"))
    journal.add_landed("one", 5, [("a", 1), ("b", 2), ("c", 3)])
    rows = journal.next_landed("one", 5)
    assert [row[1] for row in rows] == ["a", "b", "c"]
    pending = journal.file_report("one", report(5, 1), 1.0, rows[1][0])
    assert [row[1] for row in journal.next_landed("one", 5)] == ["c"]
    assert journal.last_seq("one", 5) == 1
    assert [(item.fence, item.report.seq) for item in journal.pending("one", 5)] == [(5, 1)]
    journal.taken(pending.id)
    assert journal.pending("one", 5) == []
    # A newer claim tells what the older one could not.
    journal.adopt_landed("one", 9)
    assert [row[1] for row in journal.next_landed("one", 9)] == ["c"]
    assert journal.next_landed("one", 5) == []


def test_a_report_is_no_larger_than_the_coordinator_takes(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.sqlite"))
    journal.add_landed("t-1.1", 5, [("\\xff" * 1000 + str(number), 1) for number in range(600)])
    told = 0
    while rows := journal.next_landed("t-1.1", 5):
        landed = [LandedObject(seq=0, target="b", path=path, size_bytes=size) for _, path, size in rows]
        said = msgspec.structs.replace(report(5), landed=landed)
        assert len(msgspec.json.encode(said)) < 1 << 20
        told += len(rows)
        assert journal.has_landed("t-1.1", 5, rows[-1][0]) == (told < 600)
        journal.file_report("t-1.1", said, 1.0, rows[-1][0])
    assert told == 600


def test_old_rows_are_dropped(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.sqlite"))
    journal.file_report("old", report(5_000_000, 1), 5.0, 0)
    journal.conclude("old", report(5_000_000, state="done"), 5.0)
    journal.add_landed("old", 5_000_000, [("a", 1)])
    journal.add_landed("new", 50_000_000, [("b", 1)])
    journal.forget_old(20.0)
    assert journal.untold() == []
    assert journal.next_landed("old", 5_000_000) == []
    assert journal.next_landed("new", 50_000_000) != []


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    import sqlite3

    path = str(tmp_path / "journal.sqlite")
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(LocalError, match="another version"):
        Journal(path)


@pytest.mark.trio
async def test_a_source_does_not_wait_for_ever_for_the_targets_word(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    journal = Journal(str(tmp_path / "state/journal.sqlite"))
    site = cast("Site", SimpleNamespace(name="a", journal=journal, link=None))
    run = _Run(site, granted("one", 5), lease_until=time.time() + 1e6)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(3600):
            await HeldTasks(site, nursery, lambda: None)._wait_for_target(run)
    last = journal.conclusion("one", 5)
    assert last is not None
    assert (last.state, last.reason) == ("released", "stalled")


# --- writers ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_overlapping_paths_have_one_writer_and_the_others_wait_by_name() -> None:
    writers = Writers()
    order: list[str] = []
    waits: list[str] = []

    async def write(path: bytes, task: str, hold: trio.Event, begun: trio.Event) -> None:
        async with writers.write(path, task, waits.append):
            order.append(task)
            begun.set()
            await hold.wait()

    first_hold, first_begun, rest = trio.Event(), trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, b"/d/a", "one", first_hold, first_begun)
        await first_begun.wait()
        rest.set()
        beside, begun = trio.Event(), trio.Event()
        nursery.start_soon(write, b"/d/ab", "beside", rest, beside)  # not below /d/a, whatever the letters
        await beside.wait()
        nursery.start_soon(write, b"/d", "above", rest, begun)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TemporaryError, match="task one writes") as raised:
            async with writers.write_nowait(b"/d/a/below", "below"):
                pass
        assert raised.value.reason == "busy"
        assert order == ["one", "beside"]
        assert any(text.startswith("target-path: task one") for text in waits)
        first_hold.set()
        await begun.wait()
    assert order == ["one", "beside", "above"]


# --- roots ------------------------------------------------------------------------------------------------------


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for name in ("data", "inner", "public"):
        (tmp_path / name).mkdir()
    return Roots(
        [
            OfferedFolder(str(tmp_path / "data"), "/data", "read-write", 1000),
            OfferedFolder(str(tmp_path / "inner"), "/data/inner", "read-write"),
            OfferedFolder(str(tmp_path / "public"), "/public", "read"),
        ]
    )


def test_the_longest_name_that_fits_is_the_root(roots: Roots) -> None:
    assert roots.find("/data/x/y", "read").path == b"x/y"
    assert roots.find("/data/inner/y", "read").root.folder.name == "/data/inner"
    assert roots.find("/data/innermost", "read").root.folder.name == "/data"
    place = roots.find("/data/x/", "read")
    assert (place.path, place.contents, place.shown) == (b"x", True, "/data/x")
    assert roots.find("/data", "read").contents


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/dat", "/database/x", "/data/../etc", "/data//x", "/data/.flow-staging/x"]
)
def test_what_is_not_offered_is_refused(roots: Roots, path: str) -> None:
    with pytest.raises(FlowError):
        roots.find(path, "read")


def test_a_root_is_offered_for_what_it_says(roots: Roots) -> None:
    with pytest.raises(Denied) as raised:
        roots.find("/public/x", "write")
    assert raised.value.reason == "not-offered"


def test_no_link_is_followed(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "data/way").symlink_to(tmp_path / "secret")
    with pytest.raises(Denied), roots.find("/data/way/", "read").selection():
        pass
    with pytest.raises(Denied), roots.find("/data/way/new", "write").target(make=True):
        pass
    assert os.listdir(tmp_path / "secret") == []
    assert roots.look("/data/way").reason == "denied"


def test_a_missing_place(roots: Roots) -> None:
    with pytest.raises(NotFound), roots.find("/data/none", "read").selection():
        pass
    with roots.find("/data/none/deep", "write").target(make=False) as path:
        assert path is None
    with roots.find("/data/made/deep", "write").target(make=True) as path:
        assert path is not None
    assert (Path(roots.find("/data", "read").root.folder.path) / "made/deep").is_dir()


def test_a_count_while_something_lands_counts_it_once(tmp_path: Path) -> None:
    root = OfferedRoot(OfferedFolder(str(tmp_path), "/data", "read-write", 1000))
    (tmp_path / "half").write_bytes(bytes(600))
    root.coming("t-1", 600)
    root.count()
    assert root.used_bytes() == 600
    root.coming("t-1", 700)
    root.settled("t-1")
    assert root.used_bytes() == 700
    (tmp_path / "half").write_bytes(bytes(700))
    root.count()
    assert root.used_bytes() == 700


def test_a_budget_counts_what_is_there_and_what_comes(roots: Roots, tmp_path: Path) -> None:
    root = roots.find("/data", "write").root
    (tmp_path / "data/file").write_bytes(bytes(600))
    assert root.count() == 600
    root.coming("one", 300)
    with pytest.raises(LocalError) as raised:
        root.coming("one", 400)
    assert raised.value.reason == "budget"
    root.settled("one")
    assert root.described().used_bytes == 1000
    with pytest.raises(LocalError):
        root.check_budget()


def test_a_look_shows_roots_folders_and_files(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "public/file").write_bytes(b"123")
    assert [entry[0] for entry in roots.look("/").entries] == ["data", "data/inner", "public"]
    (entry,) = roots.look("/public/").entries
    assert entry[:3] == ("file", "file", 3)
    assert roots.look("/public/file").entries[0][:3] == ("file", "file", 3)
    assert roots.look("/public/none").reason == "not-found"
    assert roots.look("/etc").reason == "not-offered"


def test_a_pipe_holds_nobody(roots: Roots, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data/pipe")
    served = ServedRoot(os.fsencode(tmp_path / "data"))
    found: list[object] = []

    def look() -> None:
        found.append(roots.look("/data/pipe").entries[0][:2])
        os.close(served._open(b"pipe"))
        found.append("opened")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(5)
    assert found == [("pipe", "other"), "opened"]


def test_a_listing_is_no_larger_than_the_coordinator_takes(roots: Roots, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "data/many")
    os.mkdir(folder)
    for number in range(1000):
        os.close(os.open(folder + b"/%04d" % number + b"\xff" * 240, os.O_CREAT | os.O_WRONLY))
    answer = roots.look("/data/many")
    assert not answer.complete
    assert 500 < len(answer.entries) < 1000
    assert len(msgspec.json.encode(answer)) < 1 << 20


# --- limits -----------------------------------------------------------------------------------------------------


NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


def limit(scope: str, rate: int | None, *windows: LimitWindow) -> Limit:
    return Limit(
        scope=scope,
        rate_bits_per_s=rate,
        windows=list(windows),
        now_bits_per_s=rate,
        changed=NOON,
        changed_by="x",
    )


def test_the_lower_of_two_limits_holds_for_the_site() -> None:
    book = LimitBook("a", 1000)
    assert book.rates(NOON) == {"site:a": 1000}
    book.set([limit("site:a", 5000), limit("link:a>b", 10), limit("tenant:t", None)], NOON)
    assert book.rates(NOON) == {"site:a": 1000, "link:a>b": 10}
    book.set([limit("site:a", 500)], NOON)
    assert book.rates(NOON) == {"site:a": 500}


def test_windows_begin_and_end_without_the_coordinator() -> None:
    book = LimitBook("a", None)
    window = LimitWindow(rate_bits_per_s=0, start="20:00", end="06:00")
    book.set([limit("link:a>b", 800, window)], NOON)
    everywhere = book.pacer("transfer", "tenant")
    pacer = book.over_link(everywhere, "task", "b")
    assert book.rates(NOON) == {"link:a>b": 800}
    assert pacer.limited
    night = NOON.replace(hour=23)
    assert book.rates(night) == {"link:a>b": 1.0}  # nothing to speak of
    book.follow(night)
    book.set([], night)
    assert not pacer.limited
    assert not book.over_link(everywhere, "task", "c").limited


def test_a_lease_binds_one_task_on_one_link_and_its_number_never_goes_back() -> None:
    def lease(rate: int, number: int) -> Lease:
        until = NOON + timedelta(minutes=5)
        return Lease(task="x.1", transfer="x", next="r", rate_bits_per_s=rate, until=until, number=number)

    book = LimitBook("a", None)
    session = book.pacer("x", "")
    pacers = [book.over_link(session, "x.1", "r"), book.relay_pacer("x.1", "r", "x", "")]
    others = [book.over_link(session, "x.1", "b"), book.over_link(session, "y.1", "r")]

    def portions() -> list[int]:
        return [pacer.portion(1 << 20) for pacer in pacers]

    book.lease([lease(80_000_000, 5)], NOON)
    assert portions() == [200_000, 200_000]  # 20 ms of it
    assert not any(pacer.limited for pacer in [*others, session])
    book.lease([lease(160_000_000, 4)], NOON)  # older: not obeyed
    assert portions() == [200_000, 200_000]
    book.lease([lease(160_000_000, 6)], NOON)
    assert portions() == [400_000, 400_000]
    book.lease([], NOON)
    assert not any(pacer.limited for pacer in pacers)
    book.lease([lease(80_000_000, 5)], NOON)  # nor is it after a pause
    assert not any(pacer.limited for pacer in pacers)
    book.lease([lease(80_000_000, 7)], NOON)
    assert portions() == [200_000, 200_000]


# --- what the coordinator says by two ways ----------------------------------------------------------------------


def agent_and_link() -> tuple[_Agent, list[Command], HeartbeatReply, LimitBook]:
    """An agent, commands that reach it while a heartbeat is under way, its answer, and the limits that are held."""
    site, meanwhile, limits = MagicMock(), list[Command](), LimitBook("a", None)
    reply = HeartbeatReply(now=datetime.now(UTC), epoch=1, grant_keys={}, limits=[limit("site:a", 1_000_000)])

    async def post(path: str, said: object, kind: object) -> HeartbeatReply:
        await trio.lowlevel.checkpoint()
        for command in meanwhile:
            await agent._obey(command)
        return reply

    site.config.max_tasks, site.listening, site.limits, site.link.post = 2, None, limits, post
    site.identity.grant_keys = {}
    agent = _Agent(site, lambda said: None)
    agent._tasks, agent._port, agent._follower = MagicMock(), MagicMock(), MagicMock()
    agent._ready, agent._telling = None, True
    return agent, meanwhile, reply, limits


@pytest.mark.trio
async def test_an_answer_to_a_heartbeat_is_held_to() -> None:
    agent, _, reply, limits = agent_and_link()
    await agent._heartbeat()
    assert limits.rates(datetime.now(UTC)) == {"site:a": 1_000_000}
    assert agent._site.trust.revoked == frozenset()
    reply.limits, reply.revoked, reply.draining = [], ["ab"], True
    await agent._heartbeat()
    assert (limits.rates(datetime.now(UTC)), agent._site.trust.revoked, agent._drained) == ({}, {"ab"}, True)


@pytest.mark.trio
async def test_what_a_command_said_meanwhile_is_newer_than_the_answer_to_a_heartbeat() -> None:
    agent, meanwhile, _, limits = agent_and_link()
    meanwhile += [
        LimitsCommand(limits=[limit("site:a", 500_000)]),
        RevocationsCommand(revoked=["ab"]),
        DrainCommand(on=True),
        PoliciesCommand(bundle=3, labels=4),
    ]
    await agent._heartbeat()
    assert agent._follower.told.mock_calls == [call(3, 4)]  # type: ignore[attr-defined]
    assert limits.rates(datetime.now(UTC)) == {"site:a": 500_000}
    assert (agent._site.trust.revoked, agent._drained) == ({"ab"}, True)
    meanwhile[:] = [WorkCommand(), DrainCommand(on=True)]  # say nothing of the limit
    await agent._heartbeat()
    assert (limits.rates(datetime.now(UTC)), agent._drained) == ({"site:a": 1_000_000}, True)
    meanwhile.clear()
    await agent._heartbeat()
    assert not agent._drained
    assert agent._follower.told.mock_calls[-1] == call(0, 0)  # type: ignore[attr-defined]


@pytest.mark.trio
async def test_who_may_work_again_asks_for_work() -> None:
    """Work that was announced while an agent was drained is not announced again."""
    agent, _, reply, _ = agent_and_link()
    agent._drained = reply.draining = True
    await agent._heartbeat()
    assert not agent._work.is_set()
    reply.draining = False
    await agent._heartbeat()
    assert agent._work.is_set()
