"""Opens a folder of sealed objects into another: every object under the path that it was sealed with, verified.

Where an object lies among the sealed ones does not matter, so part of a held copy can be opened as well. Each is written
beside its place, verified to its end, made durable and renamed; nothing of one that fails is ever seen under its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from flowengine.errors import FlowError, IntegrityError, LocalError, ProtocolError, TemporaryError
from flowengine.store.attributes import apply_extra
from flowengine.store.filesystem import local_error, open_beneath, sync_filesystem
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

_BUSY_NAME: Final = b"opening"
_MAX_FAILURES: Final = 1000

FindKey = Callable[[bytes], SealingKey]


@dataclass
class Opened:
    """What was opened.

    Attributes:
        objects, size_bytes: files and links, and the bytes of files.
        rows: (path, size) of each.
        failures: (path, reason, message) of what could not be opened; a sealed path where no other is known.
    """

    objects: int = 0
    size_bytes: int = 0
    rows: list[tuple[bytes, int]] = field(default_factory=list)
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
    stopped: Callable[[], bool] = lambda: False,
) -> Opened:
    """Open what lies in a folder of sealed objects.

    Args:
        source: folder of sealed objects, at any depth.
        target: where to; must exist.
        find_key: gives the key of an id, or raises.
        consume: whether the sealed folder is removed once all of it is open.
        stopped: asked again and again whether to leave off; what was not opened then can be opened later.

    Raises:
        TemporaryError: it was stopped (reason "interrupted").
        FlowError: a key is missing or damaged, or the target cannot be written; what was opened until then stays.
    """
    found = Opened()
    folders: list[ObjectMeta] = []
    keys: dict[bytes, SealingKey] = {}
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for path in _files(source, b""):
            shown = path
            try:
                meta = _open_one(
                    root, os.path.join(source, path), show_path(path), keys, find_key, folders, stopped
                )
                shown = meta.path
            except (IntegrityError, ProtocolError) as error:
                _fail(found, shown, error)
                continue
            except OSError as error:
                if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
                    why = f"something else is in its way: {error.strerror}"
                    _fail(found, shown, LocalError(why, reason="in-the-way"))
                    continue
                raise local_error(error, "cannot open a sealed object into", target) from error
            if meta.kind != "directory":
                found.objects += 1
                found.size_bytes += meta.size
                found.rows.append((meta.path, meta.size))
        if consume and not found.failures:
            sync_filesystem(root)  # what was opened must be durable before what it was opened from goes
            shutil.rmtree(source)
        with contextlib.suppress(OSError):
            os.rmdir(STAGING_NAME, dir_fd=root)
        for meta in sorted(folders, key=lambda one: one.path, reverse=True):
            _dress_folder(root, meta)
        os.fsync(root)
    finally:
        os.close(root)
    return found


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise TemporaryError(
            "opening was stopped", hint="the same transfer goes on with what is left", reason="interrupted"
        )


def _fail(found: Opened, path: bytes, error: FlowError) -> None:
    if len(found.failures) < _MAX_FAILURES:
        found.failures.append((path, error.reason, error.message))


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


def _open_one(
    root: int,
    path: bytes,
    where: str,
    keys: dict[bytes, SealingKey],
    find_key: FindKey,
    folders: list[ObjectMeta],
    stopped: Callable[[], bool],
) -> ObjectMeta:
    _go_on(stopped)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise IntegrityError(f"{where} is no sealed object: {error.strerror}", reason="not-sealed") from None
    try:
        header = parse_header(os.pread(fd, HEADER_BYTES, 0), where)
        if parse_object_name(os.path.basename(path)) != header.object_id:
            raise IntegrityError(
                f"{where} holds the sealed object {object_name(header.object_id).decode()}",
                hint="somebody exchanged objects: take another copy",
                reason="sealed-damaged",
            )
        if header.key_id not in keys:
            keys[header.key_id] = find_key(header.key_id)
        size = os.fstat(fd).st_size
        opener = ObjectOpener(keys[header.key_id], header, size, where)
        start, length = opener.meta_span(os.pread(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES)))
        meta = opener.open_meta(os.pread(fd, length, start))
        if meta.path:
            check_relative_path(meta.path, reserved=(STAGING_NAME,))
        if meta.kind == "directory":
            if meta.path:
                os.close(_folder(root, meta.path))
            folders.append(meta)
        elif meta.kind == "symlink":
            check_link_target(meta.path, meta.link)
            _land(root, meta, lambda name, parent: os.symlink(meta.link, name, dir_fd=parent))
        else:
            _land(root, meta, lambda name, parent: _write(fd, opener, meta, name, parent, stopped))
    finally:
        os.close(fd)
    return meta


def _folder(root: int, path: bytes) -> int:
    """A folder below the root, made where missing, reached through no link."""
    fd = os.dup(root)
    try:
        for part in path.split(b"/") if path else []:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o777, dir_fd=fd)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        return os.dup(fd)
    finally:
        os.close(fd)


def _land(root: int, meta: ObjectMeta, make: Callable[[bytes, int], object]) -> None:
    """Make an object in the staging folder of the target, and give it its name."""
    parent_path, _, name = meta.path.rpartition(b"/")
    staging = _folder(root, STAGING_NAME)
    parent = -1
    try:
        parent = _folder(root, parent_path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_BUSY_NAME, dir_fd=staging)
        try:
            make(_BUSY_NAME, staging)
            os.utime(_BUSY_NAME, ns=(meta.mtime_ns, meta.mtime_ns), dir_fd=staging, follow_symlinks=False)
            os.rename(_BUSY_NAME, name, src_dir_fd=staging, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_BUSY_NAME, dir_fd=staging)
            raise
        os.fsync(parent)
    finally:
        os.close(staging)
        if parent >= 0:
            os.close(parent)


def _write(
    source: int,
    opener: ObjectOpener,
    meta: ObjectMeta,
    name: bytes,
    parent: int,
    stopped: Callable[[], bool],
) -> None:
    """Write and verify the plaintext of one file."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
    try:
        at = HEADER_BYTES
        with open(fd, "wb", buffering=0, closefd=False) as file:
            while length := opener.segment_bytes():
                _go_on(stopped)
                plaintext = opener.open_segment(os.pread(source, length, at))
                at += length
                done = 0
                while done < len(plaintext):
                    done += file.write(plaintext[done:])
        opener.check_end()
        if meta.extra:
            apply_extra(fd, meta.extra)
        os.fchmod(fd, stat.S_IMODE(meta.mode))
        os.fsync(fd)
    finally:
        os.close(fd)


def _dress_folder(root: int, meta: ObjectMeta) -> None:
    """Give a folder its mode and times once everything is in it."""
    try:
        fd = open_beneath(root, meta.path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # replaced meanwhile
    try:
        if meta.extra:
            apply_extra(fd, meta.extra)
        os.fchmod(fd, stat.S_IMODE(meta.mode))
        os.utime(fd, ns=(meta.mtime_ns, meta.mtime_ns))
        os.fsync(fd)
    finally:
        os.close(fd)
