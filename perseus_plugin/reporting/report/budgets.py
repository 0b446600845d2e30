"""What power budgets allowed, and what was drawn while each of them was in force, by the ranks' records. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.power.budget import EACH_GPU, EACH_NODE, GroupBudget, PowerBudget
from perseus_plugin.reporting.record.iterations import Stretch
from perseus_plugin.reporting.record.records import RankRecord
from perseus_plugin.reporting.report.reigns import Reign

_SHOWN = 8  # budgets, those that were in force for most iterations
_FINE = 100  # steps of a window at which it may begin


@dataclass(frozen=True, slots=True)
class BudgetAsRun:
    """One budget against what was drawn, in watts as the budget was given: of GPUs, or of their nodes.

    Attributes:
        whose: all GPUs of the job, or a group; of groups of one kind, such as each node, the one that drew most.
        iterations: for how many it was in force.
        allowed_w: average that was allowed; NaN: there was only a limit on peaks.
        average_w: over all those iterations.
        peak_allowed_w: highest average over a window that was allowed; NaN: any.
        highest_w: over any window; within iterations as far as the counter was read there. NaN: not known.
        window_s: length of the window.
    """

    whose: str
    iterations: int
    allowed_w: float
    average_w: float
    peak_allowed_w: float
    highest_w: float
    window_s: float


def as_run(reigns: Sequence[Reign], records: Mapping[int, RankRecord], world_size: int) -> list[BudgetAsRun]:
    """Every budget that was in force, the one for longest first; none where a rank's record is missing.

    Args:
        reigns: what was in force when, by rising iteration.
        records: by rank.
        world_size: ranks of the job.
    """
    if not records or len(records) != world_size or not all(record.stretches for record in records.values()):
        return []
    last = min(record.stretches[-1].first + record.stretches[-1].count for record in records.values())
    spans: dict[PowerBudget, list[tuple[int, int]]] = {}
    for reign, until in zip(reigns, [*(reign.first for reign in reigns[1:]), last], strict=False):
        if reign.limit is not None and reign.first < min(until, last):
            spans.setdefault(reign.limit, []).append((reign.first, min(until, last)))
    held = {limit: sum(until - first for first, until in of) for limit, of in spans.items()}
    longest = sorted(held, key=lambda limit: -held[limit])[:_SHOWN]
    found = [
        _drawn(limit, whose, sets, allowed, [_Run(records, span) for span in spans[limit]], held[limit])
        for limit in longest
        for whose, sets, *allowed in _sides(limit, world_size)
    ]
    return [one for one in found if not math.isnan(one.average_w)]


def _sides(limit: PowerBudget, world_size: int) -> Iterator[tuple[str, list[tuple[int, ...]], float, float, bool]]:
    """Whose budget it is: by name, the sets of ranks that it is of, average and peak allowed, and whether of GPUs."""

    def peak(watts: float | None) -> float:
        return math.nan if watts is None else watts

    peaks = limit.peaks
    if limit.job_w is not None or peaks.job_w is not None:
        yield "the job", [tuple(range(world_size))], peak(limit.job_w), peak(peaks.job_w), False
    of_each = {EACH_NODE: peaks.node_w, EACH_GPU: peaks.gpu_w}
    for group in limit.groups:
        sets = group.ranks(world_size, limit.gpus_per_node)
        yield group.name, sets, group.watts, peak(of_each.pop(group.of, None)), group.of == EACH_GPU
    for of, watts in of_each.items():
        if watts is not None:
            sets = GroupBudget(of, of, watts).ranks(world_size, limit.gpus_per_node)
            yield of, sets, math.nan, watts, of == EACH_GPU


def _drawn(
    limit: PowerBudget,
    whose: str,
    sets: Sequence[tuple[int, ...]],
    allowed: Sequence[float],
    runs: Sequence[_Run],
    iterations: int,
) -> BudgetAsRun:
    allowed_w, peak_allowed_w, of_gpus = allowed
    window_s = limit.peaks.window_s

    def told(watts: float, ranks: Sequence[int]) -> float:
        return watts if of_gpus else limit.node_w(watts, len(ranks))

    averages_w = [told(_average_w(runs, ranks), ranks) for ranks in sets]
    highest_w = [told(max(run.highest_w(ranks, window_s) for run in runs), ranks) for ranks in sets]
    most = int(np.nanargmax(averages_w)) if not all(map(math.isnan, averages_w)) else 0
    name = whose if len(sets) == 1 else f"{whose} {most}, which drew most of {len(sets)}"
    peak_w = max((watts for watts in highest_w if not math.isnan(watts)), default=math.nan)
    return BudgetAsRun(name, iterations, allowed_w, averages_w[most], peak_allowed_w, peak_w, window_s)


def _average_w(runs: Sequence[_Run], ranks: Sequence[int]) -> float:
    """Of these ranks together; NaN where one has no figure."""
    return math.fsum(_mean_w([piece for run in runs for piece in run.stretches[rank]]) for rank in ranks)


def _mean_w(pieces: Sequence[tuple[Stretch, int]]) -> float:
    known = [(stretch, count) for stretch, count in pieces if not math.isnan(stretch.energy_j)]
    seconds = math.fsum(count * stretch.time_s for stretch, count in known)
    return math.fsum(count * stretch.energy_j for stretch, count in known) / seconds if seconds else math.nan


class _Run:
    """The iterations of a span on every rank."""

    def __init__(self, records: Mapping[int, RankRecord], span: tuple[int, int]) -> None:
        first, until = span
        self.stretches: dict[int, list[tuple[Stretch, int]]] = {}
        self._power: dict[int, tuple[FloatArray, FloatArray]] = {}
        for rank, record in records.items():
            clipped = [(one, max(first, one.first), min(until, one.first + one.count)) for one in record.stretches]
            within = [(one, low, high) for one, low, high in clipped if low < high]
            self.stretches[rank] = [(one, high - low) for one, low, high in within]
            pieces = [piece for one in within for piece in _pieces(record, *one)]
            # What lies between two pieces draws as the one before.
            edges = [begin_s for begin_s, _, _ in pieces] + [pieces[-1][1]] if pieces else []
            self._power[rank] = np.array(edges), np.array([watts for _, _, watts in pieces])

    def highest_w(self, ranks: Sequence[int], window_s: float) -> float:
        """The highest average of these ranks together over a window; NaN: it is nowhere known for so long."""
        of_ranks = [self._power[rank] for rank in ranks]
        if not all(len(watts) for _, watts in of_ranks):
            return math.nan
        begin_s, end_s = max(edges[0] for edges, _ in of_ranks), min(edges[-1] for edges, _ in of_ranks)
        window_s = min(window_s, end_s - begin_s)
        if window_s <= 0:
            return math.nan
        # Over pieces of even power the highest average begins, or ends, where one does.
        edges_s = np.concatenate([edges for edges, _ in of_ranks]) - begin_s
        starts_s = np.concatenate([edges_s, edges_s - window_s])
        starts_s = np.unique(np.round(starts_s.clip(0, end_s - begin_s - window_s) * (_FINE / window_s))) * (
            window_s / _FINE
        )
        starts_s = starts_s.clip(0, end_s - begin_s - window_s) + begin_s
        energy_j, unknown_s = np.zeros(len(starts_s)), np.zeros(len(starts_s))
        for edges, watts in of_ranks:
            lengths_s = np.diff(edges)
            for sums, values in ((energy_j, np.nan_to_num(watts)), (unknown_s, np.isnan(watts).astype(np.float64))):
                so_far = np.concatenate([[0.0], np.cumsum(values * lengths_s)])
                sums += np.interp(starts_s + window_s, edges, so_far) - np.interp(starts_s, edges, so_far)
        known = energy_j[unknown_s < window_s / _FINE]
        return float(known.max()) / window_s if len(known) else math.nan


def _pieces(record: RankRecord, stretch: Stretch, low: int, high: int) -> Iterator[tuple[float, float, float]]:
    """Pieces of even power, as (from, to, watts): of an iteration kept whole between readings of the counter."""
    begin_s, mean_w = stretch.begin_s + (low - stretch.first) * stretch.time_s, stretch.energy_j / stretch.time_s
    end_s = begin_s + (high - low) * stretch.time_s
    sample = next((one for one in record.samples if one.number == low), None) if high - low == 1 else None
    powers = [] if sample is None else [(a, b, w) for a, b, w in sample.powers() if a >= 0 and b <= stretch.time_s]
    if powers:
        yield begin_s, begin_s + powers[0][0], mean_w
        for (from_s, to_s, watts), (next_s, _, _) in pairwise([*powers, (powers[-1][1], 0.0, 0.0)]):
            yield begin_s + from_s, begin_s + max(to_s, next_s), watts
        begin_s += powers[-1][1]
    yield begin_s, end_s, mean_w
