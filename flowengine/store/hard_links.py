"""Files with several names in a scanned tree: the first is the object, those met later are hard links to it."""

from __future__ import annotations

import stat

from flowengine.manifest import HARDLINK, Entry
from flowengine.manifest.entries import join
from flowengine.store.many import Row, Stat

__all__ = ["HardLinks"]


class HardLinks:
    """Under which name each file of several was met first. For one scan; it keeps a file until all its names were met."""

    def __init__(self) -> None:
        self._met: dict[tuple[int, int], tuple[bytes, int]] = {}

    def first_name(self, folder: bytes, name: bytes, st: Stat) -> bytes | None:
        """The path that a file of several names was met under before; None where this is the first one."""
        key = (st.st_dev, st.st_ino)
        found = self._met.get(key)
        if found is None:
            self._met[key] = (join(folder, name), st.st_nlink - 1)
            return None
        first, left = found
        if left <= 1:  # all names were seen; what is outside the tree keeps its row
            del self._met[key]
        else:
            self._met[key] = (first, left - 1)
        return first

    def mark(self, folder: bytes, entries: list[Entry], rows: list[Row]) -> bool:
        """Replace later names of one file by hard links to the first; whether there were any.

        Args:
            rows: names and stats of the entries, all in `folder`.
        """
        linked = False
        for index, (name, st) in enumerate(rows):
            if st.st_nlink > 1 and stat.S_ISREG(st.st_mode):
                first = self.first_name(folder, name, st)
                if first is not None:
                    was = entries[index]
                    entries[index] = Entry(name, HARDLINK, was.mode, was.mtime_ns, 0, b"", first)
                    linked = True
        return linked
