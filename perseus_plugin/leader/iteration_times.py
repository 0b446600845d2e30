"""Iteration times as rank 0 sees them: at full clocks, under the plan, and at full clocks once more. Pure."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping

_ENOUGH = 4  # iterations at full clocks that say of a schedule what all together would say of it less exactly


class IterationTimes:
    """Medians of iterations of one sort; times of different schedules are not mixed.

    Args:
        patience: how many iterations make a median.

    Attributes:
        full: how many iterations at full clocks of each schedule are the reference.
        planned: how many iterations of each schedule have run under the plans in force.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._full_s: dict[str, list[float]] = {}
        self.planned: Counter[str] = Counter()
        self._overruns: deque[float] = deque(maxlen=patience)
        self._planned_s: deque[float] = deque(maxlen=patience)
        self._again_s: dict[str, list[float]] = {}

    def copy(self) -> IterationTimes:
        """One that changes by itself."""
        made = IterationTimes(self._patience)
        made._full_s = {schedule: list(times) for schedule, times in self._full_s.items()}
        made._again_s = {schedule: list(times) for schedule, times in self._again_s.items()}
        made.planned = self.planned.copy()
        made._overruns, made._planned_s = self._overruns.copy(), self._planned_s.copy()
        return made

    # At full clocks.

    def add_full(self, schedule: str, time_s: float) -> None:
        """An iteration of the sweep at full clocks."""
        self._full_s.setdefault(schedule, []).append(time_s)

    @property
    def full(self) -> Mapping[str, int]:
        """See the class."""
        return {schedule: len(times) for schedule, times in self._full_s.items()}

    @property
    def full_s(self) -> float | None:
        """Median at full clocks of the schedule seen most often; None before it was measured."""
        return (
            statistics.median(self._full_s[max(self.full.items(), key=lambda one: one[1])[0]]) if self._full_s else None
        )

    def per_planned(self, graph_s: Mapping[str, float], schedule: str) -> float | None:
        """Measured seconds per second of the graph.

        The graph knows what surrounds the schedule as well as it was measured, so that its times have to be scaled.

        Args:
            graph_s: per schedule, as far as known, how long an iteration at full clocks takes in the graph.
            schedule: whose iterations are to be scaled. Where too few of them were measured, all stand for it.
        """
        own = self._full_s.get(schedule, [])
        if schedule in graph_s and len(own) >= _ENOUGH:
            return statistics.median(own) / graph_s[schedule]
        ratios = [time_s / graph_s[key] for key, times in self._full_s.items() if key in graph_s for time_s in times]
        return statistics.median(ratios) if ratios else None

    # Under the plan.

    def add_planned(self, schedule: str, time_s: float, expected_s: float | None) -> None:
        """An iteration under the plans in force, and how long it may take, None if that is not known."""
        self.planned[schedule] += 1
        if expected_s is not None:
            self._planned_s.append(time_s)
            self._overruns.append(time_s / expected_s)

    def forget_planned(self) -> None:
        """What is in force has changed."""
        self._planned_s.clear()
        self._overruns.clear()

    @property
    def planned_s(self) -> float | None:
        """Median under the plan; None while there are too few."""
        return statistics.median(self._planned_s) if len(self._planned_s) >= self._patience else None

    @property
    def overrun(self) -> float | None:
        """Median of what iterations under the plan took, over what they may; None while there are too few."""
        return statistics.median(self._overruns) if len(self._overruns) >= self._patience else None

    # At full clocks once more.

    def measure_again(self) -> None:
        """A new reference is to be measured."""
        self._again_s = {}

    def add_again(self, schedule: str, time_s: float) -> None:
        """An iteration at full clocks for the new reference."""
        self._again_s.setdefault(schedule, []).append(time_s)

    @property
    def again(self) -> tuple[str, float, bool] | None:
        """The schedule seen most often with its median, and whether that is enough to go on with whatever is missing.

        None while there are too few.
        """
        if not self._again_s:
            return None
        schedule, times = max(self._again_s.items(), key=lambda one: len(one[1]))
        count = sum(len(times) for times in self._again_s.values())
        if count < self._patience:
            return None
        return schedule, statistics.median(times), count >= 4 * self._patience

    def use_again(self) -> None:
        """What was measured again is the reference from now on."""
        self._full_s = self._again_s
        self._again_s = {}
        self.planned.clear()
