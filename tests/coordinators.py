"""Real coordinator processes for tests, users over HTTP, and agents that speak the real interface and make up the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import forked
from support import environment, free_port, is_listening, until

from flowengine.trust.certificates import make_key, make_request
from flowengine.trust.tokens import Login

READY_S = 60
ROOTS = [{"name": "/d", "access": "read-write"}]


@dataclass
class Coordinator:
    """`flow coordinator run` as a process."""

    state: str
    secrets: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    process: forked.Program | subprocess.Popen[str] | None = None
    executed: bool = False
    """Never a fork of what has loaded its modules: where its memory is judged."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> Coordinator:
        words = [sys.executable, "-m", "flowengine.cli.main", "coordinator", "run", "--state", self.state]
        words += ["--secrets", str(self.secrets), "--listen", f"127.0.0.1:{self.port}", *self.options]
        self.secrets.parent.mkdir(parents=True, exist_ok=True)
        with open(self.secrets.parent / f"coordinator-{self.port}.log", "a", encoding="utf-8") as log:
            if not self.executed:
                self.process = forked.start(words, environment(), text=True, stderr=log)
            if self.process is not None:
                self.process.stdin.close()
            else:
                self.process = subprocess.Popen(
                    words, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True
                )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"ready: {self.url}\n", line + self.log
        return self

    @property
    def log(self) -> str:
        return (self.secrets.parent / f"coordinator-{self.port}.log").read_text(encoding="utf-8")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._close()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        self._close()
        return code

    def _close(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def peak_bytes(self) -> tuple[int, int]:
        """The most memory that the process had, and the most that its planner's process had."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return _peak_bytes(pid), sum(_peak_bytes(int(child)) for child in children.read_text().split())

    def login(self) -> Login:
        return Login.parse((self.secrets / "admin-login").read_text(encoding="ascii"))


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextlib.contextmanager
def running(*coordinators: Coordinator) -> Iterator[None]:
    """Start them; whatever still runs at the end is stopped."""
    try:
        for coordinator in coordinators:
            coordinator.start()
        yield
    finally:
        for coordinator in coordinators:
            if coordinator.process is not None:
                coordinator.kill()


async def connections_end() -> None:
    """Let connections that were cut off while they were made end: a loop that closes sooner leaves them to the collector."""
    for _ in range(5):
        await asyncio.sleep(0)


async def cut_connections() -> None:
    """Cut what is still open in this loop, before it closes.

    An event stream that was left behind closes its TLS, and that ends when its server answers: a server that was killed
    or has no time leaves it to the collector, in whatever test runs then.
    """
    loop = asyncio.get_running_loop()
    for transport in list(loop._transports.values()):  # type: ignore[attr-defined]  # they have no other owner
        transport.abort()
    await connections_end()


class Http:
    """One client: a user by token, or an agent by certificate; tries again elsewhere while told so.

    Args:
        urls: coordinators, tried in turn.
        patience_s: how long a call is tried again when nobody answers.
    """

    def __init__(
        self,
        urls: list[str],
        ca: Path,
        token: str = "",
        certificate: Path | None = None,
        patience_s: float = 0,
    ) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        if certificate is not None:
            context.load_cert_chain(certificate)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(ssl=context, limit=0)
        )
        self._urls = list(urls)
        self._patience_s = patience_s

    async def aclose(self) -> None:
        await self._session.close()
        await connections_end()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """A request whose answer is read as it comes."""
        return self._session.request(method, self._urls[0] + path, **options)

    async def raw(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        async with self.request(method, path, **options) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    async def __call__(
        self, method: str, path: str, body: object = None, *, expect: int | None = None, key: str = ""
    ) -> Any:
        """The decoded answer; fails where its status is not as expected (by default any success)."""
        headers = {"Idempotency-Key": key} if key else {}
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                status, _, content = await self.raw(method, path, json=body, headers=headers)
                if status != 503 or time.monotonic() > deadline:
                    break
            except (aiohttp.ClientError, OSError):
                if time.monotonic() > deadline:
                    raise
            await self.elsewhere()
        answer = json.loads(content) if content else None
        good = status == expect if expect is not None else 200 <= status < 300
        assert good, f"{method} {path}: {status} {answer}"
        return answer

    async def elsewhere(self) -> None:
        """Go on at the next coordinator that listens."""

        async def found() -> bool:
            self._urls.append(self._urls.pop(0))
            return await is_listening(int(self._urls[0].rpartition(":")[2]))

        await until(found, "a coordinator that listens")

    async def follow(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """All events from the first on, each once, whatever happens to a coordinator meanwhile."""
        last = "0"
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async for event in self.stream(path, last):
                    last = str(event["seq"])
                    yield event
            await self.elsewhere()

    async def stream(self, path: str, last: str = "") -> AsyncIterator[dict[str, Any]]:
        """Events of a stream until it ends."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        async with self._session.get(
            self._urls[0] + path, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])


