"""The data port: other sites that dial, each let in by a signed grant and for just what it permits.

The listener has checked certificate and grant before a handler runs (`flowengine.transfer.sites`). Here a grant's path
becomes a folder that this site offers, one session of a task supersedes the one before, and where this site is the
target it is the one that tells the coordinator what landed.
"""

from __future__ import annotations

import base64
import contextlib
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import trio

from flowengine.errors import Denied, FlowError, LocalError, ProtocolError, TemporaryError
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.listen import Incoming, Listener
from flowengine.transfer.session import Counters, Observer
from flowengine.trust.grant import Grant
from flowengine.trust.grant_checks import arrival_use
from flowengine.units import show_path
from flowengine.wire.messages import Listed, Opened, Options
from flowengine_agent.acting import Hands, is_folder
from flowengine_agent.engine import (
    check_fed,
    check_permitted,
    check_same,
    landed_so,
    landing_at,
    log_left_out,
    make_receipt,
    notes_of_landed,
)
from flowengine_agent.hands import Giving, Taking
from flowengine_agent.heads import note_head, record_left, show_head
from flowengine_agent.logs import Log
from flowengine_agent.meter import Meter
from flowengine_agent.relaying import RouteGate, make_relay
from flowengine_agent.reporting import REPORT_EVERY_S, Standing, TaskReporter
from flowengine_agent.roots import Place
from flowengine_agent.site import Site

__all__ = ["DataPort"]

_PROBE_S = 45.0
"""The longest that a probe is listened to."""
_PROBE_SLACK_BYTES = 1 << 20
_TELL_S = 60.0
"""How long a target that served a task stays to tell of its end before the journal has to."""


@dataclass(eq=False)
class _Visit:
    """One session that a peer opened."""

    grant: Grant
    serial: str
    scope: trio.CancelScope
    ended: trio.Event
    why: str = ""

    def end(self, why: str) -> None:
        """Cut it off."""
        self.why = self.why or why
        self.scope.cancel()


class DataPort:
    """Listens, and serves one session per task."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._visits: dict[str, _Visit] = {}
        self._listener: Listener | None = None
        self._draining = False
        self.relay = make_relay(site)
        """What passes through this site; None where it does not relay."""

    def bind(self) -> None:
        """Take the port, where the site has one.

        Raises:
            LocalError: it is taken.
        """
        listen = self._site.config.listen
        host, port = listen or ("", 0)
        self._listener = Listener(
            host,
            port,
            identity=self._site.trust,
            log=self._logged,
            gate=RouteGate(self._site),
            relay=self.relay,
        )
        if listen is None:
            return  # it comes to relays by itself
        try:
            self._listener.bind()
        except OSError as error:
            raise LocalError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint="choose another port, or stop what uses it; flowengine-agent check tells more",
            ) from None
        self._site.listening = (host, self._listener.port)

    async def serve(self) -> None:
        """Let peers in until cancelled."""
        if self._listener is not None and self._site.listening is not None:
            await self._listener.serve(self._handle)

    async def meet(self, document: bytes, taken: Callable[[], None]) -> None:
        """Wait at a relay for the other end of a route, and serve it; see `Listener.meet`."""
        assert self._listener is not None
        await self._listener.meet(document, self._handle, taken)

    def tasks(self) -> set[str]:
        """Tasks that are served now."""
        return set(self._visits)

    def tell(self, task: str, fence: int, reason: str) -> None:
        """The coordinator stops a task."""
        visit = self._visits.get(task)
        if visit is not None and visit.grant.fence <= fence:
            visit.end(reason)

    def drop_revoked(self) -> None:
        """Cut off whoever's certificate was revoked meanwhile."""
        for visit in self._visits.values():
            if visit.serial in self._site.trust.revoked:
                self._site.log.warning(
                    "session ended", reason="certificate-revoked", task=visit.grant.task, serial=visit.serial
                )
                visit.end("certificate-revoked")
        if self._listener is not None:
            self._listener.drop_revoked(self._site.trust.revoked)
        if self.relay is not None:
            self.relay.drop_revoked()

    async def drain(self, grace_s: float) -> None:
        """Let sessions that are nearly done end, cut off the others, and wait for them."""
        self._draining = True
        async with trio.open_nursery() as nursery:
            if self.relay is not None:
                nursery.start_soon(self.relay.drain, grace_s)
            nursery.start_soon(self._drain_visits, grace_s)

    async def _drain_visits(self, grace_s: float) -> None:
        with trio.move_on_after(grace_s):
            await self._all_ended()
        for visit in self._visits.values():
            visit.end("draining")
        await self._all_ended()

    async def _all_ended(self) -> None:
        while self._visits:
            await next(iter(self._visits.values())).ended.wait()

    def _logged(self, line: str) -> None:
        self._site.log.warning("data port", line=line)

    async def _handle(self, incoming: Incoming) -> None:
        grant, facts = incoming.grant, incoming.site
        if grant is None or facts is None:
            raise ProtocolError("a peer came without a grant")
        if grant.mode == "probe":
            await self._swallow(incoming, grant)
            return
        end = "source" if grant.dial == "target" else "target"
        place = self._site.roots.find(grant.path(end), "read" if end == "source" else "write")  # type: ignore[arg-type]
        hands = self._site.acting.hands(grant.requester, grant.tenant)
        if incoming.request.role == "stat":
            if end == "source":
                await self._site.gate.release(grant, incoming.route)  # a name is data too
                # What cannot be given is refused before the peer makes room for it.
                await hands.check_source(place)
            mode = await hands.mode(place)
            # Whether it is a folder is all that the peer needs; size and times are data that nobody has decided on.
            kind = 0 if mode is None else stat.S_IFMT(mode)
            if end == "source":
                sealed = await trio.to_thread.run_sync(self._site.seals.leaving, grant)
                kind = stat.S_IFDIR if kind and sealed else kind  # what is sealed comes as a tree
            rows = [] if mode is None else [(incoming.request.path, kind, 0, 0)]
            await incoming.channel.send(Listed(rows, True))
            return
        if incoming.request.role not in ("source", "target"):
            raise ProtocolError(f"a peer asked to be {incoming.request.role!r}")
        async with self._visit(grant, facts.serial):
            try:
                if end == "source":
                    await self._give(incoming, grant, place, hands)
                else:
                    await self._take(incoming, grant, place, hands)
            except BaseExceptionGroup as group:
                error = first_flow_error(group)
                if error is None:
                    raise
                raise error from group

    async def _swallow(self, incoming: Incoming, grant: Grant) -> None:
        """A peer probes the link: what it sends is thrown away, as much as its grant lets it send."""
        left = (grant.byte_limit or 0) + _PROBE_SLACK_BYTES
        self._site.log.info("is probed", peer=grant.source.site, size_bytes=grant.byte_limit)
        await incoming.channel.send(Opened(0, b""))
        with trio.move_on_after(_PROBE_S):
            while left > 0:
                with contextlib.suppress(trio.BrokenResourceError):
                    if data := await incoming.channel.stream.receive_some(262_144):
                        left -= len(data)
                        continue
                return

    @contextlib.asynccontextmanager
    async def _visit(self, grant: Grant, serial: str) -> AsyncIterator[None]:
        """Be the one session of a task; one that was there before is dead or superseded, and ended."""
        if self._draining:
            raise TemporaryError(
                "this site's agent is stopping", hint="it is dialled again when it is back", reason="busy"
            )
        while (before := self._visits.get(grant.task)) is not None:
            if before.grant.fence > grant.fence:
                raise TemporaryError("a newer claim of the task is served", reason="grant-superseded")
            before.end("superseded")
            await before.ended.wait()
        visit = _Visit(grant, serial, trio.CancelScope(), trio.Event())
        self._visits[grant.task] = visit
        try:
            with visit.scope:
                yield
        finally:
            if self._visits.get(grant.task) is visit:
                del self._visits[grant.task]
            visit.ended.set()
        if visit.scope.cancelled_caught:
            raise TemporaryError(
                f"the session was ended by this site: {visit.why}",
                hint="it may be dialled again",
                reason="disconnected",
            )

    async def _give(self, incoming: Incoming, grant: Grant, place: Place, hands: Hands) -> None:
        """The peer pulls."""
        site, request = self._site, incoming.request
        log = site.log.bind(task=grant.task, transfer=grant.transfer, peer=grant.target.site)
        _check_asked(log, grant, request.options)
        permit = await site.gate.release(grant, incoming.route)
        seal, held = await trio.to_thread.run_sync(site.seals.sealing, grant)
        await hands.check_source(place)
        log.info("gives", path=grant.source_path, **_as(hands))
        counters = Counters()
        async with incoming.accept(_without_lists(request.options), release=permit.document) as session:
            site.hold_rates(session, grant, place)
            await show_head(site, permit, session)
            with site.duties.leaving(grant, permit, session) as watch:
                how = Giving(
                    request.options.rename,
                    not request.options.reread,
                    site.reader_threads,
                    seal,
                    held and arrival_use(grant.required) == "hold",
                    grant.version,
                )
                outcome = await hands.give(session, place, how, counters=counters, observe=_bounded(grant))
                log_left_out(site, grant, outcome)
            await record_left(site, grant, permit, session, counters, outcome, watch.mode, hands.account)
            if outcome.receipt.state != "completed":
                watch.check()
        log.info("gave", state=outcome.receipt.state, bytes_sent=counters.bytes_sent)
        if outcome.receipt.state == "completed":
            site.ledger.spend(grant)

    async def _take(self, incoming: Incoming, grant: Grant, place: Place, hands: Hands) -> None:
        """The peer pushes: this site is the target, and tells what landed."""
        site = self._site
        options = _without_lists(incoming.request.options)
        log = site.log.bind(task=grant.task, transfer=grant.transfer, peer=grant.source.site)
        _check_asked(log, grant, options)
        if options.rename:
            place = await _folder_of(place, options.rename, grant, hands)
        reporter = TaskReporter(
            site.link,
            site.journal,
            site=site.name,
            task=grant.task,
            fence=grant.fence,
            every_s=REPORT_EVERY_S,
            refused=lambda directive, reason: self.tell(grant.task, grant.fence, reason or directive),
        )
        async with landing_at(site, place, grant, reporter, options, wait=False) as meter:
            log.info("takes", path=grant.target_path, **_as(hands))
            counters = Counters()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reporter.run)
                async with (
                    incoming.accept(options) as session,
                    site.limits.landing(session, place.root.folder.name),
                    site.duties.landing(grant, place, session, incoming.request.ticket) as (permit, watch),
                ):
                    await show_head(site, permit, session)
                    meter.begin(session)
                    arrival = site.seals.arrival(grant, permit, options)
                    outcome = await hands.take(
                        session,
                        place,
                        Taking(
                            not (options.reread or "chunks" in watch.terms.isolate),
                            arrival.way,
                            grant.version,
                        ),
                        counters=counters,
                        observe=meter.observe,
                        landed=notes_of_landed(site, reporter, watch),
                    )
                    await landed_so(site, grant, permit, watch, counters, outcome, hands)
                    await note_head(site, grant, "source", session)
                meter.finish(counters, outcome.bottleneck)
                log.info(
                    "took", state=outcome.state, objects=counters.objects_done, bytes_sent=counters.bytes_sent
                )
                if outcome.state == "completed":
                    try:
                        check_fed(grant, outcome.version_id)
                        opened = await arrival.open(hands, place, reporter)
                        if grant.mode == "verify":
                            check_same(counters, outcome.extras)
                        elif not grant.dry_run:
                            await site.duties.completed(grant, hands, place, opened=opened)
                        receipt = b""  # of a dry run nothing landed that could be signed for
                        if not grant.dry_run:
                            receipt = make_receipt(site, grant, outcome.state, outcome.version_id, counters)
                        reporter.finish(
                            "done",
                            version_id=outcome.version_id.hex(),
                            receipt=base64.b64encode(receipt).decode("ascii"),
                        )
                    except FlowError as error:
                        # The driver has had its last word, so nobody else would tell it.
                        log.warning("did not come to its end", reason=error.reason, why=error.message)
                        reporter.finish("failed", error=error)
                    site.ledger.spend(grant)  # behind the journal: an end that was told is never run again
                    with trio.move_on_after(_TELL_S):
                        await reporter.told.wait()
                nursery.cancel_scope.cancel()


