"""Opens a folder of sealed objects into another: every object under the path that it was sealed with, verified.

Where an object lies among the sealed ones does not matter, so part of a held copy can be opened as well. Each is written
beside its place, verified to its end, made durable and renamed; nothing of one that fails is ever seen under its name.
Whoever keeps account of what is opened is told before it has its name, so a process that dies leaves nothing off account.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from flowengine.errors import FlowError, IntegrityError, LocalError, ProtocolError, TemporaryError
from flowengine.store.attributes import apply_extra
from flowengine.store.filesystem import READ_FOLDER, local_error, open_beneath, process_umask, sync_filesystem
from flowengine.store.staging import Staging
from flowengine.trust.sealed import (
    HEADER_BYTES,
    TRAILER_BYTES,
    ObjectHeader,
    ObjectMeta,
    ObjectOpener,
    SealingKey,
    object_name,
    parse_header,
    parse_object_name,
)
from flowengine.units import show_path
from flowengine.wire.paths import STAGING_NAME, check_link_target, check_relative_path

__all__ = ["Opened", "check_held", "open_sealed"]

_MAX_FAILURES: Final = 1000
_AT_ONCE: Final = 64
"""Objects that are looked at, told and then opened together; each holds a descriptor meanwhile."""
_PLAIN_MODE: Final = 0o1777
"""Bits of a mode that are given to whatever comes; to be set-user-id is for those who asked for owners."""

FindKey = Callable[[bytes], SealingKey]
Note = Callable[[list[tuple[bytes, int]]], object]


@dataclass
class Opened:
    """What was opened.

    Attributes:
        objects, size_bytes: files and links, and the bytes of files.
        failures: (path, reason, message) of what could not be opened; a sealed path where no other is known.
    """

    objects: int = 0
    size_bytes: int = 0
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)


def check_held(folder: bytes, path: bytes) -> ObjectHeader:
    """The header of an object that lies in a folder of sealed ones; reads its first bytes and needs no key.

    Raises:
        IntegrityError: it is no sealed object, or is called as none is (reason "not-sealed").
    """
    where = show_path(path)
    name = path.rpartition(b"/")[2]
    try:
        fd = os.open(os.path.join(folder, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise IntegrityError(f"{where} is no sealed object: {error.strerror}", reason="not-sealed") from None
    try:
        header = parse_header(os.pread(fd, HEADER_BYTES, 0), where)
    finally:
        os.close(fd)
    if parse_object_name(name) != header.object_id:
        raise IntegrityError(
            f"{where} holds the sealed object {object_name(header.object_id).decode()}", reason="not-sealed"
        )
    return header


def open_sealed(
    source: bytes,
    target: bytes,
    find_key: FindKey,
    *,
    consume: bool = False,
    xattrs: bool = False,
    owner: bool = False,
    note: Note = lambda rows: None,
    named: Note = lambda rows: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Opened:
    """Open what lies in a folder of sealed objects.

    Args:
        source: folder of sealed objects, at any depth.
        target: where to; must exist.
        find_key: gives the key of an id, or raises.
        consume: whether the sealed folder is removed once all of it is open.
        xattrs, owner: whether these are given to what is opened, where they were sealed with it.
        note: told of files and links that are about to get their names, and of some that then fail; some at a time.
        named: told of those that have them; some at a time.
        stopped: asked again and again whether to leave off; what was not opened then can be opened later.

    Raises:
        TemporaryError: it was stopped (reason "interrupted"), or somebody else writes to the target (reason "busy").
        FlowError: a key is missing or damaged, or the target cannot be written; what was opened until then stays.
    """
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        staging = Staging(root, target)
        try:
            opening = _Opening(
                root, target, staging, find_key, extras=xattrs or owner, owner=owner, stopped=stopped
            )
            paths = _files(source, b"")
            while part := list(islice(paths, _AT_ONCE)):
                opening.open(source, part, note, named)
            opening.dress_folders()
            if consume and not opening.found.failures:
                sync_filesystem(root)  # what was opened must be durable before what it was opened from goes
                shutil.rmtree(source)
        finally:
            staging.close(remove=False)
        opening.dress_root()
        os.fsync(root)
    finally:
        os.close(root)
    return opening.found


def _files(folder: bytes, below: bytes) -> Iterator[bytes]:
    """Paths of all that is no folder, in order; staging is left out."""
    pending = [below]
    while pending:
        path = pending.pop()
        with os.scandir(os.path.join(folder, path) if path else folder) as listing:
            rows = sorted((os.fsencode(item.name), item.is_dir(follow_symlinks=False)) for item in listing)
        for name, is_folder in reversed(rows):
            if is_folder and name != STAGING_NAME:
                pending.append(path + b"/" + name if path else name)
        for name, is_folder in rows:
            if not is_folder:
                yield path + b"/" + name if path else name


@dataclass
class _Object:
    """A sealed object whose description was opened."""

    fd: int
    opener: ObjectOpener
    meta: ObjectMeta

    @property
    def is_folder(self) -> bool:
        return self.meta.kind == "directory"


class _Opening:
    """Opens objects below one target."""

    def __init__(
        self,
        root: int,
        target: bytes,
        staging: Staging,
        find_key: FindKey,
        *,
        extras: bool,
        owner: bool,
        stopped: Callable[[], bool],
    ) -> None:
        self.found = Opened()
        self._root = root
        self._target = target
        self._staging = staging
        self._find_key = find_key
        self._extras = extras
        self._mode_bits = 0o7777 if owner else _PLAIN_MODE
        self._stopped = stopped
        self._keys: dict[bytes, SealingKey] = {}
        self._folders: list[ObjectMeta] = []
        self._made: set[bytes] = set()

    def open(self, source: bytes, paths: list[bytes], note: Note, named: Note) -> None:
        """Open some objects: all are looked at first, so that they are on account before any has its name."""
        with contextlib.ExitStack() as stack:
            objects: list[_Object] = []
            for path in paths:
                self._go_on()
                with self._failing(path):
                    one = self._describe(os.path.join(source, path), show_path(path))
                    stack.callback(os.close, one.fd)
                    objects.append(one)
            if rows := [(one.meta.path, one.meta.size) for one in objects if not one.is_folder]:
                note(rows)
            done: list[tuple[bytes, int]] = []
            for one in objects:
                self._go_on()
                with self._failing(one.meta.path):
                    self._land(one)
                    if not one.is_folder:
                        self.found.objects += 1
                        self.found.size_bytes += one.meta.size
                        done.append((one.meta.path, one.meta.size))
            if done:
                named(done)

    @contextlib.contextmanager
    def _failing(self, shown: bytes) -> Iterator[None]:
        """What is wrong with one object is noted, and the others go on."""
        try:
            yield
        except (IntegrityError, ProtocolError) as error:
            self._fail(shown, error)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY):
                raise local_error(error, "cannot open a sealed object into", self._target) from error
            why = f"something else is in its way: {error.strerror}"
            self._fail(shown, LocalError(why, reason="in-the-way"))

    def _fail(self, path: bytes, error: FlowError) -> None:
        if len(self.found.failures) < _MAX_FAILURES:
            self.found.failures.append((path, error.reason, error.message))

    def _go_on(self) -> None:
        if self._stopped():
            raise TemporaryError(
                "opening was stopped",
                hint="the same transfer goes on with what is left",
                reason="interrupted",
            )

    def _describe(self, path: bytes, where: str) -> _Object:
        """The object at a path; its descriptor is the caller's to close."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise IntegrityError(
                f"{where} is no sealed object: {error.strerror}", reason="not-sealed"
            ) from None
        try:
            header = parse_header(os.pread(fd, HEADER_BYTES, 0), where)
            if parse_object_name(os.path.basename(path)) != header.object_id:
                raise IntegrityError(
                    f"{where} holds the sealed object {object_name(header.object_id).decode()}",
                    hint="somebody exchanged objects: take another copy",
                    reason="sealed-damaged",
                )
            if header.key_id not in self._keys:
                self._keys[header.key_id] = self._find_key(header.key_id)
            size = os.fstat(fd).st_size
            opener = ObjectOpener(self._keys[header.key_id], header, size, where)
            start, length = opener.meta_span(os.pread(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES)))
            meta = opener.open_meta(os.pread(fd, length, start))
            if meta.path:
                check_relative_path(meta.path, reserved=(STAGING_NAME,))
            if meta.kind == "symlink":
                check_link_target(meta.path, meta.link)
        except BaseException:
            os.close(fd)
            raise
        return _Object(fd, opener, meta)

    # --- what is made -------------------------------------------------------------------------------------------

    def _land(self, one: _Object) -> None:
        """Make an object in the staging folder of the target, and give it its name."""
        meta = one.meta
        if one.is_folder:
            os.close(self._folder(meta.path))
            self._folders.append(meta)
            return
        parent_path, _, name = meta.path.rpartition(b"/")
        parent = self._folder(parent_path)
        staged = self._staging.small_name()
        try:
            try:
                if meta.kind == "symlink":
                    os.symlink(meta.link, staged, dir_fd=self._staging.fd)
                else:
                    self._write(one, staged)
                os.utime(
                    staged, ns=(meta.mtime_ns, meta.mtime_ns), dir_fd=self._staging.fd, follow_symlinks=False
                )
                os.rename(staged, name, src_dir_fd=self._staging.fd, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(staged, dir_fd=self._staging.fd)
                raise
            os.fsync(parent)
        finally:
            os.close(parent)

    def _folder(self, path: bytes) -> int:
        """A folder below the root, reached through no link; made where missing, for nobody else until it is dressed."""
        fd = os.dup(self._root)
        done = b""
        try:
            for part in path.split(b"/") if path else []:
                done = done + b"/" + part if done else part
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
                    self._made.add(done)
                below = os.open(part, READ_FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
            return os.dup(fd)
        finally:
            os.close(fd)

    def _write(self, one: _Object, name: str) -> None:
        """Write and verify the plaintext of one file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self._staging.fd)
        try:
            at = HEADER_BYTES
            with open(fd, "wb", buffering=0, closefd=False) as file:
                while length := one.opener.segment_bytes():
                    self._go_on()
                    plaintext = one.opener.open_segment(os.pread(one.fd, length, at))
                    at += length
                    done = 0
                    while done < len(plaintext):
                        done += file.write(plaintext[done:])
            one.opener.check_end()
            self._dress(fd, one.meta)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _dress(self, fd: int, meta: ObjectMeta) -> None:
        """Owner before mode: chown(2) takes the set-user-id bit away."""
        try:
            if meta.extra and self._extras:
                apply_extra(fd, meta.extra)
            os.fchmod(fd, meta.mode & self._mode_bits)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            why = f"the target cannot give it its attributes: {error.strerror}"
            raise IntegrityError(why, reason="attributes") from None

    # --- folders, once everything is in them --------------------------------------------------------------------

    def dress_folders(self) -> None:
        """Give folders their modes and times; one that nothing was sealed of gets the usual mode."""
        mode = 0o777 & ~process_umask()
        described = {meta.path for meta in self._folders}
        for path in self._made - described:
            with self._opened(path) as fd:
                if fd >= 0:
                    os.fchmod(fd, mode)
        for meta in sorted(self._folders, key=lambda one: one.path, reverse=True):
            self._dress_folder(meta)

    def dress_root(self) -> None:
        """Once more for the target itself, whose time the end of staging moved."""
        for meta in self._folders:
            if not meta.path:
                self._dress_folder(meta)

    def _dress_folder(self, meta: ObjectMeta) -> None:
        with self._opened(meta.path) as fd, self._failing(meta.path):
            if fd >= 0:
                self._dress(fd, meta)
                os.utime(fd, ns=(meta.mtime_ns, meta.mtime_ns))
                os.fsync(fd)

    @contextlib.contextmanager
    def _opened(self, path: bytes) -> Iterator[int]:
        try:
            fd = open_beneath(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            yield -1  # replaced meanwhile
            return
        try:
            yield fd
        finally:
            os.close(fd)
