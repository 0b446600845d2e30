"""How far one rank is behind its plan within an iteration, and what it runs at to catch up. A local rule: no message.

An instruction is late when it begins after the plan's latest start for it. Those starts are for a step of the usual
size: a step that is larger as a whole has them later, so they are scaled by what the rank's own instructions have shown
of the step's size so far. `planning.replay` follows the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perseus_plugin.iteration.replayed import LATE_BY

if TYPE_CHECKING:
    from perseus_plugin.exchange.messages import CatchUpPart, PlanPart


class Lateness:
    """Follows the iterations of one stage under one plan. Called at instruction boundaries: cheap.

    Args:
        part: the plan's latest starts, and the clocks there are.
        clocks_mhz: the plan's, per controllable instruction.
        times_s: how long each takes at its clock.
    """

    def __init__(self, part: CatchUpPart, clocks_mhz: Sequence[int], times_s: Sequence[float]) -> None:
        self._latest_s = part.latest_starts_s
        self._delays_s = part.usual_delays_s
        self._planned_s = tuple(times_s)
        self._fastest_s = tuple(part.options[kind][0][1] for kind in part.kinds)
        # Slowest first, so that the first one that does is the one to take.
        self._faster = tuple(
            tuple((clock, time_s) for clock, time_s, _ in reversed(part.options[kind]) if time_s < planned_s)
            for kind, planned_s in zip(part.kinds, times_s, strict=True)
        )
        self._clocks_mhz = tuple(clocks_mhz)
        if not len(self._latest_s) == len(self._delays_s) == len(self._clocks_mhz) == len(self._planned_s):
            raise ValueError("a plan's latest starts do not fit its clocks")
        self._weight = part.size_weight
        self._dwell_s = part.dwell_s
        self._hold_until_s = 0.0
        self._held_mhz = 0
        self.start(0.0)

    def start(self, begin_s: float) -> None:
        """An iteration begins."""
        self._zero_s = begin_s
        self._done_s = self._expected_s = 0.0
        self._position = -1
        self._began_s = self._runs_s = 0.0

    def begin(self, position: int, now_s: float) -> tuple[int, float] | None:
        """An instruction begins; what to run it at instead of the plan's clock, and how long it then takes.

        None: as planned.
        """
        planned_s = self._planned_s[position]
        size = 1.0
        if self._weight:
            prior_s = self._weight * self._fastest_s[position]
            size = (self._done_s + prior_s) / (self._expected_s + prior_s)
        late_s = now_s - self._zero_s - self._delays_s[position] - self._latest_s[position] * size
        chosen: tuple[int, float] | None = None
        if late_s > LATE_BY * planned_s:
            for option in self._faster[position]:
                chosen = option
                if option[1] * size <= planned_s * size - late_s:
                    break
            if chosen is not None and chosen[0] != self._held_mhz:
                self._held_mhz, self._hold_until_s = chosen[0], now_s + self._dwell_s
        elif now_s < self._hold_until_s:
            chosen = next((option for option in self._faster[position] if option[0] == self._held_mhz), None)
        if chosen is None:
            self._held_mhz = 0
        self._position, self._began_s = position, now_s
        self._runs_s = planned_s if chosen is None else chosen[1]
        return None if chosen is None else (chosen[0], chosen[1] * size)

    def end(self, now_s: float) -> None:
        """The instruction that began last has ended."""
        if self._position < 0:
            return
        full_s = self._fastest_s[self._position]
        self._done_s += (now_s - self._began_s) * full_s / self._runs_s
        self._expected_s += full_s
        self._position = -1


def extra_energy_j(part: PlanPart, raised: Sequence[tuple[int, int]], durations_s: Sequence[float]) -> float:
    """What running faster than planned took beyond the plan's clocks, by the profile.

    Args:
        part: the plan.
        raised: (position, clock) of the instructions that did.
        durations_s: how long each controllable instruction took.
    """
    told = part.catch_up
    if told is None:
        return 0.0
    total_j = 0.0
    for position, clock in raised:
        rows = {mhz: (time_s, watts) for mhz, time_s, watts in told.options[told.kinds[position]]}
        planned, faster = rows.get(part.clocks_mhz[position]), rows.get(clock)
        if planned is not None and faster is not None:
            would_take_s = durations_s[position] * planned[0] / faster[0]
            total_j += durations_s[position] * faster[1] - would_take_s * planned[1]
    return total_j
