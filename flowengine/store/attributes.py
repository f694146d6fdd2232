"""Extended attributes and ownership: read into an entry's `extra`, applied from it."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from flowengine.errors import ProtocolError
from flowengine.manifest import Extra, decode_extra, encode_extra
from flowengine.store.many import AnyStat
from flowengine.units import show_path

__all__ = ["apply_extra", "extra_reader"]

_PREFIXES: Final = ("user.", "security.capability", "system.posix_acl_")
"""Namespaces that mean the same on another host; `trusted.` and security labels belong to the one they are on."""


@lru_cache(1024)
def _user(uid: int) -> bytes:
    try:
        return os.fsencode(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return b""


@lru_cache(1024)
def _group(gid: int) -> bytes:
    try:
        return os.fsencode(grp.getgrgid(gid).gr_name)
    except KeyError:
        return b""


def extra_reader(*, xattrs: bool, owner: bool) -> Callable[[int | bytes, AnyStat], bytes]:
    """A function that gives the `extra` of an open file or directory."""

    def read(fd: int | bytes, st: AnyStat) -> bytes:
        pairs: list[tuple[bytes, bytes]] = []
        if xattrs:
            with contextlib.suppress(OSError):
                names = [name for name in sorted(os.listxattr(fd)) if name.startswith(_PREFIXES)]
                pairs = [(os.fsencode(name), os.getxattr(fd, name)) for name in names]
        return encode_extra(
            Extra(
                tuple(pairs),
                st.st_uid if owner else None,
                st.st_gid if owner else None,
                _user(st.st_uid) if owner else b"",
                _group(st.st_gid) if owner else b"",
            )
        )

    return read


def apply_extra(fd: int, data: bytes) -> None:
    """Give an open file the attributes and owner in `data`, by name where the name is known here.

    Raises:
        OSError: the file system or this account cannot; attributes that the file system does not support included.
    """
    extra = decode_extra(data)
    if extra.uid is not None or extra.gid is not None:
        uid = extra.uid if extra.uid is not None else -1
        gid = extra.gid if extra.gid is not None else -1
        # A name that no account can have (NUL in it) is as unknown as one that none has.
        with contextlib.suppress(KeyError, ValueError):
            uid = pwd.getpwnam(os.fsdecode(extra.owner)).pw_uid if extra.owner else uid
        with contextlib.suppress(KeyError, ValueError):
            gid = grp.getgrnam(os.fsdecode(extra.group)).gr_gid if extra.group else gid
        os.fchown(fd, uid, gid)
    wanted = dict(extra.xattrs)
    for name, value in wanted.items():
        if not os.fsdecode(name).startswith(_PREFIXES) or b"\0" in name:
            raise ProtocolError(
                f"the peer sent the extended attribute {show_path(name)}, which does not travel"
            )
        os.setxattr(fd, name, value)
    for present in os.listxattr(fd) if extra.xattrs else ():
        if present.startswith("user.") and os.fsencode(present) not in wanted:
            try:
                os.removexattr(fd, present)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
