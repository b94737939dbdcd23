"""Which option each stack of matrices gets: the least cost that fits every limit, as an integer program.

    minimize    sum cost[u, o] x[u, o]                    x[u, o]: 1 if stack u takes option o, else 0
    subject to  sum_o x[u, o] = 1                         for each stack u
                sum size[u, o, k] x[u, o] <= limit[k]     for each container k

HiGHS solves it (Huangfu & Hall 2018, doi:10.1007/s12532-017-0130-5) on one thread, so that the same costs give the same
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

_GAP = 1e-3  # of the cost: how far from the best an answer may be. Costs are not known as well as that.
_NODES = 10_000  # of the search tree, in case the gap does not close
_TOLERANCE = 1e-6  # of a limit: HiGHS' own (primal_feasibility_tolerance)


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of one stack: `costs` f64[options], and `sizes` f64[options, limits]."""

    costs: F64
    sizes: F64


def cheapest(choices: Sequence[Choice], limits: F64) -> list[int] | None:
    """The option of each stack with the least cost in sum, their sizes in sum at most `limits`, f64[limits] > 0.

    None if nothing fits.
    """
    costs = np.concatenate([choice.costs for choice in choices])
    sizes = np.concatenate([choice.sizes for choice in choices]).T / limits[:, None]
    highest = np.full(len(limits), 1 - _TOLERANCE)
    return _solve(choices, costs / (costs.max() or 1.0), sizes, highest)


def smallest(choices: Sequence[Choice], fixed: F64) -> list[int]:
    """The options with which the largest of the sums of sizes, `fixed` f64[limits] added to them, is as small as it can
    be."""
    sizes = np.concatenate([choice.sizes for choice in choices]).T
    unit = float((sizes.sum(axis=1) + fixed).max())
    # One more variable, the largest sum: sum of sizes - largest <= -fixed.
    matrix = np.concatenate([sizes / unit, np.full((len(fixed), 1), -1.0)], axis=1)
    costs = np.append(np.zeros(sizes.shape[1]), 1.0)
    chosen = _solve(choices, costs, matrix, -fixed / unit)
    assert chosen is not None, "the largest sum has no limit"
    return chosen


def size_of(choices: Sequence[Choice], chosen: Sequence[int]) -> F64:
    """f64[limits]: the sizes of the chosen options in sum."""
    total: F64 = np.sum([choice.sizes[option] for choice, option in zip(choices, chosen, strict=True)], axis=0)
    return total


def cost_of(choices: Sequence[Choice], chosen: Sequence[int]) -> float:
    """The costs of the chosen options in sum."""
    return float(sum(choice.costs[option] for choice, option in zip(choices, chosen, strict=True)))


def _solve(choices: Sequence[Choice], costs: F64, rows: F64, highest: F64) -> list[int] | None:
    """The option of each stack. `costs` f64[variables], `rows` f64[limits, variables], rows @ x <= highest: the first
    variables are the options of all stacks, those that follow are any numbers from 0."""
    counts = [len(choice.costs) for choice in choices]
    options, variables = sum(counts), len(costs)
    once = np.zeros((len(choices), variables))
    once[np.repeat(np.arange(len(choices)), counts), np.arange(options)] = 1
    matrix = np.concatenate([once, rows])
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = variables, len(matrix)
    lp.col_cost_ = costs
    lp.col_lower_ = np.zeros(variables)
    lp.col_upper_ = np.append(np.ones(options), np.full(variables - options, highspy.kHighsInf))
    lp.row_lower_ = np.append(np.ones(len(choices)), np.full(len(rows), -highspy.kHighsInf))
    lp.row_upper_ = np.append(np.ones(len(choices)), highest)
    whole, free = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [whole] * options + [free] * (variables - options)
    row, column = np.nonzero(matrix)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.searchsorted(row, np.arange(len(matrix) + 1))
    lp.a_matrix_.index_ = column
    lp.a_matrix_.value_ = matrix[row, column]
    solver = highspy.Highs()
    settings = {"output_flag": False, "threads": 1, "mip_rel_gap": _GAP, "mip_max_nodes": _NODES}
    for name, value in settings.items():
        solver.setOptionValue(name, value)
    solver.passModel(lp)
    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = np.array(solver.getSolution().col_value)
    ends = np.cumsum(counts)
    return [int(np.argmax(values[end - count : end])) for count, end in zip(counts, ends, strict=True)]
