from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

from perseus_plugin.integrations.deepspeed.schedule import operation_name, translate
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StreamOp
from perseus_plugin.iteration.schedules import one_f_one_b

SHAPES = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8) for microbatches in (1, 2, 3, 4, 7, 8, 16)]
END = ["reduce_tied_grads", "reduce_grads", "optimizer_step"]


@pytest.fixture(scope="module")
def schedule() -> ModuleType:
    """DeepSpeed's own schedules."""
    return pytest.importorskip("deepspeed.runtime.pipe.schedule")


def streams_of(schedule_class: Any, stages: int, microbatches: int) -> list[list[StreamOp]]:
    made = [schedule_class(micro_batches=microbatches, stages=stages, stage_id=stage) for stage in range(stages)]
    return [translate(one.steps(), stage) for stage, one in enumerate(made)]


def computations(stream: Sequence[StreamOp]) -> list[Compute]:
    return [op for op in stream if isinstance(op, Compute)]


def sent(streams: Sequence[Sequence[StreamOp]]) -> dict[tuple[int, int, str], int]:
    """How often each channel is sent on, less how often it is received from."""
    counts: dict[tuple[int, int, str], int] = {}
    for stage, stream in enumerate(streams):
        for op in stream:
            if isinstance(op, Send):
                key, step = (stage, op.peer, op.channel), 1
            elif isinstance(op, Receive):
                key, step = (op.peer, stage, op.channel), -1
            else:
                continue
            counts[key] = counts.get(key, 0) + step
    return counts


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_the_training_schedule_is_textbook_1f1b(schedule: ModuleType, stages: int, microbatches: int) -> None:
    streams = streams_of(schedule.TrainSchedule, stages, microbatches)
    for stream, textbook in zip(streams, one_f_one_b(stages, microbatches), strict=True):
        assert computations(stream) == computations(textbook)


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_the_streams_of_the_training_schedule_fit_together(
    schedule: ModuleType, stages: int, microbatches: int
) -> None:
    streams = streams_of(schedule.TrainSchedule, stages, microbatches)
    assert set(sent(streams).values()) <= {0}
    if stages > 1:
        channels = {(a, a + 1, "activation0") for a in range(stages - 1)}
        channels |= {(a + 1, a, "gradient0") for a in range(stages - 1)}
        assert sent(streams).keys() == channels
        assert sum(isinstance(op, Send) for stream in streams for op in stream) == 2 * (stages - 1) * microbatches
    graph = build_graph(streams)
    assert len(graph.node_of) == 2 * stages * microbatches
    # One forward of 1 s and one backward of 2 s: the time of 1F1B is known.
    durations = [0.0 if i is None else {"forward": 1.0, "backward": 2.0}[i.kind] for i in graph.instructions]
    assert graph.iteration_time_s(durations) >= 3.0 * (microbatches + stages - 1)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8)])
def test_microbatch_ids_are_those_the_schedule_means(schedule: ModuleType, stages: int, microbatches: int) -> None:
    for stage in range(stages):
        made = schedule.TrainSchedule(micro_batches=microbatches, stages=stages, stage_id=stage)
        meant = []
        for step, instructions in enumerate(made.steps()):
            microbatch, forward = made._step_to_micro_batch(step)
            if any(type(i).__name__ in ("ForwardPass", "BackwardPass") for i in instructions):
                meant.append(Compute("forward" if forward else "backward", microbatch))
        assert computations(translate(made.steps(), stage)) == meant


def test_sends_block_and_constant_work_is_where_it_belongs(schedule: ModuleType) -> None:
    streams = streams_of(schedule.TrainSchedule, 3, 4)
    assert all(op.blocking for stream in streams for op in stream if isinstance(op, Send))
    for stage, stream in enumerate(streams):
        constants = [op for op in stream if isinstance(op, Constant)]
        loads = [op for op in constants if op.name == "load_microbatch"]
        assert len(loads) == (0 if stage == 1 else 4), "only the first and the last stage load"
        assert not any(op.collective for op in loads)
        assert [op.name for op in constants[len(loads) :]] == END
        assert all(op.collective for op in constants[len(loads) :])
        assert stream[-3:] == constants[-3:]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (2, 4), (2, 5), (3, 7), (4, 8), (4, 12)])
