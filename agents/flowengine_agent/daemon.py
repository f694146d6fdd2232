"""The running agent: enrolled, listening, in touch with the coordinator, until it is told to stop.

Loops of one nursery: commands (the event stream), heartbeat, claims, the data port, renewal of the certificate, signals.
None waits for another; they meet in `HeldTasks` and in a few events.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

import trio

import flowengine
from flowengine.api.agents import (
    Answer,
    Checkpointed,
    Claim,
    Claimed,
    Command,
    DrainCommand,
    Greeting,
    Heartbeat,
    HeartbeatReply,
    LeasesCommand,
    LimitsCommand,
    LookCommand,
    MeasureCommand,
    MeetingsCommand,
    PoliciesCommand,
    ProbeCommand,
    QuarantineCommand,
    RevocationsCommand,
    RoutesCommand,
    Taken,
    TaskCommand,
    WorkCommand,
)
from flowengine.client.tls import client_context
from flowengine.errors import Exit, FlowError, LocalError
from flowengine.store.grants import GrantLedger
from flowengine.transfer.sites import SiteTrust
from flowengine_agent.acting import Acting
from flowengine_agent.config import SiteConfig
from flowengine_agent.coordinator_link import open_link
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.exports import Exports
from flowengine_agent.gate import Gate
from flowengine_agent.holdings import Holdings
from flowengine_agent.identity import Identity, enrol, keep_grant_keys, load_identity, renew
from flowengine_agent.journal import Journal
from flowengine_agent.knowledge import Knowledge
from flowengine_agent.limits import LimitBook
from flowengine_agent.logs import Log
from flowengine_agent.looking import look
from flowengine_agent.measuring import probe
from flowengine_agent.meeting import Meetings
from flowengine_agent.policies import Policies
from flowengine_agent.policy_follower import PolicyFollower
from flowengine_agent.relaying import RelayMeter
from flowengine_agent.reporting import tell_left_over
from flowengine_agent.roots import Roots
from flowengine_agent.serving import DataPort
from flowengine_agent.site import Site
from flowengine_agent.tasks import HeldTasks

__all__ = ["run_agent"]

HEARTBEAT_S: Final = 10.0
_AGAIN_S: Final = 1.0
CLOCK_SKEW_S: Final = 30.0
"""A clock that differs by more from the coordinator's is told to whoever reads the log."""
_RENEWAL_CHECK_S: Final = 60.0
_LOOK_AFTER_S: Final = 0.05
_HOUSEKEEPING_S: Final = 600.0
_REMEMBER_S: Final = 7 * 86_400.0
"""Reports that nobody took for so long are dropped."""
_LIMITS_EVERY_S: Final = 1.0
_DRAIN_GRACE: Final = 0.25
"""Share of the time for a stop in which tasks may still come to their own end."""


async def run_agent(
    config: SiteConfig,
    log: Log,
    *,
    join_token: str,
    ready: Callable[[str], None],
    spawner: socket.socket | None = None,
) -> Exit:
    """Run until a signal stops it.

    Args:
        join_token: used where the site has not enrolled yet.
        ready: told once, in a line, that the data port answers and the coordinator was reached.
        spawner: line to what starts movers, where accounts are mapped.

    Raises:
        FlowError: the agent cannot run: not enrolled, not permitted, nothing to offer.
    """
    os.environ["FLOW_STATE_DIR"] = os.path.join(config.state, "cache")  # where the engine keeps its caches
    identity = load_identity(os.path.join(config.state, "identity"))
    if identity is None:
        identity = await _enrol(config, log, join_token)
    if identity.site != config.site:
        raise LocalError(
            f"the state folder {config.state} belongs to site {identity.site!r}, not {config.site!r}",
            hint="give each site its own state folder",
        )
    urls = config.coordinators or (identity.url,)
    context = client_context(identity.ca_pem, cert_file=identity.chain_file, key_file=identity.key_file)

    def retried(error: FlowError) -> None:
        log.warning("coordinator away", why=error.message)

    async with open_link(urls, context, retried=retried) as link:
        ledger = GrantLedger(os.path.join(config.state, "grants.sqlite"))
        trust = SiteTrust(identity.for_engine(), identity.grant_keys, ledger)
        policies = Policies(
            os.path.join(config.state, "policy"), config.policy_keys, required=config.policy_required
        )
        policies.max_offline_s = config.policy_max_offline_s
        roots = Roots(config.roots, as_account=config.accounts is not None, site=config.site)
        if policies.takes_bundles or policies.required:
            roots.check_names()
        evidence = _open_evidence(config, trust, log)
        site = Site(
            config,
            log,
            Journal(os.path.join(config.state, "journal.sqlite")),
            roots,
            identity,
            trust,
            link,
            LimitBook(config.site, config.site_limit_bits_per_s),
            evidence,
            Gate(trust, policies, log, evidence=evidence),
            Holdings(os.path.join(config.state, "holdings.sqlite")),
            Acting(roots, config.accounts, spawner, log),
        )
        site.gate.other_names = site.roots.other_names
        site.gate.sealed = site.seals.leaving
        site.gate.knowledge = Knowledge(Exports(os.path.join(config.state, "exports.sqlite")))
        return await _Agent(site, ready).run()


