"""From a relaxation's optimum to clocks that exist, and what they take with their waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.few_changes.bound import LimitedBound
from perseus_plugin.planning.few_changes.limits import fewer_changes, keep_limits, violated
from perseus_plugin.planning.improve import NORMAL, QUICK, THOROUGH, improve, search_whole
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.rounding import round_to_deadline, use_up_slack
from perseus_plugin.planning.targets import ChangeLimits, Effort
from perseus_plugin.planning.waiting import Waits
from perseus_plugin.planning.whole import cheapest_clocks
from perseus_plugin.planning.work import BRAKE_S, SMALL, Work

_PASSES = {"quick": QUICK, "normal": NORMAL, "thorough": THOROUGH}
WORK: dict[Effort, float] = {"quick": 0.7, "normal": 5.5, "thorough": 100.0}
"""What a search in windows may do, in units of `planning.work`; one of a small job as a whole may do half of that."""
_OF_FEW = 1 / 8  # the same for one with few changes, as fewer ones may have to be searched for too
# What tightening the bound for few changes may do, in the same units.
_BOUND_WORK: dict[Effort, float] = {"quick": 0.0, "normal": 9.0, "thorough": 30.0}


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice of options with the relaxation that it came from.

    Attributes:
        assignment: a clock for every instruction.
        relaxed: the relaxation's optimum; with the bound for so few clock changes, where it has more.
        allowed_s: the deadline that was asked for, at least `relaxed.deadline_s`.
        energy_j: energy of the choice, blocking included.
        iteration_time_s: of the choice.
        limits: on clock changes, which it keeps.
        waits: at which clock it waits.
        waits_until_s: when something else ends the iteration; None: it ends with its last instruction.
        cut_short: whether the clock ended the search; see `planning.work`.
        limited: whether clocks were searched for anew to keep the limits.
        proven: whether no other choice takes less, if all waits are at their instruction's clock.
    """

    assignment: Assignment
    relaxed: Relaxed
    allowed_s: float
    energy_j: float
    iteration_time_s: float
    limits: ChangeLimits
    waits: Waits
    waits_until_s: float | None = None
    cut_short: bool = False
    limited: bool = False
    proven: bool = False


