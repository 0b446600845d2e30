"""Plans with few clock changes.

A stage's iteration is cut into phases of one clock each. Where to cut is a shortest path at the relaxation's prices;
which clocks the phases get is a linear program over mixtures of clocks, rounded up. Prices somewhat nearer to the
linear program's own cut again, and again; what comes of that is improved by annealing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.few_changes.annealing import Annealing
from perseus_plugin.planning.few_changes.bound import LimitedBound
from perseus_plugin.planning.few_changes.dwelling import dwelling_phases
from perseus_plugin.planning.few_changes.phase_lp import PhaseMix, solve_phases
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks, assign, stage_clocks
from perseus_plugin.planning.few_changes.segmentation import Segments, segment
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.targets import ChangeLimits, Effort
from perseus_plugin.planning.work import Work

_ROUNDS = 40
# The relaxation's prices are near the best ones, a program's own belong to its cuts: they count for so much of those
# that cut next, after the first round, and for less with the root of the rounds.
_OWN_SHARE = 0.08
_SCALINGS = 16
_CUTTING = 0.45  # share of the work that is for programs
_FEWER = (128, 96, 64, 48, 32, 24, 16, 12, *range(8, 1, -1), 0)
_FEW_OF_THEM = (128, 64, 32, 16, 8, 4, 2, 0)
_STARTS = 16  # of these programs' phases, each cut in another way, the annealing begins with the best
_WORK: dict[Effort, float] = {"quick": 3.0, "normal": 5.0, "thorough": 90.0}
_LARGE = 160  # instructions from which a search may do all of that; in smaller jobs as much less
_LEAST = 0.1  # but this share
_ROUNDED = 0.25  # where nothing is to be searched for, this share is done
_SHARES = (0.25, 0.5, 0.75)  # between the relaxation's earliest and its latest times
_MANY = 4096  # instructions from which phases for a dwell are cut in one pass alone
# Cutting, per instruction: a part that is always there, and one per level and pair of clocks.
_CUT, _CUT_PAIR = 20e-6, 3.5e-9
# A pass that cuts for a dwell, per node.
_DWELL = 20e-6


def keep_limits(
    problem: PlanningProblem,
    relaxed: Relaxed,
    free: Assignment,
    limits: ChangeLimits,
    effort: Effort,
    deadline_s: float,
    work: Work,
    bound: LimitedBound | None = None,
    *,
    search: bool = True,
) -> Assignment:
    """`free` if it keeps the limits, else the best assignment found that does.

    Args:
        problem: graph and options.
        relaxed: the relaxation's optimum, for its prices.
        free: an assignment made without the limits.
        limits: to keep.
        effort: how much to search.
        deadline_s: to meet.
        work: what is done is added to it.
        bound: sees the prices that come up; None: nobody needs it.
        search: for the best that there is; else for one that will do.

    Raises:
        PlanError: no assignment that keeps the limits was found to meet the deadline.
    """
    if not violated(problem, free, limits):
        return free
    found = _search(problem, relaxed, free, limits, effort, deadline_s, work, bound, search)
    if found is None:
        raise PlanError(
            f"clock-change limits: with at most {limits.max_changes} changes and a dwell of {limits.min_dwell_s} s "
            f"no plan was found that ends by {deadline_s:.6f} s"
            + ("; the search was cut short by the clock" if work.cut_short else "")
        )
    return found


def fewer_changes(limits: ChangeLimits, *, every: bool) -> Iterator[ChangeLimits]:
    """Limits whose plans are tried too, so that more changes are never worse than these: powers of two.

    Args:
        limits: to be never worse.
        every: every fewer up to eight, and more of those beyond.
    """
    most = limits.max_changes or 0
    for count in _FEWER if every else _FEW_OF_THEM:
        if count < most:
            yield replace(limits, max_changes=count)


def violated(problem: PlanningProblem, assignment: Assignment, limits: ChangeLimits) -> list[int]:
    """Stages whose clock changes break the limits, by the assignment's own predicted times."""
    start, finish = problem.graph.times(assignment.duration_s)
    end = float(finish.max())
    broken = []
    for stage, nodes in enumerate(problem.graph.stage_nodes):
        own = nodes[problem.class_of[nodes] >= 0]
        when = change_times(assignment.frequency_mhz[own], start[own])
        if limits.max_changes is not None and len(when) > limits.max_changes:
            broken.append(stage)
        elif limits.min_dwell_s > 0 and len(when) > 1:
            dwell = np.diff(np.append(when, when[0] + end))
            if dwell.min() < limits.min_dwell_s:
                broken.append(stage)
    return broken


