"""The plan against full clocks on the same work: blocks of reference iterations and those beside them. Pure.

What varies from iteration to iteration (the length of batches, a loader's stall, a job that grows) varies in references
as in their neighbours under the plan. So each block is compared with its own neighbours only, after the size of each
iteration's work is taken out as far as it is known, and how much blocks differ says how well the whole is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_CONFIDENCE = 0.95
_LONG = 4.0  # robust standard deviations beyond which an iteration is interrupted, by whatever
_CORE = 0.6  # of iterations that say what is usual: stalls of every third one are not, sizes drawn from three are
_CORE_SIGMAS = NormalDist().inv_cdf((1 + _CORE) / 2)
_LEAST_SPREAD = 0.003  # of sizes, below which they explain nothing
_LARGEST_ELASTICITY = 1.5
_LEAST_BLOCKS = 3
_ROUNDS = 3
_NORMAL_FROM = 200  # degrees of freedom

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One iteration in or beside a block of references.

    Attributes:
        block: which.
        reference: at full clocks, not under the plan.
        time_s: of the iteration.
        energy_j: of all GPUs, NaN: not known.
        work: how much there was to compute, in any unit; NaN: not known.
    """

    block: int
    reference: bool
    time_s: float
    energy_j: float
    work: float


@dataclass(frozen=True, slots=True)
class Effect:
    """By how much something is larger under the plan, as a logarithm of the ratio.

    Attributes:
        log: best estimate.
        error: its standard error.
        blocks: of references.
        iterations: references and those beside them.
    """

    log: float
    error: float
    blocks: int
    iterations: int

    @property
    def share(self) -> float:
        """The estimate as a share: 0.01 for one percent more under the plan."""
        return math.expm1(self.log)

    @property
    def interval(self) -> tuple[float, float]:
        """Shares between which the truth lies with 95 % confidence, by how much blocks differ."""
        reach = self.error * student_quantile((1 + _CONFIDENCE) / 2, self.blocks - 1)
        return math.expm1(self.log - reach), math.expm1(self.log + reach)

    def at_least(self, confidence: float) -> float:
        """The share above which the truth lies at this confidence, by how much iterations differ."""
        freedom = max(1, self.iterations - 2 * self.blocks)
        return math.expm1(self.log - self.error * student_quantile(confidence, freedom))


class _Pair(NamedTuple):
    """One block of which iterations of both sorts are known: logarithms about their means, and which are planned."""

    value: Values
    size: Values
    planned: NDArray[np.bool_]


@dataclass(frozen=True)
class PairedBlock:
    """The iterations in and beside one block of references. What they say is reckoned once, however often it is used.

    Attributes:
        rows: of this block.
    """

    rows: tuple[Row, ...]

    @cached_property
    def time(self) -> _Pair | None:
        """By their times; None where one of the sorts is missing."""
        return _pair(self.rows, lambda row: row.time_s)

    @cached_property
    def energy(self) -> _Pair | None:
        """By their energies; None where one of the sorts is missing."""
        return _pair(self.rows, lambda row: row.energy_j)


def blocks_of(rows: Iterable[Row]) -> list[PairedBlock]:
    """Rows of several blocks, by block."""
    ordered = sorted(rows, key=lambda row: row.block)
    return [PairedBlock(tuple(of)) for _, of in groupby(ordered, key=lambda row: row.block)]


def effect_on_time(blocks: Iterable[PairedBlock]) -> Effect | None:
    """How much longer iterations take under the plan; None while there are too few blocks."""
    return _effect([block.time for block in blocks])


def effect_on_energy(blocks: Iterable[PairedBlock]) -> Effect | None:
    """How much more energy iterations take under the plan; None while too few are known."""
    return _effect([block.energy for block in blocks])


def _pair(rows: Sequence[Row], value_of: Callable[[Row], float]) -> _Pair | None:
    known = [row for row in rows if math.isfinite(value_of(row)) and value_of(row) > 0]
    if {row.reference for row in known} != {True, False}:
        return None
    value = _centred([math.log(value_of(row)) for row in known])
    return _Pair(value, _sizes(known), np.array([not row.reference for row in known]))


