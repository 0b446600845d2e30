"""What follows from lists of observations, without a store, a planner, a file or a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import Recheck
from perseus_plugin.iteration.timetable import Follow, FullClock, Sweep
from perseus_plugin.leader.decide import decide, with_ended
from perseus_plugin.leader.effects import (
    Ask,
    Effect,
    ForgetIterations,
    Order,
    PublishSet,
    Record,
    RefuseReports,
    SaveFailure,
    SaveProfile,
    Say,
    Show,
    ShowPlan,
    WithdrawSet,
)
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.measuring import SweepInForce
from perseus_plugin.leader.observed import (
    Answered,
    Checked,
    Due,
    Ended,
    Measured,
    NotMeasured,
    Observed,
    Rechecked,
    Runs,
    Situated,
    Targeted,
    Troubled,
    Turned,
    Watched,
)
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.leader.reviews import SOON, clocks_of
from perseus_plugin.leader.state import JobState, Phase, Rules
from perseus_plugin.leader.target_book import Entry, Standing
from perseus_plugin.planning.paced import Pace, PacedPlan
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.stragglers.situation import Answers, Situation
from tests.factories import BLOCKING_W, CLOCKS_MHZ, profile, rank_estimate, stream_of

TOP_MHZ = CLOCKS_MHZ[0]
FULL_S, PATIENCE = 0.5, 3
MEASURED = Measured([rank_estimate(0), rank_estimate(1)])
SLOW = Situation("A", ((1, (1.0, 1.25)),), (), 0.0, True, 2)


def rules(**block: Any) -> Rules:
    block.setdefault("watch", {"patience": PATIENCE, "tolerance": 0.05, "max_replans": 1, "reference_share": 0})
    block.setdefault("stragglers", {"detect": False})
    return Rules(parse_config(block), stages=2, steps_per_block=3, top_mhz=TOP_MHZ, full_sweep_mhz=CLOCKS_MHZ)


def fresh(known: Survey | None = None) -> JobState:
    answers = Answers(stages=2, replicas=2, min_interval_s=10.0)
    sweep = SweepInForce(CLOCKS_MHZ, 20)
    return JobState(IterationTimes(PATIENCE), PlanShelf(2), answers, sweep, margin=0.01, known=known)


def request(schedule: str = "A", microbatches: int = 4) -> PlanRequest:
    streams = [stream_of(2, microbatches)(stage) for stage in range(2)]
    return PlanRequest(schedule, streams, {}, profile(2), [BLOCKING_W] * 2)


PLAN = plan_for(request())


class Story:
    """A job told as a list of observations."""

    def __init__(self, known: Survey | None = None, **block: Any) -> None:
        self.state, self.rules = fresh(known), rules(**block)
        self.effects: list[Effect] = []

    def then(self, *seen: Observed) -> Story:
        """These are observed; `effects` are what is asked for in all."""
        self.effects = []
        for one in seen:
            self.state, effects = decide(self.state, one, self.rules)
            self.effects += effects
        return self

    def of(self, kind: type) -> list[Any]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    @property
    def orders(self) -> list[tuple[str, int]]:
        return [(order.news.action, order.news.version) for order in self.of(Order)]

    def answered(self, plan: Plan | None = PLAN, error: str = "", now_s: float = 0.0) -> Answered:
        """The planner's answer to what was asked last."""
        (ask,) = self.of(Ask)
        return Answered(ask, request(ask.schedule), PlanAnswer(plan, 0.1, error), now_s)

    def planned(self) -> Story:
        """Up to the plan of schedule A in force."""
        self.then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
        return self.then(self.answered())


def full(count: int, directive: Any = None, time_s: float = FULL_S, schedule: str = "A") -> Sequence[Observed]:
    directive = directive or Sweep(0, TOP_MHZ, kept=True)
    return [Ended(number, directive, schedule, time_s) for number in range(count)]


