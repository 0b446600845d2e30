"""The fastest plan within a power budget.

The bound (see `power.bound`) says how short an iteration can be and what each stage's energy is worth. Plans are made
for iterations of about that length as for any deadline, at those worths, and priced as they will run: with every wait
at the clock that it will have. The shortest one that keeps every budget is taken. One clock for all is tried too, so
that a plan is never slower than that.

Iterations longer than the cheapest one draw less power, but nothing makes a GPU wait longer than its peers do. There
the instructions of a critical path are slowed further, those first that cost least for the time that they add, and all
others stay where they take least. What keeps no budget and comes nearest is an answer too, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.discretise import WORK, Discretiser, Solution
from perseus_plugin.planning.few_changes.limits import violated
from perseus_plugin.planning.options import Assignment, PlanningProblem, capped, weighted
from perseus_plugin.planning.power.bound import Bound, time_bound
from perseus_plugin.planning.power.budget import Peaks, PowerBudget, StageLimit
from perseus_plugin.planning.power.planned import ROUNDED, PlannedBudget, PlannedPeaks, PlannedPower
from perseus_plugin.planning.power.trace import planned_peaks
from perseus_plugin.planning.relaxation import Relaxation
from perseus_plugin.planning.targets import EFFORTS, ChangeLimits, Effort
from perseus_plugin.planning.whole import Budget, fastest_clocks
from perseus_plugin.planning.work import BRAKE_S, SMALL, Work

_STEPS = 14
_MORE_EFFORT = (1.0, 0.5, 0.25)  # of the way from the bound to what was found quickly
_NEAR = 1e-4  # share of the iteration to which the shortest is looked for
_BESIDES = 1e-3  # what energy counts that no budget is short of, against that which one is
_LEAST_W = 1.0  # of a budget that overheads alone use up, to come near to
_WHOLE = 1 / 8  # share of the work that a search of a small job as a whole may do, and again where costs were rounded
_AVERAGES = 256  # steps in which a lower average is looked for


@dataclass(frozen=True, eq=False)
class Fastest:
    """What was found.

    Attributes:
        solution: the plan.
        stage_w: shape (stages,), power of each stage's GPU.
        limits: what it keeps to.
        bound: on the time of any plan that does.
        peaks: that it predicts.
    """

    solution: Solution
    stage_w: FloatArray
    limits: tuple[StageLimit, ...]
    bound: Bound
    peaks: PlannedPeaks

    def planned(self, budget: PowerBudget) -> PlannedPower:
        """What the plan says of the budget that it was made for."""
        stages = len(self.stage_w)
        stage_of = budget.ranks_by_stage(stages)
        every = float(self.stage_w[list(stage_of)].sum())
        return PlannedPower(
            job_w=budget.node_w(every, len(stage_of)),
            budgets=tuple(
                PlannedBudget(
                    one.name,
                    budget.told_w(one, one.watts),
                    budget.told_w(one, float(np.dot(one.gpus, self.stage_w))),
                )
                for one in self.limits
            ),
            peaks=self.peaks,
            time_lower_bound_s=min(self.bound.time_s, self.solution.iteration_time_s),
            converged=self.bound.converged,
        )


def fastest_within(
    planner: Discretiser, budget: PowerBudget, limits: ChangeLimits, effort: Effort, work: Work
) -> Fastest:
    """The shortest iteration found that keeps the budget, and its peaks; what comes nearest where the budget says so.

    Raises:
        PlanError: none keeps it; the message names the lowest budget.
    """
    found = _Search(planner, budget, limits, effort, work).run()
    if not found.peaks.over(budget.peaks):
        return found
    kept = _with_low_peaks(planner, budget, found, limits, effort, work)
    # The bound is that of all clocks, and of averages alone.
    return replace(kept, limits=found.limits, bound=replace(found.bound, converged=False))


def is_within(planner: Discretiser, solution: Solution, budget: PowerBudget) -> bool:
    """Whether a plan that was made for something else keeps a budget, peaks included."""
    stage_w = planner.stage_energy_j(solution) / solution.iteration_time_s
    limits = budget.limits(planner.problem.graph.stages)
    kept = all(float(np.dot(one.gpus, stage_w)) <= one.watts * (1 + ROUNDED) for one in limits)
    return kept and not planned_peaks(planner.problem, solution, budget).over(budget.peaks)


def uniform_within(planner: Discretiser, budget: PowerBudget, limits: ChangeLimits) -> Solution:
    """The highest clock for all that keeps a budget, peaks included, or else everything at its lowest."""
    search = _Search(planner, replace(budget, or_nearest=True), limits, "quick", Work(BRAKE_S["quick"]))
    for assignment in search.uniform():
        solution, _ = search.price(assignment)
        if is_within(planner, solution, budget):
            break
    return solution


def power_at_lowest_w(planner: Discretiser, limits: ChangeLimits) -> float:
    """What one pipeline draws with everything at its lowest clock; a plan may draw a little less still."""
    search = _Search(planner, PowerBudget(1.0), limits, "quick", Work(BRAKE_S["quick"]))
    *_, lowest = search.uniform()
    solution, _ = search.price(lowest)
    return float(planner.stage_energy_j(solution).sum()) / solution.iteration_time_s


def _with_low_peaks(
    planner: Discretiser, budget: PowerBudget, found: Fastest, limits: ChangeLimits, effort: Effort, work: Work
) -> Fastest:
    """Without the clocks that draw most, or on a lower average, whichever is faster; how far down is found by halving.

    Raises:
        PlanError: neither keeps the peaks; the message says what is drawn at the lowest.
    """
    problem, lowest = planner.problem, found
    strict = replace(budget, or_nearest=False)
    powers_w = sorted(
        {
            joules / seconds + float(problem.blocking_power_w[stage])
            for (stage, _), rows in zip(problem.keys, problem.measured, strict=True)
            for seconds, joules in rows.values()
        }
    )
    average_w = found.planned(budget).job_w

    def without_clocks(at: int, effort: Effort, whole: bool) -> Fastest:
        within = Discretiser(capped(problem, powers_w[at]), planner.switch_latency_s)
        return _Search(within, strict, limits, effort, work).run(whole=whole)

    def on_average(at: int, effort: Effort, whole: bool) -> Fastest:
        lower = replace(strict, job_w=average_w * (at + 1) / _AVERAGES)
        return _Search(planner, lower, limits, effort, work).run(whole=whole)

    best: Fastest | None = None
    found_by, found_at = without_clocks, 0
    for attempt, count in ((without_clocks, len(powers_w)), (on_average, _AVERAGES)):
        low, high = 0, count - 1
        while low <= high:
            middle = (low + high) // 2
            try:
                tried = attempt(middle, "quick", False)
            except PlanError:  # so little may not be possible
                low = middle + 1
                continue
            if not tried.peaks.over(budget.peaks):
                low = middle + 1
                if best is None or tried.solution.iteration_time_s < best.solution.iteration_time_s:
                    best, found_by, found_at = tried, attempt, middle
            else:
                lowest, high = min(lowest, tried, key=lambda one: _excess(one.peaks, budget.peaks)), middle - 1
    if best is None and budget.or_nearest:
        return lowest
    if best is None:
        drawn = ", ".join(lowest.peaks.over(budget.peaks))
        raise PlanError(f"peak power: {drawn}; no plan was found that keeps that")
    if effort != "quick":
        # Where to look is found quickly; the effort is for the plan there.
        tried = found_by(found_at, effort, True)
        faster = tried.solution.iteration_time_s < best.solution.iteration_time_s
        best = tried if faster and not tried.peaks.over(budget.peaks) else best
    return best


def _bound_of(problem: PlanningProblem, limits: tuple[StageLimit, ...]) -> Bound:
    if limits:
        return time_bound(problem, limits)
    return Bound(problem.shortest_s, np.ones(problem.graph.stages), True)


def _excess(planned: PlannedPeaks, allowed: Peaks) -> float:
    """The peak that is farthest above its limit, as a multiple of that; 0: none is."""
    return max(planned.over(allowed).values(), default=0.0)


class _Search:
    """One search; of all it prices it remembers the shortest that keeps the budgets, and what comes nearest to them."""

    def __init__(
        self, planner: Discretiser, budget: PowerBudget, limits: ChangeLimits, effort: Effort, work: Work
    ) -> None:
        self.planner, self.problem, self.budget = planner, planner.problem, budget
        self.changes, self.effort, self.work = limits, effort, work
        self.limits = budget.limits(self.problem.graph.stages)
        for limit in self.limits:
            if limit.watts <= 0 and not budget.or_nearest:
                raise PlanError(f"power budget of {limit.name}: the overhead of its nodes alone takes it")
        self.priced = tuple(replace(limit, watts=max(limit.watts, _LEAST_W)) for limit in self.limits)
        self.per_watt = np.array([[gpus / limit.watts for gpus in limit.gpus] for limit in self.priced])
        self.relaxation = Relaxation.sized(self.problem)
        self.cheapest = self.relaxation.cheapest()
        self.best: tuple[Solution, FloatArray] | None = None
        self.nearest: tuple[float, Solution, FloatArray] | None = None

    def run(self, *, whole: bool = True) -> Fastest:
        """What was found; `whole`: small jobs are searched as a whole, too."""
        problem, shortest_s = self.problem, self.problem.shortest_s
        bound = _bound_of(problem, self.priced)
        for assignment in self.uniform():
            self.price(assignment)
        if bound.possible and bound.time_s <= problem.longest_s:
            self._within(bound, max(bound.time_s, shortest_s))
        if self.best is None or self.best[0].iteration_time_s > problem.longest_s:
            self._beyond(bound)
        if whole and self.limits and bound.possible and len(problem.instruction_nodes) <= SMALL:
            self._whole(bound.time_s)
        if self.best is None and self.nearest is not None:
            if not self.budget.or_nearest:
                raise PlanError(self._lowest(self.nearest[0]))
            self.best = self.nearest[1:]
        assert self.best is not None  # one clock for all has a price
        solution, stage_w = self.best
        if solution.iteration_time_s < self.cheapest.deadline_s:
            relaxed = self.relaxation.solve(max(solution.iteration_time_s, shortest_s))
            solution = replace(solution, relaxed=relaxed)
        solution = replace(solution, cut_short=self.work.cut_short)
        return Fastest(solution, stage_w, self.limits, bound, planned_peaks(problem, solution, self.budget))

    def price(self, assignment: Assignment) -> tuple[Solution, float]:
        """As it will run, and the most that it takes of a budget, as a share of that."""
        end_s = self.problem.graph.iteration_time_s(assignment.duration_s)
        solution = self.planner.priced(self.cheapest, assignment, end_s, self.changes)
        stage_w = self.planner.stage_energy_j(solution) / solution.iteration_time_s
        used = float((self.per_watt @ stage_w).max()) if len(self.limits) else 0.0
        if used <= 1 + ROUNDED:
            key = solution.iteration_time_s, solution.energy_j
            if self.best is None or key < (self.best[0].iteration_time_s, self.best[0].energy_j):
                self.best = solution, stage_w
        if self.nearest is None or used < self.nearest[0]:
            self.nearest = used, solution, stage_w
        return solution, used

    def _at(self, clocks_mhz: IntArray) -> Assignment:
        time_s, watts = self.problem.at_clocks(clocks_mhz)
        return Assignment(clocks_mhz, time_s, float(time_s @ watts))

    def uniform(self) -> Iterator[Assignment]:
        """One clock for all that may be slowed, and everything at its lowest."""
        measured = self.problem.measured
        free = [rows for rows in measured if len(rows) > 1]
        common = set.intersection(*(set(rows) for rows in free)) if free else set()
        for clock in sorted(common, reverse=True):
            per_class = [clock if clock in rows else max(rows) for rows in measured]
            yield self._at(self.problem.per_node(per_class).astype(np.int64))
        yield self._at(self.problem.per_node([min(rows) for rows in measured]).astype(np.int64))

    def _within(self, bound: Bound, from_s: float) -> None:
        """Plans for deadlines, from the bound on; closes in on the shortest that keeps the budgets."""
        weights = bound.weights + _BESIDES * float(bound.weights.max())
        problem = weighted(self.problem, weights / float(weights.max()))
        relaxation = Relaxation.sized(problem)
        rounder = Discretiser(problem, self.planner.switch_latency_s)
        longest_s = max(relaxation.longest_s, from_s)

        def at(deadline_s: float, effort: Effort, search: bool) -> float:
            relaxed = relaxation.solve(deadline_s)
            found = rounder.discretise(relaxed, deadline_s, self.changes, effort, self.work, search=search)
            return self.price(self._at(found.assignment.frequency_mhz))[1]

        def kept(deadline_s: float, effort: Effort = "quick", search: bool = False) -> float:
            try:
                return at(deadline_s, effort, search)
            except PlanError:  # so short an iteration may need more changes than are allowed
                return np.inf

        used = kept(from_s)
        low_s, low_used = from_s, used
        high_s = from_s if used <= 1 else longest_s
        if used > 1:
            high_used = kept(longest_s)
            if high_used > 1 and self.best is None:
                return
            for step in range(_STEPS):
                if high_s - low_s < _NEAR * low_s:
                    break
                share = 0.5
                if step % 2 == 0 and np.isfinite(low_used) and low_used > high_used:
                    share = (low_used - 1) / (low_used - high_used)
                middle_s = low_s + (high_s - low_s) * min(max(share, 0.02), 0.98)
                used = kept(middle_s)
                if used <= 1:
                    high_s, high_used = middle_s, used
                else:
                    low_s, low_used = middle_s, used
        for effort in EFFORTS[1 : EFFORTS.index(self.effort) + 1]:
            # More effort saves energy, and so allows for a shorter iteration.
            for share in _MORE_EFFORT:
                kept(from_s + share * (high_s - from_s), effort, search=True)

    def _whole(self, at_least_s: float) -> None:
        """All choices of a small job, for the shortest of those that keep the budgets."""
        problem, most_changes = self.problem, self.changes.max_changes
        budgets = [Budget.power(problem, limit.gpus, limit.watts * (1 + ROUNDED)) for limit in self.priced]
        for effort in EFFORTS[: EFFORTS.index(self.effort) + 1]:
            known, most = None if self.best is None else self.best[0].assignment, WORK[effort] * _WHOLE
            found = fastest_clocks(problem, known, budgets, most_changes, self.work, most, at_least_s)
            if found is not None and found is not known and not violated(problem, found, self.changes):
                self.price(found)

    def _beyond(self, bound: Bound) -> None:
        """Slow a critical path beyond what takes the least energy."""
        problem = self.problem
        weights = bound.weights if len(self.limits) else np.ones(problem.graph.stages)
        clocks_mhz = problem.per_node([c.frequency_mhz[-1] for c in problem.classes]).astype(np.int64)
        path = _critical_path(problem, problem.slowest_s)
        steps = []
        for node in path:
            k = int(problem.class_of[node])
            if k >= 0:
                weight = float(weights[problem.graph.stage[node]])
                steps += [(weight * slope_w, node, clock) for slope_w, clock in _slower(problem, k)]
        steps.sort(key=lambda step: (step[0], step[1], -step[2]))

        def used(count: int) -> float:
            slowed = clocks_mhz.copy()
            for _, node, clock in steps[:count]:
                slowed[node] = clock
            assignment = self._at(slowed)
            return np.inf if violated(problem, assignment, self.changes) else self.price(assignment)[1]

        if self.changes.max_changes is not None or not steps:
            used(0)
            used(len(steps))
            return
        # Power falls while what a further step adds draws less than the rest, and rises from there on.
        low, high = 0, len(steps)
        while high - low > 2:
            third = (high - low) // 3
            one, other = used(low + third), used(high - third)
            if one <= 1:
                high = low + third
            elif other <= 1:
                low, high = low + third, high - third
            elif one <= other:
                high = high - third
            else:
                low = low + third
        for count in range(low, high + 1):
            used(count)

    def _lowest(self, share: float) -> str:
        """What is said where no plan keeps the budgets: the lowest takes this multiple of one."""
        if len(self.limits) == 1:
            (limit,) = self.limits
            given, lowest = (self.budget.told_w(limit, watts) for watts in (limit.watts, limit.watts * share))
            return f"power budget: got {given:.1f} W for {limit.name}; the lowest plan found draws {lowest:.1f} W"
        names = ", ".join(limit.name for limit in self.limits)
        return (
            f"power budget: no plan was found that keeps those of {names} all; "
            f"they would have to be {100 * (share - 1):.1f} % higher"
        )


def _critical_path(problem: PlanningProblem, duration_s: FloatArray) -> list[int]:
    """Nodes of one of the longest paths through an iteration."""
    graph = problem.graph
    start_s, finish_s = graph.times(duration_s)
    node = int(finish_s.argmax())
    path = [node]
    while start_s[node] > 0:
        edges = list(graph.edges_into(node))
        ready_s = [float(finish_s[graph.edge_source[e]] + graph.edge_latency_s[e]) for e in edges]
        node = int(graph.edge_source[edges[int(np.argmax(ready_s))]])
        path.append(node)
    return path


def _slower(problem: PlanningProblem, k: int) -> list[tuple[float, int]]:
    """Clocks below that of least effective energy, with what each second costs that they add; rising, in watts."""
    options = problem.classes[k]
    rows = sorted((seconds, joules, clock) for clock, (seconds, joules) in problem.measured[k].items())
    at_s, at_j = float(options.time_s[-1]), float(options.energy_j[-1])
    found = []
    left = [row for row in rows if row[0] > at_s]
    while left:
        slope_w, seconds, joules, clock = min(((j - at_j) / (s - at_s), s, j, c) for s, j, c in left)
        found.append((slope_w, clock))
        at_s, at_j = seconds, joules
        left = [row for row in left if row[0] > at_s]
    return found
