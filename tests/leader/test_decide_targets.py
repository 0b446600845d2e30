"""What follows when the job is to aim at something else while it trains; told as lists of observations."""

from __future__ import annotations

import dataclasses
from itertools import combinations, count, pairwise
from typing import Any

import pytest

from perseus_plugin.iteration.timetable import Follow, FullClock
from perseus_plugin.leader import aiming
from perseus_plugin.leader.aiming import power_w
from perseus_plugin.leader.effects import Ask, Order, Record, Say
from perseus_plugin.leader.observed import (
    Answered,
    Drew,
    DrewAtFull,
    Due,
    Placed,
    Runs,
    Situated,
    Targeted,
    Troubled,
    Turned,
    Watched,
)
from perseus_plugin.leader.state import Phase
from perseus_plugin.leader.target_book import EVERYONE, Entry, Goal, Standing, TargetBook
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget
from perseus_plugin.planning.process import answer_to, plan_for
from perseus_plugin.planning.request import PlanAnswer
from perseus_plugin.planning.targets import Target
from tests.factories import stream_of
from tests.leader.test_decide import MEASURED, PATIENCE, PLAN, SLOW, Story, full, graphed, request

SLOWER, FASTER = Target.slowdown(0.2), Target.slowdown(0.05)
SLOWER_PLAN = plan_for(dataclasses.replace(request(), target=SLOWER))


def said(number: int, wish: Target | None, source: str = "cli", until: float | None = None) -> Targeted:
    return Targeted([Entry(number, source, Standing.COMMAND, wish, until=until)], 1000.0)


def states(story: Story) -> dict[int, tuple[str, int | None]]:
    return {number: (one.state, one.iteration) for number, one in story.state.targets.outcomes.items()}


def told(story: Story) -> list[tuple[int, str]]:
    return [(one.facts["number"], one.facts["state"]) for one in story.of(Record) if one.kind == "target"]


def planned() -> Story:
    """The first plan is in force since iteration 22, and iteration 30 runs."""
    return Story().planned().then(Turned(30))


def test_a_target_is_planned_for_quickly_and_in_force_two_iterations_later() -> None:
    story = planned().then(said(1, SLOWER))
    (ask,) = story.of(Ask)
    assert (ask.goal, ask.quick, ask.schedule) == (Goal(SLOWER), True, "A")
    assert states(story) == {1: ("waiting", None)}
    story.then(story.answered(SLOWER_PLAN))
    assert story.orders == [("follow", 2)]
    assert story.of(Order)[0].news.switch == 32
    assert states(story) == {1: ("in force", 32)}
    assert told(story) == [(1, "in force")]
    assert story.state.expectations.graph_s("A") == SLOWER_PLAN.baseline_time_s


@pytest.mark.parametrize(("cuda_graph", "margin"), [(True, 0.04), (False, 0.01)])
def test_a_quick_plan_of_a_graph_has_the_margin_that_was_chosen_for_the_one_before(
    cuda_graph: bool, margin: float
) -> None:
    (ask,) = graphed(cuda_graph).then(Turned(30), said(1, SLOWER)).of(Ask)
    assert (ask.quick, ask.margin) == (True, margin)


def test_back_to_what_was_before_needs_no_planner() -> None:
    story = planned().then(said(1, SLOWER, until=1060.0))
    story.then(story.answered(SLOWER_PLAN)).then(Turned(40), Targeted([], 1060.0))
    assert (story.of(Ask), story.orders) == ([], [("follow", 1)])
    assert states(story) == {1: ("ended", 32)}
    story.then(Turned(50), said(2, SLOWER))
    assert (story.of(Ask), story.orders) == ([], [("follow", 2)])
    assert states(story)[2] == ("in force", 52)


def test_the_newest_wins_and_the_one_before_is_told_so() -> None:
    story = planned().then(said(1, SLOWER))
    first = story.answered(SLOWER_PLAN)
    story.then(said(2, FASTER))
    second = story.answered(SLOWER_PLAN)
    assert states(story) == {1: ("superseded", None), 2: ("waiting", None)}
    story.then(first)
    assert story.orders == [], "the plan of the first is kept, not followed"
    assert [ask.goal for ask in story.of(Ask)] == [Goal(FASTER)]
    story.then(second)
    assert story.orders == [("follow", 2)]
    assert states(story)[2] == ("in force", 32)