def change_times(frequency_mhz: IntArray, start_s: FloatArray) -> FloatArray:
    """When a stage's clock changes; the change back to the first clock is the first instruction's start."""
    changed = frequency_mhz != np.roll(frequency_mhz, 1)
    when: FloatArray = start_s[changed]
    return when


def _search(
    problem: PlanningProblem,
    relaxed: Relaxed,
    free: Assignment,
    limits: ChangeLimits,
    effort: Effort,
    deadline_s: float,
    work: Work,
    bound: LimitedBound | None,
    search: bool,
) -> Assignment | None:
    stages = stage_clocks(problem)
    size = min(1.0, max(_LEAST, len(problem.instruction_nodes) / _LARGE))
    most = _WORK[effort] * size * (1.0 if search else _ROUNDED)
    stop = work.done + most
    start_s = problem.graph.times(free.duration_s)[0]
    dwelling = _dwelling(problem, stages, relaxed, limits, deadline_s, work)
    mixes, candidates = list[PhaseMix](), dwelling
    large = bool(dwelling) and len(problem.instruction_nodes) >= _MANY
    if not large:
        mixes = _mixed(problem, stages, relaxed, start_s, limits, deadline_s, work, work.done + _CUTTING * most, bound)
        candidates = [*dwelling, *(mix.phases for mix in mixes)]
    candidates = candidates or _scaled(problem, stages, relaxed, start_s, limits, deadline_s, work)
    kept = [_keep_dwell(problem, stages, phases, limits) for phases in candidates[:_STARTS]]
    if kept and not large:
        second_w = float(mixes[0].sink_price_w.sum()) if mixes else _second_w(problem)
        annealing = Annealing(problem, stages, limits, deadline_s, second_w, work)
        kept.extend(annealing.run(kept, stop))
    found = [assign(problem, stages, phases) for phases in kept]
    if problem.full_clock_time_s <= deadline_s:
        found.append(problem.full_clocks)
    in_time = [one for one in found if problem.graph.iteration_time_s(one.duration_s) <= deadline_s]
    return min(
        (one for one in in_time if not violated(problem, one, limits)), key=lambda one: one.energy_j, default=None
    )


def _second_w(problem: PlanningProblem) -> float:
    """About what a second of the iteration is worth, where no program has told: what all stages save per second."""
    slopes = [0.0] * problem.graph.stages
    for (stage, _), options in zip(problem.keys, problem.classes, strict=True):
        if len(options.time_s) > 1:
            first, second = options.hull[:2]
            saved_j = options.energy_j[first] - options.energy_j[second]
            slopes[stage] = max(slopes[stage], float(saved_j / (options.time_s[second] - options.time_s[first])))
    return sum(slopes)


def _dwelling(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    relaxed: Relaxed,
    limits: ChangeLimits,
    deadline_s: float,
    work: Work,
) -> list[Phases]:
    """Phases that are cut by the relaxation's times, where only the dwell is limited and the deadline is kept."""
    found = list[Phases]()
    for share in _SHARES if limits.max_changes is None else ():
        work.done += _DWELL * len(problem.graph)
        aim_s = relaxed.earliest_finish_s * (1 - share) + relaxed.latest_finish_s * share
        phases = dwelling_phases(problem, stages, aim_s, deadline_s, limits.min_dwell_s)
        if problem.graph.iteration_time_s(assign(problem, stages, phases).duration_s) <= deadline_s:
            found.append(phases)
    return found


