"""A mover: the process that does for one account of this host what the agent asks, with that account's rights.

Goal
    What may be read and written for a requester is decided by the kernel, as if that requester had logged in.
Plan
    Forked by the spawner, it becomes the account, for good. Over its line it gets a line for each operation: a look, a
    session to carry, a duty to do. It opens the offered folders by itself, by the configuration it was started with.
Invariants
    - No capability, nothing gained by running a program, killed with the spawner, ended with its line.
    - Nothing outside the offered folders and the account's own state folder is opened, and no connection is made; where
      the kernel has Landlock, it holds both.
    - It holds nothing of the site: no key, no certificate, no grant; only the keys of sessions that it carries, and of
      what it seals and opens for its account.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn, TypeAlias

import msgspec
import trio

import flowengine
import flowengine_agent
from flowengine.errors import LocalError
from flowengine.store.sealed_open import Opened
from flowengine.transfer.handing import Ended, Handed, Landed, told_error
from flowengine.transfer.hands import hear_answer, tell_landed, tell_named, work_on_session
from flowengine.transfer.line import Line
from flowengine.transfer.session import Counters, Observer, Session
from flowengine_agent.accounts import Account, AccountRules
from flowengine_agent.config import SiteConfig
from flowengine_agent.counting import count
from flowengine_agent.hands import Giving, Taking, give, hide, purge, take, tell_objects, unseal
from flowengine_agent.landlock import confine
from flowengine_agent.privileges import become, end_with_parent, keep_only, lock_down
from flowengine_agent.roots import Place, Roots

__all__ = [
    "Count",
    "Give",
    "Hide",
    "Look",
    "Objects",
    "Operation",
    "Owned",
    "Purge",
    "Reach",
    "Started",
    "Stat",
    "TakeIn",
    "Unseal",
    "Where",
    "run_mover",
]

_SYSTEM: Final = ("/usr", "/lib", "/lib64", "/etc", "/dev/urandom", "/proc/self", "/proc/sys")
"""What is read besides: libraries, time zones, what the kernel tells of this process and of itself."""
_KEPT_VARIABLES: Final = ("LANG", "PATH", "TZ", "FLOW_CONGESTION", "OPENBLAS_NUM_THREADS")


class Started(msgspec.Struct, frozen=True):
    """What a mover says first."""

    pid: int
    confined: bool


class Where(msgspec.Struct, frozen=True):
    """A `Place`, by its root's name."""

    root: str
    path: bytes
    contents: bool

    @classmethod
    def of(cls, place: Place) -> Where:
        """As it is told."""
        return cls(place.root.folder.name, place.path, place.contents)


class _Operation(msgspec.Struct, frozen=True, tag_field="do"):
    """Base of what a mover is asked to do."""


class Look(_Operation, frozen=True, tag="look"):
    """List a folder."""

    path: str


class Count(_Operation, frozen=True, tag="count"):
    """Count what lies below a path."""

    path: str
    within_s: float


class Stat(_Operation, frozen=True, tag="stat"):
    """What stands at a place: its mode; None where nothing does."""

    where: Where


class Reach(_Operation, frozen=True, tag="reach"):
    """Whether something is there that can be given."""

    where: Where


class Give(_Operation, frozen=True, tag="give"):
    """Carry a session as its source."""

    where: Where
    session: Handed
    how: Giving


class TakeIn(_Operation, frozen=True, tag="take"):
    """Carry a session as its target."""

    where: Where
    session: Handed
    how: Taking


class Unseal(_Operation, frozen=True, tag="unseal"):
    """Open what landed out of sight."""

    where: Where
    secrets: list[bytes]
    xattrs: bool
    owner: bool

    def __repr__(self) -> str:  # it holds keys
        return f"<Unseal {self.where}>"


class Objects(_Operation, frozen=True, tag="objects"):
    """Paths and sizes of the version that landed last at a place."""

    where: Where


class Hide(_Operation, frozen=True, tag="hide"):
    """Take into quarantine what landed; how many objects it holds then, and their bytes."""

    where: Where
    task: str
    paths: list[bytes]
    staging: bool


class Owned(_Operation, frozen=True, tag="owned"):
    """Bytes of the account's own files in an offered folder."""

    root: str


class Purge(_Operation, frozen=True, tag="purge"):
    """Destroy what is in quarantine; bytes of what was under way."""

    where: Where
    task: str


Operation: TypeAlias = Look | Count | Stat | Reach | Give | TakeIn | Unseal | Objects | Hide | Owned | Purge
_decode: Final = msgspec.msgpack.Decoder(Operation).decode
_encode: Final = msgspec.msgpack.Encoder().encode


# --- becoming a mover -----------------------------------------------------------------------------------------------


