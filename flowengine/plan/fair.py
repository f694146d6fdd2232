"""Who gets how much: floors, weighted max-min fairness among tenants, datasets that finish.

Goal: for one class, the lexicographically largest vector of tenants' totals per weight, then inside each
total the datasets that are nearly complete first.

Plan: progressive filling by repeated programs. Raise one level for all tenants as far as it goes; those whose
row has a dual price cannot have more without another one having less than the level: they are frozen
(Nace and Pióro 2008, "Max-min fairness and its applications to routing and load-balancing"). Go on with the
others. Then keep every tenant's total and maximise the value of what is moved, datasets with little left
being worth more. Before all that each group gets a small floor, so that nothing starves inside its class.

Invariants: each program freezes at least one tenant; totals only grow from step to step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from flowengine.plan.demands import Group
from flowengine.plan.network import BoolArray, FloatArray, IntArray, sum_by
from flowengine.plan.program import FlowProgram

__all__ = ["completion_values", "fill_class", "floors", "lessened"]

PRICED = 1e-7
SLACK = 1e-6
LEAST_FLOOR = 1e-4
DUST = 1e-5


def floors(
    program: FlowProgram,
    members: IntArray,
    weight: FloatArray,
    capacity: FloatArray,
    share: float,
    settled: BoolArray,
) -> FloatArray:
    """Rates that all `members` can have at once beside what others keep, one for each member.

    Each gets `share` of an equal split at the narrowest point of its widest route, so no program is needed.

    Args:
        program: Where others have their rates now.
        members: Groups of one class.
        weight: Of each group.
        capacity: Of each resource.
        share: Part of an equal split.
        settled: Groups that keep all that they have now; of the others, floors are kept.
    """
    columns = program.columns
    group_of = columns.group()[: len(program.rates)]
    rate = program.group_rates()
    with np.errstate(divide="ignore", invalid="ignore"):
        held = np.where(rate > 0, np.minimum(program.floor / rate, 1.0), 0.0)
    kept = program.rates * np.where(settled, 1.0, held)[group_of]
    usage = columns.usage(np.append(kept, np.zeros(len(columns) - len(kept))))
    left = np.maximum(capacity - usage, 0.0)
    room = columns.bottleneck(left)
    all_groups = columns.group()
    ranked = np.lexsort((np.arange(len(columns)), -room, all_groups))
    first = ranked[np.append(True, np.diff(all_groups[ranked]) > 0)] if len(ranked) else ranked
    wanted = np.zeros(len(columns.groups), dtype=bool)
    wanted[members] = True
    chosen = first[wanted[all_groups[first]]]
    at, resources, counts = columns.incidence()
    speed = np.zeros(len(columns))
    speed[chosen] = weight[all_groups[chosen]]
    load = sum_by(resources, speed[at] * counts, len(left))
    part = np.full(len(columns), math.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.minimum.at(part, at, np.where(load > 0, left / load, math.inf)[resources])
    result = np.zeros(len(columns.groups))
    result[all_groups[chosen]] = share * speed[chosen] * part[chosen]
    result[result < LEAST_FLOOR] = 0.0
    return np.minimum(result, program.ceiling)[members]


def fill_class(
    program: FlowProgram, units: IntArray, freeze_note: dict[int, list[tuple[int, float]]]
) -> None:
    """Bring the totals of `units` to their max-min fair values, as floors of the program.

    Args:
        program: Where it happens; its last point stays feasible.
        units: Units of this class.
        freeze_note: Gets, for each unit, resources that held it back and what a Gbit/s more of each would
            have raised its total by.
    """
    program.join_level(units)
    active = units
    while len(active):
        program.solve(level=True)
        price = program.duals[program.unit_rows[active]] * program.unit_weight[active]
        held = price > PRICED
        if not held.any():
            held = price >= price.max()
        frozen = active[held]
        weights = -program.duals[: program.resource_rows]
        tight = np.flatnonzero(weights > PRICED)
        tight = tight[np.argsort(-weights[tight], kind="stable")][:3]
        for unit in frozen.tolist():
            gain = float(program.unit_weight[unit])
            freeze_note[unit] = [(int(r), float(weights[r]) * gain) for r in tight]
        level = program.level
        program.leave_level(frozen, lessened(program.unit_weight[frozen] * level))
        active = active[~held]


def lessened(rates: FloatArray) -> FloatArray:
    """Rates as floors for later programs: less what the solver's tolerance may have added, dust left out."""
    less = rates * (1 - SLACK) - SLACK
    return np.where(less < DUST, 0.0, less)


def completion_values(groups: Sequence[Group], left_gigabits: dict[str, float]) -> FloatArray:
    """Worth of a unit of rate for each group, falling from 4 to 1 with the rank of its dataset in its tenant.

    Args:
        groups: All groups.
        left_gigabits: What each dataset still lacks, over all its demands.
    """
    by_tenant: dict[str, dict[str, float]] = defaultdict(dict)
    for group in groups:
        name = dataset_of(group)
        by_tenant[group.head.tenant][name] = left_gigabits.get(name, group.gigabits)
    rank: dict[tuple[str, str], int] = {}
    for tenant, datasets in by_tenant.items():
        for place, (name, _) in enumerate(sorted(datasets.items(), key=lambda item: (item[1], item[0]))):
            rank[tenant, name] = place
    return np.array([1.0 + 3.0 / (1 + rank[g.head.tenant, dataset_of(g)]) for g in groups])


def dataset_of(group: Group) -> str:
    """The dataset that a group completes; a demand without one is its own."""
    return group.head.dataset or f"\0{group.id}"
