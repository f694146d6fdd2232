"""The solver's basis by names: what one plan leaves to the next.

Goal: a plan that differs little from the last one costs few iterations.

Plan: after the last solve, statuses of rows and columns are written down by the names of what they stand for.
The next plan looks up what it still has; what is new begins at its natural place (rows basic, columns at their
lower bounds). The solver repairs what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowengine.plan.demands import Priority
from flowengine.plan.model import Basis
from flowengine.plan.network import FloatArray, IntArray, sum_by
from flowengine.plan.program import NO_BINS, FlowProgram
from flowengine.plan.solver import BASIC, LOWER
from flowengine.plan.work import Work

__all__ = ["remember", "restore"]

LETTERS = "LBU"


def remember(
    work: Work, program: FlowProgram | None, bits: FloatArray, ladders: Mapping[Priority, FloatArray]
) -> Basis:
    """The basis of a plan's last program, and the routes worth keeping: used, basic, or a group's widest."""
    basic: set[int] = set()
    rows: list[str] = []
    pieces: list[tuple[str, str]] = []
    short: list[str] = []
    groups = len(work.groups)
    if program is not None:
        column_status, row_status = program.solver.basis()
        basic = set((np.flatnonzero(column_status[program.first :] == BASIC)).tolist())
        short = [
            f"{LETTERS[column_status[1 + i]]} {work.groups[i].id}"
            for i in np.flatnonzero(column_status[1 : 1 + groups] != LOWER).tolist()
        ]
        if program.bins is not NO_BINS and len(work.units):
            table = column_status[1 + groups : program.first].reshape(len(work.units), -1)
            pieces = [
                (work.unit_name(u), "".join(LETTERS[i] for i in row)) for u, row in enumerate(table.tolist())
            ]
        for row in np.flatnonzero(row_status != BASIC).tolist():
            name = _row_name(work, program, row)
            if name:
                rows.append(f"{LETTERS[row_status[row]]} {name}")
    split = _split(work, program) if program is not None else ()
    labels = [link.label for link in work.network.overlay.links]
    widest = _widest(work)
    routes = []
    kept = {name for name, _, _ in split}
    for column, group in enumerate(work.columns.group().tolist()):
        gone = group >= work.real and work.groups[group].id not in kept
        if not gone and (bits[column] > 0 or column in basic or column in widest):
            named = tuple((b[0], b[1], tuple(labels[i] for i in b[2])) for b in work.columns.branches[column])
            routes.append((work.groups[group].id, named, column in basic))
    return Basis(
        routes=tuple(routes),
        rows=tuple(rows),
        pieces=tuple(pieces),
        short=tuple(short),
        split=split,
        ladders=tuple((p.value, tuple(float(e) for e in ladders[p])) for p in sorted(ladders)),
    )


def _widest(work: Work) -> set[int]:
    """Each group's widest route: what its floor is reckoned on."""
    if not len(work.columns):
        return set()
    group, room = work.columns.group(), work.columns.bottleneck(work.capacity)
    ranked = np.lexsort((np.arange(len(group)), -room, group))
    return set(ranked[np.append(True, np.diff(group[ranked]) > 0)].tolist())


def _split(work: Work, program: FlowProgram) -> tuple[tuple[str, str, str], ...]:
    columns, rows = program.solver.basis()
    groups = len(work.groups)
    routes = columns[program.first :] == BASIC
    count = sum_by(work.columns.group()[: len(routes)], routes, groups)
    count += columns[1 : 1 + groups] == BASIC
    count += rows[program.group_rows] == BASIC
    heads = ((g.id, g.head) for g in (work.groups[i] for i in np.flatnonzero(count > 1)))
    return tuple((name, head.priority.value, head.tenant) for name, head in heads)


def _row_name(work: Work, program: FlowProgram, row: int) -> str:
    groups = len(work.groups)
    if row < program.resource_rows:
        limit = work.network.resources[row]
        return f"limit {limit.kind} {limit.name}"
    row -= program.resource_rows
    if row < groups:
        return f"group {work.groups[row].id}"
    row -= groups
    return f"unit {work.unit_name(row)}" if row < len(work.units) else ""


def restore(work: Work, program: FlowProgram) -> tuple[IntArray, IntArray] | None:
    """Statuses for a new program's columns and rows from the last plan's basis; None when it left none."""
    assert work.previous is not None
    basis = work.previous.basis
    if not basis.rows:
        return None
    units = {work.unit_name(u): u for u in range(len(work.units))}
    groups = {group.id: i for i, group in enumerate(work.groups)}
    columns = np.full(program.first + len(work.columns), LOWER, dtype=np.int64)
    columns[[program.first + c for c in work.basic]] = BASIC
    for entry in basis.short:
        if entry[2:] in groups:
            columns[1 + groups[entry[2:]]] = LETTERS.index(entry[0])
    count = len(program.bins.unit) // max(len(work.units), 1)
    for name, letters in basis.pieces:
        if name in units and len(letters) == count:
            first = 1 + len(groups) + units[name] * count
            columns[first : first + count] = [LETTERS.index(letter) for letter in letters]
    rows = np.full(program.solver.row_count, BASIC, dtype=np.int64)
    for entry in basis.rows:
        kind, _, name = entry[2:].partition(" ")
        row: int | None = None
        if kind == "limit":
            row = work.network.resource_numbers.get(name)
        elif kind == "group" and name in groups:
            row = int(program.group_rows[groups[name]])
        elif kind == "unit" and name in units:
            row = int(program.unit_rows[units[name]])
        if row is not None:
            rows[row] = LETTERS.index(entry[0])
    _complete(work, program, columns, rows)
    return columns, rows


def _complete(work: Work, program: FlowProgram, columns: IntArray, rows: IntArray) -> None:
    """Make the number of basic variables equal that of rows, or the solver would begin from nothing.

    Hardly anything is left to do, because shells stand in for groups whose going would unbalance the basis.
    """
    missing = program.solver.row_count - int((columns == BASIC).sum()) - int((rows == BASIC).sum())
    for row in np.flatnonzero(rows != BASIC).tolist():
        if missing <= 0:
            break
        rows[row] = BASIC
        missing -= 1
    served = np.zeros(len(work.groups), dtype=bool)
    served[work.columns.group()[work.basic]] = True
    for row in program.group_rows[~served].tolist():
        if missing >= 0:
            break
        if rows[row] == BASIC:
            rows[row] = LOWER
            missing += 1