class Discretiser:
    """Finds and prices choices of clocks of one problem.

    Args:
        problem: graph and options.
        switch_latency_s: how long a clock change takes; None: unknown, and clocks are not lowered in waits.
        clock: monotonic, seconds, for the last brake of searches.
        brake_s: when that acts, if it is sooner than usual.
        tell: told now and then how many units of `WORK` searches have done since.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        switch_latency_s: float | None,
        clock: Callable[[], float] | None = None,
        brake_s: float = math.inf,
        tell: Callable[[float], None] | None = None,
    ) -> None:
        self.problem, self.switch_latency_s = problem, switch_latency_s
        self._clock, self._brake_s, self._tell = clock, brake_s, tell

    def work(self, effort: Effort) -> Work:
        """For a search that begins now."""
        return Work(min(BRAKE_S[effort], self._brake_s), self._clock, self._tell)

    def discretise(
        self,
        relaxed: Relaxed,
        allowed_s: float,
        limits: ChangeLimits,
        effort: Effort,
        work: Work | None = None,
        waits_until_s: float | None = None,
        *,
        search: bool = True,
    ) -> Solution:
        """Clocks for a relaxation's optimum, as `plan` finds them; what is done is added to `work`.

        Without `search` they are rounded, which takes milliseconds.
        """
        problem, deadline_s = self.problem, relaxed.deadline_s
        work = work or self.work(effort)

        def priced(assignment: Assignment) -> Solution:
            return self.priced(relaxed, assignment, allowed_s, limits, waits_until_s)

        choices = []
        for share in (0.0, 0.5, 1.0):
            aim = relaxed.earliest_finish_s * (1 - share) + relaxed.latest_finish_s * share
            rounded = round_to_deadline(problem, aim, deadline_s)
            choices.append(use_up_slack(problem, rounded, deadline_s))
        found = [priced(problem.assignment(choice)) for choice in choices]
        best = min(range(len(choices)), key=lambda k: found[k].energy_j)
        choice, solution = choices[best], found[best]
        small, proven = len(problem.instruction_nodes) <= SMALL, False
        if search and not violated(problem, solution.assignment, limits):
            if effort != "quick" or not small:
                choice = improve(problem, relaxed, choice, _PASSES[effort], work, WORK[effort])
            if small:
                end_price_w = problem.total_blocking_w if waits_until_s is None else 0.0
                most = WORK[effort] / 2
                choice, proven = search_whole(problem, relaxed, choice, allowed_s, end_price_w, work, most)
            # The searches price all waits alike.
            solution = min(solution, priced(problem.assignment(choice)), key=lambda one: one.energy_j)
        bound = None
        if limits.max_changes is not None and violated(problem, solution.assignment, limits):
            bound = LimitedBound(problem, relaxed, limits.max_changes, allowed_s, waits_until_s)
        free = solution.assignment

        def kept(limits: ChangeLimits, seen_by: LimitedBound | None = None) -> Assignment:
            try:
                return keep_limits(problem, relaxed, free, limits, effort, deadline_s, work, seen_by, search=search)
            except PlanError:
                if allowed_s <= deadline_s:
                    raise
                # The cheapest iteration may be too short for few changes where a longer one is not.
                return keep_limits(problem, relaxed, free, limits, effort, allowed_s, work, seen_by, search=search)

        whole = search and small and bound is not None

        def within(limits: ChangeLimits, seen_by: LimitedBound | None) -> tuple[Solution, bool]:
            """The best that was found with so few changes, and whether it is proven to be that."""
            found, failure = list[Solution](), None
            try:
                found.append(priced(kept(limits, seen_by)))
            except PlanError as error:
                if not whole:
                    raise
                failure = error
            known, sure = found[0].assignment if found else None, False
            if whole:
                end_price_w = problem.total_blocking_w if waits_until_s is None else 0.0
                best, sure = cheapest_clocks(
                    problem, relaxed, known, allowed_s, end_price_w, limits.max_changes, work, WORK[effort] * _OF_FEW
                )
                keeps = best is not None and not violated(problem, best, limits)
                # Where waits can be lowered, fewer changes leave more for them.
                sure = sure and keeps and problem.waiting_costs.is_constant
                if best is not None and keeps:
                    found.append(priced(best))
            if failure is not None and not found:
                raise failure
            return min(found, key=lambda one: one.energy_j), sure

        limited, sure = bool(violated(problem, free, limits)), False
        if limited:
            solution, sure = within(limits, bound)
        if bound is not None and search:
            bound.tighten(deadline_s, work, work.done + _BOUND_WORK[effort])
            # Each takes as long as the search itself: a job that waits for its first plan is not kept for these.
            every = small or effort == "thorough"
            for fewer in fewer_changes(limits, every=every) if not sure and (every or effort != "quick") else ():
                # Prices that bound plans of many changes bound those of fewer, too.
                of_fewer = bound.of_fewer(fewer.max_changes or 0, work)
                if of_fewer.bound_j >= solution.energy_j:
                    break
                # A search sees to its bound as it does where so few are all that is asked for, and finds the same.
                with suppress(PlanError):
                    solution = min(solution, within(fewer, of_fewer)[0], key=lambda one: one.energy_j)
        if bound is not None:
            relaxed = replace(relaxed, bound_j=bound.bound_j)
        proven = proven and not limited
        return replace(solution, relaxed=relaxed, cut_short=work.cut_short, limited=limited, proven=proven)

    def priced(
        self,
        relaxed: Relaxed,
        assignment: Assignment,
        allowed_s: float,
        limits: ChangeLimits,
        waits_until_s: float | None = None,
    ) -> Solution:
        """An assignment with the clocks of its waits and all that it takes."""
        problem = self.problem
        start_s, finish_s = problem.graph.times(assignment.duration_s)
        iteration_time_s = float(finish_s.max())
        end_s = iteration_time_s if waits_until_s is None else waits_until_s
        waits = problem.waiting_costs.decide(
            assignment.frequency_mhz, start_s, finish_s, end_s, self.switch_latency_s, limits
        )
        energy_j = assignment.energy_j + problem.total_blocking_w * end_s + waits.extra_j
        return Solution(
            assignment, relaxed, allowed_s, energy_j, iteration_time_s, limits, waits, waits_until_s=waits_until_s
        )

    def stage_energy_j(self, solution: Solution) -> FloatArray:
        """Shape (stages,): energy of each stage's GPU over an iteration, blocking included."""
        problem, end_s = self.problem, solution.iteration_time_s
        time_s, watts = problem.at_clocks(solution.assignment.frequency_mhz)
        effective_j = np.bincount(problem.graph.stage, weights=time_s * watts, minlength=problem.graph.stages)
        found: FloatArray = effective_j + problem.blocking_power_w * end_s + solution.waits.stage_extra_j
        return found
