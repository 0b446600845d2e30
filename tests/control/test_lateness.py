from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.control.controller import Controller
from perseus_plugin.exchange.messages import CatchUpPart
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.planner import Target, make_plan
from perseus_plugin.planning.replay import CatchUp, Replay, clocks_of, latest_starts
from perseus_plugin.planning.robust import catch_up_by_stage
from tests.planning.jobs import bundled_profile

OPTIONS = {"forward": ((1400, 0.5, 300.0), (1200, 0.6, 200.0), (1000, 0.8, 150.0), (800, 1.0, 100.0))}
CLOCKS_MHZ = (1000, 1000, 1400)
TIMES_S = (0.8, 0.8, 0.5)
LATEST_S = (0.1, 1.0, 2.0)


class Noted:
    """Notes requests."""

    def __init__(self) -> None:
        self.made: list[tuple[int | None, float]] = []

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        self.made.append((frequency_mhz, apply_at_s))


def part(**changes: Any) -> CatchUpPart:
    fields: dict[str, Any] = {
        "latest_starts_s": LATEST_S,
        "usual_delays_s": (0.0, 0.0, 0.0),
        "kinds": ("forward",) * 3,
        "options": OPTIONS,
        "size_weight": 0.0,
    }
    return CatchUpPart(**{**fields, **changes})


def following(lead_s: float = 0.0, **changes: Any) -> tuple[Controller, Noted]:
    noted = Noted()
    controller = Controller(noted)
    controller.follow(CLOCKS_MHZ, TIMES_S, part(**changes), rise_lead_s=lead_s)
    controller.start(100.0)
    return controller, noted


def test_in_plan_the_plans_clock_is_asked_for() -> None:
    controller, noted = following()
    assert controller.begin(0, 100.1) is None
    assert noted.made == [(1000, 0.0)]


@pytest.mark.parametrize(
    ("late_s", "clock"),
    [(0.01, None), (0.05, 1200), (0.2, 1200), (0.25, 1400), (5.0, 1400)],
)
def test_late_the_slowest_clock_that_catches_up_is_asked_for_at_once(late_s: float, clock: int | None) -> None:
    """Of 0.8 s planned, 0.2 s are made good at 1200 MHz; beyond that it takes full clocks. A little is jitter."""
    controller, noted = following()
    assert controller.begin(0, 100.1 + late_s) == clock
    assert noted.made == [(clock or 1000, 0.0)]


def test_back_in_plan_the_plans_clock_is_asked_for_again() -> None:
    controller, noted = following()
    assert controller.begin(0, 100.3) == 1200
    controller.end(100.9)
    assert controller.begin(1, 100.9) is None
    assert [clock for clock, _ in noted.made][:2] == [1200, 1000]


def test_a_rise_planned_ahead_comes_when_the_faster_instruction_ends() -> None:
    controller, noted = following(lead_s=0.1)
    assert controller.begin(1, 101.15) == 1200
    assert noted.made == [(1200, 0.0), (1400, pytest.approx(101.15 + 0.6 - 0.1))]
    controller, noted = following(lead_s=0.1)
    assert controller.begin(1, 105.0) == 1400
    assert noted.made == [(1400, 0.0)], "it runs at the next one's clock already"
    assert controller.begin(2, 106.0) is None, "there is no faster clock than its own"
    assert noted.made[1:] == [(1400, 0.0), (None, pytest.approx(106.4))]


def test_starts_count_from_each_iterations_begin_and_from_the_usual_delay() -> None:
    controller, _ = following(usual_delays_s=(0.5, 0.5, 0.5))
    assert controller.begin(0, 100.6) is None
    controller.start(200.0)
    assert controller.begin(0, 200.6) is None
    assert controller.begin(0, 200.75) == 1200


def test_a_larger_step_is_not_late() -> None:
    """Twice as long as usual: the second instruction begins 0.6 s after its latest start for a step of usual size."""
    for weight, clock in ((0.0, 1400), (0.1, None)):
        controller, _ = following(size_weight=weight)
        assert controller.begin(0, 100.0) is None
        controller.end(101.6)
        assert controller.begin(1, 101.6) == clock


def test_a_clock_is_held_for_the_dwell() -> None:
    controller, noted = following(dwell_s=2.0)
    assert controller.begin(0, 100.3) == 1200
    controller.end(100.9)
    assert controller.begin(1, 100.9) == 1200, "in plan again, but changed 0.6 s ago"
    controller.end(101.5)
    controller.start(102.4)
    assert controller.begin(0, 102.4) is None
    assert [clock for clock, _ in noted.made] == [1200, 1200, 1400, 1000]


def test_full_clocks_held_or_another_plan_followed_nothing_is_late_any_more() -> None:
    controller, noted = following()
    controller.hold(None)
    assert controller.begin(0, 105.0) is None
    controller.end(106.0)
    controller.follow(CLOCKS_MHZ, TIMES_S)
    controller.start(110.0)
    assert controller.begin(0, 115.0) is None
    assert [clock for clock, _ in noted.made] == [None, 1000]


def test_a_part_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Controller(Noted()).follow(CLOCKS_MHZ, TIMES_S, part(usual_delays_s=(0.0,)))


@given(
    factors=st.lists(st.floats(0.6, 1.7), min_size=12, max_size=12),
    weight=st.sampled_from([0.0, 0.5, 4.0]),
    slack=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None, derandomize=True)  # where two clocks are equally good, rounding may choose
def test_a_rank_does_what_the_replay_says(factors: Sequence[float], weight: float, slack: float) -> None:
    """One stage, so that the graph is a chain; the rank sees real times only."""
    profile = bundled_profile(1)
    graph = build_graph(one_f_one_b(1, 6))
    plan = make_plan(graph, profile, blocking_power_w=80.0, target=Target.slowdown(slack))
    problem = build_problem(graph, profile, 80.0)
    clocks = clocks_of(plan, graph)
    rule = CatchUp(latest_starts(graph, problem.planned_s(clocks), plan.deadline_s), 0.0, weight)
    durations_s = problem.full_clock_s * np.array(factors)[: len(graph)]
    outcome = Replay(problem, durations_s[None, None]).under(clocks, rule)

    told = catch_up_by_stage(problem, rule, np.zeros(len(graph)))[0]
    planned_s = problem.planned_s(clocks)
    time_s = {(kind, m.frequency_mhz): m.time_s for (_, kind), rows in profile.table.items() for m in rows}
    controller = Controller(Noted())
    controller.follow(clocks.tolist(), planned_s.tolist(), CatchUpPart(**asdict(told)))
    controller.start(50.0)
    now_s, raised = 50.0, 0
    for position, kind in enumerate(told.kinds):
        faster = controller.begin(position, now_s)
        raised += faster is not None
        now_s += durations_s[position] * time_s[kind, faster or int(clocks[position])] / time_s[kind, 1400]
        controller.end(now_s)
    assert now_s - 50.0 == pytest.approx(outcome.time_s[0])
    assert raised == pytest.approx(outcome.raised * len(graph))
