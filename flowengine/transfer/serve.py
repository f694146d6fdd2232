"""What `flow serve` does with a client's request: one directory as a jail, read or read and write."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from flowengine.errors import Denied, NotFound, ProtocolError, UsageError
from flowengine.store.filesystem import open_beneath
from flowengine.store.landed import LandedManifest
from flowengine.store.scan_cache import ScanCache
from flowengine.store.selection import Root, Selection
from flowengine.transfer.listen import Incoming
from flowengine.transfer.pacing import Limits
from flowengine.transfer.session import Counters
from flowengine.transfer.source import run_source
from flowengine.transfer.target import NOWHERE, TargetRoot, run_target
from flowengine.units import show_path
from flowengine.wire.messages import Listed, Options
from flowengine.wire.paths import STAGING_NAME, check_name, check_relative_path

__all__ = ["ServedRoot"]

LIST_LIMIT: Final = 1000
"""Names in one `Listed` message."""


@dataclass
class ServedRoot:
    """A directory that clients may read from and, unless `read_only`, write to.

    Nothing outside it can be reached: every path goes component by component, through no link.

    Attributes:
        path: of the directory.
        read_only: refuse to be a target.
        links: "inside" refuses symbolic links that lead out of what is received; "keep" takes them as they are.
        limits: rates that bind what is sent from here, under the name "serve"; they may be set at any time.
        on_event: told of transfers as they begin and end, one line each.
        permit: asked before anything of a path is given ("release") or taken ("land"), with the client's options;
            raises where it must not be.
    """

    path: bytes
    read_only: bool = False
    links: str = "inside"
    threads: int = 1
    limits: Limits = field(default_factory=Limits)
    on_event: Callable[[str], None] = field(default=lambda line: None)
    permit: Callable[[str, bytes, Options], None] = field(default=lambda use, path, options: None)

    def __post_init__(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise NotFound(
                f"{show_path(self.path)} does not exist", hint="serve a folder that exists"
            ) from None
        except NotADirectoryError:
            raise UsageError(
                f"{show_path(self.path)} is not a folder", hint="serve the folder that it is in"
            ) from None

    async def handle(self, incoming: Incoming) -> None:
        """Serve one request of one client."""
        request = incoming.request
        path = request.path.rstrip(b"/")
        if path:
            check_relative_path(path, reserved=(STAGING_NAME,))
        match request.role:
            case "target":
                self.permit("release", path, request.options)
                await self._give(incoming, path)
            case "source":
                self.permit("land", path, request.options)
                await self._take(incoming, path)
            case "stat":
                self.permit("look", path, request.options)
                await incoming.channel.send(self._stat(path))
            case "list":
                self.permit("release", path, request.options)
                await self._list(incoming, path)
            case other:
                raise ProtocolError(f"a client asked to be {other!r}", hint="update flowengine on this side")

    def _open(self, path: bytes, flags: int = os.O_RDONLY) -> int:
        try:
            # Not waiting: to open a pipe that nobody writes to would hold everybody for ever.
            return open_beneath(self._fd, path, flags | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFound(
                f"{show_path(path)} does not exist in the served folder", hint="flow ls TICKET lists it"
            ) from None
        except OSError as error:
            raise Denied(
                f"{show_path(path)} cannot be reached in the served folder: {error.strerror}"
            ) from None

    def _lstat(self, path: bytes) -> os.stat_result | None:
        parent, _, name = path.rpartition(b"/")
        if not name:
            return os.fstat(self._fd)
        try:
            fd = open_beneath(self._fd, parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return None
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(fd)

    def _stat(self, path: bytes) -> Listed:
        st = self._lstat(path)
        return Listed([] if st is None else [(path, st.st_mode, st.st_size, st.st_mtime_ns)], True)

    async def _list(self, incoming: Incoming, path: bytes) -> None:
        fd = self._open(path)
        try:
            st = os.fstat(fd)
            if not stat.S_ISDIR(st.st_mode):
                await incoming.channel.send(Listed([(path, st.st_mode, st.st_size, st.st_mtime_ns)], True))
                return
            rows: list[tuple[bytes, int, int, int]] = []
            for name in sorted(os.fsencode(name) for name in os.listdir(fd)):
                if name == STAGING_NAME:
                    continue
                try:
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                rows.append((name, st.st_mode, st.st_size, st.st_mtime_ns))
                if len(rows) == LIST_LIMIT:
                    await incoming.channel.send(Listed(rows, False))
                    rows = []
            await incoming.channel.send(Listed(rows, True))
        finally:
            os.close(fd)

    async def _give(self, incoming: Incoming, path: bytes) -> None:
        """The client pulls."""
        request = incoming.request
        fds: list[int] = []
        try:
            if request.path.endswith(b"/") or not path:
                fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
                fds.append(fd)
                root = Root(b"/proc/self/fd/%d" % fd, b"")
            else:
                parent, _, name = path.rpartition(b"/")
                fd = self._open(parent, os.O_RDONLY | os.O_DIRECTORY)
                fds.append(fd)
                st = self._lstat(path)
                if st is None:
                    raise NotFound(
                        f"{show_path(path)} does not exist in the served folder",
                        hint="flow ls TICKET lists it",
                    )
                shown = name
                if request.options.rename and not stat.S_ISDIR(st.st_mode):
                    check_name(request.options.rename, reserved=(STAGING_NAME,))
                    shown = request.options.rename
                root = Root(b"/proc/self/fd/%d/%s" % (fd, name), shown)
            if request.options.files_from:
                for item in request.options.files_from:
                    check_relative_path(item.strip(b"/"))
            self.on_event(f"{incoming.peer} reads {show_path(path) or 'everything'}")
            async with incoming.accept(request.options) as session:
                session.pacer = self.limits.pacer("serve")
                outcome = await run_source(
                    session,
                    Selection([root], request.options.files_from),
                    cache=None if request.options.reread else ScanCache(session.profile.name),
                    counters=Counters(),
                    threads=self.threads,
                )
            self.on_event(
                f"{incoming.peer} has read {show_path(path) or 'everything'}: {outcome.receipt.state}"
            )
        finally:
            for fd in fds:
                os.close(fd)

    async def _take(self, incoming: Incoming, path: bytes) -> None:
        """The client pushes."""
        if self.read_only:
            raise Denied(
                "this folder is served read-only",
                hint="start flow serve without --read-only to receive into it",
            )
        request = incoming.request
        options: Options = msgspec.structs.replace(
            request.options,
            links="keep" if self.links == "keep" and request.options.links == "keep" else "inside",
        )
        if options.publish == "atomic" and not path:
            raise Denied(
                "the served folder itself cannot be replaced at once",
                hint="push to a folder below it, or without --publish atomic",
            )
        fd = self._make(path, make=not options.dry_run)
        try:
            self.on_event(f"{incoming.peer} writes {show_path(path) or 'the root'}")
            async with incoming.accept(options) as session:
                name = session.profile.name
                root = b"/proc/self/fd/%d" % fd if fd >= 0 else NOWHERE
                outcome = await run_target(
                    session,
                    TargetRoot(root, LandedManifest(root) if fd >= 0 else None),
                    caches=(None, None) if options.reread else (ScanCache(name), ScanCache(name)),
                    counters=Counters(),
                )
            self.on_event(f"{incoming.peer} has written {show_path(path) or 'the root'}: {outcome.state}")
        finally:
            if fd >= 0:
                os.close(fd)

    def _make(self, path: bytes, *, make: bool) -> int:
        """The target directory, made where missing; without `make`, -1 where it is missing."""
        fd = os.dup(self._fd)
        for part in path.split(b"/") if path else []:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o777, dir_fd=fd)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            except FileNotFoundError:
                return -1
            except OSError as error:
                raise Denied(
                    f"{show_path(path)} cannot be made in the served folder: {error.strerror}"
                ) from None
            finally:
                os.close(fd)
            fd = below
        return fd
