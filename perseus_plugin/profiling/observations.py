"""What a rank observed of its GPU while profiling: instruction times, counter ticks, and the clock they were seen at.

All times are seconds on one monotonic host clock; all records turn into plain JSON and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from perseus_plugin.errors import ProfileError
from perseus_plugin.iteration.bounds import LEAST_S, MOST_COUNT, MOST_J, MOST_MHZ, MOST_S, number


@dataclass(frozen=True, slots=True)
class Activity:
    """One execution of a controllable instruction on this GPU. Time outside every activity is waiting (blocking).

    Attributes:
        kind: instruction kind, e.g. `"forward"`.
        start_s, end_s: when it ran.
    """

    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """One change of the energy counter, as a poller saw it.

    Attributes:
        previous_poll_s: the last poll that still showed the previous value.
        time_s: the poll that first showed `energy_j`; the tick lies in `(previous_poll_s, time_s]`.
        energy_j: the counter after the tick.
    """

    previous_poll_s: float
    time_s: float
    energy_j: float


@dataclass(frozen=True)
class ClockRun:
    """A block of consecutive whole iterations at one locked clock on one GPU.

    A clock may have several runs; revisits of one clock, spread over the sweep, measure drift.

    Attributes:
        frequency_mhz: the clock that was locked.
        begin_s, end_s: the block; between them, time outside `activities` is waiting.
        activities: every execution of a controllable instruction in the block, in any order.
        ticks: the counter's changes in the block, in order of time.
        capped: the GPU ran below the lock for a part of the block, and nobody knows why.
        at_limit: it did so at its power limit, or at the highest clock: that is what asking for this clock comes to.
        steps: number and end of each iteration in the block, in order; without them the block counts as one.
    """

    frequency_mhz: int
    begin_s: float
    end_s: float
    activities: tuple[Activity, ...]
    ticks: tuple[Tick, ...]
    capped: bool = False
    at_limit: bool = False
    steps: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepMean:
    """How long the instructions of one kind took in one iteration on one rank.

    Attributes:
        step: number of the iteration, the same on all ranks.
        frequency_mhz: clock of this rank's GPU.
        kind: of instruction.
        mean_s: mean duration over the microbatches.
        count: microbatches.
        spread: relative standard deviation over them (NaN for one).
    """

    step: int
    frequency_mhz: int
    kind: str
    mean_s: float
    count: int
    spread: float = math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """Relative standard deviations of durations, and their standard errors (NaN: unknown)."""

    within: float = math.nan
    within_se: float = math.nan
    between: float = math.nan
    between_se: float = math.nan


@dataclass(frozen=True, slots=True)
class InstructionEstimate:
    """Time and energy of one instruction kind at one clock.

    Attributes:
        kind, frequency_mhz: what was measured.
        time_s, time_se_s: duration for work of the average size and its standard error, which is below the highest
            clock that of the ratio to the time there.
        energy_j, energy_se_j: energy of the GPU while it runs, and its standard error; both NaN when the
            counter gave nothing to estimate from.
        samples: executions behind the figures.
        spread: of the durations of this kind.
    """

    kind: str
    frequency_mhz: int
    time_s: float
    time_se_s: float
    energy_j: float
    energy_se_j: float
    samples: int
    spread: Spread = Spread()

    def lasting(self, time_s: float, time_se_s: float) -> InstructionEstimate:
        """The same at another duration: power and its error stay."""
        power_se = math.sqrt(
            max((self.energy_se_j / (self.energy_j or math.nan)) ** 2 - (self.time_se_s / self.time_s) ** 2, 0.0)
        )  # relative; NaN where the energy is not known
        energy_j = self.energy_j * time_s / self.time_s
        return replace(
            self,
            time_s=time_s,
            time_se_s=time_se_s,
            energy_j=energy_j,
            energy_se_j=energy_j * math.hypot(power_se, time_se_s / time_s),
        )


@dataclass(frozen=True)
class StageEstimate:
    """What is known about one stage.

    Attributes:
        instructions: one entry per (kind, clock), sorted by kind and falling clock; every kind has the same clocks.
        blocking_power_w, blocking_power_se_w: power while waiting for a peer, the mean over clocks (NaN without counter
            data).
        window_s: length of the stretch of time that one tick measures (NaN: unknown).
        lag_s: how long after the end of that stretch the tick shows (NaN: unknown).
        unresolved: kinds whose relative standard error of energy is above the threshold at some clock, or that
            were never seen at all clocks; and `BLOCKING` when the blocking power is assumed and not measured, or
            its relative standard error is above the threshold.
        steps: what the durations were estimated from; of one rank.
        blocking_by_clock: clock, power while waiting at it and its standard error, by falling clock (empty: unknown).
        gpu: name of the GPU it was measured on (empty: unknown).
        held_mhz: clocks at which its power limit held the GPU.
        as_highest_mhz: further clocks that were tried, at which the limit made all work what it is at the highest one:
            their runs are among those of the highest.
    """

    instructions: tuple[InstructionEstimate, ...]
    blocking_power_w: float
    blocking_power_se_w: float
    window_s: float
    lag_s: float
    unresolved: frozenset[str]
    steps: tuple[StepMean, ...] = ()
    blocking_by_clock: tuple[tuple[int, float, float], ...] = ()
    gpu: str = ""
    held_mhz: frozenset[int] = frozenset()
    as_highest_mhz: frozenset[int] = frozenset()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Instruction kinds with an entry, sorted."""
        return tuple(sorted({row.kind for row in self.instructions}))

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Clocks with an entry, falling."""
        return tuple(sorted({row.frequency_mhz for row in self.instructions}, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data (NaN becomes null)."""
        return {
            "instructions": [
                [
                    row.kind,
                    row.frequency_mhz,
                    *(_null(v) for v in (row.time_s, row.time_se_s, row.energy_j, row.energy_se_j)),
                    row.samples,
                    *(_null(v) for v in astuple(row.spread)),
                ]
                for row in self.instructions
            ],
            "blocking_power_w": _null(self.blocking_power_w),
            "blocking_power_se_w": _null(self.blocking_power_se_w),
            "window_s": _null(self.window_s),
            "lag_s": _null(self.lag_s),
            "unresolved": sorted(self.unresolved),
            "steps": [[*astuple(step)[:-1], _null(step.spread)] for step in self.steps],
            "blocking_by_clock": [[clock, _null(w), _null(se_w)] for clock, w, se_w in self.blocking_by_clock],
            "gpu": self.gpu,
            "held_mhz": sorted(self.held_mhz),
            "as_highest_mhz": sorted(self.as_highest_mhz),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageEstimate:
        """Inverse of `to_dict`.

        Raises:
            ProfileError: a key is missing or a value has the wrong shape.
        """
        try:
            return cls(
                instructions=tuple(_row(row) for row in data["instructions"]),
                blocking_power_w=_power(data["blocking_power_w"]),
                blocking_power_se_w=number(data["blocking_power_se_w"], 0.0, MOST_J, "blocking_power_se_w"),
                window_s=number(data["window_s"], 0.0, MOST_S, "window_s"),
                lag_s=number(data["lag_s"], -MOST_S, MOST_S, "lag_s"),
                unresolved=frozenset(str(kind) for kind in data["unresolved"]),
                steps=tuple(
                    StepMean(
                        int(number(step, -MOST_COUNT, MOST_COUNT, "step")),
                        int(number(clock, 1, MOST_MHZ, "clock")),
                        str(kind),
                        number(mean_s, LEAST_S, MOST_S, "mean_s"),
                        int(number(count, 1, MOST_COUNT, "count")),
                        number(spread, 0.0, MOST_COUNT, "spread"),
                    )
                    for step, clock, kind, mean_s, count, spread in data["steps"]
                ),
                blocking_by_clock=tuple(
                    (
                        int(number(clock, 1, MOST_MHZ, "clock")),
                        _power(w),
                        number(se_w, 0.0, MOST_J, "blocking_by_clock"),
                    )
                    for clock, w, se_w in data["blocking_by_clock"]
                ),
                gpu=str(data["gpu"]),
                held_mhz=_clocks(data["held_mhz"]),
                as_highest_mhz=_clocks(data["as_highest_mhz"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"stage estimate: cannot be read: {error}") from error


BLOCKING = "blocking"
"""The name under which `StageEstimate.unresolved` reports the blocking power."""


def _row(row: Sequence[Any]) -> InstructionEstimate:
    kind, frequency_mhz, time_s, time_se_s, energy_j, energy_se_j, samples, *spread = row
    return InstructionEstimate(
        str(kind),
        int(number(frequency_mhz, 1, MOST_MHZ, "clock")),
        number(time_s, LEAST_S, MOST_S, f"time of {kind}"),
        number(time_se_s, 0.0, MOST_S, f"error of the time of {kind}"),
        number(energy_j, -MOST_J, MOST_J, f"energy of {kind}"),
        number(energy_se_j, 0.0, MOST_J, f"error of the energy of {kind}"),
        int(number(samples, 0, MOST_COUNT, "samples")),
        Spread(*(number(value, 0.0, MOST_COUNT, "spread") for value in spread)),
    )


def _clocks(values: Sequence[Any]) -> frozenset[int]:
    return frozenset(int(number(value, 1, MOST_MHZ, "clock")) for value in values)


def _power(value: Any) -> float:
    return number(value, -MOST_J, MOST_J, "blocking power")  # far from true where a counter is noisy


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None
