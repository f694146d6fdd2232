"""The folders that a site offers: which of them a path means, what is in them, how full they may get.

A site path is "/NAME/rest" with the longest name that fits. Below a root every step is taken without following
links (`store.filesystem.open_beneath`), so nothing outside can be reached, whatever links lie inside.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from flowengine.api.agents import Answer
from flowengine.api.sites import Root
from flowengine.errors import Denied, FlowError, LocalError, NotFound
from flowengine.store.filesystem import open_beneath
from flowengine.store.selection import Root as SelectedRoot
from flowengine.store.selection import Selection
from flowengine.units import format_bytes, show_path
from flowengine.wire.paths import STAGING_NAME, check_relative_path
from flowengine_agent.config import OfferedFolder

__all__ = ["MAX_LISTED", "OfferedRoot", "Place", "Roots"]

MAX_LISTED: Final = 10_000
"""Entries of a folder that are shown at most."""
MAX_LISTED_BYTES: Final = 900_000
"""Of them as JSON: the coordinator takes 1 MiB as one body."""


class OfferedRoot:
    """One offered folder, held open.

    Args:
        as_account: whether other accounts than this process's own read and write it, or this process is one of theirs:
            then it is opened when it is needed, and what may be done is found out by doing it.
        site: whose it is, for messages that are read elsewhere.

    Raises:
        LocalError: it is missing, no folder, or this account may not read (or write) it.
    """

    def __init__(self, folder: OfferedFolder, *, as_account: bool = False, site: str = "") -> None:
        self.folder = folder
        self.site = site
        self._lock = threading.Lock()
        self._used = 0
        self._coming: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        """Of what is coming, what the last walk has seen."""
        self._fd = -1
        if not as_account:
            self._check()

    @property
    def fd(self) -> int:
        """Of the folder, open.

        Raises:
            LocalError: it cannot be opened by this process's account.
        """
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = os.open(self.folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise LocalError(
                        f"the root {self.folder.name} ({self.folder.path}) cannot be opened by user id "
                        f"{os.geteuid()}: {error.strerror}",
                        hint="make the folder, or give that account the right to read it",
                    ) from None
            return self._fd

    def _check(self) -> None:
        folder = self.folder
        assert self.fd >= 0
        wanted = (os.R_OK | os.X_OK if "read" in folder.access else 0) | (
            os.W_OK | os.X_OK if "write" in folder.access else 0
        )
        if not os.access(folder.path, wanted):
            self.close()
            raise LocalError(
                f"the root {folder.name} is offered for {folder.access}, which this account may not do in "
                f"{folder.path}",
                hint="change its owner or mode, or offer less",
            )

    @property
    def real_path(self) -> bytes:
        """Where it lies, links resolved."""
        return os.path.realpath(os.fsencode(self.folder.path))

    def close(self) -> None:
        """Let the folder go."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def walk(self, counts: Callable[[int], bool] = lambda uid: True) -> int:
        """Bytes of the files in it, as far as this process may look; for a thread.

        Args:
            counts: whether a file of a user id counts.
        """
        total = 0
        pending = [os.fsencode(self.folder.path)]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
                            continue
                        st = entry.stat(follow_symlinks=False)
                        total += st.st_size if counts(st.st_uid) else 0
            except OSError:
                continue  # it went meanwhile, or is not ours to count
        return total

    def count(self) -> int:
        """Walk the folder, and take what it holds for used; for a thread."""
        before = self.landed_so_far()
        total = self.walk()
        self.counted(total, before)
        return total

    def landed_so_far(self) -> dict[str, int]:
        """What running tasks have landed, for `counted`; to be asked before a walk begins."""
        with self._lock:
            return dict(self._coming)

    def counted(self, total: int, before: dict[str, int]) -> None:
        """So many bytes were found in it, among them what had landed before."""
        with self._lock:
            self._used, self._counted = total, before

    def used_bytes(self) -> int:
        """As counted last, with what has landed since."""
        with self._lock:
            return self._used + sum(map(self._uncounted, self._coming))

    def _uncounted(self, task: str) -> int:
        return max(0, self._coming.get(task, 0) - self._counted.get(task, 0))

    def coming(self, task: str, landed_bytes: int) -> None:
        """A task has landed so much so far.

        Raises:
            LocalError: the budget is used up (reason "budget").
        """
        with self._lock:
            self._coming[task] = landed_bytes
        self.check_budget()

    def check_budget(self) -> None:
        """Raise where nothing more may land (reason "budget")."""
        budget = self.folder.budget_bytes
        if budget is not None and self.used_bytes() >= budget:
            raise LocalError(
                f"the root {self.folder.name} is full: {format_bytes(self.used_bytes())} of its budget of "
                f"{format_bytes(budget)}",
                hint="remove what is not needed there, or raise the root's budget in site.toml",
                reason="budget",
            )

    def settled(self, task: str) -> None:
        """A task ended; what it landed counts on."""
        with self._lock:
            self._used += self._uncounted(task)
            self._coming.pop(task, None)
            self._counted.pop(task, None)

    def described(self) -> Root:
        """The root as the coordinator shows it."""
        folder = self.folder
        free = None
        try:
            st = os.fstatvfs(self.fd)
            free = st.f_bavail * st.f_frsize
        except (OSError, LocalError):
            pass
        used = self.used_bytes() if folder.budget_bytes is not None else None
        return Root(
            name=folder.name,
            access=folder.access,
            budget_bytes=folder.budget_bytes,
            used_bytes=used,
            free_bytes=free,
        )


