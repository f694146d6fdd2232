"""The one validator of paths and names that come from a peer.

Goal
    Whatever a peer sends, nothing is read or written outside the root that was agreed on.
Plan
    Paths are bytes, relative, in one spelling: names joined by single slashes. They are judged here alone
    and never mended: a path that needs mending is refused. The receiver then opens each directory of a path
    without following links, so that checked names mean what they say.
Invariants
    - A checked path has no empty name, no '.', no '..', no NUL, no leading or trailing slash, and bounded
      length and depth; so joining it to a root stays below the root.
    - A checked link resolves inside the root, through whatever other checked links it passes: '..' is allowed
      only at its beginning, where each step is a real directory of the link's own path. (`a/b/../c` may leave
      the root when `b` is itself a link; such targets are refused although many of them are harmless.)
    - Names that differ only in case or Unicode normalisation are reported (`collision_key`), never merged.

Names that only another system finds hard (Windows device names, trailing dots, backslashes, control
characters) are allowed: data is copied between POSIX file systems as it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from typing import Final, Literal, TypeAlias

from flowengine.errors import ProtocolError
from flowengine.units import show_path

__all__ = [
    "MAX_DEPTH",
    "MAX_LINK_BYTES",
    "MAX_NAME_BYTES",
    "MAX_PATH_BYTES",
    "STAGING_NAME",
    "LinkPolicy",
    "check_link_target",
    "check_name",
    "check_relative_path",
    "collision_key",
]

MAX_NAME_BYTES: Final = 255
MAX_PATH_BYTES: Final = 4096
MAX_DEPTH: Final = 256
MAX_LINK_BYTES: Final = 4095
"""PATH_MAX of Linux without its NUL: no longer link can be made."""
STAGING_NAME: Final = b".flow-staging"

LinkPolicy: TypeAlias = Literal["inside", "keep"]


def check_name(name: bytes, *, reserved: Collection[bytes] = ()) -> None:
    """Refuse a name that is not one plain component of a path.

    Args:
        name: The name, without slashes.
        reserved: Names that belong to flowengine itself on this side, as `STAGING_NAME`.

    Raises:
        ProtocolError: the name cannot be used; nothing may be done with it.
    """
    if not name:
        raise _refused(name, "a name in it is empty")
    if name in (b".", b".."):
        raise _refused(name, f"{name.decode('ascii')!r} is no name of an object")
    if len(name) > MAX_NAME_BYTES:
        raise _refused(name, f"a name of {len(name)} bytes is longer than {MAX_NAME_BYTES}")
    if b"\0" in name:
        raise _refused(name, "it holds a NUL byte")
    if b"/" in name:
        raise _refused(name, "a name holds a slash")
    if name in reserved:
        raise _refused(name, f"the name {show_path(name)!r} is kept for flowengine's own use here")


def check_relative_path(path: bytes, *, reserved: Collection[bytes] = ()) -> None:
    """Refuse a path that is not a plain relative path below a root.

    The root itself is no path; callers that mean it have another way to say so.

    Raises:
        ProtocolError: the path cannot be used; nothing may be done with it.
    """
    if not path:
        raise _refused(path, "it is empty")
    if len(path) > MAX_PATH_BYTES:
        raise _refused(path, f"its {len(path)} bytes are more than {MAX_PATH_BYTES}")
    if path[0] == 0x2F:
        raise _refused(path, "it is absolute")
    names = path.split(b"/")
    if len(names) > MAX_DEPTH:
        raise _refused(path, f"its depth of {len(names)} names is more than {MAX_DEPTH}")
    for name in names:
        try:
            check_name(name, reserved=reserved)
        except ProtocolError as error:
            raise _refused(path, str(error.context["why"])) from None


def check_link_target(link_path: bytes, target: bytes, *, links: LinkPolicy = "inside") -> None:
    """Refuse a symbolic link that could lead out of the root.

    Args:
        link_path: Where the link stands: a path that `check_relative_path` accepts.
        target: What the link says.
        links: "inside" for whatever comes from a peer. "keep" takes every target that a file system can hold,
            like rsync's `--links`: for copies between two places of one user, where a link is data that is
            kept, and which never follow one.

    Raises:
        ProtocolError: the link cannot be used; it must not be made.
    """
    if not target:
        raise _refused(link_path, "it is a link to nothing")
    if len(target) > MAX_LINK_BYTES:
        raise _refused(link_path, f"its link target of {len(target)} bytes is longer than {MAX_LINK_BYTES}")
    if b"\0" in target:
        raise _refused(link_path, "its link target holds a NUL byte")
    if links == "keep":
        return
    shown = show_path(target[:200])
    if target[0] == 0x2F:
        raise _refused(link_path, f"it is a link to the absolute path {shown!r}")
    above = link_path.count(b"/")
    descended = False
    for name in target.split(b"/"):
        if name == b"..":
            if descended:
                raise _refused(link_path, f"its link target {shown!r} has '..' behind a name")
            above -= 1
            if above < 0:
                raise _refused(link_path, f"it is a link to {shown!r}, out of the root")
        elif name not in (b"", b"."):
            descended = True


def collision_key(name: bytes) -> bytes:
    r"""What a name becomes on a file system that ignores case and normalises Unicode.

    Two different names of one directory with equal keys collide there. Bytes that are not UTF-8 are kept.

    >>> collision_key(b"Caf\xc3\xa9") == collision_key("cafe\u0301".encode())
    True
    """
    if name.isascii():
        return name.lower()
    text = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
    # Folding can undo the normal form ('ΐ'), so it is made again (Unicode 3.13, D145 without its NFD step).
    return unicodedata.normalize("NFC", text.casefold()).encode("utf-8", "surrogateescape")


def _refused(path: bytes, why: str) -> ProtocolError:
    shown = show_path(path[:200]) + ("…" if len(path) > 200 else "")
    return ProtocolError(
        f"the path {shown!r} is refused: {why}",
        hint="rename the object at the source, or leave it out with --exclude",
        reason="unsafe-path",
        path=shown,
        why=why,
    )
