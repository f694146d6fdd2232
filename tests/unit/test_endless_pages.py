"""Listings that never come to an end, of a coordinator that is broken or lies: they are refused, and not asked for on and on."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import structlog
import trio
from liars import PolicyKeys

from flowengine.client import Client
from flowengine.client.access import Access
from flowengine.errors import ProtocolError
from flowengine_agent.coordinator_link import CoordinatorLink
from flowengine_agent.policies import Policies
from flowengine_agent.policy_follower import PolicyFollower

POLICY = """
[policy]
id = "home"
version = "1"
title = "Stays in France"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'secret'"]
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "france"
effect = "permit"
on = ["release", "land"]
when = ["site.country is 'FR'"]
why = "Inside France"
"""
SITE = {
    "name": "paris",
    "state": "online",
    "since": "2026-11-23T00:00:00Z",
    "max_tasks": 4,
    "running_tasks": 0,
}


class Endless:
    """A coordinator's address: answers every request by its `after`, the last of the answers for ever."""

    def __init__(self, *answers: Mapping[str, object]) -> None:
        self.asked: list[str] = []
        outer = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append(parse_qs(urlsplit(self.path).query).get("after", [""])[0])
                body = json.dumps(answers[min(len(outer.asked), len(answers)) - 1]).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Endless]:
        """Answer until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.mark.parametrize(
    ("answers", "asked", "odd"),
    [
        ([{"items": [], "next": "5"}], [""], "an empty page"),
        ([{"items": [SITE], "next": "5"}, {"items": [], "next": "6"}], ["", "5"], "an empty page"),
        ([{"items": [SITE], "next": "5"}], ["", "5"], "the page that was asked for"),
    ],
)
def test_a_listing_without_an_end_is_refused(
    answers: list[Mapping[str, object]], asked: list[str], odd: str
) -> None:
    with Endless(*answers).running() as coordinator, Client(Access(coordinator.url, "t", "")) as client:
        with pytest.raises(ProtocolError, match=f"with {odd} and says that more follows") as refused:
            client.sites()
        assert "/v1/sites" in refused.value.message
        assert refused.value.hint
        assert coordinator.asked == asked


def test_a_loop_over_transfers_that_has_no_end_is_refused() -> None:
    with (
        Endless({"items": [], "next": "5"}).running() as coordinator,
        Client(Access(coordinator.url, "t", "")) as client,
    ):
        with pytest.raises(ProtocolError, match="an empty page"):
            next(iter(client.transfers()))
        assert coordinator.asked == [""]


def test_a_listing_that_ends_is_read_whole() -> None:
    pages = [{"items": [SITE], "next": "a"}, {"items": [SITE], "next": "b"}, {"items": [], "next": ""}]
    with Endless(*pages).running() as coordinator, Client(Access(coordinator.url, "t", "")) as client:
        assert len(client.sites()) == 2
        assert coordinator.asked == ["", "a", "b"]


@pytest.mark.slow
def test_an_agent_asks_for_statements_that_never_come_with_a_pause(tmp_path: Path) -> None:
    keys = PolicyKeys()
    policies = Policies(str(tmp_path / "p"), {role: [key.public_key()] for role, key in keys.roles.items()})
    policies.take(keys.bundle({"home.toml": POLICY}, 1), time.time())
    told: list[tuple[int, str]] = []
    rechecks: list[str] = []

    async def main(coordinator: Endless) -> None:
        link = CoordinatorLink([coordinator.url], ssl.create_default_context())
        heard = trio.Event()

        def note(_: object, method: str, event: dict[str, Any]) -> str:
            told.append((len(coordinator.asked), f"{method} {event['event']}: {event['why']}"))
            heard.set()
            raise structlog.DropEvent

        log = structlog.wrap_logger(None, processors=[note])
        gate = SimpleNamespace(policies=policies)
        follower = PolicyFollower(gate, link, log, lambda: None, rechecks.append)  # type: ignore[arg-type]
        follower.told(1, 7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.run)
            await heard.wait()
            nursery.cancel_scope.cancel()
        await link.aclose()

    with Endless({"statements": [], "last": False}).running() as coordinator:
        trio.run(main, coordinator)
    ((asked, why),) = told
    assert asked == 1, "it asks once, and says so before it asks again"
    assert why.startswith(
        "warning policies not fetched: the coordinator says that statements follow behind 0"
    )
    assert rechecks == []
    assert policies.labels_heard == 0
    policies.close()
