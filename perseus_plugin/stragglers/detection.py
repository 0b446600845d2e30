"""Telling a slow rank from noise, and from a job that has changed. Pure.

Only compute instructions count, so waiting in a collective or for a peer is nobody's slowness. They are compared with
the profile at the clock that the plan asked for, so planned slow clocks and unequal stages are no stragglers; and then
with what other ranks do in the same iteration, against the profile too: longer sequences, a larger batch or a longer
step slow all stages of a pipeline alike, and are nobody's slowness either.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import compress

from perseus_plugin.exchange.messages import PlanPart
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord

_SIGMAS = 6.0  # how far beyond the noise: at 10,000 ranks and 10,000 iterations still no false alarm is expected
_MEDIAN_EFFICIENCY = 1.2533  # standard error of a median against that of a mean
_MAD_TO_SIGMA = 1.4826
_MIN_NOISE, _NOISE_UNKNOWN = 0.002, 0.03
_NOISE_SAMPLES, _ENOUGH_SAMPLES = 256, 16
_MIN_STEADY = 4
_LARGEST_SHARE_OF_MEDIAN = 1.5  # a single instruction that took longer than this was interrupted
_SMALLEST_BASELINE, _LARGEST_BASELINE = 0.8, 1.1


def iteration_slowdown(record: IterationRecord, part: PlanPart) -> tuple[float, bool] | None:
    """How many times as long as in the profile one iteration's instructions took on a rank.

    Instructions during which the clock changes are left out where enough others remain: a change takes effect within
    them, so they are a little shorter than their clock says.

    Args:
        record: the iteration.
        part: what it followed.

    Returns:
        The slowdown, and whether it is free of clock changes; None if the record does not fit the part.
    """
    if not record.complete:
        return None
    times_s = [
        end_s - start_s
        for operation, start_s, end_s in zip(record.operations, record.starts_s, record.ends_s, strict=True)
        if isinstance(operation, Compute)
    ]
    if len(times_s) != len(part.times_s) or not times_s:
        return None
    clocks_mhz, planned = part.as_run(record.raised)
    pairs = list(zip(times_s, planned, strict=True))
    steady = list(compress(pairs, _held(clocks_mhz)))
    is_steady = len(steady) >= _MIN_STEADY
    chosen = steady if is_steady else pairs
    limit = _LARGEST_SHARE_OF_MEDIAN * statistics.median(seen_s / planned_s for seen_s, planned_s in chosen)
    seen = math.fsum(min(seen_s, limit * planned_s) for seen_s, planned_s in chosen)
    return part.slowdown * seen / math.fsum(planned_s for _, planned_s in chosen), is_steady


@lru_cache(maxsize=32)  # of the plans in force, for iteration after iteration
def _held(clocks_mhz: tuple[int, ...]) -> tuple[bool, ...]:
    """Which instructions have the clock of both neighbours."""
    last = len(clocks_mhz) - 1
    return tuple(
        clocks_mhz[max(0, i - 1)] == clock and clocks_mhz[min(last, i + 1)] == clock
        for i, clock in enumerate(clocks_mhz)
    )


class StragglerDetector:
    """Follows one rank's slowdown, iteration by iteration.

    A slowdown is found when the median over `window` iterations is above `threshold` and six standard errors above what
    was known before, or when each of the last `min_duration` iterations is that far beyond by itself. It is taken back
    after one iteration that is back to normal beyond doubt: noise makes a GPU slower, never faster than it is. Both
    ways the level moves only by more than the threshold, so that it does not flap.

    Args:
        threshold: smallest slowdown that counts, as a share.
        window: iterations that a median is taken over.
        min_duration: fewest iterations that a slowdown must last.
    """

    def __init__(self, threshold: float = 0.03, window: int = 8, min_duration: int = 3) -> None:
        self._threshold = threshold
        self._min_duration = min(min_duration, window)
        self._recent: deque[float] = deque(maxlen=window)
        self._changes: deque[float] = deque(maxlen=_NOISE_SAMPLES)
        self._previous: float | None = None
        self.level = 1.0

    @property
    def noise(self) -> float:
        """Standard deviation of one iteration's slowdown, on the safe side while it is known from few."""
        count = len(self._changes)
        if not count:
            return _NOISE_UNKNOWN
        # Differences of neighbours, so that a straggler's coming and going is no noise.
        sigma = _MAD_TO_SIGMA * statistics.median(self._changes) / math.sqrt(2)
        known = max(_MIN_NOISE, sigma) * (1 + 3 / math.sqrt(count))
        return known if count >= _ENOUGH_SAMPLES else max(_NOISE_UNKNOWN, known)

    def add(self, slowdown: float) -> float | None:
        """One more iteration (see `iteration_slowdown`).

        Returns:
            The slowdown from now on, 1.0 for none, if that has changed; else None.
        """
        if self._previous is not None:
            self._changes.append(abs(slowdown / self._previous - 1))
        self._previous = slowdown
        self._recent.append(slowdown)
        level = self._judge()
        if level == self.level:
            return None
        self.level = level
        self._recent.clear()
        return level

    def _judge(self) -> float:
        recent, sigma = list(self._recent), _SIGMAS * self.noise
        if self.level > 1 and recent[-1] < min(1 + self._threshold, self.level * (1 - max(self._threshold, sigma))):
            return 1.0
        shortest = recent[-self._min_duration :]
        if len(shortest) == self._min_duration and min(shortest) > self.level * (1 + max(self._threshold, sigma)):
            return statistics.median(shortest)
        if len(recent) < (self._recent.maxlen or 0):
            return self.level
        # Most iterations of the window must say so: half of them could be one interruption.
        low, high = statistics.median_low(recent), statistics.median_high(recent)
        error = sigma * _MEDIAN_EFFICIENCY / math.sqrt(len(recent))
        known = self.level > 1
        if known and high < 1 + min(self._threshold, (self.level - 1) / 3):
            return 1.0
        # Once a rank is known to be slow, its pace is worth knowing more exactly than that there is something.
        least = max(self._threshold / 3 if known else self._threshold, error)
        if low > self.level * (1 + least) and low > 1 + self._threshold:
            return statistics.median(recent)
        if high < self.level * (1 - least):
            median = statistics.median(recent)
            return median if median > 1 + self._threshold else 1.0
        return self.level


