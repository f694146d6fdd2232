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
from flowengine.coordinator.database.evidence import Chain, list_records
from flowengine.coordinator.database.tables import ledger, metadata, sites, tasks, tenants, transfers
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.database.transfers import decode_decisions
from flowengine.coordinator.decisions import Decider, Rules
from flowengine.coordinator.knowledge import counts_of
from flowengine.errors import Denied
from flowengine.policy import Engine, load

NOW = 1_800_000_000.0
MEMBERS = """
max_offline = "10 seconds"
[[rule]]
id     = "members"
effect = "permit"
on     = ["release", "land"]
when   = []
then   = [{count = {ledger = "transfers", label = "study", window = "calendar_year"}}]
why    = "Members of the study"
"""
POLICY = (
    STUDY
    + MEMBERS
    + """
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


PLENTY = """
[[rule]]
id     = "plenty"
effect = "forbid"
on     = ["land"]
when   = ["ledger.transfers_after('study', 'any', 'calendar_year') > 9"]
why    = "Nine at a time"
"""
NOT_AT_B = """
[[rule]]
id     = "not-there"
effect = "forbid"
on     = ["land"]
when   = ["site.country is 'DE'"]
why    = "Not in that country any more"
"""


def decider(*rules: str, policy: str = POLICY, digest: str = "d") -> Decider:
    files = {"study.toml": "".join([policy, *rules]).encode()}
    return Decider(Rules(Engine(load(files)), digest * 64, content=b"x"))


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


def test_a_retry_asks_only_for_the_targets_that_still_need_something(bench: Bench) -> None:
    stated = {"source": "operator", "as_of": "2026-01-01T00:00:00Z"}
    for site, country in (("b", "DE"), ("c", "FR")):
        row = bench.connection.execute(select(sites).where(sites.c.name == "b")).one()._asdict()
        row |= {
            "name": site,
            "facts": msgspec.json.encode({"country": {"value": country, **stated}}).decode(),
        }
        bench.connection.execute(sites.delete().where(sites.c.name == site))
        bench.connection.execute(sites.insert().values(**row))
    by = decider(policy=STUDY + MEMBERS + PLENTY)
    request = TransferRequest(
        source=Endpoint(site="a", path="/data/set"),
        targets=[Endpoint(site="b", path="/data/b/"), Endpoint(site="c", path="/data/c/")],
        labels=["study"],
    )
    create(bench.writing(), "t-1", request, "u", "x", by.decide, lambda *args: set(), bench.chain)
    bench.runs("t-1")
    bench.says("t-1", "done", done=5, version_id="00", receipt="cg==")
    bench.connection.execute(update(tasks).where(tasks.c.id == "t-1.2").values(holder="c"))
    failed = Report(fence=7, seq=1, state="failed", counters=Counters(bytes_sent=1), reason="policy-denied")
    report(bench.writing(), "c", "t-1.2", failed, bench.terms)
    assert bench.state("t-1") == ("terminated", "policy-denied")
    before = bench.connection.execute(select(ledger).where(ledger.c.task == "t-1.1")).one()

    # b, which has everything, may not have it any more, and then is not even there: neither is c's business.
    now = decider(NOT_AT_B, policy=STUDY + MEMBERS + PLENTY, digest="e")
    bench.connection.execute(update(sites).where(sites.c.name == "b").values(state="revoked"))
    told = len(list_records(bench.connection, 0, 1000))
    steer(bench.writing(), "t-1", "retry", "u", None, now, bench.chain)
    assert bench.state("t-1")[0] in ("requested", "started")
    rows = {row.id: row for row in bench.connection.execute(select(tasks))}
    assert (rows["t-1.1"].state, rows["t-1.2"].state) == ("done", "waiting")
    assert bench.connection.execute(select(ledger).where(ledger.c.task == "t-1.1")).one() == before
    recorded = [msgspec.json.decode(line) for line in list_records(bench.connection, told, 1000)]
    asked = [(one["ask"]["use"], one["ask"]["site"]) for one in recorded if one["kind"] == "decision"]
    assert asked == [("release", "a"), ("land", "c")]
    transfer = bench.connection.execute(select(transfers)).one()
    shown = [(one.use, one.site, one.policy_digest[0]) for one in decode_decisions(transfer.decisions)]
    assert shown == [("release", "a", "e"), ("land", "c", "e"), ("land", "b", "d")], "what b landed by stays"

    # The other way round: what c may not have is denied, whatever b has.
    steer(bench.writing(), "t-1", "cancel", "u", None, now, bench.chain)
    bench.connection.execute(
        update(sites)
        .where(sites.c.name == "c")
        .values(facts=msgspec.json.encode({"country": {"value": "DE", **stated}}).decode())
    )
    refused = steer(bench.writing(), "t-1", "retry", "u", None, now, bench.chain)
    assert isinstance(refused, Denied)
    assert "land this data at c" in refused.message
