"""Tasks on the engine: pull or push a held task, with this site's folders, limits and memory around it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import trio

from flowengine.api.agents import TaskGrant
from flowengine.api.transfers import TransferOptions
from flowengine.errors import Denied, FlowError, IntegrityError
from flowengine.evidence.private import Private
from flowengine.transfer.handing import Landed
from flowengine.transfer.passes import PassResult, Report, TransferSettings, run_passes
from flowengine.transfer.run import peer_session, stat_remote
from flowengine.transfer.session import Counters
from flowengine.transfer.sites import SitePeer
from flowengine.transfer.source import SourceOutcome
from flowengine.transfer.target import TargetOutcome
from flowengine.trust.grant import Grant, wire_path
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.receipt import SignedReceipt
from flowengine.units import show_path
from flowengine.wire.messages import Options
from flowengine_agent.acting import Hands, is_folder
from flowengine_agent.hands import Giving, Taking
from flowengine_agent.heads import note_head, record_left, show_head
from flowengine_agent.meter import Meter
from flowengine_agent.permits import Permit
from flowengine_agent.reporting import TaskReporter
from flowengine_agent.roots import Place
from flowengine_agent.running import Watch
from flowengine_agent.sealing import Arrival
from flowengine_agent.site import Site

__all__ = ["Finished", "drive", "make_receipt"]

_RETRY_FOR_S = 30.0
"""How long a broken link is dialled again before the coordinator may decide anew."""
_FEEDER_RETRY_FOR_S = 3.0
"""The same where another target is the source: the transfer's own source can take over."""


@dataclass(frozen=True)
class Finished:
    """A task came to its end: what landed, and the target's signed word on it (empty at the source, and of a dry run)."""

    version_id: bytes
    receipt: bytes


async def drive(
    site: Site, granted: TaskGrant, grant: Grant, peer: SitePeer, reporter: TaskReporter
) -> Finished:
    """Run a held task to its end.

    Args:
        peer: to be dialled; its grant may be replaced by a newer one while this runs.

    Raises:
        FlowError: it cannot be brought to its end now; the same call continues.
    """
    options = wire_options(granted.options, granted.mode)
    check_permitted(grant, options)
    settings = TransferSettings(
        profile=granted.options.profile or TransferSettings().profile,
        options=options,
        streams=granted.options.streams,
        threads=site.reader_threads,
        use_cache=not granted.options.reread and granted.mode != "verify",
        retry_for_s=_FEEDER_RETRY_FOR_S if grant.version else _RETRY_FOR_S,
    )
    if granted.role == "target":
        return await _pull(site, granted, grant, peer, settings, reporter)
    return await _push(site, granted, grant, peer, settings, reporter)


def check_permitted(grant: Grant, options: Options) -> None:
    """Refuse a session that does what its grant does not say: whatever counts, keeps or deletes goes by the grant.

    Raises:
        Denied: it would delete, or move bytes under a grant that only lets look, or the other way round.
    """
    if options.delete and not grant.may_delete:
        raise Denied(f"the grant for {grant.shown} does not permit to delete", reason="grant-other-path")
    only_looks = grant.dry_run or grant.mode == "verify"
    if options.dry_run is not only_looks:
        raise Denied(
            f"the grant for {grant.shown} permits to {'look and no more' if only_looks else 'move, not to look'}",
            hint="the coordinator asks for another thing than it signed for: ask for the transfer again",
            reason="grant-other-path",
        )


def wire_options(options: TransferOptions, mode: str) -> Options:
    """What the engine is to do for a transfer's options."""
    return Options(
        delete=options.delete,
        dry_run=options.dry_run or mode == "verify",
        publish=options.publish,
        xattrs=options.xattrs,
        owner=options.owner,
        links=options.links,
        filters=[(take, pattern.encode("utf-8", "surrogateescape")) for take, pattern in options.filters],
        reread=options.reread or mode == "verify",
    )


