"""Time and energy of each instruction kind at each clock, with standard errors, from runs at locked clocks.

Pure numerics: no GPU, no clock, no I/O. `estimate_stage` turns one GPU's `ClockRun`s into a `StageEstimate`, `pool`
(see `pooling.py`) joins data-parallel replicas, `to_profile` makes the table that the planner reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.profiling import regression
from perseus_plugin.profiling.observations import (
    BLOCKING,
    Activity,
    ClockRun,
    InstructionEstimate,
    StageEstimate,
    Tick,
)
from perseus_plugin.profiling.pooling import blocking_power, pool, to_profile, unresolved_kinds
from perseus_plugin.profiling.regression import Fit, Moments, Sensor, Series
from perseus_plugin.profiling.ticks import Array, Stretch, durations_s

__all__ = [
    "BLOCKING",
    "Activity",
    "ClockRun",
    "InstructionEstimate",
    "StageEstimate",
    "Tick",
    "blocking_power",
    "estimate_stage",
    "pool",
    "to_profile",
]

_OUTLIER = 6.0  # durations this many robust standard deviations away are hiccups of the host, not the instruction
_BLOCKING_SHARE = 0.5  # of the lowest instruction power: what waiting is taken to draw when no waiting was seen


def estimate_stage(runs: Sequence[ClockRun], *, max_relative_error: float = 0.05) -> StageEstimate:
    """Estimate one stage from one GPU's runs.

    Capped runs are dropped: they are not at the clock they name. Never raises for poor data; what cannot be known is
    NaN, and what is not known well enough is in `unresolved`.

    Args:
        runs: blocks of whole iterations at one clock each, in any order; revisits of a clock measure drift.
        max_relative_error: standard error of an instruction's energy, relative to it, above which its kind is
            reported as unresolved.
    """
    usable = [run for run in runs if not run.capped and run.end_s > run.begin_s]
    kinds = sorted({a.kind for run in runs for a in run.activities})
    seen = {
        (kind, clock): _typical_s([a for run in usable if run.frequency_mhz == clock for a in run.activities], kind)
        for kind in kinds
        for clock in {run.frequency_mhz for run in usable}
    }
    never = {kind for kind in kinds if not any(seen[k] for k in seen if k[0] == kind)}
    kinds = [kind for kind in kinds if kind not in never]
    # A clock counts only if every kind was seen at it: a plan needs all of a stage's kinds at each of its clocks.
    clocks = [c for c in sorted({run.frequency_mhz for run in usable}) if all(seen[kind, c] for kind in kinds)]
    usable = [run for run in usable if run.frequency_mhz in clocks]
    if not kinds or not clocks:
        return StageEstimate((), math.nan, math.nan, math.nan, math.nan, frozenset({*kinds, *never, BLOCKING}))
    powers = _fit_power(sorted(usable, key=lambda r: r.begin_s), clocks, kinds)
    instructions = []
    for k, kind in enumerate(kinds):
        for c in reversed(range(len(clocks))):
            time = seen[kind, clocks[c]]
            assert time is not None
            power_w, power_se_w = powers.instruction_w[c, k], powers.instruction_se_w[c, k]
            energy_j = float(power_w * time.mean_s)
            energy_se_j = float(math.hypot(power_se_w * time.mean_s, power_w * time.se_s))
            instructions.append(
                InstructionEstimate(
                    kind, clocks[c], time.mean_s, time.se_s, energy_j, energy_se_j, time.samples
                )
            )
    estimate = StageEstimate(
        tuple(instructions),
        powers.blocking_w,
        powers.blocking_se_w,
        powers.window_s,
        powers.lag_s,
        frozenset(),
    )
    unresolved = unresolved_kinds(estimate, max_relative_error) | never
    if not powers.waited:
        unresolved |= {BLOCKING}
    return replace(estimate, unresolved=frozenset(unresolved))


@dataclass(frozen=True)
class _Duration:
    mean_s: float
    se_s: float
    samples: int


def _typical_s(activities: Sequence[Activity], kind: str) -> _Duration | None:
    """Mean duration without hiccups; None when the kind never ran.

    The mean, not the median: energy and iteration time add up over executions of varying length. Only executions
    far outside the bulk are left out.
    """
    values = durations_s(activities, kind)
    if not len(values):
        return None
    middle = float(np.median(values))
    scale = 1.4826 * float(np.median(np.abs(values - middle)))
    kept = values[np.abs(values - middle) <= _OUTLIER * scale] if scale > 0 else values
    # One execution has no spread to see; its own duration is then all that bounds the error.
    spread = float(kept.std(ddof=1)) if len(kept) > 1 else float(kept.mean())
    return _Duration(float(kept.mean()), spread / math.sqrt(len(kept)), len(kept))


@dataclass(frozen=True)
class _Powers:
    instruction_w: Array
    instruction_se_w: Array
    blocking_w: float
    blocking_se_w: float
    waited: bool
    window_s: float
    lag_s: float


def _fit_power(runs: Sequence[ClockRun], clocks: Sequence[int], kinds: Sequence[str]) -> _Powers:
    """Power of each kind at each clock: find the sensor, fit, take out drift, fit again."""
    shape = (len(clocks), len(kinds))
    of_run = regression.make_series(runs, clocks, kinds)
    series = [s for group in of_run for s in group]
    unknown = np.full(shape, math.nan)
    if not series:
        return _Powers(unknown, unknown, math.nan, math.nan, False, math.nan, math.nan)
    shortest_s = min(float(durations_s(run.activities, kind).min(initial=1.0)) for run in runs for kind in kinds)
    sensor = regression.find_sensor(series, clocks, shortest_s)
    period = regression.period_s(series)
    data = _moments(series, len(clocks), sensor, period)
    if data.count == 0:
        return _Powers(unknown, unknown, math.nan, math.nan, False, math.nan, math.nan)
    fit = regression.best_tau(data, clocks)
    factors = _drift(runs, of_run, clocks, fit, sensor)
    if factors is not None:
        pairs = zip(of_run, factors, strict=True)
        series = [_scaled(s, float(factor)) for group, factor in pairs for s in group]
        data = _moments(series, len(clocks), sensor, period)
        fit = regression.best_tau(data, clocks)
    for _ in range(2):
        sensor = regression.with_spectrum(series, replace(sensor, spectrum=()), period, fit)
        data = _moments(series, len(clocks), sensor, period)
        fit = regression.best_tau(data, clocks)
    covariance = fit.covariance + regression.sensor_covariance(series, clocks, sensor)
    return _powers(fit.power_w, covariance, data, sensor, period)


def _moments(series: Sequence[Series], clocks: int, sensor: Sensor, period: float) -> Moments:
    return regression.moments(series, clocks, sensor, period)[0]


def _powers(power_w: Array, covariance: Array, data: Moments, sensor: Sensor, period: float) -> _Powers:
    clocks, width = power_w.shape
    se_w = np.sqrt(np.diag(covariance)).reshape(clocks, width)
    waiting = np.arange(clocks) * width
    seconds2 = np.array([gram[0, 0] for gram in data.gram])
    waited = bool(seconds2.sum() > 0)
    if waited:
        # One number for the planner: the mean over clocks.
        blocking_w = float(power_w[:, 0].mean())
        blocking_se_w = float(math.sqrt(covariance[np.ix_(waiting, waiting)].mean()))
        waited = blocking_se_w < 0.5 * blocking_w
    if not waited:
        blocking_w = blocking_se_w = _BLOCKING_SHARE * float(max(power_w[:, 1:].min(), 0.0))
    window_s = period if sensor.window_s is None else sensor.window_s
    return _Powers(power_w[:, 1:], se_w[:, 1:], blocking_w, blocking_se_w, waited, window_s, sensor.lag_s)


def _drift(
    runs: Sequence[ClockRun], of_run: Sequence[list[Series]], clocks: Sequence[int], fit: Fit, sensor: Sensor
) -> Array | None:
    """Power in each run's time relative to the last revisit of the most visited clock; None without revisits.

    A GPU draws more as it warms up. The revisits' levels are shrunk towards each other by how little they differ
    beyond their errors (James and Stein 1961), and interpolated in time.
    """
    visits: dict[int, list[int]] = {}
    for i, (run, group) in enumerate(zip(runs, of_run, strict=True)):
        if group:
            visits.setdefault(run.frequency_mhz, []).append(i)
    revisited = max(visits, key=lambda clock: (len(visits[clock]), clock))
    period = regression.period_s([s for group in of_run for s in group])
    when, level, error = [], [], []
    for i in visits[revisited]:
        data = _moments(of_run[i], len(clocks), sensor, period)
        c = clocks.index(revisited)
        power = fit.power_w[c] / data.unit_w
        information = float(power @ data.gram[c, :-1, :-1] @ power)
        if information > 0:
            when.append((runs[i].begin_s + runs[i].end_s) / 2)
            level.append(float(power @ data.gram[c, :-1, -1]) / information)
            error.append(fit.noise_s / math.sqrt(information))
    if len(when) < 2:
        return None
    levels, weights = np.array(level), np.array(error) ** -2.0
    mean = float(weights @ levels / weights.sum())
    chi2 = float(weights @ (levels - mean) ** 2)
    kept = max(0.0, 1 - (len(when) - 1) / chi2) if chi2 > 0 else 0.0
    levels = 1 + kept * (levels / mean - 1)
    middles = np.array([(run.begin_s + run.end_s) / 2 for run in runs])
    return np.asarray(np.interp(middles, when, levels / levels[-1]))


def _scaled(series: Series, factor: float) -> Series:
    stretch = Stretch(series.stretch.times_s, series.stretch.energy_j / factor)
    return replace(series, stretch=stretch, power_w=series.power_w / factor)
