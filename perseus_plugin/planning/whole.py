"""Small jobs searched as a whole at every clock (CP-SAT), where no instruction is a matter for itself.

Few clock changes tie the instructions of a stage together, and a power budget makes a longer iteration worth something.
Either way the best clock of an instruction may be one that another one beats in time and energy alike, so every clock
that has been measured is tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from perseus_plugin.planning.cp_sat import cp_model
from perseus_plugin.planning.few_changes.phases import StageClocks, stage_clocks
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.window import TIME_UNIT_S, solved
from perseus_plugin.planning.work import Work

_ROUNDED = 6e-5  # share of a budget by which a model's costs may be off
_STEPS = 1e10  # of energy in which costs count, for all of them together; with far more of them CP-SAT misses choices
_NOTHING = 1e-6  # share of all energy that power until the end of the iteration may be and not count
_REGRET = 0.02  # of the mean energy of an instruction, which an option may always lose

BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Budget:
    """Of T seconds: `gpus[s]` times stage s's effective energy, summed, is `most_j + most_w * T` at most."""

    gpus: tuple[float, ...]
    most_j: float
    most_w: float

    @classmethod
    def energy(cls, problem: PlanningProblem, budget_j: float) -> Budget:
        """Of the energy of one GPU per stage, blocking power until the end included."""
        return cls((1.0,) * problem.graph.stages, budget_j, -problem.total_blocking_w)

    @classmethod
    def power(cls, problem: PlanningProblem, gpus: Sequence[float], watts: float) -> Budget:
        """Of the power of so many GPUs of each stage, averaged over the iteration."""
        return cls(tuple(gpus), 0.0, watts - float(np.dot(gpus, problem.blocking_power_w)))


def cheapest_clocks(
    problem: PlanningProblem,
    relaxed: Relaxed,
    known: Assignment | None,
    deadline_s: float,
    end_price_w: float,
    max_changes: int | None,
    work: Work,
    most: float,
) -> tuple[Assignment | None, bool]:
    """The choice of clocks that takes least by a deadline.

    Args:
        problem: graph and options; at most `work.SMALL` instructions are worth it.
        relaxed: the relaxation's optimum for the deadline, or for the cheapest one before it.
        known: keeps all that is asked for; None: nothing is known that does.
        deadline_s: to meet.
        end_price_w: blocking power of all stages if they wait no longer than the iteration takes, else 0.
        max_changes: of a stage's clock in an iteration; None: any number.
        work: what is done is added to it.
        most: CP-SAT's deterministic time.

    Returns:
        What was found that is better than `known`, or `known`; and whether it was proven the best.
    """

    def cost_j(one: Assignment) -> float:
        return one.energy_j + end_price_w * problem.graph.iteration_time_s(one.duration_s)

    regret_j = math.inf
    if known is not None:
        waited_j = 0.0 if end_price_w else problem.total_blocking_w * relaxed.deadline_s
        # An option whose reduced cost is above the gap cannot be in a better plan.
        regret_j = max(0.0, cost_j(known) + waited_j - relaxed.bound_j) + _REGRET * problem.mean_energy_j
    stages = stage_clocks(problem, every=True)
    allowed = _allowed(stages)
    for stage, may in zip(stages, allowed, strict=True):
        price_w = relaxed.instruction_price_w[stage.nodes, None]
        cost = np.where(may, stage.energy_j + price_w * stage.time_s, np.inf)
        may &= cost - cost.min(axis=1, keepdims=True, initial=np.inf) <= regret_j
        if known is not None:
            may |= stage.frequency_mhz == known.frequency_mhz[stage.nodes, None]
    # Ends that may be in time, then those that surely are.
    rounding_s = TIME_UNIT_S * len(problem.graph.level_start)
    for end_s in (deadline_s + rounding_s, deadline_s, deadline_s - rounding_s):
        model = _Whole(problem, stages, allowed, known, end_s, max_changes, end_price_w=end_price_w)
        found, proven = model.solve(work, most)
        if found is None:
            return known, proven and known is not None and end_s > deadline_s
        if problem.graph.iteration_time_s(found.duration_s) <= deadline_s:
            return (found if known is None or cost_j(found) < cost_j(known) else known), proven
    return known, False


