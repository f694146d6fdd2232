"""The duties of what runs and what landed at this site: each session is watched, each landing is on account.

One object of `Site`. Around a session stands `leaving`, `passing` or `landing`; what outlives it is `keeping`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from flowengine.errors import Denied, FlowError
from flowengine.evidence.obligations import duty_id
from flowengine.policy.asking import Judged
from flowengine.policy.duties import StopMode, stop_mode
from flowengine.policy.merge import merge
from flowengine.policy.model import Duty
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.handing import Landed
from flowengine.transfer.session import Session
from flowengine.trust.grant import Grant, Party
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.release import Release
from flowengine.units import show_path
from flowengine_agent.acting import Hands
from flowengine_agent.holdings import Holding, Holdings
from flowengine_agent.keeping import Keeper
from flowengine_agent.permits import Carried, Permit
from flowengine_agent.rechecks import record_stop
from flowengine_agent.recording import Owed
from flowengine_agent.roots import Place
from flowengine_agent.running import End, Running, Watch, policy_stopped, stopped_by, terms_of

if TYPE_CHECKING:
    from flowengine_agent.site import Site

__all__ = ["ENDS_A_TRANSFER", "Duties", "release_of"]

ENDS_A_TRANSFER: Final = frozenset(
    {
        "policy-stopped",
        "policy-denied",
        "policy-missing",
        "policy-expired",
        "policy-approval",
        "release-stripped",
        "not-sealed",
    }
)
"""Reasons with which a transfer that began is over, and what arrived of it may not stay as it is."""
_BY_HOLDING: Final = ("hold",)
"""Where a duty is from that no rule asked for: what is held is sealed."""


class _Proof(msgspec.Struct, array_like=True):
    """What it takes to decide again on what landed: the grant without its secret, the release, the route.

    `decision` is the id of the permit: what is done of its duties later is recorded under it.
    """

    grant: Grant
    release: Release | None
    route: list[Party]
    decision: str = ""


class Duties:
    """Watches and keeps, for one site."""

    def __init__(self, site: Site, holdings: Holdings) -> None:
        self._site = site
        self.keeper = Keeper(
            site,
            holdings,
            purge_after_s=site.config.policy_purge_after_s,
            is_coming=lambda task: self.running.is_watched(task),
            owed=owed_for,
        )
        self.running = Running(
            silent_s=site.link.silent_s, now=lambda: self.keeper.possible(), stopped=self._stopped
        )
        self._again = trio.Event()
        site.gate.landed = self._landed_at
        site.gate.clock_error_ms = self.keeper.clock_error_ms

    def _landed_at(self, site_path: str) -> list[Holding]:
        """What lies at a site path and came under duties."""
        try:
            place = self._site.roots.find(site_path, "read")
        except FlowError:
            return []  # it is refused for that
        return self.keeper.holdings.covering(place.root.folder.name, place.path)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.running.run)
            nursery.start_soon(self.keeper.run)
            nursery.start_soon(self._look_at_interrupted)

    def recheck(self, cause: str) -> None:
        """`cause` changed ("bundle", "label", "fact", "approval"): decide anew on all that runs and all that is half here."""
        self.running.recheck(cause)
        self._again.set()

    # --- around sessions ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def leaving(self, grant: Grant, permit: Permit, session: Session) -> Iterator[Watch]:
        """Watch what is sent from here."""
        route = list(permit.route) or [grant.source, grant.target]
        review = self._review("release", grant, route, None)
        with self._watched(grant, "source", review, permit, grant.source.site) as watch:
            watch.session = session
            if self._site.gate.knowledge is not None:
                self._site.gate.knowledge.exports.commit(grant.task, int(self.keeper.time().late))
            rate = watch.terms.rate_bits_per_s
            self._site.limits.owe(grant.transfer, rate)
            try:
                yield watch
            finally:
                self._site.limits.settle(grant.transfer, rate)

    @contextlib.contextmanager
    def passing(self, carried: Carried, permit: Permit, end: End = "relay") -> Iterator[Watch]:
        """Watch one route of a transfer, whose content is not seen here or is somebody else's to watch.

        Args:
            end: what this site is on it.
        """
        point = {"source": "release", "relay": "relay", "target": "land"}[end]
        review = self._review(point, carried, list(permit.route), permit.release)
        source = permit.route[0].site if permit.route else ""
        with self._watched(carried, end, review, permit, source) as watch:
            yield watch

    @contextlib.asynccontextmanager
    async def landing(
        self, grant: Grant, place: Place, session: Session, document: bytes
    ) -> AsyncIterator[tuple[Permit, Watch]]:
        """Let the gate decide, and watch what lands; what a stop leaves behind goes to quarantine."""
        try:
            if not grant.dry_run and grant.mode != "verify":
                self._check_kept(grant.task, place)
            permit = await self._site.gate.land(grant, document, session.route)
            route = list(permit.route) or [grant.source, grant.target]
            review = self._review("land", grant, route, permit.release)
            with self._watched(grant, "target", review, permit, grant.source.site) as watch:
                watch.session = session
                if permit.bundle is not None and not grant.dry_run and grant.mode != "verify":
                    account = self._site.acting.hands(grant.requester, grant.tenant).account
                    self.keeper.holdings.begin(_holding(grant, place, permit, account))
                    watch.on_account = True
                yield permit, watch
        except (FlowError, BaseExceptionGroup) as raised:
            error = raised if isinstance(raised, FlowError) else first_flow_error(raised)
            if error is not None:
                self.failed(grant.task, error)
            raise

    @contextlib.contextmanager
    def opening(self, grant: Grant, permit: Permit) -> Iterator[Landed]:
        """Watch on while what landed sealed is opened; what a stop leaves behind goes to quarantine.

        Args:
            permit: as of `landing`.

        Gives what takes note of objects that are opened.
        """
        route = list(permit.route) or [grant.source, grant.target]
        review = self._review("land", grant, route, permit.release)

        found: list[str] = []

        def landed(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
            found.extend([wrong] if wrong else [])
            self.landed(grant.task, rows, wrong, on_account=self.keeper.holdings.find(grant.task) is not None)

        try:
            with self._watched(grant, "target", review, permit, grant.source.site):
                yield landed
                if found:  # it is marked; nor may it be told, or signed for, as landed
                    raise Denied(
                        f"what was opened may not stay: {found[0]}",
                        hint="what had arrived goes to quarantine and will be destroyed; look at this agent's log",
                        reason="policy-stopped",
                        mode="stop-now",
                    )
        except FlowError as error:
            self.failed(grant.task, error)
            raise

    def _check_kept(self, task: str, place: Place) -> None:
        """Refuse to write where something must be kept as it is."""
        now = self.keeper.time().early
        for holding in self.keeper.holdings.covering(place.root.folder.name, place.path):
            terms = holding.terms
            kept = terms.retain_s is not None and now < (holding.landed or holding.begun) + terms.retain_s
            if holding.task == task or not holding.landed or not (terms.holds or kept):
                continue
            why = f"legal hold {', '.join(terms.holds)}" if terms.holds else "a duty to retain"
            raise Denied(
                f"{holding.path} holds what landed with transfer {holding.transfer} and must be kept: {why}",
                hint="write to another folder; or wait until it may go",
                reason="policy-kept",
            )

    def failed(self, task: str, error: FlowError) -> None:
        """A task to here failed: what arrived goes to quarantine where policy was the reason."""
        if error.reason not in ENDS_A_TRANSFER:
            return
        holding = self.keeper.holdings.find(task)
        if holding is not None and holding.state == "open":
            # The other end's word comes without the mode, and so does a refusal to begin anew after a mild stop.
            mode = error.context.get("mode") or self._mode(holding)
            self.keeper.mark(
                task,
                "policy-stopped",
                error.message,
                all_of_it=holding.terms.takes_landed(mode),  # type: ignore[arg-type]
            )
        elif holding is not None:
            self.keeper.wake()  # it was marked as it came

    def landed(
        self, task: str, rows: list[tuple[bytes, int]], wrong: str = "", *, on_account: bool = True
    ) -> None:
        """Objects are durable under their names; from any thread.

        Args:
            wrong: why what came may not stay. It is marked here and now, with all that had landed: whatever ends the
                session meanwhile, it goes to quarantine.
            on_account: whether this task's objects are; those of a task without policies are not.
        """
        if on_account:
            self.keeper.holdings.add_objects(task, rows, wrong)
        elif wrong:
            self.keeper.holdings.mark(task, "policy-stopped", wrong, all_of_it=True)

    async def completed(self, grant: Grant, hands: Hands, place: Place, *, opened: bool = False) -> None:
        """All of it landed: what was here already is under the same duties as what came.

        Args:
            hands, place: who landed it, and where.
            opened: whether it landed sealed and was opened; then all of it is on account already.
        """
        holding = self.keeper.holdings.find(grant.task)
        if holding is None:
            return
        if holding.terms.binds_what_landed and not opened:

            def note(rows: list[tuple[bytes, int]], wrong: str = "") -> None:
                self.landed(grant.task, rows)

            await hands.objects(place, note)
        self.keeper.holdings.complete(grant.task, int(self.keeper.time().early))
        self.keeper.wake()

    # --- how ----------------------------------------------------------------------------------------------------

    def _review(
        self, point: str, carried: Carried, route: Sequence[Party], release: Release | None
    ) -> Callable[[], Sequence[Judged]]:
        return lambda: self._site.gate.review(point, carried, route, release)

    def _watched(
        self,
        carried: Carried,
        end: End,
        review: Callable[[], Sequence[Judged]],
        permit: Permit,
        source: str,
    ) -> contextlib.AbstractContextManager[Watch]:
        most = self._site.config.policy_max_offline_s
        if most is None:
            most = self._site.gate.max_offline_s(permit.judged)
        return self.running.watch(
            carried.task,
            carried.transfer,
            end,
            review,
            permit.judged,
            max_offline_s=most if permit.judged else None,
            data=f"{source}:{carried.source_path}",
            owed=permit.owed,
        )

    async def _stopped(self, watch: Watch, cause: str) -> None:
        error = watch.error
        assert error is not None
        self._site.log.warning(
            "transfer is stopped", task=watch.task, transfer=watch.transfer, end=watch.end, mode=watch.mode,
            cause=cause, reason=error.reason, why=error.message,
        )  # fmt: skip
        if watch.bug is not None:
            self._site.log.error("internal error, please report it", exc_info=watch.bug)
        try:
            await record_stop(self._site.gate, watch, cause)
        except FlowError as raised:
            self._site.log.warning("a stop is not on the record", task=watch.task, why=raised.message)

    async def _look_at_interrupted(self) -> None:
        """What is half here and nobody brings the rest of: decided again whenever something changed."""
        while True:
            for holding in self.keeper.holdings.in_state("open"):
                if not self.running.is_watched(holding.task):
                    self._decide_again(holding)
            self._again = trio.Event()
            with trio.move_on_after(60):
                await self._again.wait()

    def _decide_again(self, holding: Holding) -> None:
        try:
            denied = self._denied(holding)
        except FlowError as error:
            self.failed(holding.task, stopped_by(error))
            return
        if denied is not None:
            self.failed(holding.task, policy_stopped(denied, stop_mode(denied.decision, holding.terms)))

    def _mode(self, holding: Holding) -> StopMode:
        """How what landed is to be stopped by what this site knows; at once where it knows of no denial."""
        try:
            denied = self._denied(holding)
        except FlowError:
            return "stop-now"
        return "stop-now" if denied is None else stop_mode(denied.decision, holding.terms)

    def _denied(self, holding: Holding) -> Judged | None:
        """The decision by which what landed is not permitted here now, if there is one.

        Raises:
            FlowError: it cannot be decided.
        """
        try:
            proof = msgspec.msgpack.decode(holding.proof, type=_Proof)
        except msgspec.MsgspecError as error:
            raise FlowError(f"it cannot be read: {error}") from error
        judged = self._site.gate.review("land", proof.grant, proof.route, proof.release)
        return next((one for one in judged if not one.decision.permit), None)


def owed_for(holding: Holding, *kinds: str) -> list[Owed]:
    """The duties of some types that came with what landed."""
    try:
        decision = msgspec.msgpack.decode(holding.proof, type=_Proof).decision
    except msgspec.MsgspecError:
        return []
    decided = [duty for duty in holding.duties if duty.origins != _BY_HOLDING]  # as the decision counts them
    return [
        Owed(duty_id(index), decision, duty, holding.transfer, holding.task)
        for index, duty in enumerate(decided)
        if duty.type in kinds
    ]


def release_of(holding: Holding) -> Release | None:
    """The source's word with which something landed here; None where there was none, or it cannot be read."""
    try:
        return msgspec.msgpack.decode(holding.proof, type=_Proof).release
    except msgspec.MsgspecError:
        return None


