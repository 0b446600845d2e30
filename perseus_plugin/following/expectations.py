"""What iterations take and are to take, by the model and by what was measured at full clocks. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from perseus_plugin.iteration_times import IterationTimes
from perseus_plugin.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Plan


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

    def predicted_ratios(self, usual: Plan | None) -> tuple[float, float] | None:
        """Time and energy under the plans over those at full clocks, by the model; None: not known.

        Args:
            usual: see `full_clock_scale`.
        """
        planned = self._mix(usual)
        if planned is None or not all(key in self._plans for key in planned):
            return None
        time_s, energy_j = self._mean_full(planned)
        return (
            _mean(planned, lambda key: self._plans.of(key).iteration_time_s) / time_s,
            _mean(planned, lambda key: self._plans.of(key).energy_j) / energy_j,
        )

    def _mix(self, usual: Plan | None) -> Mapping[str, int] | None:
        """How often each schedule has run under the plans in force."""
        return None if usual is None else self._times.planned or {usual.schedule: 1}

    def _mean_full(self, mix: Mapping[str, int]) -> tuple[float, float]:
        return (
            _mean(mix, lambda key: self._plans.of(key).baseline_time_s),
            _mean(mix, lambda key: self._plans.of(key).baseline_energy_j),
        )


def _mean(mix: Mapping[str, int], of: Callable[[str], float]) -> float:
    """Mean over iterations of these schedules."""
    return math.fsum(count * of(key) for key, count in mix.items()) / sum(mix.values())
