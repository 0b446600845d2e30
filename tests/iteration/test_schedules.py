"""Textbook schedules and schedule files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream, StreamOp
from perseus_plugin.iteration.schedules import (
    OF_CHUNKS,
    SCHEDULES,
    early_recomputation_1f1b,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
)
from perseus_plugin.planning.streams import load_streams, save_streams, stream_to_json, streams_from_json


def computes(stream: StageStream) -> list[tuple[str, int, int]]:
    return [(op.kind[0], op.microbatch, op.chunk) for op in stream if isinstance(op, Compute)]


def test_1f1b_order() -> None:
    first, last = one_f_one_b(3, 4)[0], one_f_one_b(3, 4)[2]
    assert "".join(f"{k}{m}" for k, m, _ in computes(first)) == "f0f1f2b0f3b1b2b3"
    assert "".join(f"{k}{m}" for k, m, _ in computes(last)) == "f0b0f1b1f2b2f3b3"


def test_gpipe_order() -> None:
    assert "".join(f"{k}{m}" for k, m, _ in computes(gpipe(2, 3)[0])) == "f0f1f2b2b1b0"


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_1f1b_holds_no_more_activations_than_stages_behind(stages: int) -> None:
    for stage, stream in enumerate(one_f_one_b(stages, 12)):
        held = np.cumsum([1 if kind == "f" else -1 for kind, _, _ in computes(stream)])
        assert held.max() == min(12, stages - stage)
        assert held[-1] == 0


def test_recomputation_comes_before_the_gradient_is_waited_for() -> None:
    stream = early_recomputation_1f1b(2, 2)[0]
    kinds = [op.kind if isinstance(op, Compute) else type(op).__name__ for op in stream]
    at = kinds.index("recompute")
    assert kinds[at + 1 : at + 3] == ["Receive", "backward"]
    last = early_recomputation_1f1b(2, 2)[1]
    assert {op.kind for op in last if isinstance(op, Compute)} == {"forward", "backward"}
    build_graph(early_recomputation_1f1b(4, 8))


def test_interleaved_runs_every_chunk_of_every_microbatch_once_and_shortens_the_bubble() -> None:
    streams = interleaved_1f1b(4, 8, chunks=2)
    for stream in streams:
        assert sorted(computes(stream)) == sorted((k, m, c) for k in "fb" for m in range(8) for c in range(2))
    graph, plain = build_graph(streams), build_graph(one_f_one_b(4, 8))
    # A chunk is half a stage.
    assert graph.iteration_time_s(np.full(len(graph), 0.5)) < plain.iteration_time_s(np.ones(len(plain)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_absurd_size_is_refused_at_once(name: str) -> None:
    with pytest.raises(
        ScheduleError, match=r"4 stages, .*100000000 microbatches; allowed: at most 500,000 forward passes"
    ):
        SCHEDULES[name](4, 100_000_000)


@pytest.mark.parametrize("name", OF_CHUNKS)
def test_any_number_of_chunks_is_run_and_an_absurd_one_refused(name: str) -> None:
    graph = build_graph(OF_CHUNKS[name](3, 6, 5))
    forwards = {(i.stage, i.microbatch, i.chunk) for i in graph.instructions if i is not None and "forward" in i.kind}
    assert forwards == {(stage, m, chunk) for stage in range(3) for m in range(6) for chunk in range(5)}
    assert build_graph(OF_CHUNKS[name](3, 6, 2)).instructions == build_graph(SCHEDULES[name](3, 6)).instructions
    with pytest.raises(ScheduleError, match="1000000 chunks, 6 microbatches; allowed: at most 500,000 forward passes"):
        OF_CHUNKS[name](3, 6, 1_000_000)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_refuses_sizes_below_one(name: str) -> None:
    with pytest.raises(ScheduleError, match="microbatches: got 0"):
        SCHEDULES[name](2, 0)
    with pytest.raises(ScheduleError, match="stages: got 0"):
        SCHEDULES[name](0, 2)


def test_interleaved_refuses_microbatches_that_do_not_fit() -> None:
    with pytest.raises(ScheduleError, match="multiple of stages"):
        interleaved_1f1b(4, 6)


def test_a_file_gives_the_streams_it_describes(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    stages = [
        [
            {"op": "constant", "name": "load"},
            {"op": "compute", "kind": "forward", "microbatch": 0},
            {"op": "send", "peer": 1, "blocking": False, "channel": "a"},
        ],
        [
            {"op": "receive", "peer": 0, "channel": "a"},
            {"op": "compute", "kind": "forward", "microbatch": 0, "chunk": 2},
        ],
    ]
    path.write_text(json.dumps({"schema": "perseus-schedule", "version": 1, "stages": stages}))
    assert load_streams(path) == [
        [Constant("load"), Compute("forward", 0), Send(1, blocking=False, channel="a")],
        [Receive(0, "a"), Compute("forward", 0, chunk=2)],
    ]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_written_streams_read_back_the_same(tmp_path: Path, name: str) -> None:
    streams = [[*stream, Constant("step", collective=True)] for stream in SCHEDULES[name](4, 8)]
    save_streams(streams, tmp_path / "schedule.json")
    assert load_streams(tmp_path / "schedule.json") == streams


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "schedule.json: not valid JSON: EOF"),
        ('{"schema": "other", "version": 1, "stages": [[]]}', "schema"),
        ('{"schema": "perseus-schedule", "version": 1, "stages": []}', "stages"),
        (
            '{"schema": "perseus-schedule", "version": 1, "stages": [[{"op": "jump"}]]}',
            r"stages\.0\.0: got .*jump",
        ),
        (
            '{"schema": "perseus-schedule", "version": 1, '
            '"stages": [[{"op": "compute", "kind": "f", "microbatch": -1}]]}',
            "microbatch",
        ),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(ScheduleError, match=message):
        load_streams(path)
    with pytest.raises(ScheduleError, match="cannot be read: No such file"):
        load_streams(tmp_path / "missing.json")


NUMBERS = st.integers(0, 1000)
OPERATIONS: st.SearchStrategy[StreamOp] = st.one_of(
    st.builds(Compute, st.text(min_size=1), NUMBERS, NUMBERS),
    st.builds(Constant, st.text(min_size=1), st.booleans()),
    st.builds(Send, NUMBERS, st.booleans(), st.text()),
    st.builds(Receive, NUMBERS, st.text()),
)


@given(st.lists(OPERATIONS, max_size=8))
def test_a_stream_passes_through_json(stream: list[StreamOp]) -> None:
    assert streams_from_json(json.loads(json.dumps([stream_to_json(stream)]))) == [stream]


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({}, "0.1: "),
        ({"op": "wait", "peer": 1}, "0.1: "),
        ({"op": "compute", "kind": "forward"}, "0.1.compute.microbatch: missing"),
        ({"op": "compute", "kind": "forward", "microbatch": "0"}, '0.1.compute.microbatch: got "0"; allowed: '),
        ({"op": "send", "peer": 1, "blocking": 1}, "0.1.send.blocking: got 1; allowed: "),
        ({"op": "receive", "peer": 1, "channel": "", "kind": ""}, "0.1.receive.kind: unknown key"),
    ],
)
def test_a_row_of_no_known_kind_is_refused(row: dict[str, str | int], where: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        streams_from_json([[*stream_to_json([Receive(1)]), row]])
    assert str(caught.value).startswith(f"streams.{where}")
    assert "\n" not in str(caught.value)
