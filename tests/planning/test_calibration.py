from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import FloatArray, PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream
from perseus_plugin.iteration.replayed import Overheads, Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.calibration import fitted, overheads, with_transfers
from tests.examples import examples
from tests.measured_runs import SLICE, load_runs, of_clocks, on_graph

STAGES, MICROBATCHES = 4, 6


def blocking(streams: list[StageStream]) -> list[StageStream]:
    """Every transfer blocks both ends, those of one direction on channels of their own."""
    return [[Send(op.peer, channel=op.channel) if isinstance(op, Send) else op for op in s] for s in streams]


def graph(schedule: str = "1f1b") -> PipelineGraph:
    """In which a transfer takes 1 s."""
    streams = one_f_one_b(STAGES, MICROBATCHES)
    if schedule == "forwards":
        forwards = [[op for op in s if getattr(op, "channel", "forward") == "forward"] for s in streams]
        streams = blocking([[op for op in s if not isinstance(op, Compute) or op.kind == "forward"] for s in forwards])
    return build_graph([[*stream, Constant("step")] for stream in streams], {(0, "step"): 0.01}, 1.0)


def durations(with_unit: PipelineGraph, count: int, seed: int, spread: float = 0.3) -> FloatArray:
    """Iterations in which stages run at clocks of their own, so that another one is critical each time."""
    rng = np.random.default_rng(seed)
    columns = []
    for _ in range(count):
        by_stage = 0.03 * np.exp(spread * rng.standard_normal(STAGES))
        columns.append(np.where(with_unit.is_constant, with_unit.constant_s, by_stage[with_unit.stage]))
    return np.array(columns).T


def run(with_unit: PipelineGraph, durations_s: FloatArray, transfer_s: float, end_s: float) -> FloatArray:
    """Iteration times of the real job."""
    real = with_transfers(with_unit, transfer_s)
    return np.array([real.iteration_time_s(column) + end_s for column in durations_s.T])


@pytest.mark.many
@examples(30)
@given(
    transfer_s=st.floats(0.001, 0.02),
    end_s=st.floats(0.0, 0.5),
    seed=st.integers(0, 1000),
    schedule=st.sampled_from(["1f1b", "forwards"]),
)
def test_both_numbers_are_found_where_critical_paths_differ(
    transfer_s: float, end_s: float, seed: int, schedule: str
) -> None:
    with_unit = graph(schedule)
    durations_s = durations(with_unit, 12, seed)
    times_s = run(with_unit, durations_s, transfer_s, end_s)
    found_s, once_s = fitted(with_unit, durations_s, times_s)
    np.testing.assert_allclose(run(with_unit, durations_s, found_s, once_s), times_s, atol=2e-3)
    on_path = np.rint((run(with_unit, durations_s, transfer_s + 1e-7, end_s) - times_s) / 1e-7)
    if (on_path != np.median(on_path)).sum() >= 3:
        assert found_s == pytest.approx(transfer_s, abs=2e-4)
        assert once_s == pytest.approx(end_s, abs=20 * 2e-4)


@pytest.mark.many
@examples(25)
@given(transfer_s=st.floats(0.0, 0.02), end_s=st.floats(0.0, 0.5), seed=st.integers(0, 1000))
def test_starts_tell_transfers_from_what_is_there_once_at_one_clock_too(
    transfer_s: float, end_s: float, seed: int
) -> None:
    with_unit = graph()
    durations_s = np.repeat(durations(with_unit, 1, seed), 4, axis=1)
    real = with_transfers(with_unit, transfer_s)
    zeros_s = np.random.default_rng(seed).uniform(-1, 1, STAGES)[with_unit.stage]
    starts_s = np.array([real.times(column)[0] + zeros_s for column in durations_s.T]).T
    found_s, once_s = fitted(with_unit, durations_s, run(with_unit, durations_s, transfer_s, end_s), starts_s)
    assert found_s == pytest.approx(transfer_s, abs=2e-4)
    assert once_s == pytest.approx(end_s, abs=20 * 2e-4)


