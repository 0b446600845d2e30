"""Joining estimates: replicas of one stage into one, stages into the profile and the job's blocking power."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import astuple, replace

import numpy as np

from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.observations import BLOCKING, InstructionEstimate, Spread, StageEstimate
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.random_effects import mean_of
from perseus_plugin.profiling.waiting_of_stages import waiting_by_clock


def pool(estimates: Sequence[StageEstimate], *, max_relative_error: float = 0.05) -> StageEstimate:
    """Join the estimates of data-parallel replicas of one stage.

    Replicas run on different GPUs, which differ by a few percent; each figure is therefore a random-effects mean
    (DerSimonian and Laird 1986), whose standard error includes the spread between GPUs. Kept are the clocks that
    every replica with data has: one plan drives them all, and a clock that one of them could not hold is no option.

    Raises:
        ValueError: no estimates.
    """
    if not estimates:
        raise ValueError("pool: got no estimates; allowed: at least one")
    if len(estimates) == 1:
        return estimates[0]
    filled = [e for e in estimates if e.instructions]
    clocks = set.intersection(*(set(e.clocks_mhz) for e in filled)) if filled else set()
    if not clocks:
        clocks = set().union(*(e.clocks_mhz for e in filled))
    kinds = sorted({kind for e in filled for kind in e.kinds})
    rows = [
        _pooled_instruction(found)
        for kind in kinds
        for clock in sorted(clocks, reverse=True)
        if (found := [r for e in filled for r in e.instructions if (r.kind, r.frequency_mhz) == (kind, clock)])
    ]
    power_w, power_se_w = _pooled_blocking(filled)
    joined = StageEstimate(
        tuple(rows),
        power_w,
        power_se_w,
        _median([e.window_s for e in filled]),
        _median([e.lag_s for e in filled]),
        frozenset(),
        blocking_by_clock=_pooled_blocking_by_clock(filled, clocks),
        gpu=" / ".join(sorted({e.gpu for e in estimates})),
        held_mhz=frozenset().union(*(e.held_mhz for e in filled)),
        as_highest_mhz=frozenset().union(*(e.as_highest_mhz for e in filled)),
    )
    unresolved = unresolved_kinds(joined, max_relative_error)
    unresolved |= set().union(*(e.unresolved for e in estimates)) - set(kinds) - {BLOCKING}
    if all(BLOCKING in e.unresolved for e in estimates):
        unresolved.add(BLOCKING)
    return replace(joined, unresolved=frozenset(unresolved))


def blocking_power(stages: Sequence[StageEstimate]) -> tuple[float, float]:
    """The job's blocking power in watts and its standard error: the mean over clocks and stages that measured it.

    Stages that only assume it (they hardly wait) count only when no stage measured it. NaN without any data.
    """
    return _pooled_blocking(stages)


def to_profile(stages: Sequence[StageEstimate]) -> tuple[Profile, frozenset[tuple[int, str]]]:
    """The profile of all stages, and which (stage, kind) are unresolved and belong at full clock.

    An unresolved kind keeps its rows, since plans need its times. Where its energy is not known at all or not above
    zero, the row holds the stage's mean known power (or the blocking power) times its duration, with an unknown
    standard error, so the rows can be planned with but must not be optimised over. What a waiting GPU draws is that of
    `waiting_by_clock`.

    Raises:
        ProfileError: naming the stage, when it has no measured instruction, or no power at all.
    """
    rows = []
    unresolved = set()
    for stage, (estimate, waiting) in enumerate(zip(stages, waiting_by_clock(stages), strict=True)):
        if not estimate.instructions:
            raise ProfileError(f"stage {stage}: no instruction was measured at any clock without power capping")
        known_w = [r.energy_j / r.time_s for r in estimate.instructions if r.energy_j > 0]
        stand_in_w = float(np.mean(known_w)) if known_w else blocking_power(stages)[0]
        for row in estimate.instructions:
            energy_j, energy_se_j = row.energy_j, row.energy_se_j
            if not energy_j > 0:
                if not stand_in_w > 0:
                    raise ProfileError(
                        f"stage {stage}: no energy was measured: the GPU's energy counter did not move while profiling"
                    )
                energy_j, energy_se_j = stand_in_w * row.time_s, math.nan
                unresolved.add((stage, row.kind))
            rows.append(
                (
                    stage,
                    row.kind,
                    Measurement(
                        row.frequency_mhz,
                        row.time_s,
                        energy_j,
                        row.samples,
                        row.time_se_s,
                        energy_se_j,
                        *(*astuple(row.spread), *waiting.get(row.frequency_mhz, (math.nan, math.nan))),
                    ),
                )
            )
        unresolved |= {(stage, kind) for kind in estimate.unresolved if kind != BLOCKING}
    return Profile.from_rows(rows), frozenset(unresolved)


def unresolved_kinds(estimate: StageEstimate, max_relative_error: float) -> set[str]:
    """Kinds (and `BLOCKING`) whose relative standard error is above the threshold, or not known."""
    unresolved = set()
    for row in estimate.instructions:
        if not (row.energy_j > 0 and row.energy_se_j <= max_relative_error * row.energy_j):
            unresolved.add(row.kind)
    if not (
        estimate.blocking_power_w > 0 and estimate.blocking_power_se_w <= max_relative_error * estimate.blocking_power_w
    ):
        unresolved.add(BLOCKING)
    return unresolved


def _pooled_instruction(rows: Sequence[InstructionEstimate]) -> InstructionEstimate:
    time_s, time_se_s = mean_of([(row.time_s, row.time_se_s) for row in rows])
    energy_j, energy_se_j = mean_of([(row.energy_j, row.energy_se_j) for row in rows])
    samples = sum(row.samples for row in rows)
    spread = Spread(
        *_root_mean_square([(row.spread.within, row.spread.within_se) for row in rows]),
        *_root_mean_square([(row.spread.between, row.spread.between_se) for row in rows]),
    )
    return InstructionEstimate(
        rows[0].kind, rows[0].frequency_mhz, time_s, time_se_s, energy_j, energy_se_j, samples, spread
    )


def _root_mean_square(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    known = [(value, error) for value, error in pairs if math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    mean = math.sqrt(sum(value**2 for value, _ in known) / len(known))
    error = math.sqrt(sum((value * error) ** 2 for value, error in known)) / len(known)
    return mean, error / mean if mean > 0 else 0.0


def _pooled_blocking(estimates: Sequence[StageEstimate]) -> tuple[float, float]:
    return mean_of([(e.blocking_power_w, e.blocking_power_se_w) for e in _that_waited(estimates)])


def _pooled_blocking_by_clock(
    estimates: Sequence[StageEstimate], clocks: Collection[int]
) -> tuple[tuple[int, float, float], ...]:
    at: dict[int, list[tuple[float, float]]] = {}
    for estimate in _that_waited(estimates):
        for clock, power_w, power_se_w in estimate.blocking_by_clock:
            if clock in clocks:
                at.setdefault(clock, []).append((power_w, power_se_w))
    return tuple((clock, *mean_of(at[clock])) for clock in sorted(at, reverse=True))


def _that_waited(estimates: Sequence[StageEstimate]) -> list[StageEstimate]:
    return [e for e in estimates if BLOCKING not in e.unresolved] or list(estimates)


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan
