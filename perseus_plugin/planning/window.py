"""Exact re-optimisation of a few instructions while the rest keep their clocks (CP-SAT)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.cp_sat import cp_model
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.solvers import interruptible
from perseus_plugin.planning.work import CP_SAT, Work

TIME_UNIT_S = 1e-7
_BUILD, _BUILD_NODE = 1e-3, 8e-5  # units of work
_ENERGY_STEPS = 100_000
# An iteration's end is priced in watts times 0.1 us, far below a step of energy: such a model counts finer steps.
_END_PRICE_STEPS, _BUDGET_STEPS = 100, 10_000
_MOST_STEPS = 1e13  # sums of costs stay far below 64 bits


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
    work: Work,
    end_price_w: float = 0.0,
    budget_j: float | None = None,
) -> tuple[IntArray, bool]:
    """The best options found for `nodes`, the rest running as early (before them) or as late (after them) as they can.

    Times are whole units of 0.1 us, so the result may miss the deadline by microseconds: the caller repairs it.

    Args:
        problem: graph and options.
        choice: shape (nodes,), a choice that meets the deadline.
        deadline_s: the deadline.
        nodes: ids of the nodes to choose anew, in topological order; constant-time nodes among them may move.
        regret_j: from `regrets`.
        limits: on the search.
        work: what is done is added to it.
        end_price_w: what every second until the last of `nodes` ends costs; only for a window of all nodes.
        budget_j: look for the soonest end at which all that is priced takes no more than this; None: for what takes
            least. Only for a window of all nodes; costs are rounded to steps, so the caller checks what was found.

    Returns:
        A choice, and whether it was proven the best for this window.
    """
    model = _Window(problem, choice, deadline_s, nodes, regret_j, limits.max_regret, end_price_w, budget_j)
    if not model.options:
        return choice, True
    solver, status = solved(model.model, len(nodes), work, limits.work)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return choice, False
    found = choice.copy()
    for node, options in model.options.items():
        found[node] = next(k for k, chosen in options if solver.boolean_value(chosen))
    return found, status == cp_model.OPTIMAL


def solved(
    model: cp_model.CpModel, nodes: int, work: Work, most: float
) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus]:
    """A model of so many nodes after `most` of CP-SAT's deterministic time; what is done is added to `work`."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = most
    solver.parameters.max_time_in_seconds = work.solver_limit_s
    # It would keep the signal to itself.
    solver.parameters.catch_sigint_signal = False
    status = interruptible(lambda: solver.solve(model), solver.stop_search)
    work.done += _BUILD + _BUILD_NODE * nodes + CP_SAT * solver.response_proto.deterministic_time
    if status not in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
        work.brake_acts()
    return solver, status


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
        end_price_w: float,
        budget_j: float | None,
    ) -> None:
        self.model = cp_model.CpModel()
        self.options: dict[int, list[tuple[int, cp_model.IntVar]]] = {}
        self.problem = problem
        self.rounded = problem.graph.in_units(TIME_UNIT_S)
        self.duration = np.rint(problem.durations(choice) / TIME_UNIT_S)
        self.finish = self.rounded.times(self.duration)[1]
        self.end = max(float(self.finish.max()), np.floor(deadline_s / TIME_UNIT_S))
        self.latest = self.rounded.latest_finish(self.duration, self.end)
        self.steps = _ENERGY_STEPS
        if end_price_w:
            # A unit of time shall cost at least so many steps that rounding the price does not matter.
            per_step = end_price_w * TIME_UNIT_S / problem.mean_energy_j
            least = _END_PRICE_STEPS if budget_j is None else _BUDGET_STEPS
            enough = least / max(per_step, least / _MOST_STEPS)
            self.steps = max(self.steps, math.ceil(enough))
        self.lengths: dict[int, cp_model.LinearExpr | int] = {}
        self.costs: list[cp_model.LinearExpr] = []
        self.base_j = 0.0
        whole = end_price_w > 0 or budget_j is not None
        allowed = regret_j[nodes] <= max_regret * problem.mean_energy_j
        allowed &= np.isfinite(regret_j[nodes])
        allowed[np.arange(len(nodes)), choice[nodes]] = True
        # A node with one option and no slack is a wall, not a variable, unless the end itself may move.
        movable = (allowed.sum(axis=1) > 1) | (self.latest[nodes] - self.finish[nodes] > 0) | whole
        for node, row in zip(nodes[movable].tolist(), allowed[movable], strict=True):
            self._add_options(node, np.flatnonzero(row), int(choice[node]))
        starts = self._add_precedence()
        if whole:
            end = self._add_end(starts)
            self.costs.append(end * round(end_price_w * TIME_UNIT_S / problem.mean_energy_j * self.steps))
        if budget_j is None:
            self.model.minimize(cp_model.LinearExpr.sum(self.costs))
        else:
            most = math.floor((budget_j - self.base_j) / problem.mean_energy_j * self.steps)
            self.model.add(cp_model.LinearExpr.sum(self.costs) <= most)
            self.model.minimize(end)

    def _add_options(self, node: int, ids: IntArray, now: int) -> None:
        """One literal per option, or a fixed length for a constant-time node."""
        k = self.problem.class_of[node]
        if k < 0:
            self.lengths[node] = int(self.duration[node])
            return
        times, energies = self.problem.option_table
        length = np.rint(times[k, ids] / TIME_UNIT_S).astype(np.int64).tolist()
        cost = np.rint((energies[k, ids] - energies[k, ids].min()) / self.problem.mean_energy_j * self.steps)
        self.base_j += float(energies[k, ids].min())
        literals = [self.model.new_bool_var("") for _ in ids]
        self.model.add_exactly_one(literals)
        for option, literal in zip(ids.tolist(), literals, strict=True):
            self.model.add_hint(literal, int(option == now))
        self.lengths[node] = cp_model.LinearExpr.weighted_sum(literals, length)
        self.costs.append(cp_model.LinearExpr.weighted_sum(literals, cost.astype(np.int64).tolist()))
        self.options[node] = list(zip(ids.tolist(), literals, strict=True))

    def _add_precedence(self) -> dict[int, cp_model.IntVar]:
        """Start times: after what stands before the window, in time for what stands behind it."""
        graph, latency = self.problem.graph, self.rounded.edge_latency_s
        starts: dict[int, cp_model.IntVar] = {}
        for node in self.lengths:
            outside = [e for e in graph.edges_into(node) if int(graph.edge_source[e]) not in self.lengths]
            ready = max((float(self.finish[graph.edge_source[e]] + latency[e]) for e in outside), default=0.0)
            starts[node] = self.model.new_int_var(int(ready), int(self.end), "")
        for node, start in starts.items():
            last = self.end
            for e in graph.edges_from(node):
                target = int(graph.edge_target[e])
                if target in starts:
                    self.model.add(starts[target] >= start + self.lengths[node] + int(latency[e]))
                else:
                    last = min(last, float(self.latest[target] - self.duration[target] - latency[e]))
            self.model.add(start + self.lengths[node] <= int(last))
        return starts

    def _add_end(self, starts: dict[int, cp_model.IntVar]) -> cp_model.IntVar:
        end = self.model.new_int_var(0, int(self.end), "")
        for node, start in starts.items():
            self.model.add(start + self.lengths[node] <= end)
        return end
