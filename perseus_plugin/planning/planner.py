"""From a graph and a profile to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import PipelineGraph
from perseus_plugin.planning.discretise import WORK, Discretiser, Solution
from perseus_plugin.planning.few_changes.limits import violated
from perseus_plugin.planning.improve import fastest_whole
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.plan import Plan, PlannedInstruction
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.relaxation import Relaxation, Relaxed
from perseus_plugin.planning.rounding import use_up_slack
from perseus_plugin.planning.targets import EFFORTS, ChangeLimits, Effort, Target
from perseus_plugin.planning.whole import Budget, fastest_clocks
from perseus_plugin.planning.work import SMALL, Work
from perseus_plugin.profiling.profile import Profile

if TYPE_CHECKING:
    from perseus_plugin.planning.power.fastest import Fastest

__all__ = ["ChangeLimits", "Effort", "Planner", "Solution", "Target", "make_plan"]

_BUDGET_STEPS = 12
_FAR = 0.005  # share above the bound from which a plan for less time may be the better one
# Such times are of these slowdowns, whatever is asked for, so that longer times begin with what shorter ones found.
_FINE, _STEP, _WITHIN = (0.0005, 0.001, 0.0015, 0.002), 0.0025, 0.015
# Slowdowns that are searched for instead of what lies between them: up to where, and the longest step, a fifth of which
# is taken, and so on, until it is worth no more than this share of how far a plan is above its bound.
_STEPS, _WORTH, _SHORTEST_STEP = ((0.005, 0.0005), (0.02, 0.001), (math.inf, _STEP)), 0.25, 1e-5
_FEW, _TRIED_OF_FEW, _TRIED = 512, 7, 4  # so many, the longest, in searches of jobs of few instructions and else
_SEARCHED, _CHEAP = 3, 0.1  # of them these are searched, those after the first while that has been little work
_MANY = 4096  # instructions from which only the time of full clocks is tried
_ONE_BOUND = ("slowdown", "deadline", "straggler", "cheapest")  # whatever the plan's time
_MORE_EFFORT = (1.0, 0.5, 0.25)  # of the way from the shortest iteration that a budget may allow to what was found
_WHOLE = 1 / 8  # share of the work that is for a search at every clock there is
_SHORTEST_TO = 1e-3  # share of the time to which that is known
_SAME, _ON_STEP = 1e-9, 1e-6


class Planner(Discretiser):
    """Plans one job for any number of targets; never worse for a longer deadline than before for a shorter one.

    Args:
        graph: from `build_graph`.
        profile: must cover every (stage, kind) of the graph.
        blocking_power_w: power of a GPU that waits, for all stages or one each, where the profile's rows do not say.
        full_clock_only: (stage, kind) pairs that stay at the profile's highest clock.
        schedule: name to put into plans.
        switch_latency_s: how long a clock change takes; None: unknown, and clocks are not lowered in waits.
        clock: monotonic, seconds, for the last brake of searches.
        brake_s: when that acts, if it is sooner than usual.
        tell: told now and then how many units of `discretise.WORK` searches have done since.

    Raises:
        PlanError: the profile does not fit the graph.
    """

    def __init__(
        self,
        graph: PipelineGraph,
        profile: Profile,
        *,
        blocking_power_w: float | Sequence[float],
        full_clock_only: Collection[tuple[int, str]] = (),
        schedule: str = "custom",
        switch_latency_s: float | None = None,
        clock: Callable[[], float] | None = None,
        brake_s: float = math.inf,
        tell: Callable[[float], None] | None = None,
    ) -> None:
        problem = build_problem(graph, profile, blocking_power_w, full_clock_only)
        self._begin(problem, schedule, switch_latency_s, clock, brake_s, tell)

    @classmethod
    def of(
        cls,
        problem: PlanningProblem,
        schedule: str = "custom",
        switch_latency_s: float | None = None,
        clock: Callable[[], float] | None = None,
        brake_s: float = math.inf,
        tell: Callable[[float], None] | None = None,
    ) -> Planner:
        """For graph and options that have been joined already."""
        planner = cls.__new__(cls)
        planner._begin(problem, schedule, switch_latency_s, clock, brake_s, tell)
        return planner

    def _begin(
        self,
        problem: PlanningProblem,
        schedule: str,
        switch_latency_s: float | None,
        clock: Callable[[], float] | None,
        brake_s: float,
        tell: Callable[[float], None] | None,
    ) -> None:
        super().__init__(problem, switch_latency_s, clock, brake_s, tell)
        self._found: list[Solution] = []
        self._relaxations: dict[float, Relaxed] = {}
        self.schedule = schedule
        self.relaxation = Relaxation.sized(problem)

    def plan(self, target: Target, limits: ChangeLimits | None = None, effort: Effort = "quick") -> Plan:
        """Choose a clock for every instruction.

        Raises:
            PlanError: the target cannot be met; the message says what can.
        """
        if target.budget is not None:
            found = self.fastest_within(target.budget, limits or ChangeLimits(), effort)
            return replace(self.plan_of(found.solution), power=found.planned(target.budget))
        return self.to_plan(self.solve(target, limits, effort))

    def solve(
        self, target: Target, limits: ChangeLimits | None = None, effort: Effort = "quick", *, search: bool = True
    ) -> Solution:
        """As `plan`, in the planner's own terms; never worse for a higher effort than for a lower one.

        Without `search` clocks are only rounded, which takes milliseconds.
        """
        limits = limits or ChangeLimits()
        if target.budget is not None:
            return self.fastest_within(target.budget, limits, effort).solution
        found: list[Solution] = []
        for spent in EFFORTS[: EFFORTS.index(effort) + 1]:
            try:
                found.append(self._solve(target, limits, spent, self.work(spent), search))
            except PlanError:
                if spent == effort and not found:
                    raise
        best = min(found, key=lambda one: self._cost(target, one))
        if target.kind in _ONE_BOUND:
            bound_j = max(one.relaxed.bound_j for one in found)
            best = replace(best, relaxed=replace(best.relaxed, bound_j=bound_j))
        return replace(best, cut_short=any(one.cut_short for one in found))

    def _cost(self, target: Target, solution: Solution) -> tuple[float, ...]:
        """What a target is to have least of."""
        if target.kind == "energy_budget":
            return solution.iteration_time_s, solution.energy_j
        besides_w = 0.0 if target.prices is None else target.prices.gpu_w * self.problem.graph.stages
        return (solution.energy_j + besides_w * solution.iteration_time_s,)

    def _solve(self, target: Target, limits: ChangeLimits, effort: Effort, work: Work, search: bool) -> Solution:
        full_s = self.problem.full_clock_time_s
        match target.kind:
            case "slowdown":
                found = self._by_deadline(full_s * (1 + target.value), limits, effort, work, search)
            case "deadline":
                found = self._by_deadline(self._as_given(target.value), limits, effort, work, search)
            case "straggler":
                until_s = self._as_given(target.value)
                found = self._near(self._relaxed(until_s), until_s, limits, effort, work, search, waits_until_s=until_s)
            case "cheapest":
                found = self._cheapest(limits, effort, work, search)
            case "energy_budget":
                return self._by_budget(target.value, limits, effort, work, search)
            case "money":
                assert target.prices is not None  # a target of money has them
                found = self._dearer(target.prices.gpu_w)._cheapest(limits, effort, work, search)
                end_s = found.iteration_time_s
                relaxed = self._relaxed(max(end_s, self.relaxation.shortest_s))
                cut_short = found.cut_short
                found = replace(self.priced(relaxed, found.assignment, end_s, limits), cut_short=cut_short)
            case _:
                return self.priced(self._relaxed(full_s), self.problem.full_clocks, full_s, limits)
        return self.best_known(found)

    def _as_given(self, deadline_s: float) -> float:
        """A deadline; the shortest iteration, or that of full clocks, where it is that but for the rounding of sums."""
        for end_s in (self.relaxation.shortest_s, self.problem.full_clock_time_s):
            if end_s * (1 - _SAME) <= deadline_s < end_s:
                return end_s
        return deadline_s

    def _relaxed(self, deadline_s: float) -> Relaxed:
        if deadline_s not in self._relaxations:
            self._relaxations[deadline_s] = self.relaxation.solve(deadline_s)
        return self._relaxations[deadline_s]

    @cached_property
    def _energy_minimum(self) -> Relaxed:
        return self.relaxation.cheapest()

    def _dearer(self, besides_w: float) -> Planner:
        """The same job where every second of a GPU costs that much more, whatever it does."""
        problem = replace(self.problem, blocking_power_w=self.problem.blocking_power_w + besides_w)
        return Planner.of(problem, self.schedule, self.switch_latency_s, self._clock, self._brake_s, self._tell)

    def fastest_within(self, budget: PowerBudget, limits: ChangeLimits, effort: Effort = "quick") -> Fastest:
        """The shortest iteration found that keeps a power budget, with all that it promises.

        Raises:
            PlanError: none keeps it; the message names the lowest.
        """
        from perseus_plugin.planning.power.fastest import fastest_within  # most plans are of no budget

        return fastest_within(self, budget, limits, effort, self.work(effort))

    def best_known(self, found: Solution) -> Solution:
        """The cheapest for its deadline of it and of those found before for shorter ones, or for fewer changes.

        Which clocks there are decides how near a plan comes to its bound, so that more time can end in a worse one.
        """
        known = [
            self.priced(found.relaxed, one.assignment, found.allowed_s, found.limits, found.waits_until_s)
            for one in self._found
            if one.limits.keep(found.limits) and one.iteration_time_s <= found.allowed_s
        ]
        best = replace(min([found, *known], key=lambda one: one.energy_j), cut_short=found.cut_short)
        if best.assignment is found.assignment:
            self._found.append(found)
        return best

    def _near(
        self,
        relaxed: Relaxed,
        allowed_s: float,
        limits: ChangeLimits,
        effort: Effort,
        work: Work,
        search: bool,
        waits_until_s: float | None = None,
        on_step: bool = False,
    ) -> Solution:
        """The best for a deadline; where that is far above its bound, of those for somewhat shorter ones too.

        What two searches find differs by more than what a little more time is worth. So all deadlines between two steps
        have the plan of the earlier one, unless their own is proven the best.
        """
        problem = self.problem

        def at(shorter: Relaxed, search: bool) -> Solution:
            found = self.discretise(shorter, shorter.deadline_s, limits, effort, work, search=search)
            assignments = [found.assignment]
            if search and not found.limited:  # the time that is left is of use
                slower = use_up_slack(problem, problem.choice(found.assignment), relaxed.deadline_s)
                assignments.append(problem.assignment(slower))
            kept = [one for one in assignments if one is found.assignment or not violated(problem, one, limits)]
            priced = [self.priced(relaxed, one, allowed_s, limits, waits_until_s) for one in kept]
            return min(priced, key=lambda one: one.energy_j)

        def near(found: Solution) -> bool:
            return found.energy_j <= found.relaxed.bound_j * (1 + _FAR)

        full_s, size = problem.full_clock_time_s, len(problem.instruction_nodes)
        slowdown = relaxed.deadline_s / full_s - 1
        # The energy minimum has a time of its own.
        between = search and not on_step and size <= _MANY and allowed_s <= relaxed.deadline_s
        between = between and limits == ChangeLimits() and 0 < _step_at(slowdown) < slowdown * (1 - _ON_STEP)
        own = search and (size <= SMALL or not between)
        best = self.discretise(relaxed, allowed_s, limits, effort, work, waits_until_s, search=own)
        if between and not best.proven:
            worth_w = relaxed.price_w - (problem.total_blocking_w if waits_until_s is None else 0.0)
            above_j = best.energy_j - best.relaxed.bound_j
            step = _step_at(slowdown, _WORTH * above_j / max(worth_w * full_s, _SAME))
            if step < slowdown * (1 - _ON_STEP):
                at_s = full_s * (1 + step)
                earlier = self._near(self._relaxed(at_s), at_s, limits, effort, work, search, waits_until_s, True)
                best = self.priced(relaxed, earlier.assignment, allowed_s, limits, waits_until_s)
                return replace(best, cut_short=work.cut_short)
        if search and not own:
            best = self.discretise(relaxed, allowed_s, limits, effort, work, waits_until_s)
        relaxed = best.relaxed
        # Where limits bind, plans for all shorter times have been searched, too.
        if near(best) or best.limited or relaxed.deadline_s <= full_s * (1 + _SAME):
            return best
        tried = _shorter_than(slowdown) if SMALL < size <= _MANY else []
        tried = tried[-(_TRIED_OF_FEW if search and size <= _FEW else _TRIED) :]
        found = list[tuple[Solution, Relaxed]]()
        for less in (0.0, *tried):
            with suppress(PlanError):  # so short an iteration may need more changes than are allowed
                shorter = self._relaxed(full_s * (1 + less))
                found.append((at(shorter, False), shorter))
        found.sort(key=lambda one: one[0].energy_j)
        for number, (rounded, shorter) in enumerate(found[: _SEARCHED if search else 1]):
            if number and work.done > _CHEAP:
                break
            with suppress(PlanError):
                searched = [at(shorter, True)] if search else []
                best = min([best, rounded, *searched], key=lambda one: one.energy_j)
        return replace(best, cut_short=work.cut_short)

    def _by_deadline(
        self, deadline_s: float, limits: ChangeLimits, effort: Effort, work: Work, search: bool
    ) -> Solution:
        relaxed = self._relaxed(deadline_s)
        if relaxed.price_w < self.problem.total_blocking_w:
            relaxed = self.relaxation.cheapest(at_most_s=deadline_s)
        return self._near(relaxed, deadline_s, limits, effort, work, search)

    def _cheapest(self, limits: ChangeLimits, effort: Effort, work: Work, search: bool) -> Solution:
        """As for a deadline that leaves all the time that can be of use; allowed is what it takes of that."""
        relaxed, problem = self._energy_minimum, self.problem
        # With few changes an instruction may be slower than where it takes least.
        slowest_s = [max(seconds for seconds, _ in rows.values()) for rows in problem.measured]
        end_s = problem.graph.iteration_time_s(problem.per_node(slowest_s) + problem.graph.constant_s)
        found = self._near(relaxed, max(end_s, problem.full_clock_time_s), limits, effort, work, search)
        found = min(found, self.full_clocks(found), key=lambda one: one.energy_j)
        return replace(found, allowed_s=max(relaxed.deadline_s, found.iteration_time_s))

    def _by_budget(self, budget_j: float, limits: ChangeLimits, effort: Effort, work: Work, search: bool) -> Solution:
        """Close in on the shortest deadline whose rounded plan keeps the budget; then the effort that was asked for."""
        high = self._cheapest(limits, "quick", work, search=False)
        if high.energy_j > budget_j and search:
            high = self._cheapest(limits, effort, work, search)
        if high.energy_j > budget_j:
            raise PlanError(
                f"energy budget: got {budget_j:.3f} J; the cheapest plan found takes {high.energy_j:.3f} J "
                f"(no plan takes less than {high.relaxed.bound_j:.3f} J)"
            )

        def rounded(deadline_s: float) -> tuple[float, Solution | None]:
            try:
                found = self.discretise(self._relaxed(deadline_s), deadline_s, limits, "quick", work, search=False)
            except PlanError:  # so short an iteration may need more changes than are allowed
                return math.inf, None
            return found.energy_j, found

        low = self.relaxation.shortest_s
        low_energy, at_low = rounded(low)
        if at_low is not None and low_energy <= budget_j:
            high = at_low
        for step in range(_BUDGET_STEPS):
            if high.relaxed.deadline_s - low < 1e-4 * low:
                break
            # Regula falsi on a convex curve creeps along one side; every other step halves the bracket instead.
            share = 0.5
            if step % 2 and math.isfinite(low_energy):
                share = (low_energy - budget_j) / max(low_energy - high.energy_j, 1e-12)
            middle = low + (high.relaxed.deadline_s - low) * min(max(share, 0.02), 0.98)
            energy_j, found = rounded(middle)
            if found is not None and energy_j <= budget_j:
                high = found
            else:
                low, low_energy = middle, energy_j
        full_s = self.problem.full_clock_time_s
        if full_s < high.iteration_time_s and not violated(self.problem, self.problem.full_clocks, limits):
            full = self.priced(self._relaxed(full_s), self.problem.full_clocks, full_s, limits)
            high = full if full.energy_j <= budget_j else high
        if search:
            high = self._shorter(high, budget_j, effort, work)
        return replace(high, cut_short=work.cut_short)

    def _shorter(self, kept: Solution, budget_j: float, effort: Effort, work: Work) -> Solution:
        """A shorter iteration within an energy budget, as what more effort saves allows for; or what there is."""
        problem, limits = self.problem, kept.limits
        found = [kept]
        if len(problem.instruction_nodes) <= SMALL and not violated(problem, kept.assignment, limits):
            choice = problem.choice(kept.assignment)
            relaxed = self._relaxed(max(kept.iteration_time_s, self.relaxation.shortest_s))
            choice = fastest_whole(problem, relaxed, choice, budget_j, work, WORK[effort] / 2)
            assignment = problem.assignment(choice)
            known = kept.assignment if violated(problem, assignment, limits) else assignment
            within, most = (Budget.energy(problem, budget_j),), WORK[effort] * _WHOLE
            faster = fastest_clocks(problem, known, within, limits.max_changes, work, most) or known
            for one in (known, faster):
                if not violated(problem, one, limits):
                    end_s = problem.graph.iteration_time_s(one.duration_s)
                    relaxed = self._relaxed(max(end_s, self.relaxation.shortest_s))
                    found.append(self.priced(relaxed, one, end_s, limits))
        else:
            allowed_s, low_s = kept.relaxed.deadline_s, self._deadline_of(budget_j, kept.relaxed.deadline_s)
            for share in _MORE_EFFORT:
                deadline_s = low_s + share * (allowed_s - low_s)
                with suppress(PlanError):
                    relaxed = self._relaxed(deadline_s)
                    found.append(self.discretise(relaxed, deadline_s, limits, effort, work))
        kept_ones = [one for one in found if one.energy_j <= budget_j]
        return min(kept_ones, key=lambda one: (one.iteration_time_s, one.energy_j))

    def _deadline_of(self, budget_j: float, longest_s: float) -> float:
        """The deadline, to a ten-thousandth, below which not even the bound keeps an energy budget."""
        low, high = self.relaxation.shortest_s, longest_s
        while high - low > _SHORTEST_TO * low:
            middle = (low + high) / 2
            if self._relaxed(middle).bound_j <= budget_j:
                high = middle
            else:
                low = middle
        return high

    def to_plan(self, solution: Solution) -> Plan:
        """The plan of a solution; full clocks, with waits at lower ones, instead where that is no worse."""
        if self.problem.full_clock_time_s <= solution.allowed_s:
            full = self.full_clocks(solution)
            solution = full if full.energy_j <= solution.energy_j else solution
        return self.plan_of(solution)

    def full_clocks(self, solution: Solution) -> Solution:
        """Every instruction at full clocks instead."""
        full = self.priced(
            solution.relaxed, self.problem.full_clocks, solution.allowed_s, solution.limits, solution.waits_until_s
        )
        return replace(full, cut_short=solution.cut_short)

    def plan_of(self, solution: Solution) -> Plan:
        """The plan of a solution, whatever it takes."""
        problem, until_s = self.problem, solution.waits_until_s
        baseline_s = problem.full_clock_time_s
        start, finish = problem.graph.times(solution.assignment.duration_s)
        return Plan(
            schedule=self.schedule,
            microbatches=problem.graph.microbatches,
            deadline_s=solution.allowed_s,
            iteration_time_s=float(finish.max()),
            energy_j=solution.energy_j,
            # The bound is exact up to float rounding, which must not put it above what has been achieved.
            energy_lower_bound_j=min(solution.relaxed.bound_j, solution.energy_j),
            baseline_time_s=baseline_s,
            baseline_energy_j=problem.full_clock_energy_until_j(baseline_s if until_s is None else until_s),
            stages=_stages(problem, solution.assignment.frequency_mhz.tolist(), start.tolist(), finish.tolist()),
            cut_short=solution.cut_short,
            waits=problem.waiting_costs.planned(solution.waits),
            waits_until_s=until_s,
        )


def _shorter_than(slowdown: float) -> list[float]:
    """Slowdowns somewhat below one, rising."""
    most = math.ceil(slowdown / _STEP)
    known = [*_FINE, *(_STEP * step for step in range(max(1, most - math.ceil(_WITHIN / _STEP)), most))]
    return [one for one in known if slowdown - _WITHIN <= one < slowdown * (1 - _SAME)]


def _step_at(slowdown: float, most: float = math.inf) -> float:
    """The last step until there, of those that are so long at most; itself where they would be very short."""
    step = next(step for up_to, step in _STEPS if slowdown <= up_to * (1 + _ON_STEP))
    while step > most and step >= _SHORTEST_STEP:
        step /= 5
    return slowdown if step < _SHORTEST_STEP else step * math.floor(slowdown / step * (1 + _ON_STEP))


def make_plan(
    graph: PipelineGraph,
    profile: Profile,
    *,
    blocking_power_w: float | Sequence[float],
    target: Target,
    limits: ChangeLimits | None = None,
    effort: Effort = "quick",
    full_clock_only: Collection[tuple[int, str]] = (),
    schedule: str = "custom",
    switch_latency_s: float | None = None,
) -> Plan:
    """Choose a clock for every instruction.

    The baseline is every instruction at the profile's highest clock. A plan whose deadline the baseline meets is
    never worse than it. While a constant-time node runs, its GPU counts as blocking.

    Args:
        graph: from `build_graph`.
        profile: must cover every (stage, kind) of the graph.
        blocking_power_w: power of a GPU that waits, for all stages or one each.
        target: slowdown, deadline, straggler, cheapest or energy budget.
        limits: on clock changes.
        effort: how much work to spend on coming closer to the lower bound.
        full_clock_only: (stage, kind) pairs that stay at the profile's highest clock.
        schedule: name to put into the plan.
        switch_latency_s: how long a clock change takes; None: unknown, and clocks are not lowered in waits.

    Raises:
        PlanError: the target cannot be met (the message says what can), or the profile does not fit the graph.
    """
    planner = Planner(
        graph,
        profile,
        blocking_power_w=blocking_power_w,
        full_clock_only=full_clock_only,
        schedule=schedule,
        switch_latency_s=switch_latency_s,
    )
    return planner.plan(target, limits, effort)


def _stages(
    problem: PlanningProblem, clocks: list[int], starts: list[float], finishes: list[float]
) -> tuple[tuple[PlannedInstruction, ...], ...]:
    graph = problem.graph
    stages = []
    for nodes in graph.stage_nodes:
        planned = []
        for node in nodes.tolist():
            instruction = graph.instructions[node]
            if instruction is not None:
                planned.append(PlannedInstruction(instruction, clocks[node], starts[node], finishes[node]))
        stages.append(tuple(planned))
    return tuple(stages)
