"""`--publish atomic`: a whole version appears at once, or not at all.

Plan
    The transfer lands in a sibling folder `.NAME.flow-next`, which begins as a tree of hard links to what the target
    holds; so it costs no space and no copying for what stays. Objects are replaced by rename, never written in place,
    so the links are safe. At the end sibling and target change places in one step (renameat2), and what is then the
    old tree is removed.
Invariants
    - A marker file in the staging folder travels with the new tree: in the sibling it says "not finished", in the
      target "finished, tidy up". So whatever was interrupted, the next run knows where it stands.
    - Mount points are refused: they cannot be exchanged.
    - An inode that both trees share never has its mode or time changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator

import msgspec
from blake3 import blake3

from flowengine.errors import LocalError, TemporaryError, UsageError
from flowengine.manifest import Entry
from flowengine.store.filesystem import copy_range, exchange, local_error, sync_filesystem
from flowengine.store.many import AnyStat
from flowengine.store.proofs import decode_entries, encode_entries, split_proof, stats_proof, with_ctime
from flowengine.store.scan_cache import BLESSED, DirectoryPart, Identity, ScanCache
from flowengine.store.staging import Staging
from flowengine.units import show_path
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import STAGING_NAME

__all__ = ["AtomicTree"]

_MARKER = STAGING_NAME + b"/atomic"

_Known = dict[bytes, tuple[AnyStat, Entry | None]]
"""name → (stat when it was believed, entry; None for a large object, whose pieces the cache has)."""


class AtomicTree:
    """The sibling in which the next version of a target is built.

    Args:
        target: absolute path of what will be replaced; need not exist.
        cache: scan cache, told that linked files are the ones it knows.

    Attributes:
        path: of the sibling.
    """

    def __init__(self, target: bytes, cache: ScanCache | None) -> None:
        self.target = os.path.realpath(target)
        parent, name = os.path.split(self.target)
        if not name:
            raise UsageError(
                "the root of the file system cannot be replaced", hint="choose a folder below it"
            )
        self._parent = parent
        self.path = os.path.join(parent, b"." + name + b".flow-next")
        self._lock_path = os.path.join(parent, b"." + name + b".flow-lock")
        self._lock_fd = -1
        self._guard: Staging | None = None
        self._guard_fd = -1
        self._seeded = b""
        self._cache = cache

    def prepare(self) -> None:
        """Make the sibling, or find an unfinished one again, and link into it what the target holds.

        Raises:
            LocalError: the target is a mount point or no folder, or the sibling cannot be made.
            TemporaryError: another transfer writes to the target (reason "busy").
        """
        try:
            os.makedirs(self._parent, exist_ok=True)
            self._lock()
            if os.path.lexists(self.target):
                self._check_exchangeable()
            self._recover()
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.join(self.path, STAGING_NAME), 0o700)
            with open(os.path.join(self.path, _MARKER), "wb"):
                pass
            if os.path.lexists(self.target):
                # Transfers of the other kind lock the target itself.
                self._guard_fd = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY)
                self._guard = Staging(self._guard_fd, self.target)
                self._seeded = self._fingerprint()
                self._seed()
        except OSError as error:
            raise local_error(error, "cannot prepare the next version of", self.target) from error

    def _lock(self) -> None:
        """Let one process at a time build a next version of this target."""
        while True:
            self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TemporaryError(
                    f"another transfer is about to replace {show_path(self.target)}",
                    hint="wait for it to end",
                    reason="busy",
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._lock_path).st_ino == os.fstat(self._lock_fd).st_ino:
                    return
            os.close(self._lock_fd)  # whoever held it has removed it: once more

    def close(self) -> None:
        """Let others at the target again."""
        if self._guard is not None:
            self._guard.close(remove=True)
            self._guard = None
        if self._guard_fd >= 0:
            os.close(self._guard_fd)
            self._guard_fd = -1
        if self._lock_fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._lock_path)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _fingerprint(self) -> bytes:
        """What would show that somebody changed the target: names, inodes, sizes and times of all that is in it."""
        digest = blake3()
        for relative, names in _walk(self.target):
            at = os.path.join(self.target, relative) if relative else self.target
            digest.update(relative + b"\0")
            for name in names:
                st = os.lstat(os.path.join(at, name))
                digest.update(name + b"\0%d %d %d\n" % (st.st_ino, st.st_size, st.st_mtime_ns))
        return digest.digest()

    def _check_exchangeable(self) -> None:
        st = os.lstat(self.target)
        if not stat.S_ISDIR(st.st_mode):
            raise LocalError(
                f"the target {show_path(self.target)} is not a folder", hint="choose another target"
            )
        if os.path.ismount(self.target) or st.st_dev != os.stat(self._parent).st_dev:
            raise LocalError(
                f"the target {show_path(self.target)} is a mount point, which cannot be exchanged in one step",
                hint="choose a folder below it, or publish object by object (without --publish atomic)",
            )

    def _recover(self) -> None:
        """Tidy up after a run that ended between the exchange and its clean-up."""
        if os.path.exists(os.path.join(self.target, _MARKER)):
            shutil.rmtree(os.path.join(self.target, STAGING_NAME))
            if os.path.lexists(self.path):
                shutil.rmtree(self.path)
        elif os.path.lexists(self.path) and not os.path.exists(os.path.join(self.path, _MARKER)):
            shutil.rmtree(self.path)

    def publish(self, root_mode: int | None) -> None:
        """Put the sibling in the target's place, durably, and remove what stood there.

        Raises:
            LocalError: the file system cannot exchange; the sibling stays for the next run.
        """
        try:
            if root_mode is not None:
                os.chmod(self.path, root_mode)
            self._bless()
            self._sync()
            if os.path.lexists(self.target):
                if not self._seeded or self._fingerprint() != self._seeded:
                    raise TemporaryError(
                        f"somebody changed {show_path(self.target)} while its next version was built; nothing was replaced",
                        hint="run the same command again: it takes the changes into account",
                        reason="busy",
                    )
                exchange(self.path, self.target)
                self._sync()
                shutil.rmtree(self.path)
            else:
                os.rename(self.path, self.target)
                self._sync()
            self._settle()
            st = os.stat(self.target)
            shutil.rmtree(os.path.join(self.target, STAGING_NAME))
            os.utime(self.target, ns=(st.st_atime_ns, st.st_mtime_ns))
        except OSError as error:
            raise local_error(error, "cannot publish the new version of", self.target) from error

    def _sync(self) -> None:
        fd = os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync_filesystem(fd)
        finally:
            os.close(fd)

    # --- links and the scan cache -------------------------------------------------------------------------------

    def _seed(self) -> None:
        for relative, names in _walk(self.target):
            old = os.path.join(self.target, relative) if relative else self.target
            new = os.path.join(self.path, relative) if relative else self.path
            if relative:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(new, 0o700)
            known = self._known(old, names)
            for name in names:
                _link(os.path.join(old, name), os.path.join(new, name))
            self._remember(new, known, None)  # a new name moves ctime, and nothing else

    def _bless(self) -> None:
        """Before the old names go, which moves the ctime of every inode both trees share: mark what is believed."""
        for relative, names in _walk(self.path) if self._cache is not None else ():
            path = os.path.join(self.path, relative) if relative else self.path
            self._remember(path, self._known(path, names), BLESSED)

    def _settle(self) -> None:
        """After they went: what was marked, and is otherwise the same, is believed again."""
        for relative, names in _walk(self.target) if self._cache is not None else ():
            path = os.path.join(self.target, relative) if relative else self.target
            self._remember(path, self._known(path, names, BLESSED), None)

    def _known(self, path: bytes, names: list[bytes], ctime_ns: int | None = None) -> _Known:
        """What the cache believes of a directory's files, as they are now (or as if they had that ctime)."""
        if self._cache is None:
            return {}
        stats = {name: os.lstat(os.path.join(path, name)) for name in names}
        asked = {name: st if ctime_ns is None else with_ctime(st, ctime_ns) for name, st in stats.items()}
        proofs = dict(zip(split_proof(stats_proof(list(asked.items()))), names, strict=True)) if names else {}
        known: _Known = {}
        st_path = os.stat(path)
        for part in self._cache.directory(st_path.st_dev, st_path.st_ino):
            try:
                for proof, entry in zip(split_proof(part.stats), decode_entries(part.entries), strict=True):
                    if proof in proofs:
                        known[entry.name] = (asked[entry.name], entry)
            except (msgspec.DecodeError, ValueError):
                continue
        for name, st in asked.items():
            if (
                stat.S_ISREG(st.st_mode)
                and st.st_size >= LARGE_OBJECT_BYTES
                and self._cache.pieces(Identity.of(st))
            ):
                known[name] = (st, None)
        return known

    def _remember(self, path: bytes, known: _Known, ctime_ns: int | None) -> None:
        """Keep what is known of a directory's files under their present ctime, or under `ctime_ns`."""
        if self._cache is None or not known:
            return
        rows: list[tuple[bytes, AnyStat]] = []
        entries: list[Entry] = []
        for name in sorted(known):
            before, entry = known[name]
            try:
                st = os.lstat(os.path.join(path, name))
            except FileNotFoundError:
                continue
            same = (st.st_ino, st.st_size, st.st_mtime_ns, st.st_mode)
            if same != (before.st_ino, before.st_size, before.st_mtime_ns, before.st_mode):
                continue
            now = st if ctime_ns is None else with_ctime(st, ctime_ns)
            if entry is None:
                self._cache.settle_pieces(Identity.of(now), before.st_ctime_ns)
            else:
                rows.append((name, now))
                entries.append(entry)
        if rows:
            st_path = os.stat(path)
            part = DirectoryPart(stats_proof(rows), encode_entries(entries))
            self._cache.save_directory(st_path.st_dev, st_path.st_ino, [part])


def _walk(root: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """(relative directory, names of its non-directories), parents first; staging folders are passed over."""
    pending = [b""]
    while pending:
        relative = pending.pop()
        names = []
        with os.scandir(os.path.join(root, relative) if relative else root) as listing:
            for item in listing:
                if item.is_dir(follow_symlinks=False):
                    if item.name != STAGING_NAME:
                        pending.append(os.path.join(relative, item.name) if relative else item.name)
                else:
                    names.append(item.name)
        yield relative, sorted(names)


def _link(old: bytes, new: bytes) -> None:
    """A second name for `old`, or a copy where the file system or its rules allow no link; kept if it exists."""
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        st = os.lstat(old)
        if not stat.S_ISREG(st.st_mode):
            return  # the source offers it again
        source = os.open(old, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            target = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                copy_range(source, 0, target, 0, st.st_size)
                os.fchmod(target, stat.S_IMODE(st.st_mode))
                os.utime(target, ns=(st.st_mtime_ns, st.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)