def test_the_same_again_is_in_force_since_before() -> None:
    story = planned().then(said(1, SLOWER))
    story.then(story.answered(SLOWER_PLAN)).then(Turned(40), said(2, SLOWER))
    assert story.orders == []
    assert states(story) == {1: ("superseded", 32), 2: ("in force", 32)}


def test_an_order_has_those_before_it_that_have_not_begun() -> None:
    """A rank hears of the newest order only."""
    story = planned().then(said(1, SLOWER))
    story.then(story.answered(SLOWER_PLAN), Turned(31), said(2, Target.full()), said(3, SLOWER))
    third = story.of(Order)[-1].news
    assert [(order.news.switch, order.news.sequence) for order in story.of(Order)] == [(32, 2), (33, 3), (33, 4)]
    assert [(earlier.switch, earlier.version) for earlier in third.earlier] == [(32, 2)], "the second never begins"
    assert states(story) == {1: ("superseded", 32), 2: ("superseded", None), 3: ("in force", 33)}
    story.then(Turned(33), said(4, Target.full()))
    assert story.of(Order)[0].news.earlier == ()


def test_full_clocks_need_no_plan_and_nothing_is_slowed_for_stragglers_or_reviewed() -> None:
    story = planned().then(said(1, Target.full()))
    assert (story.of(Ask), story.orders) == ([], [("full", 0)])
    story.then(*full(3, FullClock("target")), Situated(SLOW, 100.0), Turned(500), Watched(0.5, "too long"), Due())
    assert (story.effects, story.state.unanswered, story.state.phase) == ([], False, Phase.FOLLOWING)
    story.then(Targeted([Entry(2, EVERYONE, Standing.COMMAND)], 1000.0))
    assert story.orders == [("follow", 1)]
    assert states(story)[1] == ("ended", 32)
    story.then(Situated(SLOW, 100.0))
    assert story.of(Ask)[0].situation == SLOW


def test_what_cannot_be_planned_for_is_refused_with_the_reason_and_nothing_changes() -> None:
    story = planned().then(said(1, Target.deadline(0.001)))
    story.then(story.answered(None, "deadline: too short"))
    assert states(story) == {1: ("refused", None)}
    assert story.orders == []
    (warning,) = [say for say in story.of(Say) if say.level == "warning"]
    assert "deadline: too short" in warning.text % warning.values
    assert story.state.goal == Goal(Target.slowdown())
    story.then(Due())
    assert story.effects == [], "not asked again"


