"""From runs to power: find the sensor, fit, take out drift, fit again, and say how sure the result is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.profiling.energy import regression, residuals
from perseus_plugin.profiling.energy.regression import Fit, Moments, Sensor, Series, period_s
from perseus_plugin.profiling.energy.sensors import find_sensor, sensor_covariance
from perseus_plugin.profiling.energy.ticks import Array, Stretch, durations_s
from perseus_plugin.profiling.observations import ClockRun

_BLOCKING_SHARE = 0.5  # of the lowest instruction power: what waiting is taken to draw when little was seen

_HIGHEST_RHO = 0.8


@dataclass(frozen=True)
class Powers:
    """Power of each kind of work on one GPU.

    Attributes:
        instruction_w, instruction_se_w: shape (clocks, kinds); NaN without counter data.
        blocking_w, blocking_se_w: while waiting; the mean over clocks.
        blocking_at_w, blocking_at_se_w: the same at each clock, shape (clocks,).
        waited: whether `blocking_w` is measured, and not assumed.
        window_s, lag_s: what one tick measures.
    """

    instruction_w: Array
    instruction_se_w: Array
    blocking_w: float
    blocking_se_w: float
    blocking_at_w: Array
    blocking_at_se_w: Array
    waited: bool
    window_s: float
    lag_s: float

    def watts(self, clock: int, kind: int) -> tuple[float, float]:
        """Power and standard error by index of clock and kind."""
        return float(self.instruction_w[clock, kind]), float(self.instruction_se_w[clock, kind])


def fit_powers(runs: Sequence[ClockRun], clocks: Sequence[int], kinds: Sequence[str]) -> Powers:
    """Power of each kind at each clock.

    Args:
        runs: in order of time; every clock and every kind of `clocks` and `kinds` occurs in them.
    """
    of_run = regression.make_series(runs, clocks, kinds)
    series = [s for group in of_run for s in group]
    unknown = np.full((len(clocks), len(kinds)), math.nan)
    nothing = Powers(unknown, unknown, math.nan, math.nan, unknown[:, 0], unknown[:, 0], False, math.nan, math.nan)
    if not series:
        return nothing
    shortest_s = min(float(durations_s(r.activities, k).min(initial=1.0)) for r in runs for k in kinds)
    sensor = find_sensor(series, clocks, shortest_s)
    if _moments(series, len(clocks), sensor).count == 0:
        return nothing
    fitted = _settle(series, clocks, sensor)
    drift = _drift(runs, of_run, clocks, fitted)
    if drift is not None:
        pairs = zip(of_run, drift.factors, strict=True)
        series = [_scaled(s, float(factor)) for group, factor in pairs for s in group]
        fitted = _settle(series, clocks, sensor)
    power_w = fitted.fit.power_w.ravel()
    covariance = fitted.fit.covariance * np.outer(fitted.grow, fitted.grow)
    covariance += sensor_covariance(series, clocks, fitted.sensor)
    if drift is not None:
        covariance += drift.error**2 * np.outer(power_w, power_w)
    return _powers(fitted, covariance, period_s(series))


def held_to_limit(powers: Powers, runs: Sequence[ClockRun], clocks: Sequence[int], kinds: Sequence[str]) -> Powers:
    """Where a GPU is at its power limit, waiting draws what it draws at the nearest clock at which it is not.

    After a wait such a GPU runs above its limit for a moment, so that part of its work's power looks like that of the
    wait before (on an H100 that wanted 850 W of 700: 174 W of waiting instead of 126). What is taken off waits goes to
    the work of the same iterations, whose energy as a whole is known.

    Args:
        powers: as fitted.
        runs: that they were fitted to.
        clocks: of `powers`, rising.
        kinds: of `powers`.
    """
    at_limit = {run.frequency_mhz for run in runs if run.at_limit}
    free = [i for i, clock in enumerate(clocks) if clock not in at_limit]
    if not powers.waited or not at_limit or not free:
        return powers
    waiting_w, waiting_se_w = powers.blocking_at_w.copy(), powers.blocking_at_se_w.copy()
    work_w = powers.instruction_w.copy()
    for i, clock in enumerate(clocks):
        if clock not in at_limit:
            continue
        nearest = min(free, key=lambda other: abs(clocks[other] - clock))
        excess_w = waiting_w[i] - waiting_w[nearest]
        if not excess_w > 0:
            continue
        of_clock = [run for run in runs if run.frequency_mhz == clock]
        busy_s = sum(a.end_s - a.start_s for run in of_clock for a in run.activities if a.kind in kinds)
        waited_s = max(0.0, sum(run.end_s - run.begin_s for run in of_clock) - busy_s)
        waiting_w[i], waiting_se_w[i] = waiting_w[nearest], waiting_se_w[nearest]
        work_w[i] += excess_w * waited_s / busy_s
    return replace(
        powers,
        instruction_w=work_w,
        blocking_w=float(waiting_w.mean()),
        blocking_at_w=waiting_w,
        blocking_at_se_w=waiting_se_w,
    )


@dataclass(frozen=True)
class _Fitted:
    """A fit, the sensor with its noise, and the factor that each power's standard error has to grow by."""

    fit: Fit
    sensor: Sensor
    grow: Array


