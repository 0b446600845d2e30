"""What is observed of a job: everything that `leader.decide` decides on. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from perseus_plugin.exchange.messages import RankEstimate, Recheck
from perseus_plugin.iteration.instructions import StreamOf
from perseus_plugin.iteration.timetable import Directive
from perseus_plugin.leader.effects import Ask
from perseus_plugin.leader.target_book import Entry
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.profiling.same_work import Works
from perseus_plugin.stragglers.situation import Situation


@dataclass(frozen=True)
class Runs:
    """Iterations run this schedule from now on."""

    schedule: str
    stream_of: StreamOf


@dataclass(frozen=True)
class Ended:
    """An iteration has ended on rank 0.

    Attributes:
        number: of the iteration.
        directive: what it ran as.
        schedule: key of the one that ran; empty for one that is not followed.
        time_s: it took.
        counts: it was undisturbed, and seen from beginning to end.
        size: how much work it had, as a multiple of the profile's; NaN: not known.
    """

    number: int
    directive: Directive
    schedule: str
    time_s: float
    counts: bool = True
    size: float = math.nan


@dataclass(frozen=True)
class Troubled:
    """A rank cannot control its GPU any more."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Measured:
    """What all ranks have measured in the sweep, by rank; and how much work steps were, where that was announced."""

    estimates: Sequence[RankEstimate]
    works: Works = field(default_factory=dict)


@dataclass(frozen=True)
class NotMeasured:
    """Some ranks have not told what they measured, for too long."""

    missing: str


@dataclass(frozen=True)
class Checked:
    """What ranks measured at full clocks, where a profile is known."""

    rechecks: Sequence[Recheck]


@dataclass(frozen=True)
class Answered:
    """The planner has answered what it was asked.

    Attributes:
        asked: what was asked.
        request: as it was submitted.
        answer: of the planner.
        now_s: by a clock that never goes back.
    """

    asked: Ask
    request: PlanRequest
    answer: PlanAnswer
    now_s: float = 0.0


@dataclass(frozen=True)
class Turned:
    """This iteration runs on rank 0, and news take so long to reach all ranks.

    Attributes:
        now_s: by a clock that never goes back.
    """

    iteration: int
    news_take_s: float = 0.0
    now_s: float = 0.0


@dataclass(frozen=True)
class Due:
    """All that came has been told of: what is to be done next may be done."""


@dataclass(frozen=True)
class Situated:
    """Who is slow, None: nobody; for the schedule of the plan that a person looks at.

    Attributes:
        now_s: by a clock that never goes back.
    """

    situation: Situation | None
    now_s: float


@dataclass(frozen=True)
class Watched:
    """What references amid iterations under the plan have shown since the last time.

    Attributes:
        slowed: share by which iterations are too long beyond doubt, None: they are not.
        said: that, for people.
        planner_idle: whether the planner works on nothing.
        refiner_idle: whether there is somebody to refine plans who works on nothing.
    """

    slowed: float | None = None
    said: str = ""
    planner_idle: bool = True
    refiner_idle: bool = False


@dataclass(frozen=True)
class Rechecked:
    """What ranks measured at full clocks after a plan was dropped, without what is known to be a straggler's.

    Attributes:
        complete: whether all have told.
    """

    rechecks: Sequence[Recheck]
    complete: bool


@dataclass(frozen=True)
class Targeted:
    """What was said of the job's target since the last time; see `target_book`.

    Attributes:
        entries: what was said, in order.
        unix_s: what time it is.
    """

    entries: Sequence[Entry]
    unix_s: float


@dataclass(frozen=True)
class Placed:
    """All ranks have told where they sit: so many GPUs share a node and what it draws beside them."""

    gpus_per_node: int


@dataclass(frozen=True)
class Drew:
    """What all GPUs together have drawn on average, over so many iterations under the plans in force.

    Attributes:
        time_s: that these took; NaN: not known.
    """

    power_w: float
    iterations: int
    time_s: float = math.nan


@dataclass(frozen=True)
class DrewAtFull:
    """What all GPUs together have drawn on average, over so many iterations of the sweep at full clocks."""

    power_w: float
    iterations: int


Observed: TypeAlias = (
    Runs
    | Ended
    | Troubled
    | Measured
    | NotMeasured
    | Checked
    | Answered
    | Turned
    | Due
    | Situated
    | Watched
    | Rechecked
    | Targeted
    | Placed
    | Drew
    | DrewAtFull
)
