"""Streams of PyTorch's schedules, from the lists that PyTorch makes; no processes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.actions import (
    Action,
    lists_from_csv,
    parsed,
    pytorch_1f1b,
    pytorch_gpipe,
    streams_of_actions,
    written,
)
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream, StreamOp
from tests.iteration.pytorch_schedules import Lists, lists_of

LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    """Of any schedule, at a size that PyTorch takes."""
    name = draw(st.sampled_from((*LOOPED, *V_SHAPED)))
    ranks = draw(st.integers(1 if name in V_SHAPED else 2, 6))
    at_least = 2 * ranks if name == "DualPipeV" else 1
    microbatches = draw(st.integers(at_least, 4 * ranks))
    if name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        microbatches -= microbatches % max(1, microbatches // ranks)
    return lists_of(name, ranks, microbatches, draw(st.integers(1, 3)) if name in LOOPED else 2)


def without_constants(stream: StageStream) -> list[StreamOp]:
    return [op for op in stream if not isinstance(op, Constant)]


@given(lists(), st.booleans())
def test_every_schedule_of_pytorch_runs_to_its_end_and_trains_on_every_microbatch(made: Lists, as_one: bool) -> None:
    streams = streams_of_actions(made.with_communication, pairs_as_one=as_one)
    graph = build_graph(streams)
    actions = [a for row in made.with_communication for text in row for a in parsed(text)]
    wanted = sum(a.type in "FBIW" and (a.stage, a.type) != (0, "I") for a in actions)
    ran = [op for stream in streams for op in stream if isinstance(op, Compute)]
    paired = sum("forward" in op.kind and "backward" in op.kind for op in ran)
    assert len(ran) + paired == wanted
    assert paired == as_one * sum(text.startswith("(") for row in made.with_communication for text in row)
    assert graph.microbatches == 1 + max(a.microbatch for a in actions)
    sent = [op.channel for stream in streams for op in stream if isinstance(op, Send)]
    assert sorted(sent) == sorted(op.channel for stream in streams for op in stream if isinstance(op, Receive))
    assert sorted(sent) == sorted(str(a) for a in actions if a.type.startswith("SEND"))


@given(lists(), st.booleans())
def test_without_communication_in_the_lists_it_is_where_pytorch_puts_it(made: Lists, as_one: bool) -> None:
    told = streams_of_actions(made.with_communication, pairs_as_one=as_one)
    derived = streams_of_actions(made.compute_only, pairs_as_one=as_one)
    assert list(map(without_constants, told)) == list(map(without_constants, derived))


@given(lists())
def test_a_step_is_written_as_it_was_read(made: Lists) -> None:
    texts = [text for row in made.with_communication for text in row]
    assert [written(parsed(text)) for text in texts] == texts
    out = io.StringIO()
    csv.writer(out).writerows(made.compute_only)
    assert lists_from_csv(out.getvalue()) == made.compute_only


def test_the_ends_of_a_v_hand_over_without_sending() -> None:
    first, last = streams_of_actions(lists_of("ZBVZeroBubble", 2, 3).compute_only)
    assert {op.peer for op in first if isinstance(op, Send)} == {1}
    # The last rank has stages 1 and 2, which are neighbours.
    channels = [op.channel for op in last if isinstance(op, (Send, Receive))]
    assert not [channel for channel in channels if channel.startswith(("1SEND_F", "2SEND_B"))]
    assert {(op.kind, op.chunk) for op in last if isinstance(op, Compute)} == {
        (kind + end, chunk)
        for kind in ("forward", "input_backward", "weight_backward")
        for chunk, end in enumerate(("", "_1"))
    }


def test_the_first_stage_has_no_input_gradient_but_waits_where_it_would_compute_it() -> None:
    rows = [["0F0", "0I0", "0F1", "0W0", "0B1", "0REDUCE_GRAD"], ["1F0", "1I0", "1W0", "1F1", "1B1"]]
    first, last = streams_of_actions(rows)
    names = [op.kind if isinstance(op, Compute) else op for op in first]
    assert names == [
        "forward",
        Send(1, blocking=False, channel="0SEND_F0"),
        Receive(1, "1SEND_B0"),
        "forward",
        Send(1, blocking=False, channel="0SEND_F1"),
        "weight_backward",
        Receive(1, "1SEND_B1"),
        "backward",
        Constant("reduce_grad"),
    ]
    assert Compute("input_backward", 0) in last
    assert Compute("input_backward", 0) in streams_of_actions(rows, first_has_input_gradient=True)[0]


def test_a_pair_as_one_waits_for_all_before_and_sends_all_after() -> None:
    # Rank 0 has the model's two ends.
    stream = streams_of_actions(lists_of("DualPipeV", 2, 6).compute_only, pairs_as_one=True)[0]
    inner = next(n for n, op in enumerate(stream) if isinstance(op, Compute) and op.kind == "forward_1_backward")
    assert [op.peer for op in stream[inner - 2 : inner] if isinstance(op, Receive)] == [1, 1]
    outer = next(n for n, op in enumerate(stream) if isinstance(op, Compute) and op.kind == "forward_backward_1")
    assert [op.channel[1:-1] for op in stream[outer + 1 : outer + 3] if isinstance(op, Send)] == ["SEND_F", "SEND_B"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["0F0", "0X0"]], r"rank 0: got '0X0'; allowed: what PyTorch's schedules write"),
        ([["0F"]], "got '0F'"),
        ([["0F" + "9" * 5_000]], "got '0F999"),
        ([], r"got stages \[\] on 0 ranks"),
        ([["0UNSHARD1"]], "got '0UNSHARD1'"),
        ([["(0F0;0REDUCE_GRAD)OVERLAP_F_B"]], "OVERLAP_F_B"),
        ([["0F0", "0B0"], ["0F1", "0B1"]], "stage 0 stands in the lists of ranks 0 and 1"),
        ([["0F0", "0B0"], ["2F0", "2B0"]], r"got stages \[0, 2\] on 2 ranks"),
        ([["0F0", "0B0"], []], r"got stages \[0\] on 2 ranks"),
        ([["0F0", "0F0", "0B0"]], "rank 0: 0F0 stands in the list twice"),
        ([["0F0", "0B0", "0F999999999", "0B999999999"]], "got 2 microbatches up to 999999999"),
        ([["0F0", "0I0"]], "stage 0, microbatch 0: got F, I; allowed: F and B, or F, I and W"),
        ([["0F0", "0B0", "0W0"]], "got F, B, W"),
        ([["0B0", "0F0"]], "rank 0: 0B0 comes before 0F0"),
        ([["0F0", "0W0", "0I0"]], "rank 0: 0W0 comes before 0I0"),
        ([["1F0", "0F0", "1B0", "0B0"]], "rank 0: 1F0 comes before 0F0"),
        ([["0F0", "1F0", "0B0", "1B0"]], "rank 0: 0B0 comes before 1B0 or 1I0"),
        ([["0F0", "0SEND_F0", "0B0"], ["1F0", "1B0", "1SEND_B0"]], "rank 0: 0B0 comes before 0RECV_B0"),
        ([["0F0", "0SEND_B0", "0B0"], ["1F0", "1B0"]], "rank 0: 0SEND_B0 has no stage on another rank"),
        ([["0SEND_F0", "0F0", "0B0"], ["1RECV_F0", "1F0", "1B0"]], "rank 0: 0SEND_F0 comes before 0F0"),
    ],
)
def test_what_pytorch_would_refuse_is_refused(rows: Sequence[Sequence[str]], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        streams_of_actions(rows)


@given(st.text(alphabet="0123FBIWSENDRCVU_();GOLAP", max_size=20))
def test_no_text_does_worse_than_be_refused(text: str) -> None:
    try:
        step = parsed(text)
    except ScheduleError:
        return
    assert parsed(written(step)) == step if step else not text


def computes(stream: StageStream) -> str:
    return " ".join(f"{op.kind[0]}{op.microbatch}" for op in stream if isinstance(op, Compute))


def test_1f1b_runs_in_pytorchs_order() -> None:
    streams = pytorch_1f1b(3, 4)
    assert computes(streams[0]) == "f0 f1 f2 b0 f3 b1 b2 b3"
    assert computes(streams[2]) == "f0 b0 f1 b1 f2 b2 f3 b3"
    with pytest.raises(ScheduleError, match="got 3 stages, 2 microbatches"):
        pytorch_1f1b(3, 2)


def test_gpipe_runs_in_pytorchs_order() -> None:
    assert computes(pytorch_gpipe(2, 3)[0]) == "f0 f1 f2 b0 b1 b2"
    with pytest.raises(ScheduleError, match="microbatches: got 0"):
        pytorch_gpipe(2, 0)


@pytest.mark.parametrize("make", [pytorch_1f1b, pytorch_gpipe])
@given(stages=st.integers(1, 7), more=st.integers(0, 9))
def test_schedules_of_one_stage_per_rank_run_to_their_end(make: object, stages: int, more: int) -> None:
    assert callable(make)
    graph = build_graph(make(stages, stages + more))
    instructions = [i for i in graph.instructions if i is not None]
    assert len(instructions) == 2 * stages * (stages + more)
    # With equal instructions, no schedule of one stage per rank is faster than this.
    assert graph.iteration_time_s(np.ones(len(graph))) >= 2 * (stages + more) + 2 * (stages - 1)


def test_who_sends_and_receives_at_once_waits_for_both() -> None:
    """The second stage of two: its first gradient goes out with the wait for the next activation."""
    stream = pytorch_1f1b(2, 2)[1]
    at = next(n for n, op in enumerate(stream) if isinstance(op, Compute) and op.kind == "backward")
    assert stream[at + 1 : at + 5] == [
        Send(0, blocking=False, channel="gradient"),
        Send(0, blocking=False, channel="ready for activation"),
        Receive(0, "activation"),
        Receive(0, "ready for gradient"),
    ]


def test_an_action_is_written_as_pytorch_does() -> None:
    assert str(Action(3, "SEND_F", 1)) == "3SEND_F1"
    assert str(Action(0, "UNSHARD")) == "0UNSHARD"
