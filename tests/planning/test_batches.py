from __future__ import annotations

import numpy as np
import pytest

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.batches import BatchPlanner, choose, joined, of_batch, outcome_of, sizes_of
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.planner import make_plan
from perseus_plugin.planning.process import with_margin
from perseus_plugin.planning.replay import Replay, clocks_of, finishes
from perseus_plugin.planning.robust import Gaps, Promise
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.work_model import fitted

from .jobs import bundled_profile

STAGES, MICROBATCHES, BLOCKING_W = 4, 6, 80.0
STREAMS = one_f_one_b(STAGES, MICROBATCHES)
LATENCY_S = 0.005


def problem(margin: float = 0.0) -> PlanningProblem:
    profile = bundled_profile(STAGES)
    return build_problem(build_graph(STREAMS), with_margin(profile, margin, [BLOCKING_W] * STAGES), BLOCKING_W)


def planner_with(margin: float) -> BatchPlanner:
    return BatchPlanner(problem(), problem(margin), latency_s=LATENCY_S)


def works(replicas: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).uniform(1.0, 3.0, (replicas, MICROBATCHES))


def sizes(of_microbatch: FloatArray) -> FloatArray:
    graph = problem().graph
    return np.array([1.0 if one is None else of_microbatch[one.microbatch] for one in graph.instructions])


def test_of_the_usual_batch_the_plan_is_that_of_the_job() -> None:
    graph, usual = (
        problem().graph,
        make_plan(problem().graph, bundled_profile(STAGES), blocking_power_w=BLOCKING_W, target=Target.slowdown(0.0)),
    )
    own = of_batch(problem(), np.ones(len(graph)))
    assert own.full_clock_time_s == pytest.approx(problem().full_clock_time_s)
    replay = Replay(own, own.full_clock_s[None, None])
    (plan,) = planner_with(0.0).step([np.ones(len(graph))])
    mine, theirs = (replay.under(clocks_of(one, graph)) for one in (plan.plan, usual))
    assert mine.time_s == pytest.approx(replay.at_full_clocks.time_s, rel=1e-6)
    assert mine.energy_j == pytest.approx(theirs.energy_j, rel=0.01)


def test_a_step_takes_no_longer_than_its_slowest_replica_and_saves_more_than_a_static_plan() -> None:
    graph, full_s = problem().graph, problem().full_clock_s
    usual = make_plan(graph, bundled_profile(STAGES), blocking_power_w=BLOCKING_W, target=Target.slowdown(0.0))
    ran = []
    for seed in range(4):
        predicted = [sizes(of) for of in works(3, seed)]
        durations_s = np.array([of * full_s for of in predicted])
        under, full = outcome_of(planner_with(0.0).step(predicted), durations_s)
        static = Replay(problem(), durations_s[None]).under(clocks_of(usual, graph))
        assert under.time_s == pytest.approx(full.time_s, rel=1e-6)
        assert static.time_s > full.time_s
        assert under.energy_j < 0.97 * full.energy_j
        ran.append((under, static))
    under, static = (joined([one[place] for one in ran]) for place in (0, 1))
    assert under.time_s.sum() < static.time_s.sum()


def noisy(count: int, noise: float, seed: int) -> tuple[list[list[FloatArray]], list[FloatArray]]:
    """Steps of three replicas as predicted, and what they take."""
    draw, full_s = np.random.default_rng(seed), problem().full_clock_s
    predicted = [[sizes(of) for of in works(3, seed + step)] for step in range(count)]
    return predicted, [
        np.array([of * full_s * (1 + noise * draw.standard_normal(len(full_s))) for of in step]) for step in predicted
    ]


def test_the_margin_grows_with_the_error_of_what_is_predicted() -> None:
    margins = []
    for noise in (0.0, 0.03):
        chosen = choose(planner_with, *noisy(8, noise, 1), Promise(), LATENCY_S, (0.0, 0.05, 0.1))
        assert chosen.planner is not None
        assert chosen.replayed.saving_mean > 0.05
        assert chosen.replayed.time_ratio_mean < 1.002
        margins.append(chosen.replayed.margin)
    assert margins[0] == 0.0 < margins[1]


def late(steps: int, seed: int) -> Gaps:
    """One instruction in ten of three replicas begins late, and by then all do by so much."""
    graph = problem().graph
    draw, full_s = np.random.default_rng(seed), problem().full_clock_s
    gaps_s = 0.6 * full_s[:, None] * (draw.uniform(size=(len(graph), 3 * steps)) < 0.1)
    return Gaps(gaps_s, np.median(finishes(graph, full_s[:, None] + gaps_s), axis=1) - graph.times(full_s)[1])


def test_instructions_that_begin_late_count_in_the_margin_and_in_what_is_promised() -> None:
    predicted, took_s = noisy(24, 0.01, 50)

    def of_step(gaps: Gaps, step: int) -> Gaps:
        return Gaps(gaps.gaps_s[:, 3 * step : 3 * step + 3], gaps.usual_s)

    found = []
    for known in (late(8, 1), None):
        chosen = choose(planner_with, *noisy(8, 0.01, 1), Promise(), LATENCY_S, gaps=known)
        assert chosen.planner is not None
        ran = [
            outcome_of(chosen.planner.step(predicted[step]), took_s[step], LATENCY_S, of_step(late(24, 2), step))
            for step in range(24)
        ]
        under, full = joined([one for one, _ in ran]), joined([one for _, one in ran])
        saved = 1 - under.energy_j.sum() / full.energy_j.sum()
        found.append((chosen.replayed, saved, under.time_s.sum() / full.time_s.sum()))
    (told, saved, time_ratio), (blind, saved_blindly, longer) = found
    assert told.margin > blind.margin
    assert time_ratio < min(longer, 1.002)
    assert told.saving_mean == pytest.approx(saved, abs=0.005)
    assert blind.saving_mean > saved_blindly + 0.005


def test_what_cannot_be_predicted_is_not_planned_for() -> None:
    assert choose(planner_with, *noisy(6, 0.3, 2), Promise(), LATENCY_S, (0.0, 0.05)).planner is None


def test_sizes_are_those_of_the_model() -> None:
    usual, numbers = problem(), np.linspace(1.0, 3.0, 12)
    model = fitted({key: (numbers, usual.full_clock[k, 0] * (0.5 + numbers)) for k, key in enumerate(usual.keys)})
    assert model is not None
    given = works(1, 0)[0]
    assert sizes_of(usual, model.of, given.tolist()) == pytest.approx(sizes(0.5 + given))
    with pytest.raises(PlanError, match="works: got 5; allowed: one for each of 6 microbatches"):
        sizes_of(usual, model.of, given[:5].tolist())
    with pytest.raises(PlanError, match="the model lacks"):
        sizes_of(usual, {}, given.tolist())