def _mixed(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    relaxed: Relaxed,
    start_s: FloatArray,
    limits: ChangeLimits,
    deadline_s: float,
    work: Work,
    stop: float,
    bound: LimitedBound | None,
) -> list[PhaseMix]:
    """Phases cut at the relaxation's prices, then again and again somewhat nearer to their programs' prices.

    Those whose program takes the least energy come first, of those that are cut alike one; none if the programs are
    too large for the work.
    """
    price, rest_j = relaxed.instruction_price_w, 0.0 if bound is None else bound.rest_j
    mixes: dict[tuple[tuple[int, ...], ...], PhaseMix] = {}
    solved: dict[tuple[object, ...], tuple[PhaseMix, float]] = {}
    for done in range(1, _ROUNDS + 1):
        phases = _cut(stages, price, start_s, limits, work)
        if bound is not None:
            bound.see(price, rest_j, work)
        # Prices settle, and the same cuts come again: the same program, which counts as the work that it was.
        mix, took = solved.get(phases.program, (None, 0.0))
        if mix is not None and work.done + took < stop:
            work.done += took
        else:
            before = work.done
            mix = solve_phases(problem, stages, phases, deadline_s, work, stop)
            if mix is None:
                break
            solved[phases.program] = mix, work.done - before
        mixes[mix.phases.begins] = min(mixes.get(mix.phases.begins, mix), mix, key=lambda one: one.energy_j)
        nearer = _OWN_SHARE / math.sqrt(done)
        price = price + nearer * (mix.price_w - price)
        if bound is not None:
            rest_j += nearer * (bound.rest(mix.edge_price_w, mix.sink_price_w) - rest_j)
        if work.over(stop):
            break
    return sorted(mixes.values(), key=lambda mix: mix.energy_j)


def _scaled(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    relaxed: Relaxed,
    start_s: FloatArray,
    limits: ChangeLimits,
    deadline_s: float,
    work: Work,
) -> list[Phases]:
    """Phases and clocks at the relaxation's prices times the smallest factor that meets the deadline."""
    low, high, found = 0.0, 1.0, list[Phases]()
    for _ in range(_SCALINGS):
        factor = (low + high) / 2 if found else high
        phases = _cut(stages, relaxed.instruction_price_w * factor, start_s, limits, work)
        duration = assign(problem, stages, phases).duration_s
        if problem.graph.iteration_time_s(duration) <= deadline_s:
            found, high = [phases], factor
        else:
            low, high = factor, high if found else 4 * high
    return found


def _cut(
    stages: tuple[StageClocks, ...], price_w: FloatArray, start_s: FloatArray, limits: ChangeLimits, work: Work
) -> Phases:
    """The best phases of every stage at given prices of its instructions' time."""
    begins, clocks = [], []
    levels = 1 if limits.max_changes is None else limits.max_changes + 1
    for stage in stages:
        found = Segments((0,), (0,))
        if len(stage.nodes):
            cost = stage.energy_j + price_w[stage.nodes, None] * stage.time_s
            work.done += len(cost) * (_CUT + _CUT_PAIR * levels * cost.shape[1] ** 2)
            found = segment(cost, start_s[stage.nodes], limits.max_changes, limits.min_dwell_s)
        begins.append(found.begins)
        clocks.append(found.clocks)
    return Phases(tuple(begins), tuple(clocks))


def _keep_dwell(
    problem: PlanningProblem, stages: tuple[StageClocks, ...], phases: Phases, limits: ChangeLimits
) -> Phases:
    """Join phases that turned out too short to a neighbour, both at the faster clock of the two."""
    while True:
        assigned = assign(problem, stages, phases)
        broken = [stage for stage in violated(problem, assigned, limits) if len(phases.clocks[stage]) > 1]
        if not broken:
            return phases
        start_s = problem.graph.times(assigned.duration_s)[0]
        for stage in broken:
            clocks = phases.clocks[stage]
            when_s = start_s[stages[stage].nodes[list(phases.begins[stage])]]
            phase = 1 + int(np.diff(when_s).argmin())
            phases = phases.merged(stage, phase, min(clocks[phase - 1], clocks[phase]))
