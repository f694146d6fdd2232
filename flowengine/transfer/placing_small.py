"""Places small objects: those in place are left, chunks at hand are copied, the rest is wanted."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from itertools import accumulate, islice, takewhile
from typing import Final

from flowengine.chunking import CHUNK_BYTES, Cutter, are_chunks
from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, HARDLINK, SYMLINK, Block, Entry, Header
from flowengine.manifest.entries import check_entries
from flowengine.store.buffers import fresh_memory
from flowengine.store.encoded import parse_block, same_files
from flowengine.store.filesystem import READ_FILE, open_beneath
from flowengine.store.many import AnyStat, Row, Rows, Stat, read_files, read_rows
from flowengine.store.runs import dress_files
from flowengine.store.scan import RACY_NS
from flowengine.transfer.copying import CopyJob, append_copy
from flowengine.transfer.landing_blocks import want_block
from flowengine.transfer.landing_small import place_small, want_whole
from flowengine.transfer.lookalikes import LEAST_OLD_BYTES, Found, Guess
from flowengine.transfer.placement import SET_ID_BITS, Hint, Placement
from flowengine.transfer.refining import Refiner
from flowengine.transfer.sinks import WANTED, Region, SmallObject, SmallOffer, TargetDirectory
from flowengine.units import MIB, show_path
from flowengine.wire.messages import (
    LARGE_OBJECT_BYTES,
    MAX_OFFER_CHUNKS,
    MAX_OFFER_ENTRIES,
    EncodedOffer,
    Offer,
)
from flowengine.wire.paths import STAGING_NAME, check_link_target, check_name, check_relative_path

__all__ = ["SmallPlacer"]

_COMPARE_BYTES: Final = 2 * MIB
"""Of what stands in place, so much is read at once; more than the largest small object."""
_MOST_OLD_BYTES: Final = 2 * MIB
"""Of a larger file that becomes a small one, the beginning is looked at."""


class SmallPlacer:
    """Answers offers of small objects and links. For use by the placer's thread."""

    def __init__(self, placement: Placement, refiner: Refiner) -> None:
        options = placement.options
        self._placement = placement
        self._refiner = refiner
        self._header = Header(placement.profile, xattrs=options.xattrs, owner=options.owner)
        self._cutter = Cutter(placement.profile)
        self._room: memoryview | None = None

    def offer_block(self, directory: TargetDirectory, message: EncodedOffer) -> bool:
        """Answer an offer whose entries are a block; False where it is to be decoded and given to `offer`."""
        if directory.keys is not None or directory.fd < 0 or self._placement.landing.halted:
            return False
        recalled, empty = bool(directory.recalled), directory.was_empty
        if not recalled and (directory.known if not empty else self._placement.dry):
            return False
        block = parse_block(message.data)
        if (
            block is None
            or block.count > MAX_OFFER_ENTRIES
            or block.chunks > MAX_OFFER_CHUNKS
            or block.mode_bits & SET_ID_BITS
            or not directory.last_name < block.first_name
        ):
            return False
        self._placement.landing.wait_for_objects()
        if not recalled and empty:
            return self._all_new(directory, block)
        if not (self._all_recalled(directory, block) if recalled else self._all_same(directory, block)):
            return False
        self._taken(directory, block)
        self._placement.kept(block.count, block.size_bytes)
        self._placement.answer_none()
        return True

    def _taken(self, directory: TargetDirectory, block: Block) -> int:
        """Take note of a block that was offered; gives the offer's number."""
        directory.last_name = block.last_name
        directory.entries += block.count
        if directory.offered is not None:
            directory.offered.update(block.names)
        self._placement.recorder.block(block)
        return self._placement.next_number()

    def _all_recalled(self, directory: TargetDirectory, block: Block) -> bool:
        """Whether what is known to stand in a directory goes on with the block, or does once it is dressed so."""
        if directory.keeps(block):
            return True
        if self._placement.atomic or (rows := directory.next_alike(block)) is None:
            return False
        if not self._dress(directory, block, rows):
            return False
        directory.recalled_at += block.count
        return True

    def _dress(self, directory: TargetDirectory, block: Block, rows: Rows) -> bool:
        """Give files that are right but for modes and times these, too; whether all could be given them."""
        if self._placement.dry:
            return True
        dressed = dress_files(directory.fd, block, rows)
        if dressed is None:
            return False  # each is seen to by itself, and told of
        directory.unchanged_all = False
        directory.add_block(block, dressed)
        return True

    def _all_same(self, directory: TargetDirectory, block: Block) -> bool:
        """Read what stands in a directory of which nothing is known: whether it is just the block, or is so dressed."""
        listing = directory.listing
        if (
            listing is None
            or self._placement.atomic
            or not same_files(block, listing.smalls, attributes=False)
            or listing.newest_ns >= time.time_ns() - RACY_NS
        ):
            return False
        smalls, chunks = listing.smalls, block.columns.chunks
        if self._room is None:
            self._room = fresh_memory(_COMPARE_BYTES + 1)
        view = self._room
        firsts = [*accumulate(block.chunk_counts, initial=0)] if block.size_bytes > _COMPARE_BYTES else []
        for start, end in self._runs_to_compare(block):
            rows = smalls.part(start, end)
            if rows.size_bytes > _COMPARE_BYTES or read_rows(directory.fd, rows, view, 0) != end - start:
                return False
            packed = chunks[firsts[start] * CHUNK_BYTES : firsts[end] * CHUNK_BYTES] if firsts else chunks
            if not are_chunks(view, packed):
                return False
        self._placement.counters.objects_read += block.count - block.sizes.count(0)  # those are not opened
        self._placement.counters.bytes_read += block.size_bytes
        if not same_files(block, smalls, attributes=True):
            return self._dress(directory, block, smalls)
        directory.keep_block(block)
        return True

    @staticmethod
    def _runs_to_compare(block: Block) -> Iterator[tuple[int, int]]:
        """The first file, and the one behind the last, of runs that are read at once."""
        if block.size_bytes <= _COMPARE_BYTES:
            yield 0, block.count
            return
        start = total = 0
        for index, size in enumerate(block.sizes):
            if total + size > _COMPARE_BYTES and index > start:
                yield start, index
                start, total = index, 0
            total += size
        yield start, block.count

    def _all_new(self, directory: TargetDirectory, block: Block) -> bool:
        """Want all of a block for a directory that was empty, if no chunk of it is at hand; whether that was so."""
        placement, landing = self._placement, self._placement.landing
        sizes = block.sizes
        if (
            min(sizes) == 0
            or max(sizes) >= LARGE_OBJECT_BYTES
            or STAGING_NAME in block.names
            or (
                placement.lookalikes.known()
                and placement.lookalikes.may_hold(directory.path, block.names, sizes)
            )
            or placement.remembered(block.columns.chunks)
        ):
            return False
        offer = SmallOffer(directory, block)
        if not want_block(landing, offer):
            return False
        placement.lookalikes.expect(block.size_bytes)
        number = self._taken(directory, block)
        offer.open = len(offer.wanted)
        landing.offers[number] = offer
        placement.answer(offer.wanted)
        return True

    def offer(self, directory: TargetDirectory, message: Offer) -> None:
        """Answer an offer of entries of a directory."""
        entries = message.entries
        if not entries or len(entries) > MAX_OFFER_ENTRIES:
            raise ProtocolError(f"an offer of {len(entries)} entries; 1 to {MAX_OFFER_ENTRIES} are allowed")
        self._placement.landing.wait_for_objects()
        # The recorder checks page by page, later; nothing may reach the file system before it was checked.
        check_entries(entries, directory.path, directory.last_name, self._header)
        directory.last_name = entries[-1].name
        self._placement.recorder.entries(entries, check=False)
        number = self._placement.next_number()
        if self._all_in_place(directory, entries):
            self._placement.answer_none()
            return
        if self._placement.landing.halted and not self._placement.dry:
            if directory.offered is not None:
                directory.offered.update([entry.name for entry in entries])
            self._placement.answer_none()
            return
        offer = SmallOffer(directory, entries)
        if len(offer.owners) > MAX_OFFER_CHUNKS:
            raise ProtocolError(
                f"an offer of {len(offer.owners)} chunks; at most {MAX_OFFER_CHUNKS} are allowed"
            )
        if directory.offered is not None:
            directory.offered.update([entry.name for entry in entries])
        landing = self._placement.landing
        jobs: list[CopyJob] = []
        new = self._new(directory, entries)
        hints = self._hints(offer, new)
        alike = self._alike(directory, offer, new, hints)
        whole = [] if self._placement.dry else want_whole(landing, offer, new, hints)
        if len(whole) != len(new):
            for index in sorted(set(new).difference(whole)):
                self._small_file(directory, offer, index, entries[index], jobs, hints)
        total = offer.wanted.count(WANTED)
        if total:
            offer.open = total
            landing.offers[number] = offer
            self._ask_finer(directory, number, offer, new, alike)
        self._placement.answer(offer.wanted)
        for job in jobs:
            self._placement.copier.jobs.put(job)

    def _new(self, directory: TargetDirectory, entries: list[Entry]) -> list[int]:
        """The files of an offer that do not stand in place; what is no file is seen to."""
        landing = self._placement.landing
        usable = directory.fd >= 0
        forbidden_mode = self._placement.forbidden_mode
        if (
            usable
            and directory.keys is None
            and not directory.existing
            and not [e for e in entries if e.kind or e.mode & forbidden_mode or e.name == STAGING_NAME]
        ):
            directory.entries += len(entries)
            return [*range(len(entries))]
        new: list[int] = []
        compared = self._compare(directory, entries)
        for index, entry in enumerate(entries):
            if entry.name == STAGING_NAME:
                check_name(entry.name, reserved=(STAGING_NAME,))
            if not usable or (directory.keys is not None and self._placement.collides(directory, entry.name)):
                if usable is False and not self._placement.dry:
                    landing.report(directory.child(entry.name), "local", "its folder could not be made")
                elif self._placement.dry and not usable:
                    self._placement.count_wanted(entry)
                continue
            directory.entries += 1
            if entry.mode & forbidden_mode:
                self._placement.check_mode(entry.mode)
            if entry.kind == FILE:
                if not self._is_in_place(directory, entry, compared.get(index)):
                    new.append(index)
            elif entry.kind == SYMLINK:
                self._symlink(directory, entry)
            elif entry.kind == HARDLINK:
                self._hard_link(directory, entry)
            else:
                raise ProtocolError(f"an entry of kind {entry.kind} was offered among objects")
        return new

    def _all_in_place(self, directory: TargetDirectory, entries: list[Entry]) -> bool:
        """Whether the scan cache knows that all of an offer stands there just so; then that is taken note of."""
        if not directory.recalled or directory.keys is not None:
            return False
        rows = directory.are_next(entries)
        if rows is None:
            return False
        if directory.offered is not None:
            directory.offered.update([entry.name for entry in entries])
        directory.entries += len(rows)
        directory.add_rows(rows)
        self._placement.kept(len(rows), sum([entry.size for entry in entries]))
        return True

    def _alike(
        self,
        directory: TargetDirectory,
        offer: SmallOffer,
        new: list[int],
        hints: dict[int, Hint],
    ) -> dict[int, tuple[Found, Guess | None]]:
        """Take what lies at the target under another name out of `new`; for the rest, what it may be a version of."""
        placement, landing = self._placement, self._placement.landing
        entries = offer.entries
        fresh = [
            index
            for index in new
            if entries[index].size
            and entries[index].name not in directory.existing
            and offer.first[index] not in hints
        ]
        if placement.dry or not fresh:
            return {}
        placement.lookalikes.expect(sum([entries[index].size for index in fresh]))
        if not placement.lookalikes.known():
            return {}
        alike: dict[int, tuple[Found, Guess | None]] = {}
        for index in fresh:
            entry = entries[index]
            with landing.lock:
                identity = entry.chunks[4:CHUNK_BYTES]
                if identity in landing.inflight or identity in landing.recent:
                    continue
            data = placement.lookalikes.content(directory.path, entry)
            if data is not None:
                landing.opened(directory, entry.name)
                place_small(landing, directory, entry, data)
                new.remove(index)
                continue
            found = placement.lookalikes.version_of(directory.path, entry)
            if found is not None:
                alike[index] = found
        return alike

    def _ask_finer(
        self,
        directory: TargetDirectory,
        number: int,
        offer: SmallOffer,
        new: list[int],
        alike: dict[int, tuple[Found, Guess | None]],
    ) -> None:
        """What replaces another file, or is like one, may be mostly that."""
        chunks: dict[int, tuple[int, bytes, Region]] = {}
        for index in new:
            entry = offer.entries[index]
            st = directory.existing.get(entry.name)
            guess = None
            if st is not None and stat.S_ISREG(st.st_mode):
                folder, name, size = directory.fd, entry.name, st.st_size
            elif index in alike:
                folder = self._placement.root_fd
                (name, size), guess = alike[index]
            else:
                continue
            if size < LEAST_OLD_BYTES:
                continue
            region = Region(0, min(size, _MOST_OLD_BYTES), directory_fd=folder, name=name, guess=guess)
            first = offer.first[index]
            for at in range(0, len(entry.chunks), CHUNK_BYTES):
                place = first + at // CHUNK_BYTES
                if offer.wanted[place] == WANTED:
                    one = entry.chunks[at : at + CHUNK_BYTES]
                    chunks[place] = int.from_bytes(one[:4], "little"), one, region
        if chunks:
            self._refiner.ask(number, offer, chunks)

    def _hints(self, offer: SmallOffer, new: list[int]) -> dict[int, Hint]:
        """What the index knows of the chunks of those entries, by chunk of the offer; one look-up for all."""
        if not self._placement.has_index():
            return {}
        packed = b"".join([offer.entries[index].chunks for index in new])
        chunks = [
            offer.first[index] + number
            for index in new
            for number in range(len(offer.entries[index].chunks) // CHUNK_BYTES)
        ]
        return {chunks[position]: place for position, place in self._placement.remembered(packed).items()}

    def _may_be_in_place(self, directory: TargetDirectory, entry: Entry) -> Stat | None:
        """The stat of what stands there, where it may be left as it is."""
        st = directory.existing.get(entry.name) if directory.existing else None
        if (
            st is not None
            and st.st_size == entry.size
            and st.st_mode & 0o170000 == 0o100000
            and not self._placement.must_not_touch(entry, st)
        ):
            return st
        return None

    def _is_in_place(self, directory: TargetDirectory, entry: Entry, compared: bool | None) -> bool:
        """Whether a small object is right where it stands; if so, its mode and time are seen to.

        Args:
            compared: what a comparison with its bytes said, if there was one.
        """
        st = self._may_be_in_place(directory, entry)
        if st is None:
            return False
        if not (self._same_content(directory, entry, st) if compared is None else compared):
            return False
        self._placement.keep(directory, entry, st)
        return True

    def _compare(self, directory: TargetDirectory, entries: list[Entry]) -> dict[int, bool]:
        """Read what stands in place and nothing is known of, many at a time: by index, whether it is what is offered."""
        if not directory.existing:
            return {}
        known = directory.known
        asked: list[tuple[int, Row]] = []
        for index, entry in enumerate(entries):
            if entry.kind == FILE and 0 < entry.size < LARGE_OBJECT_BYTES and entry.name not in known:
                st = self._may_be_in_place(directory, entry)
                if st is not None:
                    asked.append((index, (entry.name, st)))
        compared: dict[int, bool] = {}
        while asked:
            some = list(islice(takewhile(_Within(_COMPARE_BYTES), asked), MAX_OFFER_ENTRIES))
            if self._room is None:
                self._room = fresh_memory(_COMPARE_BYTES + 1)
            done = read_files(directory.fd, [row for _, row in some], self._room, 0)
            at = 0
            for index, (_, st) in some[:done]:
                compared[index] = are_chunks(self._room[at:], entries[index].chunks)
                at += st.st_size
            if done:
                self._placement.counters.objects_read += done
                self._placement.counters.bytes_read += at
                directory.unchanged_all = False  # what was just learned is worth keeping
            # One that could not be read so is looked at by itself.
            asked = asked[done + 1 :] if done < len(some) else asked[done:]
        return compared

    def _small_file(
        self,
        directory: TargetDirectory,
        offer: SmallOffer,
        index: int,
        entry: Entry,
        jobs: list[CopyJob],
        hints: dict[int, Hint],
    ) -> None:
        if self._placement.dry:
            self._placement.count_wanted(entry)
            return
        landing = self._placement.landing
        if entry.size >= LARGE_OBJECT_BYTES:
            raise ProtocolError(f"{show_path(directory.child(entry.name))} is too large to be offered whole")
        landing.opened(directory, entry.name)
        packed = entry.chunks
        if not packed:
            sink = SmallObject(directory, entry, landing.staging)
            landing.adopt(sink)
            landing.add(sink, 0)
            return
        first = offer.first[index]
        count = len(packed) // CHUNK_BYTES
        elsewhere: list[tuple[int, int, bytes]] = []
        offset = 0
        with landing.lock:
            inflight, recent = landing.inflight, landing.recent
            for number in range(count):
                identity = packed[number * CHUNK_BYTES + 4 : (number + 1) * CHUNK_BYTES]
                length = int.from_bytes(packed[number * CHUNK_BYTES : number * CHUNK_BYTES + 4], "little")
                if identity in inflight or identity in recent or first + number in hints:
                    elsewhere.append((number, offset, identity))
                else:
                    inflight[identity] = None
                    offer.wanted[first + number] = WANTED
                offset += length
        if not elsewhere:
            return  # a sink is made only when its chunks arrive apart
        sink = SmallObject(directory, entry, landing.staging)
        landing.adopt(sink)
        offer.sinks[index] = sink
        for number, offset, identity in elsewhere:
            one = packed[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            hint = hints.get(first + number)
            if hint is not None:
                append_copy(jobs, sink, offset, one, None, hint[0], hint[1])
            else:
                self._placement.reuse(sink, offset, identity, one, jobs)

    def _same_content(self, directory: TargetDirectory, entry: Entry, st: AnyStat) -> bool:
        known = directory.known.get(entry.name)
        if known is not None:
            return known.kind == FILE and known.chunks == entry.chunks
        if not entry.size:
            return True
        try:
            fd = os.open(entry.name, READ_FILE, dir_fd=directory.fd)
        except OSError:
            return False
        try:
            data = os.pread(fd, entry.size + 1, 0)
        finally:
            os.close(fd)
        self._placement.counters.objects_read += 1
        self._placement.counters.bytes_read += len(data)
        directory.unchanged_all = False  # what was just learned is worth keeping
        if len(data) != entry.size:
            return False
        return self._cutter.packed(data) == entry.chunks

    def _symlink(self, directory: TargetDirectory, entry: Entry) -> None:
        path = directory.child(entry.name)
        try:
            check_link_target(
                path, entry.link, links="keep" if self._placement.options.links == "keep" else "inside"
            )
        except ProtocolError as error:
            self._placement.landing.report(path, "link", error.message + _link_hint(path, entry.link))
            return
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and stat.S_ISLNK(st.st_mode):
            try:
                same = os.readlink(entry.name, dir_fd=directory.fd) == entry.link
            except OSError:
                same = False
            if same and not (self._placement.atomic and st.st_nlink > 1 and st.st_mtime_ns != entry.mtime_ns):
                if st.st_mtime_ns != entry.mtime_ns and not self._placement.dry:
                    os.utime(
                        entry.name,
                        ns=(entry.mtime_ns, entry.mtime_ns),
                        dir_fd=directory.fd,
                        follow_symlinks=False,
                    )
                    st = Stat.of(os.stat(entry.name, dir_fd=directory.fd, follow_symlinks=False))
                    directory.unchanged_all = False
                self._placement.counters.objects_unchanged += 1
                self._placement.counters.objects_done += 1
                directory.add_rows([(entry.name, st, entry)])
                return
        if not self._placement.dry:
            self._placement.landing.opened(directory, entry.name)
            self._placement.landing.ready("symlink", directory, entry, None)

    def _hard_link(self, directory: TargetDirectory, entry: Entry) -> None:
        check_relative_path(entry.link, reserved=(STAGING_NAME,))
        st = directory.existing.get(entry.name) if directory.existing else None
        if st is not None and st.st_nlink > 1:
            try:
                fd = open_beneath(self._placement.root_fd, entry.link, READ_FILE)
                try:
                    first = os.fstat(fd)
                finally:
                    os.close(fd)
                parent, _, name = entry.link.rpartition(b"/")
                owner = self._placement.landing.directories.get(parent)
                busy = owner is not None and name in owner.open_names
                if not busy and (first.st_ino, first.st_dev) == (st.st_ino, st.st_dev):
                    self._placement.counters.objects_unchanged += 1
                    self._placement.counters.objects_done += 1
                    return
            except OSError:
                pass
        if not self._placement.dry:
            self._placement.landing.opened(directory, entry.name)
            self._placement.landing.ready("hardlink", directory, entry, None)


class _Within:
    """Takes rows as long as their sizes add up to no more than a bound."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes

    def __call__(self, item: tuple[int, Row]) -> bool:
        self._left -= item[1][1].st_size
        return self._left >= 0


def _link_hint(path: bytes, link: bytes) -> str:
    """What to do where only the rule that links stay inside is in the way."""
    try:
        check_link_target(path, link, links="keep")
    except ProtocolError:
        return ""
    return "; with --links keep it is taken as it is (a server must be started with that, too)"