def test_what_is_said_before_there_is_a_plan_is_what_the_first_one_is_for() -> None:
    story = Story().then(said(1, SLOWER), *full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    (ask,) = story.of(Ask)
    assert (ask.goal, ask.quick) == (Goal(SLOWER), False)
    story.then(said(2, FASTER))
    story.then(Answered(ask, request(), PlanAnswer(PLAN, 0.1)))
    assert story.orders == [], "it is for another target"
    story.then(Due())
    (ask,) = story.of(Ask)
    assert ask.goal == Goal(FASTER)
    story.then(Answered(ask, request(), PlanAnswer(PLAN, 0.1)))
    assert states(story) == {1: ("superseded", None), 2: ("in force", 22)}


def test_one_that_cannot_be_met_does_not_cost_the_first_plan() -> None:
    story = Story().then(said(1, Target.deadline(0.001)), *full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    story.then(story.answered(None, "too short"))
    assert (states(story), story.state.phase) == ({1: ("refused", None)}, Phase.PLANNING)
    story.then(Due())
    (ask,) = story.of(Ask)
    assert ask.goal == Goal(Target.slowdown())


def test_every_schedule_has_its_plan_before_all_go_over_together() -> None:
    story = planned().then(Runs("B", stream_of(2, 8)), Watched())
    story.then(story.answered(plan_for(request("B", 8))), Turned(40), said(1, SLOWER))
    asked = []
    for _ in range(2):
        (ask,) = story.of(Ask)
        asked.append(ask.schedule)
        assert ("follow", 3) not in story.orders
        plan = SLOWER_PLAN if ask.schedule == "A" else plan_for(request("B", 8))
        story.then(Answered(ask, request(ask.schedule), PlanAnswer(plan, 0.1)))
    assert sorted(asked) == ["A", "B"]
    assert story.orders == [("follow", 3)]


def test_a_plan_that_does_not_hold_under_a_target_is_dropped_and_made_again_for_it() -> None:
    story = planned().then(said(1, SLOWER))
    story.then(story.answered(SLOWER_PLAN))
    expected_s = story.state.expected_s("A")
    assert expected_s is not None
    story.then(*full(PATIENCE, Follow(2), 1.2 * expected_s), Watched())
    assert (story.orders, story.state.phase) == ([("full", 0)], Phase.RECHECKING)
    assert dict(story.state.reigns.iterations) == {}, "none has run under a target that began"
    story.then(said(2, FASTER))
    assert (story.of(Ask), story.state.goal) == ([], Goal(FASTER)), "what is planned for once it is measured again"


def test_giving_up_answers_everyone() -> None:
    story = planned().then(said(1, SLOWER), Troubled(1, "lost"))
    assert states(story) == {1: ("refused", None)}
    story.then(said(2, FASTER))
    assert states(story)[2] == ("refused", None)
    assert story.state.targets.outcomes[2].reason == "the job stays at full clocks: rank 1: lost"
    assert story.orders == []


@pytest.mark.parametrize("wish", [SLOWER, Target.full()])
def test_iterations_are_counted_by_what_was_in_force(wish: Target) -> None:
    story = planned().then(*full(30), said(1, wish))
    if wish is SLOWER:
        story.then(story.answered(SLOWER_PLAN))
    name = {SLOWER: "slowdown 20 %"}.get(wish, "full clocks")
    goals = [one.facts for one in story.of(Record) if one.kind == "goal"]
    assert [(goal["iteration"], goal["says"]) for goal in goals] == [(32, name)]
    assert goals[0]["wish"] == wish.to_dict()
    predicted = (SLOWER_PLAN.iteration_time_s / SLOWER_PLAN.baseline_time_s,) if wish is SLOWER else (None,)
    assert (goals[0].get("time_ratio"),) == pytest.approx(predicted)
    assert story.state.reigns.changes == 1
    story.then(*[one for one in full(40) if one.number >= 30])  # type: ignore[union-attr]
    assert dict(story.state.reigns.iterations) == {"slowdown 0 %": 10, name: 8}


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_ramp_takes_power_down_and_up_in_steps(direction: str) -> None:
    """From full clocks to least energy, or back, at most 40 W a second, a look every 0.3 s; the answers are real."""
    story = Story(ramp_w_per_s=40.0)
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.planned()
    begin, end = Target.full(), Target.cheapest()
    if direction == "up":
        begin, end = end, begin
    number = count(1)
    story.then(said(next(number), begin))
    powers: list[tuple[float, float]] = []
    now_s, iteration = 0.0, 40
    for phase in range(2):
        for _ in range(200):
            now_s, iteration = now_s + 0.3, iteration + 1
            story.then(Turned(iteration, 0.0, now_s), Due())
            while story.of(Ask):
                (ask, *_) = story.of(Ask)
                story.then(Answered(ask, request(), answer_for(ask.goal)))
            watts = power_w(aiming.FULL_CLOCKS if story.state.at_full else story.state.goal, story.state, story.rules)
            assert watts is not None
            if phase and (not powers or watts != powers[-1][1]):
                powers.append((now_s, watts))
        assert story.state.targets.outcomes[1 + phase].state == "in force"
        if phase == 0:
            story.then(said(next(number), end))
    assert len(powers) > 4, "in steps"
    assert all((after_w < before_w) == (direction == "down") for (_, before_w), (_, after_w) in pairwise(powers))
    for (before_s, before_w), (after_s, after_w) in combinations(powers, 2):
        # A step is seen when the next look is over.
        assert abs(after_w - before_w) <= 40.0 * (after_s - before_s + 0.3) + 1e-6


def test_a_ramp_goes_on_however_often_its_target_is_said_again() -> None:
    story = Story(ramp_w_per_s=40.0)
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.planned()
    for number in range(1, 101):
        story.then(Turned(40 + number, 0.0, 0.3 * number), said(number, Target.cheapest()), Due())
        while story.of(Ask):
            (ask, *_) = story.of(Ask)
            story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert story.state.goal == Goal(Target.cheapest())
    assert story.state.targets.outcomes[100].state == "in force"


def test_a_correction_of_what_is_drawn_is_ramped_where_power_was_never_changed() -> None:
    story = Story(ramp_w_per_s=40.0)
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.state.targets = TargetBook(Target.slowdown(), BUDGET)
    story.state.goal = story.state.aimed
    story.then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    story.then(Answered(story.of(Ask)[0], request(), answer_for(story.state.goal)))
    planned_w = power_w(story.state.goal, story.state, story.rules)
    assert planned_w is not None
    story.then(Turned(40), Drew(1.02 * planned_w, 10))
    (ask,) = story.of(Ask)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert story.state.goal.draws == pytest.approx(1.02)


def answer_for(goal: Goal) -> PlanAnswer:
    """As the planner's process makes it, for a job of two pipelines."""
    limit = None if goal.limit is None else goal.limit.placed([0, 0, 1, 1]).tightened(goal.draws)
    return dataclasses.replace(answer_to(dataclasses.replace(request(), target=goal.wish, limit=limit)))


BUDGET = PowerBudget(900.0)


def limited(watts: float = 900.0) -> Story:
    """The first plan in force, then that for a power budget; two pipelines."""
    story = Story()
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.planned().then(Turned(30), Targeted([Entry(1, "site", Standing.COMMAND, None, PowerBudget(watts))], 0.0))
    (ask,) = story.of(Ask)
    return story.then(Answered(ask, request(), answer_for(ask.goal)))


def test_under_a_budget_nothing_runs_at_full_clocks_that_would_draw_more() -> None:
    story = limited()
    assert story.orders == [("follow", 2)]
    assert story.of(Order)[0].news.limited, "no reference either"
    assert story.state.plan is not None
    assert 2 * story.state.plan.power_w <= 900.0
    story.then(Turned(40), Targeted([Entry(2, EVERYONE, Standing.COMMAND)], 0.0))
    assert story.orders == [("follow", 1)]
    assert not story.of(Order)[0].news.limited


def test_a_budget_is_kept_by_what_is_measured() -> None:
    story = limited()
    planned_w = power_w(story.state.goal, story.state, story.rules)
    assert planned_w is not None
    story.then(Drew(1.05 * planned_w, 3), Drew(1.001 * planned_w, 10))
    assert story.effects == [], "too few iterations, and next to nothing"
    story.then(Turned(50), Drew(1.05 * planned_w, 10))
    (ask,) = story.of(Ask)
    assert ask.goal.draws == pytest.approx(1.05)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert story.orders == [("follow", 3)]
    assert states(story)[1] == ("in force", 32), "since before"
    now_w = power_w(story.state.goal, story.state, story.rules)
    assert now_w is not None
    assert 0.9 * 900 < 1.05 * now_w <= 900.0
    story.then(Turned(70), Drew(1.05 * now_w, 10))
    assert story.effects == [], "it is as expected"
    story.then(Turned(90), Drew(0.95 * now_w, 10))
    (ask,) = story.of(Ask)
    assert ask.goal.draws == pytest.approx(0.95), "it could be faster"
    story.then(story.answered(None, "the lowest budget is 2000 W"))
    assert states(story)[1] == ("in force", 32), "what is known of GPUs takes back nobody's word"
    story.then(Due())
    assert story.effects == [], "nor is it asked again"


def test_gpus_that_draw_more_at_full_clocks_than_by_their_profile_are_reckoned_with_from_the_start() -> None:
    story = planned()
    full_w = power_w(aiming.FULL_CLOCKS, story.state, story.rules)
    assert full_w is not None
    story.then(DrewAtFull(1.2 * full_w, 5), DrewAtFull(1.01 * full_w, 10))
    assert story.state.draws == 1, "too few iterations, and next to nothing"
    story.then(DrewAtFull(1.1 * full_w, 10))
    assert (story.state.draws, story.of(Ask)) == (pytest.approx(1.1), []), "there is no budget"
    story.then(Targeted([Entry(1, "site", Standing.COMMAND, None, BUDGET)], 0.0))
    assert story.of(Ask)[0].goal.draws == pytest.approx(1.1)
    story.then(DrewAtFull(1.2 * full_w, 20))
    assert story.state.draws == pytest.approx(1.1), "what is known is known"


def test_a_first_plan_for_a_budget_is_made_again_where_gpus_draw_more_at_full_clocks() -> None:
    story = Story()
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.state.targets = TargetBook(Target.slowdown(), BUDGET)
    story.state.goal = story.state.aimed
    story.then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), DrewAtFull(5000.0, 10), MEASURED)
    story.then(Answered(story.of(Ask)[0], request(), answer_for(story.state.goal)))
    (ask,) = story.of(Ask)
    assert (ask.quick, ask.goal.draws) == (True, pytest.approx(1.25)), "at most"