def _owed(grant: Grant, permit: Permit) -> tuple[Duty, ...]:
    """The duties with which something lands; what is held is sealed whether or not a rule says so."""
    terms = terms_of(permit.judged)
    if arrival_use(grant.required) != "hold" or terms.at_rest:
        return terms.duties
    return merge([*terms.duties, Duty("encrypt", (("at", ("rest",)),), _BY_HOLDING)]).duties


def _holding(grant: Grant, place: Place, permit: Permit, account: str) -> Holding:
    bare = msgspec.structs.replace(grant, secret=bytes(len(grant.secret)))
    route = list(permit.route) or [grant.source, grant.target]
    return Holding(
        task=grant.task,
        transfer=grant.transfer,
        source=grant.source.site,
        path=show_path(os.fsencode(grant.target_path)),
        root=place.root.folder.name,
        folder=place.path,
        labels=tuple(permit.release.labels if permit.release is not None else grant.labels),
        duties=_owed(grant, permit),
        policy_digest=bytes.fromhex(permit.bundle.bundle.digest.removeprefix("sha256:"))
        if permit.bundle is not None
        else b"",
        begun=grant.issued,
        proof=msgspec.msgpack.encode(_Proof(bare, permit.release, route, next(iter(permit.decisions), ""))),
        account=account,
    )