def test_from_a_sweep_to_a_plan() -> None:
    story = Story().then(Runs("A", stream_of(2, 4)), *full(4), Turned(20), MEASURED)
    assert [type(effect) for effect in story.effects] == [SaveProfile, Ask]
    assert story.state.phase is Phase.PLANNING
    story.then(story.answered())
    assert [type(e) for e in story.effects if not isinstance(e, Say)] == [ShowPlan, PublishSet, Order, Record, Record]
    (order,) = story.of(Order)
    plan, goal = story.of(Record)
    assert (plan.kind, goal.kind) == ("plan", "goal")
    told_of = plan.facts["iteration"], plan.facts["saving"], plan.facts["gap"], plan.facts["refined"]
    assert told_of == (22, PLAN.saving, PLAN.gap, False)
    assert (order.news.action, order.news.version, order.news.sequence) == ("follow", 1, 1)
    assert order.news.switch == 22, "two iterations of half a second are time enough for all to hear of it"
    assert story.state.phase is Phase.FOLLOWING


def test_of_a_step_that_is_one_graph_no_instruction_is_held_against_a_given_profile() -> None:
    """None is seen; an iteration at full clocks has to be, for the plan to be watched."""
    known = Story().planned().state.survey
    unseen = Checked([Recheck(stage=stage, time_s={}) for stage in range(2)])
    story = Story(known, cuda_graph=True).then(Runs("A", stream_of(2, 4)), *full(4), Turned(20), unseen)
    assert story.of(Ask)
    story = Story(known).then(Runs("A", stream_of(2, 4)), *full(4), Turned(20), unseen)
    assert not story.of(Ask)
    story = Story(known, cuda_graph=True).then(Runs("A", stream_of(2, 4)), Turned(20), unseen)
    assert not story.of(Ask)


def test_before_all_ranks_have_told_nothing_is_done_but_time_passes() -> None:
    story = Story().then(Runs("A", stream_of(2, 4)), Turned(20), Due(), Turned(21), Due())
    assert story.effects == []
    assert story.state.phase is Phase.MEASURING


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (NotMeasured("1 of 2 ranks sent no measurements"), "1 of 2 ranks sent no measurements"),
        (Troubled(1, "no permission"), "rank 1: no permission"),
        (Measured([rank_estimate(0)]), "the profile cannot be used"),
    ],
)
def test_giving_up_is_said_and_ordered_once_and_for_good(seen: Observed, why: str) -> None:
    story = Story().then(Turned(20), seen)
    assert story.state.phase is Phase.GIVEN_UP
    assert story.orders == [("full", 0)]
    (said,) = story.of(Say)
    assert why in said.text % said.values
    (refusal,) = story.of(RefuseReports)
    assert why in refusal.reason
    assert bool(story.of(SaveFailure)) == isinstance(seen, Measured), "what another sweep would meet again"
    before = told(story.state)
    story.then(Turned(30), seen, MEASURED, Situated(SLOW, 0.0), Watched(0.5, "slow"), Due())
    assert story.effects == []
    assert told(story.state) == before


def test_a_kept_profile_that_does_not_fit_is_measured_anew() -> None:
    known = Survey(profile(2), BLOCKING_W)
    off = [Recheck(stage=stage, time_s={"forward": 1.0, "backward": 2.0}) for stage in range(2)]
    story = Story(known).then(Runs("A", stream_of(2, 4)), Turned(20), Checked(off))
    assert story.orders == [("sweep", 0)]
    assert (story.state.known, story.state.phase) == (None, Phase.MEASURING)
    assert story.state.sweep.round == 1
    assert story.state.sweep.end == story.of(Order)[0].news.switch + 3 * len(CLOCKS_MHZ)
    story.then(MEASURED)
    assert [type(effect) for effect in story.effects] == [SaveProfile, Ask]


def test_a_plan_that_does_not_hold_is_dropped_rechecked_and_made_again() -> None:
    story = Story().planned()
    expected_s = story.state.expected_s("A")
    assert expected_s is not None
    story.then(*full(PATIENCE, Follow(1), 1.2 * expected_s), Watched())
    assert story.orders == [("full", 0)]
    assert (story.state.phase, story.state.dropped) == (Phase.RECHECKING, 1)
    unchanged = [
        Recheck(stage=s, time_s={k: profile().table[s, k][0].time_s for k in ("forward", "backward")}) for s in range(2)
    ]
    story.then(Rechecked(unchanged, complete=True))
    assert story.state.phase is Phase.RECHECKING, "rank 0 has not seen enough iterations"
    story.then(*full(PATIENCE, FullClock("dropped")), Rechecked(unchanged, complete=True))
    assert story.state.phase is Phase.PLANNING
    assert ForgetIterations() in story.effects
    assert story.state.margin == pytest.approx(0.21), "the plan itself was too slow"
    story.then(story.answered())
    assert story.orders == [("follow", 2)]
    story.then(*full(PATIENCE, Follow(2), 2 * expected_s), Watched())
    assert story.state.phase is Phase.GIVEN_UP, "one is enough here (max_replans)"