def fastest_clocks(
    problem: PlanningProblem,
    known: Assignment | None,
    budgets: Sequence[Budget],
    max_changes: int | None,
    work: Work,
    most: float,
    at_least_s: float = 0.0,
) -> Assignment | None:
    """The choice of clocks with the shortest iteration that keeps budgets: a longer one may keep more.

    Args:
        problem: graph and options; at most `work.SMALL` instructions are worth it.
        known: keeps all that is asked for; None: nothing is known that does.
        budgets: to keep.
        max_changes: of a stage's clock in an iteration; None: any number.
        work: what is done is added to it.
        most: CP-SAT's deterministic time.
        at_least_s: a bound on the iteration's time.

    Returns:
        What was found that is shorter than `known`, or `known`.
    """
    stages = stage_clocks(problem, every=True)
    allowed = _allowed(stages)
    longest_s = _longest_s(problem, stages) if known is None else problem.graph.iteration_time_s(known.duration_s)
    rounding_s = TIME_UNIT_S * len(problem.graph.level_start)
    if known is not None and longest_s - at_least_s <= rounding_s:
        return known
    # Those that may keep the budgets, then those that should, then those that surely do.
    for share in (_ROUNDED, 0.0, -_ROUNDED):
        end_s = longest_s + rounding_s
        model = _Whole(problem, stages, allowed, known, end_s, max_changes, budgets=budgets, over=share)
        model.no_sooner(at_least_s - rounding_s)
        found, _ = model.solve(work, most)
        if found is None:
            return known
        end_s = problem.graph.iteration_time_s(found.duration_s)
        if all(_kept(problem, found, end_s, budget) for budget in budgets):
            return found if known is None or end_s < longest_s else known
    return known


def _kept(problem: PlanningProblem, found: Assignment, end_s: float, budget: Budget) -> bool:
    seconds, watts = problem.at_clocks(found.frequency_mhz)
    stage_j = np.bincount(problem.graph.stage, weights=seconds * watts, minlength=problem.graph.stages)
    return float(np.dot(budget.gpus, stage_j)) <= budget.most_j + budget.most_w * end_s


def _allowed(stages: Sequence[StageClocks]) -> list[BoolArray]:
    """Per stage, shape (instructions, clocks): the clocks that each instruction may have."""
    return [stage.energy_j < stage.forbidden_j for stage in stages]


def _longest_s(problem: PlanningProblem, stages: Sequence[StageClocks]) -> float:
    """With every instruction at its slowest clock."""
    duration_s = problem.graph.constant_s.copy()
    for stage, allowed in zip(stages, _allowed(stages), strict=True):
        duration_s[stage.nodes] = np.where(allowed, stage.time_s, 0.0).max(axis=1, initial=0.0)
    return problem.graph.iteration_time_s(duration_s)


