"""What figures can be at all: what comes from outside is held against it, whoever says it and whatever it is for.

Wide enough for any GPU and job there is, and narrow enough that nothing overflows or takes for ever further on.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from annotated_types import Gt, Interval  # what pydantic reads, without importing it into the helper process

from perseus_plugin.errors import shown

MOST_MHZ = 10_000
MOST_S = 1e6
"""Of an instruction, an iteration, or a part of either: eleven days."""
LEAST_S = 1e-9
"""Of what is divided by."""
MOST_W = 2000.0
"""No GPU draws more: what does is not in joules and seconds."""
MOST_J = MOST_S * MOST_W
MOST_SLOWDOWN = 1.0
"""As a share of the time at full clocks, of which an iteration takes twice as much then: who writes 10 means 10 %."""
MOST_COUNT = 10**9
MOST_STAGES = 10_000
MOST_AHEAD = 1000
"""Steps that a batch is announced ahead."""
GPUS_OF_A_GROUP = r"^(gpu|node|node \d{1,9}|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*)$"
"""Which GPUs share a power budget: each one, those of each node, of the fourth node (`node 3`), or of some ranks."""

Clock = Annotated[int, Interval(ge=1, le=MOST_MHZ)]
ClockOrFull = Annotated[int, Interval(ge=0, le=MOST_MHZ)]
"""0: full clocks."""
Count = Annotated[int, Interval(ge=0, le=MOST_COUNT)]
Stage = Annotated[int, Interval(ge=0, le=MOST_STAGES)]
Time = Annotated[float, Interval(ge=0, le=MOST_S)]
PositiveTime = Annotated[float, Interval(gt=0, le=MOST_S)]
Power = Annotated[float, Interval(ge=0, le=MOST_W)]
Moment = Annotated[float, Interval(ge=-MOST_S, le=MOST_S)]
"""Since another one, or from one to another: two clocks that are not quite the same may make that negative."""
Ratio = Annotated[float, Interval(ge=1 / MOST_S, le=MOST_S)]
PositiveEnergy = Annotated[float, Gt(0)]


def number(value: Any, low: float, high: float, what: str) -> float:
    """A figure as it was told, NaN where it is not known (None).

    Raises:
        ValueError: it is no number, or not from `low` to `high`.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{what}: got {shown(value)}; allowed: a number from {low:g} to {high:g}")
    return float(value)
