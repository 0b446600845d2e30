"""Scenarios: the planner's own figures for every combination."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from perseus_plugin.cli.simulation.scenarios import Aim, Graph, Outcome, Pipeline, Workload, simulate
from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.planning.planner import make_plan
from perseus_plugin.planning.targets import ChangeLimits, Target
from perseus_plugin.profiling.profile import Profile, load_profile
from tests import factories

PUBLISHED = Path(os.environ.get("PERSEUS_PUBLISHED_PROFILES", "published-profiles"))


def named(name: str, *microbatches: int) -> Workload:
    return Workload(name, lambda stages, count: SCHEDULES[name](stages, count or 0), microbatches)


def pipeline(stages: int = 4, chunks: int = 1) -> Pipeline:
    return Pipeline(lambda kinds: factories.profile(stages), factories.BLOCKING_W, stages, chunks=chunks)


def only(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def test_every_combination_is_planned_in_order() -> None:
    aims = [Aim(slowdown=0.0), Aim(slowdown=0.1), Aim(straggler=1.2)]
    schedules = [named("1f1b", 3, 5), named("gpipe", 3)]
    outcomes = list(simulate([pipeline(2), pipeline(4)], schedules, aims))
    assert [(o.stages, o.schedule, o.microbatches, o.aim) for o in outcomes] == [
        (stages, schedule, count, aim)
        for stages in (2, 4)
        for schedule, count in (("1f1b", 3), ("1f1b", 5), ("gpipe", 3))
        for aim in aims
    ]
    assert all(o.figures is not None and not o.error for o in outcomes)


@pytest.mark.parametrize(("limits", "stages"), [(ChangeLimits(), 4), (ChangeLimits(max_changes=2), 2)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_figures_are_the_planners(name: str, limits: ChangeLimits, stages: int) -> None:
    aims = [Aim(slowdown=0.05), Aim(straggler=1.3)]
    outcomes = list(simulate([pipeline(stages)], [named(name, 3)], aims, latency_s=0.001, limits=limits))
    graph = build_graph(SCHEDULES[name](stages, 3), latency_s=0.001)
    for outcome in outcomes:
        assert outcome.figures is not None
        full_s = outcome.figures.full_clock_s
        target = Target.straggler(1.3 * full_s) if outcome.aim.straggler else Target.slowdown(0.05)
        plan = make_plan(graph, factories.profile(stages), blocking_power_w=80.0, target=target, limits=limits)
        figures = outcome.figures
        assert figures.bound_j == plan.energy_lower_bound_j
        assert (figures.energy_j, figures.iteration_s) == (plan.energy_j, plan.iteration_time_s)
        assert (figures.saving, figures.slowdown, figures.gap) == (plan.saving, plan.slowdown, plan.gap)
        assert figures.full_clock_j == plan.baseline_energy_j


def test_what_waiting_at_lower_clocks_saves_is_told_apart() -> None:
    def told(kinds: object) -> Profile:
        rows = factories.profile(4).rows()
        return Profile.from_rows((s, k, replace(m, blocking_power_w=m.frequency_mhz / 20)) for s, k, m in rows)

    several = [Pipeline(told, factories.BLOCKING_W, 4), pipeline()]
    low, even = simulate(several, [named("1f1b", 6)], [Aim()], switch_latency_s=0.001)
    (alone,) = simulate(several[:1], [named("1f1b", 6)], [Aim()])
    assert low.figures is not None
    assert alone.figures is not None
    assert even.figures is not None
    assert low.figures.energy_j < alone.figures.energy_j
    assert (low.figures.left_alone_j, alone.figures.left_alone_j) == (alone.figures.energy_j, None)
    assert even.figures.left_alone_j is None, "one blocking power at all clocks"


def test_a_schedule_of_two_chunks_runs_halves_of_the_stages() -> None:
    whole = only(list(simulate([pipeline()], [named("1f1b", 8)], [Aim(slowdown=0.0)]))).figures
    halves = only(list(simulate([pipeline()], [named("interleaved-1f1b", 8)], [Aim(slowdown=0.0)]))).figures
    assert whole is not None
    assert halves is not None
    assert (whole.scale, halves.scale) == (1.0, 0.5)
    # The same work with less waiting: a bubble of half the length.
    assert halves.full_clock_s < whole.full_clock_s
    of_chunks = only(list(simulate([pipeline(chunks=2)], [named("interleaved-1f1b", 8)], [Aim(slowdown=0.0)]))).figures
    assert of_chunks is not None
    assert of_chunks.scale == 1.0
    assert of_chunks.full_clock_s == pytest.approx(2 * halves.full_clock_s)


@pytest.mark.parametrize("name", ["interleaved-zero-bubble", "zbv", "dualpipev"])
def test_split_backwards_wait_less_and_do_the_same_work(name: str) -> None:
    """The profile has whole backwards of whole stages."""
    outcomes = list(simulate([pipeline()], [named("1f1b", 8), named("interleaved-1f1b", 8), named(name, 8)], [Aim()]))
    plain, interleaved, split = (o.figures for o in outcomes)
    assert plain is not None
    assert interleaved is not None
    assert split is not None
    assert split.scale == 0.5
    assert split.full_clock_s < interleaved.full_clock_s < plain.full_clock_s
    # All that is saved at full clocks is waiting.
    waited_s = 4 * (plain.full_clock_s - split.full_clock_s)
    assert plain.full_clock_j - split.full_clock_j == pytest.approx(factories.BLOCKING_W * waited_s)
    assert split.energy_j < split.full_clock_j


def test_the_share_of_the_input_gradient_is_the_callers() -> None:
    times = [
        only(list(simulate([pipeline()], [named("zbv", 8)], [Aim()], input_share=share))).figures
        for share in (0.2, 0.5, 0.8)
    ]
    assert len({figures.full_clock_s for figures in times if figures is not None}) == 3


def test_what_cannot_be_planned_says_why_and_the_rest_goes_on() -> None:
    outcomes = list(simulate([pipeline()], [named("interleaved-1f1b", 6, 8)], [Aim(slowdown=0.0)]))
    assert [o.figures is None for o in outcomes] == [True, False]
    assert "microbatches a multiple of stages" in outcomes[0].error
    assert outcomes[0].microbatches == 6
    tight = list(simulate([pipeline()], [named("1f1b", 4)], [Aim(slowdown=-1.0), Aim(slowdown=0.0)]))
    assert [bool(o.error) for o in tight] == [True, False]


def test_a_schedule_that_brings_its_own_microbatches_tells_them() -> None:
    own = Workload("mine", lambda stages, count: SCHEDULES["1f1b"](stages, 5), (None,))
    assert only(list(simulate([pipeline()], [own], [Aim()]))).microbatches == 5

    def broken(stages: int, count: int | None) -> list[list[object]]:
        raise ScheduleError("mine.json: cannot read the schedule")

    outcome = only(list(simulate([pipeline()], [Workload("mine", broken, (None,))], [Aim()])))  # type: ignore[arg-type]
    assert (outcome.figures, outcome.error) == (None, "mine.json: cannot read the schedule")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published profiles are not here (PERSEUS_PUBLISHED_PROFILES)")
@pytest.mark.parametrize(("name", "power_w"), [("gpt3-175b-a100_sxm", 83.64), ("gpt3-175b-a40", 70.38)])
def test_published_profiles_give_the_planners_figures(name: str, power_w: float) -> None:
    profile = load_profile(PUBLISHED / f"{name}.csv").scaled(10)
    job = Pipeline(lambda kinds: profile, power_w, profile.stages)
    outcomes = list(simulate([job], [named("1f1b", 12, 24)], [Aim(slowdown=0.0), Aim(straggler=1.2)]))
    make = partial(make_plan, blocking_power_w=power_w)
    for outcome in outcomes:
        assert outcome.figures is not None
        graph = build_graph(SCHEDULES["1f1b"](8, outcome.microbatches or 0))
        target = Target.straggler(1.2 * outcome.figures.full_clock_s) if outcome.aim.straggler else Target.slowdown(0.0)
        plan = make(graph, profile, target=target)
        assert outcome.figures.energy_j == plan.energy_j
        assert outcome.figures.saving == plan.saving


def test_a_step_that_is_one_graph_has_figures_of_its_own_and_its_waits_are_left_alone() -> None:
    def told(kinds: object) -> Profile:
        rows = factories.profile(4).rows()
        return Profile.from_rows((s, k, replace(m, blocking_power_w=m.frequency_mhz / 20)) for s, k, m in rows)

    several = [Pipeline(told, factories.BLOCKING_W, 4)]
    limits = ChangeLimits(max_changes=6)
    graph = Graph(jitter=0.005, change_s=0.001)
    graphed = only(
        list(simulate(several, [named("1f1b", 6)], [Aim()], switch_latency_s=0.001, limits=limits, graph=graph))
    ).figures
    alone = only(list(simulate(several, [named("1f1b", 6)], [Aim()], limits=limits))).figures
    assert graphed is not None
    assert alone is not None
    assert (graphed.energy_j, graphed.left_alone_j) == (alone.energy_j, None)
    assert (alone.graph_saving, alone.graph_slowdown) == (None, None)
    assert graphed.graph_saving is not None
    assert graphed.graph_slowdown is not None
    assert 0.9 * graphed.saving < graphed.graph_saving < 1.01 * graphed.saving
    assert graphed.graph_slowdown < 0.005