def test_dualpipev_translates_too(schedule: ModuleType, stages: int, microbatches: int) -> None:
    if not hasattr(schedule, "DualPipeVSchedule"):
        pytest.skip("this DeepSpeed has no DualPipeV")
    streams = streams_of(schedule.DualPipeVSchedule, stages, microbatches)
    assert set(sent(streams).values()) <= {0}
    assert not any(op.blocking for stream in streams for op in stream if isinstance(op, Send)), "sent as a group"
    graph = build_graph(streams)
    assert len(graph.node_of) == 4 * stages * microbatches
    for stream in streams:
        found = computations(stream)
        assert len(set(found)) == len(found)
        for kind, chunk in (("forward", 0), ("backward", 0), ("forward_1", 1), ("backward_1", 1)):
            ids = [op.microbatch for op in found if (op.kind, op.chunk) == (kind, chunk)]
            assert ids == list(range(microbatches)), (kind, chunk)
        for chunk, suffix in ((0, ""), (1, "_1")):
            for microbatch in range(microbatches):
                order = [op.kind for op in found if (op.microbatch, op.chunk) == (microbatch, chunk)]
                assert order == [f"forward{suffix}", f"backward{suffix}"]
    start, finish = graph.times([0.0 if i is None else 1.0 for i in graph.instructions])
    node_of = graph.node_of
    # A microbatch goes down the ranks in chunk 0 and back up in chunk 1.
    way = [(stage, "forward", 0) for stage in range(stages)]
    way += [(stage, "forward_1", 1) for stage in reversed(range(stages))]
    nodes = {(i.stage, i.kind, i.microbatch): node for i, node in node_of.items()}
    for (a, kind_a, _), (b, kind_b, _) in itertools.pairwise(way):
        for microbatch in range(microbatches):
            assert start[nodes[b, kind_b, microbatch]] >= finish[nodes[a, kind_a, microbatch]] - 1e-9


def instruction(name: str, **attributes: int) -> Any:
    """An instruction of a class that DeepSpeed does not have."""
    made = type(name, (), {})()
    vars(made).update(attributes)
    return made


def test_an_unknown_instruction_counts_as_compute_on_the_microbatch_of_its_buffer() -> None:
    """Zero-bubble forks split the backward."""
    steps = [
        [instruction("LoadMicroBatch", buffer_id=0), instruction("ForwardPass", buffer_id=0)],
        [instruction("ForwardPass", buffer_id=1), instruction("SendActivation", buffer_id=1)],
        [instruction("RecvGrad", buffer_id=0), instruction("BackwardOnlyPass", buffer_id=0)],
        [],
        [instruction("BackwardOnlyPass", buffer_id=1), instruction("WeightPass", buffer_id=0)],
        [instruction("ForwardPass", buffer_id=0), instruction("BackwardOnlyPass", buffer_id=0)],
        [instruction("OptimizerStep"), instruction("Sync")],
    ]
    assert translate(steps, 0) == [
        Constant("load_microbatch"),
        Compute("forward", 0),
        Compute("forward", 1),
        Send(1, blocking=True, channel="activation0"),
        Receive(1, channel="gradient0"),
        Compute("backward_only", 0),
        Compute("backward_only", 1),
        Compute("weight", 0),
        Compute("forward", 2),
        Compute("backward_only", 2),
        Constant("optimizer_step", collective=True),
        Compute("sync", 2),
    ]


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("ForwardPass", "forward"),
        ("BackwardPass", "backward"),
        ("BackwardOnlyPass", "backward_only"),
        ("WeightPass", "weight"),
        ("Pass", "pass"),
        ("H2DCopy", "h2_dcopy"),
        ("LoadMicroBatch", "load_microbatch"),
        ("OptimizerStep", "optimizer_step"),
        ("SendActivation", None),
        ("RecvActivation", None),
        ("SendGrad", None),
        ("RecvGrad", None),
        ("CommitP2P", None),
    ],
)
def test_the_name_an_instruction_is_hooked_under(class_name: str, name: str | None) -> None:
    assert operation_name(type(class_name, (), {})) == name


def test_what_is_hooked_is_what_takes_time_in_the_stream(schedule: ModuleType) -> None:
    """Otherwise the tap would count other operations than the stream says."""
    for stages, microbatches in ((1, 1), (2, 3), (4, 8)):
        for stage in range(stages):
            made = schedule.TrainSchedule(micro_batches=microbatches, stages=stages, stage_id=stage)
            hooked = [operation_name(type(i)) for step in made.steps() for i in step]
            streamed = [
                op.kind if isinstance(op, Compute) else op.name
                for op in translate(made.steps(), stage)
                if isinstance(op, (Compute, Constant))
            ]
            assert [name for name in hooked if name is not None] == streamed
