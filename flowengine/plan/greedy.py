"""Plans without a linear program: water filling over known routes.

Goal: a feasible, work-conserving, roughly fair plan in bounded time, for when the effort is spent or there are
more groups than the program may hold.

Plan: class by class, in rounds. In a round every group that still wants more looks at the one of its routes
with most room and takes its weighted share of that route's narrowest resource. What a group takes is never
more than what max-min fairness on the same routes would give it in the end (a share among all who ask now
only grows when others stop asking), so rounds only ever add. Rounds end when nobody gains.

Invariants: never more than a capacity or ceiling; rates given before are kept; at most MAX_ROUNDS rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flowengine.plan.network import BoolArray, FloatArray, IntArray, sum_by
from flowengine.plan.routes import Columns

__all__ = ["fill", "press"]

NOTHING = 1e-9
MAX_ROUNDS = 64


def fill(
    columns: Columns,
    capacity: FloatArray,
    ceiling: FloatArray,
    weight: FloatArray,
    order: Sequence[IntArray],
    rates: FloatArray | None = None,
    usable: BoolArray | None = None,
) -> FloatArray:
    """Rates of all columns, no less than `rates`.

    Args:
        columns: Routes known.
        capacity: Of each resource, in Gbit/s.
        ceiling: Most for each group.
        weight: Share of each group where several ask for the same resource.
        order: Groups of each class, the first served first.
        rates: What is given already, for the first columns.
        usable: Columns that may be given more; all where None.
    """
    given = np.zeros(0) if rates is None else rates
    total = np.append(given, np.zeros(len(columns) - len(given)))
    if not len(columns):
        return total
    at, resources, counts = columns.incidence()
    group_of = columns.group()
    left = np.maximum(capacity - columns.usage(total), 0.0)
    headroom = ceiling - sum_by(group_of, total, len(ceiling))
    for members in order:
        asks = np.zeros(len(ceiling), dtype=bool)
        asks[members] = True
        for _ in range(MAX_ROUNDS):
            room = np.full(len(columns), math.inf)
            np.minimum.at(room, at, left[resources] / counts)
            if usable is not None:
                room[~usable] = 0.0
            wanting = np.flatnonzero((asks & (headroom > NOTHING))[group_of] & (room > NOTHING))
            if not len(wanting):
                break
            # The widest route of each group: sorted by group, then room, then age.
            ranked = wanting[np.lexsort((wanting, -room[wanting], group_of[wanting]))]
            chosen = ranked[np.append(True, np.diff(group_of[ranked]) > 0)]
            speed = np.zeros(len(columns))
            speed[chosen] = weight[group_of[chosen]]
            load = sum_by(resources, speed[at] * counts, len(capacity))
            share = np.full(len(columns), math.inf)
            with np.errstate(divide="ignore", invalid="ignore"):
                np.minimum.at(share, at, np.where(load > 0, left / load, math.inf)[resources])
            gain = np.zeros(len(columns))
            gain[chosen] = np.minimum(speed[chosen] * share[chosen], headroom[group_of[chosen]])
            total += gain
            left = np.maximum(capacity - columns.usage(total), 0.0)
            headroom = headroom - sum_by(group_of, gain, len(ceiling))
    return total


def press(
    columns: Columns, capacity: FloatArray, ceiling: FloatArray, order: Sequence[IntArray], rates: FloatArray
) -> FloatArray:
    """The rates, scaled down where they do not fit: the first groups keep theirs, later ones get what is left.

    Args:
        columns: Routes known.
        capacity: Of each resource, in Gbit/s.
        ceiling: Most for each group.
        order: Groups, the most important first; groups in none get nothing.
        rates: Of all columns; negative ones count as none.
    """
    result = np.zeros(len(columns))
    if not len(columns):
        return result
    at, resources, _ = columns.incidence()
    group_of = columns.group()
    asked = np.maximum(rates, 0.0)
    total = sum_by(group_of, asked, len(ceiling))
    with np.errstate(divide="ignore", invalid="ignore"):
        asked *= np.where(total > ceiling, ceiling / total, 1.0)[group_of]
    for members in order:
        inside = np.zeros(len(ceiling), dtype=bool)
        inside[members] = True
        mine = np.where(inside[group_of], asked, 0.0)
        left = np.maximum(capacity - columns.usage(result), 0.0)
        usage = columns.usage(mine)
        with np.errstate(divide="ignore", invalid="ignore"):
            fits = np.where(usage > left, left / usage, 1.0)
        scale = np.ones(len(columns))
        np.minimum.at(scale, at, fits[resources])
        result += mine * scale
    return result
