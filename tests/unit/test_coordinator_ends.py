"""What policy ended, and whose agent is cut off, ends at the coordinator, once; what is tried again is decided anew.

On the coordinator's own tables in memory, with its own actions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, create_engine, select, update
from studies import STUDY

from flowengine.api.agents import Disposed, Report
from flowengine.api.sites import SitePolicy
from flowengine.api.transfers import Counters, Disposal, Endpoint, TransferRequest
from flowengine.coordinator.actions.agents import agent_view, report
from flowengine.coordinator.actions.duties import dispose
from flowengine.coordinator.actions.grants import Terms
from flowengine.coordinator.actions.transfers import create, steer
from flowengine.coordinator.actions.unheard import end_unheard
from flowengine.coordinator.database.evidence import Chain
from flowengine.coordinator.database.tables import ledger, metadata, sites, tasks, tenants, transfers
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.decisions import Decider, Rules
from flowengine.coordinator.knowledge import counts_of
from flowengine.errors import Denied
from flowengine.policy import Engine, load

NOW = 1_800_000_000.0
POLICY = (
    STUDY
    + """
max_offline = "10 seconds"
[[rule]]
id     = "members"
effect = "permit"
on     = ["release", "land"]
when   = []
then   = [{count = {ledger = "transfers", label = "study", window = "calendar_year"}}]
why    = "Members of the study"
[[rule]]
id     = "enough"
effect = "forbid"
on     = ["land"]
when   = ["ledger.transfers_after('study', 'any', 'calendar_year') > 1"]
why    = "One at a time"
"""
)
ENDED = """
[[rule]]
id     = "ended"
effect = "forbid"
on     = ["land"]
when   = []
why    = "The agreement has ended"
"""


def decider(*rules: str) -> Decider:
    return Decider(
        Rules(Engine(load({"study.toml": "".join([POLICY, *rules]).encode()})), "d" * 64, content=b"x")
    )


class Bench:
    """A coordinator's state with two sites; the clock is `now`."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.now = NOW
        self.chain = Chain(bytes(32), os.urandom)
        self.terms = Terms(300, lambda grant: b"", lambda grant: b"", os.urandom)
        connection.execute(tenants.insert().values(name="x", weight=1.0))
        for name in "ab":
            said = SitePolicy(version=1, max_offline_s=10.0)
            connection.execute(
                sites.insert().values(
                    name=name, state="online", since=NOW, created=NOW, last_seen=NOW, facts="{}",
                    addresses='["h:1"]', policy=msgspec.json.encode(said).decode(),
                    roots='[{"name": "/data", "access": "read-write", "path": "/data"}]',
                )
            )  # fmt: skip

    def writing(self) -> Writing:
        return Writing(self.connection, self.now, "sqlite")

    def copy(self, id_: str, by: Decider) -> Any:
        request = TransferRequest(
            source=Endpoint(site="a", path="/data/set"),
            targets=[Endpoint(site="b", path=f"/data/{id_}/")],
            labels=["study"],
        )
        return create(self.writing(), id_, request, "u", "x", by.decide, lambda *args: set(), self.chain)

    def runs(self, id_: str) -> None:
        """Its target has claimed it, and told of bytes."""
        values = {"state": "running", "fence": 7, "holder": "b", "lease_until": NOW + 300, "claimed": NOW}
        self.connection.execute(update(tasks).where(tasks.c.transfer == id_).values(**values))

    def silent(self, seconds: float) -> None:
        self.connection.execute(update(sites).where(sites.c.name == "b").values(state="offline"))
        self.now = NOW + seconds

    def state(self, id_: str) -> tuple[str, str]:
        row = self.connection.execute(select(transfers).where(transfers.c.id == id_)).one()
        return row.state, row.reason

    def says(self, id_: str, state: str, seq: int = 1, done: int = 0, **more: Any) -> str:
        said = Report(fence=7, seq=seq, state=state, counters=Counters(bytes_sent=done), **more)  # type: ignore[arg-type]
        return report(self.writing(), "b", f"{id_}.1", said, self.terms).directive


@pytest.fixture
def bench() -> Iterator[Bench]:
    with create_engine("sqlite://").begin() as connection:
        metadata.create_all(connection)
        yield Bench(connection)


def test_what_policy_denies_ends_when_its_agent_could_not_go_on_any_more(bench: Bench) -> None:
    bench.copy("t-1", decider())
    bench.runs("t-1")
    now = decider(ENDED)
    bench.silent(39.0)  # 10 s by its policies, and a margin of 30 s
    end_unheard(bench.writing(), now, 30.0)
    assert bench.state("t-1")[0] != "terminated"
    bench.silent(41.0)
    end_unheard(bench.writing(), decider(), 30.0)  # what is permitted waits for it
    assert bench.state("t-1")[0] != "terminated"
    end_unheard(bench.writing(), now, 30.0)
    assert bench.state("t-1") == ("terminated", "policy-unheard")
    row = bench.connection.execute(select(tasks)).one()
    assert "study/ended" in row.message
    assert "has not been heard since 2027-01-15 08:00:00 UTC" in row.message
    kept = bench.connection.execute(select(ledger)).one()
    assert (kept.expires, kept.size_bytes) == (None, None), "what may have moved counts"