@dataclass(frozen=True)
class Place:
    """What a site path means here.

    Attributes:
        root: the offered folder that it lies in.
        path: below the root, without slashes at its ends; empty: the root itself.
        contents: whether the path ended with a slash: what is in it, not the folder itself.
    """

    root: OfferedRoot
    path: bytes
    contents: bool

    @property
    def real_path(self) -> bytes:
        """Where it lies, links above the root resolved (below it none is followed)."""
        return os.path.join(self.root.real_path, self.path) if self.path else self.root.real_path

    @property
    def shown(self) -> str:
        """As SITE:/PATH, for messages."""
        name = self.root.folder.name.rstrip("/")
        path = f"{name}/{show_path(self.path)}" if self.path else name or "/"
        return f"{self.root.site}:{path}" if self.root.site else path

    def lstat(self) -> os.stat_result | None:
        """What stands there; None where nothing does."""
        parent, _, name = self.path.rpartition(b"/")
        if not name:
            return os.fstat(self.root.fd)
        try:
            with self._opened(parent, os.O_RDONLY | os.O_DIRECTORY) as fd:
                return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return None

    @contextmanager
    def _opened(self, path: bytes, flags: int) -> Iterator[int]:
        fd = open_beneath(self.root.fd, path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The folder, open, reached through no link.

        Raises:
            Denied: it cannot be reached so.
        """
        try:
            fd = open_beneath(self.root.fd, self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise Denied(f"{self.shown} cannot be reached: {error.strerror}") from None
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def selection(self, rename: bytes = b"") -> Iterator[Selection]:
        """What a source offers of this place; reached through no link, and held open meanwhile.

        Args:
            rename: what a single file is to be called at the target; a folder keeps its name.

        Raises:
            NotFound: nothing is there.
            Denied: it cannot be reached without following links.
        """
        fd = -1
        try:
            if self.contents:
                fd = open_beneath(self.root.fd, self.path, os.O_RDONLY | os.O_DIRECTORY)
                root = SelectedRoot(b"/proc/self/fd/%d" % fd, b"")
            else:
                parent, _, name = self.path.rpartition(b"/")
                fd = open_beneath(self.root.fd, parent, os.O_RDONLY | os.O_DIRECTORY)
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                shown = rename if rename and not stat.S_ISDIR(st.st_mode) else name
                root = SelectedRoot(b"/proc/self/fd/%d/%s" % (fd, name), shown)
            yield Selection([root])
        except FileNotFoundError:
            raise NotFound(f"{self.shown} does not exist", hint="flow ls lists what is there") from None
        except NotADirectoryError:
            there = self.lstat()
            if there is not None and stat.S_ISREG(there.st_mode):
                raise NotFound(f"{self.shown} is not a folder", hint="leave out the final slash") from None
            raise Denied(
                f"{self.shown} is reached through something that is no folder",
                hint="links are not followed: name the real path",
            ) from None
        except OSError as error:
            raise Denied(f"{self.shown} cannot be reached: {error.strerror}") from None
        finally:
            if fd >= 0:
                os.close(fd)

    @contextmanager
    def target(self, *, make: bool) -> Iterator[bytes | None]:
        """A path by which this folder is reached and nothing else, while the block lasts; made where missing.

        Gives None where it is missing and `make` is not set.

        Raises:
            Denied: it cannot be reached without following links, or made.
        """
        fd = os.dup(self.root.fd)
        try:
            for part in self.path.split(b"/") if self.path else []:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o777, dir_fd=fd)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
        except FileNotFoundError:
            os.close(fd)
            fd = -1
        except OSError as error:
            os.close(fd)
            raise Denied(
                f"{self.shown} cannot be written: {error.strerror}",
                hint="it must be a folder, reached through folders and no links, that the agent's account may write",
            ) from None
        try:
            yield b"/proc/self/fd/%d" % fd if fd >= 0 else None
        finally:
            if fd >= 0:
                os.close(fd)

    def parent(self) -> tuple[Place, bytes]:
        """The folder that this path lies in, and its name there."""
        folder, _, name = self.path.rpartition(b"/")
        return Place(self.root, folder, True), name


class Roots:
    """All that a site offers; `as_account` and `site` as of `OfferedRoot`."""

    def __init__(self, folders: Sequence[OfferedFolder], *, as_account: bool = False, site: str = "") -> None:
        self.roots = [OfferedRoot(folder, as_account=as_account, site=site) for folder in folders]
        self.roots.sort(key=lambda root: -len(root.folder.name))

    def check_names(self) -> None:
        """Refuse folders that can be reached under two names: labels and policies speak of names.

        Raises:
            LocalError: one of them lies in another, links followed.
        """
        for inner in self.roots:
            for outer in self.roots:
                apart = inner is outer or not _lies_in(inner.real_path, outer.real_path)
                if apart or (inner.real_path == outer.real_path and inner.folder.name < outer.folder.name):
                    continue
                raise LocalError(
                    f"the offered folder {inner.folder.name!r} lies in {outer.folder.name!r}: what is labelled under the "
                    "one name could leave under the other",
                    hint="with policies a site offers each folder under one name: take one of the two roots away",
                )

    def described(self) -> list[Root]:
        """For the heartbeat, in the order of their names."""
        return sorted((root.described() for root in self.roots), key=lambda root: root.name)

    def find(self, site_path: str, use: Literal["read", "write"]) -> Place:
        """What a site path means, where that may be done.

        Raises:
            Denied: no root holds it, or the root is not offered for that.
            ProtocolError: the path is not one that can be used.
        """
        for root in self.roots:
            name = root.folder.name.rstrip("/")
            if site_path == name or site_path.startswith(name + "/"):
                rest = os.fsencode(site_path[len(name) :])
                path = rest.removeprefix(b"/").removesuffix(b"/")
                if path:
                    check_relative_path(path, reserved=(STAGING_NAME,))
                if use not in root.folder.access:
                    raise Denied(
                        f"{site_path} lies in {root.folder.name}, which this site does not offer for "
                        f"{'reading' if use == 'read' else 'writing'}",
                        hint="choose another path; flow site show names what is offered",
                        reason="not-offered",
                    )
                return Place(root, path, rest.endswith(b"/") or not path)
        raise Denied(
            f"{site_path} lies in no folder that this site offers",
            hint=f"offered are {', '.join(sorted(root.folder.name for root in self.roots))}",
            reason="not-offered",
        )

    def other_names(self, site_path: str) -> list[str]:
        """Other site paths under which some of what lies at a path, or all of it, is offered as well."""
        here = self.find(site_path, "read")
        mine = here.real_path.rstrip(b"/") + b"/"
        found = []
        for root in self.roots:
            top = root.real_path.rstrip(b"/") + b"/"
            name = root.folder.name.rstrip("/")
            if root is here.root:
                continue
            if mine.startswith(top):
                below = os.fsdecode(mine[len(top) :]).rstrip("/")
                found.append(f"{name}/{below}" if below else name or "/")
            elif top.startswith(mine):
                found.append(name or "/")
        return found

    def look(self, site_path: str) -> Answer:
        """The answer to a look at a folder; what is wrong with it is in the answer. For a thread."""
        try:
            return self._look(site_path)
        except FlowError as error:
            return Answer(reason=error.reason, message=error.message, complete=False)

    def _look(self, site_path: str) -> Answer:
        if site_path.strip("/") == "" and not any(root.folder.name == "/" for root in self.roots):
            names = sorted({root.folder.name.strip("/") for root in self.roots})
            return Answer(entries=[(name, "directory", 0, 0) for name in names])
        for root in self.roots:  # a look needs no right to read the bytes
            name = root.folder.name.rstrip("/")
            if site_path == name or site_path.startswith(name + "/"):
                path = os.fsencode(site_path[len(name) :]).removeprefix(b"/").removesuffix(b"/")
                if path:
                    check_relative_path(path)
                return _listed(root, path, site_path)
        raise NotFound(f"{site_path} lies in no folder that this site offers", reason="not-offered")


def _lies_in(path: bytes, other: bytes) -> bool:
    one, two = os.path.realpath(path), os.path.realpath(other).rstrip(b"/")
    return one == (two or b"/") or one.startswith(two + b"/")


def _listed(root: OfferedRoot, path: bytes, shown: str) -> Answer:
    try:
        # Not waiting: to open a pipe that nobody writes to would hold the thread for ever.
        fd = open_beneath(root.fd, path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{shown} does not exist") from None
    except OSError as error:
        raise Denied(f"{shown} cannot be read: {error.strerror}") from None
    try:
        st = os.fstat(fd)
        if not stat.S_ISDIR(st.st_mode):
            name = show_path(path.rpartition(b"/")[2])
            return Answer(entries=[(name, _kind(st.st_mode), st.st_size, st.st_mtime_ns)])
        rows: list[tuple[str, str, int, int]] = []
        complete, size = True, 0
        for entry in sorted(os.listdir(fd)):
            name_bytes = os.fsencode(entry)
            if name_bytes == STAGING_NAME:
                continue
            if len(rows) == MAX_LISTED:
                complete = False
                break
            try:
                st = os.stat(name_bytes, dir_fd=fd, follow_symlinks=False)
            except OSError:
                continue
            row = (show_path(name_bytes), _kind(st.st_mode), st.st_size, st.st_mtime_ns)
            size += len(msgspec.json.encode(row)) + 1
            if size > MAX_LISTED_BYTES:
                complete = False
                break
            rows.append(row)
        return Answer(entries=rows, complete=complete)
    except OSError as error:
        raise Denied(f"{shown} cannot be listed: {error.strerror}") from None
    finally:
        os.close(fd)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISREG(mode):
        return "file"
    return "link" if stat.S_ISLNK(mode) else "other"
