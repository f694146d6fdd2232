"""Deadlines: which can be promised, what has to move now to keep them, and the earliest that could be.

Goal: an admitted deadline is met as long as links hold their estimates, and admission never breaks an
earlier promise.

Plan: time from now to the last deadline is cut into slots at every instant at which a limit changes or a
deadline falls. One program decides how many gigabits move on which route in which slot: usage within capacity
times length of each slot, each demand's bytes within its own slots, a shortfall where it cannot be. Routes are
found slot by slot by column generation. A new deadline is admitted when no shortfall, its own or another's,
comes of it. Among schedules without shortfall the early ones are preferred: what has moved cannot be late.

Invariants: slots that had to be merged take the least capacity of their parts, and deadlines inside one count
up to its beginning only: a merged schedule promises less, never more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowengine.plan.demands import Group
from flowengine.plan.network import FloatArray, IntArray, Network, sum_by
from flowengine.plan.program import ENTER, Pricer
from flowengine.plan.routes import Columns
from flowengine.plan.solver import Effort, Solver

__all__ = ["Schedule", "Slots", "cut_slots"]

LATE_COST = 1e-3
MONEY_COST = 1e-5
MAX_ROUNDS = 30
NO_SHORTFALL = 1e-5


@dataclass(frozen=True, slots=True)
class Slots:
    """Stretches of time with constant capacities.

    Attributes:
        bounds: Edges, one more than slots.
        capacity: Gbit/s, slots by resources.
    """

    bounds: FloatArray
    capacity: FloatArray

    @property
    def lengths(self) -> FloatArray:
        """Seconds of each slot."""
        return np.diff(self.bounds)


def cut_slots(network: Network, now_s: float, instants: Sequence[float], max_slots: int) -> Slots:
    """Slots from now to the last of `instants`, cut there and wherever a limit changes."""
    end = max(instants)
    changes = network.edges(now_s, end)
    cuts = sorted({now_s, *(t for t in instants if t > now_s), *changes})
    pieces = [network.capacity_at(t) for t in cuts[:1]]
    at_change = set(changes)
    for cut in cuts[1:-1]:
        pieces.append(network.planned_capacity_at(cut) if cut in at_change else pieces[-1])
    while len(cuts) - 1 > max(max_slots, 1):
        # Merge the two neighbours that are shortest together.
        lengths = np.diff(cuts)
        i = int(np.argmin(lengths[:-1] + lengths[1:]))
        pieces[i : i + 2] = [np.minimum(pieces[i], pieces[i + 1])]
        del cuts[i + 1]
    return Slots(np.array(cuts), np.array(pieces))


class Schedule:
    """Gigabits for each route and slot.

    Args:
        columns: Known routes of the groups; more are added.
        pricer: Finds further routes.
        slots: When what can be moved.
        members: Groups with a deadline, as indices into the columns' groups.
        gigabits: What each member has to move.
        deadline_s: By when.
        effort: Iterations that may be spent.
    """

    def __init__(
        self,
        columns: Columns,
        pricer: Pricer,
        slots: Slots,
        members: IntArray,
        gigabits: FloatArray,
        deadline_s: FloatArray,
        effort: Effort,
    ) -> None:
        self.columns, self.pricer, self.slots, self.members = columns, pricer, slots, members
        self.network = columns.network
        self.gigabits = gigabits
        groups: Sequence[Group] = columns.groups
        starts, ends = slots.bounds[:-1], slots.bounds[1:]
        release = np.array([groups[i].head.not_before_s or -math.inf for i in members])
        self.open = (ends[None, :] <= deadline_s[:, None] + 1e-6) & (
            starts[None, :] >= release[:, None] - 1e-6
        )
        self.count = len(slots.lengths)
        resources = self.network.resource_count
        ceilings = np.array([groups[i].max_rate_gbit for i in members])
        self.need_row = resources * self.count + np.arange(len(members))
        self.rate_row = resources * self.count + len(members) + np.arange(len(members) * self.count)
        limited = [i for i in range(len(members)) if groups[members[i]].cost_limit_usd is not None]
        self.mean_price = np.full(len(members), math.inf)
        self.money_row = np.full(len(members), -1, dtype=np.int64)
        for row, i in enumerate(limited):
            self.mean_price[i] = (groups[members[i]].cost_limit_usd or 0.0) / groups[members[i]].gigabits
            self.money_row[i] = len(members) * (1 + self.count) + resources * self.count + row
        rows_upper = np.concatenate([
            (slots.capacity * slots.lengths[:, None]).ravel(), np.full(len(members), math.inf),
            np.outer(ceilings, slots.lengths).ravel(), np.zeros(len(limited)),
        ])  # fmt: skip
        rows_lower = np.full(len(rows_upper), -math.inf)
        rows_lower[self.need_row] = gigabits
        self.solver = Solver(rows_lower, rows_upper, effort)
        self.local = np.full(len(groups), -1, dtype=np.int64)
        self.local[members] = np.arange(len(members))
        self.solver.add_columns(
            np.ones(len(members)), np.zeros(len(members)), np.full(len(members), math.inf),
            np.arange(len(members)), self.need_row, np.ones(len(members)),
        )  # fmt: skip
        self.late = LATE_COST * (np.arange(self.count) + 1) / self.count
        self.short_cost = np.ones(len(members))
        self.entries_column = np.zeros(0, dtype=np.int64)
        self.entries_slot = np.zeros(0, dtype=np.int64)
        self._seen = 0
        self.moved = np.zeros(0)
        self.short = np.zeros(len(members))
        self.duals = np.zeros(len(rows_upper))

    def _add_new(self) -> int:
        """Put routes that the program does not know yet into all slots that are open to their group."""
        start, self._seen = self._seen, len(self.columns)
        group = self.local[self.columns.group(start)]
        at, resources, counts = self.columns.incidence(start)
        price = self.columns.price(start)
        usable = np.flatnonzero(group >= 0)
        total = 0
        keep = np.isin(at, usable)
        at, resources, counts = at[keep], resources[keep], counts[keep]
        for slot in range(self.count):
            chosen = usable[self.open[group[usable], slot]]
            if not len(chosen):
                continue
            number = np.full(len(group), -1)
            number[chosen] = np.arange(len(chosen))
            inside = number[at] >= 0
            every = np.arange(len(chosen))
            members = group[chosen]
            parts = [
                (number[at[inside]], resources[inside] + slot * self.network.resource_count, counts[inside]),
                (every, self.need_row[members], np.ones(len(chosen))),
                (every, self.rate_row[members * self.count + slot], np.ones(len(chosen))),
            ]
            spends = self.money_row[members] >= 0
            over = price[chosen][spends] - self.mean_price[members[spends]]
            parts.append((every[spends], self.money_row[members[spends]], over))
            column, row, value = (np.concatenate([p[k] for p in parts]) for k in range(3))
            order = np.lexsort((row, column))
            self.solver.add_columns(
                self.late[slot] + MONEY_COST * price[chosen], np.zeros(len(chosen)), np.full(len(chosen), math.inf),
                np.searchsorted(column[order], every), row[order], value[order],
            )  # fmt: skip
            self.entries_column = np.append(self.entries_column, chosen + start)
            self.entries_slot = np.append(self.entries_slot, np.full(len(chosen), slot))
            total += len(chosen)
        return total

    def require(self, member: int, gigabits: float) -> None:
        """Change what one member has to move."""
        self.gigabits[member] = gigabits
        self.solver.set_row_bounds(self.need_row[[member]], np.array([gigabits]), np.array([math.inf]))

    def solve(self, method: str = "dual") -> FloatArray:
        """Each member's shortfall in Gbit, as small as all routes allow in total.

        Raises:
            EffortSpent: Before that was known.
        """
        self._add_new()
        resources = self.network.resource_count
        links = len(self.network.links)
        for _ in range(MAX_ROUNDS):
            point, self.duals = self.solver.run(method)
            method = "primal"
            self.short, self.moved = point[: len(self.members)], point[len(self.members) :]
            worth_of = np.maximum(self.duals[self.need_row], 0.0)
            new = 0
            for slot in range(self.count):
                worth = np.zeros(len(self.local))
                rate_price = np.maximum(-self.duals[self.rate_row[slot :: self.count]], 0.0)
                gain = np.where(self.open[:, slot], worth_of - self.late[slot] - rate_price, 0.0)
                money = np.zeros(len(self.local))
                paid = self.money_row >= 0
                money[self.members[paid]] = np.maximum(-self.duals[self.money_row[paid]], 0.0)
                gain[paid] += money[self.members[paid]] * self.mean_price[paid]
                worth[self.members] = np.where(self.open[:, slot], gain, 0.0)
                weights = np.maximum(-self.duals[slot * resources : (slot + 1) * resources], 0.0)
                closed = (
                    self.slots.capacity[slot][self.network.link_resources].min(axis=1, initial=math.inf) <= 0
                )
                cost = MONEY_COST * self.network.assumed_price if links else np.zeros(0)
                new += self.pricer.offer(self.columns, weights, cost, worth, money, barred=closed)
            if not new or not self._add_new():
                break
        return self.short

    def rates_now(self) -> FloatArray:
        """Each member's mean rate in the first slot."""
        now = self.entries_slot == 0
        group = self.local[self.columns.group()[self.entries_column[now]]]
        moved = sum_by(group, self.moved[now], len(self.members))
        return np.asarray(moved / self.slots.lengths[0], dtype=float)

    def obstacles(self, member: int, most: int = 3) -> list[tuple[int, int, FloatArray]]:
        """Limits whose price stands against a member: slot, resource, and each member's Gbit through it."""
        resources = self.network.resource_count
        price = -self.duals[: resources * self.count].reshape(self.count, resources)
        price = np.where(self.open[member][:, None], price, 0.0)
        found = []
        order = np.argsort(-price, axis=None, kind="stable")[:most]
        at, used, counts = self.columns.incidence()
        group = self.columns.group()
        for flat in order.tolist():
            slot, resource = divmod(flat, resources)
            if price[slot, resource] <= ENTER:
                break
            through = sum_by(at[used == resource], counts[used == resource], len(self.columns))
            here = self.entries_slot == slot
            column = self.entries_column[here]
            taken = self.moved[here] * through[column]
            flow = sum_by(self.local[group[column]], taken, len(self.members))
            found.append((slot, resource, flow))
        return found
