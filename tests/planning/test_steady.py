"""Long iterations that repeat themselves: solved as shorter ones, with a true bound and times that can be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perseus_plugin.planning.relaxation as relaxation_module
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import StageStream
from perseus_plugin.iteration.schedules import OF_CHUNKS, gpipe, interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.planning.relaxation import Relaxation
from perseus_plugin.planning.steady import Steady, balanced, find_steady
from perseus_plugin.profiling.profile import Profile

from .jobs import Job, bundled_profile, jobs

SCHEDULES: dict[str, Callable[[int], Sequence[StageStream]]] = {
    "1f1b": lambda microbatches: one_f_one_b(3, microbatches),
    "two chunks": lambda microbatches: interleaved_1f1b(2, microbatches, 2),
    "three chunks": lambda microbatches: interleaved_1f1b(3, microbatches, 3),
    "zero-bubble": lambda microbatches: OF_CHUNKS["interleaved-zero-bubble"](2, microbatches, 2),
}


def profile_of(streams: Sequence[StageStream], slower: Sequence[float] = (1.0, 1.05, 1.02)) -> Profile:
    """For whatever the streams run; each stage takes so many times as long."""
    forward = bundled_profile(1).table[0, "forward"]
    kinds = {(stage, op.kind) for stage, stream in enumerate(streams) for op in stream if hasattr(op, "kind")}
    return Profile({key: tuple(row.scaled(slower[key[0]]) for row in forward) for key in kinds})


def problem_of(streams: Sequence[StageStream], slower: Sequence[float] = (1.0, 1.05, 1.02)) -> PlanningProblem:
    return build_problem(build_graph(streams), profile_of(streams, slower), 60.0)


def steady_of(problem: PlanningProblem) -> Steady | None:
    return find_steady(problem.graph, problem.fastest_s, problem.class_of)


def places(graph: PipelineGraph) -> list[tuple[int, int]]:
    """Stage and place in its program of every node."""
    found = [(0, 0)] * len(graph)
    for stage, nodes in enumerate(graph.stage_nodes):
        for place, node in enumerate(nodes.tolist()):
            found[node] = stage, place
    return found


def edges(graph: PipelineGraph) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    at = places(graph)
    return {(at[a], at[b]) for a, b in zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_shorter_iteration_is_that_of_fewer_microbatches(
    schedule: Callable[[int], Sequence[StageStream]],
) -> None:
    problem = problem_of(schedule(48))
    steady = steady_of(problem)
    assert steady is not None
    graph, long = steady.graph, problem.graph
    fewer = build_graph(schedule(graph.microbatches))
    assert graph.microbatches < long.microbatches
    assert edges(graph) == edges(fewer)
    assert graph.instructions == fewer.instructions
    assert (graph.level_start == fewer.level_start).all()
    # At any clocks the long one is the shorter one, repeated.
    assert (graph.stage[steady.node] == long.stage).all()
    assert (steady.node[long.edge_source] == graph.edge_source[steady.edge])[
        steady.repeats[long.edge_target] == 0
    ].all()
    assert (steady.node[long.edge_target] == graph.edge_target[steady.edge]).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("slowdown", [0.0, 0.03, 5.0])
def test_a_long_iteration_has_the_optimum_of_a_shorter_one_repeated(
    schedule: Callable[[int], Sequence[StageStream]], slowdown: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(schedule(48))
    deadline_s = problem.full_clock_time_s * (1 + slowdown)
    whole = Relaxation.sized(problem).solve(deadline_s)
    monkeypatch.setattr(relaxation_module, "_LONG", 0)
    found = OnlyShorter.sized(problem).solve(deadline_s)
    assert found.deadline_s == deadline_s
    assert 0.999 * whole.bound_j <= found.bound_j <= whole.bound_j * (1 + 1e-4)
    assert (found.latest_finish_s <= deadline_s * (1 + 1e-3)).all()


class OnlyShorter(Relaxation):
    """Solves nothing itself: what it finds is the solution of a shorter iteration, which is no such one."""

    def _flow(self, *given: object, **named: object) -> NoReturn:
        raise AssertionError("the long iteration is solved as a whole")


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3),
    st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_the_bound_of_what_repeats_is_a_bound(name: str, slower: list[float], share: float) -> None:
    problem = problem_of(SCHEDULES[name](42), slower)
    deadline_s = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    whole = Relaxation(problem).solve(deadline_s)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relaxation_module, "_LONG", 0)
        found = Relaxation.sized(problem).solve(deadline_s)
    loose_j = 1e-4 * problem.mean_energy_j * len(problem.graph)
    assert 0.998 * whole.bound_j <= found.bound_j <= whole.bound_j + loose_j


def test_a_plan_of_a_long_iteration_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = interleaved_1f1b(3, 48, 2)

    def plan_j(slowdown: float) -> float:
        planner = Planner(build_graph(streams), bundled_profile(3), blocking_power_w=60.0)
        solution = planner.solve(Target.slowdown(slowdown), search=False)
        plan = planner.to_plan(solution)
        assert plan.iteration_time_s <= plan.deadline_s
        assert solution.relaxed.bound_j <= plan.energy_j
        return plan.energy_j

    whole_j = [plan_j(slowdown) for slowdown in (0.0, 0.03)]
    monkeypatch.setattr(relaxation_module, "_LONG", 0)
    assert [plan_j(slowdown) for slowdown in (0.0, 0.03)] <= [one_j * 1.002 for one_j in whole_j]


@pytest.mark.parametrize("name", ["all forward first", "too few", "one takes longer", "one waits longer"])
def test_what_does_not_repeat_is_solved_as_a_whole(name: str) -> None:
    streams = {"all forward first": gpipe(3, 48), "too few": one_f_one_b(3, 36)}.get(name, one_f_one_b(3, 48))
    problem = problem_of(streams)
    if name == "one takes longer":
        odd = problem.class_of.copy()
        odd[len(odd) // 2] = -1
        problem = replace(problem, class_of=odd)
    if name == "one waits longer":
        latency_s = problem.graph.edge_latency_s.copy()
        latency_s[len(latency_s) // 2] = 0.01
        problem = replace(problem, graph=replace(problem.graph, edge_latency_s=latency_s))
    assert steady_of(problem) is None


@settings(max_examples=40)
@given(jobs(), st.randoms(use_true_random=False))
def test_balanced_prices_are_those_given_or_more(job: Job, chance) -> None:  # type: ignore[no-untyped-def]
    graph = build_graph(job.streams, latency_s=job.latency_s)
    count = len(graph.edge_source)
    price = np.array([chance.uniform(0, 9) for _ in range(len(graph))])
    edge_price = np.array([chance.uniform(0, 9) for _ in range(count)])
    finish_s = graph.times(np.array([chance.uniform(0.1, 1) for _ in range(len(graph))]))[1]
    begin_held, end_held = (np.array([chance.random() < 0.3 for _ in range(len(graph))]) for _ in range(2))
    raised, edge_raised = balanced(graph, price, edge_price, finish_s, begin_held, end_held)
    assert (raised >= price).all()
    assert (edge_raised >= edge_price).all()
    for held, ends in ((begin_held, graph.edge_target), (end_held, graph.edge_source)):
        met = np.bincount(ends, weights=edge_raised, minlength=len(graph))
        at = ~held & (np.bincount(ends, minlength=len(graph)) > 0)
        assert met[at] == pytest.approx(raised[at])
