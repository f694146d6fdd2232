"""The coordinator's decisions: order of claims, hindrances, states, reports, what agents are told; the pages made of tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from flowengine.api.transfers import Endpoint, Task, Transfer, TransferRequest, Wait, Why
from flowengine.coordinator.database.migrate import HEAD, alembic_config
from flowengine.coordinator.database.tables import metadata
from flowengine.coordinator.database.transactions import open_database
from flowengine.coordinator.rules.feeding import Feeder, falls_back, lost
from flowengine.coordinator.rules.paths import clean, overlap
from flowengine.coordinator.rules.queue import Board, Place, Share, Work, choose, hindrance
from flowengine.coordinator.rules.reports import Held, take
from flowengine.coordinator.rules.states import TaskFacts, derive
from flowengine.coordinator.rules.why import explain
from flowengine.errors import UsageError

BEGAN = datetime(2026, 11, 23, tzinfo=UTC)
SOURCE = Endpoint(site="a", path="/data/")
ROOT = Path(__file__).resolve().parents[2]


def work(seq: int, **changes: Any) -> Work:
    fields: dict[str, Any] = {
        "id": f"t-{seq}.1", "seq": seq, "transfer": f"t-{seq}", "tenant": "x", "priority": 1, "source_site": "a",
        "source_path": f"/in{seq}", "target_site": "b", "target_path": f"/out{seq}", "driver": "b",
    }  # fmt: skip
    return Work(**(fields | changes))


def board(waiting: list[Work], running: list[Work] | None = None, **shares: Share) -> Board:
    places = {name: Place(name, "online", 0.0, 100) for name in "abc"}
    tenants = {w.tenant for w in [*waiting, *(running or [])]}
    known = {name: Share(name, 1.0) for name in tenants} | shares
    return Board(100.0, waiting, running or [], places, known)


def ids(chosen: list[Work]) -> list[int]:
    return [found.seq for found in chosen]


def test_priority_comes_first_then_the_tenant_served_least_then_age() -> None:
    queue = [work(1), work(2), work(3, tenant="y"), work(4, tenant="y"), work(5, priority=3)]
    shares = {"x": Share("x", 1.0, served_bytes=1 << 30), "y": Share("y", 1.0)}
    assert ids(choose(board(queue, **shares), "b", 3)) == [5, 3, 4]
    assert ids(choose(board(queue), "b", 10)) == [5, 3, 1, 4, 2]  # x was charged for the urgent one
    assert choose(board(queue), "a", 10) == []


def test_a_fed_task_waits_for_its_feeder_by_name() -> None:
    fed = work(
        2, source_site="b", source_path="/out1", target_site="c", driver="c", transfer="t-1", fed_by="t-1.1"
    )
    now = board([work(1), fed])
    now.feeders = {"t-1.1": Feeder("t-1.1", "b", "/out1", "running")}
    waits = hindrance(now, fed)
    assert waits is not None
    assert (waits.name, waits.text) == ("feed", "c is served by b, whose own copy is not complete yet")
    now.feeders = {}
    assert hindrance(now, fed) is None


def task(site: str, **fields: Any) -> Task:
    place = Endpoint(site=site, path="/data/x/")
    return Task(id=f"t-1.{site}", transfer="t-1", target=place, source=SOURCE, **fields)


def explained(*told: Task) -> Why:
    asked = TransferRequest(source=SOURCE, targets=[one.target for one in told])
    transfer = Transfer(
        id="t-1", request=asked, state="started", reason="", message="", since=BEGAN, created=BEGAN, user="u",
        tenant="x", tasks=list(told),
    )  # fmt: skip
    return explain(transfer, BEGAN.timestamp() + 90, {one.target.site: ["gets 950 Mbit/s"] for one in told})


def test_what_waits_for_a_site_that_drains_is_told_no_rate() -> None:
    drains = board([work(1)])
    drains.places["b"] = Place("b", "draining", 42.0, 4)
    found = hindrance(drains, work(1))
    assert found is not None
    assert (found.name, found.since) == ("draining", 42.0)
    assert found.ends_when == "an operator says flow site drain b --off"
    wait = Wait(name=found.name, text=found.text, since=BEGAN, ends_when=found.ends_when)
    still = task("b", state="waiting", wait=wait)
    why = explained(still)
    assert why.line == (
        "it waits (draining, for 1min 30s): site b is draining: it finishes what it carries and takes no new work; "
        "ends when an operator says flow site drain b --off"
    )
    assert why.plan == {}
    moves = task("c", state="running", rate_bits_per_s=8e6)
    why = explained(moves, still)
    assert why.line.startswith("it moves at 1")
    assert "; b waits, for 1min 30s: site b is draining" in why.line
    assert why.plan == {"c": ["gets 950 Mbit/s"]}
    assert "; b waits, for" in explained(task("c", state="running"), still).line, (
        "also before the first report"
    )
    # An agent that is being stopped drains by itself: no operator can end that from here.
    drains.places["b"] = Place("b", "draining", 42.0, 4, stopping=True)
    found = hindrance(drains, work(1))
    assert found is not None
    assert (found.text, found.ends_when) == (
        "the agent of site b is being stopped and takes no new work",
        "it is started again",
    )


def test_nothing_that_lasts_keeps_a_fed_target_waiting() -> None:
    def why(feeder: Feeder | None, site: str = "online", waits: str = "", since: float = 0.0) -> str:
        return lost(feeder, site, waits, since, 100.0)

    def feeder(state: str, begun: bool = False, wait: str = "", since: float = 0.0) -> Feeder:
        return Feeder("t-1.1", "b", "/x", state, begun, wait, since)

    assert {why(feeder(state)) for state in ("running", "waiting")} == {""}
    assert why(None) == why(feeder("waiting", wait="slots", since=95.0)) == ""
    for site in ("offline", "draining", "revoked"):
        assert why(feeder("running"), site) == f"its site is {site}"
    assert why(feeder("failed")) == "its own copy failed"
    assert why(feeder("waiting", begun=True)) == "its own copy was begun and given up"
    assert why(feeder("waiting", wait="slots", since=80.0)) == "its own copy waits (slots)"
    assert why(None, waits="source-path", since=80.0) == "somebody else writes there"
    assert falls_back("failed", "feed-differs", False)
    assert falls_back("waiting", "disconnected", True)
    assert falls_back("failed", "policy-denied", False)
    assert not falls_back("failed", "policy-stopped", True)  # what had arrived may not stay
    assert not falls_back("waiting", "draining", True)
    assert not falls_back("done", "", True)


def test_what_only_a_relay_can_carry_waits_until_a_way_is_planned() -> None:
    now = board([work(1), work(2, source_site="c")])
    for name in "ab":
        now.places[name].outbound = True
    waits = hindrance(now, work(1))
    assert waits is not None
    assert (waits.name, "neither a nor b can be dialled" in waits.text) == ("no-route", True)
    assert ids(choose(now, "b", 10)) == [2]
    now.routed = frozenset({"t-1.1"})
    assert hindrance(now, work(1)) is None


def test_weights_divide_what_was_served() -> None:
    queue = [work(n, tenant="xy"[n % 2]) for n in range(1, 13)]
    chosen = choose(board(queue, x=Share("x", 2.0), y=Share("y", 1.0)), "b", 6)
    assert sorted(found.tenant for found in chosen) == ["x"] * 4 + ["y"] * 2


def test_bounds_of_sites_and_tenants_hold() -> None:
    queue = [work(n) for n in range(1, 6)]
    here = board(queue)
    here.places["a"].max_tasks = 2
    assert ids(choose(here, "b", 10)) == [1, 2]
    found = hindrance(here, queue[2])
    assert found is not None
    assert found.name == "slots"
    assert ids(choose(board(queue, x=Share("x", 1.0, max_running=3)), "b", 10)) == [1, 2, 3]
    found = hindrance(board(queue, x=Share("x", 1.0, left_today_bytes=0)), queue[0])
    assert found is not None
    assert found.name == "tenant-quota"


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ("offline", "agent-offline"),
        ("expected", "agent-offline"),
        ("draining", "draining"),
        ("revoked", "site-revoked"),
    ],
)
def test_a_site_that_is_not_online_hinders(state: str, name: str) -> None:
    here = board([work(1)])
    here.places["a"].state = state
    found = hindrance(here, here.waiting[0])
    assert found is not None
    assert found.name == name


def test_overlapping_writers_go_one_after_the_other_and_nobody_waits_for_a_later_one() -> None:
    deep, above = work(1, target_path="/out/deep"), work(2, target_path="/out")
    beside = work(3, target_path="/outer")
    assert ids(choose(board([above, deep, beside]), "b", 10)) == [1, 3]
    assert ids(choose(board([above], [deep]), "b", 10)) == []
    paused = work(1, target_path="/out/deep", paused=True)
    assert ids(choose(board([above, paused]), "b", 10)) == [2]
    reader = work(2, source_site="b", source_path="/out1/x", target_site="c", driver="c")
    found = hindrance(board([work(1), reader]), reader)
    assert found is not None
    assert (found.name, "t-1" in found.text) == ("source-path", True)
    assert hindrance(board([work(5), reader]), reader) is None


def test_paths_overlap_by_whole_components() -> None:
    assert overlap("/", "/x")
    assert overlap("/a/b", "/a")
    assert not overlap("/a/b", "/a/bc")
    with pytest.raises(UsageError):
        clean("/a/../b")


def state_of(*tasks: TaskFacts, **flags: Any) -> tuple[str, str]:
    found = derive(tasks, **({"paused": False, "cancelled": False, "begun": False, "now": 100.0} | flags))
    return found.state, found.reason


def test_a_transfers_state_follows_from_its_tasks() -> None:
    waiting, running, done = TaskFacts("waiting"), TaskFacts("running"), TaskFacts("done")
    failed = TaskFacts("failed", reason="integrity")
    lost = TaskFacts("waiting", wait_name="agent-offline", wait_since=10.0)
    assert state_of(waiting) == ("requested", "queued")
    assert state_of(waiting, done, begun=True) == ("started", "waiting")
    assert state_of(running, failed) == ("started", "running")
    assert state_of(done, failed) == ("terminated", "integrity")
    assert state_of(done, done, cancelled=True) == ("completed", "done")
    assert state_of(done, TaskFacts("cancelled"), cancelled=True) == ("terminated", "cancelled")
    assert state_of(running, paused=True) == ("suspended", "paused")
    assert state_of(lost) == ("suspended", "agent-offline")
    assert state_of(lost, waiting) == ("requested", "queued")
    assert state_of(lost, now=60.0) == ("requested", "queued")
    assert state_of(TaskFacts("waiting", 1, "disk-full", "full"), begun=True) == ("suspended", "disk-full")
    assert state_of(TaskFacts("waiting", 1, "disconnected"), begun=True) == ("started", "retrying")


def held(**changes: Any) -> Held:
    fields: dict[str, Any] = {
        "state": "running", "fence": 10, "holder": "b", "driver": "b", "source_site": "a", "target_site": "b",
        "attempts": 0, "holder_seq": 3, "peer_seq": -1,
    }  # fmt: skip
    return Held(**(fields | changes))


@pytest.mark.parametrize(
    ("task", "said", "kind", "state", "directive"),
    [
        (held(), ("b", 10, 4, "running"), "taken", "running", "go"),
        (held(), ("b", 10, 3, "running"), "ignored", "running", "go"),
        (held(paused=True), ("b", 10, 4, "running"), "taken", "running", "pause"),
        (held(), ("b", 10, 4, "done"), "taken", "done", "stop"),
        (held(), ("a", 10, 0, "done"), "taken", "running", "go"),
        (held(holder="a", driver="a"), ("a", 10, 4, "done"), "taken", "running", "go"),
        (held(holder="a", driver="a"), ("b", 10, 0, "done"), "taken", "done", "stop"),
        (held(), ("b", 9, 4, "done"), "superseded", "running", "stop"),
        (held(state="waiting", holder=""), ("b", 10, 4, "running"), "superseded", "waiting", "stop"),
        (held(state="waiting", holder=""), ("b", 10, 4, "done"), "taken", "done", "stop"),
        (held(state="waiting"), ("b", 10, 4, "running"), "taken", "running", "go"),
        (held(state="waiting"), ("b", 10, 4, "done"), "taken", "done", "stop"),
        (held(state="cancelled"), ("b", 10, 4, "done"), "ignored", "cancelled", "stop"),
        (held(state="waiting", holder=""), ("b", 11, 0, "running"), "adopted", "running", "go"),
        (held(), ("a", 11, 0, "running"), "superseded", "running", "stop"),
        (held(), ("b", 10, 4, "failed"), "taken", "waiting", "stop"),
        (held(attempts=99), ("b", 10, 4, "failed"), "taken", "failed", "stop"),
    ],
)
def test_what_a_report_does(
    task: Held, said: tuple[str, int, int, str], kind: str, state: str, directive: str
) -> None:
    site, fence, seq, word = said
    found = take(task, site, fence, seq, word, True, 100.0, False)
    assert (found.kind, found.state, found.directive) == (kind, state, directive)


def test_a_task_that_was_given_back_is_not_claimed_at_once() -> None:
    found = take(held(), "b", 10, 4, "released", False, 100.0, False)
    assert (found.state, found.ready_at, found.attempts) == ("waiting", 101.0, 0)


def test_the_migrations_make_the_tables_and_head_is_the_newest() -> None:
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with create_engine("sqlite://").begin() as connection:
        command.upgrade(alembic_config(connection), "head")
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == HEAD


def test_the_reference_of_the_http_interface_is_made_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("http_api", ROOT / "docs/http_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/reference/http-api.md").read_text(encoding="utf-8")
    assert page == module.page(), "run: python docs/http_api.py > docs/reference/http-api.md"


def test_every_event_that_is_left_is_documented() -> None:
    page = (ROOT / "docs/reference/events.md").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"`((?:transfer|task|site|link|limit|maintenance|plan|user|token|tenant)\.[a-z]+)`", page)
    )
    left = set()
    for source in (ROOT / "flowengine/coordinator").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        left |= set(
            re.findall(
                r'"((?:transfer|task|site|link|limit|maintenance|plan|user|token|tenant)\.[a-z]+)"', text
            )
        )
    left -= {"site.id"}  # a policy's attribute, not an event
    assert left <= documented, left - documented


def test_a_missing_package_for_postgresql_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(UsageError, match="asyncpg") as raised:
        open_database("postgresql://flow@127.0.0.1/flow", lambda: 0.0)
    assert "[postgresql]" in raised.value.hint