def graphed(cuda_graph: bool) -> Story:
    """A job under a plan with a margin of 4 %, that was chosen where 1 % is the least."""
    story = Story(cuda_graph=cuda_graph).then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    (ask,) = story.of(Ask)
    asked = replace(request(), margin=ask.margin, jitter=(0.02, 0.02) if cuda_graph else None)
    made = replace(asked.how(), margin=0.04)
    return story.then(Answered(ask, asked, PlanAnswer(PLAN, 0.1, made=made), 0.0))


@pytest.mark.parametrize(("cuda_graph", "margin"), [(True, 0.04), (False, 0.01)])
def test_after_a_plan_of_a_graph_the_next_one_has_more_margin_than_was_chosen_for_that(
    cuda_graph: bool, margin: float
) -> None:
    story = graphed(cuda_graph)
    story.then(Watched(None), Watched(0.3, "iterations take 30 % longer"), *full(PATIENCE, FullClock("dropped")))
    story.then(Rechecked([], complete=True))
    (ask,) = story.of(Ask)
    assert ask.margin == pytest.approx(margin + 0.3)


def test_what_references_have_shown_drops_a_plan_beyond_doubt() -> None:
    story = Story().planned().then(Watched(None), Watched(0.3, "iterations take 30 % longer"))
    assert story.orders == [("full", 0)]
    assert story.state.found_by_references


MANY = 40  # microbatches: more instructions than are searched as a whole at once


def refinable(gap: float = 0.02) -> Story:
    """A job whose plan is so far above its bound, twelve iterations on."""
    plan = plan_for(request("A", MANY))
    story = Story().then(*full(4), Runs("A", stream_of(2, MANY)), Turned(20), MEASURED)
    story.then(story.answered(replace(plan, energy_lower_bound_j=plan.energy_j / (1 + gap))))
    return story.then(Turned(20 + SOON))


REFINES = Watched(planner_idle=False, refiner_idle=True)


def lowest(plan: Plan) -> Plan:
    """Another one."""
    stages = tuple(tuple(replace(one, frequency_mhz=CLOCKS_MHZ[-1]) for one in stage) for stage in plan.stages)
    return replace(plan, stages=stages)


def test_a_plan_is_refined_once_while_the_planner_is_asked_for_other_things() -> None:
    story = refinable()
    assert not Story().planned().then(Turned(20 + SOON), REFINES).of(Ask), "so small a job was searched as a whole"
    assert not refinable(gap=0.0005).then(REFINES).of(Ask), "it would gain too little"
    assert not story.then(Watched(planner_idle=True)).of(Ask), "nobody refines here"
    (ask,) = story.then(REFINES).of(Ask)
    assert (ask.refine, ask.review, ask.in_force is not None) == (True, True, True)
    answered = story.answered(lowest(story.state.plans.of("A")))
    assert not story.then(REFINES).of(Ask)
    story.then(answered)
    assert story.orders == [("follow", 2)]
    (plan,) = story.of(Record)
    assert (plan.facts["refined"], plan.facts["iteration"]) == (True, story.of(Order)[0].news.switch)
    assert not story.then(Turned(900), REFINES).of(Ask), "what is followed has been refined"


def test_what_was_refined_stays_where_nothing_better_was_found_or_another_plan_has_come() -> None:
    story = refinable().then(REFINES)
    nothing = story.answered(None)
    story.then(nothing)
    assert story.orders == []
    assert not story.then(Turned(900), REFINES).of(Ask)
    story = refinable().then(REFINES)
    late = story.answered(lowest(story.state.plans.of("A")))
    other = replace(late.asked, refine=False, in_force=None)
    plan = plan_for(replace(request("A", MANY), target=Target.slowdown(0.3)))
    plan = replace(plan, energy_lower_bound_j=0.98 * plan.energy_j)
    story.then(replace(late, asked=other, answer=PlanAnswer(plan, 0.1)))
    assert story.orders == [("follow", 2)]
    story.then(late)
    assert story.orders == []
    (ask,) = story.then(Turned(900), REFINES).of(Ask)
    assert ask.in_force.clocks_mhz == clocks_of(plan), "the other one has not been refined"


