"""From counter ticks to stretches of energy increments, and from activities to seconds per kind of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perseus_plugin.profiling.observations import Activity, ClockRun, Tick

Array = NDArray[np.float64]

_GRID_SHARE = 0.95  # of ticks that must fit a regular grid before the grid is believed
_SLOW_POLLS = 0.2  # of the time between ticks: polls slower than this and without a grid blur single ticks
_THINNED = 5.0  # times the blur: the distance of ticks that are then kept
_FOLLOW = 0.1  # of its error by which a grid's phase is corrected at each tick
_IMPLAUSIBLE = 10.0  # an increment this many times the typical power is a counter that jumped


@dataclass(frozen=True)
class Stretch:
    """Unbroken ticks of one run.

    Attributes:
        times_s: shape (n + 1,), rising: when the counter ticked.
        energy_j: shape (n,): what each tick after the first added.
        blur_s: typical length of the interval in which a tick is known to lie; 0 when the ticks form a grid.
    """

    times_s: Array
    energy_j: Array
    blur_s: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """Seconds spent in each kind of work up to a time, for one run.

    Attributes:
        begin_s, end_s: the run.
        edges_s: per kind, shape (2m,): start and end of each execution, rising; empty when the kind never ran.
        spent_s: per kind, shape (2m,): seconds spent in it up to each of its edges.
    """

    begin_s: float
    end_s: float
    edges_s: tuple[Array, ...]
    spent_s: tuple[Array, ...]

    def seconds(self, times_s: Array) -> Array:
        """Seconds from the beginning of the run to each time, shape (len(times_s), 1 + 2 * kinds).

        The columns are waiting, each kind, and each kind's ramp: seconds weighted from -1 at the beginning of an
        execution to +1 at its end, so that a whole execution adds nothing. `times_s` must lie within the run.
        """
        kinds = len(self.edges_s)
        columns = np.zeros((len(times_s), 1 + 2 * kinds))
        for k, (edges, spent) in enumerate(zip(self.edges_s, self.spent_s, strict=True)):
            if len(edges):
                columns[:, 1 + k] = np.interp(times_s, edges, spent)
                starts = edges[::2]
                last = np.maximum(starts.searchsorted(times_s, side="right") - 1, 0)
                length = (edges[1::2] - starts)[last]
                progress = np.minimum(np.maximum(times_s - starts[last], 0.0), length)
                columns[:, 1 + kinds + k] = progress * (progress / length - 1)
        columns[:, 0] = (times_s - self.begin_s) - columns[:, 1 : 1 + kinds].sum(axis=1)
        return columns


def timeline(run: ClockRun, kinds: Sequence[str]) -> Timeline:
    """Lay the run's activities out in time, cut to the run.

    Where two activities overlap, the time is the earlier one's: a GPU's power belongs to one of them, and the
    measured ends of neighbouring instructions may cross by the resolution of their clock.
    """
    edges: dict[str, list[float]] = {kind: [] for kind in kinds}
    free_s = run.begin_s
    for activity in sorted(run.activities, key=lambda a: (a.start_s, a.end_s)):
        start_s, end_s = max(activity.start_s, free_s), min(activity.end_s, run.end_s)
        if end_s > start_s and activity.kind in edges:
            edges[activity.kind] += (start_s, end_s)
            free_s = end_s
    edges_s = tuple(np.array(edges[kind]) for kind in kinds)
    return Timeline(run.begin_s, run.end_s, edges_s, tuple(_spent(one) for one in edges_s))


def _spent(edges: Array) -> Array:
    seconds = np.zeros(len(edges))
    seconds[1::2] = edges[1::2] - edges[::2]
    return np.cumsum(seconds)


def durations_s(activities: Sequence[Activity], kind: str) -> Array:
    """Durations of the executions of one kind that are finite and above 0."""
    values = np.array([a.end_s - a.start_s for a in activities if a.kind == kind])
    return np.asarray(values[np.isfinite(values) & (values > 0)])


def stretches(run: ClockRun) -> list[Stretch]:
    """Unbroken ticks of a run: cut where the counter went backwards, wrapped or jumped."""
    ticks = _distinct(run.ticks)
    if len(ticks) < 2:
        return []
    seen_s = np.array([t.time_s for t in ticks])
    before_s = np.array([t.previous_poll_s for t in ticks])
    counter_j = np.array([t.energy_j for t in ticks])
    times_s, keep, blur_s = tick_times(before_s, seen_s)
    times_s, counter_j = times_s[keep], counter_j[keep]
    if len(times_s) < 2:
        return []
    energy_j, seconds = np.diff(counter_j), np.diff(times_s)
    good = (energy_j > 0) & (seconds > 0)
    if not good.any():
        return []
    typical_w = float(energy_j[good].sum() / seconds[good].sum())
    typical_w = min(typical_w, float(np.median(energy_j[good] / seconds[good])))
    good &= energy_j <= _IMPLAUSIBLE * typical_w * np.maximum(seconds, np.median(seconds))
    cuts = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    return [
        Stretch(times_s[first : last + 1], energy_j[first:last], blur_s)
        for first, last in zip(cuts[::2], cuts[1::2], strict=True)
    ]


def _distinct(ticks: Sequence[Tick]) -> list[Tick]:
    """Ticks with finite values, in order, that really change the counter."""
    kept: list[Tick] = []
    for tick in ticks:
        if not np.isfinite([tick.previous_poll_s, tick.time_s, tick.energy_j]).all():
            continue
        if kept and (tick.time_s <= kept[-1].time_s or tick.energy_j == kept[-1].energy_j):
            continue
        kept.append(tick)
    return kept


def tick_times(before_s: Array, seen_s: Array) -> tuple[Array, NDArray[np.bool_], float]:
    """When the counter ticked, better than the poller saw it.

    Each tick lies in `(before_s, seen_s]`. Counters tick regularly, so when one grid `phase + n * period` fits
    (nearly) all intervals, its points are taken; that also repairs late polls. Otherwise the middle of each
    interval is taken, and of the ticks are used those not seen through an unusually long gap between polls, and, when
    polls are slow, only some.

    Returns:
        Times of the ticks, which of them to use, and `Stretch.blur_s`.
    """
    middle_s, width_s = (before_s + seen_s) / 2, np.maximum(seen_s - before_s, 0.0)
    every = np.ones(len(seen_s), dtype=bool)
    period_s = float(np.median(np.diff(middle_s)))
    narrow = width_s <= max(0.6 * period_s, 1e-9)
    if narrow.sum() >= 3:
        phase_s, period_s = _fit_grid(before_s[narrow], seen_s[narrow], period_s)
        times_s = _nearest_grid_points(before_s, seen_s, phase_s, period_s)
        outside_s = np.maximum(np.maximum(before_s - times_s, times_s - seen_s), 0.0)
        inside = (outside_s[narrow] <= 0.1 * width_s[narrow] + 1e-6).mean()
        if inside >= _GRID_SHARE and outside_s.max() <= 0.25 * period_s and (np.diff(times_s) > 0).all():
            return np.clip(times_s, before_s, seen_s), every, 0.0
    usable = width_s <= max(4 * float(np.median(width_s)), 0.25 * period_s)
    blur_s = float(np.median(width_s))
    if blur_s > _SLOW_POLLS * period_s:
        usable = _thinned(middle_s, usable, _THINNED * blur_s)
    return middle_s, usable, blur_s


def _thinned(times_s: Array, usable: NDArray[np.bool_], least_s: float) -> NDArray[np.bool_]:
    """Every tick that comes at least so long after the one kept before it: short rows with blurred ends mislead."""
    kept = np.zeros(len(times_s), dtype=bool)
    last_s = -np.inf
    for i in np.flatnonzero(usable):
        if times_s[i] - last_s >= least_s:
            kept[i], last_s = True, times_s[i]
    return kept


def _fit_grid(before_s: Array, seen_s: Array, period_s: float) -> tuple[float, float]:
    """Phase and period of the regular grid whose points lie deepest inside the intervals.

    For a given period the best phase is known; how far the worst interval is then missed is convex in the period.
    """
    middle_s = (before_s + seen_s) / 2
    number = _count_periods(middle_s, period_s)
    if number[-1] == 0:
        return float(middle_s[0]), period_s
    origin_s = before_s[0]
    low_s, high_s = before_s - origin_s, seen_s - origin_s

    def phases_s(period: float) -> tuple[float, float]:
        return float((low_s - number * period).max()), float((high_s - number * period).min())

    offset = number - number.mean()
    with np.errstate(all="ignore"):  # times that mean nothing overflow; the caller tells from what comes out
        guess_s = float(offset @ (middle_s - origin_s) / (offset @ offset))
    if not np.isfinite(guess_s):
        return float(middle_s[0]), period_s
    reach_s = 2 * float((seen_s - before_s).max()) / number[-1]
    shortest_s, longest_s = guess_s - reach_s, guess_s + reach_s
    for _ in range(60):
        below_s, above_s = (shortest_s + share * (longest_s - shortest_s) for share in (1 / 3, 2 / 3))
        misses = [low - high for low, high in (phases_s(below_s), phases_s(above_s))]
        if misses[0] < misses[1]:
            longest_s = above_s
        else:
            shortest_s = below_s
    period_s = (shortest_s + longest_s) / 2
    return float(origin_s + sum(phases_s(period_s)) / 2), period_s


def _count_periods(middle_s: Array, period_s: float) -> Array:
    """Number of each tick on a grid of about this period, following its phase as a phase-locked loop does.

    Rounding single differences would miscount where polls are nearly as slow as ticks.
    """
    for span in (2, 4, 8, 16):
        if len(middle_s) > 2 * span:
            stretches_s = middle_s[span:] - middle_s[:-span]
            period_s = float(np.median(stretches_s / np.maximum(np.round(stretches_s / period_s), 1)))
    turns = np.exp(2j * np.pi * (middle_s[:16] - middle_s[0]) / period_s)
    phase_s = middle_s[0] + float(np.angle(turns.mean())) * period_s / (2 * np.pi)
    number = np.zeros(len(middle_s))
    for i, time_s in enumerate(middle_s):
        number[i] = np.round((time_s - phase_s) / period_s)
        phase_s += _FOLLOW * (time_s - phase_s - number[i] * period_s)
    return np.asarray(number - number[0])


def _nearest_grid_points(before_s: Array, seen_s: Array, phase_s: float, period_s: float) -> Array:
    """Per interval the last grid point in it (what a poll shows is the latest tick), or else the nearest."""
    number = np.floor((seen_s - phase_s) / period_s)
    below_s, above_s = phase_s + number * period_s, phase_s + (number + 1) * period_s
    misses = below_s <= before_s
    return np.where(misses & (above_s - seen_s < before_s - below_s), above_s, below_s)