Paces = Mapping[int, float]
"""By iteration, how many times as long as in the profile a rank's instructions took."""


def against_pipeline(own: Paces, stages: Sequence[Paces]) -> dict[int, float]:
    """How many times as slow a rank is as the middle one of the other stages of its pipeline, by iteration.

    All stages work on the same microbatches, so what is longer for all is the work. Only iterations that all stages
    have told of count.

    Args:
        own: of the rank.
        stages: of the other stages of its replica.
    """
    return {
        number: pace / statistics.median_low(other[number] for other in stages)
        for number, pace in own.items()
        if stages and all(number in other for other in stages)
    }


def against_replicas(own: Paces, replicas: Sequence[Paces]) -> dict[int, float]:
    """The same against the middle one of the same stage in other replicas.

    Their batches are others, so single iterations differ where sequence lengths do; a pipeline that is slow as a whole
    shows here only. Where `own` and the others' are each against their own pipeline, batches cancel out, and so does
    work that grows in some stages more than in others.
    """
    return {
        number: pace / statistics.median(other[number] for other in replicas)
        for number, pace in own.items()
        if replicas and all(number in other for other in replicas)
    }


class OwnPast:
    """Corrects paces, held against others', for what clock changes make of them, plan by plan.

    Where the clock changes with nearly every instruction, instructions take a few per cent less than their clock says,
    on this rank or on those that it is held against, always in the same way. The first such iterations under a plan
    show by how much.

    Args:
        window: how many of them.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._seen: dict[int, list[float]] = {}
        self._baseline: dict[int, float] = {}

    def correct(self, pace: float, version: int) -> float | None:
        """The pace against this plan's own past; None while there is too little of it."""
        if version not in self._baseline:
            seen = self._seen.setdefault(version, [])
            seen.append(pace)
            if len(seen) == self._window:
                median = statistics.median(seen)
                # Further above 1 it is no effect of clock changes: the rank was slow from the start.
                self._baseline[version] = 1.0 if median > _LARGEST_BASELINE else max(_SMALLEST_BASELINE, median)
                del self._seen[version]
            return pace if pace > _LARGEST_BASELINE else None
        return pace / self._baseline[version]
