"""How much lies below a path: a count looks at names and sizes alone."""

from __future__ import annotations

import os
import stat
import time
from typing import Final

from flowengine.api.agents import Answer
from flowengine.errors import FlowError, NotFound
from flowengine.store.filesystem import open_beneath
from flowengine.wire.paths import STAGING_NAME
from flowengine_agent.roots import Place, Roots

__all__ = ["count"]

MAX_WAITING: Final = 1_000_000


def count(roots: Roots, site_path: str, within_s: float) -> Answer:
    """How many objects lie below a path and how large they are; what is wrong is in the answer. For a thread."""
    try:
        return _count(roots.find(site_path, "read"), site_path, within_s)
    except FlowError as error:
        return Answer(reason=error.reason, message=error.message, complete=False)
    except OSError as error:
        return Answer(reason="denied", message=f"{site_path}: {error.strerror}", complete=False)


def _count(place: Place, shown: str, within_s: float) -> Answer:
    top = place.lstat()
    if top is None:
        raise NotFound(f"{shown} does not exist")
    if not stat.S_ISDIR(top.st_mode):
        return Answer(objects=1, size_bytes=top.st_size if stat.S_ISREG(top.st_mode) else 0)
    until = time.monotonic() + within_s
    objects = size = 0
    waiting = [place.path]
    linked: set[tuple[int, int]] = set()
    while waiting:
        if time.monotonic() > until or len(waiting) > MAX_WAITING:
            return Answer(objects=objects, size_bytes=size, complete=False)
        folder = waiting.pop()
        try:
            fd = open_beneath(place.root.fd, folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it went, or may not be read: the transfer itself will say so
        try:
            for text in os.listdir(fd):
                name = os.fsencode(text)
                if name == STAGING_NAME:
                    continue
                try:
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:
                    continue
                objects += 1
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(folder + b"/" + name if folder else name)
                elif stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in linked:
                    size += st.st_size
                    if st.st_nlink > 1:
                        linked.add((st.st_dev, st.st_ino))
        finally:
            os.close(fd)
    return Answer(objects=objects, size_bytes=size)
