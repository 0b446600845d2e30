"""What a job aimed at and when, read from its events."""

from __future__ import annotations

import math
from typing import Any

from perseus_plugin.reporting.report.reigns import Reign, reigns


def goal(iteration: Any, says: Any = "slowdown 0 %", **more: Any) -> dict[str, Any]:
    return {"time": 1.0, "event": "goal", "iteration": iteration, "says": says, **more}


def test_budgets_are_those_of_the_gpus() -> None:
    limit = {"job_w": 1400.0, "node": {"watts": 200.0, "share": 0.5}, "gpus_per_node": 8, "groups": []}
    found = reigns([goal(3, limit=limit), goal(9, limit={**limit, "node": {}}), goal(12, limit={"job_w": None})], 8)
    assert [reign.budget_w for reign in found[:2]] == [800.0, 1400.0]
    assert math.isnan(found[2].budget_w)


def test_power_is_predicted_where_time_and_energy_are() -> None:
    events = [goal(3, time_ratio=1.25, energy_ratio=0.75), goal(5, time_ratio=1.25)]
    found = reigns(events, 8)
    assert found[0].power_ratio == 0.6
    assert math.isnan(found[1].power_ratio)


def test_of_what_never_began_nothing_is_left() -> None:
    events = [goal(3), goal(7, "a"), goal(7, "b"), {"time": 1.0, "event": "switch", "iteration": 8}, goal(6, "c")]
    assert [(reign.first, reign.says) for reign in reigns(events, 1)] == [(3, "slowdown 0 %"), (6, "c")]


def test_what_is_no_goal_is_left_out() -> None:
    events = [goal(-1), goal("x"), goal(1, 5), goal(2, limit={"job_w": -3}), goal(4, time_ratio=0), goal(5)]
    assert reigns(events, 1)[0] == Reign(5, "slowdown 0 %", *[reigns(events, 1)[0].budget_w] * 2)
