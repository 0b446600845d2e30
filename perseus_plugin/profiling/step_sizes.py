"""Durations of instructions at each clock, compared on the same work.

The work of a training step varies: padded batches, growing sequences, routed experts. All stages of a replica share
that, so it can be told from what a clock does. The logarithm of the mean duration of instruction i at clock c in step t
is modelled as `level[i, c] + sensitivity[i] * size[t] + noise`. Step sizes are random: independent from step to step,
plus a random walk for jobs that grow. How much of either there is follows from the data (restricted likelihood,
averaged over a grid). Where the stages of a step ran at different clocks, its size is seen beside the clock; where all
ran at one clock, what is not known of the size is an error of that clock's times. Pure numerics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perseus_plugin.iteration.bounds import LEAST_S
from perseus_plugin.profiling.energy.ticks import Array
from perseus_plugin.profiling.observations import Activity, ClockRun, Spread, StepMean

_HICCUP = 6.0  # robust standard deviations from its step's median that make an execution a hiccup of the host
_RARE = 0.02  # share of executions: what happens more often is the instruction's own
_FEW = 4  # executions of a step from which its median shows a hiccup
_NO_NOISE = 1e-5  # relative; clocks of hosts are not better, and nothing divides by zero
_ROUNDS = 3  # of reweighting
_FAR = 5.0  # standard deviations from which a step of one instruction loses its weight
_ALIKE = 0.15  # how much sensitivities to the step's size differ, where nothing is known of them
_SIZES = np.array([0.0, *np.geomspace(0.0005, 0.6, 15)])  # standard deviations of independent sizes that are tried
_WALKS = (0.0, 0.03, 0.1, 0.3, 1.0, 30.0)  # of a walk's step, relative to that
_NEGLIGIBLE = 1e-6  # share of the likelihood

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Duration:
    """Duration of an instruction at a clock, for work of the average size.

    Attributes:
        time_s: how long it takes.
        se_s: standard error; below the highest clock of the ratio to the time there.
        samples: executions behind it.
    """

    time_s: float
    se_s: float
    samples: int


@dataclass(frozen=True)
class Durations:
    """What a replica's steps say.

    Attributes:
        at: by (member, kind, clock).
        spread: by (member, kind).
    """

    at: Mapping[tuple[Hashable, str, int], Duration]
    spread: Mapping[tuple[Hashable, str], Spread]


def step_means(runs: Sequence[ClockRun]) -> list[StepMean]:
    """The means of each step, hiccups of the host left out."""
    durations: dict[tuple[int, int, str], list[float]] = {}
    for place, run in enumerate(runs):
        for activity in run.activities:
            if 0 < activity.end_s - activity.start_s < math.inf:
                key = (_step_of(run, activity, -1 - place), run.frequency_mhz, activity.kind)
                durations.setdefault(key, []).append(activity.end_s - activity.start_s)
    kept = _without_hiccups({key: np.array(values) for key, values in durations.items()})
    return [
        StepMean(step, clock, kind, float(values.mean()), len(values), _relative_sd(values))
        for (step, clock, kind), values in kept.items()
    ]


def usual_mean(durations_s: Sequence[float]) -> float:
    """The mean without hiccups of the host: at least one execution may be one."""
    values = np.maximum(durations_s, LEAST_S)
    logs = np.log(values / np.median(values))
    far = np.abs(logs) > _HICCUP * max(_robust_sd(logs), _NO_NOISE)
    if len(values) >= _FEW and far.sum() <= max(1.0, _RARE * len(values)):
        values = values[~far]
    return float(values.mean())


def averaged(shards: Sequence[Sequence[StepMean]]) -> list[StepMean]:
    """The means over ranks that do the same work in lock-step."""
    if len(shards) == 1:
        return list(shards[0])
    found: dict[tuple[int, int, str], list[StepMean]] = {}
    for mean in (mean for shard in shards for mean in shard):
        found.setdefault((mean.step, mean.frequency_mhz, mean.kind), []).append(mean)
    return [
        StepMean(
            *key,
            mean_s=float(np.mean([m.mean_s for m in means])),
            count=means[0].count,
            spread=float(np.mean([m.spread for m in means])),
        )
        for key, means in found.items()
    ]


def fit_durations(members: Mapping[Hashable, Iterable[StepMean]]) -> Durations:
    """Durations at each clock from the steps of one replica.

    Args:
        members: of each stage (or whatever runs its own instructions) the means of its steps.
    """
    table = [(member, mean) for member, means in members.items() for mean in means]
    if not table:
        return Durations({}, {})
    return _Fit(table).durations()


class _Fit:
    """Iterated: sizes given noise and sensitivities, then these from what is left."""

    def __init__(self, table: Sequence[tuple[Hashable, StepMean]]) -> None:
        self._means = [mean for _, mean in table]
        self._levels, self._level = _numbered([(member, m.kind, m.frequency_mhz) for member, m in table])
        self._instructions, self._instruction = _numbered([(member, m.kind) for member, m in table])
        numbers, self._step = _numbered([m.step for m in self._means])
        self._steps: Array = np.array(numbers, dtype=float)
        self._y = np.log([m.mean_s for m in self._means])
        self._sensitivity = np.ones(len(self._instructions))
        self._noise2 = self._first_noise2()
        self._trust = np.ones(len(self._y))
        for turn in range(_ROUNDS):
            self._solve()
            if turn < _ROUNDS - 1:
                self._reweigh()

    def _first_noise2(self) -> Array:
        """Variance per instruction of what neither a level nor a size explains."""
        levels, steps = len(self._levels), len(self._steps)
        counts = np.bincount(self._level, minlength=levels)
        incidence = np.zeros((levels, steps))
        np.add.at(incidence, (self._level, self._step), 1.0)
        middle = self._y - (np.bincount(self._level, self._y) / counts)[self._level]
        schur = np.diag(incidence.sum(axis=0)) - incidence.T @ (incidence / counts[:, None])
        inverse = np.linalg.pinv(schur, rcond=1e-9, hermitian=True)
        sizes = inverse @ np.bincount(self._step, middle, minlength=steps)
        left = middle - sizes[self._step] + ((incidence @ sizes) / counts)[self._level]
        used = levels + float(np.trace(inverse @ schur))
        return self._variances(left, used)

    def _variances(self, left: Array, used: float) -> Array:
        """Per instruction, pulled towards the variance of all as by a few steps more."""
        count = len(self._instructions)
        squares = np.bincount(self._instruction, left**2, minlength=count)
        counts = np.bincount(self._instruction, minlength=count).astype(float)
        free = max(1.0 - used / len(left), 0.0)
        common = squares.sum() / max(free * counts.sum(), 1.0)
        own = (squares + 4 * common) / (free * counts + 4)
        return np.asarray(np.maximum(own, _NO_NOISE**2))

    def _solve(self) -> None:
        """Mean and covariance of the sizes, averaged over how much they may vary."""
        b, weight = self._sensitivity[self._instruction], self._trust / self._noise2[self._instruction]
        levels, steps = len(self._levels), len(self._steps)
        self._mass = _sums(self._level, weight, levels)
        self._incidence = np.zeros((levels, steps))
        np.add.at(self._incidence, (self._level, self._step), weight * b)
        self._middle = _sums(self._level, weight * self._y, levels) / self._mass
        schur = np.diag(_sums(self._step, weight * b**2, steps))
        schur -= self._incidence.T @ (self._incidence / self._mass[:, None])
        right = _sums(self._step, weight * b * (self._y - self._middle[self._level]), steps)
        self._sizes, self._covariance = _sizes(self._steps, schur, right)

    def _left(self) -> Array:
        """What levels and sizes leave unexplained."""
        level = self._middle - self._incidence @ self._sizes / self._mass
        fitted = level[self._level] + self._sensitivity[self._instruction] * self._sizes[self._step]
        return np.asarray(self._y - fitted)

    def _reweigh(self) -> None:
        left = self._left()
        count = len(self._instructions)
        # Sensitivities: how what is seen of each instruction moves with the sizes, at each clock about its own mean.
        weight = self._trust
        mass = np.bincount(self._level, weight)
        moved = self._sizes[self._step]
        moved = moved - (np.bincount(self._level, weight * moved) / mass)[self._level]
        seen = left + self._sensitivity[self._instruction] * moved
        prior = self._noise2 / _ALIKE**2
        unsure = np.bincount(self._instruction, weight * np.diag(self._covariance)[self._step], minlength=count)
        square = np.bincount(self._instruction, weight * moved**2, minlength=count) + unsure + prior
        product = np.bincount(self._instruction, weight * moved * seen, minlength=count) + unsure + prior
        if len(self._instructions) > 1:
            self._sensitivity = product / square
            self._sensitivity /= self._sensitivity.mean()
        robust = np.array([_robust_sd(left[self._instruction == i]) for i in range(count)])
        robust = np.maximum(robust, np.sqrt(self._noise2) / 2)
        far = np.abs(left) / np.maximum(robust, _NO_NOISE)[self._instruction]
        self._trust = np.minimum(1.0, (_FAR / np.maximum(far, 1e-12)) ** 2)
        used = len(self._levels) + self._spent_on_sizes()
        self._noise2 = self._variances(left * np.sqrt(self._trust), used)

    def _spent_on_sizes(self) -> float:
        """Degrees of freedom that the sizes take."""
        b, weight = self._sensitivity[self._instruction], self._trust / self._noise2[self._instruction]
        precision = np.bincount(self._step, weight * b**2, minlength=len(self._steps))
        return float(np.clip(precision * np.diag(self._covariance), 0.0, 1.0).sum())

    def durations(self) -> Durations:
        """The result."""
        steps = len(self._steps)
        average = np.full(steps, 1 / steps)
        levels = self._middle - self._incidence @ self._sizes / self._mass
        ways = self._incidence / self._mass[:, None]
        samples = np.bincount(self._level, [m.count for m in self._means], minlength=len(self._levels))
        tops: dict[tuple[Hashable, str], int] = {}
        for at, (member, kind, clock) in enumerate(self._levels):
            top = tops.get((member, kind))
            if top is None or clock > self._levels[top][2]:
                tops[member, kind] = at
        result: dict[tuple[Hashable, str, int], Duration] = {}
        for at, (member, kind, clock) in enumerate(self._levels):
            b = self._sensitivity[self._instructions.index((member, kind))]
            time_s = math.exp(levels[at]) * float(np.exp(b * self._sizes).mean())
            top = tops[member, kind]
            if at == top:
                way, variance = b * average - ways[at], 1 / self._mass[at]
            else:
                way, variance = ways[top] - ways[at], 1 / self._mass[at] + 1 / self._mass[top]
            error = math.sqrt(variance + float(way @ self._covariance @ way))
            result[member, kind, clock] = Duration(time_s, error * time_s, int(samples[at]))
        spread = {key: self._spread(at) for at, key in enumerate(self._instructions)}
        return Durations(result, spread)

    def _spread(self, instruction: int) -> Spread:
        """Over the steps of a clock, pooled over clocks; hiccups count as little as in the fit."""
        mine = np.flatnonzero(self._instruction == instruction)
        within = [(m.count - 1, m.spread) for m in (self._means[i] for i in mine) if m.count > 1]
        freedom = sum(count for count, _ in within)
        inside = math.sqrt(sum(count * s**2 for count, s in within) / freedom) if freedom else math.nan
        values = np.exp(self._y[mine])
        _, level = np.unique(self._level[mine], return_inverse=True)
        level = level.reshape(-1)
        weight = self._trust[mine]
        mass = np.bincount(level, weight)
        relative = values / (np.bincount(level, weight * values) / mass)[level] - 1
        left = len(mine) - len(mass)
        between = math.sqrt(float(weight @ relative**2) / left) if left > 0 else math.nan
        return Spread(
            inside,
            inside / math.sqrt(2 * freedom) if freedom else math.nan,
            between,
            between / math.sqrt(2 * left) if left > 0 else math.nan,
        )


def _sizes(steps: Array, precision: Array, right: Array) -> tuple[Array, Array]:
    """Mean and covariance of the steps' sizes, averaged over how much they may vary by their likelihood.

    Sizes are known up to a constant, which is the levels': the walk may begin at any step.
    """
    when = steps - steps.min()
    walk = np.minimum.outer(when, when)
    ways = [_Way.of(np.eye(len(steps)) + ratio**2 * walk, precision, right) for ratio in _WALKS]
    logarithms = np.array([way.logarithms() for way in ways])
    shares = np.exp(logarithms - logarithms.max())
    shares /= shares.sum()
    mean = np.zeros(len(steps))
    moments = np.zeros((len(steps), len(steps)))
    for way, of_way in zip(ways, shares, strict=True):
        if of_way.sum() < _NEGLIGIBLE:
            continue
        # Within a way everything is diagonal in its axes.
        scales = of_way[:, None] * way.shrunk
        mean += way.axes @ (scales.sum(axis=0) * way.right)
        positions = way.shrunk * way.right
        moments += (way.axes * scales.sum(axis=0)) @ way.axes.T
        moments += way.axes @ ((positions * of_way[:, None]).T @ positions) @ way.axes.T
    return mean, moments - np.outer(mean, mean)


@dataclass(frozen=True)
class _Way:
    """Sizes whose covariance is a multiple of one matrix, for all multiples in `_SIZES`.

    Attributes:
        axes: columns in which prior and precision are both diagonal; the prior is the unit matrix there.
        values: of the precision along them.
        right: the data's pull along them.
        shrunk: per multiple and axis the posterior variance.
    """

    axes: Array
    values: Array
    right: Array
    shrunk: Array

    @classmethod
    def of(cls, prior: Array, precision: Array, right: Array) -> _Way:
        """Diagonalise."""
        root = np.linalg.cholesky(prior)
        values, vectors = np.linalg.eigh(root.T @ precision @ root)
        values = np.maximum(values, 0.0)
        axes = root @ vectors
        scale = np.square(_SIZES)[:, None]
        return cls(axes, values, axes.T @ right, scale / (1 + scale * values))

    def logarithms(self) -> Array:
        """Log likelihood of each multiple."""
        determinants = np.log1p(np.square(_SIZES)[:, None] * self.values).sum(axis=1)
        return np.asarray(0.5 * (self.shrunk @ self.right**2) - 0.5 * determinants)


def _step_of(run: ClockRun, activity: Activity, otherwise: int) -> int:
    """The iteration in which an activity began; a run that does not name its iterations is one."""
    for number, end_s in run.steps:
        if activity.start_s < end_s:
            return number
    return run.steps[-1][0] if run.steps else otherwise


def _without_hiccups(durations: Mapping[tuple[int, int, str], Array]) -> dict[tuple[int, int, str], Array]:
    """Executions that are rare and far from all others of their step are the host's, not the instruction's."""
    kept = dict(durations)
    for kind in {kind for _, _, kind in durations}:
        logs = {
            key: np.log(values / np.median(values))
            for key, values in durations.items()
            if key[2] == kind and len(values) >= _FEW
        }
        if not logs:
            continue
        everything = np.concatenate(list(logs.values()))
        limit = _HICCUP * max(_robust_sd(everything), _NO_NOISE)
        if 0 < np.mean(np.abs(everything) > limit) <= _RARE:
            for key, values in logs.items():
                kept[key] = durations[key][np.abs(values) <= limit]
    return kept


def _numbered(keys: Iterable[KeyT]) -> tuple[list[KeyT], NDArray[np.intp]]:
    """Distinct keys in order of appearance, and the place of each key among them."""
    places: dict[KeyT, int] = {}
    numbers = [places.setdefault(key, len(places)) for key in keys]
    return list(places), np.array(numbers, dtype=np.intp)


def _sums(places: NDArray[np.intp], values: Array, count: int) -> Array:
    """Sums of the values by place."""
    return np.asarray(np.bincount(places, values, minlength=count), dtype=float)


def _relative_sd(values: Array) -> float:
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 else math.nan


def _robust_sd(values: Array) -> float:
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
