"""Which chunks lie where below one target root, so that a moved, renamed or copied object is not sent again.

Goal
    A look-up costs microseconds however much lies at the target, and memory does not grow with it.
Plan
    Each transfer that lands something leaves a log (`store.index_log`). Who opens the index makes it a sealed *run*:
    chunk ids (their first 8 bytes) sorted, with the place of each; it is searched through a memory map (numpy
    searchsorted). Small runs are merged. A place names an object by its path below the root, with size and mtime as
    they were.
Invariants
    - It is a cache. A hit is checked against the object's stat before it is used, and against the full hash when it
      is copied; an index that was wrong, or is broken, is dropped whole.
    - It answers for its own root only: what lies elsewhere on the host is not asked and not told.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flowengine.chunking import CHUNK_BYTES
from flowengine.store.filesystem import open_beneath
from flowengine.store.index_log import LOG_SUFFIX, read_log
from flowengine.store.landed import index_folder

__all__ = ["ChunkIndex"]

_MAGIC: Final = b"flowidx1"
_HEADER: Final = struct.Struct("<8sQQQ")
_MAX_RUNS: Final = 8
_MERGE_ROWS: Final = 2_000_000
"""Runs are merged only up to so many chunks together: merging happens in memory (about 60 bytes a chunk)."""
_PENDING_ROWS: Final = 1_000_000
"""A run is written when so many chunks wait for it."""


class _Run:
    """One sealed run, mapped."""

    def __init__(self, path: str) -> None:
        self.path = path
        data = np.memmap(path, dtype=np.uint8, mode="r")
        magic, rows, places, blob = _HEADER.unpack(bytes(data[: _HEADER.size]))
        sizes = (8 * rows, 8 * rows, 4 * rows, 8 * (places + 1), 8 * places, 8 * places, blob)
        if magic != _MAGIC or len(data) != _HEADER.size + sum(sizes):
            raise ValueError("not a run of a chunk index")
        parts = []
        at = _HEADER.size
        for size in sizes:
            parts.append(data[at : at + size])
            at += size
        self.keys: NDArray[np.uint64] = parts[0].view(np.uint64)
        self.offsets: NDArray[np.uint64] = parts[1].view(np.uint64)
        self.places: NDArray[np.uint32] = parts[2].view(np.uint32)
        self.ends: NDArray[np.uint64] = parts[3].view(np.uint64)
        self.sizes: NDArray[np.int64] = parts[4].view(np.int64)
        self.mtimes: NDArray[np.int64] = parts[5].view(np.int64)
        self.blob = parts[6]

    def place(self, number: int) -> tuple[bytes, int, int]:
        """(path, size, mtime_ns) of a place."""
        path = bytes(self.blob[int(self.ends[number]) : int(self.ends[number + 1])])
        return path, int(self.sizes[number]), int(self.mtimes[number])


class ChunkIndex:
    """The index of one target root and profile. For use by one thread.

    Args:
        root: the target root's real path.
        profile_name: of the chunking profile.
        directory: state directory; the user's where None.

    Attributes:
        stale: logs were written since it looked for them; any thread may say so.
    """

    def __init__(self, root: bytes, profile_name: str, directory: str | None = None) -> None:
        self._folder = index_folder(root, profile_name, directory)
        self._runs: list[_Run] = []
        self._paths: list[bytes] = []
        self._stats: list[tuple[int, int]] = []
        self._rows: list[tuple[int, int, bytes]] = []
        self._pending = 0
        self.stale = False
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            for file in sorted(os.listdir(self._folder)):
                if file.endswith(".run"):
                    self._runs.append(_Run(os.path.join(self._folder, file)))
        except (OSError, ValueError, struct.error):
            self.drop()
        self._absorb()

    def _absorb(self) -> None:
        """Take over the logs that are there."""
        self.stale = False
        with contextlib.suppress(OSError):
            for file in sorted(os.listdir(self._folder)):
                if file.endswith(LOG_SUFFIX):
                    path = os.path.join(self._folder, file)
                    with contextlib.suppress(ValueError):  # a cut log counts as far as it is whole
                        for row in read_log(path):
                            self.add(*row)
                    os.unlink(path)
        self.commit()

    def __bool__(self) -> bool:
        """Whether it knows anything; where not, there is no need to ask."""
        return bool(self._runs)

    def find(self, root_fd: int, packed: bytes) -> dict[int, tuple[bytes, int]]:
        """Places of chunks: position in `packed` → (path below the root, offset), for those that still look right.

        A hit is a hint: only the first 8 bytes of the id were compared, and the object only by its stat.
        """
        if self.stale:
            self._absorb()
        if not self._runs or not packed:
            return {}
        ids = np.frombuffer(packed, dtype=np.uint8).reshape(-1, CHUNK_BYTES)
        keys = np.ascontiguousarray(ids[:, 4:12]).view(np.uint64).ravel()
        found: dict[int, tuple[bytes, int]] = {}
        usable: dict[tuple[int, int], bytes | None] = {}
        for number in range(len(self._runs) - 1, -1, -1):
            run = self._runs[number]
            if not len(run.keys):
                continue
            at = np.minimum(np.searchsorted(run.keys, keys), len(run.keys) - 1)
            for position in np.nonzero(run.keys[at] == keys)[0].tolist():
                if position in found:
                    continue
                row = int(at[position])
                place = int(run.places[row])
                if (number, place) not in usable:
                    usable[number, place] = _still_there(root_fd, *run.place(place))
                path = usable[number, place]
                if path is not None:
                    found[position] = (path, int(run.offsets[row]))
        return found

    def add(self, path: bytes, size_bytes: int, mtime_ns: int, offset: int, packed: bytes) -> None:
        """Chunks that landed in an object of this size and time, from `offset` on."""
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
            self._stats.append((size_bytes, mtime_ns))
        self._rows.append((len(self._paths) - 1, offset, packed))
        self._pending += len(packed) // CHUNK_BYTES
        if self._pending >= _PENDING_ROWS:
            self.commit()

    def commit(self) -> None:
        """Write what was added as a run, and merge small runs when there are many. Failures cost the cache only."""
        if not self._pending:
            return
        ids = np.frombuffer(b"".join([packed for _, _, packed in self._rows]), dtype=np.uint8)
        ids = ids.reshape(-1, CHUNK_BYTES)
        keys = np.ascontiguousarray(ids[:, 4:12]).view(np.uint64).ravel()
        lengths = np.ascontiguousarray(ids[:, :4]).view(np.uint32).ravel().astype(np.uint64)
        counts = np.array([len(packed) // CHUNK_BYTES for _, _, packed in self._rows])
        firsts = np.cumsum(counts) - counts
        before = np.cumsum(lengths, dtype=np.uint64) - lengths
        starts = np.array([offset for _, offset, _ in self._rows], dtype=np.uint64)
        offsets = before + np.repeat(
            starts - before[firsts], counts
        )  # modulo 2^64, where it may go below zero
        places = np.repeat(np.array([place for place, _, _ in self._rows], dtype=np.uint32), counts)
        stats = np.array(self._stats, dtype=np.int64)
        with contextlib.suppress(OSError, ValueError):
            self._write(keys, offsets, places, self._paths, stats[:, 0], stats[:, 1])
            self._merge()
        self._paths, self._stats, self._rows, self._pending = [], [], [], 0

    def _write(
        self,
        keys: NDArray[np.uint64],
        offsets: NDArray[np.uint64],
        places: NDArray[np.uint32],
        paths: list[bytes],
        sizes: NDArray[np.int64],
        mtimes: NDArray[np.int64],
    ) -> None:
        order = np.argsort(keys, kind="stable")
        ends = np.concatenate(([0], np.cumsum([len(path) for path in paths]))).astype(np.uint64)
        blob = b"".join(paths)
        number = 1 + max([int(os.path.basename(run.path).partition(".")[0]) for run in self._runs], default=0)
        path = os.path.join(self._folder, f"{number:08d}.run")
        part = f"{path}.{os.getpid()}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, len(keys), len(paths), len(blob)))
            for array in (keys[order], offsets[order], places[order], ends, sizes, mtimes):
                file.write(np.ascontiguousarray(array).tobytes())
            file.write(blob)
        os.replace(part, path)
        self._runs.append(_Run(path))

    def _merge(self) -> None:
        """Join the newest runs into one while there are too many and they are small."""
        while len(self._runs) > _MAX_RUNS:
            last = self._runs[-2:]
            if sum(len(run.keys) for run in last) > _MERGE_ROWS:
                if len(self._runs) > 8 * _MAX_RUNS:
                    self.drop()  # so much turned over that learning anew is cheaper than searching it all
                return
            paths: list[bytes] = []
            for run in last:
                paths += [run.place(number)[0] for number in range(len(run.sizes))]
            shift = np.uint32(len(last[0].sizes))
            del self._runs[-2:]
            self._write(
                np.concatenate([run.keys for run in last]),
                np.concatenate([run.offsets for run in last]),
                np.concatenate([last[0].places, last[1].places + shift]),
                paths,
                np.concatenate([run.sizes for run in last]),
                np.concatenate([run.mtimes for run in last]),
            )
            merged = self._runs[-1]
            for run in last:
                if run.path != merged.path:
                    with contextlib.suppress(OSError):
                        os.unlink(run.path)

    def drop(self) -> None:
        """Forget everything, on disk too."""
        self._runs = []
        with contextlib.suppress(OSError):
            for file in os.listdir(self._folder):
                os.unlink(os.path.join(self._folder, file))


def _still_there(root_fd: int, path: bytes, size: int, mtime_ns: int) -> bytes | None:
    """The path, if an object of this size and time is there."""
    try:
        fd = open_beneath(root_fd, path, os.O_PATH)
    except OSError:
        return None
    try:
        st = os.fstat(fd)
    finally:
        os.close(fd)
    same = stat.S_ISREG(st.st_mode) and (st.st_size, st.st_mtime_ns) == (size, mtime_ns)
    return path if same else None
