"""Places large objects: chunk by chunk from the file in place, from staging, from elsewhere at hand; the rest is wanted."""

from __future__ import annotations

import os
import stat
from itertools import accumulate
from typing import Final

from flowengine.chunking import CHUNK_BYTES, lengths_of, packed_size, zero_chunk_id
from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, Entry
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.store.filesystem import READ_FILE, local_error
from flowengine.store.page_cache import WriteTrail
from flowengine.store.scan_cache import PROVISIONAL, Identity
from flowengine.transfer.basis import Basis, Recalled
from flowengine.transfer.copying import CopyJob, WriteJob, append_copy
from flowengine.transfer.following import Follower
from flowengine.transfer.leaving import HALTED
from flowengine.transfer.lookalikes import begins_with
from flowengine.transfer.placement import Hint, Placement
from flowengine.transfer.refining import Refiner, regions_beside
from flowengine.transfer.sinks import NOT_WANTED, WANTED, LargeObject, Region, RunOffer, TargetDirectory
from flowengine.units import MIB, show_path
from flowengine.wire.messages import MAX_OFFER_CHUNKS, ObjectEnd, ObjectRun
from flowengine.wire.paths import STAGING_NAME, check_name

__all__ = ["LargePlacer"]

_READ_BUFFERS: Final = 4
_READ_BYTES: Final = MIB
_VAIN_BYTES: Final = 32 * MIB
"""A file of another name is let go when nothing of so much was found in it."""


class LargePlacer:
    """Answers the runs of one large object after the other. For use by the placer's thread."""

    def __init__(self, placement: Placement, refiner: Refiner) -> None:
        self._placement = placement
        self._refiner = refiner
        self._attempts: dict[bytes, int] = {}
        self._large: LargeObject | None = None
        self._entry: Entry | None = None
        self._zero = zero_chunk_id(placement.profile.maximum)
        self._pool = BufferPool(_READ_BUFFERS, _READ_BYTES + placement.profile.maximum)

    @property
    def inside(self) -> bool:
        """Whether a large object has begun and not ended."""
        return self._entry is not None

    def begin(self, directory: TargetDirectory, entry: Entry) -> None:
        """A large object is being read by the source."""
        if self._entry is not None:
            raise ProtocolError("a large object began inside another")
        if entry.kind != FILE or entry.chunks or entry.runs or entry.size < 1:
            raise ProtocolError("a large object was announced that is none")
        check_name(entry.name, reserved=(STAGING_NAME,))
        self._placement.check_mode(entry.mode)
        # The same object once more is one that could not be read to its end before.
        if entry.name < directory.last_name:
            raise ProtocolError(f"{show_path(directory.child(entry.name))} was offered out of order")
        directory.last_name = entry.name
        self._placement.recorder.large_begin(entry)
        self._entry = entry
        if directory.offered is not None:
            directory.offered.add(entry.name)
        self._large = None
        if directory.fd < 0:
            if not self._placement.dry:
                self._placement.landing.report(
                    directory.child(entry.name), "local", "its folder could not be made"
                )
            else:
                self._placement.count_wanted(entry)
            return
        if self._placement.collides(directory, entry.name):
            return
        if self._placement.landing.halted and not self._placement.dry:
            # By name, though it is not the only one: so that the source need not read it to its end.
            self._placement.landing.report(
                directory.child(entry.name), HALTED, self._placement.landing.halted
            )
            return
        directory.entries += 1
        large = LargeObject(directory, entry)
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and stat.S_ISREG(st.st_mode) and st.st_size >= self._placement.profile.minimum:
            try:
                fd = os.open(entry.name, READ_FILE, dir_fd=directory.fd)
            except OSError:
                pass
            else:
                self._take_old(large, fd)
        self._large = large
        self._placement.landing.adopt(large)
        if not self._placement.dry:
            self._placement.landing.opened(directory, entry.name)
            if (
                large.basis is None
                or large.basis.size_bytes != entry.size
                or self._placement.must_not_touch(entry, large.basis.st)
            ):
                self._stage(large)

    def _take_old(self, large: LargeObject, fd: int) -> None:
        """The file in place is what the object is compared with.

        Of the same size it may be the same: then nothing is to be written. Else, where nothing is known of it, it is
        followed.
        """
        placement, st = self._placement, os.fstat(fd)
        cache = placement.cache
        known = cache is not None and cache.pieces(Identity.of(st))
        if st.st_size != large.entry.size and not known and not placement.dry:
            large.follower = Follower(fd, placement.profile, self._pool, elsewhere=False)
        else:
            large.basis = Basis(fd, st, placement.profile, cache)
        if large.follower is not None or not known:
            placement.counters.objects_read += 1

    def _stage(self, large: LargeObject) -> None:
        """Make (or find again) the staging file, and bring in what was the same so far."""
        path = large.directory.child(large.entry.name)
        try:
            large.staged = self._placement.landing.staging.open_object(
                path, large.entry.size, self._attempts.get(path, 0)
            )
        except OSError as error:
            raise local_error(error, "cannot stage", path) from error
        if self._placement.landing.passes(large.entry.size):
            large.staged.trail = WriteTrail(large.staged.fd)
        same, large.same_until = large.same_until, []
        for offset, packed in same:
            self._take_run(large, offset, packed, None)

    def run(self, message: ObjectRun) -> None:
        """Answer the next chunks of the object."""
        packed = message.chunks
        entry, large = self._entry, self._large
        if entry is None:
            raise ProtocolError("a run of chunks was offered outside a large object")
        count = len(packed) // CHUNK_BYTES
        if not packed or len(packed) % CHUNK_BYTES or count > MAX_OFFER_CHUNKS:
            raise ProtocolError(
                f"a run of {len(packed)} bytes was offered; 1 to {MAX_OFFER_CHUNKS} whole chunks are allowed"
            )
        lengths = lengths_of(packed)
        if not 0 < min(lengths) <= max(lengths) <= self._placement.profile.maximum:
            raise ProtocolError(
                f"a chunk of {max(lengths)} bytes was offered; the profile's largest is {self._placement.profile.maximum}"
            )
        self._placement.recorder.large_chunks(packed)
        number = self._placement.next_number()
        if large is None:
            self._placement.answer_none()
            return
        offset = large.position
        large.position += packed_size(packed)
        if large.position > entry.size:
            raise ProtocolError(
                f"{show_path(large.directory.child(entry.name))} has more chunks than its size of {entry.size}"
            )
        if large.failed:
            self._placement.answer_none()
            return
        if large.staged is None and self._same_in_place(large, offset, packed):
            large.same_until.append((offset, packed))
            self._placement.answer_none()
            return
        if self._placement.dry:
            self._dry_run(large, offset, packed)
            self._placement.answer_none()
            return
        if large.staged is None:
            self._stage(large)
        if not offset and large.basis is None and large.follower is None:
            self._recall(large, packed)
            if large.recalled is None:
                self._look_alike(large, packed)
        elif large.basis is not None and large.basis.elsewhere and self._is_in_vain(large, large.basis):
            large.basis.close()
            large.basis = None
        follower, staged = large.follower, large.staged
        assert staged is not None
        if follower is not None and (follower.lost or staged.have):
            # Where much was moved, or much is here already, the whole old file is searched.
            large.follower = None
            large.basis = Basis(
                follower.fd,
                os.fstat(follower.fd),
                self._placement.profile,
                self._placement.cache,
                elsewhere=follower.elsewhere,
            )
            large.basis.found_bytes = int(follower.found)
        self._take_run(large, offset, packed, number)

    def _recall(self, large: LargeObject, packed: bytes) -> None:
        """Find the file that the object is, if the index knows one of its size that begins so.

        Copiers read and hash it then, several objects at a time; who follows a file does that here, before it answers.
        """
        assert large.staged is not None
        if large.staged.have:
            return
        hints = self._placement.remembered(packed)
        path, offset = hints.get(0, (b"", -1))
        if offset or len(hints) * CHUNK_BYTES != len(packed):
            return
        lookalikes = self._placement.lookalikes
        opened = lookalikes.open(path)
        if opened is None:
            return
        fd, st = opened
        if st.st_size != large.entry.size:
            os.close(fd)
            return
        lookalikes.won(large.directory.path, large.entry.name, path)
        large.recalled = Recalled(fd, path)

    def _look_alike(self, large: LargeObject, packed: bytes) -> None:
        """Find a file that the object, which is not in place, may be: renamed, or another version of."""
        lookalikes, entry, folder = self._placement.lookalikes, large.entry, large.directory.path
        assert large.staged is not None
        if large.staged.have:
            return
        lookalikes.expect(entry.size)
        if not lookalikes.known():
            return
        like = lookalikes.like(folder, entry)
        least = self._placement.profile.minimum
        for path in [
            *lookalikes.sized(entry),
            *lookalikes.near_size(entry, least),
            *([like[0]] if like else []),
        ]:
            opened = lookalikes.open(path)
            if opened is None:
                continue
            fd, st = opened
            begins = begins_with(fd, packed)
            if begins and st.st_size == entry.size:
                lookalikes.won(folder, entry.name, path)
            if begins or (like is not None and path == like[0] and st.st_size >= least):
                large.follower = Follower(fd, self._placement.profile, self._pool, elsewhere=True)
                return
            os.close(fd)

    def _is_in_vain(self, large: LargeObject, basis: Basis) -> bool:
        """Whether nothing was found in a file of another name for a while."""
        return not basis.found_bytes and large.position > _VAIN_BYTES

    def stop(self) -> None:
        """Let the placer's thread not wait for copies any more."""
        self._pool.close()

    def _same_in_place(self, large: LargeObject, offset: int, packed: bytes) -> bool:
        """Whether the file in place has just these chunks just here."""
        basis = large.basis
        if basis is None or basis.size_bytes != large.entry.size:
            return False
        return basis.goes_on_with(offset, packed)

    def _dry_run(self, large: LargeObject, offset: int, packed: bytes) -> None:
        for at in range(0, len(packed), CHUNK_BYTES):
            length = int.from_bytes(packed[at : at + 4], "little")
            if (
                large.basis is not None
                and large.basis.find(packed[at : at + CHUNK_BYTES], offset) is not None
            ):
                self._placement.counters.bytes_reused += length
            else:
                self._placement.counters.bytes_payload += length
            offset += length

    def _take_run(self, large: LargeObject, offset: int, packed: bytes, number: int | None) -> None:
        """Find each chunk of a run, or want it (where `number` is given)."""
        staged, basis = large.staged, large.basis
        assert staged is not None
        if self._placement.cache is not None:
            st = os.fstat(staged.fd)
            key = Identity(st.st_dev, st.st_ino, large.entry.size, large.entry.mtime_ns, PROVISIONAL)
            self._placement.cache.add_pieces(key, [(offset, packed)], replace=offset == 0)
        jobs: list[CopyJob] = []
        lengths = lengths_of(packed)
        if number is None:  # the file in place was found to have it just here
            for index in range(len(lengths)):
                one = packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                append_copy(jobs, large, offset, one, basis, None, offset)
                offset += lengths[index]
            large.left = offset
        else:
            offsets = list(accumulate(lengths[:-1], initial=offset))
            offer = RunOffer(large, packed, lengths, offsets, bytearray(len(lengths)), 0)
            self._find_or_want(large, offer, number, lengths, jobs)
        for job in jobs:
            self._placement.copier.jobs.put(job)

    def _find_or_want(
        self, large: LargeObject, offer: RunOffer, number: int, lengths: list[int], jobs: list[CopyJob]
    ) -> None:
        staged, landing = large.staged, self._placement.landing
        assert staged is not None
        packed, wanted = offer.packed, offer.wanted
        places = [-1] * len(lengths)
        there = 0
        unknown: list[int] = []
        hints = self._recalled(large, large.recalled, packed) if large.recalled is not None else None
        basis, old = large.basis, large.follower or large.basis
        if large.follower is not None:
            places = self._follow(large, large.follower, offer, lengths)
        for index, offset in enumerate(offer.offsets):
            if places[index] >= 0:
                continue
            one = packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            length = lengths[index]
            identity = one[4:]
            if staged.have and staged.have.get(offset) == (length, identity):
                there += length
                self._placement.counters.bytes_reused += length
            elif identity == self._zero and length == self._placement.profile.maximum and not staged.have:
                there += length  # a hole in the staging file is just that
            else:
                found = basis.find(one, offset) if basis is not None else None
                if found is not None and basis is not None:
                    places[index] = found
                    basis.found_bytes += length
                    append_copy(jobs, large, offset, one, basis, None, found)
                else:
                    unknown.append(index)
        elsewhere = self._want_unknown(large, offer, unknown, jobs, hints)
        if old is not None and WANTED in wanted:
            regions = regions_beside(lengths, places, wanted, large.left, old.size_bytes)
            self._ask_finer(number, offer, regions, lengths, old.fd)
        large.left = places[-1] + lengths[-1] if places[-1] >= 0 else -1
        offer.open = len(wanted) - wanted.count(NOT_WANTED)
        if offer.open:
            landing.offers[number] = offer
        self._placement.answer(wanted)
        for index in elsewhere:
            one = packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            self._placement.reuse(large, offer.offsets[index], one[4:], one, jobs)
        if there:
            landing.add(large, there)

    def _recalled(self, large: LargeObject, recalled: Recalled, packed: bytes) -> dict[int, Hint] | None:
        """What the index knows of a run; where that is not all of it, the file is no more than alike, and followed."""
        if not recalled.whole:
            return None
        hints = self._placement.remembered(packed)
        zero = self._zero_chunk()
        for index in range(len(packed) // CHUNK_BYTES):
            if index not in hints and packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES] != zero:
                recalled.whole = False
                # Copies from it may still wait, and what is followed may be let go before they are done.
                fd = os.dup(recalled.fd)
                large.follower = Follower(fd, self._placement.profile, self._pool, elsewhere=True)
                break
        return hints

    def _zero_chunk(self) -> bytes:
        return self._placement.profile.maximum.to_bytes(4, "little") + self._zero

    def _follow(
        self, large: LargeObject, follower: Follower, offer: RunOffer, lengths: list[int]
    ) -> list[int]:
        """Have what the followed file has written; gives the places of the chunks in it."""
        packed, jobs = offer.packed, self._placement.copier.jobs
        zero = self._zero_chunk()
        holes = {
            index
            for index in range(len(lengths))
            if packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES] == zero
        }

        def write(first: int, end: int, buffer: Buffer, view: memoryview) -> None:
            chunks = packed[first * CHUNK_BYTES : end * CHUNK_BYTES]
            jobs.put(WriteJob(large, offer.offsets[first], chunks, buffer, view))

        return follower.take(offer.offsets, lengths, packed, holes, write)

    def _want_unknown(
        self,
        large: LargeObject,
        offer: RunOffer,
        unknown: list[int],
        jobs: list[CopyJob],
        hints: dict[int, Hint] | None,
    ) -> list[int]:
        """Want what neither staging nor the old file has, but for what the index knows; gives what is on its way.

        Args:
            hints: what the index knows of the offer, if it was asked already.
        """
        landing, packed = self._placement.landing, offer.packed
        elsewhere: list[int] = []
        inflight, recent = landing.inflight, landing.recent
        identities = [packed[index * CHUNK_BYTES + 4 : (index + 1) * CHUNK_BYTES] for index in unknown]
        if hints is None:
            with landing.lock:
                missing = any(one not in inflight and one not in recent for one in identities)
            hints = self._placement.remembered(packed) if missing else {}
        recalled = large.recalled
        with landing.lock:
            for index, identity in zip(unknown, identities, strict=True):
                if identity in inflight or identity in recent:
                    elsewhere.append(index)
                elif (hint := hints.get(index)) is not None:
                    one = packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                    path, place = hint
                    if recalled is not None and path == recalled.path:
                        append_copy(jobs, large, offer.offsets[index], one, recalled, None, place)
                    else:
                        append_copy(jobs, large, offer.offsets[index], one, None, path, place)
                else:
                    inflight[identity] = None
                    offer.wanted[index] = WANTED
        return elsewhere

    def _ask_finer(
        self, number: int, offer: RunOffer, regions: dict[int, tuple[int, int]], lengths: list[int], fd: int
    ) -> None:
        known: dict[tuple[int, int], Region] = {}
        chunks = {}
        for index, (start, stop) in regions.items():
            region = known.setdefault((start, stop), Region(start, stop, fd=fd))
            one = offer.packed[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            chunks[index] = lengths[index], one, region
        if chunks:
            self._refiner.ask(number, offer, chunks)

    def end(self, message: ObjectEnd) -> None:
        """All of the object was offered, or it could not be read."""
        entry, large = self._entry, self._large
        if entry is None:
            raise ProtocolError("a large object ended that had not begun")
        self._entry = self._large = None
        if not message.reason and large is not None and large.position != entry.size:
            raise ProtocolError(
                f"{show_path(large.directory.child(entry.name))} ended after {large.position} bytes; {entry.size} were announced"
            )
        self._placement.recorder.large_end(keep=not message.reason)
        if large is None:
            return
        directory = large.directory
        if message.reason:
            self._give_up(large, message)
        elif large.staged is not None:
            self._placement.landing.seal(large)
        elif not self._placement.dry:
            if not large.failed:
                self._large_unchanged(large)
        elif sum([packed_size(packed) for _, packed in large.same_until]) == entry.size:
            self._placement.keep(directory, entry, directory.existing[entry.name])
        if large.basis is not None and not large.failed and (large.staged is None or self._placement.dry):
            large.basis.close()
            large.basis = None
            self._placement.landing.disown(large)

    def _large_unchanged(self, large: LargeObject) -> None:
        basis, directory, entry = large.basis, large.directory, large.entry
        assert basis is not None
        if not basis.unchanged():
            self._placement.landing.fail(
                directory, entry.name, "stale", "changed at the target while it was compared"
            )
            return
        self._placement.keep(directory, entry, os.fstat(basis.fd))
        if self._placement.cache is not None:
            st = os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False)
            if not basis.known_without_reading or Identity.of(st) != basis.identity:
                self._placement.cache.add_pieces(Identity.of(st), large.same_until, replace=True)
        self._placement.landing.done(directory, entry.name)

    def _give_up(self, large: LargeObject, message: ObjectEnd) -> None:
        """The source could not read it to the end, and will say so (or offer it anew)."""
        if self._placement.dry:
            return
        path = large.directory.child(large.entry.name)
        self._attempts[path] = self._attempts.get(path, 0) + 1
        with self._placement.landing.lock:
            large.failed = True  # what was wanted may still arrive; it is checked and thrown away
        self._placement.landing.done(large.directory, large.entry.name)
