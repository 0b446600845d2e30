"""Rows that nobody measured."""

from __future__ import annotations

import pytest

from perseus_plugin.iteration.instructions import Compute, StreamOp, of_chunk, of_pair, parts_of
from perseus_plugin.profiling.derived import whole, with_rows_for
from perseus_plugin.profiling.profile import Profile
from tests.factories import profile


def streams(*kinds_of_stages: str) -> list[list[StreamOp]]:
    return [[Compute(kind, 0) for kind in kinds.split()] for kinds in kinds_of_stages]


def figures(of: Profile, stage: int, kind: str) -> list[tuple[float, float]]:
    return [(m.time_s, m.energy_j) for m in of.table[stage, kind]]


def shared(figures: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    return [(pytest.approx(share * time_s), pytest.approx(share * energy_j)) for time_s, energy_j in figures]


def test_halves_of_a_backward_share_its_time_and_energy() -> None:
    measured = profile(2)
    split = "forward input_backward weight_backward forward_1 input_backward_1 weight_backward_1"
    made = with_rows_for(measured, streams(split, split), 0.6)
    for chunk in range(2):
        assert figures(made, 1, of_chunk("forward", chunk)) == figures(measured, 1, "forward")
        backward = figures(measured, 1, "backward")
        assert figures(made, 1, of_chunk("input_backward", chunk)) == shared(backward, 0.6)
        assert figures(made, 1, of_chunk("weight_backward", chunk)) == shared(backward, 0.4)


def test_where_no_input_gradient_is_computed_the_weights_take_the_whole_backward() -> None:
    measured = profile(2)
    made = with_rows_for(measured, streams("weight_backward input_backward_1 weight_backward_1", "backward"), 0.5)
    assert figures(made, 0, "weight_backward") == figures(measured, 0, "backward")
    assert figures(made, 0, "weight_backward_1") == shared(figures(measured, 0, "backward"), 0.5)


def test_a_backward_takes_what_its_measured_halves_take() -> None:
    kinds = ("forward", "input_backward", "weight_backward")
    split = profile(2, kinds)
    made = with_rows_for(split, streams("backward", "backward"))
    for at, (time_s, energy_j) in enumerate(figures(made, 1, "backward")):
        halves = [figures(split, 1, kind)[at] for kind in kinds[1:]]
        assert (time_s, energy_j) == (sum(t for t, _ in halves), sum(e for _, e in halves))
    # The model's first chunk computes no gradient of its input.
    without = Profile({key: rows for key, rows in split.table.items() if key != (0, "input_backward")})
    made = with_rows_for(without, streams("backward", "backward"))
    assert figures(made, 0, "backward") == figures(split, 0, "weight_backward")


def test_what_was_measured_is_left_as_it_is_and_what_cannot_be_derived_left_out() -> None:
    measured = profile(2, ("forward", "backward", "input_backward"))
    made = with_rows_for(measured, streams("input_backward recompute forward_backward_1", "backward"), 0.3)
    assert made.table == measured.table


@pytest.mark.parametrize("names", [["forward"], ["input_backward"], ["forward", "backward"], ["backward", "forward"]])
@pytest.mark.parametrize("chunks", [(0, 0), (0, 1), (2, 10)])
def test_a_kind_tells_its_parts(names: list[str], chunks: tuple[int, int]) -> None:
    parts = tuple(zip(names, chunks, strict=False))
    assert parts_of(of_pair(*(of_chunk(*part) for part in parts))) == parts


@pytest.mark.parametrize("kind", ["recompute", "weight", "forward_", "forward_0", "backwards", "_forward", ""])
def test_other_names_have_no_parts(kind: str) -> None:
    assert parts_of(kind) == ()
    assert whole(kind) == kind


def test_the_whole_of_a_part() -> None:
    assert whole("weight_backward_1") == whole("input_backward") == whole("backward_3") == "backward"
    assert whole("forward_1") == "forward"
