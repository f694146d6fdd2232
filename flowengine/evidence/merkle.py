"""Merkle trees over the records between two checkpoints, as RFC 9162 (2.1) builds them.

A path of a few digests then proves that one record is under a signed root, without any of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowengine.evidence.suites import Suite

__all__ = ["inclusion_path", "merkle_root", "root_from_path"]


def merkle_root(suite: Suite, leaves: Sequence[str]) -> str:
    """The root over record hashes (`sha256:…` texts); of none it is the digest of nothing."""
    level = [suite.raw(b"\x00" + leaf.encode("ascii")) for leaf in leaves]
    if not level:
        return suite.digest(b"")
    while len(level) > 1:
        level = _up(suite, level)
    return f"{suite.prefix}:{level[0].hex()}"


def inclusion_path(suite: Suite, leaves: Sequence[str], index: int) -> list[str]:
    """The digests beside the way from a leaf to the root, from below; `L` or `R` before each says on which side."""
    level = [suite.raw(b"\x00" + leaf.encode("ascii")) for leaf in leaves]
    path: list[str] = []
    while len(level) > 1:
        beside = index ^ 1
        if beside < len(level):
            path.append(("L" if beside < index else "R") + level[beside].hex())
        level = _up(suite, level)
        index //= 2
    return path


def root_from_path(suite: Suite, leaf: str, path: Sequence[str]) -> str:
    """The root that a leaf and its path lead to.

    Raises:
        ValueError: the path is none.
    """
    node = suite.raw(b"\x00" + leaf.encode("ascii"))
    for step in path:
        beside = bytes.fromhex(step[1:])
        if step[:1] not in ("L", "R") or len(beside) != len(node):
            raise ValueError("no step of a path")
        node = suite.raw(b"\x01" + (beside + node if step[0] == "L" else node + beside))
    return f"{suite.prefix}:{node.hex()}"


def _up(suite: Suite, level: list[bytes]) -> list[bytes]:
    """The next level: pairs are joined, a last one without a partner goes up as it is."""
    joined = [suite.raw(b"\x01" + level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return joined + level[len(level) & ~1 :]
