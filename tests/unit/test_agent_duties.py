"""An agent's accounts: what is owed for what landed, and what left, over restarts."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import structlog
import trio

from flowengine.errors import Denied
from flowengine.policy.duties import Clock
from flowengine.policy.ledger import Movement
from flowengine.policy.model import Duty
from flowengine.transfer.handing import Durable, Ended, encode
from flowengine.transfer.hands import hear_answer
from flowengine.transfer.keeper import hear_end
from flowengine.transfer.line import Line, line_pair
from flowengine.trust.grant import Grant, Party
from flowengine_agent.duties import Duties, _Proof, owed_for
from flowengine_agent.exports import RESERVED_S, Exports
from flowengine_agent.holdings import Holding, Holdings
from flowengine_agent.permits import Permit

GRANT = Grant(
    id=bytes(16), transfer="t-1", task="t-1.1", fence=1, epoch=1, issued=1, expires=2, source=Party("a", "a" * 64),
    target=Party("b", "b" * 64), dial="target", route=["a", "b"], source_path="/x", target_path="/y", mode="copy",
    secret=bytes(32),
)  # fmt: skip
DELETE = Duty("delete_after", (("value", 60),), ("p/r",))


def holding(task: str, begun: int = 100, *duties: Duty, folder: bytes = b"set") -> Holding:
    return Holding(
        task, task.partition(".")[0], "a", "/data/set", "/data", folder, ("l",), duties, b"d", begun
    )


def objects(holdings: Holdings, task: str) -> list[tuple[bytes, int]]:
    found = holdings.find(task)
    return list(chain(*holdings.to_hide(found))) if found is not None else []


@pytest.fixture
def holdings(tmp_path: Path) -> Iterator[Holdings]:
    made = Holdings(str(tmp_path / "holdings.sqlite"))
    yield made
    made.close()


def test_a_task_that_owes_nothing_is_forgotten_and_one_that_does_is_kept(holdings: Holdings) -> None:
    holdings.begin(holding("t-1.1"))
    holdings.begin(holding("t-2.1", 200, DELETE))
    holdings.add_objects("t-1.1", [(b"x", 1)])
    holdings.add_objects("t-2.1", [(b"\xff", 2)])
    for task in ("t-1.1", "t-2.1"):
        holdings.complete(task, 500)
    assert holdings.find("t-1.1") is None
    kept = holdings.find("t-2.1")
    assert kept is not None
    assert (kept.state, kept.landed, kept.terms.due(kept.landed)) == ("kept", 500, 560)
    assert objects(holdings, "t-2.1") == [(b"\xff", 2)]


def test_what_is_wrong_comes_on_account_and_is_marked_in_one_transaction(tmp_path: Path) -> None:
    path = tmp_path / "holdings.sqlite"
    holdings = Holdings(str(path))
    holdings.begin(holding("t-1.1"))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON holding BEGIN SELECT RAISE(ABORT, 'as death would'); END"
        )
        other.commit()
        with pytest.raises(Exception, match="as death would"):
            holdings.add_objects("t-1.1", [(b"x", 1)], "why")
        assert objects(holdings, "t-1.1") == []
        other.execute("DROP TRIGGER no")
        other.commit()
    holdings.add_objects("t-1.1", [(b"x", 1)], "why")
    found = holdings.find("t-1.1")
    assert found is not None
    assert (found.state, found.cause, found.why, found.all_of_it) == ("marked", "policy-stopped", "why", True)
    assert objects(holdings, "t-1.1") == [(b"x", 1)]
    holdings.close()


def test_states_move_one_way_and_survive_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "holdings.sqlite")
    first = Holdings(path)
    first.begin(holding("t-1.1"))
    assert first.mark("t-1.1", "policy-stopped", "why", all_of_it=True)
    assert not first.mark("t-1.1", "policy-stopped", "again", all_of_it=True)
    first.hidden("t-1.1", 300, 2, 20, 1, "names")
    first.set_clock(Clock(1.0, 2.0, "b"))
    first.close()
    again = Holdings(path)
    (found,) = again.untold()
    assert (found.state, found.why, found.hidden, found.objects, found.missing) == (
        "hidden",
        "why",
        300,
        2,
        1,
    )
    again.told("t-1.1", "hidden")
    assert again.untold() == []
    again.purged("t-1.1", b"certificate")
    assert [one.certificate for one in again.untold()] == [b"certificate"]
    assert again.clock() == Clock(1.0, 2.0, "b")
    again.begin(holding("t-1.1"))  # tried again: it is open anew
    assert again.in_state("open") != []
    again.close()


def test_what_a_later_task_landed_is_its_own(holdings: Holdings) -> None:
    holdings.begin(holding("t-1.1", 100, DELETE))
    holdings.begin(holding("t-2.1", 200, DELETE))
    for task in ("t-1.1", "t-2.1"):
        holdings.add_objects(task, [(b"same", 1)])
    holdings.add_objects("t-1.1", [(name, 2) for name in (b"\xff", b"a", b"z")])
    first, second = holdings.find("t-1.1"), holdings.find("t-2.1")
    assert first is not None
    assert second is not None
    assert list(holdings.to_hide(first, 2)) == [[(b"a", 2), (b"z", 2)], [(b"\xff", 2)]]
    assert list(holdings.to_hide(second, 2)) == [[(b"same", 1)]]


@pytest.mark.parametrize(
    ("path", "found"),
    [(b"set", True), (b"set/sub", True), (b"", True), (b"setting", False), (b"other", False)],
)
def test_what_covers_a_path(holdings: Holdings, path: bytes, found: bool) -> None:
    holdings.begin(holding("t-1.1"))
    assert bool(holdings.covering("/data", path)) is found
    assert holdings.covering("/other", path) == []


def moved(task: str, persons: int = 5) -> Movement:
    return Movement(task, "c", "p", "FR", frozenset({"l"}), persons, None)


def test_exports_count_reservations_until_they_end_and_sessions_for_good(tmp_path: Path) -> None:
    path = str(tmp_path / "exports.sqlite")
    exports = Exports(path)
    exports.reserve(moved("t-1.1"), 1000)
    exports.reserve(moved("t-2.1"), 1000)
    exports.commit("t-2.1", 1001)
    exports.commit("t-3.1", 1001)  # was never reserved
    exports.close()
    again = Exports(path)
    entries = {entry.movement.transfer: entry.expires for entry in again._ledger.entries}
    assert entries == {"t-1.1": 1000 + RESERVED_S, "t-2.1": None}
    again.close()


def test_what_is_done_later_is_recorded_under_the_name_that_the_decision_gave_it() -> None:
    """What is held is sealed though no rule says so: that duty stands in no decision and takes no name in it."""
    asked = (Duty("delete_by", (("value", 7),), ("p/r",)), Duty("quarantine", (("value", True),), ("p/r",)))
    sealed = (asked[0], Duty("encrypt", (("at", ("rest",)),), ("hold",)), asked[1])
    proof = msgspec.msgpack.encode(_Proof(GRANT, None, [], "d-1"))
    for duties in (asked, sealed):
        found = owed_for(replace(holding("t-1.1", 100, *duties), proof=proof), "quarantine", "delete_by")
        assert [(one.id, one.duty.type, one.decision) for one in found] == [
            ("o1", "delete_by", "d-1"), ("o2", "quarantine", "d-1"),
        ]  # fmt: skip


def duties_of(holdings: Holdings) -> Duties:
    """A site's duties; without policies there is nothing to decide again."""
    site = SimpleNamespace(
        config=SimpleNamespace(policy_purge_after_s=60.0, policy_max_offline_s=None),
        link=SimpleNamespace(silent_s=lambda: 0.0),
        gate=SimpleNamespace(review=lambda *asked: (), max_offline_s=lambda judged: None),
        log=structlog.get_logger(),
    )
    return Duties(site, holdings)  # type: ignore[arg-type]


