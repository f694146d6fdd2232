"""Follows what the coordinator has in force: fetches newer bundles and label statements, and says what it has.

The coordinator only carries them: a bundle counts by its two signatures, a statement by its owner's. What cannot be
taken is said in the next heartbeat, and does not stop what is in force.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio

from flowengine.api.agents import AgentLabels
from flowengine.api.policies import PolicyBundleContent
from flowengine.errors import FlowError, ProtocolError
from flowengine.policy.bundle import MAX_BUNDLE_BYTES
from flowengine_agent.coordinator_link import CoordinatorLink
from flowengine_agent.gate import Gate
from flowengine_agent.logs import Log

__all__ = ["PolicyFollower"]

_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 30.0


class PolicyFollower:
    """Brings the gate's policies to what the coordinator says is in force.

    Args:
        changed: called when there is news for the coordinator: a heartbeat should follow.
        recheck: called with what changed ("bundle", "label"): what runs is decided again.
    """

    def __init__(
        self,
        gate: Gate,
        link: CoordinatorLink,
        log: Log,
        changed: Callable[[], None],
        recheck: Callable[[str], None],
    ) -> None:
        self._gate = gate
        self._link = link
        self._log = log
        self._changed = changed
        self._recheck = recheck
        self._bundle = 0
        self._labels = 0
        self._refused = 0
        self._news = trio.Event()

    def told(self, bundle: int, labels: int) -> None:
        """The coordinator says which version is in force and which statement is the last."""
        if (bundle, labels) != (self._bundle, self._labels):
            self._bundle, self._labels = bundle, labels
            self._news.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        pause = _FIRST_PAUSE_S
        while True:
            await self._news.wait()
            self._news = trio.Event()
            if not self._gate.policies.takes_bundles:
                continue
            try:
                await self._catch_up()
                pause = _FIRST_PAUSE_S
            except FlowError as error:
                self._log.warning("policies not fetched", why=error.message)
                await trio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)
                self._news.set()

    async def _catch_up(self) -> None:
        policies = self._gate.policies
        before = policies.described()
        wanted = self._bundle
        if wanted > policies.version or (wanted == policies.version and wanted and policies.in_force is None):
            if wanted != self._refused:
                await self._take_bundle(wanted)
        elif wanted < policies.version:
            policies.problem = (
                f"the coordinator offers version {wanted}, {policies.version} was in force here: not taken"
            )
        if policies.in_force is not None:
            await self._take_labels()
        if policies.described() != before:
            self._changed()

    async def _take_bundle(self, wanted: int) -> None:
        found, content = await self._fetch()
        policies = self._gate.policies
        try:
            await trio.to_thread.run_sync(policies.take, content, time.time())
        except FlowError as error:
            if error.retryable:
                raise
            self._refused = wanted
            policies.problem = f"version {found.version} is not taken: {error.message}"
            self._log.warning("policy bundle not taken", version=found.version, why=error.message)
            await self._gate.recorder.refused_bundle(found.version, error)
        else:
            self._log.info("policy bundle in force", version=found.version, digest=found.digest)
            if policies.in_force is not None:
                await self._gate.activated(policies.in_force)
            self._recheck("bundle")

    async def _fetch(self) -> tuple[PolicyBundleContent, bytes]:
        """The bundle in force, part by part; what comes does not count for more than its signatures."""
        content, version = bytearray(), 0
        while True:
            at = {"offset": len(content), "version": version}
            found = await self._link.get("/v1/agent/policy", PolicyBundleContent, at)
            content += found.content
            if len(content) >= found.size_bytes or not found.content or len(content) > MAX_BUNDLE_BYTES:
                return found, bytes(content)
            version = found.version

    async def _take_labels(self) -> None:
        policies = self._gate.policies
        if self._labels < policies.labels_heard:  # the coordinator forgot some: it counts anew
            policies.labels_heard = 0
        while policies.labels_heard < (wanted := self._labels):
            heard = policies.labels_heard
            found = await self._link.get("/v1/agent/labels", AgentLabels, {"after": heard})
            if not found.last and not any(serial > heard for serial, _ in found.statements):
                raise ProtocolError(  # tried again after a pause, as what cannot be fetched is
                    f"the coordinator says that statements follow behind {heard}, and gives none: it would be asked for ever",
                    hint="look at the coordinator's log and version",
                )
            for problem in await trio.to_thread.run_sync(policies.take_statements, found.statements):
                self._log.warning("statement not taken", reason=problem.reason, why=problem.message)
            self._recheck("label")
            if found.last:
                # Not what was told since then: that one came behind the answer, and would be passed over.
                policies.labels_heard = max(policies.labels_heard, wanted)