async def _folder_of(place: Place, name: bytes, grant: Grant, hands: Hands) -> Place:
    """The folder in which one file lands under the name that the peer gives it.

    Raises:
        Denied: the grant is for another name, or a folder is there (reason "grant-other-path").
    """
    is_other = place.contents or place.path.rpartition(b"/")[2] != name
    if is_other or is_folder(await hands.mode(place)):
        raise Denied(
            f"the grant for {grant.shown} does not permit to write the file {show_path(name)!r}",
            hint="only the name at the end of the granted path may be written, and no folder may be in its place",
            reason="grant-other-path",
        )
    return place.parent()[0]


def _check_asked(log: Log, grant: Grant, options: Options) -> None:
    """Refuse, and log, what the grant does not say."""
    try:
        check_permitted(grant, options)
    except Denied as error:
        log.warning("refused", reason=error.reason, why=error.message)
        raise


def _as(hands: Hands) -> dict[str, str]:
    """Which account acts, for the log; nothing where it is the agent's own."""
    return {"account": hands.account} if hands.account else {}


def _without_lists(options: Options) -> Options:
    """What a peer may ask for under a grant: a list of files of its own is not among it."""
    return msgspec.structs.replace(options, files_from=None)


def _bounded(grant: Grant) -> Observer:
    return Meter(Standing(), byte_limit=grant.byte_limit).observe
