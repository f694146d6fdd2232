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
import os
import shutil
import stat
from collections.abc import Iterator

import msgspec

from flowengine.errors import LocalError, UsageError
from flowengine.store.filesystem import copy_range, exchange, local_error, sync_filesystem
from flowengine.store.scan import decode_entries, encode_entries, split_proof, stats_proof
from flowengine.store.scan_cache import DirectoryPart, Identity, ScanCache
from flowengine.units import show_path
from flowengine.wire.messages import LARGE_OBJECT_BYTES
from flowengine.wire.paths import STAGING_NAME

__all__ = ["AtomicTree"]

_MARKER = STAGING_NAME + b"/atomic"


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
        self._cache = cache

    def prepare(self) -> None:
        """Make the sibling, or find an unfinished one again, and link into it what the target holds.

        Raises:
            LocalError: the target is a mount point or no folder, or the sibling cannot be made.
        """
        try:
            os.makedirs(self._parent, exist_ok=True)
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
                self._seed()
        except OSError as error:
            raise local_error(error, "cannot prepare the next version of", self.target) from error

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
            self._sync()
            if os.path.lexists(self.target):
                exchange(self.path, self.target)
                self._sync()
                shutil.rmtree(self.path)
            else:
                os.rename(self.path, self.target)
                self._sync()
            self._refresh()
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
            self._remember(new, known)

    def _refresh(self) -> None:
        """After the old names went, every shared inode has a new ctime: the cache learns it."""
        if self._cache is None:
            return
        for relative, names in _walk(self.target):
            path = os.path.join(self.target, relative) if relative else self.target
            self._remember(path, self._known(path, names, ignore_ctime=True))

    def _known(
        self, path: bytes, names: list[bytes], *, ignore_ctime: bool = False
    ) -> dict[bytes, tuple[bytes, object]]:
        """name → (identity without ctime, entry) of what the cache knows in a directory."""
        if self._cache is None:
            return {}
        st = os.stat(path)
        known: dict[bytes, tuple[bytes, object]] = {}
        stats = [(name, os.lstat(os.path.join(path, name))) for name in names]
        present = dict(zip(split_proof(stats_proof(stats)), names, strict=True)) if stats else {}
        short = {_without_ctime(proof): name for proof, name in present.items()}
        for part in self._cache.directory(st.st_dev, st.st_ino):
            try:
                rows = zip(split_proof(part.stats), decode_entries(part.entries), strict=True)
                for proof, entry in rows:
                    if proof in present or (ignore_ctime and _without_ctime(proof) in short):
                        known[entry.name] = (_without_ctime(proof), entry)
            except (msgspec.DecodeError, ValueError):
                continue
        for name, st_file in stats:
            if stat.S_ISREG(st_file.st_mode) and st_file.st_size >= LARGE_OBJECT_BYTES:
                pieces = self._cache.pieces(Identity.of(st_file))
                if pieces or ignore_ctime:
                    known[name] = (b"", st_file.st_mtime_ns)
        return known

    def _remember(self, path: bytes, known: dict[bytes, tuple[bytes, object]]) -> None:
        """Give the cache the present ctimes of what is known and otherwise the same."""
        if self._cache is None or not known:
            return
        rows = []
        entries = []
        for name in sorted(known):
            identity, entry = known[name]
            try:
                st = os.lstat(os.path.join(path, name))
            except FileNotFoundError:
                continue
            if not identity:
                if st.st_mtime_ns == entry:
                    self._cache.settle_pieces(Identity.of(st))
                continue
            if _without_ctime(split_proof(stats_proof([(name, st)]))[0]) == identity:
                rows.append((name, st))
                entries.append(entry)
        if rows:
            st = os.stat(path)
            self._cache.save_directory(
                st.st_dev, st.st_ino, [DirectoryPart(stats_proof(rows), encode_entries(entries))]
            )


def _without_ctime(proof: bytes) -> bytes:
    """A proof (inode, size, mtime, ctime, mode as i64, then the name) without its fourth number."""
    return proof[:24] + proof[32:]


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
