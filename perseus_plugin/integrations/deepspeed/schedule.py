"""Translation of a DeepSpeed pipeline schedule into instruction streams, and those that a job has seen.

Works on the schedule's own instruction objects by class name, so it needs no DeepSpeed import and takes the classes of
forks along: any instruction that is neither communication nor constant-time work counts as controllable compute.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from perseus_plugin.errors import ScheduleError
from perseus_plugin.integrations.base import job_rank
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute, Constant, Receive, Send, StreamOp

logger = logging.getLogger(__name__)

OPTIMIZER_STEP = "optimizer_step"
_CONSTANT = {
    "LoadMicroBatch": "load_microbatch",
    "ReduceTiedGrads": "reduce_tied_grads",
    "ReduceGrads": "reduce_grads",
    "OptimizerStep": OPTIMIZER_STEP,
}
_KINDS = {"ForwardPass": FORWARD, "BackwardPass": BACKWARD}
# (is a send, goes downstream): activations go downstream, gradients upstream.
_TRANSFERS = {
    "SendActivation": (True, True),
    "RecvActivation": (False, False),
    "SendGrad": (True, False),
    "RecvGrad": (False, True),
}
_COMMIT = "CommitP2P"

_COLLECTIVE = {"reduce_tied_grads", "reduce_grads", OPTIMIZER_STEP}


def operation_name(instruction_class: type) -> str | None:
    """The name under which an instruction class is hooked: a constant's name or a compute kind; None for transfers."""
    name = instruction_class.__name__
    if name in _TRANSFERS or name == _COMMIT:
        return None
    return _CONSTANT.get(name) or _kind(name)


def operation_of(operation: Compute | Constant) -> str:
    """The same name, of an operation of a stream."""
    if isinstance(operation, Constant):
        return operation.name
    return operation.kind.removesuffix(f"_{operation.chunk}") if operation.chunk else operation.kind


def translate(steps: Iterable[list[Any]], stage: int) -> list[StreamOp]:
    """Translate one stage's schedule.

    Args:
        steps: what iterating over a `PipeSchedule` yields: lists of `PipeInstruction`.
        stage: the stage the schedule was made for.

    Returns:
        The stage's stream. Microbatch ids are carried through the pipeline buffers, since `buffer_id` is reused.
    """
    stream: list[StreamOp] = []
    forwards: dict[int, int] = {}
    in_buffer: dict[tuple[int, int], int] = {}
    batched = False
    instructions = [instruction for step in steps for instruction in step]
    if any(type(instruction).__name__ == _COMMIT for instruction in instructions):
        batched = True
    for instruction in instructions:
        name = type(instruction).__name__
        phase = int(getattr(instruction, "phase", 0))
        if name in _TRANSFERS:
            stream.append(_transfer(name, stage, phase, batched))
        elif name in _CONSTANT:
            constant = _CONSTANT[name]
            stream.append(Constant(constant, collective=constant in _COLLECTIVE))
        elif name != _COMMIT:
            buffer = (phase, int(getattr(instruction, "buffer_id", 0)))
            kind = _kind(name)
            if kind == FORWARD:
                in_buffer[buffer] = forwards.get(phase, 0)
                forwards[phase] = in_buffer[buffer] + 1
            label = kind if phase == 0 else f"{kind}_{phase}"
            stream.append(Compute(label, in_buffer.get(buffer, 0), phase))
    return stream


def _transfer(name: str, stage: int, phase: int, batched: bool) -> StreamOp:
    sends, downstream = _TRANSFERS[name]
    # With two phases per rank (DualPipeV) the second one runs backwards through the ranks.
    step = 1 if downstream == (phase == 0) else -1
    channel = f"{'activation' if 'Activation' in name else 'gradient'}{phase}"
    if sends:
        # Transfers that are queued and committed together wait as a group, so no single send blocks.
        return Send(stage + step, blocking=not batched, channel=channel)
    return Receive(stage + step, channel=channel)


def _kind(class_name: str) -> str:
    if class_name in _KINDS:
        return _KINDS[class_name]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name.removesuffix("Pass")).lower()
    return words or class_name.lower()


StreamOfStage = Callable[[int], list[StreamOp]]


class StreamCache:
    """Streams of the schedules seen; a schedule is known by its class and shape.

    A class that cannot be understood (a fork's, whose constructor wants more, or whose instructions make no pipeline)
    is named once, and its iterations run at full clocks. All ranks build all stages' streams, so all find the same.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[type, Any, Any], tuple[str, StreamOfStage] | Exception] = {}
        self._named: set[type] = set()

    def get(self, schedule: Any) -> tuple[str, StreamOfStage] | None:
        """Name and streams of a schedule; None for one that is not understood."""
        known = self._look_up(schedule)
        if isinstance(known, Exception):
            self._say(type(schedule), known)
            return None
        return known

    def trains(self, schedule: Any) -> bool:
        """Whether a schedule is one of training: it has a step of the optimizer."""
        known = self._look_up(schedule)
        return not isinstance(known, Exception) and any(getattr(op, "name", "") == OPTIMIZER_STEP for op in known[1](0))

    def refuse(self, schedule: Any, error: ScheduleError) -> None:
        """A schedule that ran otherwise than its class says is not followed from now on; every rank names its own."""
        self._known[_shape(schedule)] = error
        self._say(type(schedule), error, everywhere=True)

    def _look_up(self, schedule: Any) -> tuple[str, StreamOfStage] | Exception:
        shape = _shape(schedule)
        if shape not in self._known:
            try:
                self._known[shape] = _streams(*shape)
            except Exception as error:
                self._known[shape] = error
        return self._known[shape]

    def _say(self, schedule_class: type, error: Exception, everywhere: bool = False) -> None:
        if schedule_class in self._named:
            return
        self._named.add(schedule_class)
        if everywhere or job_rank() == 0:
            logger.warning(
                "the schedule %s.%s is not one that perseus can follow (%s): its iterations run at full clocks, and "
                "training is not affected. A schedule is followed that can be made from micro_batches, stages and "
                "stage_id alone, and then yields what it runs",
                schedule_class.__module__,
                schedule_class.__qualname__,
                error,
            )


def _shape(schedule: Any) -> tuple[type, Any, Any]:
    return type(schedule), getattr(schedule, "micro_batches", None), getattr(schedule, "stages", None)


def _streams(schedule_class: type, microbatches: Any, stages: Any) -> tuple[str, StreamOfStage]:
    """Name and streams of a shape of a schedule, checked for all stages.

    Raises:
        Exception: whatever a foreign class raises when it is made, or ours if its streams make no pipeline.
    """
    if not (isinstance(microbatches, int) and isinstance(stages, int)):
        raise ScheduleError("it has no numbers of micro_batches and stages")

    @functools.cache
    def stream_of(stage: int) -> list[StreamOp]:
        made = schedule_class(micro_batches=microbatches, stages=stages, stage_id=stage)
        return translate(made.steps(), stage)

    build_graph([stream_of(stage) for stage in range(stages)], {})
    return f"{schedule_class.__name__}/{stages}x{microbatches}", stream_of
