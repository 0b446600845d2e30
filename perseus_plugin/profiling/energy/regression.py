"""Regression of counter ticks on what the GPU did while each tick was measured.

Power is modelled as one number per (kind of work, clock), waiting being a kind of work, and a ramp from the beginning
to the end of an execution, which keeps power that varies within it from being taken for a lag. Three things make the
fit precise with few iterations:

- *What a tick measures* is fitted: a sensor may integrate the whole time between two ticks, or sample a shorter window
  and extrapolate, and shows the result some lag later (Yang et al., "Part-time Power Measurements", SC 2024).
- *Noise* between ticks. Where ticks integrate, an error in the time of a tick takes energy from one increment and
  gives it to the next, so neighbouring errors cancel: their covariance is `(1 - rho) I + rho/2 tridiag(-1, 2, -1)`,
  which the discrete sine transform diagonalises. `rho` is fitted.
- *Clocks help each other*: power over the clock is a low polynomial plus deviations of relative size `tau`, fitted
  by marginal likelihood (a Gaussian process in the sense of Rasmussen & Williams 2006, chapter 2.7). A direction that
  the data say nothing about keeps a standard error as large as the typical power, instead of breaking the fit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from perseus_plugin.profiling.energy.ticks import Array, Stretch, Timeline, stretches, timeline
from perseus_plugin.profiling.observations import ClockRun

_RAMP = 0.2
_TAUS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12)


@dataclass(frozen=True)
class Series:
    """A stretch of ticks with what the GPU did meanwhile.

    Attributes:
        clock: index of the run's clock.
        stretch, timeline: ticks and activities.
        power_w: mean power over the stretch; noise is taken as proportional to it.
    """

    clock: int
    stretch: Stretch
    timeline: Timeline
    power_w: float


@dataclass(frozen=True)
class Sensor:
    """What one tick measures.

    Attributes:
        window_s: length of the sampled window, or None when a tick integrates all time since the tick before.
        lag_s: from the end of the measured time to the tick.
        rho: how much of the noise is in the times of the ticks (integrating sensors only).
    """

    window_s: float | None = None
    lag_s: float = 0.0
    rho: float = 0.0

    def variance(self, n: int, rho: float | None = None) -> Array:
        """Variance of each of the n sine coefficients of a stretch's errors, up to a common factor."""
        if self.window_s is not None:
            return np.ones(n)
        rho = self.rho if rho is None else rho
        return np.asarray((1 - rho) + rho * (1 - np.cos(np.pi * np.arange(1, n + 1) / (n + 1))))


@dataclass(frozen=True)
class Fit:
    """Power per clock and kind of work.

    Attributes:
        power_w: shape (clocks, 1 + 2 * kinds): waiting, the kinds, and by how much each kind's power is higher at the
            end of an execution than in its middle.
        covariance: shape (clocks * (1 + 2 * kinds),) * 2, in W^2, clock-major.
        loglik: log marginal likelihood up to a constant.
        noise_s: standard deviation of a tick's error, as seconds of mean power.
    """

    power_w: Array
    covariance: Array
    loglik: float
    noise_s: float


def make_series(runs: Sequence[ClockRun], clocks: Sequence[int], kinds: Sequence[str]) -> list[list[Series]]:
    """Series of each run; an empty list for a run without usable ticks."""
    result = []
    for run in runs:
        line = timeline(run, kinds)
        result.append(
            [
                Series(clocks.index(run.frequency_mhz), s, line, float(s.energy_j.sum() / np.ptp(s.times_s)))
                for s in stretches(run)
            ]
        )
    return result


def period_s(series: Iterable[Series]) -> float:
    """Typical time between two ticks."""
    return float(np.median(np.concatenate([np.diff(s.stretch.times_s) for s in series])))


