"""All that rank 0 knows of a job while it decides for all ranks: the whole of what changes. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from copy import copy as shallow
from dataclasses import dataclass, field, replace

from perseus_plugin.config import PerseusConfig
from perseus_plugin.iteration.replayed import Replayed
from perseus_plugin.leader.expectations import Expectations
from perseus_plugin.leader.goal_plans import GoalPlans
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.job_schedules import JobSchedules
from perseus_plugin.leader.measuring import SweepInForce
from perseus_plugin.leader.orders import Orders
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.leader.reigns import Reigns
from perseus_plugin.leader.reviews import Reviews
from perseus_plugin.leader.target_book import Goal, TargetBook
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.stragglers.situation import Answers


class Phase(enum.Enum):
    """What is waited for.

    MEASURING -> PLANNING -> FOLLOWING <-> RECHECKING (-> PLANNING); from each of them to GIVEN_UP, which stays.
    """

    MEASURING = "measuring"
    PLANNING = "planning"
    FOLLOWING = "following"
    RECHECKING = "rechecking"
    GIVEN_UP = "given up"


@dataclass(frozen=True)
class Rules:
    """What does not change.

    Attributes:
        config: the `perseus` block.
        stages: of the pipeline.
        steps_per_block: iterations of the sweep at each clock, settling included.
        top_mhz: the highest clock.
        full_sweep_mhz: the sweep to make if a kept profile turns out not to fit.
        replica: of the rank that decides.
        pipelines: GPUs that run each stage.
    """

    config: PerseusConfig
    stages: int
    steps_per_block: int
    top_mhz: int
    full_sweep_mhz: tuple[int, ...]
    replica: int = 0
    pipelines: int = 1


@dataclass
class JobState:
    """See the module's docstring; `decide` alone makes new ones.

    Attributes:
        times, plans, answers, sweep: what each says of itself.
        margin: the least one that plans are made with.
        phase: what is waited for.
        iteration: the one that runs on rank 0.
        news_take_s: until all ranks have heard what they are told.
        known: a loaded or kept profile that is still to be checked; None to wait for the ranks' estimates.
        survey: what plans are made on; None before it is known.
        schedules: that the job runs.
        reviews: when plans in force are looked at.
        orders: what all ranks have been told.
        requests: by schedule, what its plan was made for.
        replayed: by schedule, what measured iterations made of its plan.
        plan: of the schedule that runs most; None before the first.
        planning_time_s: how long the newest plan took.
        made_anew: plans since the last order were made on new measurements.
        said_too_many: that there are more schedules than plans are made for.
        followed: the set that the replica of the rank that decides follows, 0 for full clocks.
        unanswered: who is slow has changed, and the plan in force was not made for it.
        slow_since: iteration since which iterations run long, None while they do not.
        dropped: plans that did not hold.
        strikes: those of them that are not forgiven yet.
        held: iterations under plans that hold.
        excess: by what share the plan that was dropped last overran.
        found_by_references: iterations at full clocks on the same work have shown that.
        recheck_sequence: number of the order that ranks answer with a recheck.
        targets: what the job is to aim at, by who said it.
        goal: what the plans are made for.
        goal_plans: those of goals that it had before, too.
        draws: how many times what plans for a limit say GPUs are known to draw.
        full_w: what all GPUs drew together at full clocks, as measured; None: not known.
        gpus_per_node: 0: not known yet.
        at_full: full clocks are the target: no plan is followed.
        given_up_why: why the job stays at full clocks; empty: it does not.
        fallen: a plan did not hold, and one clock for all is followed instead, as a limit forbids full clocks.
        unplannable: a goal that there is no plan for.
        said_exceeded: the last limit of which was said that no plan keeps it.
        reigns: which goal was in force for how many iterations.
        now_s: by a clock that never goes back.
        stepped_s: when the power was changed last.
        step: on the way to the target, where power may not change faster; None: the next one is not chosen.
    """

    times: IterationTimes
    plans: PlanShelf
    answers: Answers
    sweep: SweepInForce
    margin: float
    phase: Phase = Phase.MEASURING
    iteration: int = 0
    news_take_s: float = 0.0
    known: Survey | None = None
    survey: Survey | None = None
    schedules: JobSchedules = field(default_factory=JobSchedules)
    reviews: Reviews = field(default_factory=Reviews)
    orders: Orders = field(default_factory=Orders)
    requests: Mapping[str, PlanRequest] = field(default_factory=dict)
    replayed: Mapping[str, Replayed | None] = field(default_factory=dict)
    plan: Plan | None = None
    planning_time_s: float = 0.0
    made_anew: bool = True
    said_too_many: bool = False
    followed: int = 0
    unanswered: bool = False
    slow_since: int | None = None
    dropped: int = 0
    strikes: int = 0
    held: int = 0
    excess: float = 0.0
    found_by_references: bool = False
    recheck_sequence: int = 0
    targets: TargetBook = field(default_factory=lambda: TargetBook(Target.slowdown()))
    goal: Goal = Goal(Target.slowdown())  # noqa: RUF009 - frozen
    goal_plans: GoalPlans = field(default_factory=GoalPlans)
    draws: float = 1.0
    full_w: float | None = None
    gpus_per_node: int = 0
    at_full: bool = False
    given_up_why: str = ""
    fallen: bool = False
    unplannable: Goal | None = None
    said_exceeded: PowerBudget | None = None
    reigns: Reigns = field(default_factory=Reigns)
    now_s: float = 0.0
    stepped_s: float = -math.inf
    step: Goal | None = None

    def copy(self) -> JobState:
        """One that changes by itself."""
        made = self.copy_to_count()
        made.plans, made.reviews, made.targets = self.plans.copy(), self.reviews.copy(), self.targets.copy()
        made.goal_plans = self.goal_plans.copy()
        return made

    def copy_to_count(self) -> JobState:
        """One in which iterations can be counted, and values be set; its books of plans and targets are those of this.

        To copy them for every iteration of a job takes longer than all else that is done with one.
        """
        made = self.copy_to_set()
        made.times, made.answers = self.times.copy(), self.answers.copy()
        made.schedules, made.reigns = self.schedules.copy(), self.reigns.copy()
        return made

    def copy_to_set(self) -> JobState:
        """One in which values can be set; all its books are those of this one."""
        return shallow(self)

    @property
    def aimed(self) -> Goal:
        """What is to be aimed at, with what is known of limits and nodes."""
        goal = self.targets.goal
        prices = goal.wish.prices
        if prices is not None and prices.node != NodeOverhead() and self.gpus_per_node:
            goal = replace(goal, wish=Target.money(replace(prices, gpus_per_node=self.gpus_per_node)))
        if goal.limit is None:
            return goal
        gpus_per_node = self.gpus_per_node or goal.limit.gpus_per_node
        return replace(goal, draws=self.draws, limit=replace(goal.limit, gpus_per_node=gpus_per_node))

    @property
    def expectations(self) -> Expectations:
        """What iterations take and are to take."""
        return Expectations(self.plans, self.times)

    def expected_s(self, schedule: str) -> float | None:
        """How long an iteration of a schedule may take under the plans in force; None: not known."""
        situation, answer = self.answers.situation, self.answers.answer
        if situation is not None and situation.schedule != schedule:
            return None  # whoever is slow makes these iterations longer too, by how much is not known
        pace_s = 0.0 if answer is None or answer.pace is None else answer.pace.pace_s
        return self.expectations.planned_s(schedule, pace_s)
