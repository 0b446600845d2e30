"""What the residuals of a fit say: how far to trust its standard errors, and whether power drifted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perseus_plugin.profiling.energy.regression import Fit, Sensor, Series, period_s, rows, sine_transform
from perseus_plugin.profiling.energy.ticks import Array

_BLOCK_TICKS = 6  # a block of time has at least this many ticks
_BLOCKS = 12  # at most, per stretch


def inflation(series: Sequence[Series], sensor: Sensor, fit: Fit) -> Array:
    """Per column of the fit, by how much standard errors must grow because its noise is not like the average tick's.

    Compares the fit's covariance with the one from sums of scores over blocks of time, which holds whatever the
    noise (a sandwich estimator, Liang and Zeger 1986), pooled over clocks; never below 1. Shape (1 + 2 * kinds,), as
    the columns of `Fit.power_w`.
    """
    clocks, width = fit.power_w.shape
    influence = fit.covariance / fit.noise_s**2
    meat = np.zeros((clocks, width, width))
    model = np.zeros((clocks, width, width))
    period = period_s(series)
    for s in series:
        table = rows(s, sensor, period)
        n = len(table)
        if n < 2 * _BLOCK_TICKS:
            continue
        table /= s.power_w
        residual = table[:, -1] - table[:, :-1] @ fit.power_w[s.clock]
        variance = sensor.variance(n)
        weighted = sine_transform(sine_transform(residual[:, None]) / variance[:, None])
        scores = table[:, :-1] * weighted
        blocks = np.array([b.sum(axis=0) for b in np.array_split(scores, min(n // _BLOCK_TICKS, _BLOCKS))])
        meat[s.clock] += blocks.T @ blocks
        waves = sine_transform(table[:, :-1])
        model[s.clock] += fit.noise_s**2 * waves.T @ (waves / variance[:, None])
    factors = np.ones(width)
    for k in range(width):
        ways = influence[np.arange(clocks) * width + k].reshape(clocks, clocks, width)
        expected = np.einsum("acp,cpq,acq->", ways, model, ways)
        if expected > 0:
            factors[k] = math.sqrt(max(1.0, np.einsum("acp,cpq,acq->", ways, meat, ways) / expected))
    return factors


def level(series: Sequence[Series], sensor: Sensor, power_w: Array) -> tuple[float, float] | None:
    """Measured over expected energy of some stretches, and its standard error; None with too few ticks."""
    period = period_s(series)
    blocks: list[Array] = []
    expected_j = 0.0
    for s in series:
        table = rows(s, sensor, period)
        if len(table) >= 2 * _BLOCK_TICKS:
            expected = table[:, :-1] @ power_w
            expected_j += float(expected.sum())
            pieces = np.array_split(table[:, -1] - expected, min(len(table) // _BLOCK_TICKS, _BLOCKS))
            blocks += [piece.sum() for piece in pieces]
    if not blocks or expected_j <= 0:
        return None
    excess = np.array(blocks)
    error = math.sqrt(len(excess) * float(excess.var(ddof=1))) / expected_j
    return 1 + float(excess.sum()) / expected_j, max(error, 1e-6)
