"""The streams as such; that they are Megatron's is checked against Megatron in tests/e2e/test_megatron_schedules.py."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from perseus_plugin.errors import ScheduleError
from perseus_plugin.integrations.megatron.schedule import (
    END_OF_BATCH,
    Id,
    Shape,
    backward_id,
    forward_id,
    ids,
    pair_id,
    stream,
    supports_waiting_for_sends,
)
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.schedules import one_f_one_b


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    stages = draw(st.integers(1, 6))
    microbatches = draw(st.integers(1, 14))
    if stages == 1 or draw(st.booleans()):
        return Shape(stages, microbatches, pairs=stages == 1 and draw(st.booleans()))
    assume(microbatches >= stages)
    group_size = draw(st.integers(stages, microbatches))
    assume(microbatches % group_size == 0 or microbatches % group_size >= stages)
    chunks = draw(st.integers(2, 3))
    overlap = draw(st.booleans())
    pairs = draw(st.booleans())
    ends = overlap and not pairs and draw(st.booleans())
    return Shape(stages, microbatches, chunks, group_size, overlap, ends, draw(st.booleans()), pairs)


@given(shapes())
def test_every_shape_is_a_schedule(shape: Shape) -> None:
    """It does not deadlock, all transfers match, and every microbatch goes forward and back once per chunk."""
    streams = [stream(shape, stage) for stage in range(shape.stages)]
    build_graph(streams)
    for operations in streams:
        names = ids(operations)
        assert len(set(names)) == len(names)
        passes = sum(2 if "forward" in i.kind and "backward" in i.kind else 1 for i in names)
        assert passes == 2 * shape.microbatches * (shape.chunks or 1)
        assert operations[-1] == Constant(END_OF_BATCH, collective=True)


@given(st.integers(1, 6), st.integers(1, 12))
def test_without_virtual_stages_the_order_is_that_of_1f1b(stages: int, microbatches: int) -> None:
    for stage, textbook in enumerate(one_f_one_b(stages, microbatches)):
        computes = [op for op in textbook if isinstance(op, Compute)]
        assert [op for op in stream(Shape(stages, microbatches), stage) if isinstance(op, Compute)] == computes


def test_a_send_waits_for_its_receiver() -> None:
    """In warm-up the first stage cannot run ahead of the second one, which a buffered send would let it."""
    graph = build_graph([stream(Shape(3, 4), stage) for stage in range(3)])
    node = {(i.stage, i.kind, i.microbatch): n for n, i in enumerate(graph.instructions) if i is not None}
    # Stage 1 receives microbatch 1 only after its forward of microbatch 0 has gone to stage 2.
    edges = set(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True))
    assert (node[1, "forward", 0], node[0, "forward", 2]) in edges


def test_chunks_have_kinds_of_their_own() -> None:
    assert forward_id(3, 0) == Id("forward", 3, 0)
    assert backward_id(3, 2) == Id("backward_2", 3, 2)
    assert pair_id(forward_id(3, 1), backward_id(0, 0)) == Id("forward_1_backward", 3, 1)


def test_shapes_with_other_schedules_have_other_keys() -> None:
    different = [
        Shape(1, 4),
        Shape(1, 4, pairs=True),
        Shape(2, 4),
        Shape(2, 8),
        Shape(2, 4, 2, 2),
        Shape(2, 4, 2, 4),
        Shape(2, 4, 2, 2, overlap=True),
        Shape(2, 4, 2, 2, overlap=True, overlap_ends=True),
        Shape(2, 4, 2, 2, overlap=True, waits_for_sends=True),
        Shape(2, 4, 2, 2, pairs=True),
    ]
    assert len({shape.key for shape in different}) == len(different)
    assert Shape(2, 4, 2, 2).key == "interleaved-1F1B/2x4x2g2"


@pytest.mark.parametrize("group_size", [1, 5, 3])
def test_a_group_size_that_megatron_refuses_is_refused(group_size: int) -> None:
    with pytest.raises(ScheduleError, match=f"microbatch_group_size_per_vp_stage: got {group_size}"):
        stream(Shape(2, 4, 2, group_size), 0)


def test_pairs_in_plain_1f1b_are_refused() -> None:
    with pytest.raises(ScheduleError, match="virtual stages"):
        stream(Shape(2, 4, pairs=True), 0)


@pytest.mark.parametrize(
    ("version", "expected"), [("0.12.3", False), ("0.17.1+abc", False), ("0.18.0rc1", True), ("1.0", True)]
)
def test_which_versions_wait_for_sends(version: str, expected: bool) -> None:
    assert supports_waiting_for_sends(version) is expected
