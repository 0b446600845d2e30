"""What `decide` asks for, to be done by the coordinator, in this order; nothing here does anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from perseus_plugin.exchange.messages import News, PlanParts
from perseus_plugin.iteration.instructions import StreamOf
from perseus_plugin.iteration.replayed import InForce, Overheads
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.request import PaceRequest, PlanRequest
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.stragglers.situation import Answer, Situation


@dataclass(frozen=True)
class Say:
    """A line of the log."""

    level: Literal["info", "warning"]
    text: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Order:
    """All ranks are told."""

    news: News


@dataclass(frozen=True)
class PublishSet:
    """A set of plans, every stage its parts; before the order to follow it."""

    version: int
    parts: tuple[PlanParts, ...]


@dataclass(frozen=True)
class WithdrawSet:
    """Nobody will follow this set any more; the store shall not grow with every set."""

    version: int


@dataclass(frozen=True)
class Ask:
    """The planner is asked, if it works on nothing else.

    Attributes:
        schedule: its key.
        stream_of: the instruction stream of every stage.
        survey: what is known of the job.
        goal: what is aimed at.
        margin: the least one; with `quick` the one to take.
        quick: a target has changed: by what is known of iterations on average, so that it takes milliseconds.
        overheads: what iterations take beside the work that is known; None: as the last iterations tell.
        instead_of: schedule whose plan makes room for it, None: there is room.
        situation: of stragglers that it is to answer; None: it is for the job's plan of a schedule.
        pace: of those stragglers.
        review: a plan in force is held against newer iterations; not asked where there are too few.
        in_force: that plan.
        refine: look for a better one beside all else, with more effort; it is not waited for.
        answer: to stragglers, which that is to be better than; None: a plan of the job is refined.
        or_nearest: where no plan keeps the goal's limit, take what comes nearest, as the goal is in force already.
    """

    schedule: str
    stream_of: StreamOf
    survey: Survey
    goal: Goal
    margin: float
    quick: bool = False
    overheads: Overheads | None = None
    instead_of: str | None = None
    situation: Situation | None = None
    pace: PaceRequest | None = None
    review: bool = False
    in_force: InForce | None = None
    refine: bool = False
    answer: Answer | None = None
    or_nearest: bool = False


@dataclass(frozen=True)
class SaveProfile:
    """What was measured is kept."""

    survey: Survey


@dataclass(frozen=True)
class SaveFailure:
    """Why profiling failed is kept, for the next job of this sort."""

    reason: str


@dataclass(frozen=True)
class ShowPlan:
    """The plan that a person looks at, and what its frontier is made from."""

    plan: Plan
    request: PlanRequest


@dataclass(frozen=True)
class ForgetIterations:
    """What ranks have told of their last iterations does not hold any more: of a schedule, or of all (None)."""

    schedule: str | None = None


@dataclass(frozen=True)
class RefuseReports:
    """Every straggler report is refused from now on."""

    reason: str


@dataclass(frozen=True)
class Record:
    """A line of the event log."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Show:
    """Figures for the framework's monitor."""

    figures: Sequence[tuple[str, float]]


Effect: TypeAlias = (
    Say
    | Order
    | PublishSet
    | WithdrawSet
    | Ask
    | SaveProfile
    | SaveFailure
    | ShowPlan
    | ForgetIterations
    | RefuseReports
    | Record
    | Show
)
