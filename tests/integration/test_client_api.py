"""The Python API against a real coordinator and real agents: plain Python, asyncio and trio."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from federations import Local, local_federation

import flowengine
from flowengine.api.sites import SiteRequest
from flowengine.api.transfers import Endpoint, TransferRequest
from flowengine.client import AsyncClient, AsyncTransfer
from flowengine.errors import NotFound, TemporaryError, UsageError

pytestmark = pytest.mark.slow

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    base = tmp_path_factory.mktemp("federation")
    with local_federation(base, {"a": 'facts = { country = "DE" }', "b": "", "c": ""}) as running:
        fill(running.data("a") / "set", 20)
        yield running


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"f{number:03d}").write_bytes(f"object {number}\n".encode() * 100)


def run(backend: str, main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend=backend)


@contextlib.asynccontextmanager
async def waiting_transfer(client: AsyncClient, target: str) -> Any:
    """A transfer that waits as long as the block lasts: its target drains."""
    await client.change_site(target, SiteRequest(draining=True))
    transfer = await client.copy("a:/data/set/", f"{target}:/data/waits-{anyio.current_time()}/")
    try:
        yield transfer
    finally:
        await client.change_site(target, SiteRequest(draining=False))


@BACKENDS
def test_copy_landed_wait(local: Local, backend: str) -> None:
    async def main() -> None:
        async with local.client() as client:
            transfer = await client.copy(
                "a:/data/set/",
                [f"b:/data/{backend}", f"c:/data/{backend}"],
                labels=["weather"],
                contracts=["dua-7"],
                priority="high",
                deadline=timedelta(hours=1),
            )
            landed = [(item.target, item.path) async for item in transfer.landed()]
            record = await transfer.wait()
            assert record.state == "completed"
            assert (record.request.labels, record.request.priority) == (["weather"], "high")
            assert record.request.contracts == ["dua-7"]
            assert sorted(landed) == sorted((site, f"f{n:03d}") for site in "bc" for n in range(20))
            assert (record.counters.objects, record.counters.objects_done) == (40, 40)
            again = await (await client.copy("a:/data/set/", f"b:/data/{backend}")).wait()
            assert again.counters.objects_unchanged == 20
            verified = await (await client.verify("a:/data/set/", f"b:/data/{backend}")).wait()
            assert verified.state == "completed"
            assert transfer.id in [
                record.id async for record in client.transfers(state="completed", site="c")
            ]

    run(backend, main)
    assert (local.data("b") / backend / "f007").read_bytes() == (local.data("a") / "set/f007").read_bytes()


def test_plain_python(local: Local) -> None:
    with local.client() as client:
        transfer = client.sync("a:/data/set/", "b:/data/plain", delete=True)
        assert sorted(item.path for item in transfer.landed()) == [f"f{n:03d}" for n in range(20)]
        assert transfer.wait().state == "completed"
        assert transfer.ended
        assert next(client.transfers()).id == transfer.id
        assert [entry.name for entry in client.ls("b:/data/plain").entries] == [
            f"f{n:03d}" for n in range(20)
        ]
        assert {site.name: site.state for site in client.sites()} == dict.fromkeys("abc", "online")
        assert client.site("a").facts["country"].value == "DE"
        assert client.me().role == "admin"
        assert client.plan("a:/data/set", "b:/data/x").permitted
        assert transfer.why().state == "completed"


async def _in_a_running_loop(local: Local) -> None:
    client = local.client()
    assert client.copy("a:/data/set/", "b:/data/notebook").wait().state == "completed"
    client.close()
    with pytest.raises(UsageError, match="closed"):
        client.me()


def test_the_synchronous_client_works_inside_a_running_loop(local: Local) -> None:
    asyncio.run(_in_a_running_loop(local))
    run("trio", lambda: _in_a_running_loop(local))


def test_threads_share_a_client(local: Local) -> None:
    names: list[str] = []
    with local.client() as client:
        threads = [threading.Thread(target=lambda: names.append(client.me().name)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert names == ["admin"] * 8


@BACKENDS
def test_cancelling_a_wait_leaves_the_transfer_running_and_cancel_ends_it(local: Local, backend: str) -> None:
    async def main() -> None:
        async with local.client() as client, waiting_transfer(client, "b") as transfer:
            with anyio.move_on_after(0.3) as scope:
                await transfer.wait()
            assert scope.cancelled_caught
            with pytest.raises(TemporaryError, match="goes on") as caught:
                await transfer.wait(timeout_s=0.1)
            assert caught.value.reason == "timeout"
            record = await transfer.refresh()
            assert record.state in ("requested", "started")
            await transfer.cancel()
            with pytest.raises(flowengine.FlowError) as failed:
                await transfer.wait()
            assert failed.value.reason == "cancelled"
            with pytest.raises(flowengine.FlowError, match="terminated"):
                [item async for item in transfer.landed()]

    run(backend, main)


@BACKENDS
def test_pause_and_resume(local: Local, backend: str) -> None:
    async def main() -> None:
        async with local.client() as client, waiting_transfer(client, "c") as transfer:
            assert (await transfer.pause()).state == "suspended"
            assert "pause" in (await transfer.why()).line
            await transfer.resume()
            await client.change_site("c", SiteRequest(draining=False))
            assert (await transfer.wait(timeout_s=90)).state == "completed"

    run(backend, main)


@BACKENDS
def test_events_follow_a_transfer(local: Local, backend: str) -> None:
    async def main() -> list[str]:
        async with local.client() as client:
            transfer = await client.copy("a:/data/set/f001", f"b:/data/events-{backend}/")
            seen: list[str] = []
            async with client.events(after=0, transfer=transfer.id, types=["transfer"]) as events:
                async for event in events:
                    assert event.transfer == transfer.id
                    seen.append(event.type)
                    if event.type == "transfer.completed":
                        return seen
            raise AssertionError("the stream ended by itself")

    seen = run(backend, main)
    assert seen[0] == "transfer.requested"


@BACKENDS
def test_loops_may_be_left_at_any_point(local: Local, backend: str) -> None:
    async def main() -> None:
        async with local.client() as client:
            transfer = await client.copy("a:/data/set/", f"c:/data/left-{backend}")
            async for _ in transfer.landed():
                break
            async for _ in client.transfers():
                break
            async for _ in client.events(after=0):
                break
            await transfer.wait()

    run(backend, main)
    with local.client() as client:
        for _ in client.events(after=0):
            break


@BACKENDS
def test_errors_keep_the_coordinators_reason(local: Local, backend: str) -> None:
    async def main() -> None:
        async with local.client() as client:
            with pytest.raises(NotFound) as caught:
                await client.transfer("t-0000000000")
            assert caught.value.hint
            with pytest.raises(NotFound):
                await client.copy("a:/data/set", "nowhere:/data")
            with pytest.raises(UsageError):
                await client.copy("a:/data/set", [])

    run(backend, main)


def test_the_same_key_gives_the_same_transfer(local: Local) -> None:
    request = TransferRequest(
        source=Endpoint(site="a", path="/data/set/"), targets=[Endpoint(site="b", path="/data/key")]
    )
    with local.client() as client:
        first = client.submit(request, key="once")
        assert client.submit(request, key="once").id == first.id
        request.purpose = "another"
        with pytest.raises(flowengine.FlowError) as caught:
            client.submit(request, key="once")
        assert caught.value.reason == "conflict"
        first.wait()


def test_what_failed_is_told(local: Local) -> None:
    with local.client() as client:
        transfer = client.copy("a:/data/not-there", "b:/data/x")
        with pytest.raises(flowengine.FlowError) as caught:
            transfer.wait()
        assert caught.value.reason == "not-found"


COPIES = 12
MOST_QUESTIONS = 150
"""In the time of so many small questions to the coordinator a copy is over, on whatever machine: nothing waits for a clock
that ticks."""


def test_a_small_copy_is_quick(local: Local) -> None:
    """How long a one-file copy between two sites takes, from the call to its end."""
    took, asked = [], []
    with local.client() as client:
        for number in range(COPIES):
            (local.data("a") / f"{number}").write_text(f"one small file, number {number}")
            begin = time.perf_counter()
            client.copy(f"a:/data/{number}", f"b:/data/quick/{number}").wait()
            took.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            client.me()
            asked.append(time.perf_counter() - begin)
    assert (local.data("b") / f"quick/{COPIES - 1}").read_text().endswith(f"{COPIES - 1}")
    quickest, usual = min(took) / min(asked), statistics.median(took) / statistics.median(asked)
    shown = f"{min(took) * 1e3:.0f} ms at best: {quickest:.0f} questions, {usual:.0f} in the median"
    print(shown)
    assert quickest < MOST_QUESTIONS, shown
    assert usual < MOST_QUESTIONS, shown


def test_the_types_of_both_faces_agree() -> None:
    """Every public method of one face is there on the other."""
    for one, other in ((flowengine.Client, AsyncClient), (flowengine.Transfer, AsyncTransfer)):
        names = [
            {name for name in vars(kind) if not name.startswith("_")} - {"close", "aclose", "record"}
            for kind in (one, other)
        ]
        assert names[0] == names[1]