@given(transfer_s=st.floats(0.0, 0.02), end_s=st.floats(0.0, 0.5))
@settings(max_examples=30, deadline=None)
def test_full_clocks_alone_tell_one_number(transfer_s: float, end_s: float) -> None:
    with_unit = graph()
    durations_s = np.repeat(durations(with_unit, 1, 3), 6, axis=1)
    times_s = run(with_unit, durations_s, transfer_s, end_s)
    found_s, once_s = fitted(with_unit, durations_s, times_s)
    assert found_s == 0
    assert once_s == pytest.approx(times_s[0] - run(with_unit, durations_s, 0.0, 0.0)[0])


def test_an_iteration_is_that_of_the_slowest_replica() -> None:
    with_unit = graph()
    durations_s = durations(with_unit, 8, 5)
    slowest_s = run(with_unit, durations_s, 0.0, 0.1).reshape(4, 2).max(axis=1)
    assert fitted(with_unit, durations_s, slowest_s) == (0.0, pytest.approx(0.1))


def test_graphs_without_transfers_and_iterations_that_are_too_short_have_none() -> None:
    alone = build_graph([[Compute("forward", 0)]], latency_s=1.0)
    assert fitted(alone, np.full((1, 5), 0.1), np.full(5, 0.3)) == (0.0, pytest.approx(0.2))
    assert fitted(alone, np.full((1, 5), 0.4), np.full(5, 0.3)) == (0.0, 0.0)


def test_what_is_beside_the_work_is_what_a_job_tells_of_itself() -> None:
    streams: list[StageStream] = [
        [Compute("forward", 0), Send(1, blocking=False)],
        [Receive(0), Compute("forward", 0)],
    ]
    with_unit = build_graph(streams, latency_s=1.0)
    of_replica = ((0.1,), (0.2,))
    starts = ((0.0,), (0.15,))
    every = ((of_replica, of_replica),) * 4
    found = overheads(with_unit, Samples(every, every, ((starts, starts),) * 4, ((0.5, 0.45),) * 4))
    assert (found.iteration_s, found.beside_s) == (pytest.approx(0.5), pytest.approx(0.2))
    assert found.share == pytest.approx(0.4)
    assert found.transfer_s + found.end_s == pytest.approx(0.2), "which is transfers or not, with one of them"
    assert overheads(with_unit, None) == overheads(with_unit, Samples(every)) == Overheads()
    assert Overheads().share is None


def test_on_a_real_gpu_one_run_at_full_clocks_tells_what_there_is_once() -> None:
    """As `benchmarks/measured_runs.py` has it for all published runs."""
    (runs,) = load_runs(SLICE).values()
    full, _ = of_clocks(runs)
    with_unit = full.graph(transfer_s=1.0)
    durations_s = full.durations_s(with_unit) + with_unit.constant_s
    found_s, once_s = fitted(with_unit, durations_s[:, None], np.array([full.time_s]))
    assert (found_s, once_s) == (0.0, pytest.approx(full.time_s - full.graph_s()))
    assert on_graph(with_unit, [[1.0] * len(stage) for stage in full.compute]).sum() == sum(map(len, full.compute))


def test_on_a_real_gpu_a_few_runs_predict_themselves_with_both_numbers() -> None:
    (runs,) = load_runs(SLICE).values()
    full, plans = of_clocks(runs)
    several = [full, *plans]
    graphs = [run.graph(transfer_s=1.0) for run in several]
    durations_s = [run.durations_s(one) + one.constant_s for run, one in zip(several, graphs, strict=True)]
    found_s, once_s = fitted(graphs[0], np.array(durations_s).T, np.array([run.time_s for run in several]))
    assert 0 < found_s + once_s < 0.03 * full.time_s
    assert max(abs(run.graph_s(found_s, once_s) / run.time_s - 1) for run in several) < 0.008