def of_config(watts: float, **block: Any) -> Story:
    """The first plan is for a power budget of the configuration; two pipelines."""
    story = Story(**block)
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.state.targets = TargetBook(Target.slowdown(), PowerBudget(watts, or_nearest=True))
    story.state.goal = story.state.aimed
    story.then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), MEASURED)
    (ask,) = story.of(Ask)
    return story.then(Answered(ask, request(), answer_for(ask.goal)))


def test_a_configured_budget_below_the_lowest_is_come_near_to_and_a_later_target_works() -> None:
    story = of_config(50.0)
    assert (story.state.phase, story.orders) == (Phase.FOLLOWING, [("follow", 1)])
    (warning,) = [say.text % say.values for say in story.of(Say) if say.level == "warning"]
    assert warning.startswith("the power budget (50 W) cannot be kept: the job draws ")
    lowest_w = power_w(story.state.goal, story.state, story.rules)
    assert lowest_w is not None
    assert f"{lowest_w:.1f} W, and may draw 50.0 W under the plan that comes nearest" in warning
    story.then(Turned(40), Drew(1.1 * lowest_w, 10))
    assert story.effects == [], "there is none that draws less"
    story.then(Turned(50), said(1, Target.slowdown()), said(2, None, "site"))
    story.then(Targeted([Entry(3, "site", Standing.COMMAND, None, BUDGET)], 1000.0))
    (ask,) = story.of(Ask)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert states(story)[3] == ("in force", 52)
    story.then(Turned(60), Targeted([Entry(4, EVERYONE, Standing.COMMAND)], 1000.0))
    assert story.orders == [("follow", 1)], "back to what comes nearest, and nothing is said again"
    assert [say for say in story.of(Say) if say.level == "warning"] == []


