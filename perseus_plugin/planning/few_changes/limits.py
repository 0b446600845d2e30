"""Plans with few clock changes.

A stage's iteration is cut into phases of one clock each. Where to cut is a shortest path at the relaxation's prices;
which clocks the phases get is a linear program over mixtures of clocks, rounded up and then improved by moves on
single phases, pairs of phases and cuts. The linear program's own prices cut again, until that gains nothing.
"""

from __future__ import annotations

import time

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.few_changes.phase_lp import PhaseMix, solve_phases
from perseus_plugin.planning.few_changes.phases import Phases, PhaseSearch, StageClocks, assign, stage_clocks
from perseus_plugin.planning.few_changes.segmentation import Segments, segment
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.targets import ChangeLimits, Effort

_ROUNDS = 20
_TRIED = 3
_SCALINGS = 16
_SEARCH_S = {"quick": 2.0, "normal": 15.0, "thorough": 90.0}


def keep_limits(
    problem: PlanningProblem,
    relaxed: Relaxed,
    free: Assignment,
    limits: ChangeLimits,
    effort: Effort,
    deadline_s: float,
) -> Assignment:
    """`free` if it keeps the limits, else the best assignment found that does.

    Args:
        problem: graph and options.
        relaxed: the relaxation's optimum, for its prices.
        free: an assignment made without the limits.
        limits: to keep.
        effort: how long to search.
        deadline_s: to meet.

    Raises:
        PlanError: no assignment that keeps the limits was found to meet the deadline.
    """
    if not violated(problem, free, limits):
        return free
    found = _search(problem, relaxed, free, limits, effort, deadline_s)
    if found is None:
        raise PlanError(
            f"clock-change limits: with at most {limits.max_changes} changes and a dwell of {limits.min_dwell_s} s "
            f"no plan was found that ends by {deadline_s:.6f} s"
        )
    return found


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
) -> Assignment | None:
    stages = stage_clocks(problem)
    stop = time.monotonic() + _SEARCH_S[effort]
    best = problem.full_clocks if problem.full_clock_time_s <= deadline_s else None
    start_s = problem.graph.times(free.duration_s)[0]
    candidates = _mixed(problem, stages, relaxed, start_s, limits, deadline_s, stop - _SEARCH_S[effort] / 2) or _scaled(
        problem, stages, relaxed, start_s, limits, deadline_s
    )
    # A short search from every candidate, then a long one from the best.
    short = 0.4 * max(0.0, stop - time.monotonic()) / max(1, len(candidates))
    tried = []
    for at, phases in enumerate(candidates):
        searched = PhaseSearch(problem, stages, deadline_s, time.monotonic() + short).run(phases)
        tried.append((assign(problem, stages, searched).energy_j, at, searched))
    for left, (_, _, phases) in zip(range(_TRIED, 0, -1), sorted(tried, key=lambda one: one[:2]), strict=False):
        until = time.monotonic() + max(0.0, stop - time.monotonic()) / left
        searched = PhaseSearch(problem, stages, deadline_s, until).run(phases)
        found = assign(problem, stages, _keep_dwell(problem, stages, searched, limits))
        in_time = problem.graph.iteration_time_s(found.duration_s) <= deadline_s
        if in_time and not violated(problem, found, limits) and (best is None or found.energy_j < best.energy_j):
            best = found
    return best


def _mixed(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    relaxed: Relaxed,
    start_s: FloatArray,
    limits: ChangeLimits,
    deadline_s: float,
    stop: float,
) -> list[Phases]:
    """Phases cut at the relaxation's prices, then again and again at the running mean of their programs' prices.

    Those whose program takes the least energy come first; none if the programs are too large for the time.
    """
    price = relaxed.instruction_price_w
    mixes: list[PhaseMix] = []
    for done in range(1, _ROUNDS + 1):
        phases = _cut(stages, price, start_s, limits)
        mix = solve_phases(problem, stages, phases, deadline_s, stop - time.monotonic())
        if mix is None:
            break
        mixes.append(mix)
        price = (done * price + mix.price_w) / (done + 1)
        if time.monotonic() > stop:
            break
    return [mix.phases for mix in sorted(mixes, key=lambda mix: mix.energy_j)]


def _scaled(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    relaxed: Relaxed,
    start_s: FloatArray,
    limits: ChangeLimits,
    deadline_s: float,
) -> list[Phases]:
    """Phases and clocks at the relaxation's prices times the smallest factor that meets the deadline."""
    low, high, found = 0.0, 1.0, list[Phases]()
    for _ in range(_SCALINGS):
        factor = (low + high) / 2 if found else high
        phases = _cut(stages, relaxed.instruction_price_w * factor, start_s, limits)
        duration = assign(problem, stages, phases).duration_s
        if problem.graph.iteration_time_s(duration) <= deadline_s:
            found, high = [phases], factor
        else:
            low, high = factor, high if found else 4 * high
    return found


def _cut(stages: tuple[StageClocks, ...], price_w: FloatArray, start_s: FloatArray, limits: ChangeLimits) -> Phases:
    """The best phases of every stage at given prices of its instructions' time."""
    begins, clocks = [], []
    for stage in stages:
        found = Segments((0,), (0,))
        if len(stage.nodes):
            cost = stage.energy_j + price_w[stage.nodes, None] * stage.time_s
            found = segment(cost, start_s[stage.nodes], limits.max_changes, limits.min_dwell_s)
        begins.append(found.begins)
        clocks.append(found.clocks)
    return Phases(tuple(begins), tuple(clocks))


def _keep_dwell(
    problem: PlanningProblem, stages: tuple[StageClocks, ...], phases: Phases, limits: ChangeLimits
) -> Phases:
    """Join phases that turned out too short to a neighbour, both at the faster clock of the two."""
    broken = violated(problem, assign(problem, stages, phases), limits)
    while broken:
        start = problem.graph.times(assign(problem, stages, phases).duration_s)[0]
        for stage in broken:
            clocks = phases.clocks[stage]
            if len(clocks) < 2:
                continue
            when = start[stages[stage].nodes[list(phases.begins[stage])]]
            phase = 1 + int(np.diff(when).argmin())
            phases = phases.merged(stage, phase, min(clocks[phase - 1], clocks[phase]))
        still = violated(problem, assign(problem, stages, phases), limits)
        if all(len(phases.clocks[stage]) < 2 for stage in still):
            break
        broken = still
    return phases