def test_a_site_that_comes_back_does_not_make_a_second_end(bench: Bench) -> None:
    bench.copy("t-1", decider())
    bench.runs("t-1")
    bench.silent(41.0)
    end_unheard(bench.writing(), decider(ENDED), 30.0)
    seen = agent_view(bench.connection, bench.now, "b")
    assert seen.directives["t-1.1"].directive == "stop"
    assert "study/ended" in seen.quarantines["t-1.1"]
    # It had just landed all of it when it was cut off, and says so now.
    assert bench.says("t-1", "done", done=10, version_id="00", receipt="cg==") == "stop"
    assert bench.says("t-1", "running", seq=2) == "stop"
    end_unheard(bench.writing(), decider(ENDED), 30.0)
    assert bench.state("t-1") == ("terminated", "policy-unheard")
    gone = Disposal(state="quarantined", cause="policy-stopped", why="it may not stay", at=datetime.now(UTC))
    dispose(bench.writing(), "b", Disposed(task="t-1.1", disposal=gone))
    assert bench.state("t-1")[0] == "quarantined"
    assert "t-1.1" not in agent_view(bench.connection, bench.now, "b").quarantines
    purged = msgspec.structs.replace(gone, state="purged", certificate="cg==")
    dispose(bench.writing(), "b", Disposed(task="t-1.1", disposal=purged))
    dispose(bench.writing(), "b", Disposed(task="t-1.1", disposal=gone))  # it crosses
    assert bench.state("t-1")[0] == "purged"


def test_what_never_began_waits(bench: Bench) -> None:
    bench.copy("t-1", decider())
    bench.silent(1e6)
    end_unheard(bench.writing(), decider(ENDED), 30.0)
    assert bench.state("t-1")[0] == "requested"


def test_a_retry_is_decided_by_the_policies_and_counters_of_its_moment(bench: Bench) -> None:
    by = decider()
    bench.copy("t-1", by)
    steer(bench.writing(), "t-1", "cancel", "u", None, by, bench.chain)
    bench.copy("t-2", by)  # what was cancelled before its first byte has left room
    assert bench.state("t-2")[0] == "requested"
    refused = steer(bench.writing(), "t-1", "retry", "u", None, by, bench.chain)
    assert isinstance(refused, Denied)
    assert "One at a time" in refused.message
    assert bench.state("t-1") == ("terminated", "cancelled")
    steer(bench.writing(), "t-2", "cancel", "u", None, by, bench.chain)
    refused = steer(bench.writing(), "t-1", "retry", "u", None, decider(ENDED), bench.chain)
    assert isinstance(refused, Denied)
    assert "agreement has ended" in refused.message
    steer(bench.writing(), "t-1", "retry", "u", None, by, bench.chain)
    assert bench.state("t-1")[0] == "requested"
    assert isinstance(bench.copy("t-3", by), Denied)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("nobody claimed it", False),
        ("it was claimed, and nothing is known of it", True),
        ("it was given back with nothing moved", False),
        ("half an object had moved", True),
        ("half an object had moved, and a second session never began", True),
        ("it is complete, and there was nothing in it", True),
    ],
)
def test_a_cancelled_transfer_gives_back_only_what_surely_has_not_moved(
    bench: Bench, how: str, kept: bool
) -> None:
    by = decider()
    bench.copy("t-1", by)
    if how != "nobody claimed it":
        bench.runs("t-1")
    if how.startswith("it was given back"):
        bench.says("t-1", "released")
    elif how.startswith("half"):
        bench.says("t-1", "running", done=5)
    elif how.startswith("it is complete"):
        bench.says("t-1", "done", version_id="00", receipt="cg==")
    if how.endswith("never began"):
        bench.says("t-1", "failed", seq=2, done=5, reason="disconnected", retryable=True)
        bench.runs("t-1")
        bench.connection.execute(update(tasks).values(counters="{}", fence=8, holder_seq=-1))
        said = Report(fence=8, seq=1, state="failed", counters=Counters(), reason="policy-denied")
        report(bench.writing(), "b", "t-1.1", said, bench.terms)
    elif not how.startswith("it is complete"):
        steer(bench.writing(), "t-1", "cancel", "u", None, by, bench.chain)
    assert bench.state("t-1")[0] in ("terminated", "completed")
    assert isinstance(bench.copy("t-2", by), Denied) is kept


def test_a_retry_of_what_moved_in_part_counts_once(bench: Bench) -> None:
    by = decider()
    bench.copy("t-1", by)
    bench.runs("t-1")
    bench.says("t-1", "running", done=5)
    steer(bench.writing(), "t-1", "cancel", "u", None, by, bench.chain)
    assert isinstance(bench.copy("t-2", by), Denied), "what has moved is not given back"
    steer(bench.writing(), "t-1", "retry", "u", None, by, bench.chain)
    assert bench.state("t-1")[0] in ("requested", "started")
    assert set(counts_of(bench.connection, "t-1.1").values()) == {1}
    steer(bench.writing(), "t-1", "cancel", "u", None, by, bench.chain)  # nothing more has moved
    assert isinstance(bench.copy("t-2", by), Denied)