def test_a_plan_that_comes_nearest_gives_way_to_the_lowest_clock_for_all() -> None:
    story = of_config(50.0)
    expected_s = story.state.expected_s("A")
    assert expected_s is not None
    story.then(Turned(30), *full(PATIENCE, Follow(1, limited=True), 1.2 * expected_s), Watched())
    assert (story.state.phase, story.state.fallen) == (Phase.FOLLOWING, True)
    assert story.state.plan is not None
    assert {clock for stage in range(2) for clock in story.state.plan.clocks_mhz(stage)} == {810}


def test_a_command_that_gpus_turn_out_to_draw_more_than_is_come_near_to() -> None:
    """A budget that could just be kept by the profile: it is not the lowest plan's fault that GPUs draw more."""
    story = limited()
    lowest_w = 2 * answer_to(dataclasses.replace(request(), limit=PowerBudget(1.0, or_nearest=True))).plan.power_w  # type: ignore[union-attr]
    story.then(Targeted([Entry(2, "site", Standing.COMMAND, None, PowerBudget(1.02 * lowest_w))], 0.0))
    (ask,) = story.of(Ask)
    assert not ask.or_nearest, "a command can be refused"
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert states(story)[2] == ("in force", 32)
    planned_w = power_w(story.state.goal, story.state, story.rules)
    assert planned_w is not None
    story.then(Turned(50), Drew(1.1 * planned_w, 10))
    (ask,) = story.of(Ask)
    assert ask.or_nearest
    nearest = dataclasses.replace(ask.goal, limit=dataclasses.replace(ask.goal.limit, or_nearest=True))  # type: ignore[type-var]
    story.then(Answered(ask, request(), answer_for(nearest)))
    assert [order[0] for order in story.orders] == ["follow"]
    assert states(story)[2] == ("in force", 32)
    assert power_w(story.state.goal, story.state, story.rules) == pytest.approx(lowest_w, rel=0.01)
    (warning,) = [say.text % say.values for say in story.of(Say) if say.level == "warning"]
    assert "(in watts of the profile, of which GPUs draw 110.0%)" in warning


