"""Links, plans and deadlines with a real coordinator and real agents."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from federations import Local, local_federation
from support import wait_until, written_below

from flowengine.api.links import LinkRequest, MaintenanceRequest, ProbeRequest
from flowengine.client import Client
from flowengine.client.requests import transfer_request
from flowengine.errors import FlowError, NotFound
from flowengine.transfer.pacing import BURST_S

pytestmark = pytest.mark.slow

MIB = 1 << 20
LIMIT_BITS_PER_S = 80_000_000
"""Slow enough that the limit, and no tired machine, says how long a copy takes."""
LOOKS = 4
"""Where a machine stood still, or was busy elsewhere, while something was judged, it is looked at once more."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    base = tmp_path_factory.mktemp("planning")
    for site in "abc":
        (base / site).mkdir()
    with local_federation(base, {"a": "", "b": "", "c": ""}) as running:
        yield running


@pytest.fixture
def client(federation: Local) -> Iterator[Client]:
    with federation.client() as made:
        made.set_limit("link:a>b", LIMIT_BITS_PER_S)
        yield made


def put(federation: Local, name: str, mib: int) -> str:
    """A file of fresh bytes at site a; its place."""
    (federation.data("a") / name).write_bytes(os.urandom(mib * MIB))
    return f"a:/data/{name}"


def test_a_probe_measures_a_link_and_is_remembered(client: Client) -> None:
    with pytest.raises(NotFound):
        client.link("a", "c")
    found = client.probe_link("a", "c", ProbeRequest(size_bytes=8 * MIB, seconds=5))
    assert found.rate_bits_per_s is not None
    assert found.rate_bits_per_s > 1e6
    assert found.rtt_ms is not None
    (look,) = client.link_looks("a", "c")
    assert (look.kind, look.at_least) == ("probe", False)
    declared = client.set_link("a", "c", LinkRequest(capacity_bits_per_s=10**9, cost_per_gb=0.08))
    assert (declared.rate_bits_per_s, declared.cost_per_gb) == (found.rate_bits_per_s, 0.08)
    plan = client.plan("a:/data/", "c:/data/x/", size_bytes=10**9)
    assert plan.usd == pytest.approx(0.08)
    client.remove_link("a", "c")
    with pytest.raises(NotFound):
        client.link("a", "c")


def test_a_plan_counts_says_what_binds_and_is_followed(federation: Local, client: Client) -> None:
    place = put(federation, "counted", 16)
    plan = client.plan(place, "b:/data/counted")
    assert (plan.permitted, plan.size_bytes, plan.objects) == (True, 16 * MIB, 1)
    assert plan.rate_bits_per_s == LIMIT_BITS_PER_S
    assert plan.binds[0].startswith("link a→b is full")
    assert plan.duration_s is not None
    assert plan.duration_s >= 16 * MIB * 8 / LIMIT_BITS_PER_S
    assert client.planned(plan.id) == plan
    done = client.copy(place, "b:/data/counted", plan=plan.id).wait(60)
    assert (done.state, done.request.size_bytes) == ("completed", 16 * MIB)
    with pytest.raises(FlowError, match="is for another transfer"):
        client.copy(place, "b:/data/elsewhere", plan=plan.id)
    with pytest.raises(NotFound):
        client.copy(place, "b:/data/counted", plan="p-nosuchplan00")


def test_a_deadline_is_promised_or_refused_with_the_earliest_that_can_be(
    federation: Local, client: Client
) -> None:
    place = put(federation, "due", 16)  # takes 1.7 s at least
    with pytest.raises(FlowError) as refused:
        client.copy(place, "b:/data/due", deadline=timedelta(seconds=1.2))
    assert refused.value.reason == "deadline"
    assert "link a→b is full" in refused.value.message
    earliest = datetime.fromisoformat(str(refused.value.context["earliest"]))
    assert earliest > datetime.now(UTC)
    best = client.copy(place, "b:/data/due", deadline=timedelta(seconds=1.2), best_effort=True)
    assert not best.record.promised
    assert best.wait(60).state == "completed"
    promised = client.copy(put(federation, "due2", 4), "b:/data/due2", deadline=timedelta(seconds=60))
    assert promised.record.promised
    ended = promised.wait(60)
    assert ended.request.deadline is not None
    assert ended.ended is not None
    assert ended.ended < ended.request.deadline


def test_promises_are_counted_against_each_other(federation: Local, client: Client) -> None:
    """Each alone could be kept, both cannot: the second one is refused."""
    place = put(federation, "one", 4)
    # Sizes are told, so nothing of it needs to be there: 10 GB in 1500 s leave no room for another 10 GB.
    size = 10_000_000_000
    request = transfer_request(
        place,
        "b:/data/one",
        mode="copy",
        now=datetime.now(UTC),
        deadline=timedelta(seconds=1500),
        size_bytes=size,
    )
    first = client.submit(request, key="asked-once")
    assert first.record.promised
    try:
        assert (
            client.submit(request, key="asked-once").id == first.id
        )  # its own promise does not stand in its way
        with pytest.raises(FlowError) as refused:
            client.copy(place, "b:/data/two", deadline=timedelta(seconds=1500), size_bytes=size)
        assert refused.value.reason == "deadline"
    finally:
        first.wait(60)


