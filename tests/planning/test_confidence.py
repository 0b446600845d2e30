"""What is said of a plan holds for the profiles that may be the true one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.confidence import with_confidence
from perseus_plugin.planning.plan import Confidence, Plan, plan_from_json, plan_to_json
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.planning.replay import clocks_of
from perseus_plugin.profiling.profile import Measurement, Profile

from .jobs import bundled_profile

BLOCKING_W = 60.0
STAGES = 3
GRAPH = build_graph(one_f_one_b(STAGES, 6))


def planner_of(profile: Profile, blocking_w: float = BLOCKING_W) -> Planner:
    return Planner(GRAPH, profile, blocking_power_w=blocking_w)


def with_errors(profile: Profile, time_se: float, power_se: float) -> Profile:
    return Profile.from_rows(
        (
            stage,
            kind,
            replace(m, time_se_s=time_se * m.time_s, energy_se_j=math.hypot(time_se, power_se) * m.energy_j),
        )
        for stage, kind, m in profile.rows()
    )


def planned(
    profile: Profile, slowdown: float = 0.05, blocking_se_w: float | None = 0.0, *, search: bool = False
) -> Plan:
    """Of any plan it is to be said how well it is known: one whose clocks are only rounded is there at once."""
    planner = planner_of(profile)
    solution = planner.solve(Target.slowdown(slowdown), search=search)
    return with_confidence(planner.to_plan(solution), planner, profile, blocking_se_w)


def known(plan: Plan) -> Confidence:
    assert plan.confidence is not None
    return plan.confidence


def measured(true: Profile, time_se: float, power_se: float, rng: np.random.Generator) -> Profile:
    """The true profile as it is measured: with errors, and knowing how large they are."""

    def row(m: Measurement) -> Measurement:
        factor = math.exp(time_se * rng.standard_normal())
        return replace(
            m, time_s=m.time_s * factor, energy_j=m.energy_j * factor * (1 + power_se * rng.standard_normal())
        )

    return with_errors(Profile.from_rows((s, k, row(m)) for s, k, m in true.rows()), time_se, power_se)


def true_figures(plan: Plan, true: Planner) -> tuple[float, float]:
    """Saving of the plan's clocks on the true profile, and its energy above the bound for any plan of that length."""
    problem = true.problem
    time_s, watts = problem.at_clocks(clocks_of(plan, GRAPH))
    end_s = GRAPH.iteration_time_s(time_s)
    energy_j = float((time_s * watts).sum()) + problem.total_blocking_w * end_s
    bound_j = true.relaxation.solve(max(end_s, problem.shortest_s)).bound_j
    return 1 - energy_j / problem.full_clock_energy_j, energy_j / bound_j - 1


@pytest.mark.parametrize("search", [False, pytest.param(True, marks=pytest.mark.repeated)])
@pytest.mark.parametrize(("time_se", "power_se"), [(0.003, 0.02), (0.01, 0.002)])
def test_intervals_hold_what_is_true(time_se: float, power_se: float, search: bool) -> None:
    true = bundled_profile(STAGES)
    exact = planner_of(true)
    rng = np.random.default_rng(5)
    savings, gaps = [], []
    for _ in range(20):
        plan = planned(measured(true, time_se, power_se, rng), search=search)
        saving, gap = true_figures(plan, exact)
        low, high = known(plan).saving
        savings.append(low <= saving <= high)
        gaps.append(gap <= known(plan).gap_at_most)
    assert np.mean(savings) >= 0.9
    assert np.mean(gaps) >= 0.95


def test_a_profile_without_error_gives_an_interval_without_width() -> None:
    plan = planned(with_errors(bundled_profile(STAGES), 0.0, 0.0))
    assert known(plan).saving == (pytest.approx(plan.saving, abs=1e-9), pytest.approx(plan.saving, abs=1e-9))
    assert plan.gap <= known(plan).gap_at_most < plan.gap + 1e-3


def test_the_worse_the_profile_the_wider_the_interval() -> None:
    widths, gaps = [], []
    for power_se in (0.002, 0.01, 0.05):
        confidence = known(planned(with_errors(bundled_profile(STAGES), 0.001, power_se)))
        low, high = confidence.saving
        widths.append(high - low)
        gaps.append(confidence.gap_at_most)
    assert widths[1] > 2 * widths[0]
    assert widths[2] > 4 * widths[1]
    assert gaps == sorted(gaps)
    assert gaps[2] > 0.01, "at most nothing above the optimum is not said of a profile known to 5 %"


def test_the_error_of_the_blocking_power_counts() -> None:
    profile = with_errors(bundled_profile(STAGES), 0.0, 0.0)
    low, high = known(planned(profile, blocking_se_w=5.0)).saving
    assert high - low > 0.002


@pytest.mark.parametrize("unknown", ["time_se_s", "energy_se_j"])
def test_where_errors_are_unknown_no_interval_is_made_up(unknown: str) -> None:
    known_errors = with_errors(bundled_profile(STAGES), 0.01, 0.01)
    profile = Profile.from_rows((s, k, replace(m, **{unknown: math.nan})) for s, k, m in known_errors.rows())
    plan = planned(profile)
    assert plan.confidence is None
    assert plan.promise.endswith("above the optimum of the profile, whose errors are not known")
    assert planned(known_errors, blocking_se_w=None).confidence is None


def test_the_same_plan_is_known_alike_every_time() -> None:
    profile = with_errors(bundled_profile(STAGES), 0.01, 0.01)
    assert planned(profile).confidence == planned(profile).confidence


@settings(max_examples=25)
@given(st.floats(0, 0.6), st.floats(0, 0.03), st.floats(0, 0.1))
def test_what_is_predicted_lies_within(slowdown: float, time_se: float, power_se: float) -> None:
    plan = planned(with_errors(bundled_profile(STAGES), time_se, power_se), slowdown)
    low, high = known(plan).saving
    assert low <= plan.saving <= high
    assert known(plan).gap_at_most >= plan.gap >= 0


def test_it_is_said_and_survives_the_file() -> None:
    plan = planned(with_errors(bundled_profile(STAGES), 0.01, 0.02))
    assert plan_from_json(plan_to_json(plan)) == plan
    low, high = known(plan).saving
    assert f"(95 %: {100 * low:.1f} to {100 * high:.1f} %), at most {100 * known(plan).gap_at_most:.2f} % above" in (
        plan.promise
    )
    assert '"confidence"' not in plan_to_json(replace(plan, confidence=None))


def test_errors_beyond_all_measure_say_nothing_and_break_nothing() -> None:
    plan = planned(with_errors(bundled_profile(STAGES), 0.0, 3.0), blocking_se_w=300.0)
    assert plan.confidence is None, "no energy is a bound in some of the profiles that may be the true one"
    assert plan_from_json(plan_to_json(plan)) == plan
