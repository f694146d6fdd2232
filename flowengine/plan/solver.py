"""A thin, silent, deterministic face of HiGHS: one linear program that grows by columns.

Goal: equal inputs give equal answers, nothing is ever printed, and effort is counted in simplex iterations.

Plan: one thread, a fixed seed, the simplex method only, and the basis kept from one solve to the next. The
banner that highspy prints comes from its Python constructor, which registers callbacks before anyone can turn
output off; `_Silent` turns output off first and registers none.

Invariants: no time limit is ever set; `Effort.left` only falls.
"""

from __future__ import annotations

from typing import Any

import highspy
import numpy as np

from flowengine.plan.network import FloatArray, IntArray

__all__ = ["BASIC", "LOWER", "UPPER", "Effort", "EffortSpent", "Infeasible", "Solver"]

TOLERANCE = 1e-7
PRIMAL = 4
INTERIOR_SHARE = 64
DUAL = 1
DEVEX = 1


LOWER, BASIC, UPPER = 0, 1, 2
_STATUS = (highspy.HighsBasisStatus.kLower, highspy.HighsBasisStatus.kBasic, highspy.HighsBasisStatus.kUpper)
_NUMBER = {status: number for number, status in enumerate(_STATUS)}


class EffortSpent(Exception):
    """The iterations that a plan may take are used up; the caller goes on greedily."""


class Infeasible(Exception):
    """No point meets all bounds; elastic programs never raise it."""


class Effort:
    """Simplex iterations that are left, shared by all programs of one plan."""

    def __init__(self, iterations: int) -> None:
        self.given = iterations
        self.left = iterations
        self.solves = 0

    @property
    def spent(self) -> int:
        """Iterations used so far."""
        return self.given - self.left


class _Silent(highspy.Highs):
    def __init__(self) -> None:
        super(highspy.Highs, self).__init__()
        self.setOptionValue("output_flag", False)


