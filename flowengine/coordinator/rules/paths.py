"""Which paths of a site overlap, and which lie below a root that it offers."""

from __future__ import annotations

from collections.abc import Iterable

from flowengine.api.sites import Root
from flowengine.errors import UsageError

__all__ = ["clean", "offering_root", "overlap"]


def clean(path: str) -> str:
    """The path without doubled slashes, `.` and a slash at its end; `..` is an error, for it could lead anywhere.

    >>> clean("/data//runs/./7/")
    '/data/runs/7'
    >>> clean("/")
    '/'
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(
            f"the path {path!r} contains '..'", hint="write the path from the site's root without '..'"
        )
    return "/" + "/".join(parts)


def overlap(one: str, other: str) -> bool:
    """Whether two clean paths are the same or one lies below the other: a prefix by whole components.

    >>> overlap("/data", "/data/runs"), overlap("/data", "/database")
    (True, False)
    """
    if one == other or one == "/" or other == "/":
        return True
    return one.startswith(other + "/") or other.startswith(one + "/")


def offering_root(roots: Iterable[Root], path: str, writing: bool) -> Root | None:
    """The deepest root above (or at) the clean path that may be read, or written where `writing`."""
    found: Root | None = None
    for root in roots:
        name = clean(root.name)
        inside = name == "/" or path == name or path.startswith(name + "/")
        allowed = root.access == "read-write" or root.access == ("write" if writing else "read")
        if inside and allowed and (found is None or len(name) > len(clean(found.name))):
            found = root
    return found
