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

_OUTLIER = (
    6.0  # durations this many robust standard deviations away are hiccups of the host, not the instruction
)
_BLOCKING_SHARE = (
    0.5  # of the lowest instruction power: what waiting is taken to draw when no waiting was seen
)


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
    usable = [run for run in runs if not run.capped and run.end_s > run.begin_s]
    kinds = sorted({a.kind for run in runs for a in run.activities})
    seen = {
        (kind, clock): _typical_s(
            [a for run in usable if run.frequency_mhz == clock for a in run.activities], kind
        )
        for kind in kinds
        for clock in {run.frequency_mhz for run in usable}
    }
    never = {kind for kind in kinds if not any(seen[k] for k in seen if k[0] == kind)}
    kinds = [kind for kind in kinds if kind not in never]
    # A clock counts only if every kind was seen at it: a plan needs all of a stage's kinds at each of its clocks.
    clocks = [
        c for c in sorted({run.frequency_mhz for run in usable}) if all(seen[kind, c] for kind in kinds)
    ]
    usable = [run for run in usable if run.frequency_mhz in clocks]
    if not kinds or not clocks:
        return StageEstimate(
            (), math.nan, math.nan, math.nan, math.nan, frozenset({*kinds, *never, BLOCKING})
        )
    powers = fit_powers(sorted(usable, key=lambda r: r.begin_s), clocks, kinds)
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