class Solver:
    """Minimise cost·x over rows_lower <= A x <= rows_upper, lower <= x <= upper."""

    def __init__(self, rows_lower: FloatArray, rows_upper: FloatArray, effort: Effort) -> None:
        self._effort = effort
        self._highs: Any = _Silent()
        for option, value in (
            ("threads", 1),
            ("parallel", "off"),
            ("random_seed", 0),
            ("solver", "simplex"),
            # Exact steepest edges cost a solve for each basic variable before the first step of a warm start.
            ("simplex_dual_edge_weight_strategy", DEVEX),
            ("primal_feasibility_tolerance", TOLERANCE),
            ("dual_feasibility_tolerance", TOLERANCE),
        ):
            self._highs.setOptionValue(option, value)
        self.row_count = len(rows_lower)
        self.column_count = 0
        self.finished = False
        none = np.zeros(0, dtype=np.int32)
        self._highs.addRows(
            self.row_count, rows_lower, rows_upper, 0, np.zeros(self.row_count, dtype=np.int32),
            none, np.zeros(0),
        )  # fmt: skip

    def add_columns(
        self,
        costs: FloatArray,
        lower: FloatArray,
        upper: FloatArray,
        starts: IntArray,
        rows: IntArray,
        values: FloatArray,
    ) -> None:
        """Append columns; `starts` says where each one's rows and values begin."""
        self._highs.addCols(
            len(costs), costs, lower, upper, len(rows), starts.astype(np.int32),
            rows.astype(np.int32), values,
        )  # fmt: skip
        self.column_count += len(costs)

    def set_costs(self, costs: FloatArray) -> None:
        """Replace the whole objective."""
        self._highs.changeColsCost(self.column_count, np.arange(self.column_count, dtype=np.int32), costs)

    def set_row_bounds(self, rows: IntArray, lower: FloatArray, upper: FloatArray) -> None:
        """Replace the bounds of some rows."""
        self._highs.changeRowsBounds(len(rows), rows.astype(np.int32), lower, upper)

    def set_column_bounds(self, columns: IntArray, lower: FloatArray, upper: FloatArray) -> None:
        """Replace the bounds of some columns."""
        self._highs.changeColsBounds(len(columns), columns.astype(np.int32), lower, upper)

    def set_coefficient(self, row: int, column: int, value: float) -> None:
        """Replace one entry of the matrix."""
        self._highs.changeCoeff(row, column, value)

    def start_from(self, columns: IntArray, rows: IntArray) -> None:
        """Begin the next solve at a basis, which need be neither complete nor regular.

        Args:
            columns: LOWER, BASIC or UPPER for each column.
            rows: The same for each row.
        """
        basis = highspy.HighsBasis()
        basis.col_status = [_STATUS[i] for i in columns.tolist()]
        basis.row_status = [_STATUS[i] for i in rows.tolist()]
        basis.alien, basis.valid = True, True
        status = self._highs.setBasis(basis)
        assert status != highspy.HighsStatus.kError, "a basis has one status for each row and column"

    def basis(self) -> tuple[IntArray, IntArray]:
        """Statuses of columns and rows, as `start_from` takes them."""
        basis = self._highs.getBasis()
        return (
            np.array([_NUMBER.get(status, LOWER) for status in basis.col_status], dtype=np.int64),
            np.array([_NUMBER.get(status, LOWER) for status in basis.row_status], dtype=np.int64),
        )

    def run(self, method: str, at_most: int | None = None) -> tuple[FloatArray, FloatArray]:
        """Values of all columns and duals of all rows at an optimum; `finished` says whether it was reached.

        Args:
            method: "primal" when the last optimum is still feasible (only costs or new columns came since),
                "dual" when bounds have changed, "interior" to begin a large program without a basis.
            at_most: Stop after so many iterations, wherever that is; the basis stays to go on from. What comes
                back then need not be within the bounds.

        Raises:
            EffortSpent: Before the optimum was reached.
            Infeasible: The bounds contradict each other.
        """
        if self._effort.left <= 0:
            raise EffortSpent
        self._highs.setOptionValue("solver", "ipm" if method == "interior" else "simplex")
        self._highs.setOptionValue("simplex_strategy", PRIMAL if method == "primal" else DUAL)
        short = at_most is not None and at_most < self._effort.left
        status = self._attempt(at_most if short else None)
        self.finished = status == highspy.HighsModelStatus.kOptimal
        if short and status == highspy.HighsModelStatus.kIterationLimit:
            solution = self._highs.getSolution()
            return np.array(solution.col_value), np.array(solution.row_dual)
        if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kIterationLimit):
            # A basis gone bad: once more from nothing.
            self._highs.clearSolver()
            self._highs.setOptionValue("simplex_strategy", DUAL)
            status = self._attempt()
            self.finished = status == highspy.HighsModelStatus.kOptimal
        if status == highspy.HighsModelStatus.kIterationLimit or self._effort.left <= 0:
            self._effort.left = 0
            raise EffortSpent
        if status != highspy.HighsModelStatus.kOptimal:
            raise Infeasible(str(status))
        solution = self._highs.getSolution()
        return np.array(solution.col_value), np.array(solution.row_dual)

    def _attempt(self, at_most: int | None = None) -> highspy.HighsModelStatus:
        limit = self._effort.left if at_most is None else at_most
        self._highs.setOptionValue("simplex_iteration_limit", max(limit, 1))
        self._highs.run()
        info = self._highs.getInfo()
        # A step of the interior method works on every column; count it as that many simplex steps cost.
        interior = max(int(info.ipm_iteration_count), 0) * (self.row_count // INTERIOR_SHARE + 1)
        self._effort.left -= max(1, max(int(info.simplex_iteration_count), 0) + interior)
        self._effort.left -= max(int(info.crossover_iteration_count), 0)
        self._effort.solves += 1
        status: highspy.HighsModelStatus = self._highs.getModelStatus()
        return status
