"""The time-energy frontier of one job, sampled until its bound curve is known everywhere to within a tolerance.

The least energy is a convex function of the deadline. Every solve gives its value and its slope, so between two
samples the curve lies below the chord and above both tangents; the interval in which these are furthest apart gets
the next sample (the sandwich algorithm; the curve is the one of Kelley 1961 and Fulkerson 1961).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.errors import PlanError
from perseus_plugin.files import write_atomically
from perseus_plugin.planning.curve import (
    BaselineInFile,
    CurveSample,
    FrontierCurve,
    FrontierFile,
    PointInFile,
    SlowerInFile,
)
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.power.fastest import power_at_lowest_w
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target

_SLOWER = (0.5, 0.9)
"""How far down to the lowest power plans are made beyond T*."""
Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One sample.

    Attributes:
        deadline_s: where it was taken.
        bound_j: what no plan for that takes less than, blocking included: least energy of the relaxation, or the bound
            of the limits on clock changes where that is more.
        slope_w: slope of the relaxation's curve there, joules per second, not above 0; -inf at the shortest iteration.
        plan: what was achieved.
    """

    deadline_s: float
    bound_j: float
    slope_w: float
    plan: Plan


@dataclass(frozen=True, slots=True)
class Frontier:
    """Samples by rising deadline, from the shortest possible iteration to the energy minimum T*.

    Attributes:
        points: the samples, without those at which no plan was found that keeps the limits.
        slower: plans beyond T*, by falling power: they take more energy, and draw less.
        tolerance: share to within which the relaxation's curve is known between them.
        baseline_time_s, baseline_energy_j: every instruction at the profile's highest clock.
    """

    points: tuple[FrontierPoint, ...]
    tolerance: float
    baseline_time_s: float
    baseline_energy_j: float
    slower: tuple[Plan, ...] = ()

    @property
    def cut_short(self) -> bool:
        """Whether the clock ended the search for one of its plans."""
        return any(point.plan.cut_short for point in self.points)

    def curve(self) -> FrontierCurve:
        """What is drawn of it."""
        samples = tuple(
            CurveSample(point.deadline_s, point.bound_j, point.plan.iteration_time_s, point.plan.energy_j)
            for point in self.points
        )
        slower = tuple((plan.iteration_time_s, plan.energy_j) for plan in self.slower)
        return FrontierCurve(samples, self.baseline_time_s, self.baseline_energy_j, slower)


def make_frontier(
    planner: Planner,
    *,
    tolerance: float = 0.002,
    limits: ChangeLimits | None = None,
    effort: Effort = "quick",
    progress: Progress | None = None,
    planned: Callable[[int, int], None] | None = None,
) -> Frontier:
    """Sample the frontier.

    Args:
        planner: the job.
        tolerance: the relaxation's curve is to be known everywhere to within this share of it.
        limits: on clock changes of the plans.
        effort: spent on each sample's plan; quick is rounding alone, as there are many.
        progress: called after each sample with their number and the share to which the curve is known by now.
        planned: called after each sample's plan with the number of those that there are, and of samples.

    Raises:
        PlanError: a tolerance that is not between 0.00001 and 1, or no sample has a plan that keeps the limits.
    """
    if not 1e-5 <= tolerance < 1:
        raise PlanError(f"tolerance: got {tolerance}; allowed: from 0.00001 to below 1")
    curve = _Curve(planner)
    while True:
        error, deadline_s = curve.widest()
        if progress is not None:
            progress(len(curve.samples), error)
        if error <= tolerance:
            break
        curve.sample(deadline_s)
    points: list[FrontierPoint] = []
    failure: PlanError | None = None
    for number, (relaxed, slope_w) in enumerate(curve.samples):
        if planned is not None:
            planned(number, len(curve.samples))
        try:
            solution = planner.discretise(
                relaxed, relaxed.deadline_s, limits or ChangeLimits(), effort, search=effort != "quick"
            )
        except PlanError as error:
            failure = error  # so short an iteration may need more changes than are allowed
            continue
        plan = planner.to_plan(planner.best_known(solution))
        bound_j = max(relaxed.bound_j, solution.relaxed.bound_j)  # limits have one of their own
        points.append(FrontierPoint(relaxed.deadline_s, min(bound_j, plan.energy_j), slope_w, plan))
    if failure is not None and not points:
        raise failure
    return Frontier(
        points=tuple(points),
        tolerance=tolerance,
        baseline_time_s=planner.problem.full_clock_time_s,
        baseline_energy_j=planner.problem.full_clock_energy_j,
        slower=_slower(planner, points[-1].plan, limits or ChangeLimits(), effort),
    )