def _open_evidence(config: SiteConfig, trust: SiteTrust, log: Log) -> EvidenceLog:
    """The chain of what is decided and done here, signed with the site's key and its certificate of the moment."""
    evidence = EvidenceLog(
        os.path.join(config.state, "evidence"), config.site, lambda: trust.identity.signer()
    )
    if evidence.cut_bytes:
        log.warning("a torn record was cut off the evidence", bytes=evidence.cut_bytes)
    return evidence


async def _enrol(config: SiteConfig, log: Log, join_token: str) -> Identity:
    if not join_token:
        raise LocalError(
            f"site {config.site!r} has not enrolled yet and no join token was given",
            hint=f"ask an operator for `flow site token {config.site}`, then start with --join-token-file FILE",
            reason="not-enrolled",
        )
    log.info("enrolling")
    identity = await enrol(
        os.path.join(config.state, "identity"), join_token, config.site, config.coordinators
    )
    log.info("enrolled", until=identity.facts.not_after.isoformat())
    return identity


class _Agent:
    def __init__(self, site: Site, ready: Callable[[str], None]) -> None:
        self._site = site
        self._log = site.log
        self._ready: Callable[[str], None] | None = ready
        self._draining = False  # this agent stops
        self._drained = False  # the coordinator wants no new work here
        self._work = trio.Event()
        self._was_full = False
        self._beat = trio.Event()
        self._follower = PolicyFollower(site.gate, site.link, site.log, self._beat_now, site.duties.recheck)
        self._greeted = False
        self._commanded: set[type[Command]] = set()  # kinds that came since the last heartbeat was sent
        self._telling = False
        self._relay: RelayMeter | None = None
        self._exit = Exit.DONE
        self._rng = random.Random()  # noqa: S311 - spreads claims after a failure

    async def run(self) -> Exit:
        site = self._site
        port = DataPort(site)
        port.bind()
        if port.relay is not None:
            most = site.config.relay_max_bits_per_s
            site.limits.relay_most(most)
            self._relay = RelayMeter(site.name, port.relay, most)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._tasks = HeldTasks(site, nursery, self._changed)
                self._port = port
                self._meetings = Meetings(nursery, port.meet, self._log)
                await nursery.start(site.acting.run)
                nursery.start_soon(self._signals)
                nursery.start_soon(port.serve)
                nursery.start_soon(self._housekeeping)
                nursery.start_soon(site.duties.run)
                self._resume()
                nursery.start_soon(self._commands)
                nursery.start_soon(self._heartbeats)
                nursery.start_soon(self._claims)
                nursery.start_soon(self._renewals)
                nursery.start_soon(self._follow_limits)
                nursery.start_soon(site.evidence.run, self._hand_out, self._no_evidence)
                nursery.start_soon(self._follower.run)
        finally:
            site.journal.close()
            site.ledger.close()
            site.evidence.close()
            site.gate.policies.close()
            site.holdings.close()
        return self._exit

    def _beat_now(self) -> None:
        self._beat.set()

    def _changed(self) -> None:
        """A task ended: there is room for another."""
        if self._was_full:
            self._work.set()
        else:  # more would have been given before; what became possible by this end can wait for its report
            self._nursery.start_soon(self._look_for_work)

    async def _look_for_work(self) -> None:
        await trio.sleep(_LOOK_AFTER_S)
        self._work.set()

    def _resume(self) -> None:
        """Go on with what an earlier life of this agent held."""
        for held in self._site.journal.held():
            if held.lease_until > time.time():
                self._tasks.start(held.granted, held.lease_until, resumed=True)
            else:
                self._site.journal.let_go(held.granted.task, held.granted.fence)

    # --- the coordinator ----------------------------------------------------------------------------------------

    async def _commands(self) -> None:
        async with aclosing(self._site.link.commands()) as commands:  # type: ignore[type-var]
            async for command in commands:
                await self._obey(command)

    async def _obey(self, command: Command) -> None:
        self._commanded.add(type(command))
        match command:
            case Greeting(epoch=epoch):
                self._log.info("coordinator reached", epoch=epoch, url=self._site.link.url)
                self._greeted = True
                self._beat.set()
            case WorkCommand():
                self._work.set()
            case TaskCommand(task=task, fence=fence, directive=directive, reason=reason):
                self._tasks.tell(task, fence, directive, reason or directive)
                self._port.tell(task, fence, reason or directive)
            case LimitsCommand(limits=limits):
                self._site.limits.set(limits, datetime.now(UTC))
            case RoutesCommand(task=task, fence=fence, routes=routes):
                self._tasks.follow(task, fence, routes)
            case LeasesCommand(leases=leases):
                self._site.limits.lease(leases, datetime.now(UTC))
            case MeetingsCommand(meetings=meetings):
                self._meetings.set([] if self._draining else meetings)
            case RevocationsCommand(revoked=revoked):
                self._revoke(revoked)
            case PoliciesCommand(bundle=bundle, labels=labels):
                self._follower.told(bundle, labels)
            case DrainCommand(on=on):
                self._drained = on
                self._beat.set()
                self._work.set()
            case QuarantineCommand(task=task, why=why):
                self._site.duties.keeper.commanded(task, why)
            case LookCommand() | MeasureCommand():
                self._nursery.start_soon(self._look, command)
            case ProbeCommand():
                self._nursery.start_soon(self._probe, command)

    def _hand_out(self, checkpoint: bytes) -> None:
        self._nursery.start_soon(self._tell_checkpoint, checkpoint)

    async def _tell_checkpoint(self, checkpoint: bytes) -> None:
        """One that does not arrive is made good by the next, which signs for all before it."""
        said = Checkpointed(document=base64.b64encode(checkpoint).decode("ascii"))
        try:
            await self._site.link.post("/v1/agent/checkpoints", said, Taken)
        except FlowError as error:
            self._log.warning("checkpoint not taken", why=error.message)

    def _no_evidence(self, error: FlowError) -> None:
        self._log.error("no checkpoint of the evidence can be made", why=error.message, next=error.hint)

    def _revoke(self, serials: list[str]) -> None:
        self._site.trust.revoked = frozenset(serials)
        self._port.drop_revoked()
        self._tasks.drop_revoked()

    async def _look(self, command: LookCommand | MeasureCommand) -> None:
        await self._answer(command.id, await look(self._site, command), command.within_s)

    async def _probe(self, command: ProbeCommand) -> None:
        with trio.move_on_after(command.within_s):
            await self._answer(command.id, await probe(self._site, command), command.within_s)

    async def _answer(self, asked: str, answer: Answer, within_s: float) -> None:
        with trio.move_on_after(within_s):
            try:
                await self._site.link.post(f"/v1/agent/answers/{asked}", answer, type(None))
            except FlowError as error:
                self._log.warning("answer not taken", why=error.message)

    async def _heartbeats(self) -> None:
        while True:
            own = self._site.config.policy_max_offline_s
            offline = own if own is not None else self._site.gate.least_offline_s
            pause = HEARTBEAT_S if offline is None else min(HEARTBEAT_S, offline / 3)
            if self._greeted:
                try:
                    await self._heartbeat()
                except FlowError as error:
                    self._log.warning("heartbeat not taken", why=error.message)
                    if not error.retryable and error.reason != "failed":  # a fault of its own may pass
                        raise
                    pause = _AGAIN_S
            with trio.move_on_after(pause):
                await self._beat.wait()

    async def _heartbeat(self) -> None:
        self._beat = trio.Event()
        site = self._site
        config = site.config
        advertised = list(config.advertise)
        if site.listening is not None and not advertised:
            host, port = site.listening
            advertised = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
        sent = time.time()
        self._commanded.clear()
        reply = await site.link.post(
            "/v1/agent/heartbeat",
            Heartbeat(
                boot=site.boot,
                software=flowengine.__version__,
                addresses=advertised,
                roots=site.roots.described(),
                seen_fence=site.ledger.highest_fence(),
                now=datetime.now(UTC),
                draining=self._draining,
                free_slots=max(0, config.max_tasks - len(self._tasks)),
                relay=self._relay.state() if self._relay is not None and not self._draining else None,
                holding=dict(site.journal.untold()) | self._tasks.holding(),
                can=sorted(site.gate.can),
                policy=site.gate.policies.described(),
            ),
            HeartbeatReply,
        )
        await self._heard(reply, sent)

    async def _heard(self, reply: HeartbeatReply, sent: float) -> None:
        site = self._site
        site.use(keep_grant_keys(site.identity, reply.grant_keys))
        # Of what a command has said meanwhile, and says again when it changes, the answer may be older.
        if RevocationsCommand not in self._commanded:
            self._revoke(reply.revoked)
        if LimitsCommand not in self._commanded:
            site.limits.set(reply.limits, datetime.now(UTC))
        if DrainCommand not in self._commanded:
            if self._drained and not reply.draining:
                self._work.set()  # what was to be claimed meanwhile is not announced again
            self._drained = reply.draining
        if PoliciesCommand not in self._commanded:
            self._follower.told(reply.bundle, reply.labels)
        site.duties.keeper.confirm_time(reply.now.timestamp(), sent)
        skew = abs((datetime.now(UTC) - reply.now).total_seconds())
        if skew > CLOCK_SKEW_S:
            self._log.warning("clocks differ", seconds=round(skew), next="set this host's clock (NTP)")
        if reply.renew:
            await self._renew()
        if self._ready is not None:
            self._ready(
                "data port {}:{}".format(*site.listening)
                if site.listening
                else "dials out only, no data port"
            )
            self._ready = None
            self._work.set()
        if not self._telling:
            self._nursery.start_soon(self._tell_left_over)

    async def _tell_left_over(self) -> None:
        """Beside the heartbeats: a report that nobody takes for long must not make this site look dead."""
        self._telling = True
        site = self._site
        try:
            await tell_left_over(
                site.link, site.journal, site.name, set(self._tasks.holding()) | self._port.tasks()
            )
        except FlowError as error:
            self._log.warning("reports of earlier tasks not taken", why=error.message)
        finally:
            self._telling = False

    async def _claims(self) -> None:
        while True:
            await self._work.wait()
            self._work = trio.Event()
            room = self._site.config.max_tasks - len(self._tasks)
            if room <= 0 or self._ready is not None or self._draining or self._drained:
                continue
            sent_at = time.time()
            try:
                claimed = await self._site.link.post(
                    "/v1/agent/claim", Claim(boot=self._site.boot, count=room), Claimed
                )
            except FlowError as error:
                if not error.retryable:
                    self._log.warning("claim refused", why=error.message)
                await trio.sleep(self._rng.uniform(0.5, 2.0))
                self._work.set()
                continue
            self._was_full = len(claimed.tasks) == room
            for granted in claimed.tasks:
                self._tasks.start(granted, sent_at + granted.lease_s)
            if claimed.tasks and not self._was_full:
                # That was all there was: a second word on the same work must not hold it up.
                await trio.sleep(_LOOK_AFTER_S)

    # --- housekeeping -------------------------------------------------------------------------------------------

    async def _renewals(self) -> None:
        while True:
            left = self._site.identity.facts.renew_at.timestamp() - time.time()
            await trio.sleep(min(max(left, 0.0), _RENEWAL_CHECK_S))
            if left <= 0:
                try:
                    await self._renew()
                except FlowError as error:
                    self._log.warning("certificate not renewed", why=error.message)
                    await trio.sleep(_RENEWAL_CHECK_S)

    async def _renew(self) -> None:
        site = self._site
        identity = await renew(site.identity, site.link)
        site.use(identity)
        site.link.renew(
            client_context(identity.ca_pem, cert_file=identity.chain_file, key_file=identity.key_file)
        )
        self._log.info("certificate renewed", until=identity.facts.not_after.isoformat())

    async def _follow_limits(self) -> None:
        """Windows of limits begin and end by the clock, whether the coordinator is there or not."""
        while True:
            self._site.limits.follow(datetime.now(UTC))
            await trio.sleep(_LIMITS_EVERY_S)

    async def _housekeeping(self) -> None:
        """Know how full roots with a budget are; forget what no grant and no report can speak of any more."""
        site = self._site
        while True:
            for root in site.roots.roots:
                if root.folder.budget_bytes is not None:
                    await site.acting.count(root)
            now = time.time()
            site.ledger.prune(now)
            site.journal.forget_old(now - _REMEMBER_S)
            await trio.sleep(_HOUSEKEEPING_S)

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if self._draining:
                    self._log.warning("stopping at once")
                    self._exit = Exit.INTERRUPTED
                    self._nursery.cancel_scope.cancel()
                    return
                self._draining = True
                self._nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        bound = self._site.config.drain_s
        self._log.info("stopping: takes no new work and gives back what it holds", within_s=bound)
        self._meetings.set([])
        self._beat.set()
        with trio.move_on_after(bound) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tasks.drain, bound * _DRAIN_GRACE)
                nursery.start_soon(self._port.drain, bound * _DRAIN_GRACE)
            await self._last_heartbeat()
        if scope.cancelled_caught:
            self._log.warning("not all was given back in time; leases will end by themselves")
        self._nursery.cancel_scope.cancel()

    async def _last_heartbeat(self) -> None:
        with trio.move_on_after(2.0):
            try:
                await self._heartbeat()
            except FlowError as error:
                self._log.warning("the coordinator does not know of the stop", why=error.message)