def rows(series: Series, sensor: Sensor, period: float, margin_s: tuple[float, float] | None = None) -> Array:
    """Regression rows, shape (n, 2 + 2 * kinds): the columns of `Timeline.seconds` and joules, a row per tick.

    Only ticks whose measured time lies within the run; with `margin_s = (before, after)` only those whose time would
    lie within it for every lag and window considered, so that likelihoods compare the same ticks.
    """
    times, energy = series.stretch.times_s, series.stretch.energy_j
    line = series.timeline
    ends = times[1:] - sensor.lag_s
    starts = times[:-1] - sensor.lag_s if sensor.window_s is None else ends - sensor.window_s
    if margin_s is None:
        keep = (starts >= line.begin_s) & (ends <= line.end_s)
    else:
        keep = (times[:-1] - margin_s[0] >= line.begin_s) & (times[1:] + margin_s[1] <= line.end_s)
    gaps = times[1:] - times[:-1]
    if sensor.window_s is not None or margin_s is not None:
        keep &= np.abs(gaps - period) <= 0.5 * period
    kept = np.flatnonzero(keep)
    table = np.empty((len(kept), 2 + 2 * len(line.edges_s)))
    table[:, -1] = energy[kept]
    if sensor.window_s is None:
        until = line.seconds(np.minimum(np.maximum(times - sensor.lag_s, line.begin_s), line.end_s))
        table[:, :-1] = (until[1:] - until[:-1])[kept]
    else:
        until = line.seconds(np.concatenate([ends[kept], starts[kept]]))
        table[:, :-1] = (until[: len(kept)] - until[len(kept) :]) * (gaps[kept] / sensor.window_s)[:, None]
    return table


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of whitened rows for one sensor.

    Attributes:
        gram: shape (clocks, p + 1, p + 1): rows' cross products, power in units of `unit_w`, energy last.
        count: rows. logdet: log determinant of the rows' covariance. unit_w: typical power.
    """

    gram: Array
    count: int
    logdet: float
    unit_w: float


def moments(
    series: Sequence[Series],
    clocks: int,
    sensor: Sensor,
    period: float,
    rhos: Sequence[float] | None = None,
    margin_s: tuple[float, float] | None = None,
) -> list[Moments]:
    """Moments for each rho (which a sampling sensor ignores); by default for the sensor's."""
    rhos = (sensor.rho,) if rhos is None else rhos
    width = 2 + 2 * len(series[0].timeline.edges_s)
    unit_w = statistics.median(s.power_w for s in series)
    grams = np.zeros((len(rhos), clocks, width, width))
    logdets = np.zeros(len(rhos))
    count = 0
    for s in series:
        table = rows(s, sensor, period, margin_s)
        n = len(table)
        if n == 0:
            continue
        count += n
        table[:, :-1] *= unit_w
        table /= s.power_w
        if sensor.window_s is not None:
            grams[:, s.clock] += table.T @ table
            continue
        waves = sine_transform(table)
        for i, rho in enumerate(rhos):
            variance = sensor.variance(n, rho)
            grams[i, s.clock] += waves.T @ (waves / variance[:, None])
            logdets[i] += np.log(variance).sum()
    return [Moments(gram, count, float(logdet), unit_w) for gram, logdet in zip(grams, logdets, strict=True)]


def sine_transform(table: Array) -> Array:
    """Orthonormal discrete sine transform (type I) of the columns."""
    n = len(table)
    zero = np.zeros((1, table.shape[1]))
    odd = np.concatenate([zero, table, zero, -table[::-1]])
    return np.asarray(-np.fft.rfft(odd, axis=0).imag[1 : n + 1] / math.sqrt(2 * (n + 1)))


