"""Schedules with split backwards: PyTorch's own, list by list."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.actions import Step, streams_of_steps, written
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.zero_bubble import dualpipev, interleaved_zero_bubble, zbv
from tests.iteration.pytorch_schedules import lists_of

Lists = Callable[[int, int], list[list[Step]]]
OURS: dict[str, Lists] = {
    "InterleavedZeroBubble": interleaved_zero_bubble,
    "ZBVZeroBubble": zbv,
    "DualPipeV": dualpipev,
}


def texts(lists: list[list[Step]]) -> list[list[str]]:
    return [[written(step) for step in steps] for steps in lists]


def of_pytorch(name: str, ranks: int, microbatches: int, chunks: int = 2) -> list[list[str]] | None:
    """Without the blanks; None for a size that it refuses."""
    try:
        lists = lists_of(name, ranks, microbatches, chunks)
    except ValueError:
        return None
    return [[text for text in row if text] for row in lists.compute_only]


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("name", OURS)
def test_the_lists_are_pytorchs(name: str, ranks: int) -> None:
    for microbatches in range(1, 4 * ranks + 2):
        wanted = of_pytorch(name, ranks, microbatches)
        if wanted is None:
            with pytest.raises(ScheduleError, match="allowed: "):
                OURS[name](ranks, microbatches)
        else:
            assert texts(OURS[name](ranks, microbatches)) == wanted


@pytest.mark.parametrize("chunks", [1, 3])
def test_interleaved_lists_of_any_number_of_chunks_are_pytorchs(chunks: int) -> None:
    for ranks, microbatches in ((1, 3), (2, 6), (4, 3), (4, 8), (5, 14)):
        made = texts(interleaved_zero_bubble(ranks, microbatches, chunks))
        assert made == of_pytorch("InterleavedZeroBubble", ranks, microbatches, chunks)


@pytest.mark.parametrize("name", OURS)
def test_on_a_large_pipeline_they_run_to_their_end(name: str) -> None:
    graph = build_graph(streams_of_steps(OURS[name](16, 64)))
    assert (graph.stages, graph.microbatches) == (16, 64)


def test_where_all_three_take_the_same_zbv_has_only_the_bubble_of_its_ends() -> None:
    """The paper's ideal: a rank waits for one forward per rank, in chunks of half a stage, and no more."""
    ranks, microbatches = 4, 12
    lists = zbv(ranks, microbatches)
    graph = build_graph(streams_of_steps(lists, first_has_input_gradient=True))
    work = 6 * microbatches  # of a rank: two chunks, three instructions
    assert graph.iteration_time_s([1.0] * len(graph)) <= work + ranks
