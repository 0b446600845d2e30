"""Time and energy of each instruction kind at each clock, with standard errors, from runs at locked clocks.

Pure numerics: no GPU, no clock, no I/O. `estimate_stage` turns one GPU's `ClockRun`s into a `StageEstimate`, `pool`
(see `pooling.py`) joins data-parallel replicas, `to_profile` makes the table that the planner reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from perseus_plugin.profiling.energy.powers import fit_powers, held_to_limit
from perseus_plugin.profiling.observations import (
    BLOCKING,
    Activity,
    ClockRun,
    InstructionEstimate,
    Spread,
    StageEstimate,
    Tick,
)
from perseus_plugin.profiling.pooling import blocking_power, pool, to_profile, unresolved_kinds
from perseus_plugin.profiling.step_sizes import Duration, Durations, fit_durations, step_means

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

_SIGMAS = 2.0  # standard errors within which two durations are taken for the same,
_SAME_TIME, _MOST_ALIKE = 0.003, 0.01  # at least within this share, and at most
_ABSURD = 1e12  # seconds or joules


def estimate_stage(
    runs: Sequence[ClockRun], *, max_relative_error: float = 0.05, constant_kinds: Collection[str] = ()
) -> StageEstimate:
    """Estimate one stage from one GPU's runs.

    Capped runs are dropped: they are not at the clock they name. Those that the power limit held are what asking for
    their clock comes to; clocks at which it leaves all work as it is at the highest are one point with that. Never
    raises for poor data; what cannot be known is NaN, and what is not known well enough is in `unresolved`.

    Args:
        runs: blocks of whole iterations at one clock each, in any order; revisits of a clock measure drift.
        max_relative_error: standard error of an instruction's energy, relative to it, above which its kind is
            reported as unresolved.
        constant_kinds: kinds of activities that are neither controllable nor waiting (the optimizer step): their
            power is kept out of the blocking power, and they are not in the result.
    """
    runs = [run for run in runs if _credible(run)]
    usable = [run for run in runs if not run.capped and run.end_s > run.begin_s]
    everything = {a.kind for run in runs for a in run.activities}
    steps = step_means(usable)
    kinds = sorted({step.kind for step in steps})
    wanted = [kind for kind in kinds if kind not in constant_kinds]
    steps = [step for step in steps if step.kind in wanted]
    fitted = fit_durations({0: steps})
    same = _as_highest(usable, wanted, fitted)
    if same:
        top_mhz = max(run.frequency_mhz for run in usable)
        usable = [replace(run, frequency_mhz=top_mhz) if run.frequency_mhz in same else run for run in usable]
        steps = [replace(step, frequency_mhz=top_mhz) if step.frequency_mhz in same else step for step in steps]
        fitted = fit_durations({0: steps})
    durations = {(kind, clock): duration for (_, kind, clock), duration in fitted.at.items()}
    never = everything - set(kinds) - set(constant_kinds)
    # A clock counts only if every kind was seen at it: a plan needs all of a stage's kinds at each of its clocks.
    clocks = sorted({clock for _, clock in durations if all((kind, clock) in durations for kind in wanted)})
    if not wanted or not clocks:
        return StageEstimate((), math.nan, math.nan, math.nan, math.nan, frozenset({*wanted, *never, BLOCKING}))
    fitted_runs = sorted((run for run in usable if run.frequency_mhz in clocks), key=lambda run: run.begin_s)
    powers = held_to_limit(fit_powers(fitted_runs, clocks, kinds), fitted_runs, clocks, kinds)
    estimate = StageEstimate(
        instructions=tuple(
            _instruction(
                kind,
                clock,
                durations[kind, clock],
                fitted.spread[0, kind],
                powers.watts(clocks.index(clock), kinds.index(kind)),
            )
            for kind in wanted
            for clock in reversed(clocks)
        ),
        blocking_power_w=powers.blocking_w,
        blocking_power_se_w=powers.blocking_se_w,
        window_s=powers.window_s,
        lag_s=powers.lag_s,
        unresolved=frozenset(),
        steps=tuple(steps),
        blocking_by_clock=tuple(
            (clock, float(powers.blocking_at_w[i]), float(powers.blocking_at_se_w[i]))
            for i, clock in reversed(list(enumerate(clocks)))
        ),
        held_mhz=frozenset(run.frequency_mhz for run in fitted_runs if run.at_limit),
        as_highest_mhz=same,
    )
    unresolved = unresolved_kinds(estimate, max_relative_error) | never
    if not powers.waited:
        unresolved |= {BLOCKING}
    return replace(estimate, unresolved=frozenset(unresolved))


def _as_highest(runs: Sequence[ClockRun], kinds: Sequence[str], fitted: Durations) -> frozenset[int]:
    """Clocks next to the highest at which, as there, the power limit holds the GPU and all work takes as long."""
    free = {run.frequency_mhz for run in runs if not run.at_limit}
    clocks = sorted({run.frequency_mhz for run in runs}, reverse=True)
    same: set[int] = set()
    for clock in clocks[1:]:
        if free & {clock, clocks[0]} or not all(_alike(fitted, kind, clock, clocks[0]) for kind in kinds):
            break
        same.add(clock)
    return frozenset(same)


def _alike(fitted: Durations, kind: str, clock: int, top: int) -> bool:
    one, full = fitted.at.get((0, kind, clock)), fitted.at.get((0, kind, top))
    if one is None or full is None:
        return False
    within = min(max(_SIGMAS * one.se_s / one.time_s, _SAME_TIME), _MOST_ALIKE)
    return abs(one.time_s / full.time_s - 1) <= within


def _instruction(
    kind: str, clock: int, duration: Duration, spread: Spread, watts: tuple[float, float]
) -> InstructionEstimate:
    power_w, power_se_w = watts
    return InstructionEstimate(
        kind=kind,
        frequency_mhz=clock,
        time_s=duration.time_s,
        time_se_s=duration.se_s,
        energy_j=power_w * duration.time_s,
        energy_se_j=math.hypot(power_se_w * duration.time_s, power_w * duration.se_s),
        samples=duration.samples,
        spread=spread,
    )


def _credible(run: ClockRun) -> bool:
    """Whether all its figures are of the size that times and energies have: what is not would overflow further on."""
    figures = [run.begin_s, run.end_s]
    figures += [t for activity in run.activities for t in (activity.start_s, activity.end_s)]
    figures += [value for tick in run.ticks for value in (tick.previous_poll_s, tick.time_s, tick.energy_j)]
    return bool(np.all(np.abs(np.array(figures)) < _ABSURD))  # False for NaN