def solve(data: Moments, frequencies: Sequence[int], tau: float) -> Fit:
    """Power per clock and kind, given noise structure and smoothness over clocks."""
    clocks, width = data.gram.shape[0], data.gram.shape[1] - 1
    noise2 = _noise(data)
    prior = _prior(tuple(frequencies), width, tau)
    precision = prior.rough.copy()
    every = np.arange(clocks)
    precision.reshape(clocks, width, clocks, width)[every, :, every, :] += data.gram[:, :-1, :-1] / noise2
    precision.flat[:: len(precision) + 1] += prior.precision
    target = (data.gram[:, :-1, -1] / noise2).ravel() + prior.target
    total = data.gram[:, -1, -1].sum() / noise2 + prior.total
    covariance = np.linalg.inv(precision)
    covariance = (covariance + covariance.T) / 2
    power = covariance @ target
    logdet = float(np.linalg.slogdet(precision)[1])
    loglik = -0.5 * (data.count * math.log(noise2) + data.logdet + (total - target @ power) - prior.logarithm + logdet)
    return Fit(
        power.reshape(clocks, width) * data.unit_w,
        covariance * data.unit_w**2,
        float(loglik),
        math.sqrt(noise2),
    )


def _noise(data: Moments) -> float:
    """Variance of whitened rows, from every clock fitted by itself."""
    normal, right = data.gram[:, :-1, :-1], data.gram[:, :-1, -1]
    scale = np.trace(normal, axis1=1, axis2=2)
    values, vectors = np.linalg.eigh(normal)
    real = values > 1e-10 * np.maximum(scale, 1e-300)[:, None]
    projected = np.einsum("cij,ci->cj", vectors, right)
    explained = np.where(real, projected**2 / np.where(real, values, 1.0), 0.0).sum(axis=1)
    left = float(np.maximum(data.gram[:, -1, -1] - explained, 0.0).sum())
    used = int(real.sum())
    # The floor is a microsecond of power; it only matters for data without any noise.
    return max(left / max(data.count - used, 1), 1e-12)


@dataclass(frozen=True)
class _Prior:
    """What is known of powers beforehand, clock-major.

    Attributes:
        rough: precision of what no polynomial in the clock follows. precision, target: of each power by itself.
        total: the means' squares by their precision. logarithm: what `tau` adds to that of the determinant.
    """

    rough: Array
    precision: Array
    target: Array
    total: float
    logarithm: float


@lru_cache(maxsize=64)
def _prior(frequencies: tuple[int, ...], width: int, tau: float) -> _Prior:
    """Powers that are smooth over clocks to within `tau`, and of about the typical size."""
    clocks, kinds = len(frequencies), (width - 1) // 2
    rough = np.zeros((clocks, width, clocks, width))
    mean, error = np.ones(width), np.ones(width)
    logarithm = 0.0
    for k in range(width):
        projection, freedom = _roughness(frequencies, linear=k == 0 or k > kinds)
        rough[:, k, :, k] = projection / tau**2
        logarithm += freedom * -2 * math.log(tau)
        if k > kinds:
            mean[k], error[k] = 0.0, _RAMP
    # Weak priors on the mean over clocks: any power is 1 +- 1 in units of the typical power, a ramp 0 +- 0.2.
    return _Prior(
        rough.reshape(clocks * width, clocks * width),
        np.tile(1 / (clocks * error**2), clocks),
        np.tile(mean / (clocks * error**2), clocks),
        float((mean**2 / error**2).sum()),
        logarithm,
    )


def _roughness(frequencies: tuple[int, ...], *, linear: bool) -> tuple[Array, int]:
    """Projection on what a polynomial in the clock cannot follow, and its rank."""
    clocks = len(frequencies)
    terms = min(clocks, 2 if linear and clocks > 2 else 4 if clocks >= 6 else 3)
    f = np.array(frequencies, dtype=float)
    x = (f - f.mean()) / max(float(np.ptp(f)), 1.0)
    basis, _ = np.linalg.qr(np.vander(x, terms))
    return np.eye(clocks) - basis @ basis.T, clocks - terms


def best_tau(data: Moments, frequencies: Sequence[int]) -> Fit:
    """Solve with the most likely smoothness over clocks (log-normal prior around 1 %)."""
    fits = [(solve(data, frequencies, tau), tau) for tau in _TAUS]
    return max(fits, key=lambda pair: pair[0].loglik - 0.5 * math.log(pair[1] / 0.01) ** 2)[0]
