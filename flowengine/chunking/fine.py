"""The second, finer cut: of chunks that are wanted though most of their bytes may be at the target already.

Goal
    An edit of a few bytes costs about as many on the wire, and not a chunk at each end.
Plan
    Where a wanted chunk lies beside reused ones, source and target cut it, and what stood there before, about a hundred
    times finer. A fine id is short: what is put together from fine chunks is checked against the coarse id.
Invariants
    - Fine chunks never reach a manifest, a journal or an index.
    - Cuts depend on the bytes and the profile alone.
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from flowengine.chunking import Cutter, Profile

__all__ = ["FINE_BYTES", "FINE_ID_BYTES", "FineCutter", "fine_id", "fine_lengths", "fine_profile"]

FINE_ID_BYTES: Final = 12
FINE_BYTES: Final = 4 + FINE_ID_BYTES
"""Size of one packed fine chunk: u32 little-endian length, then the first bytes of its blake3."""


def fine_profile(profile: Profile) -> Profile:
    """The profile of the second cut under a profile.

    >>> from flowengine.chunking import DEFAULT_PROFILE
    >>> fine_profile(DEFAULT_PROFILE)
    Profile(name='64KiB/128', average=512, minimum=256, maximum=4096)
    """
    return Profile(
        f"{profile.name}/128", profile.average // 128, profile.minimum // 64, profile.maximum // 64
    )


def fine_id(data: bytes | bytearray | memoryview) -> bytes:
    """The id of a fine chunk: 12 bytes."""
    return blake3(data).digest(FINE_ID_BYTES)


def fine_lengths(packed: bytes) -> list[int]:
    """The lengths in a packed list of fine chunks."""
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), FINE_BYTES)]


class FineCutter:
    """Cuts bytes into packed fine chunks."""

    def __init__(self, profile: Profile) -> None:
        self._cutter = Cutter(fine_profile(profile))

    def packed(self, data: bytes | bytearray | memoryview) -> bytes:
        """The packed fine chunks of `data`, whose start counts as a cut and whose end ends the last chunk."""
        return self._cutter.packed(data, FINE_ID_BYTES)

    def places(self, data: bytes | bytearray | memoryview) -> dict[bytes, int]:
        """Where each packed fine chunk begins in `data`; the first place of those that are equal."""
        found: dict[bytes, int] = {}
        at = 0
        packed = self.packed(data)
        for start in range(0, len(packed), FINE_BYTES):
            found.setdefault(packed[start : start + FINE_BYTES], at)
            at += int.from_bytes(packed[start : start + 4], "little")
        return found
