"""What is believed of a link: rates seen of late, weighed by how sure and how old they are.

Goal
    An estimate that follows a link within seconds, does not jump at one odd observation, and admits how little it
    knows when nobody has looked for long.
Plan
    A scalar Kalman filter on the logarithm of the rate (Kalman 1960; links differ by factors, not by sums). Between
    observations the variance grows with time; an observation far off what was expected is taken as less sure
    (Huber's clipping), so that one outlier moves the estimate little and two move it much. A rate that something else
    than the link held back is a lower bound: it lifts the estimate and never lowers it.
Invariants
    - The spread never falls below `LEAST_SPREAD` and, however old, never rises above `MOST_SPREAD`.
    - Observations that arrive in any split of time give an estimate between the least and the largest of them and what
      was believed before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from flowengine.plan.topology import Estimate

__all__ = ["PRIOR", "LinkState", "estimate", "is_link_bound", "observe"]

LEAST_SPREAD: Final = 0.02
MOST_SPREAD: Final = 0.8
GROWTH_PER_HOUR: Final = 0.02
"""Variance of the logarithm that an hour adds: a day without a look leaves give or take two thirds."""
DRIFT_PER_S: Final = 2e-4
"""What the first seconds add beside that: a shared link changes in minutes."""
DRIFT_FOR_S: Final = 120.0
NOISE: Final = {"probe": 0.04, "transfers": 0.01}
"""Variance of one observation's logarithm: a probe is short."""
CLIP: Final = 2.0
PRIOR_BITS_PER_S: Final = 1e9
PRIOR_VARIANCE: Final = 1.0
LINK_BOUND_SHARE: Final = 0.5
PACED_SHARE: Final = 0.1


class LinkState(msgspec.Struct, frozen=True, kw_only=True):
    """The filter's memory.

    Attributes:
        rate_bits_per_s: what is expected; a prior where `measured_s` is 0.
        variance: of its natural logarithm, at `measured_s`.
        measured_s: POSIX time of the last observation.
    """

    rate_bits_per_s: float = PRIOR_BITS_PER_S
    variance: float = PRIOR_VARIANCE
    measured_s: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether anybody ever saw it."""
        return self.measured_s > 0


PRIOR: Final = LinkState()


def _variance_at(state: LinkState, now_s: float) -> float:
    if not state.measured:
        return state.variance
    age = max(0.0, now_s - state.measured_s)
    grown = state.variance + GROWTH_PER_HOUR * age / 3600 + DRIFT_PER_S * min(age, DRIFT_FOR_S)
    return min(grown, MOST_SPREAD**2)


def observe(
    state: LinkState, rate_bits_per_s: float, now_s: float, kind: str, *, at_least: bool = False
) -> LinkState:
    """The state after one more look at the link.

    Args:
        rate_bits_per_s: what went over it, all transfers together.
        kind: "probe" or "transfers".
        at_least: something else held it back, so the link carries this or more.

    >>> first = observe(PRIOR, 5e8, 100.0, "transfers")
    >>> round(first.rate_bits_per_s / 1e6), first.measured
    (500, True)
    >>> observe(first, 1e8, 110.0, "transfers", at_least=True).rate_bits_per_s == first.rate_bits_per_s
    True
    """
    if not rate_bits_per_s > 0 or (at_least and rate_bits_per_s <= state.rate_bits_per_s):
        return state
    if not state.measured:
        if at_least:
            return state  # more than the prior: known only when nothing else holds it back
        return LinkState(rate_bits_per_s=rate_bits_per_s, variance=NOISE[kind], measured_s=now_s)
    before = _variance_at(state, now_s)
    noise = NOISE[kind]
    off = math.log(rate_bits_per_s / state.rate_bits_per_s)
    bound = CLIP * math.sqrt(before + noise)
    # What is far off counts as less sure, and leaves more doubt behind: the next one like it is believed.
    doubt = 0.0
    if abs(off) > bound:
        doubt = (abs(off) - bound) ** 2
        off = math.copysign(bound, off)
    gain = before / (before + noise)
    return LinkState(
        rate_bits_per_s=state.rate_bits_per_s * math.exp(gain * off),
        variance=min(max((1 - gain) * before + doubt, LEAST_SPREAD**2), MOST_SPREAD**2),
        measured_s=max(now_s, state.measured_s),
    )


def estimate(state: LinkState, now_s: float, declared_bits_per_s: float | None = None) -> Estimate:
    """What to plan with now.

    Args:
        declared_bits_per_s: what an operator says the link carries: believed until it was measured.
    """
    if not state.measured and declared_bits_per_s is not None:
        return Estimate(rate_bits_per_s=declared_bits_per_s, spread=0.25, measured=False)
    spread = min(max(math.sqrt(_variance_at(state, now_s)), LEAST_SPREAD), MOST_SPREAD)
    return Estimate(
        rate_bits_per_s=state.rate_bits_per_s,
        spread=round(spread, 4),
        age_s=max(0.0, now_s - state.measured_s) if state.measured else 0.0,
        measured=state.measured,
    )


def is_link_bound(stages: Mapping[str, float]) -> bool:
    """Whether the link, and no limit, disk or processor, kept a task from more, by its stages' busy shares.

    >>> is_link_bound({"send": 0.9, "read": 0.3}), is_link_bound({"send": 0.9, "pace": 0.4}), is_link_bound({})
    (True, False, False)
    """
    return stages.get("send", 0.0) >= LINK_BOUND_SHARE and stages.get("pace", 0.0) < PACED_SHARE
