"""From what the database knows to plans and leases: who is held to what, whom policy and choice leave which ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, select, text

from flowengine.api.agents import HopTraffic
from flowengine.api.transfers import Counters
from flowengine.coordinator.database.tables import (
    leases,
    limits,
    link_states,
    links,
    metadata,
    plan_state,
    sites,
    tasks,
    tenants,
    transfers,
)
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.decisions import Decider
from flowengine.coordinator.planning.outcome import HeldLease, TaskPlan, Told, leases_of, plans_of
from flowengine.coordinator.planning.picture import Picture, read_picture
from flowengine.coordinator.planning.problem import demands_of, overlay_of, sighted_links
from flowengine.coordinator.planning.stored import (
    apply,
    last_plan,
    leases_of_site,
    read_task_plans,
    way_of,
)
from flowengine.coordinator.planning.watch import Watch
from flowengine.plan import plan

NOW = 1_800_000_000.0
MBIT = 1_000_000
RELAY = json.dumps({"streams": 0, "max_streams": 8})


@pytest.fixture
def connection() -> Any:
    with create_engine("sqlite://").begin() as opened:
        metadata.create_all(opened)
        for name in ("event", "fence", "epoch", "plan", "promise"):
            opened.execute(text("INSERT INTO counters (name, value) VALUES (:name, 0)"), {"name": name})
        opened.execute(tenants.insert().values(name="x", weight=1.0))
        for name in ("s", "t", "r"):
            row = {"name": name, "state": "online", "since": 0.0, "created": 0.0, "addresses": '["h:1"]'}
            opened.execute(sites.insert().values(**row, relay=RELAY if name == "r" else "", key_sha256=name))
        yield opened


def add_task(connection: Connection, number: int, **changes: Any) -> str:
    """A running task from s to t; its id."""
    transfer = f"t-000{number}"
    request = {
        "source": {"site": "s", "path": "/d"},
        "targets": [{"site": "t", "path": f"/{number}"}],
    }
    own = {k: changes.pop(k) for k in ("deadline", "promised", "size_bytes", "plan") if k in changes}
    connection.execute(
        transfers.insert().values(
            id=transfer, request=json.dumps(request), state="started", user="u", tenant="x", source_site="s",
            **({"size_bytes": 10**9} | own),
        )
    )  # fmt: skip
    row = {
        "id": f"{transfer}.1", "transfer": transfer, "tenant": "x", "priority": 1, "source_site": "s",
        "source_path": "/d", "target_site": "t", "target_path": f"/{number}", "driver": "t", "state": "running",
        "holder": "t", "fence": number, "claimed": NOW, "reported": NOW,
    }  # fmt: skip
    connection.execute(tasks.insert().values(**(row | changes)))
    return f"{transfer}.1"


def know(connection: Connection, source: str, target: str, rate: float) -> None:
    row = {"rate_bits_per_s": rate, "variance": 0.001, "measured": NOW}
    connection.execute(link_states.insert().values(source=source, target=target, **row))


def solve(picture: Picture) -> tuple[dict[str, TaskPlan], list[HeldLease]]:
    pairs = [(task.source, task.target) for task in picture.tasks]
    overlay = overlay_of(picture, pairs)
    demands = demands_of(picture, sighted_links(picture, overlay, pairs))
    made = plan(overlay, demands, None, NOW)
    counted = {task.id: task.counted for task in picture.tasks}
    plans = plans_of(made, 1, {}, counted, {})
    return plans, leases_of(overlay, demands, plans, NOW, 1)


def ways(one: TaskPlan) -> dict[tuple[str, ...], int]:
    return {tuple(route.sites): round(route.rate_bits_per_s / MBIT) for route in one.routes}


def test_who_is_alone_has_no_lease_and_a_guessed_relay_is_no_way(connection: Connection) -> None:
    task = add_task(connection, 1)
    know(connection, "s", "t", 100 * MBIT)
    plans, held = solve(read_picture(connection, NOW, Decider()))
    assert ways(plans[task]) == {("s", "t"): 100}
    assert held == []


def test_what_a_relay_passes_on_is_bounded_as_its_operator_says(connection: Connection) -> None:
    task = add_task(connection, 1)
    for pair in (("s", "t"), ("s", "r"), ("r", "t")):
        know(connection, *pair, 100 * MBIT)
    relay = json.dumps({"streams": 0, "max_streams": 8, "max_bits_per_s": 30 * MBIT})
    connection.execute(sites.update().where(sites.c.name == "r").values(relay=relay))
    plans, _ = solve(read_picture(connection, NOW, Decider()))
    assert ways(plans[task]) == {("s", "t"): 100, ("s", "r", "t"): 30}
    # What comes to r for itself is not passed on.
    own = add_task(connection, 2, source_site="s", target_site="r")
    plans, _ = solve(read_picture(connection, NOW, Decider()))
    assert sum(ways(plans[own]).values()) > 60
    assert ways(plans[task])["s", "r", "t"] <= 30


def test_storage_that_is_shared_divides_its_rate_and_is_named(connection: Connection) -> None:
    roots = json.dumps([{"name": name, "access": "read-write"} for name in ("/", "/fast")])
    connection.execute(sites.update().where(sites.c.name == "t").values(roots=roots))
    know(connection, "s", "t", 100 * MBIT)
    values = {"rate_bits_per_s": 40 * MBIT, "windows": "[]", "changed": NOW, "changed_by": "a"}
    connection.execute(limits.insert().values(scope="write:t:/", **values))
    alone = add_task(connection, 1)
    plans, held = solve(read_picture(connection, NOW, Decider()))
    assert (ways(plans[alone]), held) == ({("s", "t"): 40}, [])
    assert "writing to t:/" in plans[alone].binds
    other, fast = add_task(connection, 2), add_task(connection, 3, target_path="/fast/x")
    plans, held = solve(read_picture(connection, NOW, Decider()))
    rates = [sum(ways(plans[one]).values()) for one in (alone, other, fast)]
    assert (rates[0] + rates[1], rates[2]) == (40, 60)
    assert {lease.task: round(lease.rate_bits_per_s / MBIT) for lease in held}[alone] == rates[0]


def test_a_copy_to_a_relay_goes_on_where_ways_over_it_are_taken_for_dead(connection: Connection) -> None:
    over, own = add_task(connection, 1), add_task(connection, 2, target_site="r")
    for pair in (("s", "t"), ("s", "r"), ("r", "t")):
        know(connection, *pair, 100 * MBIT)
    picture = read_picture(connection, NOW, Decider())
    picture.shut = frozenset({("s", "r"), ("r", "t")})
    plans, _ = solve(picture)
    assert ways(plans[over]) == {("s", "t"): 100}
    assert ways(plans[own]) == {("s", "r"): 100}


@pytest.mark.parametrize(
    ("silent", "site"),
    [
        ({"reported": NOW - 9.0, "claimed": NOW - 60.0}, {}),
        ({"state": "waiting", "holder": ""}, {"last_seen": NOW - 16.0}),
        ({"state": "waiting", "holder": ""}, {"last_seen": NOW - 60.0, "state": "offline"}),
        ({"state": "waiting", "holder": ""}, {"state": "draining"}),
    ],
    ids=["no report", "no word", "offline", "draining"],
)
def test_who_is_silent_takes_what_others_leave(
    connection: Connection, silent: dict[str, Any], site: dict[str, Any]
) -> None:
    know(connection, "s", "t", 100 * MBIT)
    know(connection, "s", "r", 100 * MBIT)
    values = {"rate_bits_per_s": 40 * MBIT, "windows": "[]", "changed": NOW, "changed_by": "a"}
    connection.execute(limits.insert().values(scope="site:s", **values))
    dead = add_task(connection, 1, target_site="r", driver="r", **{"holder": "r", **silent})
    alive = add_task(connection, 2)
    connection.execute(sites.update().where(sites.c.name == "t").values(last_seen=NOW))
    connection.execute(sites.update().where(sites.c.name == "r").values(**{"last_seen": NOW, **site}))
    plans, _ = solve(read_picture(connection, NOW, Decider()))
    assert sum(ways(plans[alive]).values()) == 40
    assert sum(ways(plans[dead]).values()) == 0
    # Where nobody is heard it is the coordinator that was away: nobody yields.
    connection.execute(tasks.update().values(reported=NOW - 9.0, claimed=NOW - 60.0))
    connection.execute(sites.update().values(last_seen=NOW - 16.0))
    plans, _ = solve(read_picture(connection, NOW, Decider()))
    assert [sum(ways(plans[one]).values()) for one in (dead, alive)] == [39, 1]


def test_known_links_to_a_relay_are_used_beside_the_straight_one(connection: Connection) -> None:
    task = add_task(connection, 1)
    know(connection, "s", "t", 100 * MBIT)
    know(connection, "s", "r", 300 * MBIT)
    connection.execute(
        links.insert().values(source="r", target="t", capacity_bits_per_s=300 * MBIT, cost_per_gb=0.0)
    )
    picture = read_picture(connection, NOW, Decider())
    plans, _ = solve(picture)
    assert ways(plans[task]) == {("s", "t"): 100, ("s", "r", "t"): 300}
    picture.permitted = {"t-0001": frozenset()}  # what policy says when it forbids the relay
    plans, _ = solve(picture)
    assert ways(plans[task]) == {("s", "t"): 100}


def test_a_promise_gets_its_rate_and_others_are_held_to_the_rest(connection: Connection) -> None:
    know(connection, "s", "t", 100 * MBIT)
    low = add_task(connection, 1)
    due = add_task(connection, 2, priority=3, deadline=NOW + 100, promised=True)
    plans, held = solve(read_picture(connection, NOW, Decider()))
    by_task = {lease.task: lease for lease in held}
    assert plans[due].rate_bits_per_s >= 80 * MBIT
    assert plans[due].promise == "kept"
    assert by_task[due].rate_bits_per_s >= plans[due].rate_bits_per_s  # with room to learn
    assert by_task[low].rate_bits_per_s <= 100 * MBIT - plans[due].rate_bits_per_s + 200_000
    assert {lease.site for lease in held} == {"s"}


def test_an_operators_limit_is_never_leased_beyond(connection: Connection) -> None:
    know(connection, "s", "t", 1000 * MBIT)
    connection.execute(limits.insert().values(scope="link:s>t", rate_bits_per_s=100 * MBIT))
    for number in (1, 2, 3):
        add_task(connection, number)
    _, held = solve(read_picture(connection, NOW, Decider()))
    assert len(held) == 3
    assert sum(lease.rate_bits_per_s for lease in held) <= 100 * MBIT


def test_numbers_never_go_back(connection: Connection) -> None:
    """Each plan's number is above every one before, though another leader makes it; leases carry it."""
    know(connection, "s", "t", 100 * MBIT)
    names = [add_task(connection, number) for number in (1, 2)]
    numbers: list[int] = []
    carried: list[set[int]] = []
    for step in range(3):
        picture = read_picture(connection, NOW, Decider())
        plans, held = solve(picture)
        writing = Writing(connection, NOW + 100 * step, "sqlite")
        before = read_task_plans(connection)
        told = {task: Told(plan=one) for task, one in plans.items()}
        numbers.append(apply(writing, plan(overlay_of(picture, []), (), None, NOW), told, held, before))
        assert last_plan(connection)[0] == numbers[-1]
        carried.append({lease.number for lease in leases_of_site(connection, "s", writing.now)})
    assert numbers == sorted(set(numbers))
    assert connection.execute(select(plan_state.c.number)).scalar_one() == numbers[-1]
    assert carried == [{numbers[0]}, {numbers[0]}, {numbers[2]}]  # renewed at half of the term, not before
    connection.execute(tasks.update().values(state="done"))
    apply(Writing(connection, NOW, "sqlite"), None, {}, [], read_task_plans(connection))
    assert read_task_plans(connection) == {}
    assert connection.execute(select(leases)).all() == []
    assert len(names) == 2