def test_a_straggler_is_answered_first_and_a_plan_is_refined_once_it_is_gone() -> None:
    story = refinable().then(REFINES)
    refined = story.answered(lowest(story.state.plans.of("A")))
    story.then(Situated(SLOW, 100.0))
    story.then(story.answered(None, "no plan is better", 100.0))
    story.then(refined)
    assert story.orders == []
    assert not story.then(Turned(900), REFINES).of(Ask)
    assert story.then(Situated(None, 200.0), Situated(None, 201.0), REFINES).of(Ask)


def at_a_pace(gap: float = 0.02) -> Story:
    """A job of which replica 1 is slow, for twelve iterations."""
    story = refinable().then(Situated(SLOW, 100.0))
    story.then(replace(story.answered(None, now_s=100.0), answer=paced(100.0, gap=gap)))
    return story.then(Situated(SLOW, 101.0), Turned(story.state.iteration + SOON))


def paced(energy_j: float, pace_s: float = 0.5, gap: float = 0.0) -> PlanAnswer:
    """Those that are not slow get a plan for the pace, which takes so much; the slow one keeps the job's."""
    plan = lowest(plan_for(request("A", MANY)))
    plan = replace(plan, energy_lower_bound_j=plan.energy_j / (1 + gap))
    variants = PacedPlan(plan, energy_j, 120.0), PacedPlan(None, 100.0, 100.0)
    return PlanAnswer(None, 2.0, pace=Pace(pace_s, 0.6, variants))


def test_plans_for_a_pace_are_refined_once_and_found_again() -> None:
    story = refinable().then(Situated(SLOW, 100.0))
    story.then(replace(story.answered(None), answer=paced(100.0, gap=0.02)), Situated(SLOW, 101.0), REFINES)
    assert not story.of(Ask), "whoever is slow may be back soon"
    assert not at_a_pace(gap=0.0005).then(REFINES).of(Ask), "it would gain too little"
    story = at_a_pace()
    (ask,) = story.then(REFINES).of(Ask)
    assert (ask.refine, ask.situation, ask.review) == (True, SLOW, False)
    assert ask.pace.at_least_s == 0.5, "for the pace in force"
    better = replace(story.answered(None), answer=paced(99.0))
    assert not story.then(REFINES).of(Ask)
    version = story.state.orders.latest.version
    story.then(better)
    ((action, refined),) = story.orders
    assert action == "follow"
    assert refined > version
    assert [record.kind for record in story.of(Record)] == ["refined"]
    story.then(Ended(60, Follow(refined, straggler=True), "A", FULL_S))
    assert story.state.answers.figures.energy_saved_j == pytest.approx(120.0 - 99.0)
    assert not story.then(Turned(900), REFINES).of(Ask)
    story.then(Situated(None, 200.0))
    story.then(Situated(SLOW, 300.0))
    assert (story.orders, story.of(Ask)) == ([("follow", refined)], []), "the better answer is known"


@pytest.mark.parametrize(
    "found",
    [paced(99.95), paced(99.0, pace_s=0.51), paced(99.0, pace_s=0.49), PlanAnswer(None, 0.1, "lost", lost=True)],
    ids=["too little", "a longer pace", "a shorter pace", "nothing"],
)
def test_plans_for_a_pace_stay_where_nothing_better_was_found_for_it(found: PlanAnswer) -> None:
    story = at_a_pace().then(REFINES)
    story.then(replace(story.answered(None), answer=found))
    assert story.effects == []
    assert not story.then(Turned(900), REFINES).of(Ask), "it would come to the same"


OTHER = Situation("A", ((1, (1.0, 1.5)),), (), 0.0, True, 2)


