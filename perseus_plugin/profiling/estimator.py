"""Time and energy of each instruction kind at each clock, with standard errors, from runs at locked clocks.

Pure numerics: no GPU, no clock, no I/O. `estimate_stage` turns one GPU's `ClockRun`s into a `StageEstimate`, `pool`
(see `pooling.py`) joins data-parallel replicas, `to_profile` makes the table that the planner reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.profiling.observations import (
    BLOCKING,
    Activity,
    ClockRun,
    InstructionEstimate,
    StageEstimate,
    Tick,
)
from perseus_plugin.profiling.pooling import blocking_power, pool, to_profile, unresolved_kinds
from perseus_plugin.profiling.powers import fit_powers
from perseus_plugin.profiling.ticks import durations_s

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

_ABSURD = 1e12  # seconds or joules
_OUTLIER = 6.0  # durations this many robust standard deviations away are hiccups of the host, not the instruction


def estimate_stage(
    runs: Sequence[ClockRun], *, max_relative_error: float = 0.05, constant_kinds: Collection[str] = ()
) -> StageEstimate:
    """Estimate one stage from one GPU's runs.

    Capped runs are dropped: they are not at the clock they name. Never raises for poor data; what cannot be known is
    NaN, and what is not known well enough is in `unresolved`.

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
    durations = _durations(usable)
    kinds = sorted({kind for kind, _ in durations})
    wanted = [kind for kind in kinds if kind not in constant_kinds]
    never = everything - set(kinds) - set(constant_kinds)
    # A clock counts only if every kind was seen at it: a plan needs all of a stage's kinds at each of its clocks.
    clocks = sorted({clock for _, clock in durations if all((kind, clock) in durations for kind in wanted)})
    if not wanted or not clocks:
        return StageEstimate((), math.nan, math.nan, math.nan, math.nan, frozenset({*wanted, *never, BLOCKING}))
    fitted_runs = sorted((run for run in usable if run.frequency_mhz in clocks), key=lambda run: run.begin_s)
    powers = fit_powers(fitted_runs, clocks, kinds)
    estimate = StageEstimate(
        instructions=tuple(
            _instruction(kind, clock, durations[kind, clock], powers.watts(clocks.index(clock), kinds.index(kind)))
            for kind in wanted
            for clock in reversed(clocks)
        ),
        blocking_power_w=powers.blocking_w,
        blocking_power_se_w=powers.blocking_se_w,
        window_s=powers.window_s,
        lag_s=powers.lag_s,
        unresolved=frozenset(),
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


def _durations(runs: Sequence[ClockRun]) -> dict[tuple[str, int], _Duration]:
    """Typical durations by kind and clock, of those that were seen."""
    activities: dict[tuple[str, int], list[Activity]] = {}
    for run in runs:
        for activity in run.activities:
            activities.setdefault((activity.kind, run.frequency_mhz), []).append(activity)
    typical = {key: _typical_s(found, key[0]) for key, found in activities.items()}
    return {key: duration for key, duration in typical.items() if duration is not None}


def _instruction(kind: str, clock: int, duration: _Duration, watts: tuple[float, float]) -> InstructionEstimate:
    power_w, power_se_w = watts
    return InstructionEstimate(
        kind=kind,
        frequency_mhz=clock,
        time_s=duration.mean_s,
        time_se_s=duration.se_s,
        energy_j=power_w * duration.mean_s,
        energy_se_j=math.hypot(power_se_w * duration.mean_s, power_w * duration.se_s),
        samples=duration.samples,
    )


def _typical_s(activities: Sequence[Activity], kind: str) -> _Duration | None:
    """Mean duration without hiccups; None when no execution has a duration.

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


def _credible(run: ClockRun) -> bool:
    """Whether all its figures are of the size that times and energies have: what is not would overflow further on."""
    figures = [run.begin_s, run.end_s]
    figures += [t for activity in run.activities for t in (activity.start_s, activity.end_s)]
    figures += [value for tick in run.ticks for value in (tick.previous_poll_s, tick.time_s, tick.energy_j)]
    return bool(np.all(np.abs(np.array(figures)) < _ABSURD))  # False for NaN
