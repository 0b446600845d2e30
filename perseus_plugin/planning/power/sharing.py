"""One power budget for several jobs: who gets how many watts, so that together they train most. Pure.

What a job does within a budget is taken from its frontier: every point of it is a power and a speed. A job that may
draw more is faster, by less and less (the least energy is convex in the iteration time, and so the speed is concave in
the power): the upper hull of the points is what there is to choose from. Sums of such curves are greatest where a
further watt is worth the same to all, which is found exactly by handing out the hulls' pieces, the steepest first.

Watts are those of all GPUs of a job together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from perseus_plugin.errors import PlanError
from perseus_plugin.planning.curve import FrontierCurve


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """How fast a job is for the power that it may draw.

    Attributes:
        power_w: of the hull's corners, rising.
        speed: there, rising, as a share of that at full clocks.
        full_w: what it draws at full clocks, and at most.
    """

    power_w: tuple[float, ...]
    speed: tuple[float, ...]
    full_w: float

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]], full_w: float) -> SpeedCurve:
        """The upper hull of (watts, speed), from the point of least power to the fastest one.

        Raises:
            PlanError: there are none.
        """
        hull: list[tuple[float, float]] = []
        for power_w, speed in sorted(points, key=lambda point: (point[0], -point[1])):
            if hull and speed <= hull[-1][1]:
                continue
            while len(hull) > 1 and _rise(hull[-2], hull[-1]) <= _rise(hull[-1], (power_w, speed)):
                hull.pop()
            hull.append((power_w, speed))
        if not hull:
            raise PlanError("frontier: got no points; allowed: at least one")
        return cls(tuple(watts for watts, _ in hull), tuple(speed for _, speed in hull), max(full_w, hull[-1][0]))

    @classmethod
    def from_frontier(cls, curve: FrontierCurve, pipelines: float) -> SpeedCurve:
        """Of a job with so many pipelines; a frontier is of one."""
        taken = [(one.energy_j, one.iteration_time_s) for one in curve.samples]
        taken += [(energy_j, time_s) for time_s, energy_j in curve.slower]
        points = [(energy_j / time_s, time_s) for energy_j, time_s in taken]
        full = (curve.baseline_energy_j / curve.baseline_time_s, curve.baseline_time_s)
        made = [(pipelines * power_w, curve.baseline_time_s / time_s) for power_w, time_s in [*points, full]]
        return cls.of(made, pipelines * full[0])

    @property
    def lowest_w(self) -> float:
        """The least power that there is a plan for."""
        return self.power_w[0]

    @property
    def most_w(self) -> float:
        """More power does not make it faster."""
        return self.power_w[-1]

    def drawn(self, times: float) -> SpeedCurve:
        """The same of GPUs that draw so many times as much."""
        return SpeedCurve(tuple(times * watts for watts in self.power_w), self.speed, times * self.full_w)

    def above(self, lowest_w: float) -> SpeedCurve:
        """The same without what is below a power; at least its fastest point."""
        if lowest_w <= self.lowest_w:
            return self
        at_w = min(lowest_w, self.most_w)
        kept = [(watts, speed) for watts, speed in zip(self.power_w, self.speed, strict=True) if watts > at_w]
        return SpeedCurve.of([(at_w, self.speed_at(at_w)), *kept], self.full_w)

    def speed_at(self, power_w: float) -> float:
        """Speed within a budget, as a share of that at full clocks; below `lowest_w` as at it."""
        last = self.speed[0]
        for (low_w, low), (high_w, high) in pairwise(zip(self.power_w, self.speed, strict=True)):
            if power_w <= low_w:
                break
            last = low + (high - low) * min(1.0, (power_w - low_w) / (high_w - low_w))
        return last


@dataclass(frozen=True, slots=True)
class SharingJob:
    """A job that shares the budget.

    Attributes:
        name: of the job.
        curve: what power makes of it.
        value: of an iteration's worth of full speed: its GPUs times its weight, so that a large job counts as much as
            many small ones.
    """

    name: str
    curve: SpeedCurve
    value: float = 1.0


@dataclass(frozen=True, slots=True)
class Division:
    """Who gets what.

    Attributes:
        watts: by job.
        lowest_w: what all of them take at the least.
        marginal: value of a further watt; 0: nobody can use one.
    """

    watts: Mapping[str, float]
    lowest_w: float
    marginal: float


def divide(jobs: Sequence[SharingJob], budget_w: float) -> Division:
    """Split a budget so that the jobs' values times speeds add up to most.

    Nobody gets less than its lowest: where the budget is less than all of these, all get theirs and `lowest_w` says
    so. What nobody can use stays.
    """
    watts = {job.name: job.curve.lowest_w for job in jobs}
    lowest_w = math.fsum(watts.values())
    left_w = budget_w - lowest_w
    pieces = [
        (job.value * (high - low) / (high_w - low_w), job.name, high_w - low_w, high_w)
        for job in jobs
        for (low_w, low), (high_w, high) in pairwise(zip(job.curve.power_w, job.curve.speed, strict=True))
    ]
    marginal = 0.0
    # A hull's own pieces come in their order, as each is flatter than the one before.
    for worth, name, width_w, end_w in sorted(pieces, key=lambda piece: -piece[0]):
        if width_w > left_w:
            watts[name] += max(0.0, left_w)
            marginal = worth
            break
        watts[name] = end_w
        left_w -= width_w
    return Division(watts, lowest_w, marginal)


@dataclass(frozen=True, slots=True)
class Holding:
    """A job as it is at this moment.

    Attributes:
        job: None: it cannot be told anything, and keeps what it holds.
        held_w: the most that it may draw until it is known otherwise: of what is in force and what it was told since,
            the higher.
        beyond_w: what it was seen to draw beyond what it may.
    """

    name: str
    job: SharingJob | None
    held_w: float
    beyond_w: float = 0.0


def next_budgets(holdings: Sequence[Holding], budget_w: float) -> tuple[dict[str, float], Division]:
    """What to tell the jobs that can be told, so that all together never exceed the budget on the way.

    Those that are to draw less are told so at once. Those that may draw more get of that what is free at this moment,
    in proportion: what the others have yet to let go of is theirs at the next time, once it is known to be in force.
    What jobs draw beyond what they may is nobody's.

    Returns:
        Watts by job, and the division that this leads to.
    """
    budget_w -= math.fsum(one.beyond_w for one in holdings)
    fixed_w = math.fsum(one.held_w for one in holdings if one.job is None)
    division = divide([one.job for one in holdings if one.job is not None], budget_w - fixed_w)
    free_w = max(0.0, budget_w - math.fsum(one.held_w for one in holdings))
    rises_w = {one.name: max(0.0, division.watts[one.name] - one.held_w) for one in holdings if one.job is not None}
    share = min(1.0, free_w / wanted_w) if (wanted_w := math.fsum(rises_w.values())) > 0 else 0.0
    told = {
        one.name: one.held_w + share * rises_w[one.name] if rises_w[one.name] > 0 else division.watts[one.name]
        for one in holdings
        if one.job is not None
    }
    return told, division


def _rise(low: tuple[float, float], high: tuple[float, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
