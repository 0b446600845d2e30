"""Translation of a DeepSpeed pipeline schedule into instruction streams.

Works on the schedule's own instruction objects by class name, so it needs no DeepSpeed import and takes the classes of
forks along: any instruction that is neither communication nor constant-time work counts as controllable compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute, Constant, Receive, Send, StreamOp

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
