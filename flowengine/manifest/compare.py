"""What differs between two versions, at a cost that grows with the difference and not with the size.

Plan
    Equal ids mean equal contents, so equal subtrees and equal pages are never read. Pages that only one side
    has are merged by name; entries that merely moved to another page meet their equal there and drop out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

from flowengine.errors import UsageError
from flowengine.manifest.entries import DIRECTORY, Entry, Subdirectory, join, lie
from flowengine.manifest.read import ManifestReader, directory_entry
from flowengine.manifest.records import DirectoryNode, RecordReader

__all__ = ["Change", "diff"]


class Change(NamedTuple):
    """One path that differs.

    Attributes:
        kind: "added", "removed", "changed" (content, link target or kind) or "metadata" (mode, time, flags,
            extra).
        path: From the root; empty for the root itself.
        before: The entry in the first version, None where added.
        after: The entry in the second version, None where removed.
    """

    kind: Literal["added", "removed", "changed", "metadata"]
    path: bytes
    before: Entry | None
    after: Entry | None


class _Side(NamedTuple):
    """A directory in one version: its pages and the offset of its node; no pages where it is not there."""

    records: RecordReader
    node: DirectoryNode
    offset: int


class _Child(NamedTuple):
    name: bytes
    claim: Subdirectory
    offset: int


class _Pair(NamedTuple):
    """A directory to look into: its parent and itself in each version."""

    path: bytes
    a: _Side
    old: _Child | None
    b: _Side
    new: _Child | None


_T = TypeVar("_T", Entry, _Child)


def diff(a: ManifestReader, b: ManifestReader) -> Iterator[Change]:
    """What must be done to `a` to get `b`, in manifest order.

    A directory comes before what is in it, also where it was removed. A file that became a directory comes as
    removed and as added.

    Raises:
        UsageError: the versions were chunked by different profiles, so that their chunks cannot be compared.
        IntegrityError, ProtocolError: one of the manifests is damaged or lies.
    """
    if a.header.profile != b.header.profile:
        raise UsageError(
            f"the versions are chunked by {a.header.profile.name} and by {b.header.profile.name}",
            hint="make one manifest again with the profile of the other",
        )
    if a.summary.version_id == b.summary.version_id:
        return
    if _attributes(a.root) != _attributes(b.root):
        yield Change("metadata", b"", a.root, b.root)
    if a.top.claim.node_id == b.top.claim.node_id:
        return
    left = _objects(a) + _objects(b)
    stack = [_directory(*_open(_Pair(b"", _side(a), _root(a), _side(b), _root(b))))]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            continue
        left -= 1
        if (
            left < 0
        ):  # directories that share nodes could otherwise be walked for ever, see `ManifestReader.pages`
            lie(item.path, b"", "more differs below it than either version holds")
        if isinstance(item, Change):
            yield item
        else:
            stack.append(_directory(*_open(item)))


def _objects(reader: ManifestReader) -> int:
    """Bound of what a comparison meets: each entry once; each directory as a change and to be looked into."""
    return reader.summary.objects + 2 * reader.summary.directories


def _directory(path: bytes, a: _Side, b: _Side) -> Iterator[Change | _Pair]:
    """Changes in one directory, with each subdirectory that must be looked into after its own change."""
    for name, before, after in _merge(_entries(path, a, b), _entries(path, b, a)):
        if before != after:
            yield Change(_kind(before, after), join(path, name), before, after)
    for name, old, new in _merge(_children(path, a, b), _children(path, b, a)):
        below = join(path, name)
        was = directory_entry(old.claim) if old else None
        now = directory_entry(new.claim) if new else None
        if was is None or now is None or _attributes(was) != _attributes(now):
            yield Change(_kind(was, now), below, was, now)
        if old is None or new is None or old.claim.node_id != new.claim.node_id:
            yield _Pair(below, a, old, b, new)


def _side(reader: ManifestReader) -> _Side:
    return _Side(reader.records, DirectoryNode([], []), reader.top.before)


def _root(reader: ManifestReader) -> _Child:
    return _Child(b"", reader.top.claim, reader.top.offset)


def _open(pair: _Pair) -> tuple[bytes, _Side, _Side]:
    return pair.path, _open_side(pair.a, pair.old, pair.path), _open_side(pair.b, pair.new, pair.path)


def _open_side(parent: _Side, child: _Child | None, path: bytes) -> _Side:
    if child is None:
        return _Side(parent.records, DirectoryNode([], []), 0)
    node = parent.records.node(child.claim.node_id, child.offset, parent.offset, path)
    return _Side(parent.records, node, child.offset)


def _entries(path: bytes, side: _Side, other: _Side) -> Iterator[Entry]:
    known = {identity for identity, _ in other.node.entries}
    last = b""
    for identity, at in side.node.entries:
        if identity not in known:
            page = side.records.entry_page(identity, at, side.offset, path, last)
            last = page.entries[-1].name
            yield from page.entries


def _children(path: bytes, side: _Side, other: _Side) -> Iterator[_Child]:
    known = {identity for identity, _ in other.node.subdirectories}
    last = b""
    for identity, at in side.node.subdirectories:
        if identity not in known:
            page = side.records.subdirectory_page(identity, at, side.offset, path, last)
            last = page.entries[-1].name
            for claim, offset in zip(*page, strict=True):
                yield _Child(claim.name, claim, offset)


def _merge(a: Iterator[_T], b: Iterator[_T]) -> Iterator[tuple[bytes, _T | None, _T | None]]:
    """Names with what either of two sorted runs has under them, None where it has nothing."""
    left, right = next(a, None), next(b, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left.name < right.name):
            assert left is not None
            yield left.name, left, None
            left = next(a, None)
        elif left is None or right.name < left.name:
            yield right.name, None, right
            right = next(b, None)
        else:
            yield left.name, left, right
            left, right = next(a, None), next(b, None)


def _attributes(entry: Entry) -> tuple[int, int, bytes]:
    return entry.mode, entry.mtime_ns, entry.extra


def _content(entry: Entry) -> tuple[int, int, bytes, bytes, bytes]:
    return entry.kind, 0 if entry.kind == DIRECTORY else entry.size, entry.chunks, entry.runs, entry.link


def _kind(before: Entry | None, after: Entry | None) -> Literal["added", "removed", "changed", "metadata"]:
    if before is None:
        return "added"
    if after is None:
        return "removed"
    return "metadata" if _content(before) == _content(after) else "changed"
