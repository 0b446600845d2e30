"""PyTorch's own schedules without processes: their lists for any size, as `torch.distributed.pipelining` makes them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch.distributed.pipelining.schedules as pytorch


class Lists(NamedTuple):
    """Per rank the actions as PyTorch writes them; blanks where a rank waits for others."""

    compute_only: list[list[str]]
    with_communication: list[list[str]]


@functools.cache
def lists_of(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Lists:
    """What a schedule of several stages per rank holds.

    Raises:
        ValueError: PyTorch refuses the size.
    """
    # The lists of all ranks depend on nothing else of the stages, which a process each would have.
    stages: list[Any] = [
        SimpleNamespace(
            group_size=ranks, group_rank=0, num_stages=ranks * chunks, stage_index=chunk * ranks, has_backward=True,
            stage_index_to_group_rank={}, submod=None, group=None, device="cpu",
        )
        for chunk in range(chunks)
    ]  # fmt: skip
    schedule: Any = getattr(pytorch, f"Schedule{name}")(stages, microbatches, loss_fn=lambda *_: None)
    return Lists(
        [["" if action is None else str(action) for action in row] for row in schedule.pipeline_order.values()],
        [list(map(str, row)) for row in schedule.pipeline_order_with_comms.values()],
    )
