"""What this site owes for what landed here: out of sight when it must be, destroyed when it is due, and signed for.

Goal
    A duty that outlives a transfer is done by whoever holds the data, whether the coordinator is there or not.
Plan
    `Holdings` is the account. A loop looks once a second: what is marked goes to quarantine, what is due by its date is
    marked, what has been in quarantine for as long as configured is destroyed and certified, and what the coordinator
    does not know yet is told. The time is `policy.duties.Clock`'s: a clock that jumped hides and does not destroy.
Invariants
    - Quarantine waits for nobody but whoever writes to the same folder, and that is stopped first.
    - A certificate is signed after what it says is durable, and kept here.
    - What was hidden or destroyed is on the record before it counts as done here.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import trio

from flowengine.api.agents import Disposed, Taken
from flowengine.api.transfers import Disposal
from flowengine.errors import FlowError, LocalError
from flowengine.evidence.bodies import delete_certificate_body, quarantine_body
from flowengine.policy.duties import Clock, Instant, deletion, disagreement
from flowengine.store.filesystem import boot_id
from flowengine.store.quarantine import NameDigest
from flowengine.trust.deletion import DeleteCertificate
from flowengine.units import show_path
from flowengine_agent.holdings import Cause, Holding, Holdings
from flowengine_agent.recording import Owed
from flowengine_agent.roots import OfferedRoot, Place

if TYPE_CHECKING:
    from flowengine_agent.site import Site

__all__ = ["Keeper"]

_ROUND_S: Final = 1.0
_AGREE_S: Final = 10.0
"""How often a clock that runs on without a jump is noted."""
_TELL_AGAIN_S: Final = 5.0
_DELETIONS: Final = ("delete_by", "delete_after")


class Keeper:
    """Does what is owed at one site.

    Args:
        purge_after_s: how long what was stopped stays in quarantine before it is destroyed.
        is_coming: whether a task is landing now; what was left half here is due like what is whole.
        owed: the duties of some types that came with what landed.
    """

    def __init__(
        self,
        site: Site,
        holdings: Holdings,
        *,
        purge_after_s: float,
        is_coming: Callable[[str], bool],
        owed: Callable[..., Sequence[Owed]],
    ) -> None:
        self._site = site
        self._is_coming = is_coming
        self.holdings = holdings
        self._purge_after_s = purge_after_s
        self._wake = trio.Event()
        self._tell_from = 0.0
        self._agreed_at = -_AGREE_S
        self._gone_none: dict[str, str] = {}
        self._hiding: set[str] = set()
        self._owed = owed
        self._ahead_s = 0.0
        self._failed: set[str] = set()
        self._recorded: dict[str, Holding] = {}
        self._certified: dict[str, bytes] = {}
        self._why_not: dict[str, str] = {}

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def mark(self, task: str, cause: Cause, why: str, *, all_of_it: bool) -> None:
        """What a task brought must go."""
        if self.holdings.mark(task, cause, why, all_of_it=all_of_it):
            self._site.log.warning("goes to quarantine", task=task, cause=cause, why=why)
        self.wake()

    def commanded(self, task: str, why: str) -> None:
        """The coordinator says that a transfer to here is not permitted any more."""
        holding = self.holdings.find(task)
        if holding is None:
            self._gone_none[task] = why
        elif holding.state in ("open", "kept"):
            self.mark(task, "policy-stopped", why, all_of_it=holding.terms.takes_landed("stop-now"))
        self.wake()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            await self._rounds(nursery)

    async def _rounds(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                await self._round(nursery)
            except FlowError as error:  # tried again in the next round
                self._site.log.warning("a duty could not be done", reason=error.reason, why=error.message)
            with trio.move_on_after(_ROUND_S):
                await self._wake.wait()
            self._wake = trio.Event()

    async def _round(self, nursery: trio.Nursery) -> None:
        now = self.time()
        for holding in self.holdings.in_state("kept", "open"):
            if holding.landed or not self._is_coming(holding.task):
                self._look_at_date(holding, now)
        for holding in self.holdings.in_state("marked"):
            if holding.task not in self._hiding:  # each may wait for whoever writes to its folder
                self._hiding.add(holding.task)
                nursery.start_soon(self._hide_one, holding)
        for holding in self.holdings.in_state("hidden"):
            if self._may_purge(holding, self.possible()):
                await self._purge(holding)
        await self._tell()

    # --- the clock ----------------------------------------------------------------------------------------------

    def time(self) -> Instant:
        """What is known of the time; a clock that runs on without a jump is noted now and then."""
        wall, steady, boot = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot_id().hex()
        clock = self.holdings.clock()
        if clock is None:
            self.holdings.set_clock(Clock(wall, steady, boot))
            return Instant(wall, wall)
        found = clock.read(wall, steady, boot)
        if found.early == found.late and trio.current_time() - self._agreed_at > _AGREE_S:
            self._agreed_at = trio.current_time()
            self.holdings.set_clock(clock.agree(max(wall, clock.wall), steady, boot))
        return found

    def possible(self) -> Instant:
        """The same with what the coordinator's clock says besides: a window has to be open, and something due, by either.

        What landed when, and what goes out of sight, is not for the coordinator to say.
        """
        found = self.time()
        return Instant(found.early + min(0.0, self._ahead_s), found.late + max(0.0, self._ahead_s))

    def clock_error_ms(self) -> int:
        """How far this clock may be off: by how much it surely disagrees with the coordinator's, or jumped."""
        found = self.possible()
        return int(1000 * (found.late - found.early))

    def confirm_time(self, theirs: float, sent: float) -> None:
        """The coordinator told the time, over an authenticated connection: where this clock agrees, it is right.

        Args:
            sent: this clock when it was asked.
        """
        wall = time.time()
        self._ahead_s = disagreement(theirs, sent, wall)
        if abs(wall - theirs) <= 5.0:
            self.holdings.set_clock(Clock(wall, time.clock_gettime(time.CLOCK_BOOTTIME), boot_id().hex()))

    # --- what becomes of it -------------------------------------------------------------------------------------

    def _look_at_date(self, holding: Holding, now: Instant) -> None:
        terms = holding.terms
        since = holding.landed or holding.begun
        verdict = deletion(terms, since, now)
        if verdict == "keep":
            return
        due = terms.due(since) or 0
        cause: Cause = "delete-by" if due == terms.delete_by else "delete-after"
        rules = ", ".join(
            sorted(
                {name for duty in holding.duties if duty.type.startswith("delete") for name in duty.origins}
            )
        )
        self.holdings.mark(
            holding.task, cause, f"{rules}: due {_date(due)}, here since {_date(since)}",
            all_of_it=True, due=due,
        )  # fmt: skip
        self._site.log.info("due", task=holding.task, cause=cause, verdict=verdict)

    def _may_purge(self, holding: Holding, now: Instant) -> bool:
        if holding.cause in ("delete-by", "delete-after"):
            return deletion(holding.terms, holding.landed or holding.begun, now) == "delete"
        if holding.terms.holds:
            return False
        return now.early >= holding.hidden + self._purge_after_s or holding.cause == "operator"

    def _root(self, holding: Holding) -> OfferedRoot | None:
        return next((root for root in self._site.roots.roots if root.folder.name == holding.root), None)

    async def _hide_one(self, holding: Holding) -> None:
        try:
            await self._hide(holding)
        except FlowError as error:  # tried again in the next round, and told once
            if self._why_not.get(holding.task) != error.message:
                self._why_not[holding.task] = error.message
                self._site.log.warning(
                    "cannot be hidden", task=holding.task, why=error.message, next=error.hint
                )
            await self._cannot(holding, error.message)
            await trio.sleep(_ROUND_S)
        finally:
            self._hiding.discard(holding.task)
        self.wake()

    async def _hide(self, holding: Holding) -> None:
        root = self._root(holding)
        if root is None:
            raise LocalError(
                f"the folder {holding.root} is not offered any more",
                hint="offer it again in site.toml until what must go is gone",
            )
        real = os.path.join(root.real_path, holding.folder) if holding.folder else root.real_path
        async with self._site.writers.write(real, holding.task, lambda text: None):
            hands, place = self._site.acting.hands_of(holding.account), Place(root, holding.folder, True)
            names = NameDigest()
            for rows in self.holdings.to_hide(holding) if holding.all_of_it else ():
                names.add(rows)
                await hands.hide(place, holding.task, [path for path, _ in rows], staging=False)
            # Counted is what is there: of this try and of those that were killed.
            count, size_bytes = await hands.hide(place, holding.task, [], staging=not holding.landed)
        missing = names.objects - count
        # On the record first, as a certificate is: where that cannot be, or this process dies here, the next round hides
        # nothing more and records it then, rather than never. At worst it stands there twice, once for each life.
        await self._record_once(replace(holding, objects=count, size_bytes=size_bytes, missing=missing))
        self.holdings.hidden(holding.task, int(time.time()), count, size_bytes, missing, names.hex())
        self._recorded.pop(holding.task, None)
        self._why_not.pop(holding.task, None)

    async def _purge(self, holding: Holding) -> None:
        root = self._root(holding)
        if root is None:
            return
        certified = self._certified.get(holding.task) or await self._destroy(holding, root)
        self.holdings.purged(holding.task, certified)
        self._certified.pop(holding.task, None)

    async def _destroy(self, holding: Holding, root: OfferedRoot) -> bytes:
        """Destroy what is in quarantine; gives the certificate, which is on the record."""
        hands = self._site.acting.hands_of(holding.account)
        staged_bytes = await hands.purge(Place(root, holding.folder, True), holding.task)
        said = DeleteCertificate(
            site=self._site.name,
            transfer=holding.transfer,
            task=holding.task,
            source=holding.source,
            path=holding.path,
            cause=holding.cause,  # type: ignore[arg-type]
            why=holding.why[:2000],
            objects=holding.objects,
            size_bytes=holding.size_bytes,
            missing=holding.missing,
            staged_bytes=staged_bytes,
            names=holding.names,
            landed=holding.landed,
            due=holding.due,
            hidden=holding.hidden,
            deleted=int(time.time()),
            policy_digest=holding.policy_digest,
        )
        document = self._site.trust.identity.sign_deletion(said)
        # On the record first: where that cannot be, the next round finds nothing left to destroy and records then.
        await self._record(replace(holding, certificate=document))
        self._certified[holding.task] = document  # the account may be what cannot be written
        self._site.log.info(
            "destroyed", task=holding.task, cause=holding.cause, objects=holding.objects,
            size_bytes=holding.size_bytes, staged_bytes=staged_bytes,
        )  # fmt: skip
        return document

    async def _record_once(self, holding: Holding) -> None:
        """Record it, unless that was done and what comes behind it was not: the account may be what cannot be written."""
        if self._recorded.get(holding.task) != holding:
            await self._record(holding)
            self._recorded[holding.task] = holding

    async def _record(self, holding: Holding) -> None:
        path = f"{self._site.name}:{holding.path}"
        if holding.certificate:
            body = delete_certificate_body(
                path=path, cause=holding.cause, objects=holding.objects, size_bytes=holding.size_bytes,
                transfer=holding.transfer, task=holding.task,
                certificate=base64.b64encode(holding.certificate).decode(),
            )  # fmt: skip
            proof: dict[str, object] = {"certificate": f"sha256:{sha256(holding.certificate).hexdigest()}"}
            await self._site.gate.recorder.keep(
                *(one.entry("fulfilled", proof) for one in self._owed(holding, *_DELETIONS)),
                ("delete-certificate", body | {"missing": holding.missing}),
            )
            return
        body = quarantine_body(
            transfer=holding.transfer, task=holding.task, path=path, cause=holding.cause,
            objects=holding.objects, size_bytes=holding.size_bytes, missing=holding.missing,
        )  # fmt: skip
        kinds = () if holding.cause in ("delete-by", "delete-after") else ("quarantine",)
        proof = {"objects": holding.objects, "size_bytes": holding.size_bytes}
        await self._site.gate.recorder.keep(
            *(one.entry("fulfilled", proof) for one in self._owed(holding, *kinds)),
            ("quarantine", body | {"why": holding.why}),
        )

    async def _cannot(self, holding: Holding, why: str) -> None:
        """A duty is due and cannot be done: on the record, once in this life; it is tried again."""
        if holding.task in self._failed:
            return
        kinds = _DELETIONS if holding.cause in ("delete-by", "delete-after") else ("quarantine",)
        try:
            await self._site.gate.recorder.keep(
                *(one.entry("failed", why=why) for one in self._owed(holding, *kinds))
            )
        except FlowError as error:  # what could not be done may be just this; the log knows why
            self._site.log.warning("cannot be recorded", task=holding.task, why=error.message)
            return
        self._failed.add(holding.task)

    # --- telling ------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        if trio.current_time() < self._tell_from:
            return
        for holding in self.holdings.untold():
            if not await self._send(holding.task, _disposal(holding)):
                self._tell_from = trio.current_time() + _TELL_AGAIN_S
                return
            self.holdings.told(holding.task, holding.state)
        for task, why in list(self._gone_none.items()):
            if not await self._send(task, Disposal(state="none", why=why)):
                return
            del self._gone_none[task]

    async def _send(self, task: str, disposal: Disposal) -> bool:
        """Whether the coordinator took note, or never will."""
        try:
            await self._site.link.post("/v1/agent/disposals", Disposed(task=task, disposal=disposal), Taken)
        except FlowError as error:
            if error.retryable:
                return False
            self._site.log.warning("the coordinator does not want to know", task=task, why=error.message)
        return True


def _where(holding: Holding) -> str:
    """The quarantine's path, for people: an account keeps its own in the folder that it wrote to."""
    folder = f"/{show_path(holding.folder)}" if holding.account and holding.folder else ""
    return f"{holding.root.rstrip('/')}{folder}/.flow-staging/quarantine/{holding.task}"


def _disposal(holding: Holding) -> Disposal:
    return Disposal(
        state="purged" if holding.state == "purged" else "quarantined",
        cause=holding.cause,
        why=holding.why,
        name=_where(holding),
        objects=holding.objects,
        size_bytes=holding.size_bytes,
        missing=holding.missing,
        at=datetime.now(UTC),
        certificate=base64.b64encode(holding.certificate).decode("ascii"),
    )


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