def test_what_tasks_move_together_is_what_a_link_carries(connection: Connection) -> None:
    for number in (1, 2):
        flow = [HopTraffic(sender="s", receiver="t", size_bytes=1, rate_bits_per_s=40 * MBIT)]
        add_task(connection, number, link_bound=True, flows=json.dumps([_plain(hop) for hop in flow]))
    watch = Watch()
    picture = read_picture(connection, NOW, Decider())
    (look,) = watch.look(picture)
    assert (look.source, look.target, look.at_least) == ("s", "t", False)
    assert round(look.rate_bits_per_s / MBIT) == 80
    assert round(picture.known["s", "t"].rate_bits_per_s / MBIT) == 80
    assert watch.look(picture) == []  # nothing new was reported


def test_a_way_that_carries_nothing_is_taken_for_dead(connection: Connection) -> None:
    know(connection, "s", "t", 100 * MBIT)
    know(connection, "s", "r", 300 * MBIT)
    know(connection, "r", "t", 300 * MBIT)
    flows = [HopTraffic(sender="s", receiver="t", size_bytes=1, rate_bits_per_s=90 * MBIT)]
    flows.append(HopTraffic(sender="r", receiver="t", size_bytes=1, rate_bits_per_s=0.0))
    task = add_task(connection, 1, flows=json.dumps([_plain(hop) for hop in flows]))
    watch = Watch()
    plans, _ = solve(read_picture(connection, NOW, Decider()))
    assert ("s", "r", "t") in ways(plans[task])
    buried = []
    for second in range(8):
        picture = read_picture(connection, NOW + second, Decider())
        buried += watch.bury(picture, plans)
    assert set(buried) == {("s", "r"), ("r", "t")}
    picture.shut = frozenset(watch.dead)
    plans, _ = solve(picture)
    assert set(ways(plans[task])) == {("s", "t")}


