"""The dependency graph: against an independent simulation, and the errors of streams that are no schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, Instruction, Receive, Send
from perseus_plugin.iteration.schedules import gpipe, one_f_one_b
from tests.planning.jobs import blocking, schedules, simulate


def reachable(graph: PipelineGraph) -> list[set[int]]:
    after: list[set[int]] = [set() for _ in range(len(graph))]
    for node in reversed(range(len(graph))):
        for edge in graph.edges_from(node):
            target = int(graph.edge_target[edge])
            after[node] |= {target} | after[target]
    return after


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (4, 8), (8, 3), (3, 20)])
def test_equal_durations_give_the_textbook_iteration_time(stages: int, microbatches: int) -> None:
    for streams in (one_f_one_b(stages, microbatches), gpipe(stages, microbatches)):
        graph = build_graph(streams)
        assert len(graph) == 2 * stages * microbatches
        assert graph.iteration_time_s(np.ones(len(graph))) == 2 * (microbatches + stages - 1)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.sampled_from([0.0, 0.25]), st.randoms(use_true_random=False))
def test_times_agree_with_an_independent_simulation(streams, latency_s, random) -> None:
    streams = [[*stream, Constant("step")] for stream in streams]
    constant = {(0, "step"): 1.5}
    graph = build_graph(streams, constant, latency_s)
    seconds = {i: random.uniform(0.1, 2.0) for i in graph.instructions if i is not None}
    durations = [0.0 if i is None else seconds[i] for i in graph.instructions]
    expected = simulate(
        streams,
        lambda stage, op: seconds[Instruction(stage, op.kind, op.microbatch, op.chunk)],
        constant,
        latency_s,
    )
    assert graph.iteration_time_s(durations) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_edges_are_in_topological_order_and_none_is_implied_by_others(streams) -> None:
    graph = build_graph(streams)
    assert (graph.edge_source < graph.edge_target).all()
    after = reachable(graph)
    for source, target in zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True):
        between = [int(graph.edge_target[e]) for e in graph.edges_from(source)]
        assert not any(target in after[other] for other in between)
    for stage, nodes in enumerate(graph.stage_nodes):
        ops = [op for op in streams[stage] if isinstance(op, Compute)]
        found = [graph.instructions[node] for node in nodes.tolist()]
        assert [(i.kind, i.microbatch) for i in found if i] == [(op.kind, op.microbatch) for op in ops]
        for first, second in zip(nodes.tolist(), nodes.tolist()[1:], strict=False):
            assert second in after[first]


def test_a_blocking_send_waits_for_its_receiver() -> None:
    streams = [
        [Compute("forward", 0), Send(1), Compute("forward", 1)],
        [Compute("slow", 0), Receive(0), Compute("forward", 0)],
    ]
    graph = build_graph(streams)
    durations = np.ones(len(graph))
    durations[graph.node_of[Instruction(1, "slow", 0)]] = 5.0
    start, _ = graph.times(durations)
    assert start[graph.node_of[Instruction(0, "forward", 1)]] == 5.0
    free = build_graph([[op if not isinstance(op, Send) else Send(1, blocking=False) for op in streams[0]], streams[1]])
    assert free.times(durations)[0][free.node_of[Instruction(0, "forward", 1)]] == 1.0


def test_1f1b_with_naively_blocking_sends_deadlocks_and_says_where() -> None:
    with pytest.raises(ScheduleError, match=r"deadlocks; stage 0 at operation .*Send"):
        build_graph(blocking(one_f_one_b(4, 8)))


@settings(max_examples=30, deadline=None)
@given(schedules(), st.randoms(use_true_random=False))
def test_slack_and_critical_path(streams, random) -> None:
    graph = build_graph(streams)
    durations = np.array([random.uniform(0.1, 2.0) for _ in range(len(graph))])
    path, finish = graph.critical_path(durations), graph.times(durations)[1]
    slack = graph.latest_finish(durations, finish.max()) - finish
    total = graph.iteration_time_s(durations)
    assert durations[path].sum() == pytest.approx(total)
    assert np.allclose(slack[path], 0.0, atol=1e-9)
    node = random.randrange(len(graph))
    durations[node] += slack[node] + 0.5
    assert graph.iteration_time_s(durations) == pytest.approx(total + 0.5)
    later = graph.latest_finish(durations, total + 2.5) - graph.times(durations)[1]
    assert later.min() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([[Compute("forward", 0), Send(1)], [Compute("forward", 0)]], "sends 1 times to stage 1.*receives 0 times"),
        ([[Compute("forward", 0)], [Receive(0, "x")]], "sends 0 times to stage 1 on channel 'x'.*receives 1 times"),
        ([[Compute("forward", 0), Send(2)]], "names peer 2; allowed: another of the 1 stages"),
        ([[Compute("forward", 0), Send(0)], []], "names peer 0"),
        ([[Compute("forward", 0), Compute("forward", 0)]], "stands in the stream twice"),
        ([[Constant("load")]], "no instruction"),
        ([[Receive(1), Compute("f", 0), Send(1)], [Receive(0), Compute("f", 0), Send(0)]], "deadlocks"),
    ],
)
def test_streams_that_are_no_schedule_are_refused(streams, message) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_graph(streams)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_durations_are_refused(bad: float) -> None:
    with pytest.raises(ScheduleError, match="latency_s"):
        build_graph(one_f_one_b(1, 1), latency_s=bad)
    with pytest.raises(ScheduleError, match="step"):
        build_graph(one_f_one_b(1, 1), {(0, "step"): bad})


def test_durations_of_the_wrong_shape_are_refused() -> None:
    graph = build_graph(one_f_one_b(2, 2))
    with pytest.raises(ValueError, match="8 nodes"):
        graph.times(np.ones(7))