async def _pull(
    site: Site,
    granted: TaskGrant,
    grant: Grant,
    peer: SitePeer,
    settings: TransferSettings,
    reporter: TaskReporter,
) -> Finished:
    source_path = wire_path(grant.source_path)
    place = site.roots.find(grant.target_path, "write")
    options = settings.options
    hands = _hands(site, grant)
    if (
        place.path
        and not place.contents
        and arrival_use(grant.required) == "land"
        and not source_path.endswith(b"/")
        and not is_folder(await hands.mode(place))
    ):
        there = await stat_remote(peer, source_path)
        if there is not None and not is_folder(there[1]):
            place, name = place.parent()
            settings = msgspec.structs.replace(settings, options=_renamed(options, name))
    note = _notes(site, granted, reporter)
    arrival = Arrival()
    async with landing_at(site, place, grant, reporter, settings.options, wait=True) as meter:

        async def one_pass(counters: Counters) -> PassResult:
            nonlocal arrival
            async with peer_session(peer, "target", source_path, settings) as session:
                async with (
                    site.limits.landing(session, place.root.folder.name),
                    site.duties.landing(grant, place, session, session.release) as (permit, watch),
                ):
                    await show_head(site, permit, session)
                    meter.begin(session)
                    arrival = site.seals.arrival(grant, permit, settings.options)
                    done = await hands.take(
                        session,
                        place,
                        Taking(
                            settings.use_cache and "chunks" not in watch.terms.isolate,
                            arrival.way,
                            grant.version,
                        ),
                        counters=counters,
                        observe=meter.observe,
                        landed=notes_of_landed(site, reporter, watch),
                    )
                    await landed_so(site, grant, permit, watch, counters, done, hands)
                    await note_head(site, grant, "source", session)
            return PassResult(
                done.state, done.version_id, done.failures, done.extras, done.bottleneck, session
            )

        report = await run_passes(one_pass, settings, note)
        meter.finish(report.counters, report.bottleneck)
        check_ended(report)
        check_fed(grant, report.version_id)
        opened = await arrival.open(hands, place, reporter)
    if granted.mode == "verify":
        check_same(report.counters, report.extras)
    else:
        await site.duties.completed(grant, hands, place, opened=opened)
    if granted.options.dry_run:  # nothing landed that could be signed for
        return Finished(report.version_id, b"")
    return Finished(
        report.version_id, make_receipt(site, grant, report.state, report.version_id, report.counters)
    )


async def _push(
    site: Site,
    granted: TaskGrant,
    grant: Grant,
    peer: SitePeer,
    settings: TransferSettings,
    reporter: TaskReporter,
) -> Finished:
    place = site.roots.find(grant.source_path, "read")
    target_path = wire_path(grant.target_path)
    name = target_path.rpartition(b"/")[2]
    hands = _hands(site, grant)
    await hands.check_source(place)
    mode = await hands.mode(place)
    seal, held = await trio.to_thread.run_sync(site.seals.sealing, grant)
    if name and not (seal or held) and not place.contents and mode is not None and not is_folder(mode):
        there = await stat_remote(peer, target_path)
        if there is None or not is_folder(there[1]):
            settings = msgspec.structs.replace(settings, options=_renamed(settings.options, name))
    meter = Meter(reporter.standing, byte_limit=grant.byte_limit, site=site.name)
    note = _notes(site, granted, reporter)

    async def one_pass(counters: Counters) -> PassResult:
        # Policy was asked for each route before it was dialled, also before the target was asked what is there.
        async with peer_session(peer, "source", target_path, settings) as session:
            permit = session.consent
            assert isinstance(permit, Permit)
            site.hold_rates(session, grant, place)
            await show_head(site, permit, session)
            meter.begin(session)
            with site.duties.leaving(grant, permit, session) as watch:
                how = Giving(
                    settings.options.rename,
                    settings.use_cache,
                    settings.reader_threads,
                    seal,
                    held and arrival_use(grant.required) == "hold",
                    grant.version,
                )
                done = await hands.give(session, place, how, counters=counters, observe=meter.observe)
                log_left_out(site, grant, done)
            await record_left(site, grant, permit, session, counters, done, watch.mode, hands.account)
            if done.receipt.state != "completed":
                watch.check()
        receipt = done.receipt
        return PassResult(receipt.state, done.version_id, done.failures, [], receipt.bottleneck, session)

    report = await run_passes(one_pass, settings, note)
    meter.finish(report.counters, report.bottleneck)
    check_ended(report)
    return Finished(report.version_id, b"")


def _hands(site: Site, grant: Grant) -> Hands:
    """Whoever acts for the requester; the log names the account."""
    hands = site.acting.hands(grant.requester, grant.tenant)
    if hands.account:
        site.log.info("acts for the requester", task=grant.task, account=hands.account)
    return hands


def _renamed(options: Options, name: bytes) -> Options:
    return msgspec.structs.replace(options, rename=name)


def _notes(site: Site, granted: TaskGrant, reporter: TaskReporter) -> Callable[[str], None]:
    def note(line: str) -> None:
        site.log.info("task waits", task=granted.task, why=line)
        reporter.standing.wait = line
        reporter.changed()

    return note


@contextlib.asynccontextmanager
async def landing_at(
    site: Site, place: Place, grant: Grant, reporter: TaskReporter, options: Options, *, wait: bool
) -> AsyncIterator[Meter]:
    """Be the one that writes to a place: gives the meter that holds to the budget.

    Args:
        wait: whether to wait for another writer, rather than to refuse (reason "busy").
    """
    reads_only = options.dry_run

    def waits(text: str) -> None:
        reporter.standing.wait = text
        reporter.changed()

    def check(counters: Counters) -> None:
        reporter.standing.wait = ""
        if not reads_only:
            place.root.coming(grant.task, counters.bytes_done - counters.bytes_unchanged)

    if not reads_only:
        place.root.check_budget()
    writing = (
        contextlib.nullcontext()
        if reads_only
        else site.writers.write(place.real_path, grant.task, waits)
        if wait
        else site.writers.write_nowait(place.real_path, grant.task)
    )
    async with writing:
        try:
            yield Meter(reporter.standing, byte_limit=grant.byte_limit, check=check, site=site.name)
        finally:
            place.root.settled(grant.task)


