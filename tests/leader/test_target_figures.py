"""What monitors are told of targets."""

from __future__ import annotations

import math

import pytest

from perseus_plugin.leader.observed import Troubled, Turned
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.leader.target_figures import WISHES, target_figures
from perseus_plugin.planning.power.budget import NodeOverhead, Peaks, PowerBudget
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.power import Drawn
from tests.leader.test_decide import Story
from tests.leader.test_decide_targets import SLOWER, SLOWER_PLAN, planned, said

PEAKS = Peaks(gpu_w=300.0)
DRAWN = Drawn(700.0, 5.0, 10)


def figures(story: Story, drawn: Drawn | None = DRAWN) -> dict[str, float]:
    told = target_figures(story.state, drawn, 8)
    assert len(told) == len(dict(told))
    return {name.removeprefix("Perseus/"): value for name, value in told}


def wishes(told: dict[str, float]) -> list[str]:
    return [kind for kind in WISHES if told[f"target_in_force/{kind}"] == 1.0]


def test_before_the_first_plan_nothing_is_in_force() -> None:
    told = figures(Story(), None)
    assert (wishes(told), told["target/under_way"], told["target/changes"]) == ([], 1.0, 0.0)
    assert math.isnan(told["power_w/recent"])
    assert math.isnan(told["target/allowed_slowdown_percent"])


def test_a_target_is_under_way_until_its_plan_is_followed() -> None:
    story = planned()
    before = figures(story)
    assert (wishes(before), before["target/under_way"], before["power_w/recent"]) == (["slowdown"], 0.0, 700.0)
    story.then(said(1, SLOWER))
    assert figures(story)["target/under_way"] == 1.0
    story.then(story.answered(SLOWER_PLAN))
    told = figures(story)
    assert (told["target/under_way"], told["target/changes"]) == (0.0, 1.0)
    assert told["target/allowed_slowdown_percent"] == pytest.approx(20.0, abs=0.1)
    story.then(Turned(40), said(2, Target.full()))
    told = figures(story)
    assert (wishes(told), told["target/allowed_slowdown_percent"], told["target/changes"]) == (["full"], 0.0, 2.0)


def test_a_budget_is_that_of_the_gpus_and_leaves_headroom() -> None:
    story = planned()
    limit = PowerBudget(1400.0, node=NodeOverhead(200.0, 0.5), gpus_per_node=8)
    assert math.isnan(figures(story)["power_headroom_w"])
    story.state.goal = Goal(Target.slowdown(), limit)
    told = figures(story)
    assert (told["power_budget_w/in_force"], told["power_headroom_w"]) == (800.0, 100.0)
    assert math.isnan(told["power_budget_w/aimed_at"])
    story.state.goal = Goal(Target.slowdown(), PowerBudget(groups=(), peaks=PEAKS))
    assert math.isnan(figures(story)["power_budget_w/in_force"]), "none of the whole job"


def test_a_job_that_gave_up_follows_nothing() -> None:
    story = planned().then(Troubled(1, "lost"))
    told = figures(story)
    assert (wishes(told), told["target/under_way"]) == ([], 1.0)