class _Whole:
    """The CP-SAT model: one literal per instruction and clock, or per stage and clock; one finish time per node."""

    def __init__(
        self,
        problem: PlanningProblem,
        stages: Sequence[StageClocks],
        allowed: Sequence[BoolArray],
        known: Assignment | None,
        end_s: float,
        max_changes: int | None,
        *,
        end_price_w: float = 0.0,
        budgets: Sequence[Budget] = (),
        over: float = 0.0,
    ) -> None:
        self.problem, self.model = problem, cp_model.CpModel()
        self.rounded = problem.graph.in_units(TIME_UNIT_S)
        self.last = math.floor(end_s / TIME_UNIT_S)
        self.clock: dict[int, list[tuple[int, cp_model.IntVar]]] = {}
        self.length: list[cp_model.LinearExpr | int] = (
            np.rint(problem.graph.constant_s / TIME_UNIT_S).astype(int).tolist()
        )
        size_j = abs(end_price_w) * end_s
        for stage, may in zip(stages, allowed, strict=True):
            size_j += float(np.where(may, np.abs(stage.energy_j), 0.0).max(axis=1, initial=0.0).sum())
        self.size_j = max(size_j, 1e-12)
        self.base_j = np.zeros(problem.graph.stages)
        self.cost: list[list[tuple[cp_model.IntVar, float]]] = []
        for stage, may in zip(stages, allowed, strict=True):
            self._add_stage(stage, may, known, max_changes)
        end = self._add_times(exact=any(budget.most_w > 0 for budget in budgets))
        for budget in budgets:
            self._add_budget(budget, over, end)
        self.end = end
        if budgets:
            self.model.minimize(end)
        else:
            steps, per_unit = self._steps(end_price_w)
            self.model.minimize(self._costs([1.0] * problem.graph.stages, steps) + end * per_unit)

    def _add_stage(self, stage: StageClocks, may: BoolArray, known: Assignment | None, max_changes: int | None) -> None:
        model, number = self.model, len(self.cost)
        self.cost.append([])
        if not len(stage.nodes):
            return
        # A single change would have to be one back to the first clock, too.
        one_clock = max_changes is not None and max_changes < 2
        least_j = np.where(may, stage.energy_j, np.inf).min(axis=1)
        self.base_j[number] = float(least_j.sum())
        literals = dict[tuple[int, int], cp_model.IntVar]()
        shared = {}
        if one_clock:
            may = np.broadcast_to(may.all(axis=0), may.shape)
            shared = {clock: model.new_bool_var("") for clock in np.flatnonzero(may[0]).tolist()}
            model.add_exactly_one(shared.values())
        lengths = np.rint(stage.time_s / TIME_UNIT_S).astype(np.int64)
        for row, node in enumerate(stage.nodes.tolist()):
            ids = np.flatnonzero(may[row]).tolist()
            own = [shared[clock] if one_clock else model.new_bool_var("") for clock in ids]
            if not one_clock:
                model.add_exactly_one(own)
            self.length[node] = cp_model.LinearExpr.weighted_sum(own, lengths[row, ids].tolist())
            self.cost[-1] += zip(own, (stage.energy_j[row, ids] - least_j[row]).tolist(), strict=True)
            frequencies = stage.frequency_mhz[ids].tolist()
            self.clock[node] = list(zip(frequencies, own, strict=True))
            literals.update({(row, clock): literal for clock, literal in zip(ids, own, strict=True)})
            if known is not None and (not one_clock or row == 0):
                for frequency, literal in self.clock[node]:
                    model.add_hint(literal, int(frequency == known.frequency_mhz[node]))
        if max_changes is not None and not one_clock and max_changes < len(stage.nodes):
            self._limit_changes(literals, len(stage.nodes), max_changes)

    def _limit_changes(self, literals: dict[tuple[int, int], cp_model.IntVar], count: int, max_changes: int) -> None:
        """At most so many instructions begin with a clock; the one before the first is the last."""
        begins = []
        for (row, clock), literal in literals.items():
            before = literals.get(((row - 1) % count, clock))
            begin = self.model.new_bool_var("")
            self.model.add(begin >= (literal if before is None else literal - before))
            begins.append(begin)
        self.model.add(cp_model.LinearExpr.sum(begins) <= max_changes)

    def _add_times(self, exact: bool) -> cp_model.IntVar:
        """When every node finishes, and the last of all; `exact`: as soon as it can, else at some time from then on."""
        model, graph, latency = self.model, self.problem.graph, self.rounded.edge_latency_s
        finish = [model.new_int_var(0, self.last, "") for _ in range(len(graph))]
        for node in range(len(graph)):
            ready = [finish[int(graph.edge_source[e])] + int(latency[e]) for e in graph.edges_into(node)]
            length = self.length[node]
            if not ready:
                model.add(finish[node] == length)
            elif len(ready) == 1:
                model.add(finish[node] == ready[0] + length)
            elif exact:
                start = model.new_int_var(0, self.last, "")
                model.add_max_equality(start, ready)
                model.add(finish[node] == start + length)
            else:
                for one in ready:
                    model.add(finish[node] >= one + length)
        end = model.new_int_var(0, self.last, "")
        if exact:
            model.add_max_equality(end, finish)
        else:
            for one in finish:
                model.add(end >= one)
        return end

    def _steps(self, watts: float) -> tuple[float, int]:
        """Steps of energy per joule, and how many of them so much power is in a unit of time: a whole number."""
        per_unit_j, steps = watts * TIME_UNIT_S, _STEPS / self.size_j
        if abs(per_unit_j) * self.last * steps < _NOTHING * _STEPS:
            return steps, 0
        whole = math.copysign(max(1.0, round(abs(per_unit_j) * steps)), per_unit_j)
        return whole / per_unit_j, int(whole)

    def _costs(self, weights: Sequence[float], steps: float) -> cp_model.LinearExpr:
        """Effective energy above the least of every instruction, in steps, that of each stage times its weight."""
        costs = [
            (literal, round(joules * weight * steps))
            for own, weight in zip(self.cost, weights, strict=True)
            for literal, joules in own
        ]
        return cp_model.LinearExpr.weighted_sum([literal for literal, _ in costs], [one for _, one in costs])

    def _add_budget(self, budget: Budget, over: float, end: cp_model.IntVar) -> None:
        most = max(budget.gpus)
        weights = [gpus / most for gpus in budget.gpus]
        left_j = (budget.most_j + over * abs(budget.most_j)) / most - float(np.dot(weights, self.base_j))
        steps, per_unit = self._steps((budget.most_w + over * abs(budget.most_w)) / most)
        self.model.add(self._costs(weights, steps) - end * per_unit <= math.floor(left_j * steps))

    def no_sooner(self, end_s: float) -> None:
        """The iteration does not end before that."""
        self.model.add(self.end >= math.floor(end_s / TIME_UNIT_S))

    def solve(self, work: Work, most: float) -> tuple[Assignment | None, bool]:
        """The best that was found, if any, and whether there is proven to be no better one."""
        solver, status = solved(self.model, len(self.length), work, most)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, status == cp_model.INFEASIBLE
        clocks_mhz = np.zeros(len(self.length), dtype=np.int64)
        for node, options in self.clock.items():
            clocks_mhz[node] = next(clock for clock, chosen in options if solver.boolean_value(chosen))
        seconds, watts = self.problem.at_clocks(clocks_mhz)
        return Assignment(clocks_mhz, seconds, float(seconds @ watts)), status == cp_model.OPTIMAL
