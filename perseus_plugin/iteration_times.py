"""Iteration times as rank 0 sees them: at full clocks, under the plan, and at full clocks once more. Pure."""

from __future__ import annotations

import statistics
from collections import deque

from perseus_plugin.planning.plan import Plan


class IterationTimes:
    """Medians of iterations of one sort; times of different schedules are not mixed.

    Args:
        patience: how many iterations make a median.

    Attributes:
        schedule: of the iterations at full clocks that are the reference.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._full_s: list[float] = []
        self.schedule = ""
        self._planned_s: deque[float] = deque(maxlen=patience)
        self._again_s: list[float] = []
        self._again_schedule = ""

    # At full clocks.

    def add_full(self, schedule: str, time_s: float) -> None:
        """An iteration of the sweep at full clocks."""
        if schedule != self.schedule:
            self._full_s, self.schedule = [], schedule
        self._full_s.append(time_s)

    @property
    def full_s(self) -> float | None:
        """Median at full clocks; None before it was measured."""
        return statistics.median(self._full_s) if self._full_s else None

    def per_planned(self, reference: Plan) -> float | None:
        """Measured seconds per second of the graph.

        The graph knows nothing of what surrounds the schedule, so that its times have to be scaled.

        Args:
            reference: plan of the schedule that was measured at full clocks.
        """
        return None if self.full_s is None else self.full_s / reference.baseline_time_s

    # Under the plan.

    def add_planned(self, time_s: float) -> None:
        """An iteration under the plan in force."""
        self._planned_s.append(time_s)

    def forget_planned(self) -> None:
        """Another plan is in force."""
        self._planned_s.clear()

    @property
    def planned_s(self) -> float | None:
        """Median under the plan; None while there are too few."""
        return statistics.median(self._planned_s) if len(self._planned_s) >= self._patience else None

    # At full clocks once more.

    def measure_again(self, schedule: str) -> None:
        """A new reference is to be measured; begins anew when the schedule changes meanwhile."""
        self._again_s, self._again_schedule = [], schedule

    def measure_again_if_changed(self, schedule: str) -> None:
        """As `measure_again` if this is another schedule."""
        if schedule != self._again_schedule:
            self.measure_again(schedule)

    def add_again(self, schedule: str, time_s: float) -> None:
        """An iteration at full clocks for the new reference."""
        if schedule == self._again_schedule:
            self._again_s.append(time_s)

    @property
    def again(self) -> tuple[str, float, bool] | None:
        """Schedule, median, and whether there are four times as many as needed; None while there are too few."""
        if len(self._again_s) < self._patience:
            return None
        return self._again_schedule, statistics.median(self._again_s), len(self._again_s) >= 4 * self._patience

    def use_again(self) -> None:
        """What was measured again is the reference from now on."""
        self._full_s, self.schedule = list(self._again_s), self._again_schedule