def test_two_ends_that_did_not_meet_at_a_relay_are_led_to_another(connection: Connection) -> None:
    connection.execute(sites.update().where(sites.c.name != "r").values(addresses="[]", last_seen=NOW))
    task = add_task(connection, 1, state="waiting", size_bytes=10**6)
    watch = Watch()

    def led(attempts: int) -> set[tuple[str, ...]]:
        connection.execute(tasks.update().values(attempts=attempts))
        picture = read_picture(connection, NOW, Decider())
        watch.bury(picture, plans)
        picture.shut = frozenset(watch.dead)
        plans.update(solve(picture)[0])
        return set(ways(plans[task]))

    plans: dict[str, TaskPlan] = {}
    assert led(0) == {("s", "r", "t")}
    assert led(1) == {("s", "r", "t")}  # there is no other
    row = {"name": "q", "state": "online", "since": 0.0, "created": 0.0, "addresses": '["h:2"]'}
    connection.execute(sites.insert().values(**row, relay=RELAY, key_sha256="q", last_seen=NOW))
    (first,) = led(1)
    (second,) = led(2)
    assert {first, second} == {("s", "r", "t"), ("s", "q", "t")}


def _plain(hop: HopTraffic) -> Any:
    import msgspec

    return msgspec.to_builtins(hop)


