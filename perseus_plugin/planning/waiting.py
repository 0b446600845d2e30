"""Waits of a plan: at which clock each is spent, and what that takes. Pure.

Between two of its instructions a GPU waits, or does work whose time no clock changes. Left alone it does so at the
higher clock of the two, since a rise is asked for before the first one ends, and a drop when the second one begins;
before the first and after the last instruction at full clocks, which the iteration's end needs. A wait that is longer
than it takes to go down and up again may be spent at a clock of its own: the cheapest one, or the lower one of the two
beside it, which is no further change but an earlier drop or a later rise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.planning.plan import PlannedWait
from perseus_plugin.planning.spans import Spans, SpanTimes
from perseus_plugin.planning.targets import ChangeLimits
from perseus_plugin.profiling.waiting import WaitingPower

# Share of a wait's energy that a clock of its own has to save: less is not worth a change, nor known so well.
LEAST_GAIN = 0.02


@dataclass(frozen=True, eq=False)
class Waits:
    """The clocks at which the waits of one plan are spent.

    Attributes:
        frequency_mhz: shape (spans,), 0 for waits without a clock of their own.
        begin_s, end_s: shape (spans,), of the longest wait in each.
        stage_extra_j: shape (stages,), what each one's spans take above the least that waiting takes.
    """

    frequency_mhz: IntArray
    begin_s: FloatArray
    end_s: FloatArray
    stage_extra_j: FloatArray

    @property
    def extra_j(self) -> float:
        """What all spans take above the least that waiting takes."""
        return float(self.stage_extra_j.sum())


@dataclass(frozen=True, eq=False)
class WaitingCosts:
    """What waiting takes, in one job.

    Attributes:
        graph: of an iteration.
        power: what a waiting GPU draws, per stage.
        full_mhz: per stage, the profile's highest clock.
    """

    graph: PipelineGraph
    power: tuple[WaitingPower, ...]
    full_mhz: IntArray

    @cached_property
    def spans(self) -> Spans:
        """The graph's spans."""
        return Spans.of(self.graph)

    @cached_property
    def is_constant(self) -> bool:
        """Whether no clock makes a difference in any stage."""
        return all(power.is_constant for power in self.power)

    @cached_property
    def _cheapest_mhz(self) -> IntArray:
        """Shape (spans,): the clock to wait at."""
        return np.array([p.cheapest_mhz(p.clocks_mhz) for p in self.power], dtype=np.int64)[self.spans.stage]

    def above_least_w(self, frequency_mhz: IntArray) -> FloatArray:
        """Shape (spans,): power of waiting at a clock each, above the least of the stage."""
        bounds = np.searchsorted(self.spans.stage, np.arange(len(self.power) + 1))
        watts = np.zeros(len(self.spans.stage))
        for power, low, high in zip(self.power, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if high > low and not power.is_constant:
                here = np.interp(frequency_mhz[low:high], power.clocks_mhz, power.power_w)
                watts[low:high] = here - power.lowest_w
        return watts

    def beside_mhz(self, frequency_mhz: IntArray) -> tuple[IntArray, IntArray]:
        """Shape (spans,) both: clocks of the instructions before and after, full clocks at the iteration's ends."""
        spans, full = self.spans, self.full_mhz[self.spans.stage]
        return (
            np.where(spans.before < 0, full, frequency_mhz[spans.before]),
            np.where(spans.after < 0, full, frequency_mhz[spans.after]),
        )

    def left_alone(self, frequency_mhz: IntArray, start_s: FloatArray, finish_s: FloatArray, end_s: float) -> Waits:
        """All waits at the clocks beside them."""
        return self.decide(frequency_mhz, start_s, finish_s, end_s, None, ChangeLimits())

    def decide(
        self,
        frequency_mhz: IntArray,
        start_s: FloatArray,
        finish_s: FloatArray,
        end_s: float,
        latency_s: float | None,
        limits: ChangeLimits,
    ) -> Waits:
        """The clock of every wait, at the least energy that the limits on clock changes allow.

        Args:
            frequency_mhz, start_s, finish_s: shape (nodes,), of an iteration.
            end_s: when the wait for the iteration's end is over.
            latency_s: how long a clock change takes; None: waits get no clocks of their own.
            limits: on clock changes, which the instructions alone keep.
        """
        count = len(self.spans.stage)
        if self.is_constant:
            return Waits(np.zeros(count, dtype=np.int64), np.zeros(count), np.zeros(count), np.zeros(self.graph.stages))
        times = self.spans.times(start_s[:, None], finish_s[:, None], end_s)
        options = _Options(self, frequency_mhz, times, latency_s, limits)
        chosen = options.choose()
        mhz = np.where(chosen < 0, 0, options.mhz[chosen, np.arange(count)])
        cost_j = options.alone_j - np.where(chosen < 0, 0.0, options.gain_j[chosen, np.arange(count)])
        begin_s = options.begin_s
        by_stage_j = np.bincount(self.spans.stage, weights=cost_j, minlength=self.graph.stages).astype(np.float64)
        return Waits(mhz, begin_s, times.begin_s[:, 0] + times.wait_s[:, 0], by_stage_j)

    def planned(self, waits: Waits) -> tuple[tuple[PlannedWait, ...], ...]:
        """Waits with a clock of their own, per stage; empty if there are none."""
        stages: list[list[PlannedWait]] = [[] for _ in self.power]
        for span in np.flatnonzero(waits.frequency_mhz).tolist():
            stages[int(self.spans.stage[span])].append(
                PlannedWait(
                    int(self.spans.position[span]),
                    int(waits.frequency_mhz[span]),
                    float(waits.begin_s[span]),
                    float(waits.end_s[span]),
                )
            )
        return tuple(map(tuple, stages)) if any(stages) else ()

    def by_span(self, wait_clocks_mhz: Sequence[Sequence[tuple[int, int]]]) -> IntArray:
        """Shape (spans,): the clock of each wait, 0 for those without one of their own; see `Plan.wait_clocks_mhz`."""
        mhz = np.zeros(len(self.spans.stage), dtype=np.int64)
        first = {int(self.spans.stage[span]): int(span) for span in self.spans.heads}
        for stage, own in enumerate(wait_clocks_mhz):
            for after, clock in own:
                mhz[first[stage] + 1 + after] = clock
        return mhz

    def extra_j(
        self,
        frequency_mhz: IntArray,
        waits_mhz: IntArray,
        times: SpanTimes,
        latency_s: float,
        shortest_wait_s: FloatArray | None = None,
    ) -> FloatArray:
        """What all spans of several iterations take above the least that waiting takes, shape (iterations,).

        Args:
            frequency_mhz: shape (nodes,).
            waits_mhz: shape (spans,), 0 for waits without a clock of their own.
            times: of the iterations.
            latency_s: how long a clock change takes.
            shortest_wait_s: shape (spans, iterations), after how much of each wait the clock is back; None: at its end.
        """
        before_mhz, after_mhz = self.beside_mhz(frequency_mhz)
        alone_w = self.above_least_w(np.maximum(before_mhz, after_mhz))[:, None]
        alone_j: FloatArray = alone_w * times.total_s
        lowered = np.flatnonzero(waits_mhz)
        low_s = times.wait_s if shortest_wait_s is None else np.minimum(shortest_wait_s, times.wait_s)
        cost_j = _lowered_j(self, before_mhz, after_mhz, waits_mhz, times.before_s, low_s, times.total_s, latency_s)
        alone_j[lowered] = np.where(low_s[lowered] > 2 * latency_s, cost_j[lowered], alone_j[lowered])
        total_j: FloatArray = alone_j.sum(axis=0)
        return total_j


def _lowered_j(
    costs: WaitingCosts,
    before_mhz: IntArray,
    after_mhz: IntArray,
    wait_mhz: IntArray,
    before_s: FloatArray,
    low_s: FloatArray,
    total_s: FloatArray,
    latency_s: float,
) -> FloatArray:
    """What spans take if their waits are spent at `wait_mhz`, above the least that waiting takes.

    The clock is asked for when the wait begins, and the next one so early that it is there after `low_s`.
    """
    down_s = np.where(wait_mhz == before_mhz, 0.0, latency_s)[:, None]
    found: FloatArray = (
        costs.above_least_w(before_mhz)[:, None] * (before_s + down_s)
        + costs.above_least_w(wait_mhz)[:, None] * (low_s - down_s)
        + costs.above_least_w(after_mhz)[:, None] * (total_s - before_s - low_s)
    )
    return found


class _Options:
    """What can be done in every wait of one assignment: stay low, drop early, go to the cheapest clock."""

    def __init__(
        self,
        costs: WaitingCosts,
        frequency_mhz: IntArray,
        times: SpanTimes,
        latency_s: float | None,
        limits: ChangeLimits,
    ) -> None:
        self.costs, self.times, self.limits = costs, times, limits
        self.latency_s = latency_s or 0.0
        self.allowed = latency_s is not None
        self.before_mhz, self.after_mhz = costs.beside_mhz(frequency_mhz)
        alone_mhz = np.maximum(self.before_mhz, self.after_mhz)
        self.alone_j = costs.above_least_w(alone_mhz) * times.total_s[:, 0]
        self.begin_s = times.begin_s[:, 0]
        end_s = self.begin_s + times.wait_s[:, 0]
        spans = costs.spans
        # The rise for the iteration's end comes a latency before that wait's end; the next drop a dwell later.
        work_s = (times.total_s - times.before_s - times.wait_s)[spans.tails, 0]
        since_rise_s = np.maximum(limits.min_dwell_s - self.latency_s - work_s, 0.0)
        self.begin_s = self.begin_s.copy()
        self.begin_s[spans.heads] = np.maximum(self.begin_s[spans.heads], since_rise_s)
        self.before_s = times.before_s[:, 0] + self.begin_s - times.begin_s[:, 0]
        self.wait_s = end_s - self.begin_s
        long_enough = self.wait_s > 2 * self.latency_s
        long_enough &= self.wait_s - self.latency_s >= limits.min_dwell_s
        long_enough[spans.tails] &= spans.end_known > 0
        cheapest_mhz = costs._cheapest_mhz
        self.mhz = np.stack([self.before_mhz, self.after_mhz, cheapest_mhz])
        self.gain_j = np.full(self.mhz.shape, -np.inf)
        self.more_changes = np.zeros(self.mhz.shape, dtype=np.int64)
        if not self.allowed:
            return
        least_w = np.array([power.lowest_w for power in costs.power])[spans.stage]
        least_j = LEAST_GAIN * (self.alone_j + least_w * times.total_s[:, 0])
        # From and to full clocks at the iteration's ends it goes in any case.
        has_before, has_after = spans.before >= 0, spans.after >= 0
        for option, mhz in enumerate(self.mhz):
            cost_j = _lowered_j(
                costs,
                self.before_mhz,
                self.after_mhz,
                mhz,
                self.before_s[:, None],
                self.wait_s[:, None],
                times.total_s,
                self.latency_s,
            )[:, 0]
            gain_j = self.alone_j - cost_j
            usable = long_enough & (mhz < alone_mhz) & (gain_j > 0) & (gain_j >= least_j)
            self.gain_j[option] = np.where(usable, gain_j, -np.inf)
            self.more_changes[option] = (
                ((mhz != self.before_mhz) & has_before).astype(np.int64)
                + ((mhz != self.after_mhz) & has_after)
                - ((self.before_mhz != self.after_mhz) & has_before & has_after)
            )

    def choose(self) -> IntArray:
        """Shape (spans,): the option of each, -1 where the wait is left alone."""
        chosen = self._best(self.gain_j)
        if self.allowed and self.limits.max_changes is not None:
            self._keep_count(chosen, self.limits.max_changes)
        if self.allowed and self.limits.min_dwell_s > 0:
            self._keep_dwell(chosen)
        return chosen

    def _best(self, gain_j: FloatArray) -> IntArray:
        best = gain_j.argmax(axis=0)
        return np.where(np.isfinite(gain_j[best, np.arange(gain_j.shape[1])]), best, -1)

    def _keep_count(self, chosen: IntArray, max_changes: int) -> None:
        """Where there are too many changes, go back on those that gain least."""
        spans = self.costs.spans
        without = self._best(np.where(self.more_changes > 0, -np.inf, self.gain_j))
        at = np.arange(len(chosen))
        more = np.where(chosen < 0, 0, self.more_changes[chosen, at])
        lost_j = np.where(chosen < 0, 0.0, self.gain_j[chosen, at]) - np.where(
            without < 0, 0.0, self.gain_j[without, at]
        )
        for head, tail in zip(spans.heads.tolist(), spans.tails.tolist(), strict=True):
            own = slice(head, tail + 1)
            first, last = self.after_mhz[head], self.before_mhz[tail]
            changes = int((self.before_mhz[head + 1 : tail] != self.after_mhz[head + 1 : tail]).sum() + (first != last))
            left = max_changes - changes
            if more[own].sum() <= left:
                continue
            for span in (head + np.argsort(-lost_j[own] / np.maximum(more[own], 1), kind="stable")).tolist():
                if more[span] > left:
                    chosen[span] = without[span]
                else:
                    left -= int(more[span])

    def _keep_dwell(self, chosen: IntArray) -> None:
        """Leave waits alone whose changes come too soon after another one, or before."""
        while True:
            span, when_s, stage = self._changes(chosen)
            close = np.flatnonzero((np.diff(when_s) < self.limits.min_dwell_s * (1 - 1e-9)) & (np.diff(stage) == 0))
            gain_j = np.where(chosen < 0, np.inf, self.gain_j[chosen, np.arange(len(chosen))])
            one, other = span[close], span[close + 1]
            # Both changes of one wait lie far enough apart; see `long_enough`.
            given_up = np.where(gain_j[one] <= gain_j[other], one, other)
            given_up = given_up[np.isfinite(gain_j[given_up])]
            if not len(given_up):
                return
            chosen[given_up] = -1

    def _changes(self, chosen: IntArray) -> tuple[IntArray, FloatArray, IntArray]:
        """All clock changes in order: the span that each is in, when, and the stage."""
        at = np.arange(len(chosen))
        mhz = self.mhz[chosen, at]
        lowered = chosen >= 0
        end_s = self.begin_s + self.wait_s
        next_s = self.times.begin_s[:, 0] - self.times.before_s[:, 0] + self.times.total_s[:, 0]
        down = lowered & (mhz != self.before_mhz)
        up = lowered & (mhz != self.after_mhz)
        plain = ~lowered & (self.before_mhz != self.after_mhz)
        when_s = np.stack(
            [
                np.where(down, self.begin_s, np.nan),
                np.where(up, end_s - self.latency_s, np.where(plain, next_s, np.nan)),
            ],
            axis=1,
        ).ravel()
        known = np.isfinite(when_s)
        span = np.repeat(at, 2)[known]
        return span, when_s[known], self.costs.spans.stage[span]
