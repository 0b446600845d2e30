"""How fast an iteration can be at all within power budgets: the dual search, and the prices that it ends with.

A budget of W watts for a group of GPUs says that the group's energy over an iteration is at most W times its length T.
For given prices of the budgets, added up they are one budget for a weighted energy; the least weighted energy of an
iteration of length T is one min-cost flow, convex in T, and so the shortest T within that one budget is found by
Newton's method, which ends as the curve consists of straight pieces. That T is a true bound for every price: nobody can
be faster. The best prices are found by cutting planes: every flow also tells what each stage takes, and a linear
program over all that is known so far either names prices at which the present T is still too short, or proves that a
mixture of what is known keeps all budgets, so that the bound is the optimum of the relaxation.

Source: Kelley, "The cutting-plane method for solving convex programs", 1960; Dinkelbach, "On nonlinear fractional
programming", 1967.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.options import PlanningProblem, weighted
from perseus_plugin.planning.power.budget import StageLimit
from perseus_plugin.planning.relaxation import Relaxation, Relaxed

_NEWTON_STEPS = 50
_KEPT = 1e-7  # share of a budget by which it may be overdrawn and counts as kept
_CONVERGED = 1e-4  # the same for a mixture of relaxed iterations, each of which is known to its units
_ROUNDS = 60
_FROM_SHORTEST = 1e-4  # the curve has no slope at the shortest iteration


@dataclass(frozen=True, eq=False)
class Bound:
    """The fastest within budgets, as far as the relaxation tells.

    Attributes:
        time_s: no iteration that keeps the budgets is shorter.
        weights: shape (stages,), of the stages' energies at the prices found; those of all budgets together make 1.
        converged: whether the relaxation can do no better, so that the bound is its optimum.
        possible: false where even waiting takes more than there is.
    """

    time_s: float
    weights: FloatArray
    converged: bool
    possible: bool = True


def time_bound(problem: PlanningProblem, limits: Sequence[StageLimit]) -> Bound:
    """Search for the best bound; `limits` is not empty, and all its watts are above 0."""
    per_watt = np.array([[gpus / limit.watts for gpus in limit.gpus] for limit in limits])
    prices = np.full(len(limits), 1 / len(limits))
    best = Bound(0.0, prices @ per_watt, False)
    known: list[FloatArray] = []
    for _ in range(_ROUNDS):
        weights = prices @ per_watt
        relaxation = Relaxation.sized(weighted(problem, weights))
        found = _shortest(relaxation, best.time_s)
        if found is None:
            return Bound(math.inf, weights, True, possible=False)
        time_s, relaxed = found
        if time_s >= best.time_s:
            best = Bound(time_s, weights, False)
        if len(limits) == 1:
            return Bound(best.time_s, weights, True)
        known.append(_effective_by_stage(problem, relaxed))
        # What each mixture of iterations takes of each budget in the present time, as a share of it.
        used = np.array([per_watt @ (one / best.time_s + problem.blocking_power_w) for one in known])
        prices, overdrawn = _best_prices(used - 1)
        if overdrawn <= _CONVERGED:
            return Bound(best.time_s, best.weights, True)
    return best


def _shortest(relaxation: Relaxation, from_s: float) -> tuple[float, Relaxed] | None:
    """The shortest iteration, from `from_s`, whose weighted power is at most 1; None: there is none.

    Returns:
        A bound on its time, and the relaxation's optimum there or next to it.
    """
    blocking_w = relaxation.problem.total_blocking_w
    bound_s = at_s = max(from_s, relaxation.shortest_s)
    for _ in range(_NEWTON_STEPS):
        relaxed = relaxation.solve(at_s)
        over = relaxed.bound_j - at_s
        if math.isinf(relaxed.price_w):
            if over <= _KEPT * at_s:
                return bound_s, relaxed
            at_s *= 1 + _FROM_SHORTEST
            continue
        falling = relaxed.price_w - blocking_w + 1
        if falling <= 0:
            return (bound_s, relaxed) if over <= _KEPT * at_s else None
        # The tangent lies below the curve: where it meets the budget is never too late.
        bound_s = max(bound_s, at_s + over / falling)
        if over <= _KEPT * at_s:
            return bound_s, relaxed
        at_s = bound_s
    return bound_s, relaxed


def _effective_by_stage(problem: PlanningProblem, relaxed: Relaxed) -> FloatArray:
    """Shape (stages,): effective energy of the relaxation's optimum, as if weights were 1."""
    graph, finish_s = problem.graph, relaxed.earliest_finish_s
    start_s = np.zeros(len(graph))
    np.maximum.at(start_s, graph.edge_target, finish_s[graph.edge_source] + graph.edge_latency_s)
    own_s = finish_s - start_s
    energy_j = np.zeros(len(graph))
    for k, options in enumerate(problem.classes):
        nodes = np.flatnonzero(problem.class_of == k)
        energy_j[nodes] = np.interp(own_s[nodes], options.time_s[options.hull], options.energy_j[options.hull])
    return np.bincount(graph.stage, weights=energy_j, minlength=graph.stages).astype(np.float64)


def _best_prices(overdrawn: FloatArray) -> tuple[FloatArray, float]:
    """The prices, which add up to 1, at which the cheapest of the known iterations overdraws most, and by how much.

    Args:
        overdrawn: shape (iterations, budgets), as a share of each budget.
    """
    from ortools.linear_solver import pywraplp  # takes long to load, and few plans need it

    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity = solver.infinity()
    prices = [solver.NumVar(0.0, 1.0, "") for _ in range(overdrawn.shape[1])]
    least = solver.NumVar(-infinity, infinity, "")
    solver.Add(solver.Sum(prices) == 1)
    for row in overdrawn.tolist():
        solver.Add(solver.Sum([price * share for price, share in zip(prices, row, strict=True)]) >= least)
    solver.Maximize(least)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return np.full(overdrawn.shape[1], 1 / overdrawn.shape[1]), math.inf
    found = np.array([max(0.0, price.solution_value()) for price in prices])
    return found / found.sum(), float(least.solution_value())
