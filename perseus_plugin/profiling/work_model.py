"""How long an instruction takes, by the work of its microbatch: a number that is known before the step. Pure.

Of each stage and kind the time at full clocks is a line in the work, or a parabola where that says clearly more of
durations it was not fitted to. Power is that of the clock, so that energies go with the times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perseus_plugin.iteration.graph import FloatArray

EXPLAINS = 0.5
"""Share of the durations' variance that works have to explain, to be of use."""
_FEWEST = 8  # durations of a kind, for a parabola more by one half
_CLEARLY = 0.95  # of a line's error on what it was not fitted to, which a parabola must keep below
_HICCUP = 6.0  # robust standard deviations from the fit that are the host's doing
_LEAST = 0.2  # of the shortest time seen: nothing is taken to be shorter than that
_SAME = 1e-3  # relative differences of works that are none

Observed = Mapping[tuple[int, str], tuple[FloatArray, FloatArray]]
"""By stage and kind: works, and the times at full clocks in seconds."""


@dataclass(frozen=True, slots=True)
class TimeByWork:
    """Of one stage and kind.

    Attributes:
        coefficients: of the time in seconds, by rising power of the work over `high`.
        low, high: between which works have been seen; further out the time goes on straight.
        shortest_s: the shortest time seen.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float
    shortest_s: float

    def at(self, works: npt.ArrayLike) -> FloatArray:
        """The times that these works take, in seconds."""
        given = np.asarray(works, dtype=np.float64) / self.high
        inside = np.clip(given, self.low / self.high, 1.0)
        powers = np.arange(len(self.coefficients))
        coefficients = np.array(self.coefficients)
        time_s = (coefficients * inside[..., None] ** powers).sum(axis=-1)
        slope = (coefficients[1:] * powers[1:] * inside[..., None] ** powers[:-1]).sum(axis=-1)
        found: FloatArray = np.maximum(time_s + slope * (given - inside), _LEAST * self.shortest_s)
        return found


@dataclass(frozen=True)
class WorkModel:
    """Of a job.

    Attributes:
        of: by stage and kind.
        explained: share of the variance of all durations that the works explain, those that it was fitted to; -inf: the
            works do not differ.
        error: root mean square of what they leave, as a share of the mean duration.
    """

    of: Mapping[tuple[int, str], TimeByWork]
    explained: float
    error: float

    @property
    def explains(self) -> bool:
        """Whether it is of any use."""
        return self.explained >= EXPLAINS

    def held_against(self, observed: Observed) -> tuple[float, float]:
        """What it explains of other durations, and its error there; see the class."""
        return _explained(self.of, observed)


def fitted(observed: Observed) -> WorkModel | None:
    """The model that these durations make; None where there are too few of some kind."""
    if not observed or any(len(works) < _FEWEST for works, _ in observed.values()):
        return None
    of = {key: _of_kind(works, times_s) for key, (works, times_s) in observed.items()}
    return WorkModel(of, *_explained(of, observed))


def _of_kind(works: FloatArray, times_s: FloatArray) -> TimeByWork:
    high, low = float(works.max()), float(works.min())
    scaled = works / high
    if high - low <= _SAME * high:
        return TimeByWork((float(np.median(times_s)), 0.0), low, high, float(times_s.min()))
    line, of_line = _fit(scaled, times_s, 1)
    best = line
    if len(works) >= _FEWEST * 3 // 2:
        parabola, of_parabola = _fit(scaled, times_s, 2)
        turns = parabola[2] and low / high < -parabola[1] / (2 * parabola[2]) < 1
        if of_parabola < _CLEARLY * of_line and not turns:
            best = parabola
    return TimeByWork(tuple(best.tolist()), low, high, float(times_s.min()))


def _fit(x: FloatArray, y: FloatArray, degree: int) -> tuple[FloatArray, float]:
    """Coefficients by rising power, and the root mean square error where each value is left out of its own fit."""
    columns = x[:, None] ** np.arange(degree + 1)
    kept = np.ones(len(x), dtype=bool)
    for _ in range(2):
        found, *_rest = np.linalg.lstsq(columns[kept], y[kept], rcond=None)
        off = np.abs(y - columns @ found)
        kept = off <= max(_HICCUP * 1.4826 * float(np.median(off)), 1e-12 * float(np.abs(y).max()))
        if kept.sum() <= degree + 1:
            kept[:] = True
            break
    found, *_rest = np.linalg.lstsq(columns[kept], y[kept], rcond=None)
    leverage = (np.linalg.qr(columns[kept])[0] ** 2).sum(axis=1)
    left_out = (y[kept] - columns[kept] @ found) / np.maximum(1 - leverage, 1e-9)
    return np.asarray(found, dtype=np.float64), float(np.sqrt(np.mean(left_out**2)))


def _explained(of: Mapping[tuple[int, str], TimeByWork], observed: Observed) -> tuple[float, float]:
    """Hiccups count as the largest of what is left, so that a single one does not decide."""
    left, spread, total_s, count, differ = 0.0, 0.0, 0.0, 0, False
    for key, (works, times_s) in observed.items():
        if key not in of or not len(works):
            continue
        off = np.abs(times_s - of[key].at(works))
        limit = max(_HICCUP * 1.4826 * float(np.median(off)), 1e-9)
        left += float((np.minimum(off, limit) ** 2).sum())
        about = np.abs(times_s - np.median(times_s))
        spread += float((np.minimum(about, max(_HICCUP * 1.4826 * float(np.median(about)), limit)) ** 2).sum())
        total_s, count = total_s + float(times_s.sum()), count + len(works)
        differ = differ or float(np.ptp(works)) > _SAME * float(works.max())
    if not count or not differ or spread <= 0:
        return -math.inf, math.nan
    return 1 - left / spread, math.sqrt(left / count) / (total_s / count)
