"""What may still leave the source once a session is halted (`transfer.halting` has the target's part, and why).

Invariants
    - Nothing that has not begun to leave leaves without the target's word that it wants it still.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Final, Protocol

from flowengine.errors import ProtocolError
from flowengine.wire.messages import MAX_FINE_CHUNKS
from flowengine.wire.records import Run

__all__ = ["HALTED", "Leaving", "UnitHold"]

HALTED: Final = "policy-stopped"
"""The reason of what does not land for a halt."""
ANSWER_S: Final = 5.0
"""How long a source that halts waits for the target's word; then what has not begun to leave does not."""
MAX_UNWANTED_CHUNKS: Final = 1_000_000
"""More than can be wanted and not here: an offer is answered by a bitmap, and what is wanted is bounded in bytes."""


class UnitHold(Protocol):
    """An offer, as far as it tells which of its objects have begun to leave."""

    @property
    def lengths(self) -> list[int]:
        """Of its chunks."""

    def begin(self, index: int, count: int) -> None:
        """Chunks of it are about to be sent."""

    def has_begun(self, index: int) -> bool:
        """Whether chunks of the object that this one belongs to were sent."""


class Leaving:
    """What may still leave once a session is halted. For use by any thread.

    Args:
        lost: told of a run that was wanted and is not sent, without the target having said so.
        clock: seconds.
    """

    def __init__(self, lost: Callable[[Run], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._lost = lost
        self._clock = clock
        self._changed = threading.Condition()
        self._unwanted: dict[int, set[int]] = {}
        self._told = 0
        self._said = False
        self._until: float | None = None

    def unwanted(self, runs: Iterable[Run], *, all_of_it: bool) -> None:
        """The target's word: it wants these no more.

        Args:
            all_of_it: whether that is all of what was asked for before it halted.

        Raises:
            ProtocolError: it names what no offer has, or more than it can have wanted.
        """
        with self._changed:
            for number, index, count in runs:
                self._told += max(1, count)
                if number < 0 or index < 0 or not 0 < count <= MAX_FINE_CHUNKS - index:
                    raise ProtocolError(f"the target wants chunks {index}+{count} of offer {number} no more")
                if self._told > MAX_UNWANTED_CHUNKS:
                    raise ProtocolError(
                        f"the target wants {self._told} chunks no more, and never wanted so many"
                    )
                self._unwanted.setdefault(number, set()).update(range(index, index + count))
            self._said = self._said or all_of_it
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._said = True
            self._changed.notify_all()

    def parts(self, hold: UnitHold, run: Run, *, halted: bool) -> list[Run] | None:
        """Which parts of a run are to be sent; None for all of it. After a halt it may wait for the target's word.

        Args:
            hold: the offer that the run is of.
            halted: whether this side knows of a halt.
        """
        number, index, count = run
        chunks = range(index, index + count)
        if halted:
            decided = self._wait(all(hold.has_begun(chunk) for chunk in chunks))
        elif not self._unwanted:
            hold.begin(index, count)
            return None
        else:
            decided = True
        left_out = self._unwanted.get(number, ())
        parts: list[Run] = []
        for (goes, wanted), group in groupby(
            chunks,
            lambda chunk: (
                (decided or hold.has_begun(chunk)) and chunk not in left_out,
                chunk not in left_out,
            ),
        ):
            some = list(group)
            part = (number, some[0], len(some))
            if goes:
                hold.begin(some[0], len(some))
                parts.append(part)
            elif wanted:
                self._lost(part)
        return parts

    def _wait(self, begun: bool) -> bool:
        """Wait for the target's word, unless all has begun; whether it was given."""
        with self._changed:
            if self._until is None:
                self._until = self._clock() + ANSWER_S
            while not (self._said or begun) and (left := self._until - self._clock()) > 0:
                self._changed.wait(left)
            return self._said
