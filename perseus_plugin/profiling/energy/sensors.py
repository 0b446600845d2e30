"""Which stretch of time a tick of this GPU's energy counter measures, found by maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.profiling.energy.regression import Fit, Sensor, Series, moments, period_s, solve
from perseus_plugin.profiling.energy.ticks import Array

_RHOS = (0.0, 0.8, 0.98, 0.998, 1.0)
_WINDOW_SHARES = (0.05, 0.1, 0.17, 0.25, 0.37, 0.5, 0.7, 0.85)
_TAU = 0.01  # smoothness over clocks assumed in the search
_FINEST_S = 2e-4  # lags are searched down to this step
_BLURRED = 0.3  # of the period: ticks known no better cannot be told from missed ones, nor a window be placed


def find_sensor(series: Sequence[Series], frequencies: Sequence[int], shortest_s: float) -> Sensor:
    """The most likely window, lag and noise structure.

    `shortest_s` is the duration of the shortest instruction: lags are searched in finer steps than that. A sampling
    window must beat the integrating sensor by the usual penalty for one more parameter, and a lag is taken to be
    small unless the data say otherwise. With too few ticks to tell, ticks are taken to integrate, without lag.
    """
    search = _Search(series, frequencies, period_s(series))
    if search.count() < 4 * (1 + len(series[0].timeline.edges_s)) + 8:
        return Sensor(None, 0.0, 1.0)
    low_s, high_s = _lag_range(search.period)
    step_s = min(search.period / 8, max(shortest_s / 2, 0.002))
    lags = [float(lag) for lag in np.arange(low_s, high_s, step_s)]
    best = search.refined([search.scored(Sensor(None, lag)) for lag in (0.0, *lags)], step_s)
    if float(np.median([s.stretch.blur_s for s in series])) <= _BLURRED * search.period:
        windows = [share * search.period for share in _WINDOW_SHARES]
        coarse = [search.scored(Sensor(window, lag)) for window in windows for lag in lags]
        best = max(best, search.refined(coarse, step_s), key=lambda scored: scored.score)
    return best.sensor


def sensor_covariance(
    series: Sequence[Series], frequencies: Sequence[int], sensor: Sensor, step_s: float = 5e-4
) -> Array:
    """What not knowing lag and window exactly adds to the covariance of the powers, in W^2 (delta method)."""
    search = _Search(series, frequencies, period_s(series))

    def spread(low: Sensor, high: Sensor) -> Array:
        below, centre, above = search.fit(low), search.fit(sensor), search.fit(high)
        curvature = -(above.loglik - 2 * centre.loglik + below.loglik) / step_s**2
        variance = min(1 / max(curvature, 1e-12), (search.period / 8) ** 2)
        slope = (above.power_w - below.power_w).ravel() / (2 * step_s)
        return np.asarray(variance * np.outer(slope, slope))

    lag_s, window_s = sensor.lag_s, sensor.window_s
    total = spread(replace(sensor, lag_s=lag_s - step_s), replace(sensor, lag_s=lag_s + step_s))
    if window_s is not None and window_s > 2 * step_s:
        total += spread(replace(sensor, window_s=window_s - step_s), replace(sensor, window_s=window_s + step_s))
    return total


@dataclass(frozen=True)
class _Scored:
    score: float
    sensor: Sensor


@dataclass(frozen=True)
class _Search:
    series: Sequence[Series]
    frequencies: Sequence[int]
    period: float

    def margin_s(self) -> tuple[float, float]:
        """Time that ticks need before and after them so that every lag and window finds the same ticks."""
        low_s, high_s = _lag_range(self.period)
        return high_s + 0.5 * self.period, -low_s

    def count(self) -> int:
        """Ticks that all candidates are compared on."""
        data = moments(self.series, len(self.frequencies), Sensor(), self.period, margin_s=self.margin_s())
        return data[0].count

    def fit(self, sensor: Sensor) -> Fit:
        data = moments(self.series, len(self.frequencies), sensor, self.period, margin_s=self.margin_s())
        return solve(data[0], self.frequencies, _TAU)

    def scored(self, sensor: Sensor) -> _Scored:
        """Penalised log likelihood with the best noise structure."""
        integrates = sensor.window_s is None
        rhos = _RHOS if integrates else (0.0,)
        data = moments(self.series, len(self.frequencies), sensor, self.period, rhos, self.margin_s())
        logliks = [solve(one, self.frequencies, _TAU).loglik for one in data]
        best = int(np.argmax(logliks))
        penalty = 0.5 * (sensor.lag_s / (0.5 * self.period + 0.02)) ** 2
        penalty += 0.0 if integrates else 0.5 * math.log(data[0].count)
        return _Scored(logliks[best] - penalty, replace(sensor, rho=rhos[best]))

    def refined(self, coarse: Sequence[_Scored], step_s: float) -> _Scored:
        """Descend from the best of a grid of lags (and windows) with ever smaller steps."""
        best = max(coarse, key=lambda scored: scored.score)
        low_s, high_s = _lag_range(self.period)
        step_s, share = step_s / 2, 1.3
        while step_s > _FINEST_S:
            window_s, lag_s = best.sensor.window_s, best.sensor.lag_s
            windows: list[float | None] = [window_s]
            if window_s is not None:
                windows += [min(window_s * share, self.period), window_s / share]
            lags = [min(max(lag_s + move, low_s), high_s) for move in (-step_s, 0.0, step_s)]
            sensors = dict.fromkeys((window, lag) for window in windows for lag in lags)
            tries = [self.scored(Sensor(*one)) for one in sensors if one != (window_s, lag_s)]
            best = max([best, *tries], key=lambda scored: scored.score)
            step_s, share = step_s / 2, math.sqrt(share)
        return best


def _lag_range(period: float) -> tuple[float, float]:
    """Lowest and highest lag considered."""
    return -0.25 * period - 0.002, max(1.25 * period, 0.04)
