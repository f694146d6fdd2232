"""Acting for a requester: by this process, with the agent's own rights, or by a mover, with those of an account.

Goal
    Whoever reads, looks or lands says for whom, and cannot forget to.
Plan
    `Acting.hands` gives the hands for a requester: `OwnHands` work in this process, `MoverHands` have the mover of an
    account work, which the spawner starts on first use and which ends after a while without work. Both do the same.
Invariants
    - A requester that no account is mapped to has no hands (unless the site says that the agent's own will do).
    - A mover that dies takes its sessions with it, as a broken connection does; the next try starts another.
"""

from __future__ import annotations

import contextlib
import math
import socket
import stat
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast

import msgspec
import trio

from flowengine.api.agents import Answer
from flowengine.errors import FlowError, LocalError, ProtocolError, TemporaryError
from flowengine.store.quarantine import Quarantine
from flowengine.store.sealed_open import Opened
from flowengine.transfer.handing import Broke, Ended, Landed, error_of
from flowengine.transfer.keeper import handed, hear_end, keep_session
from flowengine.transfer.line import Line, line_pair
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.source import SourceOutcome
from flowengine.transfer.target import TargetOutcome
from flowengine_agent.accounts import Account, AccountRules
from flowengine_agent.counting import count
from flowengine_agent.hands import Giving, Rows, Taking, give, take, tell_objects, unseal
from flowengine_agent.logs import Log
from flowengine_agent.mover import (
    Count,
    Give,
    Hide,
    Look,
    Objects,
    Operation,
    Owned,
    Purge,
    Reach,
    Started,
    Stat,
    TakeIn,
    Unseal,
    Where,
)
from flowengine_agent.roots import OfferedRoot, Place, Roots

__all__ = ["Acting", "Hands", "MoverHands", "OwnHands"]

T = TypeVar("T")

_START_S: Final = 20.0
_ANSWER_S: Final = 60.0
_DUTY_S: Final = 600.0
"""How long what is owed for many objects may take."""
_LEAST_PAUSE_S: Final = 0.05
_encode: Final = msgspec.msgpack.Encoder().encode


class Hands(Protocol):
    """Works on this site's folders with the rights of one account."""

    @property
    def account(self) -> str:
        """Its name; empty for the agent's own."""

    async def mode(self, place: Place) -> int | None:
        """Mode of what stands at a place; None where nothing does."""

    async def check_source(self, place: Place) -> None:
        """Raise where nothing can be given of a place; errors as of `Place.selection`."""

    async def give(
        self, session: Session, place: Place, how: Giving, *, counters: Counters, observe: Observer | None
    ) -> SourceOutcome:
        """As `hands.give`."""

    async def take(
        self,
        session: Session,
        place: Place,
        how: Taking,
        *,
        counters: Counters,
        observe: Observer | None,
        landed: Landed,
    ) -> TargetOutcome:
        """As `hands.take`."""

    async def look(self, path: str) -> Answer:
        """As `Roots.look`."""

    async def count(self, path: str, within_s: float) -> Answer:
        """As `counting.count`."""

    async def unseal(
        self, place: Place, secrets: list[bytes], *, xattrs: bool, owner: bool, landed: Landed, named: Rows
    ) -> Opened:
        """As `hands.unseal`; `landed` takes note of what is opened, first, and `named` hears of it then."""

    async def objects(self, place: Place, landed: Landed) -> None:
        """As `hands.tell_objects`."""

    async def hide(self, place: Place, task: str, paths: list[bytes], *, staging: bool) -> tuple[int, int]:
        """Take into quarantine what landed at a place; how many objects it holds then, and their bytes."""

    async def purge(self, place: Place, task: str) -> int:
        """Destroy what is in quarantine for a task; bytes of what was under way."""