def test_what_nodes_draw_beside_is_shared_by_as_many_gpus_as_ranks_tell() -> None:
    """Four GPUs on one node of 400 W; 200 of them would count if a node had eight."""
    node = NodeOverhead(400.0)
    story = Story()
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.planned().then(Placed(4), Turned(30))
    story.then(Targeted([Entry(1, "site", Standing.COMMAND, None, PowerBudget(1300.0, node=node))], 0.0))
    (ask,) = story.of(Ask)
    assert ask.goal.limit == PowerBudget(1300.0, node=node, gpus_per_node=4)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    (news,) = [order.news for order in story.of(Order)]
    assert news.limited, "full clocks draw more than 900 W"
    planned_w = power_w(story.state.goal, story.state, story.rules)
    assert planned_w is not None
    assert planned_w <= 900.0
    story.then(Turned(50), Drew(1.001 * planned_w, 10))
    assert story.of(Ask) == [], "nothing is to be gained up to 1100 W"
    story.then(Drew(960.0, 10))
    assert story.of(Ask)[0].goal.draws > 1


def test_what_holds_iterations_up_gives_no_watts_away() -> None:
    """GPUs that wait draw less; once nothing holds them up any more they would draw too much."""
    story = limited()
    planned_w = power_w(story.state.goal, story.state, story.rules)
    expected_s = story.state.expected_s("A")
    assert planned_w is not None
    assert expected_s is not None
    story.then(Turned(50), Drew(0.9 * planned_w, 10, 10 * expected_s / 0.9))
    assert story.of(Ask) == []
    story.then(Turned(60), Drew(0.8 * planned_w, 10, 10 * expected_s / 0.9))
    assert story.of(Ask)[0].goal.draws == pytest.approx(0.8 / 0.9), "it would draw less on time, too"


def test_where_a_budget_is_refused_it_is_said_that_its_watts_are_the_profiles() -> None:
    story = limited()
    story.state.draws = 0.95
    story.then(Turned(50), Targeted([Entry(2, "site", Standing.COMMAND, None, PowerBudget(10.0))], 0.0))
    (ask,) = story.of(Ask)
    story.then(Answered(ask, request(), PlanAnswer(None, 0.1, "the lowest draws 20 W")))
    reason = story.state.targets.outcomes[2].reason
    assert reason == "the lowest draws 20 W (in watts of the profile, of which GPUs draw 95.0%)"


def test_where_ranks_sit_is_heard_before_the_first_plan() -> None:
    story = Story()
    story.state.targets = TargetBook(Target.slowdown(), BUDGET)
    story.state.goal = story.state.aimed
    story.then(*full(4), Runs("A", stream_of(2, 4)), Turned(20), Placed(2), MEASURED)
    (ask,) = story.of(Ask)
    assert ask.goal.limit == dataclasses.replace(BUDGET, gpus_per_node=2)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert story.state.goal == story.state.aimed, "nothing is planned again"