def _slower(planner: Planner, cheapest: Plan, limits: ChangeLimits, effort: Effort) -> tuple[Plan, ...]:
    """Plans between the power of the cheapest one and the lowest, as near to that as any job surely gets."""
    from_w = cheapest.energy_j / cheapest.iteration_time_s
    to_w = power_at_lowest_w(planner, limits)
    plans = []
    for share in _SLOWER if to_w < from_w else ():
        try:
            target = Target.power_budget(from_w + share * (to_w - from_w))
            plans.append(planner.to_plan(planner.solve(target, limits, effort)))
        except PlanError:  # fewer changes may be allowed than that takes
            continue
    return tuple(plans)


class _Curve:
    """The bound curve as known so far: relaxations by rising deadline, each with its slope."""

    def __init__(self, planner: Planner) -> None:
        self.relaxation = planner.relaxation
        self.blocking_w = planner.problem.total_blocking_w
        cheapest = self.relaxation.cheapest()
        self.samples: list[tuple[Relaxed, float]] = [(cheapest, 0.0)]
        if cheapest.deadline_s > self.relaxation.shortest_s * (1 + 1e-9):
            self.samples.insert(0, (self.relaxation.solve(self.relaxation.shortest_s), -math.inf))

    def sample(self, deadline_s: float) -> None:
        relaxed = self.relaxation.solve(deadline_s)
        self.samples.append((relaxed, min(0.0, self.blocking_w - relaxed.price_w)))
        self.samples.sort(key=lambda one: one[0].deadline_s)

    def widest(self) -> tuple[float, float]:
        """The largest relative distance of chord and tangents, and the deadline to look at next."""
        worst = (0.0, self.samples[0][0].deadline_s)
        for (left, left_w), (right, right_w) in zip(self.samples, self.samples[1:], strict=False):
            width = right.deadline_s - left.deadline_s
            # Where the tangents meet; without a slope on the left that is the left end itself.
            at = 0.0
            if math.isfinite(left_w) and right_w > left_w:
                at = (right.bound_j - left.bound_j - right_w * width) / (left_w - right_w)
                at = min(max(at, 0.0), width)
            low = right.bound_j - right_w * (width - at)
            chord = left.bound_j + (right.bound_j - left.bound_j) * at / width
            error = (chord - low) / low
            # Near an end a sample teaches little about the other side.
            middle = left.deadline_s + min(max(at, 0.2 * width), 0.8 * width)
            worst = max(worst, (error, middle))
        return worst


def frontier_to_json(frontier: Frontier) -> str:
    """The content of `frontier.json`; each point's clocks are per stage in execution order."""
    content = FrontierFile(
        schema="perseus-frontier",
        version=1,
        tolerance=frontier.tolerance,
        baseline=BaselineInFile(iteration_time_s=frontier.baseline_time_s, energy_j=frontier.baseline_energy_j),
        points=tuple(
            PointInFile(
                deadline_s=point.deadline_s,
                iteration_time_s=point.plan.iteration_time_s,
                energy_j=point.plan.energy_j,
                energy_lower_bound_j=point.bound_j,
                gap=point.plan.energy_j / point.bound_j - 1,
                slope_w=point.slope_w if math.isfinite(point.slope_w) else None,
                clocks_mhz=tuple(tuple(point.plan.clocks_mhz(stage)) for stage in range(len(point.plan.stages))),
            )
            for point in frontier.points
        ),
        slower=tuple(
            SlowerInFile(
                iteration_time_s=plan.iteration_time_s,
                energy_j=plan.energy_j,
                clocks_mhz=tuple(tuple(plan.clocks_mhz(stage)) for stage in range(len(plan.stages))),
            )
            for plan in frontier.slower
        ),
    )
    return json.dumps(content.model_dump(by_alias=True), allow_nan=False) + "\n"


def save_frontier(frontier: Frontier, path: Path | str) -> None:
    """Write `frontier.json`, through a temporary file and a rename."""
    write_atomically(Path(path), frontier_to_json(frontier))
