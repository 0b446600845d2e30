"""The streams of a schedule of `torch.distributed.pipelining`, from the lists of actions that it runs.

A schedule of several stages per rank keeps the lists of all ranks. Those of one stage per rank have loops of their own,
which `iteration/actions.py` knows by name; the list that `Schedule1F1B` keeps is not what it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.actions import (
    KIND_OF,
    REDUCE_GRAD,
    Action,
    parsed,
    pytorch_1f1b,
    pytorch_gpipe,
    streams_of_actions,
)
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, StageStream, of_chunk, of_pair

END_OF_BATCH = "end_of_batch"
"""What follows the schedule, up to the last step of an optimizer."""

_ONE_STAGE: dict[str, Callable[[int, int], Sequence[StageStream]]] = {
    "Schedule1F1B": pytorch_1f1b,
    "ScheduleGPipe": pytorch_gpipe,
}
LISTS = "pipeline_order_with_comms"
"""Where a schedule keeps the lists of all ranks."""
_REDUCES = "perform_reduce_grad"


@dataclass(frozen=True)
class Followed:
    """A schedule as the hooks need it.

    Attributes:
        key: different for schedules with different streams; for people too.
        streams: of all ranks.
        operations: what is hooked on this rank, in program order.
        chunk_of: the chunks of this rank by their stage.
        input_gradient: whether the model's first stage computes one.
    """

    key: str
    streams: Sequence[StageStream]
    operations: Sequence[Compute | Constant]
    chunk_of: Mapping[int, int]
    input_gradient: bool

    def operation(self, action: Action) -> Compute | Constant | None:
        """What an action is in the stream; None for what is no operation."""
        chunk = self.chunk_of.get(action.stage)
        if chunk is None:
            raise ScheduleError(f"{action} is of a stage that is not on this rank")
        if action.type == "REDUCE_GRAD":
            return Constant(of_chunk(REDUCE_GRAD, chunk))
        if action.type not in KIND_OF or (action.type == "I" and action.stage == 0 and not self.input_gradient):
            return None
        return Compute(of_chunk(KIND_OF[action.type], chunk), action.microbatch, chunk)

    def operation_written(self, action: str) -> Compute | Constant | None:
        """The same of an action, or a pair that runs as one, as PyTorch writes it."""
        operations = [one for part in parsed(action) if (one := self.operation(part)) is not None]
        computes = [one for one in operations if isinstance(one, Compute)]
        if len(computes) < 2:
            return operations[0] if operations else None
        first = computes[0]
        return Compute(of_pair(*(one.kind for one in computes)), first.microbatch, first.chunk)


def stages_of(schedule: Any) -> list[Any]:
    """The stages that this rank has."""
    stages = getattr(schedule, "_stages", None)
    return list(stages) if stages else [schedule._stage]


def functions_of(schedule: Any) -> dict[Any, Callable[..., Any]]:
    """Functions that run in the place of actions, by their type; what the schedule itself keeps."""
    functions = getattr(schedule, "_comp_type_to_function_map", None)
    return functions if isinstance(functions, dict) else {}


def letter_of(computation_type: Any) -> str:
    """A type of action as PyTorch writes it."""
    return str(getattr(computation_type, "value", computation_type))


def followed(schedule: Any) -> Followed:
    """What a schedule runs, checked for all ranks.

    Raises:
        ScheduleError: it cannot be told.
    """
    stages, microbatches = stages_of(schedule), int(schedule._n_microbatches)
    chunk_of = {stage: chunk for chunk, stage in enumerate(sorted(int(one.stage_index) for one in stages))}
    functions = {letter_of(one) for one in functions_of(schedule)}
    input_gradient = "I" in functions or any(getattr(one, "dw_builder", None) for one in stages)
    name = type(schedule).__name__.removeprefix("_").removeprefix("Schedule")
    size = f"{stages[0].group_size}x{microbatches}"
    lists = getattr(schedule, LISTS, None)
    if lists:
        written = [[str(action) for action in lists[rank] if action is not None] for rank in sorted(lists)]
        pairs = "OVERLAP_F_B" in functions
        streams = streams_of_actions(written, pairs_as_one=pairs, first_has_input_gradient=input_gradient)
        # A list may come from a file, or be made for one job: its name does not say what is in it.
        digest = hashlib.sha256(repr(written).encode()).hexdigest()[:6]
        # Ranks may have different numbers of stages, and have the same key.
        chunks = -(-int(stages[0].num_stages) // int(stages[0].group_size))
        key = f"{name}{'-pairs' if pairs else ''}/{size}x{chunks}-{digest}"
    else:
        known = next((_ONE_STAGE[one.__name__] for one in type(schedule).__mro__ if one.__name__ in _ONE_STAGE), None)
        if known is None:
            raise ScheduleError(
                "it keeps no lists of the actions that it runs; PyTorch's do from 2.10 on, and of any version 1F1B and "
                "GPipe are known"
            )
        streams, key = tuple(known(int(stages[0].num_stages), microbatches)), f"{name}/{size}"
    if not hasattr(stages[0], _REDUCES):
        streams = tuple([op for op in one if not _is_reduction(op)] for one in streams)
    streams = tuple([*one, Constant(END_OF_BATCH, collective=True)] for one in streams)
    build_graph(streams, {})
    operations = [op for op in streams[int(stages[0].group_rank)] if isinstance(op, (Compute, Constant))]
    return Followed(key, streams, operations, chunk_of, input_gradient)


def _is_reduction(op: Any) -> bool:
    return isinstance(op, Constant) and op.name.startswith(REDUCE_GRAD)
