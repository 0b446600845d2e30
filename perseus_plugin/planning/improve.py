"""From a good plan towards the lower bound: windows of the iteration solved exactly, and good patterns repeated.

Where a stage would run between two clocks in the relaxation, a plan has to alternate, and which microbatch runs at
which clock in which stage is a puzzle that rounding solves badly. A window of a few microbatches is small enough to
be solved exactly. In the steady state all windows look alike, so what one window found is tried in the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.rounding import round_to_deadline, use_up_slack
from perseus_plugin.planning.window import WindowLimits, regrets, solve_window
from perseus_plugin.planning.work import Work


@dataclass(frozen=True, slots=True)
class SearchPass:
    """One pass over the iteration, window by window.

    Attributes:
        nodes: about how many instructions a window holds.
        offset: where the first window begins, as a share of a window.
        limits: on the search in a window.
        repeat: trust a pattern that carried over unimproved twice, and only repeat it from there.
    """

    nodes: int
    offset: float
    limits: WindowLimits
    repeat: bool


def _passes(*rows: tuple[int, float, float, float, bool]) -> tuple[SearchPass, ...]:
    return tuple(
        SearchPass(nodes, offset, WindowLimits(work, regret), repeat) for nodes, offset, work, regret, repeat in rows
    )


# Instructions in a window, offset, work, regret, repeat.
NORMAL = _passes(
    (64, 0.0, 0.1, 0.02, True),
    (64, 0.5, 0.1, 0.02, True),
    (96, 0.25, 0.2, 0.02, True),
    (64, 0.75, 0.2, 0.03, True),
)
QUICK = NORMAL[:1]
THOROUGH = _passes(
    (64, 0.0, 0.2, 0.02, True),
    (64, 0.5, 0.2, 0.02, True),
    (96, 0.0, 0.5, 0.02, True),
    (96, 0.5, 0.5, 0.02, True),
    (64, 0.25, 0.5, 0.03, False),
    (96, 0.75, 0.5, 0.03, False),
    (128, 0.25, 1.0, 0.02, False),
    (96, 0.25, 1.0, 0.02, False),
)

# Making what was found meet the deadline, per level of the graph.
_TAKE_LEVEL = 20e-6

_ROUNDED = 6e-5  # share of a budget by which a window's costs may be off


def improve(
    problem: PlanningProblem,
    relaxed: Relaxed,
    choice: IntArray,
    passes: tuple[SearchPass, ...],
    work: Work,
    most: float,
) -> IntArray:
    """Search for a better choice that meets the same deadline; never returns a worse one.

    Args:
        problem: graph and options.
        relaxed: the relaxation's optimum for the deadline.
        choice: shape (nodes,), meets the deadline.
        passes: what to do.
        work: what is done is added to it.
        most: stop after so many units of work.
    """
    search = _Search(problem, relaxed, choice, work, work.done + most)
    for one in passes:
        search.run(one)
    return search.choice


def search_whole(
    problem: PlanningProblem,
    relaxed: Relaxed,
    choice: IntArray,
    allowed_s: float,
    end_price_w: float,
    work: Work,
    most: float,
) -> tuple[IntArray, bool]:
    """Search a small job as one window, with every option that can be in a better plan; never returns a worse one.

    What two clocks are to a long iteration, one instruction is to a short one: the best plan may end well after the
    relaxation's optimum, or hold an option far from it. An option whose reduced cost is above the gap cannot be in a
    better plan.

    Args:
        problem: graph and options; at most `work.SMALL` instructions are worth it.
        relaxed: the relaxation's optimum for the deadline, or for the cheapest one before it.
        choice: shape (nodes,), meets the deadline.
        allowed_s: the deadline.
        end_price_w: blocking power of all stages if they wait no longer than the iteration takes, else 0.
        work: what is done is added to it.
        most: CP-SAT's deterministic time.

    Returns:
        A choice, and whether it was proven the best.
    """

    def cost_j(candidate: IntArray) -> float:
        end_s = problem.graph.iteration_time_s(problem.durations(candidate))
        return problem.effective_energy_j(candidate) + end_price_w * end_s

    now_j = cost_j(choice)
    waited_j = 0.0 if end_price_w else problem.total_blocking_w * relaxed.deadline_s
    gap = max(0.0, now_j + waited_j - relaxed.bound_j) / problem.mean_energy_j
    nodes = np.arange(len(problem.graph))
    limits = WindowLimits(most, max(gap, NORMAL[0].limits.max_regret))
    regret_j = regrets(problem, relaxed.instruction_price_w)
    found, proven = solve_window(problem, choice, allowed_s, nodes, regret_j, limits, work, end_price_w)
    found = _repaired(problem, found, allowed_s)
    return (found if cost_j(found) < now_j else choice), proven


def fastest_whole(
    problem: PlanningProblem, relaxed: Relaxed, choice: IntArray, budget_j: float, work: Work, most: float
) -> IntArray:
    """Search a small job for the shortest iteration that keeps a budget; never returns a longer one.

    Args:
        problem: graph and options; at most `work.SMALL` instructions are worth it.
        relaxed: the relaxation's optimum for the time that `choice` takes.
        choice: shape (nodes,), keeps the budget.
        budget_j: of energy, blocking power until the end included.
        work: what is done is added to it.
        most: CP-SAT's deterministic time.
    """
    blocking_w = problem.total_blocking_w
    now_s = problem.graph.iteration_time_s(problem.durations(choice))
    # A shorter iteration takes no more than the budget and blocking power until now.
    gap_j = budget_j + blocking_w * (now_s - problem.shortest_s) - relaxed.bound_j
    limits = WindowLimits(most, max(gap_j / problem.mean_energy_j, NORMAL[0].limits.max_regret))
    regret_j, nodes = regrets(problem, relaxed.instruction_price_w), np.arange(len(problem.graph))
    # Those that may keep the budget, then those that should, then those that surely do.
    for within_j in (budget_j * (1 + _ROUNDED), budget_j, budget_j * (1 - _ROUNDED)):
        found, _ = solve_window(problem, choice, now_s, nodes, regret_j, limits, work, blocking_w, within_j)
        end_s = problem.graph.iteration_time_s(problem.durations(found))
        if problem.effective_energy_j(found) + blocking_w * end_s <= budget_j and end_s < now_s:
            return found
    return choice


def _repaired(problem: PlanningProblem, found: IntArray, deadline_s: float) -> IntArray:
    """What a window found, which may miss the deadline by microseconds, made to meet it."""
    finish = problem.graph.times(problem.durations(found))[1]
    return round_to_deadline(problem, finish + 1e-6, deadline_s)


class _Search:
    def __init__(self, problem: PlanningProblem, relaxed: Relaxed, choice: IntArray, work: Work, until: float) -> None:
        self.problem = problem
        self.deadline_s = relaxed.deadline_s
        self.choice = choice
        self.energy_j = problem.effective_energy_j(choice)
        self.work, self.until = work, until
        self.regret_j = regrets(problem, relaxed.instruction_price_w)
        self.when_s: FloatArray = (relaxed.earliest_finish_s + relaxed.latest_finish_s) / 2

    def run(self, one: SearchPass) -> None:
        graph = self.problem.graph
        per_microbatch = len(self.problem.instruction_nodes) / graph.microbatches
        shift = max(1, round(one.nodes / per_microbatch))
        earlier = self._earlier(shift)
        width = self._width(earlier, shift)
        begin = -one.offset * width
        gained, streak = 0.0, 0
        while begin < self.deadline_s and not self.work.over(self.until):
            inside = (self.when_s >= begin) & (self.when_s < begin + width) & (self.problem.class_of >= 0)
            nodes = np.flatnonzero(inside)
            begin += width
            if not len(nodes):
                continue
            carried = self._carry_over(nodes, earlier)
            streak = streak + 1 if carried > 0 and carried >= 0.7 * gained else 0
            if one.repeat and streak > 2:
                continue
            found, _ = solve_window(
                self.problem, self.choice, self.deadline_s, nodes, self.regret_j, one.limits, self.work
            )
            improved = self._take(found)
            streak = 0 if improved > 0.1 * carried else streak
            gained = carried + improved

    def _earlier(self, shift: int) -> IntArray:
        """Shape (nodes,): the same instruction `shift` microbatches earlier, -1 where there is none."""
        graph = self.problem.graph
        earlier = np.full(len(graph), -1, dtype=np.int64)
        for node, instruction in enumerate(graph.instructions):
            if instruction is not None and instruction.microbatch >= shift:
                before = replace(instruction, microbatch=instruction.microbatch - shift)
                earlier[node] = graph.node_of.get(before, -1)
        return earlier

    def _width(self, earlier: IntArray, shift: int) -> float:
        """Length of a window: that of `shift` microbatches in the steady state."""
        has = earlier >= 0
        if has.any():
            median = float(np.median(self.when_s[has] - self.when_s[earlier[has]]))
            if median > 0:
                return median
        return self.deadline_s * min(1.0, shift / self.problem.graph.microbatches)

    def _carry_over(self, nodes: IntArray, earlier: IntArray) -> float:
        """Try what the window one shift earlier runs at; returns the energy gained."""
        known = earlier[nodes] >= 0
        tried = self.choice.copy()
        tried[nodes[known]] = self.choice[earlier[nodes[known]]]
        return self._take(tried)

    def _take(self, found: IntArray) -> float:
        """Make `found` meet the deadline and keep it if it is better; returns the energy gained."""
        if np.array_equal(found, self.choice):
            return 0.0
        self.work.done += _TAKE_LEVEL * len(self.problem.graph.level_start)
        repaired = _repaired(self.problem, found, self.deadline_s)
        repaired = use_up_slack(self.problem, repaired, self.deadline_s)
        energy = self.problem.effective_energy_j(repaired)
        gain = self.energy_j - energy
        if gain <= 0:
            return 0.0
        self.choice, self.energy_j = repaired, energy
        return gain
