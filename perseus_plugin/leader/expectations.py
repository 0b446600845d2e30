"""What iterations take and are to take, by the model and by what was measured at full clocks. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from perseus_plugin.iteration.replayed import Replayed
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Plan
from perseus_plugin.reporting.live.summary import Predicted


class Expectations:
    """Puts the plans' figures beside measured ones, schedule by schedule.

    Args:
        plans: the job's.
        times: as measured.
    """

    def __init__(self, plans: PlanShelf, times: IterationTimes) -> None:
        self._plans, self._times = plans, times

    def graph_s(self, schedule: str) -> float:
        """How long an iteration of this schedule takes at full clocks in the graph; NaN without a plan for it."""
        return self._plans.of(schedule).baseline_time_s if schedule in self._plans else math.nan

    def seconds_per_planned(self, schedule: str) -> float | None:
        """Measured seconds per second of the graph; None before a schedule that was measured has a plan."""
        graph_s = {key: self._plans.of(key).baseline_time_s for key in self._plans.schedules}
        return self._times.per_planned(graph_s, schedule)

    def full_s(self, schedule: str) -> float | None:
        """An iteration of this schedule at full clocks, in measured seconds; None: not known."""
        per_planned = self.seconds_per_planned(schedule)
        if per_planned is None or schedule not in self._plans:
            return None
        return per_planned * self._plans.of(schedule).baseline_time_s

    def planned_s(self, schedule: str, pace_s: float = 0.0) -> float | None:
        """How long an iteration of this schedule may take, in measured seconds; None: not known.

        Args:
            schedule: its key.
            pace_s: of the slowest pipeline, by the model.
        """
        per_planned = self.seconds_per_planned(schedule)
        if per_planned is None or schedule not in self._plans:
            return None
        return max(pace_s, self._plans.of(schedule).deadline_s) * per_planned

    def full_clock_scale(self, usual: Plan | None) -> tuple[float, float] | None:
        """What full-clock time and energy have to be multiplied by where plans ran other schedules than full clocks.

        1 for the same schedules, equally often; None where that is not known.

        Args:
            usual: the plan that stands for all while none has been followed.
        """
        full, planned = self._times.full, self._mix(usual)
        if planned is None or (len(planned) == 1 and full.keys() == planned.keys()):
            return 1.0, 1.0
        if not full or not all(key in self._plans for key in (*full, *planned)):
            return None
        time_s, energy_j = self._mean_full(planned)
        before_s, before_j = self._mean_full(full)
        return time_s / before_s, energy_j / before_j

    def predicted(self, usual: Plan | None, replayed: Mapping[str, Replayed | None]) -> Predicted | None:
        """What plans make of iterations at full clocks; None: not known.

        Args:
            usual: see `full_clock_scale`.
            replayed: by schedule, what replays of measured iterations say; elsewhere the model's figures are taken.
        """
        planned = self._mix(usual)
        if planned is None or not all(key in self._plans for key in planned):
            return None
        time_s, energy_j = self._mean_full(planned)

        def time_under(key: str) -> float:
            plan, seen = self._plans.of(key), replayed.get(key)
            return plan.iteration_time_s if seen is None else plan.baseline_time_s * seen.time_ratio_mean

        savings = {key: _saving(self._plans.of(key), replayed.get(key)) for key in planned}

        def mean_saving(part: int) -> float:
            return _mean(planned, lambda key: self._plans.of(key).baseline_energy_j * savings[key][part]) / energy_j

        saving, low, high = (mean_saving(part) for part in range(3))
        known = math.isfinite(low) and math.isfinite(high)
        return Predicted(_mean(planned, time_under) / time_s, 1 - saving, (low, high) if known else None)

    def _mix(self, usual: Plan | None) -> Mapping[str, int] | None:
        """How often each schedule has run under the plans in force."""
        return None if usual is None else self._times.planned or {usual.schedule: 1}

    def _mean_full(self, mix: Mapping[str, int]) -> tuple[float, float]:
        return (
            _mean(mix, lambda key: self._plans.of(key).baseline_time_s),
            _mean(mix, lambda key: self._plans.of(key).baseline_energy_j),
        )


MODEL_ERROR = 0.006
"""Share of energy that adding up instructions and waiting misses, 95 %.

On the published A100 runs of Perseus's artifact (SOSP'24) plans that were not learnt from were off by 0.11 to 0.37 % on
average, by workload.
"""


def _saving(plan: Plan, replayed: Replayed | None) -> tuple[float, float, float]:
    """The share of energy that a plan saves, and between what it lies, NaN: not known.

    How well the profile is known, how much iterations differ, and how well energies add up are errors of their own.
    """
    middle, below, above = plan.saving, [], []
    if plan.confidence is not None:
        below.append(plan.saving - plan.confidence.saving[0])
        above.append(plan.confidence.saving[1] - plan.saving)
    if replayed is not None:
        middle = replayed.saving_mean
        below.append(middle - replayed.saving_interval[0])
        above.append(replayed.saving_interval[1] - middle)
    if not below:
        return middle, math.nan, math.nan
    if middle != 0:
        below.append(MODEL_ERROR * (1 - middle))
        above.append(MODEL_ERROR * (1 - middle))
    return middle, middle - math.hypot(*below), middle + math.hypot(*above)


def _mean(mix: Mapping[str, int], of: Callable[[str], float]) -> float:
    """Mean over iterations of these schedules."""
    return math.fsum(count * of(key) for key, count in mix.items()) / sum(mix.values())