def test_a_budget_that_full_clocks_keep_changes_nothing_but_what_is_followed() -> None:
    story = limited(1e5)
    assert story.orders == [("follow", 2)]
    assert not story.of(Order)[0].news.limited


def test_a_plan_that_does_not_hold_under_a_budget_gives_way_to_one_clock_for_all() -> None:
    story = limited()
    expected_s = story.state.expected_s("A")
    assert expected_s is not None
    story.then(*full(PATIENCE, Follow(2, limited=True), 1.2 * expected_s), Watched())
    assert story.orders == [("follow", 3)], "not full clocks"
    assert story.state.phase is Phase.FOLLOWING
    assert story.state.plan is not None
    assert len({clock for stage in range(2) for clock in story.state.plan.clocks_mhz(stage)}) == 1
    assert 2 * story.state.plan.power_w <= 900.0
    (warning,) = [say for say in story.of(Say) if say.level == "warning"]
    assert "one clock for all, as full clocks draw more than the power budget allows" in warning.text
    story.then(*full(PATIENCE, Follow(3, limited=True), 3 * expected_s), Watched())
    assert story.orders == [], "there is nothing to fall back to"
    story.then(Turned(500), Watched())
    (ask,) = story.of(Ask)
    assert (ask.review, ask.goal) == (True, Goal(Target.slowdown(), BUDGET))
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    assert story.orders == [("follow", 4)], "planned again"
    assert not story.state.fallen


def test_without_references_a_plan_is_judged_by_the_sweeps_tolerance() -> None:
    story = Story(watch={"patience": PATIENCE})
    story.rules = dataclasses.replace(story.rules, pipelines=2)
    story.planned().then(Turned(30), Targeted([Entry(1, "site", Standing.COMMAND, None, BUDGET)], 0.0))
    (ask,) = story.of(Ask)
    story.then(Answered(ask, request(), answer_for(ask.goal)))
    expected_s = story.state.expected_s("A")
    assert expected_s is not None
    story.then(*full(PATIENCE, Follow(2, limited=True), 1.02 * expected_s), Watched())
    assert not story.state.fallen
    story.then(*full(PATIENCE, Follow(2, limited=True), 1.04 * expected_s), Watched())
    assert story.state.fallen


def test_when_all_fails_it_is_said_that_the_budget_is_not_kept() -> None:
    story = limited().then(Troubled(1, "lost"))
    assert story.orders == [("full", 0)]
    said = [say.text % say.values for say in story.of(Say) if say.level == "warning"]
    assert any("the power budget (900 W) is not kept, as the job" in text for text in said)


def test_a_dry_run_is_planned_for_and_stays_at_full_clocks() -> None:
    story = Story(enforce=False).planned()
    assert story.orders == [("full", 0)]
    assert story.state.plan is not None
    assert story.state.phase is Phase.FOLLOWING
    assert [one.level for one in story.of(Say) if "a dry run" in one.text] == ["info"]
    assert [one.facts["says"] for one in story.of(Record) if one.kind == "goal"] == ["full clocks"]
    story.then(Turned(30), Due(), Situated(SLOW, 100.0), Watched(0.5, "slower", True), Placed(8))
    assert not story.orders
    assert not story.of(Ask)


def test_a_dry_run_says_of_a_budget_that_is_not_kept_what_would_be() -> None:
    (warning,) = [say.text % say.values for say in of_config(50.0, enforce=False).of(Say) if say.level == "warning"]
    assert "under the plan that comes nearest, which would be followed" in warning
    (warning,) = [say.text % say.values for say in of_config(50.0).of(Say) if say.level == "warning"]
    assert "under the plan that comes nearest, which is followed" in warning


def test_a_dry_run_follows_no_target() -> None:
    story = Story(enforce=False).planned().then(Turned(30), said(1, SLOWER))
    assert states(story)[1][0] == "refused"
    assert not story.orders
    assert not story.of(Ask)
    assert story.state.goal == Goal(Target.slowdown())