@pytest.mark.trio
async def test_what_is_wrong_with_what_is_opened_is_marked_as_it_is_told_and_is_no_success(
    holdings: Holdings,
) -> None:
    duties = duties_of(holdings)
    holdings.begin(holding("t-1.1", 100, DELETE))
    ours, theirs = line_pair()
    agent, mover = Line(ours, "the mover ended"), Line(theirs, "the agent ended")
    seen: list[tuple[str, list[tuple[bytes, int]]]] = []

    async def moves() -> None:
        for ticket, (rows, wrong) in enumerate(
            [([(b"x", 1)], ""), ([(b"y", 2)], "y is not what was sealed"), ([(b"z", 3)], "")], 1
        ):
            mover.post(encode(Durable(ticket, rows, wrong)))
            await mover.flush()
            assert await hear_answer(mover)
            found = holdings.find("t-1.1")
            assert found is not None
            seen.append((found.state, objects(holdings, "t-1.1")))
        mover.post(encode(Ended(b"", b"")))
        await mover.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mover.run_writer)
        nursery.start_soon(agent.run_writer)
        nursery.start_soon(moves)
        with (
            pytest.raises(Denied, match="y is not what was sealed") as refused,
            duties.opening(GRANT, Permit()) as landed,
        ):
            assert isinstance(await hear_end(agent, landed), Ended)
        nursery.cancel_scope.cancel()
    agent.close()
    mover.close()
    assert refused.value.reason == "policy-stopped"
    assert [state for state, _ in seen] == ["open", "marked", "marked"]
    assert seen[-1][1] == [(b"x", 1), (b"y", 2), (b"z", 3)], "what has to go is on account"
    found = holdings.find("t-1.1")
    assert found is not None
    assert (found.cause, found.why, found.all_of_it) == ("policy-stopped", "y is not what was sealed", True)
    holdings.complete("t-1.1", 500)  # whatever else ends it
    assert [one.state for one in holdings.in_state("kept", "marked")] == ["marked"]


@pytest.mark.trio
async def test_what_is_opened_without_policies_is_on_no_account_and_may_be_wrong_nevertheless(
    holdings: Holdings,
) -> None:
    duties = duties_of(holdings)
    with duties.opening(GRANT, Permit()) as landed:
        landed([(b"x", 1)])
    assert objects(holdings, "t-1.1") == []
    with pytest.raises(Denied, match="it is odd"), duties.opening(GRANT, Permit()) as landed:
        landed([(b"x", 1)], "it is odd")
    assert holdings.find("t-1.1") is None