def _effect(pairs: Sequence[_Pair | None]) -> Effect | None:
    known = [pair for pair in pairs if pair is not None]
    if len(known) < _LEAST_BLOCKS:
        return None
    value, size, planned = (np.concatenate(arrays) for arrays in zip(*known, strict=True))
    block = np.repeat(np.arange(len(known)), [len(pair.value) for pair in known])
    elasticity = 1.0
    for _ in range(_ROUNDS):  # what is an interruption is seen once sizes are taken out, and the other way round
        usual = _without_interruptions(value - elasticity * size, planned, block) + elasticity * size
        elasticity = _elasticity(usual, size, planned, block)
    return _paired(_without_interruptions(value - elasticity * size, planned, block), planned, block)


def _centred(values: Sequence[float]) -> Values:
    array = np.asarray(values, dtype=np.float64)
    centred: Values = array - array.mean()
    return centred


def _sizes(rows: Sequence[Row]) -> Values:
    """Logarithms of the work, about their mean; nothing where it is not known of each of them."""
    known = all(math.isfinite(row.work) and row.work > 0 for row in rows)
    return _centred([math.log(row.work) if known else 0.0 for row in rows])


def _elasticity(value: Values, size: Values, planned: NDArray[np.bool_], block: NDArray[np.intp]) -> float:
    """By how many percent the value grows with each percent of work, within blocks and sorts of iteration."""
    group = 2 * block + planned
    within_size, within_value = size - _group_means(size, group), value - _group_means(value, group)
    spread = math.sqrt(float(np.mean(within_size**2)))
    if spread < _LEAST_SPREAD:
        return 1.0  # too little to learn from: time and energy go with the work
    slope = float(within_size @ within_value) / float(within_size @ within_size)
    return min(max(slope, 0.0), _LARGEST_ELASTICITY)


def _group_means(values: Values, group: NDArray[np.intp]) -> Values:
    counts = np.bincount(group)
    sums = np.bincount(group, weights=values)
    means: Values = (sums / np.maximum(counts, 1))[group]
    return means


def _without_interruptions(value: Values, planned: NDArray[np.bool_], block: NDArray[np.intp]) -> Values:
    """Iterations far from what is usual for their sort moved to the edge of that: an interruption is nobody's merit."""
    usual = _medians(value[planned], block[planned])[block]
    apart = np.where(planned, 0.0, np.median((value - usual)[~planned]))
    rest = value - usual - apart
    limit = _LONG / _CORE_SIGMAS * float(np.quantile(np.abs(rest), _CORE))
    kept: Values = usual + apart + (np.clip(rest, -limit, limit) if limit > 0 else rest)
    return kept


def _medians(value: Values, group: NDArray[np.intp]) -> Values:
    """Of each group: sorted once, as a median by itself is hundreds of calls for as many groups."""
    ordered = value[np.lexsort((value, group))]
    counts = np.bincount(group)
    first = np.cumsum(counts) - counts
    medians: Values = (ordered[first + (counts - 1) // 2] + ordered[first + counts // 2]) / 2
    return medians


def _paired(value: Values, planned: NDArray[np.bool_], block: NDArray[np.intp]) -> Effect:
    """Mean over blocks of planned less reference, and its error: by blocks or by iterations, whichever is larger."""
    count = int(block.max()) + 1
    under = np.bincount(block, weights=planned)
    full = np.bincount(block, weights=~planned)
    apart = np.bincount(block, weights=value * planned) / under - np.bincount(block, weights=value * ~planned) / full
    weight = 1 / (1 / under + 1 / full)
    log = float(weight @ apart / weight.sum())
    rest = value - _group_means(value, 2 * block + planned)
    freedom = max(1, len(value) - 2 * count)
    by_iterations = math.sqrt(float(rest @ rest) / freedom / float(weight.sum()))
    by_blocks = math.sqrt(float(weight**2 @ (apart - log) ** 2) * count / (count - 1)) / float(weight.sum())
    return Effect(log, max(by_iterations, by_blocks), count, len(value))


def student_quantile(confidence: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below at this confidence, from a half."""
    if freedom >= _NORMAL_FROM:
        return NormalDist().inv_cdf(confidence)
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < 2 * confidence - 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < 2 * confidence - 1 else (low, middle)
    return high


def _student_within(value: float, freedom: int) -> float:
    """Probability that Student's t lies between -value and value (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