@pytest.mark.parametrize("becomes", [None, OTHER], ids=["nobody is slow any more", "it has become slower"])
def test_what_was_refined_for_another_pace_replaces_no_plan(becomes: Situation | None) -> None:
    story = at_a_pace().then(REFINES)
    late = replace(story.answered(None), answer=paced(90.0))
    story.then(Situated(becomes, 200.0))
    for ask in story.of(Ask):
        assert story.then(late).effects == [], "who is slow has changed, and nothing answers that yet"
        story.then(Answered(ask, request("A", MANY), paced(110.0, pace_s=0.7), 200.0))
    before = story.state.orders.sequence
    story.then(late)
    assert (story.effects, story.state.orders.sequence) == ([], before)
    story.then(Situated(SLOW, 300.0), Situated(SLOW, 301.0), Turned(900), REFINES)
    (ask,) = story.of(Ask)
    assert (ask.refine, ask.situation) == (True, SLOW), "it is tried again"


def test_what_was_refined_for_a_pace_replaces_no_plan_made_anew_for_it() -> None:
    story = at_a_pace().then(REFINES)
    late = replace(story.answered(None), answer=paced(90.0))
    story.then(Targeted([Entry(1, "cli", Standing.COMMAND, Target.full())], 100.0))
    assert story.orders == [("full", 0)]
    story.then(late)
    assert story.effects == [], "no plan is followed"
    story.then(Targeted([Entry(2, "", Standing.COMMAND)], 200.0), Situated(None, 300.0))
    story.state.answers.forget()
    story.then(Situated(SLOW, 400.0))
    story.then(replace(story.answered(None, now_s=400.0), answer=paced(100.0, gap=0.02)))
    before = story.state.orders.sequence
    story.then(late)
    assert (story.effects, story.state.orders.sequence) == ([], before)


def test_a_straggler_is_planned_for_and_left_when_it_is_back() -> None:
    story = Story().planned().then(Situated(SLOW, 100.0))
    (ask,) = story.of(Ask)
    assert (ask.situation, ask.pace is not None) == (SLOW, True)
    assert story.state.unanswered
    story.then(Watched(0.3, "not asked while it is unanswered"))
    assert story.effects == []
    story.then(Situated(SLOW, 100.0))
    story.then(story.answered(None, "no plan is better", 100.0))
    assert [record.kind for record in story.of(Record)] == ["replan", "switch"]
    assert story.orders == [("follow", 1)]
    assert story.of(Show), "the monitor hears of it"
    story.then(Situated(SLOW, 101.0))
    assert (story.effects, story.state.unanswered) == ([], False)
    story.then(Situated(None, 105.0))
    assert story.effects == [], "not within min_interval_s of the last answer"
    story.then(Situated(None, 111.0))
    assert story.orders == [("follow", 1)]
    story.then(Situated(SLOW, 130.0))
    assert not story.of(Ask), "the answer is known"
    assert story.orders == [("follow", 1)]


@pytest.mark.parametrize(("replica", "followed"), [(0, 2), (1, 1)])
def test_iterations_count_where_they_follow_the_plan_of_the_deciding_ranks_replica(replica: int, followed: int) -> None:
    story = Story()
    story.rules = dataclasses.replace(story.rules, replica=replica)
    story.planned().then(Situated(SLOW, 100.0))
    (ask,) = story.of(Ask)
    # Those that are not slow have a plan for the pace; the slow one keeps the job's.
    pace = Pace(0.5, 0.6, (PacedPlan(PLAN, 90.0, 100.0), PacedPlan(None, 100.0, 100.0)))
    story.then(Answered(ask, request(), PlanAnswer(None, 0.1, pace=pace), 100.0))
    assert (story.orders, story.state.followed) == ([("follow", 2)], followed)
    for number, version in enumerate((1, 2, followed)):
        story.then(Ended(30 + number, Follow(version, straggler=True), "A", FULL_S))
    assert story.state.answers.figures.iterations == 2


def test_each_schedule_has_its_plan_and_sets_that_nobody_follows_are_withdrawn() -> None:
    story = Story().planned().then(Runs("B", stream_of(2, 8)), Ended(30, Follow(1), "B", FULL_S), Turned(31), Watched())
    story.then(story.answered(plan_for(request("B", 8))))
    assert story.orders == [("follow", 2)]
    assert [parts.version for made in story.of(PublishSet) for parts in made.parts] == [2, 2]
    story.then(Runs("C", stream_of(2, 6)), Watched())
    story.then(story.answered(plan_for(request("C", 6))))
    assert [gone.version for gone in story.of(WithdrawSet)] == [2], "which never begins; the first is followed until 33"
    story.then(Turned(33), Runs("D", stream_of(2, 10)), Watched()).then(story.answered(plan_for(request("D", 10))))
    assert [gone.version for gone in story.of(WithdrawSet)] == [1]