@dataclass
class Lab:
    """A federation of coordinators that run, one admin, and simulated sites.

    Attributes:
        prefix: what the names of its sites begin with, where several laboratories share a coordinator.
    """

    coordinators: list[Coordinator]
    folder: Path
    patience_s: float = 0
    prefix: str = ""
    clients: list[Http] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [coordinator.url for coordinator in self.coordinators]

    @property
    def ca(self) -> Path:
        return self.coordinators[0].secrets / "ca.pem"

    def named(self, site: str) -> str:
        """What a site of this laboratory is called at the coordinator."""
        return self.prefix + site

    def copy(self, source: str, *targets: str, **changes: Any) -> dict[str, Any]:
        """A transfer request for places of this laboratory's sites, written as site:/path."""
        return copy_request(self.named(source), *map(self.named, targets), **changes)

    def client(self, token: str = "", certificate: Path | None = None, urls: list[str] | None = None) -> Http:
        made = Http(urls or self.urls, self.ca, token, certificate, self.patience_s)
        self.clients.append(made)
        return made

    def admin(self) -> Http:
        return self.client(self.coordinators[0].login().token.format_secret())

    async def user(
        self, admin: Http, name: str, tenant: str, role: str = "user", weight: float = 1.0
    ) -> Http:
        """A new user of a tenant, which is made where it is missing."""
        status, _, _ = await admin.raw("POST", "/v1/tenants", json={"name": tenant, "weight": weight})
        assert status in (201, 409)
        await admin("POST", "/v1/users", {"name": name, "tenant": tenant, "role": role})
        token = await admin("POST", "/v1/tokens", {"user": name})
        return self.client(token["secret"])

    async def enrol(self, admin: Http, site: str) -> Path:
        """Join a site; its certificate and key as one file."""
        token = await admin("POST", "/v1/join-tokens", {"site": site})
        key = make_key(os.urandom)
        request = {"token": token["token"], "request_pem": make_request(key), "software": "simulated"}
        enrolled = await self.client()("POST", "/v1/agent/join", request)
        path = self.folder / f"{site}.pem"
        path.write_bytes(enrolled["certificate_pem"].encode() + key)
        return path

    async def agent(self, admin: Http, site: str, **options: Any) -> Agent:
        """A simulated agent of a new site, not yet running."""
        certificate = await self.enrol(admin, site)
        index = len(self.clients) % len(self.urls)
        urls = self.urls[index:] + self.urls[:index]
        return Agent(site, self.client(certificate=certificate, urls=urls), **options)

    async def aclose(self) -> None:
        for client in self.clients:
            await client.aclose()
        await cut_connections()


def beat(boot: str = "boot", **changes: Any) -> dict[str, Any]:
    """A heartbeat of an agent that can be reached."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    basic = {"boot": boot, "software": "simulated", "addresses": ["127.0.0.1:1"], "roots": ROOTS, "now": now}
    return basic | {"seen_fence": 0, "free_slots": 4} | changes


def counters(size: int, done: int) -> dict[str, Any]:
    """Counters of a task of one object."""
    return {
        "objects": 1, "size_bytes": size, "scan_done": True, "objects_done": int(done == size), "bytes_done": done,
        "bytes_sent": done,
    }  # fmt: skip


class Log:
    """What simulated agents did: (moment, site, task, fence, what) of every task that was begun and ended."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, str, str, int, str]] = []
        self._grown = asyncio.Event()

    def add(self, site: str, task: str, fence: int, what: str) -> None:
        self.entries.append((time.monotonic(), site, task, fence, what))
        self._grown.set()

    async def wait_for(self, count: int) -> None:
        """Until so many things were done."""
        while len(self.entries) < count:
            self._grown.clear()
            await self._grown.wait()