def notes_of_landed(site: Site, reporter: TaskReporter, watch: Watch) -> Landed:
    """What the engine tells as objects become durable: first on account, then to the coordinator."""

    def landed(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
        site.duties.landed(watch.task, rows, wrong, on_account=watch.on_account)
        reporter.landed([(show_path(name), size) for name, size in rows])

    return landed


def log_left_out(site: Site, grant: Grant, outcome: SourceOutcome) -> None:
    """Tell this site's log what was not sealed, and why: the target does not learn its name."""
    for line in outcome.notes:
        site.log.warning("not sealed", task=grant.task, why=line)


def check_ended(report: Report) -> None:
    """Raise unless every object came through.

    Raises:
        FlowError: some objects failed (reason "some-objects-failed").
    """
    stopped = next((failure for failure in report.failures if failure[1] == "policy-stopped"), None)
    if stopped is not None:
        raise Denied(
            stopped[2], hint="flow why tells which rule; what had arrived may not stay", reason=stopped[1]
        )
    if report.failures or report.state != "completed":
        path, reason, message = (
            report.failures[0] if report.failures else (b"", "incomplete", "the source was not read whole")
        )
        raise FlowError(
            f"{len(report.failures)} objects failed; the first: {show_path(path)}: {message} ({reason})",
            hint="look at the objects that are named; retry continues with what is missing",
            reason="some-objects-failed",
            failures=[
                {"path": show_path(path), "reason": reason, "message": message}
                for path, reason, message in report.failures[:100]
            ],
        )


async def landed_so(
    site: Site,
    grant: Grant,
    permit: Permit,
    watch: Watch,
    counters: Counters,
    outcome: TargetOutcome,
    hands: Hands,
) -> None:
    """A pass came to its end at the target: policy has the last word on what landed.

    Raises:
        FlowError: it was stopped before everything was through, or is not permitted any more.
    """
    await site.duties.running.look_at_end(watch)
    landed = what_landed(counters, outcome, hands.account)
    if outcome.state != "completed":
        by_source = next((failure for failure in outcome.failures if failure[1] == "policy-stopped"), None)
        if watch.error is not None or by_source is not None:
            await site.gate.record_landed(grant, permit, landed, stopped=watch.mode or "finish-file")
        watch.check()
        if by_source is not None:  # it let the object under way land, and offered nothing more
            raise Denied(by_source[2], reason="policy-stopped", mode="finish-file")
    if watch.mode:  # what a mild stop lets come to its end was judged then
        await site.gate.record_landed(grant, permit, landed, stopped=watch.mode)
    else:
        await site.gate.publish(grant, permit, landed)


def what_landed(counters: Counters, outcome: TargetOutcome, account: str) -> dict[str, object]:
    """The end of a pass at the target, for its record: bytes that were here already are copies like those that came.

    Args:
        account: by which it was written; empty for the agent's own.
    """
    return {
        **({"account": Private("account", account)} if account else {}),
        "state": outcome.state,
        "version_id": outcome.version_id.hex(),
        "objects": counters.objects_done,
        "bytes": counters.bytes_done,
        "bytes_sent": counters.bytes_payload,
        "bytes_reused": counters.bytes_reused,
        "bytes_unchanged": counters.bytes_unchanged,
    }


def check_fed(grant: Grant, version_id: bytes) -> None:
    """Raise where another target served it, and what came is not the version that landed there.

    Raises:
        IntegrityError: somebody changed it there while it was read (reason "feed-differs").
    """
    if grant.version and version_id != grant.version:
        raise IntegrityError(
            f"{grant.source.site}:{grant.source_path} was changed while it was read: expected version "
            f"{grant.version.hex()}, got {version_id.hex()}",
            hint="nothing is to be done: the source itself mends what differs",
            reason="feed-differs",
        )


def check_same(counters: Counters, extras: list[bytes]) -> None:
    """Raise unless a verification found everything in place; only the target can tell.

    Raises:
        IntegrityError: something differs, is missing, or is there besides.
    """
    wrong = counters.objects - counters.objects_unchanged
    if wrong or extras:
        raise IntegrityError(
            f"{wrong} of {counters.objects} objects differ at the target or are missing there"
            + (f", {len(extras)} are there besides" if extras else ""),
            hint="flow cp of the same paths mends them",
        )


def make_receipt(site: Site, grant: Grant, state: str, version_id: bytes, counters: Counters) -> bytes:
    """This site's signed word on what landed."""
    return site.trust.identity.sign_receipt(
        SignedReceipt(
            site=site.name,
            transfer=grant.transfer,
            task=grant.task,
            fence=grant.fence,
            grant=grant.id,
            source=grant.source.site,
            path=grant.target_path,
            version_id=version_id,
            state=state,
            objects=counters.objects,
            size_bytes=counters.size_bytes,
            objects_failed=counters.objects_failed,
            landed=int(time.time()),
            policy_digest=grant.policy_digest,
        )
    )