def test_what_a_limit_lets_through_says_nothing_of_the_link(connection: Connection) -> None:
    """A limit that is held elsewhere feels like a full link to the sender; lifted, its rate is reported for a while."""
    know(connection, "s", "t", 1000 * MBIT)
    flow = HopTraffic(sender="s", receiver="t", size_bytes=1, rate_bits_per_s=95 * MBIT)
    add_task(connection, 1, link_bound=True, flows=json.dumps([_plain(flow)]))
    connection.execute(limits.insert().values(scope="link:s>t", rate_bits_per_s=100 * MBIT))
    watch = Watch()
    for lifted, second, carries in ((False, 0, 1000), (True, 3, 1000), (True, 30, 95)):
        if lifted:
            connection.execute(limits.delete())
        connection.execute(tasks.update().values(reported=NOW + second))
        picture = read_picture(connection, NOW + second, Decider())
        watch.look(picture)
        believed = picture.known["s", "t"].rate_bits_per_s / MBIT
        assert (believed == 1000) == (carries == 1000), f"second {second}: {believed}"


def test_many_small_objects_say_nothing_of_the_link(connection: Connection) -> None:
    know(connection, "s", "t", 1000 * MBIT)
    flow = HopTraffic(sender="s", receiver="t", size_bytes=1, rate_bits_per_s=80 * MBIT)
    small = Counters(objects=4000, objects_done=2000, bytes_done=10_000_000)  # 2,000 of them a second
    add_task(connection, 1, link_bound=True, flows=json.dumps([_plain(flow)]), counters=json_text(small))
    picture = read_picture(connection, NOW, Decider())
    assert Watch().look(picture) == []
    large = json_text(Counters(objects=4, objects_done=2, bytes_done=10_000_000))
    connection.execute(tasks.update().values(counters=large))
    picture = read_picture(connection, NOW, Decider())
    assert [look.at_least for look in Watch().look(picture)] == [False]


def test_what_a_way_carries_is_known_without_a_plan(connection: Connection) -> None:
    assert way_of(connection, "s", "t", "acme", NOW) == 0.0
    know(connection, "s", "t", 300 * MBIT)
    assert way_of(connection, "s", "t", "acme", NOW) == 300 * MBIT
    connection.execute(limits.insert().values(scope="tenant:acme", rate_bits_per_s=100 * MBIT))
    assert way_of(connection, "s", "t", "acme", NOW) == 100 * MBIT
    assert way_of(connection, "s", "t", "other", NOW) == 300 * MBIT