class OwnHands:
    """This process, with the rights of the agent's own account."""

    account = ""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots

    async def mode(self, place: Place) -> int | None:
        st = place.lstat()
        return None if st is None else st.st_mode

    async def check_source(self, place: Place) -> None:
        with place.selection():
            pass

    async def give(
        self, session: Session, place: Place, how: Giving, *, counters: Counters, observe: Observer | None
    ) -> SourceOutcome:
        return await give(session, place, how, counters=counters, observe=observe)

    async def take(
        self,
        session: Session,
        place: Place,
        how: Taking,
        *,
        counters: Counters,
        observe: Observer | None,
        landed: Landed,
    ) -> TargetOutcome:
        return await take(session, place, how, counters=counters, observe=observe, landed=landed)

    async def look(self, path: str) -> Answer:
        return await trio.to_thread.run_sync(self._roots.look, path)

    async def count(self, path: str, within_s: float) -> Answer:
        return await trio.to_thread.run_sync(count, self._roots, path, within_s)

    async def unseal(
        self, place: Place, secrets: list[bytes], *, xattrs: bool, owner: bool, landed: Landed, named: Rows
    ) -> Opened:
        stop = threading.Event()
        work = partial(
            unseal, place, secrets, xattrs=xattrs, owner=owner, note=landed, named=named, stopped=stop.is_set
        )
        failed: FlowError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set_when_cancelled, stop)
            try:
                opened = await trio.to_thread.run_sync(work)
            except FlowError as error:
                await trio.lowlevel.checkpoint_if_cancelled()  # then it was stopped, and that is all
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return opened

    async def objects(self, place: Place, landed: Landed) -> None:
        await trio.to_thread.run_sync(tell_objects, place.real_path, landed)

    async def hide(self, place: Place, task: str, paths: list[bytes], *, staging: bool) -> tuple[int, int]:
        def work() -> tuple[int, int]:
            quarantine = Quarantine(place.root.fd, task)
            quarantine.take(place.path, paths, staging=staging)
            return quarantine.contents()

        return await trio.to_thread.run_sync(work)

    async def purge(self, place: Place, task: str) -> int:
        gone = await trio.to_thread.run_sync(Quarantine(place.root.fd, task).purge)
        return gone.staged_bytes


async def _set_when_cancelled(stop: threading.Event) -> None:
    """Tell a thread, which cannot be cancelled, that nobody waits for it any more."""
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


@dataclass(eq=False)
class _Mover:
    """A process that runs."""

    account: Account
    line: Line
    scope: trio.CancelScope
    pid: int = 0
    at_work: int = 0
    idle_since: float = 0.0
    alive: bool = True


