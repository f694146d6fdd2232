"""What the placing of small and of large objects share: numbering, answers, what is kept, what is taken from elsewhere."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from flowengine.chunking import Profile
from flowengine.errors import ProtocolError
from flowengine.manifest import Entry
from flowengine.store.attributes import apply_extra, extra_reader
from flowengine.store.filesystem import READ_FILE
from flowengine.store.many import AnyStat
from flowengine.store.scan_cache import ScanCache
from flowengine.transfer.copying import Copier, CopyJob
from flowengine.transfer.landing import Landing
from flowengine.transfer.lookalikes import Lookalikes
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import FINER, WANTED, Sink, TargetDirectory
from flowengine.units import show_path
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    WANT_ALL,
    WANT_NONE,
    WANT_SOME,
    Options,
    Want,
)
from flowengine.wire.paths import collision_key

if TYPE_CHECKING:
    from flowengine.store.chunk_index import ChunkIndex

__all__ = ["Hint", "Placement"]

Hint = tuple[bytes, int]
"""Where a chunk is remembered to lie: (path below the root, offset)."""

SET_ID_BITS: Final = 0o6000
"""Set user id, set group id: they say whose rights a program gets, and mean something else under another owner."""
_MISSING: Final = object()
_WANTED_DIGITS: Final = bytes(48 + (value == WANTED) for value in range(256))
_FINER_DIGITS: Final = bytes(48 + (value == FINER) for value in range(256))


def _bitmap(marks: bytearray, digits: bytes) -> bytes:
    # int("0101…", 2) turns marks to bits at C speed; bit 0 is the first chunk.
    return int(marks[::-1].translate(digits), 2).to_bytes((len(marks) + 7) // 8, "little")


class Placement:
    """The state of one session's placing. For use by the placer's thread.

    Args:
        landing: where wanted chunks will arrive; its staging is used too.
        copier: takes the copies of what is at hand.
        want: posts an answer, to so many offers.
        recorder: builds the manifest of what is offered.
        open_index: gives what is remembered of what else lies below the root; None where nothing is.
    """

    def __init__(
        self,
        landing: Landing,
        copier: Copier,
        root_fd: int,
        profile: Profile,
        options: Options,
        cache: ScanCache | None,
        counters: Counters,
        recorder: ManifestRecorder,
        want: Callable[[Want, int], None],
        *,
        open_index: Callable[[], ChunkIndex | None] = lambda: None,
    ) -> None:
        self.landing = landing
        self.copier = copier
        self.root_fd = root_fd
        self.profile = profile
        self.options = options
        self.cache = cache
        self.counters = counters
        self.recorder = recorder
        self._open_index = open_index
        self.dry = options.dry_run
        self.forbidden_mode = 0 if options.owner else SET_ID_BITS
        self.atomic = options.publish == "atomic" and not options.dry_run
        self.lookalikes = Lookalikes(root_fd, self._is_new)
        self._want = want
        self._offers = 0
        self._nones = 0
        self._gathers = False
        self._read_extra = (
            extra_reader(xattrs=options.xattrs, owner=options.owner)
            if options.xattrs or options.owner
            else None
        )

    def _is_new(self, path: bytes) -> bool:
        directory = self.landing.directories.get(path)
        return directory is not None and directory.created

    @property
    def number(self) -> int:
        """The number of the offer that comes next."""
        return self._offers

    def next_number(self, offers: int = 1) -> int:
        """The number of the offer that has just come, or of the first of several."""
        self._offers += offers
        return self._offers - offers

    def check_mode(self, mode: int) -> None:
        """Refuse set-id bits of a source that was not asked for owners."""
        if mode & self.forbidden_mode:
            raise ProtocolError(
                "the source sent a set-user-id or set-group-id bit without the owner it is meant for",
                hint="update the source; with --owner these bits are kept",
            )

    def has_index(self) -> bool:
        """Whether anything is remembered of what lies elsewhere below the root. The first call loads it."""
        return self._open_index() is not None

    def remembered(self, packed: bytes) -> dict[int, Hint]:
        """What the index knows of chunks: position → (path below the root, offset). The first call loads it."""
        index = self._open_index() if packed else None
        return index.find(self.root_fd, packed) if index is not None else {}

    def count_wanted(self, entry: Entry) -> None:
        """A dry run would want all of an object."""
        self.counters.bytes_payload += entry.size

    @contextlib.contextmanager
    def one_message(self) -> Iterator[None]:
        """What is offered in here came as one message: offers of which nothing is wanted are answered together."""
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False
        self._answer_nones()

    def answer_none(self, offers: int = 1) -> None:
        """Want nothing of an offer, or of several."""
        self._nones += offers
        if not self._gathers:
            self._answer_nones()

    def _answer_nones(self) -> None:
        count, self._nones = self._nones, 0
        if count:
            self._want(Want(WANT_NONE, whole=count if count > 1 else 0), count)

    def answer_whole(self, offers: int, *, chunks: int) -> None:
        """Want all chunks of so many offers that came in one message."""
        self._answer_nones()
        self._offers += offers
        self._want(Want(WANT_ALL if chunks else WANT_NONE, whole=offers), offers)

    def answer(self, wanted: bytearray) -> None:
        """Want the chunks that are marked so, and ask for those finer that are marked so."""
        total = wanted.count(WANTED)
        finer = _bitmap(wanted, _FINER_DIGITS) if FINER in wanted else b""
        if not total and not finer:
            self.answer_none()
            return
        self._answer_nones()
        if not total:
            self._want(Want(WANT_NONE, b"", finer), 1)
        elif total == len(wanted):
            self._want(Want(WANT_ALL), 1)
        else:
            self._want(Want(WANT_SOME, _bitmap(wanted, _WANTED_DIGITS), finer), 1)

    def reuse(self, sink: Sink, offset: int, identity: bytes, one: bytes, jobs: list[CopyJob]) -> None:
        """Get a chunk from another object of this session: one on its way, or one that arrived."""
        landing = self.landing
        with landing.lock:
            waiters = landing.inflight.get(identity, _MISSING)
            if waiters is None:
                landing.inflight[identity] = [(sink, offset)]
                return
            if isinstance(waiters, list):
                waiters.append((sink, offset))
                return
            location = landing.recent.get(identity)
        if (
            location is None
        ):  # forgotten meanwhile: rare, and cheaper to fail and come again than to ask out of turn
            landing.fail_sink(
                sink, "stale", "a chunk that was at hand is not any more; it is fetched in the next pass"
            )
            return
        path, staged, source_offset = location.place_of(identity)
        jobs.append(CopyJob(sink, offset, one, basis=None, path=(path, staged), source_offset=source_offset))

    def collides(self, directory: TargetDirectory, name: bytes) -> bool:
        """Whether the target's file system would take this name for another one of the same directory."""
        if directory.keys is None:
            return False
        key = collision_key(name)
        first = directory.keys.setdefault(key, name)
        if first == name:
            return False
        self.landing.report(
            directory.child(name),
            "collision",
            f"the target's file system takes it for {show_path(first)}, which the source has as well; only that one lands",
        )
        return True

    def must_not_touch(self, entry: Entry, st: AnyStat) -> bool:
        """Whether keeping this file would change an inode that the published tree has too."""
        return (
            self.atomic
            and st.st_nlink > 1
            and (
                stat.S_IMODE(st.st_mode) != entry.mode
                or st.st_mtime_ns != entry.mtime_ns
                or bool(entry.extra)
            )
        )

    def kept(self, objects: int, size_bytes: int) -> None:
        """Count objects that are as they should be."""
        counters = self.counters
        counters.objects_unchanged += objects
        counters.bytes_unchanged += size_bytes
        counters.objects_done += objects
        counters.bytes_done += size_bytes

    def keep(self, directory: TargetDirectory, entry: Entry, st: AnyStat) -> None:
        """The content is right: see to mode and time, and leave it."""
        self.kept(1, entry.size)
        if self.dry:
            return
        if stat.S_IMODE(st.st_mode) != entry.mode or st.st_mtime_ns != entry.mtime_ns or entry.extra:
            try:
                fd = os.open(entry.name, READ_FILE, dir_fd=directory.fd)
                try:
                    if (
                        entry.extra
                        and self._read_extra is not None
                        and self._read_extra(fd, st) != entry.extra
                    ):
                        apply_extra(fd, entry.extra)
                    os.fchmod(fd, entry.mode)
                    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
                    st = os.fstat(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                self.landing.report(
                    directory.child(entry.name), "local", f"cannot set mode or time: {error.strerror}"
                )
                return
            directory.unchanged_all = False
        if entry.size < LARGE_OBJECT_BYTES and not entry.extra:
            directory.add_rows([(entry.name, st, entry)])
