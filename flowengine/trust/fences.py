"""Numbers that never go back: fences of claims, epochs of the coordinator's runs.

Goal
    Whoever holds the higher number holds the right, even after the coordinator's database came back from an old
    backup or its clock was set back.
Plan
    A fence is the larger of "one more than the last" and the time in microseconds: after a restore the clock lifts
    it, with a clock set back the database does, and where both failed the agents do, by telling the highest fence
    that they saw. An epoch grows likewise at each start, from the database, a file beside the secrets, and the clock.
Invariants
    - A new number is above every number that was stored or told.
    - No report of a peer can use the numbers up: what is told above `MAX_TOLD` is refused.
"""

from __future__ import annotations

from typing import Final

from flowengine.errors import ProtocolError

__all__ = ["MAX_FENCE", "MAX_TOLD", "lift_fence", "next_epoch", "next_fence"]

MAX_FENCE: Final = (1 << 63) - 1
MAX_TOLD: Final = 1 << 62
"""In microseconds the year 148,108: no honest clock says more, and half of all numbers stay free above it."""


def next_fence(last: int, now: float) -> int:
    """The fence of a new claim.

    Args:
        last: highest fence that was given or told so far.
        now: Unix seconds.

    >>> next_fence(7, 1.5), next_fence(2_000_000, 1.5)
    (1500000, 2000001)
    """
    fence = max(last + 1, int(now * 1_000_000))
    if not 0 < fence <= MAX_FENCE:
        raise ValueError(f"fences are used up: {fence}")
    return fence


def lift_fence(last: int, told: int) -> int:
    """The highest fence after an agent told the highest that it saw.

    Raises:
        ProtocolError: no fence was ever so high; the agent errs or lies.
    """
    if not 0 <= told <= MAX_TOLD:
        raise ProtocolError(
            f"an agent says that it saw fence {told}; none can be above {MAX_TOLD}",
            hint="look at that agent's journal and clock",
        )
    return max(last, told)


def next_epoch(stored: int, filed: int, now: float) -> int:
    """The epoch of a coordinator that starts.

    Args:
        stored: the last in the database; 0 for a new one.
        filed: the last in the file beside the secrets, which is not part of a database's backup; 0 where missing.
        now: Unix seconds.

    >>> next_epoch(5, 9, 3.0), next_epoch(5, 0, 1e9)
    (10, 1000000001)
    """
    return max(stored, filed, int(now)) + 1