class MoverHands:
    """The mover of one account."""

    def __init__(self, acting: Acting, account: Account) -> None:
        self._acting = acting
        self._account = account

    @property
    def account(self) -> str:
        return self._account.name

    async def mode(self, place: Place) -> int | None:
        return await self._ask(Stat(Where.of(place)), int | None)  # type: ignore[arg-type]

    async def check_source(self, place: Place) -> None:
        await self._ask(Reach(Where.of(place)), None)  # type: ignore[arg-type]

    async def look(self, path: str) -> Answer:
        try:
            return await self._ask(Look(path), Answer)
        except FlowError as error:
            return Answer(reason=error.reason, message=error.message, complete=False)

    async def count(self, path: str, within_s: float) -> Answer:
        try:
            return await self._ask(Count(path, within_s), Answer)
        except FlowError as error:
            return Answer(reason=error.reason, message=error.message, complete=False)

    async def unseal(
        self, place: Place, secrets: list[bytes], *, xattrs: bool, owner: bool, landed: Landed, named: Rows
    ) -> Opened:
        operation = Unseal(Where.of(place), secrets, xattrs, owner)
        return await self._ask(operation, Opened, math.inf, landed, named)

    async def objects(self, place: Place, landed: Landed) -> None:
        await self._ask(Objects(Where.of(place)), None, _DUTY_S, landed)  # type: ignore[arg-type]

    async def hide(self, place: Place, task: str, paths: list[bytes], *, staging: bool) -> tuple[int, int]:
        return await self._ask(Hide(Where.of(place), task, paths, staging), tuple[int, int], _DUTY_S)

    async def owned(self, root: str) -> int:
        """Bytes of the account's own files in an offered folder."""
        return await self._ask(Owned(root), int, _DUTY_S)

    async def purge(self, place: Place, task: str) -> int:
        return await self._ask(Purge(Where.of(place), task), int, _DUTY_S)

    async def give(
        self, session: Session, place: Place, how: Giving, *, counters: Counters, observe: Observer | None
    ) -> SourceOutcome:
        async with self._acting.at_work(self._account) as mover:
            operation = Give(Where.of(place), handed(session), how)
            outcome = await self._carry(mover, operation, session, counters, observe, None)
        return cast(SourceOutcome, _decoded(outcome, SourceOutcome))

    async def take(
        self,
        session: Session,
        place: Place,
        how: Taking,
        *,
        counters: Counters,
        observe: Observer | None,
        landed: Landed,
    ) -> TargetOutcome:
        async with self._acting.at_work(self._account) as mover:
            operation = TakeIn(Where.of(place), handed(session), how)
            outcome = await self._carry(mover, operation, session, counters, observe, landed)
        return cast(TargetOutcome, _decoded(outcome, TargetOutcome))

    async def _carry(
        self,
        mover: _Mover,
        operation: Operation,
        session: Session,
        counters: Counters,
        observe: Observer | None,
        landed: Landed | None,
    ) -> bytes:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line = self._acting.operation(mover)
            line.post(_encode(operation), (theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return await keep_session(session, line, ours, counters=counters, observe=observe, landed=landed)

    async def _ask(
        self,
        operation: Operation,
        kind: type[T],
        within_s: float = _ANSWER_S,
        landed: Landed | None = None,
        named: Rows | None = None,
    ) -> T:
        """What a mover answers; asked once more where it had died, perhaps long ago: all of it may be done twice."""
        said, line = await self._asked(operation, within_s, landed, named)
        if said is None:
            said, line = await self._asked(operation, within_s, landed, named)
        found: T = _value(said, line, kind)
        return found

    async def _asked(
        self, operation: Operation, within_s: float, landed: Landed | None, named: Rows | None
    ) -> tuple[Ended | Broke | None, Line]:
        async with self._acting.at_work(self._account) as mover:
            line = self._acting.operation(mover)
            try:
                line.post(_encode(operation))
                await line.flush()
                with trio.fail_after(within_s):
                    said = await hear_end(line, landed, named)
            except trio.TooSlowError:
                raise TemporaryError(
                    f"the mover of account {self.account} did not answer within {within_s:.0f} s",
                    hint="look at the host's load; was the process stopped?",
                    reason="stalled",
                ) from None
            finally:
                line.close()
            if said is None:
                mover.alive = False  # its own end may not have been heard of yet
        return said, line


def _value(said: Ended | Broke | None, line: Line, kind: Any) -> Any:
    if said is None:
        raise line.lost()
    if isinstance(said, Broke):
        raise error_of(said)
    return _decoded(said.outcome, kind)


def _decoded(outcome: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(outcome, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a mover answered what nobody understands: {error}") from None


class Acting:
    """Hands for every requester.

    Args:
        rules: who is acted for as whom; None: everybody by the agent's own account.
        spawner: line to the spawner; None without rules.
    """

    def __init__(
        self, roots: Roots, rules: AccountRules | None, spawner: socket.socket | None, log: Log
    ) -> None:
        self._own = OwnHands(roots)
        self._rules = rules
        self._spawner = spawner
        self._log = log
        self._movers: dict[int, _Mover] = {}
        self._starting: dict[int, trio.Lock] = {}
        self._owned: dict[tuple[str, int], int] = {}
        self._nursery: trio.Nursery | None = None

    def hands(self, requester: str, tenant: str) -> Hands:
        """Whoever acts for a requester.

        Raises:
            Denied: nobody does (reason "account-unmapped").
        """
        account = self._rules.account(requester, tenant) if self._rules is not None else None
        return self._own if account is None else MoverHands(self, account)

    def hands_of(self, name: str) -> Hands:
        """The hands of an account that acted before, by its name; those of the agent's own where it is empty.

        Raises:
            LocalError: nobody is mapped to it any more.
        """
        if not name:
            return self._own
        for account in self._rules.accounts if self._rules is not None else ():
            if account.name == name:
                return MoverHands(self, account)
        raise LocalError(
            f"what landed by account {name} cannot be reached: nobody is mapped to it any more",
            hint="map it again in [accounts.map] of site.toml until what it holds under duties is gone",
        )

    async def count(self, root: OfferedRoot) -> None:
        """Find out how full a folder is: each mapped account counts its own files, the agent all others.

        Of an account that cannot be asked what it had at the last time counts.
        """
        accounts = self._rules.accounts if self._rules is not None else []
        mapped = {account.uid for account in accounts}
        before = root.landed_so_far()
        total = await trio.to_thread.run_sync(root.walk, lambda uid: uid not in mapped)
        for account in accounts:
            key = (root.folder.name, account.uid)
            try:
                self._owned[key] = await MoverHands(self, account).owned(root.folder.name)
            except FlowError as error:
                self._log.warning(
                    "an account's files are not counted", account=account.name, why=error.message
                )
            total += self._owned.get(key, 0)
        root.counted(total, before)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep movers until cancelled.

        Raises:
            LocalError: the spawner ended: an agent that is started anew has one.
        """
        if self._rules is None or self._spawner is None:
            task_status.started()
            return
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._end_idle, self._rules.idle_s)
                task_status.started()
                self._spawner.setblocking(False)
                with contextlib.suppress(OSError):
                    await trio.lowlevel.wait_readable(self._spawner)  # it never says anything: it has ended
                raise LocalError("the process that starts movers has ended", hint="start the agent again")
        finally:
            self._nursery = None
            self._spawner.close()

    async def _end_idle(self, idle_s: float) -> None:
        while True:
            await trio.sleep(max(_LEAST_PAUSE_S, idle_s / 4))
            for mover in list(self._movers.values()):
                if not mover.at_work and trio.current_time() - mover.idle_since > idle_s:
                    mover.alive = False  # who comes from now on gets another
                    mover.scope.cancel()

    @contextlib.asynccontextmanager
    async def at_work(self, account: Account) -> AsyncIterator[_Mover]:
        """The mover of an account, started where there is none, that stays for the length of the block.

        Raises:
            FlowError: it cannot be started.
        """
        async with self._starting.setdefault(account.uid, trio.Lock()):
            mover = self._movers.get(account.uid)
            if mover is None or not mover.alive:
                mover = await self._start(account)
            mover.at_work += 1
        try:
            yield mover
        finally:
            mover.at_work -= 1
            mover.idle_since = trio.current_time()

    def operation(self, mover: _Mover) -> Line:
        """A line to a mover for one operation."""
        ours, theirs = line_pair()
        try:
            mover.line.post(b"operation", (theirs.fileno(),))
        finally:
            theirs.close()
        return Line(ours, f"the mover of account {mover.account.name} ended")

    async def _start(self, account: Account) -> _Mover:
        if self._nursery is None or self._spawner is None:
            raise TemporaryError("this site's agent is stopping", reason="busy")
        ours, theirs = line_pair()
        try:
            socket.send_fds(self._spawner, [b"%d" % account.uid], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise TemporaryError("the process that starts movers is gone", reason="busy") from error
        finally:
            theirs.close()
        line = Line(ours, f"no mover of account {account.name} could be started")
        try:
            with trio.fail_after(_START_S):
                said = _value(await hear_end(line), line, Started)
        except trio.TooSlowError:
            line.close()
            raise TemporaryError(
                f"the mover of account {account.name} does not start", reason="busy"
            ) from None
        except BaseException:
            line.close()
            raise
        mover = self._movers[account.uid] = _Mover(
            account, line, trio.CancelScope(), said.pid, idle_since=trio.current_time()
        )
        self._nursery.start_soon(self._keep, mover)
        self._log.info(
            "mover started", account=account.name, uid=account.uid, pid=said.pid, confined=said.confined
        )
        return mover

    async def _keep(self, mover: _Mover) -> None:
        try:
            with mover.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(mover.line.run_writer)
                    await mover.line.receive()  # it never says anything more: it has ended
                    nursery.cancel_scope.cancel()
            why = "idle" if mover.scope.cancelled_caught else "gone"
        except trio.Cancelled:
            why = "stop"
            raise
        finally:
            mover.alive = False
            mover.line.close()
            if self._movers.get(mover.account.uid) is mover:
                del self._movers[mover.account.uid]
        tell = self._log.info if why == "idle" else self._log.warning
        tell("mover ended", account=mover.account.name, pid=mover.pid, why=why)


def is_folder(mode: int | None) -> bool:
    """Whether a mode is a folder's."""
    return mode is not None and stat.S_ISDIR(mode)
