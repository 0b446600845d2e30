"""What a waiting GPU of each stage draws at each clock, from what all stages measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from perseus_plugin.profiling.observations import BLOCKING, StageEstimate
from perseus_plugin.profiling.random_effects import Figure, mean_of, variance_between
from perseus_plugin.profiling.waiting import WaitingPower

_USABLE = 0.5  # a figure whose standard error is a larger share of it says nothing
_LEAST_W = 1.0  # what draws less is not on

ByClock = dict[int, Figure]
"""Watts and their standard error, by clock in MHz."""


def waiting_by_clock(stages: Sequence[StageEstimate]) -> list[ByClock]:
    """Waiting power of each stage at each of its clocks.

    Stages wait little, and one of them hardly, so they help each other where their GPUs have one name:

    - At each clock a stage's figure is drawn towards the mean of the stages by the share of its variance that is
      error (GPUs of one name differ by a few per cent; how much is seen over all clocks).
    - A stage that did not measure it takes the mean; of all stages, if none with such a GPU measured it.
    - A clock at which nobody knows it takes what lies between, or is next to, those at which somebody does.
    - Where the figures fall as the clock rises, which waiting does not, they are averaged (isotonic regression).
    """
    measured = [stage for stage in stages if BLOCKING not in stage.unresolved] or list(stages)
    return [_of_stage(stage, measured) for stage in stages]


def waiting_powers(stages: Sequence[StageEstimate]) -> list[WaitingPower]:
    """The same as functions of the clock."""
    powers = []
    for stage, known in zip(stages, waiting_by_clock(stages), strict=True):
        clocks = tuple(sorted(known))
        if clocks:
            powers.append(WaitingPower(clocks, tuple(known[clock][0] for clock in clocks)))
        else:
            powers.append(WaitingPower.constant(stage.blocking_power_w))
    return powers


def _of_stage(stage: StageEstimate, measured: Sequence[StageEstimate]) -> ByClock:
    peers = [peer for peer in measured if peer.gpu == stage.gpu] or list(measured)
    at: dict[int, list[Figure]] = {}
    for peer in peers:
        for clock, figure in _figures(peer).items():
            at.setdefault(clock, []).append(figure)
    if not at:
        return {}
    means = {clock: mean_of(figures) for clock, figures in at.items()}
    differ = float(np.mean([variance_between(figures) / means[clock][0] ** 2 for clock, figures in at.items()]))
    own = _figures(stage) if any(stage is peer for peer in peers) else {}
    found = {}
    for clock in sorted(stage.clocks_mhz):
        mean_w, mean_se_w = _between(means, clock)
        between = differ * mean_w**2
        own_w, own_se_w = own.get(clock, (math.nan, math.inf))
        kept = between / (between + own_se_w**2) if between > 0 else 0.0
        watts = mean_w + (kept * (own_w - mean_w) if kept else 0.0)
        found[clock] = watts, math.sqrt((1 - kept) * between + ((1 - kept) * mean_se_w) ** 2)
    return _never_falling(found)


def _figures(stage: StageEstimate) -> ByClock:
    """What a stage says of itself, where that is of use."""
    by_clock = {clock: (watts, error_w) for clock, watts, error_w in stage.blocking_by_clock}
    figures = by_clock or dict.fromkeys(stage.clocks_mhz, (stage.blocking_power_w, stage.blocking_power_se_w))
    finite = {clock: (w, se_w) for clock, (w, se_w) in figures.items() if w > _LEAST_W and math.isfinite(se_w)}
    # What is assumed, as nothing was measured, counts as far as nothing else is known.
    return {clock: (w, se_w) for clock, (w, se_w) in finite.items() if se_w < _USABLE * w} or finite


def _between(figures: Mapping[int, Figure], clock: int) -> Figure:
    clocks = sorted(figures)
    watts, errors_w = zip(*(figures[known] for known in clocks), strict=True)
    return float(np.interp(clock, clocks, watts)), float(np.interp(clock, clocks, errors_w))


def _never_falling(figures: Mapping[int, Figure]) -> ByClock:
    """The nearest figures that rise with the clock or stay (pool adjacent violators); errors stay."""
    groups: list[tuple[float, float, list[int]]] = []  # mean, weight and clocks
    for clock in sorted(figures):
        watts, error_w = figures[clock]
        group = (watts, 1 / max(error_w, 1e-9 * watts) ** 2, [clock])
        while groups and groups[-1][0] > group[0]:
            mean_w, weight, clocks = groups.pop()
            total = weight + group[1]
            group = ((mean_w * weight + group[0] * group[1]) / total, total, clocks + group[2])
        groups.append(group)
    return {clock: (mean_w, figures[clock][1]) for mean_w, _, clocks in groups for clock in clocks}
