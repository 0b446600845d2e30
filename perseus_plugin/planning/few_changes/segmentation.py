"""Cutting a stage's instructions into phases of one clock each, best at given prices (dynamic programming)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perseus_plugin.iteration.graph import FloatArray


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive phases of one stage.

    Attributes:
        begins: position of each phase's first instruction; the first is 0.
        clocks: clock id of each phase.
    """

    begins: tuple[int, ...]
    clocks: tuple[int, ...]


def segment(cost: FloatArray, start_s: FloatArray, max_changes: int | None, min_dwell_s: float) -> Segments:
    """The cheapest clocks with at most so many changes, a change back to the first clock at the end included.

    Args:
        cost: shape (instructions, clocks), inf where a clock is not allowed.
        start_s: shape (instructions,), when the instructions start; between two changes lies at least the dwell.
        max_changes: None: any number.
        min_dwell_s: seconds.
    """
    count, clocks = cost.shape
    if max_changes is not None and max_changes < 2:
        # A single change has to be undone at the end of the iteration.
        return Segments((0,), (int(cost.sum(axis=0).argmin()),))
    # One level per change made; with any number of changes all are on one level.
    levels = 1 if max_changes is None else max_changes + 1
    prefix = np.vstack([np.zeros(clocks), np.cumsum(cost, axis=0)])
    ready = np.searchsorted(start_s, start_s + min_dwell_s)
    # open_cost[k, f0, f]: cheapest way to be in a phase of clock f after k changes, having begun with f0, less the
    # cost of f up to that phase's begin.
    open_cost = np.full((levels, clocks, clocks), np.inf)
    open_begin = np.zeros((levels, clocks, clocks), dtype=np.int64)
    np.fill_diagonal(open_cost[0], 0.0)
    closed = np.full((count + 1, levels, clocks), np.inf)
    clock_of = np.zeros((count + 1, levels, clocks), dtype=np.int64)
    begin_of = np.zeros((count + 1, levels, clocks), dtype=np.int64)
    level_at, first_at = np.arange(levels)[:, None], np.arange(clocks)
    waiting = 1
    for position in range(1, count + 1):
        # Changes that lie a dwell back may be followed by another one.
        while waiting < position and (position == count or ready[waiting] <= position):
            _open(open_cost, open_begin, closed[waiting], prefix[waiting], waiting, max_changes is None)
            waiting += 1
        total = open_cost + prefix[position]
        clock = total.argmin(axis=2)
        closed[position] = total[level_at, first_at, clock]
        clock_of[position] = clock
        begin_of[position] = open_begin[level_at, first_at, clock]
    return _best(open_cost + prefix[count], open_begin, clock_of, begin_of, max_changes)


def _open(
    open_cost: FloatArray,
    open_begin: npt.NDArray[np.int64],
    closed: FloatArray,
    prefix: FloatArray,
    position: int,
    unlimited: bool,
) -> None:
    """Let a new phase begin at `position`: one level up, or on the same one without levels."""
    source, target = (closed, slice(0, 1)) if unlimited else (closed[:-1], slice(1, None))
    fresh = source[:, :, None] - prefix
    better = fresh < open_cost[target]
    np.copyto(open_cost[target], fresh, where=better)
    np.copyto(open_begin[target], position, where=better)


def _best(
    total: FloatArray,
    open_begin: npt.NDArray[np.int64],
    clock_of: npt.NDArray[np.int64],
    begin_of: npt.NDArray[np.int64],
    max_changes: int | None,
) -> Segments:
    """Pick the cheapest end and walk back."""
    if max_changes is not None:
        # The last level is only open to those that end with the clock they began with.
        total[-1][~np.eye(total.shape[1], dtype=bool)] = np.inf
    level, first, clock = (int(i) for i in np.unravel_index(int(total.argmin()), total.shape))
    begin = int(open_begin[level, first, clock])
    begins, clocks = [begin], [clock]
    while begin > 0:
        level -= max_changes is not None
        clock, begin = int(clock_of[begin, level, first]), int(begin_of[begin, level, first])
        begins.append(begin)
        clocks.append(clock)
    begins, clocks = begins[::-1], clocks[::-1]
    kept = [k for k in range(len(begins)) if k == 0 or clocks[k] != clocks[k - 1]]
    return Segments(tuple(begins[k] for k in kept), tuple(clocks[k] for k in kept))