def _settle(series: Sequence[Series], clocks: Sequence[int], sensor: Sensor) -> _Fitted:
    """Fit with a noise structure that also holds up where it is wrong.

    The most likely structure may put nearly all noise in the times of ticks, and would then weigh executions by
    where ticks happen to fall in them. Executions differ in power, so a milder structure has the smaller error.
    """
    sensor = replace(sensor, rho=min(sensor.rho, _HIGHEST_RHO))
    data = _moments(series, len(clocks), sensor)
    fit = regression.best_tau(data, clocks)
    grow = np.tile(residuals.inflation(series, sensor, fit), len(clocks))
    return _Fitted(fit, sensor, grow)


def _moments(series: Sequence[Series], clocks: int, sensor: Sensor) -> Moments:
    return regression.moments(series, clocks, sensor, period_s(series))[0]


def _powers(fitted: _Fitted, covariance: Array, period: float) -> Powers:
    power_w = fitted.fit.power_w
    clocks, width = power_w.shape
    se_w = np.sqrt(np.diag(covariance)).reshape(clocks, width)
    waiting = np.arange(clocks) * width
    kinds = slice(1, 1 + (width - 1) // 2)
    blocking_w = float(power_w[:, 0].mean())
    blocking_se_w = float(math.sqrt(covariance[np.ix_(waiting, waiting)].mean()))
    at_w, at_se_w = power_w[:, 0], se_w[:, 0]
    waited = blocking_w > 0 and blocking_se_w < 0.5 * blocking_w
    if not waited:
        blocking_w = blocking_se_w = _BLOCKING_SHARE * float(max(power_w[:, kinds].min(), 0.0))
        at_w = at_se_w = np.full(clocks, blocking_w)
    sensor = fitted.sensor
    window_s = period if sensor.window_s is None else sensor.window_s
    return Powers(
        power_w[:, kinds], se_w[:, kinds], blocking_w, blocking_se_w, at_w, at_se_w, waited, window_s, sensor.lag_s
    )


@dataclass(frozen=True)
class _Drift:
    """Power in each run's time relative to the end of the sweep, and the relative error of that reference."""

    factors: Array
    error: float


def _drift(
    runs: Sequence[ClockRun], of_run: Sequence[list[Series]], clocks: Sequence[int], fitted: _Fitted
) -> _Drift | None:
    """How power drifted, from revisits of the most visited clock; None without revisits or visible drift.

    A GPU draws more as it warms up. The revisits' levels are shrunk towards each other by how little they differ
    beyond their errors (James and Stein 1961), and interpolated in time.
    """
    visits: dict[int, list[int]] = {}
    for i, (run, group) in enumerate(zip(runs, of_run, strict=True)):
        if group:
            visits.setdefault(run.frequency_mhz, []).append(i)
    revisited = max(visits, key=lambda clock: (len(visits[clock]), clock))
    power_w = fitted.fit.power_w[clocks.index(revisited)]
    when, level, error = [], [], []
    for i in visits[revisited]:
        found = residuals.level(of_run[i], fitted.sensor, power_w)
        if found is not None:
            when.append((runs[i].begin_s + runs[i].end_s) / 2)
            level.append(found[0])
            error.append(found[1])
    if len(when) < 2:
        return None
    levels, weights = np.array(level), np.array(error) ** -2.0
    mean = float(weights @ levels / weights.sum())
    chi2 = float(weights @ (levels - mean) ** 2)
    kept = max(0.0, 1 - (len(when) - 1) / chi2) if chi2 > 0 else 0.0
    if kept == 0:
        return None
    levels = 1 + kept * (levels / mean - 1)
    middles = np.array([(run.begin_s + run.end_s) / 2 for run in runs])
    return _Drift(np.interp(middles, when, levels / levels[-1]), kept * error[-1])


def _scaled(series: Series, factor: float) -> Series:
    stretch = Stretch(series.stretch.times_s, series.stretch.energy_j / factor)
    return replace(series, stretch=stretch, power_w=series.power_w / factor)