class Agent:
    """A site's agent without a data path: heartbeats, claims, reports, and keeps a log of what it held.

    Args:
        log: where it writes what it does.
        step_s: what a step of a task takes; each ends with a report.
    """

    def __init__(
        self,
        site: str,
        http: Http,
        *,
        log: Log | None = None,
        slots: int = 4,
        size: int = 1 << 20,
        step_s: float = 0.05,
        steps: int = 2,
        rng: random.Random | None = None,
        fail_one_in: int = 0,
    ) -> None:
        self.site, self.http = site, http
        self.log = log or Log()
        self.boot = uuid.uuid4().hex
        self.holding: dict[str, int] = {}
        self.seen_fence = 0
        self._slots, self._size, self._step_s, self._steps = slots, size, step_s, steps
        self._rng = rng or random.Random(site)
        self._fail_one_in = fail_one_in
        self._work = asyncio.Event()

    async def heartbeat(self) -> dict[str, Any]:
        said = beat(self.boot, holding=self.holding, seen_fence=self.seen_fence)
        answer: dict[str, Any] = await self.http("POST", "/v1/agent/heartbeat", said)
        return answer

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._beat())
            while True:
                await self._work.wait()
                self._work.clear()
                free = self._slots - len(self.holding)
                if free <= 0:
                    continue
                claimed = await self.http("POST", "/v1/agent/claim", {"boot": self.boot, "count": free})
                for task in claimed["tasks"]:
                    # Where the lease ended while nobody answered its reports it may be given the same task again.
                    before = self.holding.get(task["task"], 0)
                    assert task["fence"] > before, "the same task was given twice under one fence"
                    self.holding[task["task"]] = task["fence"]
                    self.seen_fence = max(self.seen_fence, task["fence"])
                    self._note(task, "begin")
                    group.create_task(self._move(task))

    def _note(self, task: dict[str, Any], what: str) -> None:
        self.log.add(self.site, task["task"], task["fence"], what)

    async def _listen(self) -> None:
        while True:
            try:
                async for command in self.http.stream("/v1/agent/events"):
                    if command["type"] in ("hello", "work"):
                        self._work.set()
            except (aiohttp.ClientError, OSError, AssertionError):
                pass
            await self.http.elsewhere()

    async def _beat(self) -> None:
        while True:
            await self.heartbeat()
            self._work.set()
            await asyncio.sleep(2)

    async def _move(self, task: dict[str, Any]) -> None:
        try:
            for step in range(1, self._steps + 1):
                await asyncio.sleep(self._step_s)
                state = "done" if step == self._steps else "running"
                if state == "done" and self._fail_one_in and self._rng.randrange(self._fail_one_in) == 0:
                    state = "failed"
                moved = self._size * step // self._steps
                said = {
                    "fence": task["fence"], "seq": step, "state": state, "retryable": True,
                    "reason": "disconnected" if state == "failed" else "", "counters": counters(self._size, moved),
                    "rate_bits_per_s": 1e6,
                }  # fmt: skip
                if state == "done":
                    said["landed"] = [{"seq": 0, "target": self.site, "path": "x", "size_bytes": self._size}]
                path = f"/v1/agent/tasks/{task['task']}/reports"
                deadline = time.monotonic() + 60
                while True:
                    status, _, body = await self._report(path, said)
                    if status != 503 or time.monotonic() > deadline:
                        break
                if status == 409:
                    self._note(task, "lost")
                    return
                assert status == 200, body
                if json.loads(body)["directive"] == "stop" and state == "running":
                    self._note(task, "stopped")
                    return
            self._note(task, state)
        finally:
            if self.holding.get(task["task"]) == task["fence"]:
                del self.holding[task["task"]]
            self._work.set()

    async def _report(self, path: str, said: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        try:
            return await self.http.raw("POST", path, json=said)
        except (aiohttp.ClientError, OSError):
            await self.http.elsewhere()
            return 503, {}, b""


def copy_request(source: str, *targets: str, **changes: Any) -> dict[str, Any]:
    """A transfer request for places written as site:/path."""

    def place(text: str) -> dict[str, str]:
        site, _, path = text.partition(":")
        return {"site": site, "path": path}

    return {"source": place(source), "targets": [place(target) for target in targets]} | changes
