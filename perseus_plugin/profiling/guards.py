"""Measured energies that no GPU can have: what is done about them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from perseus_plugin.iteration.bounds import MOST_W
from perseus_plugin.profiling.profile import Measurement, Profile

_SIGMAS = 3.0  # standard errors within which a figure above the limit is taken for the limit
# At its power limit a GPU draws more than that for a tenth of a second after a wait, and work amid waits seems to draw
# up to 19 % more than alone (measured on H100 and H200); what waits seem to draw too much comes on top.
_AFTER_WAITS = 1.25


@dataclass(frozen=True, slots=True)
class TooHigh:
    """An estimate above what the card can draw, by more than its error.

    Attributes:
        stage, kind, frequency_mhz: whose.
        power_w, limit_w: what was estimated, and the most that the card draws.
    """

    stage: int
    kind: str
    frequency_mhz: int
    power_w: float
    limit_w: float


def possible(
    profile: Profile, limits_w: Mapping[int, float], held: Collection[tuple[int, int]] = ()
) -> tuple[Profile, tuple[TooHigh, ...]]:
    """The profile as a GPU can have it.

    - No work draws less than waiting at the same clock: what does is taken to draw that.
    - None draws more than the card can. Within three standard errors the estimate is taken for the limit, at the
      highest clock, where a GPU may be held at its limit, also within a quarter of it. Where the GPU says that its
      limit held it, up to a quarter more than that is what work amid waits really draws, and stays. Beyond, it is
      wrong: the stage's clock goes as a whole, as plans need all of a stage's kinds at each. The highest clock stays,
      at the most.

    Args:
        profile: as measured.
        limits_w: the most that a GPU of a stage can draw; 2,000 W for stages that are left out.
        held: (stage, clock) at which the power limit held the GPU.

    Returns:
        The profile, and the estimates that were wrong.
    """
    wrong: list[TooHigh] = []
    table: dict[tuple[int, str], tuple[Measurement, ...]] = {}
    for (stage, kind), rows in profile.table.items():
        limit_w = limits_w.get(stage, MOST_W)
        wrong += [
            TooHigh(stage, kind, row.frequency_mhz, row.energy_j / row.time_s, limit_w)
            for row in rows
            if row.energy_j - _error_j(row)
            > limit_w * row.time_s * (_AFTER_WAITS if row is rows[0] or (stage, row.frequency_mhz) in held else 1.0)
        ]
        table[stage, kind] = tuple(
            _within(row, limit_w * (_AFTER_WAITS if (stage, row.frequency_mhz) in held else 1.0)) for row in rows
        )
    gone = _below_top(profile, wrong)
    kept = {
        (stage, kind): tuple(row for row in rows if (stage, row.frequency_mhz) not in gone)
        for (stage, kind), rows in table.items()
    }
    return Profile(kept), tuple(wrong)


def _below_top(profile: Profile, wrong: Sequence[TooHigh]) -> set[tuple[int, int]]:
    return {
        (one.stage, one.frequency_mhz)
        for one in wrong
        if one.frequency_mhz != profile.table[one.stage, one.kind][0].frequency_mhz
    }


def _error_j(row: Measurement) -> float:
    return _SIGMAS * row.energy_se_j if math.isfinite(row.energy_se_j) else 0.0


def _within(row: Measurement, limit_w: float) -> Measurement:
    energy_j = min(row.energy_j, limit_w * row.time_s)
    if math.isfinite(row.blocking_power_w):
        energy_j = max(energy_j, row.blocking_power_w * row.time_s)
    return row if energy_j == row.energy_j else replace(row, energy_j=energy_j)