def run_mover(
    sock: socket.socket, config: SiteConfig, rules: AccountRules, account: Account, parent: int
) -> NoReturn:
    """Be a mover until the line ends; called in a process that was forked for it."""
    code = 1
    try:
        try:
            confined = _become(sock, config, rules, account, parent)
        except BaseException as error:
            sock.send(b"\0" + _encode(told_error(error)))
            raise
        sock.send(b"\0" + _encode(Ended(_encode(Started(os.getpid(), confined)), b"")))
        trio.run(_serve, sock, config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # threads may still wait for a disk; nothing that they do is needed any more


def _become(
    sock: socket.socket, config: SiteConfig, rules: AccountRules, account: Account, parent: int
) -> bool:
    """Be the account, and nothing more; whether the kernel confines it to the offered folders."""
    os.dup2(2, 1)
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become(account.uid, account.gid, account.groups())
    keep_only(())
    lock_down("flow-mover")
    end_with_parent(parent)
    os.umask(rules.umask)
    os.chdir("/")
    for name in set(os.environ) - set(_KEPT_VARIABLES):
        del os.environ[name]
    state = os.environ["FLOW_STATE_DIR"] = os.environ["SQLITE_TMPDIR"] = _state_folder(rules, account)
    program = [
        os.path.dirname(os.__file__), sys.prefix, sys.base_prefix,
        *(os.path.dirname(package.__file__ or "/nonexistent") for package in (flowengine, flowengine_agent)),
    ]  # fmt: skip
    writable = [folder.path for folder in config.roots if "write" in folder.access]
    return confine(
        [*_SYSTEM, *program, *(folder.path for folder in config.roots)], [state, "/dev/null", *writable]
    )


def _state_folder(rules: AccountRules, account: Account) -> str:
    """The folder of this account's caches; made where missing, and used only where it is this account's."""
    path = os.path.join(rules.state, str(account.uid))
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        st = os.lstat(path)
    except OSError as error:
        raise LocalError(
            f"account {account.name} cannot keep its caches in {path}: {error.strerror}",
            hint=f"as root: install -d -m 1733 {rules.state}",
        ) from None
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != account.uid or st.st_mode & 0o077:
        raise LocalError(
            f"{path} is not a folder that account {account.name} alone may use",
            hint="find out who made it, and remove it as root",
        )
    return path


# --- work -----------------------------------------------------------------------------------------------------------


async def _serve(sock: socket.socket, config: SiteConfig) -> None:
    line = Line(sock, "the agent is gone")
    roots = Roots(config.roots, as_account=True, site=config.site)
    async with trio.open_nursery() as nursery:
        while (got := await line.receive()) is not None:
            for fd in got[1]:
                nursery.start_soon(_operate, socket.socket(fileno=fd), roots)
        os._exit(0)  # the agent ended, or needs this mover no more: whatever is under way is over


async def _operate(sock: socket.socket, roots: Roots) -> None:
    line = Line(sock, "the agent has ended this")
    descriptors: list[int] = []
    try:
        got = await line.receive()
        if got is None:
            return
        descriptors = got[1]
        operation = _decode(got[0])
        if isinstance(operation, Give | TakeIn):
            control = socket.socket(fileno=descriptors.pop())
            await _carry(operation, line, control, roots)
            return
        if isinstance(operation, Unseal | Objects):
            value: object = await _tell_on(operation, line, roots)
        else:
            value = await trio.to_thread.run_sync(_answer, operation, roots)
        line.post(_encode(Ended(_encode(value), b"")))
    except Exception as error:
        line.post(_encode(told_error(error)))
    finally:
        for fd in descriptors:
            os.close(fd)
        await line.flush()
        line.close()


async def _tell_on(asked: Unseal | Objects, line: Line, roots: Roots) -> Opened | None:
    """Do, for as long as the agent waits for it, what tells it of objects meanwhile, some at a time."""
    stop = threading.Event()

    async def watch() -> None:
        while await hear_answer(line):
            pass
        stop.set()  # the agent has left off

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        nursery.start_soon(line.run_writer)
        place = _place(roots, asked.where)
        if isinstance(asked, Objects):
            work: Callable[[], Opened | None] = partial(_tell_objects, place, line)
        else:
            work = partial(
                unseal,
                place,
                asked.secrets,
                xattrs=asked.xattrs,
                owner=asked.owner,
                note=partial(tell_landed, line),
                named=partial(tell_named, line),
                stopped=stop.is_set,
            )
        found = await trio.to_thread.run_sync(work)
        nursery.cancel_scope.cancel()
    return found


def _tell_objects(place: Place, line: Line) -> None:
    with place.target(make=False) as folder:
        if folder is not None:
            tell_objects(folder, partial(tell_landed, line))


def _answer(operation: Operation, roots: Roots) -> object:
    """Everything but sessions; for a thread."""
    match operation:
        case Look(path):
            return roots.look(path)
        case Count(path, within_s):
            return count(roots, path, within_s)
        case Stat(where):
            st = _place(roots, where).lstat()
            return None if st is None else st.st_mode
        case Reach(where):
            with _place(roots, where).selection():
                return None
        case Hide(where, task, paths, staging):
            return hide(_place(roots, where), task, paths, staging=staging)
        case Owned(root):
            me = os.geteuid()
            return _place(roots, Where(root, b"", True)).root.walk(lambda uid: uid == me)
        case Purge(where, task):
            return purge(_place(roots, where), task)
    raise AssertionError(operation)


def _place(roots: Roots, where: Where) -> Place:
    root = next((root for root in roots.roots if root.folder.name == where.root), None)
    if root is None:
        raise LocalError(f"{where.root} is not offered any more", hint="restart the agent")
    return Place(root, where.path, where.contents)


async def _carry(operation: Give | TakeIn, line: Line, control: socket.socket, roots: Roots) -> None:
    place = _place(roots, operation.where)

    async def work(session: Session, counters: Counters, observe: Observer, landed: Landed) -> bytes:
        if isinstance(operation, TakeIn):
            came = take(session, place, operation.how, counters=counters, observe=observe, landed=landed)
            return _encode(await came)
        return _encode(await give(session, place, operation.how, counters=counters, observe=observe))

    await work_on_session(operation.session, line, control, work)
