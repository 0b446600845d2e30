"""Means of figures that differ by more than their errors (DerSimonian and Laird 1986)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Figure = tuple[float, float]
"""A value and its standard error (NaN: unknown)."""


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Their mean, and its standard error, which includes how they differ; NaN of nothing."""
    known = _known(figures)
    if not known:
        return math.nan, math.nan
    values, errors = _arrays(known)
    weights = 1 / (errors**2 + _between(values, errors))
    return float(weights @ values / weights.sum()), float(weights.sum() ** -0.5)


def variance_between(figures: Sequence[Figure]) -> float:
    """By which variance they differ beyond their errors; 0 for fewer than two."""
    known = _known(figures)
    return _between(*_arrays(known)) if known else 0.0


def _known(figures: Sequence[Figure]) -> list[Figure]:
    return [(value, error) for value, error in figures if math.isfinite(value) and math.isfinite(error)]


def _arrays(known: Sequence[Figure]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.array([value for value, _ in known])
    return values, np.maximum([error for _, error in known], 1e-12 * np.abs(values).max() + 1e-300)


def _between(values: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    weights = errors**-2.0
    mean = weights @ values / weights.sum()
    excess = float(weights @ (values - mean) ** 2) - (len(values) - 1)
    scale = weights.sum() - (weights**2).sum() / weights.sum()
    return max(0.0, excess / scale) if scale > 0 else 0.0
