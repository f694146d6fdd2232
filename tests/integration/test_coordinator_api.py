"""The coordinator over real HTTP and TLS, on SQLite and PostgreSQL: enrolment, transfers, claims, reports, people.

One coordinator of each kind serves all tests; each has sites of its own, and its users' names are only its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from coordinators import Coordinator, Http, Lab, beat, counters, running
from support import until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
NO_DATABASE = pytest.mark.parametrize("shared_state", ["sqlite"], indirect=True)
"""For tests of what happens before the database is asked: the other one would show nothing more."""
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def coordinator(shared_state: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """The coordinator that all tests share."""
    made = Coordinator(shared_state, tmp_path_factory.mktemp("shared") / "secrets")
    with running(made):
        yield made
        assert made.stop() == 0
        assert "Traceback" not in made.log


@pytest_asyncio.fixture
async def lab(coordinator: Coordinator, tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory with the shared coordinator, whose sites have names of their own."""
    made = Lab([coordinator], tmp_path, prefix=f"t{next(_numbers)}-")
    yield made
    await made.aclose()
    assert "Traceback" not in coordinator.log


@pytest_asyncio.fixture
async def lab_of_short_leases(state: str, tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory with a coordinator of its own whose leases end soon."""
    coordinator = Coordinator(state, tmp_path / "secrets", options=("--lease-s", "2"))
    with running(coordinator):
        made = Lab([coordinator], tmp_path)
        yield made
        await made.aclose()


async def site(lab: Lab, admin: Http, name: str, **changes: Any) -> Http:
    """An agent's client, its site online."""
    agent = lab.client(certificate=await lab.enrol(admin, lab.named(name)))
    await agent("POST", "/v1/agent/heartbeat", beat(**changes))
    return agent


async def next_of(stream: AsyncIterator[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The next command of a kind; others, such as to look at links to other tests' sites, may come before."""
    async with asyncio.timeout(60):
        while (command := await anext(stream))["type"] != kind:
            pass
    return command


async def claim(agent: Http, count: int = 4) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = (await agent("POST", "/v1/agent/claim", {"boot": "boot", "count": count}))[
        "tasks"
    ]
    return tasks


async def report(
    agent: Http, task: dict[str, Any], seq: int, state: str, expect: int = 200, **changes: Any
) -> Any:
    said = {"fence": task["fence"], "seq": seq, "state": state, "counters": counters(10, 10)} | changes
    return await agent("POST", f"/v1/agent/tasks/{task['task']}/reports", said, expect=expect)


async def test_a_copy_from_the_request_to_the_receipt(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    stream = target.stream("/v1/agent/events")
    assert (await anext(stream))["type"] == "hello"
    made = await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"), expect=201)
    assert (made["state"], made["tasks"][0]["state"]) == ("requested", "waiting")
    await next_of(stream, "work")
    await stream.aclose()
    (task,) = await claim(target)
    assert (task["role"], task["peer_address"], task["lease_s"]) == ("target", "127.0.0.1:1", 300)
    assert await claim(target) == []
    landed = [{"seq": 0, "target": lab.named("b"), "path": "x", "size_bytes": 10}]
    reply = await report(target, task, 1, "running", landed=landed, bottleneck="disk", rate_bits_per_s=8e6)
    assert reply["directive"] == "go"
    why = await admin("GET", f"/v1/transfers/{made['id']}/why")
    assert why["line"] == f"it moves at 1.00 MB/s; to {lab.named('b')} the bottleneck is disk"
    again = await report(target, task, 1, "running", landed=landed)
    assert again["directive"] == "go"
    assert (await report(target, task, 2, "done", receipt="UmVjZWlwdA=="))["directive"] == "stop"
    assert (await report(target, task, 2, "done"))["directive"] == "stop"
    ended = await admin("GET", f"/v1/transfers/{made['id']}?wait_s=5")
    assert (ended["state"], ended["counters"]["bytes_done"]) == ("completed", 10)
    rows = await admin("GET", f"/v1/transfers/{made['id']}/landed")
    assert [(row["seq"], row["path"]) for row in rows["items"]] == [(1, "x")]
    events = (await admin("GET", f"/v1/events?transfer={made['id']}"))["items"]
    assert [event["type"] for event in events] == [
        "transfer.requested", "task.claimed", "transfer.started", "task.done", "transfer.completed",
    ]  # fmt: skip


async def test_a_lease_that_ends_gives_the_task_to_the_next_with_a_higher_fence(
    lab_of_short_leases: Lab,
) -> None:
    lab = lab_of_short_leases
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    made = await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"))
    (first,) = await claim(target)
    again = await until(lambda: claim(target), "the task to be given again")
    assert again[0]["fence"] > first["fence"]
    refused = await report(target, first, 1, "running", expect=409)
    assert refused["reason"] == "fence-superseded"
    await report(target, again[0], 1, "done")
    kinds = [
        e["type"] for e in (await admin("GET", f"/v1/events?transfer={made['id']}&types=task."))["items"]
    ]
    assert kinds == ["task.claimed", "task.expired", "task.claimed", "task.done"]


async def test_failures_are_tried_again_and_then_end_the_transfer(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    made = await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"))
    (task,) = await claim(target)
    await report(target, task, 1, "failed", reason="disconnected", message="the link broke", retryable=True)
    assert await claim(target) == []  # a pause before the next attempt
    again = await until(lambda: claim(target), "the task to be given again")
    await report(target, again[0], 1, "failed", reason="integrity", message="a chunk is rotten")
    ended = await admin("GET", f"/v1/transfers/{made['id']}?wait_s=5")
    assert (ended["state"], ended["reason"], ended["message"]) == (
        "terminated",
        "integrity",
        "a chunk is rotten",
    )
    retried = await admin("POST", f"/v1/transfers/{made['id']}/retry")
    assert retried["state"] in ("requested", "started")
    (third,) = await claim(target)
    await report(target, third, 1, "done")
    assert (await admin("GET", f"/v1/transfers/{made['id']}"))["state"] == "completed"


async def test_pause_resume_and_cancel_reach_the_agent(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    made = await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"))
    (task,) = await claim(target)
    stream = target.stream("/v1/agent/events")
    await next_of(stream, "hello")
    assert (await admin("POST", f"/v1/transfers/{made['id']}/pause"))["state"] == "suspended"
    told = await next_of(stream, "task")
    assert (told["directive"], told["task"]) == ("pause", task["task"])
    assert (await report(target, task, 1, "running"))["directive"] == "pause"
    await report(target, task, 2, "released")
    assert await claim(target) == []
    assert (await admin("POST", f"/v1/transfers/{made['id']}/resume"))["state"] == "started"
    (again,) = await claim(target)
    assert (await admin("POST", f"/v1/transfers/{made['id']}/cancel"))["state"] == "terminated"
    told = await next_of(stream, "task")
    assert (told["directive"], told["fence"]) == ("stop", again["fence"])
    await stream.aclose()
    assert (await report(target, again, 1, "running"))["directive"] == "stop"
    await admin("POST", f"/v1/transfers/{made['id']}/pause", expect=409)


async def test_one_writer_per_overlapping_target_path(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    first = await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"))
    second = await admin("POST", "/v1/transfers", lab.copy("a:/d/z", "b:/d/y/deep"))
    third = await admin("POST", "/v1/transfers", lab.copy("a:/d/z", "b:/d/yy"))
    given = await claim(target)
    assert [task["transfer"] for task in given] == [first["id"], third["id"]]

    async def waits_of_second() -> Any:
        return (await admin("GET", f"/v1/transfers/{second['id']}/why"))["waits"]

    waits = await until(waits_of_second, "the wait to have a name")
    assert waits[0]["name"] == "target-path"
    assert first["id"] in waits[0]["text"]
    await report(target, given[0], 1, "done")
    assert [task["transfer"] for task in await claim(target)] == [second["id"]]


async def test_who_dials_and_no_route(lab: Lab) -> None:
    admin = lab.admin()
    inside = await site(lab, admin, "inside", addresses=[])
    target = await site(lab, admin, "b")
    await site(lab, admin, "other", addresses=[])
    await admin("POST", "/v1/transfers", lab.copy("inside:/d/x", "b:/d/y"))
    assert await claim(target) == []
    (task,) = await claim(inside)
    assert (task["role"], task["peer_address"]) == ("source", "127.0.0.1:1")
    # The target listens: its word ends the task, the holder's own "done" does not.
    await report(inside, task, 1, "done")
    assert (await admin("GET", f"/v1/transfers/{task['transfer']}"))["state"] == "started"
    await report(target, task, 1, "done")
    assert (await admin("GET", f"/v1/transfers/{task['transfer']}"))["state"] == "completed"
    refused = await admin("POST", "/v1/transfers", lab.copy("inside:/d/x", "other:/d/y"), expect=409)
    assert refused["reason"] == "no-route"


async def test_a_key_makes_one_of_two_requests(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    await site(lab, admin, "b")
    user = await lab.user(admin, "kay", "keys")
    body = lab.copy("a:/d/x", "b:/d/y")
    one, two = await asyncio.gather(
        user("POST", "/v1/transfers", body, key="k1"), user("POST", "/v1/transfers", body, key="k1")
    )
    assert one == two
    await user("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/z"), key="k1", expect=409)
    token = await user("POST", "/v1/tokens", {}, key="k2")
    assert await user("POST", "/v1/tokens", {}, key="k2") == token  # kept sealed
    assert len((await user("GET", "/v1/transfers"))["items"]) == 1


async def test_roles_see_and_do_what_is_theirs(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    await site(lab, admin, "b")
    alice = await lab.user(admin, "alice", "physics")
    bob = await lab.user(admin, "bob", "biology")
    watcher = await lab.user(admin, "watcher", "default", "auditor")
    made = await alice("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"))
    await bob("GET", f"/v1/transfers/{made['id']}", expect=404)
    await bob("POST", f"/v1/transfers/{made['id']}/cancel", expect=404)
    assert (await bob("GET", "/v1/transfers"))["items"] == []
    assert (await bob("GET", "/v1/events"))["items"] == []
    seen = (await watcher("GET", "/v1/transfers?limit=1000"))["items"]
    assert [item["id"] for item in seen if item["user"] == "alice"] == [made["id"]]
    await watcher("POST", f"/v1/transfers/{made['id']}/cancel", expect=403)
    await alice("POST", "/v1/users", {"name": "eve"}, expect=403)
    await alice("PUT", f"/v1/limits/site:{lab.named('a')}", {"rate_bits_per_s": 1}, expect=403)
    await admin("PATCH", "/v1/users/alice", {"disabled": True})
    await alice("GET", "/v1/me", expect=401)
    await admin("PATCH", "/v1/users/admin", {"role": "user"}, expect=409)


async def test_quotas_hold_the_queue_and_the_running(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    await admin("POST", "/v1/tenants", {"name": "small", "max_running": 1, "max_queued": 2})
    user = await lab.user(admin, "carol", "small")
    for number in range(2):
        await user("POST", "/v1/transfers", lab.copy("a:/d/x", f"b:/d/{number}"))
    refused = await user("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/9"), expect=429)
    assert refused["reason"] == "quota"
    assert len(await claim(target)) == 1
    tenant = next(t for t in (await admin("GET", "/v1/tenants"))["items"] if t["name"] == "small")
    assert (tenant["running"], tenant["queued"]) == (1, 1)


async def test_removing_a_site_ends_its_right_at_once(lab: Lab) -> None:
    admin = lab.admin()
    agent = await site(lab, admin, "a")
    other = await site(lab, admin, "b")
    path = f"/v1/sites/{lab.named('a')}"
    serial = (await admin("GET", path))["certificate"]["serial"]
    stream = other.stream("/v1/agent/events")
    await next_of(stream, "hello")
    await admin("DELETE", path, expect=204)
    assert await next_of(stream, "revocations") == {"type": "revocations", "revoked": [serial]}
    await stream.aclose()
    refused = await agent("POST", "/v1/agent/claim", {"boot": "b", "count": 1}, expect=401)
    assert refused["reason"] == "certificate-revoked"
    await admin("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"), expect=404)
    assert (await admin("GET", path))["state"] == "revoked"
    again = await site(lab, admin, "a")  # with a new token and a new key
    assert await claim(again) == []


async def test_join_tokens_work_once(lab: Lab) -> None:
    from flowengine.trust.certificates import make_key, make_request

    admin, nobody = lab.admin(), lab.client()
    token = (await admin("POST", "/v1/join-tokens", {"site": lab.named("a")}))["token"]
    body = {"token": token, "request_pem": make_request(make_key(os.urandom))}
    await nobody("POST", "/v1/agent/join", body)
    refused = await nobody("POST", "/v1/agent/join", body, expect=401)
    assert refused["reason"] == "authentication"
    await nobody("POST", "/v1/agent/join", body | {"token": "flowj_x"}, expect=401)


@NO_DATABASE
async def test_a_folder_is_asked_for_live(lab: Lab) -> None:
    admin = lab.admin()
    agent = await site(lab, admin, "a")
    stream = agent.stream("/v1/agent/events")
    await next_of(stream, "hello")
    asking = asyncio.create_task(admin("GET", f"/v1/sites/{lab.named('a')}/files?path=/d"))
    look = await next_of(stream, "look")
    assert look["path"] == "/d"
    await agent("POST", f"/v1/agent/answers/{look['id']}", {"entries": [["x", "file", 5, 10**18]]})
    entries = (await asking)["entries"]
    await stream.aclose()
    assert [(entry["name"], entry["size_bytes"]) for entry in entries] == [("x", 5)]
    await agent("POST", f"/v1/agent/answers/{look['id']}", {}, expect=404)


async def test_limits_reach_agents_and_links_give_estimates(lab: Lab) -> None:
    admin = lab.admin()
    agent = await site(lab, admin, "a")
    await site(lab, admin, "b")
    a, b, c = map(lab.named, "abc")
    stream = agent.stream("/v1/agent/events")
    await next_of(stream, "hello")
    await admin("PUT", f"/v1/limits/site:{a}", {"rate_bits_per_s": 4000000})
    told = await next_of(stream, "limits")
    await stream.aclose()
    assert [limit["scope"] for limit in told["limits"]] == [f"site:{a}"]
    await admin("PUT", f"/v1/links/{a}/{b}", {"capacity_bits_per_s": 8000000, "rtt_ms": 20})
    plan = await admin("POST", "/v1/plans", {"request": lab.copy("a:/d/x", "b:/d/y"), "size_bytes": 5000000})
    assert (plan["permitted"], plan["rate_bits_per_s"]) == (True, 4e6)
    assert 10 <= plan["duration_s"] < 30  # from the moment it was asked
    assert plan["binds"][0].startswith(f"what may leave site {a} is full")
    assert await admin("GET", f"/v1/plans/{plan['id']}") == plan
    await admin("DELETE", f"/v1/limits/site:{a}", expect=204)
    await admin("DELETE", f"/v1/limits/site:{a}", expect=404)
    # Storage is limited by what holds it; of a site that has not come yet nobody knows what it offers.
    await admin("PUT", f"/v1/limits/write:{b}:%2Fd", {"rate_bits_per_s": 2000000})
    plan = await admin("POST", "/v1/plans", {"request": lab.copy("a:/d/x", "b:/d/y"), "size_bytes": 5000000})
    assert plan["binds"][0].startswith(f"writing to {b}:/d is full")
    await admin("PUT", f"/v1/limits/read:{b}:%2Fe", {"rate_bits_per_s": 2000000}, expect=404)
    await admin("POST", "/v1/join-tokens", {"site": c}, expect=201)
    await admin("PUT", f"/v1/limits/read:{c}:%2Fe", {"rate_bits_per_s": 2000000})


@NO_DATABASE
async def test_a_user_cannot_take_all_streams(lab: Lab) -> None:
    admin = lab.admin()
    dora = await lab.user(admin, "dora", "physics")
    agent = await site(lab, admin, "a")
    headers = {"Accept": "text/event-stream"}
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(dora.request("GET", "/v1/events", headers=headers))
        assert (await dora.raw("GET", "/v1/events", headers=headers))[0] == 503
        async with asyncio.timeout(60):
            for other in (admin.stream("/v1/events?after=0"), agent.stream("/v1/agent/events")):
                await anext(other)
                await other.aclose()


async def test_a_stream_ends_with_the_right_to_it(lab: Lab) -> None:
    admin = lab.admin()
    erin = await lab.user(admin, "erin", "physics", "auditor")
    token = next(t["id"] for t in (await erin("GET", "/v1/tokens"))["items"] if t["user"] == "erin")
    seen = []
    async with asyncio.timeout(60):
        stream = erin.stream("/v1/events?after=0&types=token.,site.")
        seen.append(await anext(stream))
        await admin("DELETE", f"/v1/tokens/{token}")
        await admin("POST", "/v1/sites", {"name": lab.named("secret")})
        seen += [event async for event in stream]
    assert lab.named("secret") not in [event["site"] for event in seen]
    frank = await lab.user(admin, "frank", "physics", "auditor")
    async with asyncio.timeout(60):
        stream = frank.stream("/v1/events?after=0&types=token.")
        await anext(stream)
        await admin("PATCH", "/v1/users/frank", {"role": "user"})
        assert {event["type"] async for event in stream} <= {"token.created", "token.removed"}  # and ends


async def test_types_of_events_that_there_are_not_are_refused_at_once(lab: Lab) -> None:
    admin = lab.admin()
    for accept in ("application/json", "text/event-stream"):
        for types, meant in (
            ("nosuch", "there are agreement, approval, "),
            ("task.don,tranfser.", "did you mean transfer"),
            ("task.complete", "there are task.adopted, task.claimed, "),
        ):
            path = f"/v1/events?types={types}&after=0"
            async with asyncio.timeout(60):
                status, _, content = await admin.raw("GET", path, headers={"Accept": accept})
            refused = json.loads(content)
            assert (status, refused["reason"], refused["retryable"]) == (400, "usage", False)
            assert repr(types.rpartition(",")[2]) in refused["detail"]
            assert meant in refused["hint"]
    assert "items" in await admin("GET", "/v1/events?types=transfer,task.don,,token.created&after=0")


async def test_users_follow_events_without_a_gap(lab: Lab) -> None:
    admin = lab.admin()
    await site(lab, admin, "a")
    target = await site(lab, admin, "b")
    user = await lab.user(admin, "grace", "following")
    stream = user.stream("/v1/events?after=0&types=transfer.,task.")
    seen: list[dict[str, Any]] = []

    async def follow() -> None:
        async for event in stream:
            seen.append(event)
            if event["type"] == "transfer.completed":
                return

    following = asyncio.create_task(follow())
    async with asyncio.timeout(60):
        made = await user("POST", "/v1/transfers", lab.copy("a:/d/x", "b:/d/y"), key="one")
        (task,) = await claim(target)
        await report(target, task, 1, "done")
        await following
    await stream.aclose()
    kinds = [event["type"] for event in seen if event["transfer"] == made["id"]]
    assert kinds[-4:] == ["task.claimed", "transfer.started", "task.done", "transfer.completed"]
    seqs = [event["seq"] for event in seen]
    assert seqs == sorted(set(seqs))
    last = user.stream("/v1/events", last=str(seqs[-2]))
    assert (await anext(last))["seq"] == seqs[-1]
    await last.aclose()


JSON = {"headers": {"Content-Type": "application/json"}}
BROKEN: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/v1/nothing", {}, 404, "not-found"),
    ("PUT", "/v1/sites", {}, 405, "wrong-method"),
    ("GET", "/v1/sites?limit=0", {}, 400, "usage"),
    ("GET", "/v1/sites?after=%00&x=1", {}, 400, "usage"),
    ("GET", "/v1/sites/UPPER", {}, 400, "usage"),
    ("GET", "/v1/events?after=now", {}, 400, "usage"),
    ("POST", "/v1/transfers", {"data": b"{"}, 415, "wrong-media-type"),
    ("POST", "/v1/transfers", {"data": b"{", **JSON}, 400, "usage"),
    ("POST", "/v1/transfers", {"data": b"\xff" * 10, **JSON}, 400, "usage"),
    ("POST", "/v1/transfers", {"data": b"[" * 100000, **JSON}, 400, "usage"),
    ("POST", "/v1/transfers", {"data": b" " * (1 << 21), **JSON}, 413, "too-large"),
    ("POST", "/v1/transfers", {"json": {"source": {"site": "a", "path": "/x", "y": 1}}}, 400, "usage"),
    ("POST", "/v1/agent/claim", {"json": {"boot": "b", "count": 1}}, 401, "authentication"),
]


async def test_every_error_is_a_problem(lab: Lab) -> None:
    admin = lab.admin()
    for method, path, given, status, reason in BROKEN:
        # A large body goes as a file, which is read once.
        options = given | (
            {"data": io.BytesIO(given["data"])} if len(given.get("data", b"")) > 1 << 20 else {}
        )
        found, headers, body = await admin.raw(method, path, **options)
        problem = json.loads(body)
        assert (found, problem["status"], problem["reason"]) == (status, status, reason), path
        assert headers["Content-Type"].startswith("application/problem+json")


@NO_DATABASE
async def test_what_is_no_http_is_answered_as_a_problem(lab: Lab) -> None:
    import ssl

    context = ssl.create_default_context(cafile=str(lab.ca))
    reader, writer = await asyncio.open_connection("127.0.0.1", lab.coordinators[0].port, ssl=context)
    writer.write(b"GARBAGE \x01\x02\r\n\r\n")
    answer = await reader.read()
    writer.transport.abort()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 400 " in head.splitlines()[0]
    assert json.loads(body)["reason"] == "usage"


@NO_DATABASE
async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault(lab: Lab) -> None:
    """The fixture finds no traceback in the log."""
    import ssl

    context = ssl.create_default_context(cafile=str(lab.ca))
    token = lab.coordinators[0].login().token.format_secret()
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", lab.coordinators[0].port, ssl=context)
        head = f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
        writer.write(f"POST /v1/transfers HTTP/1.1\r\nHost: x\r\n{head}\r\n{{".encode())
        await writer.drain()
        await lab.admin()("GET", "/v1/health")  # by now it is waiting for the rest
        writer.transport.abort()
    await lab.admin()("GET", "/v1/health")