def test_an_answer_to_what_does_not_hold_any_more_is_not_taken() -> None:
    story = Story().planned().then(Runs("B", stream_of(2, 8)), Watched())
    late = story.answered(plan_for(request("B", 8)))
    story.then(Troubled(0, "lost"), late)
    assert story.orders == [("full", 0)]
    assert "B" not in story.state.plans


OBSERVATIONS: list[Observed] = [
    Runs("A", stream_of(2, 4)),
    Runs("B", stream_of(2, 8)),
    Turned(20),
    Turned(40),
    Due(),
    MEASURED,
    NotMeasured("missing"),
    Troubled(1, "lost"),
    Situated(SLOW, 100.0),
    Situated(None, 200.0),
    Watched(),
    Watched(0.3, "slow"),
    Rechecked([], complete=False),
    Targeted([Entry(1, "cli", Standing.COMMAND, Target.slowdown(0.1))], 100.0),
    Targeted([Entry(2, "cli", Standing.COMMAND, Target.full())], 200.0),
    Targeted([Entry(3, "", Standing.COMMAND)], 300.0),
    *full(1),
    *full(1, Follow(1)),
    *full(1, FullClock("dropped")),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(OBSERVATIONS) + 1)), max_size=25))
def test_deciding_changes_no_state_but_makes_a_new_one_and_alike(numbers: list[int]) -> None:
    """Whatever comes in whatever order; the last number answers what was asked last."""
    state, the_rules = fresh(), rules()
    asked: Ask | None = None
    for number in numbers:
        if number < len(OBSERVATIONS):
            seen = OBSERVATIONS[number]
        elif asked is None:
            continue
        else:
            plan = dataclasses.replace(PLAN, schedule=asked.schedule)
            seen = Answered(asked, request(asked.schedule), PlanAnswer(plan, 0.1))
        before = told(state)
        first, effects = decide(state, seen, the_rules)
        again, others = decide(state, seen, the_rules)
        assert told(state) == before, "the state that was decided on stays as it was"
        assert told(first) == told(again)
        assert [type(effect) for effect in effects] == [type(effect) for effect in others]
        orders = [effect.news.sequence for effect in effects if isinstance(effect, Order)]
        assert orders == list(range(state.orders.sequence + 1, first.orders.sequence + 1)), "each is told, once"
        if state.phase is Phase.GIVEN_UP:
            assert first.phase is Phase.GIVEN_UP
            assert effects == () or (isinstance(seen, Targeted) and not orders), "a target is refused"
        asked = next((effect for effect in effects if isinstance(effect, Ask)), asked)
        state = first


def told(state: JobState) -> dict[str, Any]:
    """What a state holds, to be compared."""
    inside = ("times", "plans", "answers", "schedules", "reviews", "targets", "goal_plans", "reigns")
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {
        name: {key: repr(one) for key, one in vars(value).items()} if name in inside else repr(value)
        for name, value in values.items()
    }


@pytest.mark.parametrize("lost", [True, False])
def test_limits_are_blamed_only_where_they_may_be_to_blame(lost: bool) -> None:
    story = Story().then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    (ask,) = story.of(Ask)
    answer = PlanAnswer(None, 0.1, "the reason", lost=lost)
    story.then(Answered(ask, request(), answer, 0.0))
    assert story.state.phase is Phase.GIVEN_UP
    said = " ".join(say.text % say.values for say in story.of(Say))
    assert "the reason" in said
    assert ("limits" in said) != lost


def test_iterations_entered_together_are_known_as_one_after_the_other() -> None:
    story = Story().planned()
    ended = [Ended(30 + number, Follow(1), "A", FULL_S * (1 + number / 100)) for number in range(PATIENCE + 2)]
    before = told(story.state)
    together = with_ended(story.state, ended, story.rules)
    assert told(story.state) == before
    assert told(together) == told(story.then(*ended).state)
    assert together.held == len(ended)
