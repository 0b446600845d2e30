"""From a graph and a profile to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import PipelineGraph
from perseus_plugin.planning.discretise import Discretiser, Solution
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.plan import Plan, PlannedInstruction
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.power.fastest import Fastest, fastest_within
from perseus_plugin.planning.relaxation import Relaxation
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target
from perseus_plugin.planning.work import BRAKE_S, Work
from perseus_plugin.profiling.profile import Profile

__all__ = ["ChangeLimits", "Effort", "Planner", "Solution", "Target", "make_plan"]

_BUDGET_STEPS = 12
_FAR = 0.005  # share above the bound from which a plan for less time may be the better one
_SAME = 1e-9


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
    ) -> None:
        super().__init__(build_problem(graph, profile, blocking_power_w, full_clock_only), switch_latency_s, clock)
        self._found: list[Solution] = []
        self.schedule = schedule
        self.relaxation = Relaxation.sized(self.problem)

    def plan(self, target: Target, limits: ChangeLimits | None = None, effort: Effort = "quick") -> Plan:
        """Choose a clock for every instruction.

        Raises:
            PlanError: the target cannot be met; the message says what can.
        """
        if target.budget is not None:
            found = self.fastest_within(target.budget, limits or ChangeLimits(), effort)
            return replace(self.plan_of(found.solution), power=found.planned(target.budget))
        return self.to_plan(self.solve(target, limits, effort))

    def solve(self, target: Target, limits: ChangeLimits | None = None, effort: Effort = "quick") -> Solution:
        """As `plan`, in the planner's own terms."""
        problem = self.problem
        limits = limits or ChangeLimits()
        work = Work(BRAKE_S[effort], self._clock)
        match target.kind:
            case "slowdown":
                found = self._by_deadline(problem.full_clock_time_s * (1 + target.value), limits, effort, work)
            case "deadline":
                found = self._by_deadline(target.value, limits, effort, work)
            case "straggler":
                relaxed = self.relaxation.solve(target.value)
                found = self.discretise(relaxed, target.value, limits, effort, work, waits_until_s=target.value)
                found = self._at_full_clock_time(found, effort, work)
            case "cheapest":
                relaxed = self.relaxation.cheapest()
                found = self.discretise(relaxed, relaxed.deadline_s, limits, effort, work)
            case "energy_budget":
                return self._by_budget(target.value, limits, effort, work)
            case "money":
                assert target.prices is not None  # a target of money has them
                relaxed = self.relaxation.cheapest(besides_w=target.prices.gpu_w * problem.graph.stages)
                found = self.discretise(relaxed, relaxed.deadline_s, limits, effort, work)
            case "full":
                relaxed = self.relaxation.solve(problem.full_clock_time_s)
                return self.priced(relaxed, problem.full_clocks, problem.full_clock_time_s, limits)
            case "power_budget":
                assert target.budget is not None  # a target of power has one
                return self.fastest_within(target.budget, limits, effort).solution
        return self.best_known(found)

    def fastest_within(self, budget: PowerBudget, limits: ChangeLimits, effort: Effort = "quick") -> Fastest:
        """The shortest iteration found that keeps a power budget, with all that it promises.

        Raises:
            PlanError: none keeps it; the message names the lowest.
        """
        return fastest_within(self, budget, limits, effort, Work(BRAKE_S[effort], self._clock))

    def best_known(self, found: Solution) -> Solution:
        """The cheapest for its deadline of it and of those that this planner has found for shorter ones.

        Which clocks there are decides how near a plan comes to its bound, so that more time can end in a worse one.
        """
        known = [
            self.priced(found.relaxed, one.assignment, found.allowed_s, found.limits, found.waits_until_s)
            for one in self._found
            if one.limits == found.limits and one.iteration_time_s <= found.allowed_s
        ]
        best = replace(min([found, *known], key=lambda one: one.energy_j), cut_short=found.cut_short)
        if best.assignment is found.assignment:
            self._found.append(found)
        return best

    def _at_full_clock_time(self, found: Solution, effort: Effort, work: Work) -> Solution:
        """Where a plan is far above its bound, that for the time of full clocks, if it is better."""
        shorter_s = self.problem.full_clock_time_s
        if found.energy_j <= found.relaxed.bound_j * (1 + _FAR) or found.allowed_s <= shorter_s * (1 + _SAME):
            return found
        try:
            relaxed = self.relaxation.solve(shorter_s)
            shorter = self.discretise(relaxed, shorter_s, found.limits, effort, work)
        except PlanError:  # so short an iteration may need more changes than are allowed
            return replace(found, cut_short=work.cut_short)
        shorter = self.priced(found.relaxed, shorter.assignment, found.allowed_s, found.limits, found.waits_until_s)
        return replace(min(found, shorter, key=lambda one: one.energy_j), cut_short=work.cut_short)

    def _by_deadline(self, deadline_s: float, limits: ChangeLimits, effort: Effort, work: Work) -> Solution:
        relaxed = self.relaxation.solve(deadline_s)
        if relaxed.price_w < self.problem.total_blocking_w:
            relaxed = self.relaxation.cheapest(at_most_s=deadline_s)
        found = self.discretise(relaxed, deadline_s, limits, effort, work)
        return self._at_full_clock_time(found, effort, work)

    def _by_budget(self, budget_j: float, limits: ChangeLimits, effort: Effort, work: Work) -> Solution:
        """Close in on the shortest deadline whose quick plan keeps the budget; then the effort that was asked for."""
        cheapest = self.relaxation.cheapest()
        best = self.discretise(cheapest, cheapest.deadline_s, limits, "quick", work)
        if best.energy_j > budget_j and effort != "quick":
            best = self.discretise(cheapest, cheapest.deadline_s, limits, effort, work)
        if best.energy_j > budget_j:
            raise PlanError(
                f"energy budget: got {budget_j:.3f} J; the cheapest plan found takes {best.energy_j:.3f} J "
                f"(no plan takes less than {cheapest.bound_j:.3f} J)"
            )
        low, high = self.relaxation.shortest_s, best
        at_low = self.discretise(self.relaxation.solve(low), low, limits, "quick", work)
        if at_low.energy_j <= budget_j:
            return self._with_effort(at_low, limits, effort, work)
        low_energy = at_low.energy_j
        for step in range(_BUDGET_STEPS):
            # Regula falsi on a convex curve creeps along one side; every other step halves the bracket instead.
            share = (low_energy - budget_j) / max(low_energy - high.energy_j, 1e-12) if step % 2 else 0.5
            middle = low + (high.relaxed.deadline_s - low) * min(max(share, 0.02), 0.98)
            found = self.discretise(self.relaxation.solve(middle), middle, limits, "quick", work)
            if found.energy_j <= budget_j:
                high = found
            else:
                low, low_energy = middle, found.energy_j
            if high.relaxed.deadline_s - low < 1e-4 * low:
                break
        return self._with_effort(high, limits, effort, work)

    def _with_effort(self, quick: Solution, limits: ChangeLimits, effort: Effort, work: Work) -> Solution:
        """The same deadline with more effort, if that is better."""
        if effort == "quick":
            return replace(quick, cut_short=work.cut_short)
        more = self.discretise(quick.relaxed, quick.allowed_s, limits, effort, work)
        return replace(min(quick, more, key=lambda solution: solution.energy_j), cut_short=work.cut_short)

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
