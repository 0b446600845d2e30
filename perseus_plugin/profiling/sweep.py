"""Which clocks to profile, in which order, and when to stop. Pure functions of what is known so far."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from perseus_plugin.profiling.observations import BLOCKING, InstructionEstimate, StageEstimate
from perseus_plugin.profiling.pooling import blocking_power
from perseus_plugin.profiling.waiting import WaitingPower
from perseus_plugin.profiling.waiting_of_stages import waiting_powers

_SIGMAS = 2.0  # by this many standard errors a clock must be worse before it is given up


def choose_clocks(supported_mhz: Sequence[int], count: int, lowest_mhz: int = 0) -> tuple[int, ...]:
    """`count` supported clocks (fewer if there are fewer) from the highest down to `lowest_mhz`,
    evenly spread, falling.

    Raises:
        ValueError: `count` below 1, or no supported clock at or above `lowest_mhz`.
    """
    if count < 1:
        raise ValueError(f"count: got {count}; allowed: 1 or more")
    allowed = sorted({clock for clock in supported_mhz if clock >= lowest_mhz}, reverse=True)
    if not allowed:
        raise ValueError(f"lowest_mhz: got {lowest_mhz}; allowed: at most the highest supported clock, {supported_mhz}")
    if count >= len(allowed):
        return tuple(allowed)
    if count == 1:
        return (allowed[0],)
    chosen: list[int] = []
    for i in range(count):
        target = allowed[0] + (allowed[-1] - allowed[0]) * i / (count - 1)
        # Leave enough clocks for the rest where the supported ones are not evenly spread.
        within = allowed[i : len(allowed) - (count - 1 - i)]
        chosen.append(min((c for c in within if not chosen or c < chosen[-1]), key=lambda c: abs(c - target)))
    return tuple(chosen)


def sweep_order(clocks_mhz: Sequence[int], seed: int, revisits: int = 2) -> tuple[int, ...]:
    """The order of a sweep: the top clock first, the others shuffled, the top revisited at even distances.

    The last visit is to the top clock again. Shuffling keeps drift (the GPU warms up) from looking like an effect of
    the clock; the revisits measure it.
    """
    top = max(clocks_mhz)
    rest = sorted(set(clocks_mhz) - {top})
    random.Random(seed).shuffle(rest)
    order = [top]
    done = 0
    for i in range(1, revisits + 1):
        upto = round(i * len(rest) / revisits)
        order += rest[done:upto]
        done = upto
        if order[-1] != top:
            order.append(top)
    return tuple(order + rest[done:])


def is_pareto_candidate(
    stage: StageEstimate, kind: str, frequency_mhz: int, *, waiting: WaitingPower | None = None
) -> bool:
    """Whether a measured clock may be the best choice for a kind at some deadline.

    It may not when another clock is faster and clearly cheaper, with waiting for the rest of the time at that clock.
    Unknown energies give the clock the benefit of the doubt.

    Args:
        waiting: what a GPU of the stage draws while it waits; None: what the stage itself measured.
    """
    power = waiting or waiting_powers([stage])[0]
    rows = [row for row in stage.instructions if row.kind == kind]
    mine = next((row for row in rows if row.frequency_mhz == frequency_mhz), None)
    if mine is None:
        return True
    return not any(_beats(other, mine, power.at_w(other.frequency_mhz)) for other in rows if other.time_s < mine.time_s)


def worth_trying(stages: Sequence[StageEstimate], candidates_mhz: Sequence[int]) -> tuple[int, ...]:
    """Those of the candidate clocks that can still be useful to some (stage, kind), in the order given.

    Effective energy over the clock falls, then rises as the clock goes down further. Once the lowest measured clocks
    are no Pareto candidates, no clock below the highest of them is. Unresolved kinds rule nothing out.
    """
    if not stages or any(not stage.instructions for stage in stages):
        return tuple(candidates_mhz)
    lowest_useful = min(
        _floor(stage, kind, waiting)
        for stage, waiting in zip(stages, waiting_powers(stages), strict=True)
        for kind in stage.kinds
    )
    return tuple(clock for clock in candidates_mhz if clock > lowest_useful)


def good_enough(stages: Sequence[StageEstimate], max_relative_error: float) -> bool:
    """Whether every kind of every stage, and the job's blocking power, is known to within `max_relative_error`.

    Clocks that are no Pareto candidates need not be known so well. A stage that hardly waits need not know its own
    blocking power: the job's is taken from those that do.
    """
    if not stages:
        return False
    power_w, power_se_w = blocking_power(stages)
    if all(BLOCKING in stage.unresolved for stage in stages) or not power_se_w <= max_relative_error * power_w:
        return False
    return all(
        _known(row, max_relative_error) or not is_pareto_candidate(stage, row.kind, row.frequency_mhz, waiting=waiting)
        for stage, waiting in zip(stages, waiting_powers(stages), strict=True)
        for row in stage.instructions
    ) and all(stage.instructions for stage in stages)


def times_known(stages: Sequence[StageEstimate], max_time_error: float) -> bool:
    """Whether the time of every clock that may be of use is known, against the highest clock, to within this share."""
    return all(
        row.time_se_s <= max_time_error * row.time_s
        or not is_pareto_candidate(stage, row.kind, row.frequency_mhz, waiting=waiting)
        for stage, waiting in zip(stages, waiting_powers(stages), strict=True)
        for row in stage.instructions
        if row.frequency_mhz != stage.clocks_mhz[0]
    )


def _beats(other: InstructionEstimate, mine: InstructionEstimate, power_w: float) -> bool:
    gain_j = (mine.energy_j - power_w * mine.time_s) - (other.energy_j - power_w * other.time_s)
    error_j = math.hypot(mine.energy_se_j, other.energy_se_j, power_w * mine.time_se_s, power_w * other.time_se_s)
    return gain_j > _SIGMAS * error_j  # False for NaN


def _floor(stage: StageEstimate, kind: str, waiting: WaitingPower) -> int:
    """The highest clock below which (itself included) every measured clock is of no use to the kind; 0 if none."""
    floor = 0
    if kind in stage.unresolved:
        return floor
    for clock in reversed(stage.clocks_mhz):
        if is_pareto_candidate(stage, kind, clock, waiting=waiting):
            break
        floor = clock
    return floor


def _known(row: InstructionEstimate, max_relative_error: float) -> bool:
    return row.energy_j > 0 and row.energy_se_j <= max_relative_error * row.energy_j