def test_why_and_show_tell_the_plan_while_it_moves(federation: Local, client: Client) -> None:
    client.set_limit("link:a>b", LIMIT_BITS_PER_S // 20)  # a machine that stands still meanwhile sees it yet
    transfer = client.copy(put(federation, "watched", 16), "b:/data/watched")
    for record in transfer.updates(0.2):
        if record.ended is not None:
            pytest.fail("it ended before it was planned for")
        (task,) = record.tasks
        if task.ways and record.eta is not None and task.binds:
            break
    assert task.ways[0].sites == ["a", "b"]
    assert "link a→b is full" in task.binds
    assert record.eta is not None
    lines = transfer.why().plan["b"]
    assert any("over a → b" in line for line in lines), lines
    transfer.cancel()


def test_maintenance_is_kept_and_forgotten(client: Client) -> None:
    now = datetime.now(UTC)
    made = client.add_maintenance(
        MaintenanceRequest(scope="site:c", starts=now, ends=now + timedelta(hours=1), comment="new disks")
    )
    assert [one.id for one in client.maintenance()] == [made.id]
    plan = client.plan("a:/data/", "c:/data/x/", size_bytes=10**6)
    assert any("is closed" in line for line in plan.binds), plan
    client.remove_maintenance(made.id)
    assert client.maintenance() == []


def test_what_a_plan_says_comes_true(federation: Local, client: Client) -> None:
    """The small sample of perf/eta_bench.py: a few copies are learned from, then what is said of others is compared."""
    sizes = [1, 3, 6, 2, 4, 8, 3, 5]
    wrong: list[float] = []
    for number, mib in enumerate(sizes * LOOKS):
        place = put(federation, f"true{number}", mib)
        plan = client.plan(place, f"b:/data/true{number}")
        begin = time.perf_counter()
        client.copy(place, f"b:/data/true{number}", plan=plan.id).wait(60)
        took = time.perf_counter() - begin
        assert plan.duration_s is not None
        assert took > mib * MIB * 8 / LIMIT_BITS_PER_S - BURST_S
        wrong.append(abs(plan.duration_s / took - 1))
        # Generous: other tests run beside this one. perf/results has what it is on a machine by itself.
        if number + 1 >= len(sizes) and statistics.median(wrong[-(len(sizes) // 2) :]) < 0.6:
            return
    pytest.fail(f"none of the last copies took what was said: {wrong}")


def test_the_command_line(federation: Local, client: Client) -> None:
    import subprocess
    import sys

    def flow(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flowengine.cli.main", *words],
            env=federation.environment | {"PATH": os.environ["PATH"]},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    place = put(federation, "shown", 2)
    assert "plan      p-" in flow("plan", "show", place, "b:/data/shown")
    assert "--best-effort" in flow("cp", place, "b:/data/shown", "--deadline", "1s", "--size", "1GB", code=1)
    flow("link", "set", "a", "b", "--capacity", "1Gbit/s", "--usd-per-gb", "0.02")
    assert "a > b" in flow("link", "ls")
    assert "0.02 USD/GB" in flow("link", "show", "a", "b")
    assert "carries" in flow("link", "probe", "b", "a", "--size", "4MiB")
    made = flow("maintain", "add", "link:b>a", "--until", "1h").split()[1].removesuffix(":")
    assert made in flow("maintain", "ls")
    flow("maintain", "rm", made)
    flow("cp", place, "b:/data/shown", "--deadline", "1h", "--progress", "none")
    assert (federation.data("b") / "shown").stat().st_size == 2 * MIB


def test_a_promise_of_a_higher_class_gets_its_rate_from_one_that_runs(
    federation: Local, client: Client
) -> None:
    shares = []
    for look in range(LOOKS):
        first = client.copy(put(federation, f"bulk{look}", 64), f"b:/data/d1/bulk{look}")
        while not first.refresh().tasks[0].rate_bits_per_s:
            if first.ended:
                pytest.fail("it ended before anything was reported")
            first.refresh(0.5)
        # 24 MiB in 4 s are 50 of the 80 Mbit/s; as an equal it would get half of them.
        place = put(federation, f"due{look}", 24)
        before = written_below(federation.data("b") / "d1")
        try:
            due = client.copy(
                place, f"b:/data/d2/due{look}", priority="urgent", deadline=timedelta(seconds=4.5)
            )
        except FlowError as refused:
            if refused.reason != "deadline":  # a machine that was slow is believed to stay so
                raise
            shares.append(0.0)
        else:
            assert due.record.promised
            assert due.wait(60).state == "completed"
            moved = written_below(federation.data("b") / "d1") - before
            shares.append(24 * MIB / (24 * MIB + moved))
        with contextlib.suppress(FlowError):  # it may have come to its end meanwhile
            first.cancel()
        wait_until(lambda: first.refresh().ended, "the end of the rest")  # noqa: B023
        if shares[-1] > 0.7:
            return
    pytest.fail(f"its shares of what moved meanwhile: {shares}")
