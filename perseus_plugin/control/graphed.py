"""Clocks by host time, for a step that is one CUDA graph: nothing of ours runs while it is replayed. Pure.

A plan says when each of its phases (instructions of one clock, one after the other) begins. Where a replay really is at
some time, nobody sees; how long the last ones took, everybody does. So a plan's times are stretched to what was
measured, and at any moment the clock is the highest of all phases that may be running then: uncertainty costs energy,
not time.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from perseus_plugin.exchange.messages import PhasesPart

OF_LATE = 8
"""Replays whose times count."""
_WATCHED = 3  # replays until what they took is trusted
_FIRST, _LEAST = 0.05, 0.005  # spread until then, and the smallest one: shares
_WIDER = 1.5
MOST_REQUESTS = 1000
"""In one iteration: what a rank writes at once has to fit into the pipe to its helper."""


class TimedRequest(NamedTuple):
    """A clock, and when to ask for it.

    Attributes:
        frequency_mhz: None: full clocks.
        after_s: since the graph's launch.
    """

    frequency_mhz: int | None
    after_s: float


class Fit(NamedTuple):
    """How a plan's times turn into those of a replay.

    Attributes:
        begin_s: from the launch to the plan's zero.
        pace: measured seconds per second of the plan.
        spread: share of a time since the launch by which it may be off.
    """

    begin_s: float
    pace: float
    spread: float

    def earliest_s(self, planned_s: float) -> float:
        """The earliest that something planned for that time may happen, since the launch."""
        return (self.begin_s + self.pace * planned_s) * (1 - self.spread)

    def latest_s(self, planned_s: float) -> float:
        """The latest."""
        return (self.begin_s + self.pace * planned_s) * (1 + self.spread)


class GraphClocks:
    """One stage's clocks in the replays of one plan.

    Args:
        part: the plan's phases.
    """

    def __init__(self, part: PhasesPart) -> None:
        self._part = part
        self._took_s: deque[float] = deque(maxlen=OF_LATE)
        self._periods_s: deque[float] = deque(maxlen=OF_LATE)

    def saw(self, took_s: float, period_s: float | None = None) -> None:
        """A replay under this plan has ended.

        Args:
            took_s: from its launch to its end.
            period_s: from the launch before to its own, if there was nothing in between; None: not known.
        """
        if took_s > 0:
            self._took_s.append(took_s)
        if period_s is not None and period_s > 0:
            self._periods_s.append(period_s)

    @property
    def fit(self) -> Fit:
        """By the last replays.

        Ranks that end a step together launch the next one together: then the launch is the plan's zero. Where they do
        not, a stage that is done early waits within its next replay; how long, its period tells.
        """
        planned_s, took_s = self._part.end_s, self._took_s
        if len(took_s) < _WATCHED or planned_s <= 0:
            return Fit(0.0, 1.0, _FIRST)
        usual_s = statistics.median(took_s)
        spread = max(_LEAST, max(abs(one / usual_s - 1) for one in took_s))
        if len(self._periods_s) >= _WATCHED and self._part.iteration_s > 0:
            pace = statistics.median(self._periods_s) / self._part.iteration_s
            if usual_s > pace * planned_s:
                return Fit(usual_s - pace * planned_s, pace, spread)
        return Fit(0.0, usual_s / planned_s, spread)

    def requests(self, lead_s: float) -> list[TimedRequest]:
        """What to ask for in the next replay, in order; the first at its launch.

        Args:
            lead_s: how long a clock change takes.
        """
        fit = self.fit
        while len(found := requests_for(self._part.clocks_mhz, self._part.starts_s, self._part.end_s, fit, lead_s)) > (
            MOST_REQUESTS
        ):
            fit = fit._replace(spread=_WIDER * fit.spread)
        return found


def requests_for(
    clocks_mhz: Sequence[int], starts_s: Sequence[float], end_s: float, fit: Fit, lead_s: float
) -> list[TimedRequest]:
    """At any moment the highest clock of all phases that may be running then; from the earliest end on full clocks.

    Args:
        clocks_mhz: of each phase.
        starts_s: when it begins by the plan.
        end_s: when the last one ends.
        fit: of the plan's times to real ones.
        lead_s: how long a clock change takes.
    """
    over_s = max(0.0, fit.earliest_s(end_s) - lead_s)
    changes: list[tuple[float, bool, int]] = []
    ends_s = [*starts_s[1:], end_s]
    for number, (clock, start_s, finish_s) in enumerate(zip(clocks_mhz, starts_s, ends_s, strict=True)):
        begins_s = 0.0 if number == 0 else max(0.0, fit.earliest_s(start_s) - lead_s)
        changes += [(begins_s, False, clock), (max(begins_s, fit.latest_s(finish_s)), True, clock)]
    running, highest = Counter[int](), 0
    found: list[TimedRequest] = []
    changes.sort()
    for number, (at_s, ends, clock) in enumerate(changes):
        running[clock] += -1 if ends else 1
        highest = max(highest, clock)
        if not running[clock]:
            del running[clock]
            highest = max(running, default=0) if clock == highest else highest
        if at_s >= over_s:
            break
        if number + 1 < len(changes) and changes[number + 1][0] == at_s:
            continue
        if not found or found[-1].frequency_mhz != highest:
            found.append(TimedRequest(highest, at_s))
    return [*found, TimedRequest(None, over_s)]
