"""Exact re-optimisation of a few instructions while the rest keep their clocks (CP-SAT)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from perseus_plugin.pipeline import FloatArray, IntArray
from perseus_plugin.planning.options import PlanningProblem

TIME_UNIT_S = 1e-7
_ENERGY_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """How hard to search in one window.

    Attributes:
        work: CP-SAT's deterministic time, about seconds; the same search gives the same result on any machine.
        max_regret: options whose reduced cost is above this share of the mean energy of an instruction are left out.
    """

    work: float
    max_regret: float


def regrets(problem: PlanningProblem, price_w: FloatArray) -> FloatArray:
    """Reduced cost of every option at the relaxation's prices, joules, shape (nodes, options); inf for padding.

    How far a plan lies above the bound is the sum of its options' reduced costs and of its priced slack, so an
    option with a large one is in no good plan.
    """
    times, energies = problem.option_table
    padded = np.where(np.isfinite(times), times, 0.0)
    cost = energies[problem.class_of] + price_w[:, None] * padded[problem.class_of]
    reduced: FloatArray = cost - cost.min(axis=1, keepdims=True)
    return reduced


def solve_window(
    problem: PlanningProblem,
    choice: IntArray,
    deadline_s: float,
    nodes: IntArray,
    regret_j: FloatArray,
    limits: WindowLimits,
) -> tuple[IntArray, bool]:
    """The best options found for `nodes`, the rest running as early (before them) or as late (after them) as they can.

    Times are whole units of 0.1 us, so the result may miss the deadline by microseconds: the caller repairs it.

    Args:
        problem: graph and options.
        choice: shape (nodes,), a choice that meets the deadline.
        deadline_s: the deadline.
        nodes: ids of the nodes to choose anew, in topological order.
        regret_j: from `regrets`.
        limits: on the search.

    Returns:
        A choice, and whether it was proven the best for this window.
    """
    model = _Window(problem, choice, deadline_s, nodes, regret_j, limits.max_regret)
    if not model.options:
        return choice, True
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = limits.work
    solver.parameters.max_time_in_seconds = 20 * limits.work
    status = solver.solve(model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return choice, False
    found = choice.copy()
    for node, options in model.options.items():
        found[node] = next(k for k, chosen in options if solver.boolean_value(chosen))
    return found, status == cp_model.OPTIMAL


class _Window:
    """The CP-SAT model: one literal per option, one start time per node, precedence within and at the rim."""

    def __init__(
        self,
        problem: PlanningProblem,
        choice: IntArray,
        deadline_s: float,
        nodes: IntArray,
        regret_j: FloatArray,
        max_regret: float,
    ) -> None:
        graph = problem.graph
        self.model = cp_model.CpModel()
        self.options: dict[int, list[tuple[int, cp_model.IntVar]]] = {}
        self.problem = problem
        duration = np.rint(problem.durations(choice) / TIME_UNIT_S)
        rounded = graph.in_units(TIME_UNIT_S)
        latency = rounded.edge_latency_s
        _, finish = rounded.times(duration)
        end = max(float(finish.max()), np.floor(deadline_s / TIME_UNIT_S))
        latest = rounded.latest_finish(duration, end)
        mean_j = problem.mean_energy_j
        allowed = regret_j[nodes] <= max_regret * mean_j
        allowed &= np.isfinite(regret_j[nodes])
        allowed[np.arange(len(nodes)), choice[nodes]] = True
        # A node with one option and no slack is a wall, not a variable.
        movable = (allowed.sum(axis=1) > 1) | (latest[nodes] - finish[nodes] > 0)
        movable &= problem.class_of[nodes] >= 0
        inside = set(nodes[movable].tolist())
        times, energies = problem.option_table
        starts: dict[int, cp_model.IntVar] = {}
        lengths: dict[int, cp_model.LinearExpr] = {}
        costs = []
        for node, row in zip(nodes[movable].tolist(), allowed[movable], strict=True):
            ids = np.flatnonzero(row)
            k = problem.class_of[node]
            length = np.rint(times[k, ids] / TIME_UNIT_S).astype(np.int64).tolist()
            cost = np.rint((energies[k, ids] - energies[k, ids].min()) / mean_j * _ENERGY_STEPS)
            literals = [self.model.new_bool_var("") for _ in ids]
            self.model.add_exactly_one(literals)
            for option, literal in zip(ids.tolist(), literals, strict=True):
                self.model.add_hint(literal, option == choice[node])
            lengths[node] = cp_model.LinearExpr.weighted_sum(literals, length)
            costs.append(cp_model.LinearExpr.weighted_sum(literals, cost.astype(np.int64).tolist()))
            self.options[node] = list(zip(ids.tolist(), literals, strict=True))
            edges = graph.edges_into(node)
            outside = [e for e in edges if int(graph.edge_source[e]) not in inside]
            ready = max((float(finish[graph.edge_source[e]] + latency[e]) for e in outside), default=0.0)
            starts[node] = self.model.new_int_var(int(ready), int(end), "")
        for node in inside:
            last = end
            for e in graph.edges_from(node):
                target = int(graph.edge_target[e])
                if target in inside:
                    self.model.add(starts[target] >= starts[node] + lengths[node] + int(latency[e]))
                else:
                    last = min(last, float(latest[target] - duration[target] - latency[e]))
            self.model.add(starts[node] + lengths[node] <= int(last))
        self.model.minimize(cp_model.LinearExpr.sum(costs))
