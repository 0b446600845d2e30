"""From times, ticks and estimates to figures. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perseus_plugin.control.helper.latency import percentile
from perseus_plugin.control.wire import Tick
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.profiling.observations import StageEstimate
from perseus_plugin.reporting.verification import KindOfWork, Spread

_STAGES, _STAGE, _MICROBATCHES = 4, 1, 6
_SLOWEST = 1.15  # times the others: of the last stage, so that the one looked at waits in the middle, too


@dataclass(frozen=True)
class Step:
    """One instruction of the pattern, after a wait of so many seconds."""

    kind: str
    microbatch: int
    wait_s: float


@dataclass(frozen=True)
class Steady:
    """What a long run of one thing showed.

    Attributes:
        power_w: mean power.
        clock_mhz: mean SM clock.
        capped: share of the time at the power limit (NaN: unknown).
        seconds: between its first and last tick.
    """

    power_w: float = math.nan
    clock_mhz: float = math.nan
    capped: float = math.nan
    seconds: float = 0.0


def pattern(times_s: Mapping[str, float]) -> tuple[list[Step], float]:
    """What stage 1 of 4 does in an iteration of 1F1B with a slower last stage, and how long it waits after it.

    Args:
        times_s: how long an instruction of each kind takes.
    """
    graph = build_graph(one_f_one_b(_STAGES, _MICROBATCHES))
    durations_s = [
        0.0 if one is None else times_s[one.kind] * (_SLOWEST if one.stage == _STAGES - 1 else 1.0)
        for one in graph.instructions
    ]
    starts_s, ends_s = graph.times(durations_s)
    steps, free_s = [], 0.0
    for node in graph.stage_nodes[_STAGE].tolist():
        one = graph.instructions[node]
        if one is not None:
            steps.append(Step(one.kind, one.microbatch, float(starts_s[node]) - free_s))
            free_s = float(ends_s[node])
    return steps, float(ends_s.max()) - free_s


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """Of the sizes of the values, at least one, in units of `1 / scale`."""
    sizes = [scale * abs(value) for value in values]
    return Spread(median=statistics.median(sizes), p95=percentile(sizes, 0.95), highest=max(sizes), samples=len(sizes))


def steady(ticks: Sequence[Tick], spans_s: Sequence[tuple[float, float]]) -> Steady:
    """Mean power, clock and capping over stretches of time, from the ticks of the counter within each.

    A stretch counts from its first tick to its last; the counter may have been restarted in between (epochs).
    """
    energy_j = seconds = capped_s = 0.0
    clocks: list[int] = []
    for begin_s, end_s in spans_s:
        within = [tick for tick in ticks if begin_s <= tick.previous_poll_s and tick.time_s <= end_s]
        if len(within) < 3 or within[0].epoch != within[-1].epoch:
            continue
        energy_j += within[-1].energy_j - within[0].energy_j
        seconds += _middle_s(within[-1]) - _middle_s(within[0])
        capped_s += within[-1].capped_s - within[0].capped_s
        clocks += [tick.clock_mhz for tick in within[1:]]
    if seconds <= 0:
        return Steady()
    return Steady(energy_j / seconds, statistics.mean(clocks), capped_s / seconds, seconds)


def _middle_s(tick: Tick) -> float:
    return (tick.previous_poll_s + tick.time_s) / 2


def gaps_s(ticks: Sequence[Tick]) -> list[float]:
    """Times between two ticks that follow each other."""
    return [_middle_s(b) - _middle_s(a) for a, b in itertools.pairwise(ticks) if a.epoch == b.epoch]


def changes_s(readings: Sequence[tuple[float, float]]) -> list[float]:
    """Times between two changes of what was read, from (time, value) in order."""
    changed = [b[0] for a, b in itertools.pairwise(readings) if a[1] != b[1]]
    return [b - a for a, b in itertools.pairwise(changed)]


def extra_s(bare_s: Sequence[float], hooked_s: Sequence[float]) -> tuple[float, float]:
    """By how much one of two things that took turns takes longer: median of the pairs, and its standard error."""
    differences = np.subtract(hooked_s, bare_s)
    # Of a median: 1.2533 that of a mean. The deviation is from the quartiles, which a few disturbed pairs do not move.
    low, high = np.quantile(differences, (0.25, 0.75))
    return float(np.median(differences)), float(1.2533 * (high - low) / 1.349 / math.sqrt(len(differences)))


def kind_of_work(
    kind: str, estimate: StageEstimate, *, in_pattern: Steady, alone: Steady, steady_time_s: float
) -> KindOfWork:
    """The estimator's figures of a kind beside those of its steady runs.

    Args:
        kind: which; the estimate has it at one clock.
        estimate: from the pattern.
        in_pattern: what the whole pattern showed.
        alone: what steady runs of it showed.
        steady_time_s: mean duration in these.
    """
    row = next(row for row in estimate.instructions if row.kind == kind)
    estimated_w = row.energy_j / row.time_s
    return KindOfWork(
        kind=kind,
        time_ms=1e3 * row.time_s,
        steady_time_ms=1e3 * steady_time_s,
        estimated_j=row.energy_j,
        estimated_se_j=row.energy_se_j,
        estimated_w=estimated_w,
        steady_w=alone.power_w,
        power_error_percent=100 * (estimated_w / alone.power_w - 1),
        error_percent=100 * (row.energy_j / (alone.power_w * steady_time_s) - 1),
        clock_mhz=in_pattern.clock_mhz,
        steady_clock_mhz=alone.clock_mhz,
        capped_percent=100 * alone.capped,
    )
