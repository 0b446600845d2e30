"""Instruction streams of the textbook pipeline schedules. Pure.

For planning without a framework; an integration brings the streams of its own schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.actions import Step, check_size, streams_of_steps
from perseus_plugin.iteration.instructions import (
    BACKWARD,
    FORWARD,
    Compute,
    Receive,
    Send,
    StageStream,
    StreamOp,
)
from perseus_plugin.iteration.zero_bubble import dualpipev, interleaved_zero_bubble, zbv

RECOMPUTE = "recompute"


class TextbookSchedule(Protocol):
    """A pipeline schedule without a framework: what every stage does in an iteration, in program order.

    What a stage sends another one receives, by peer and channel, in the same order; a stage that is never sent what it
    waits for is a `ScheduleError` of `build_graph`. Instructions of one kind take the same time in a stage; what does
    not is another kind, and every kind needs rows in the profile, or in it those that `profiling.derived` makes them
    of. A microbatch is computed with one kind once.

    Raises:
        ScheduleError: there is no such schedule of so many stages and microbatches.
    """

    def __call__(self, stages: int, microbatches: int) -> list[StageStream]:
        """One stream per stage."""


def _forward(stage: int, stages: int, microbatch: int) -> list[StreamOp]:
    ops: list[StreamOp] = [] if stage == 0 else [Receive(stage - 1, FORWARD)]
    ops.append(Compute(FORWARD, microbatch))
    if stage < stages - 1:
        ops.append(Send(stage + 1, blocking=False, channel=FORWARD))
    return ops


def _backward(stage: int, stages: int, microbatch: int) -> list[StreamOp]:
    ops: list[StreamOp] = [] if stage == stages - 1 else [Receive(stage + 1, BACKWARD)]
    ops.append(Compute(BACKWARD, microbatch))
    if stage > 0:
        ops.append(Send(stage - 1, blocking=False, channel=BACKWARD))
    return ops


def one_f_one_b(stages: int, microbatches: int) -> list[StageStream]:
    """1F1B (PipeDream-flush): `stages - 1 - stage` forwards ahead, then one forward and one backward in turn.

    Raises:
        ScheduleError: for fewer than one stage or microbatch.
    """
    check_size(stages, microbatches)
    streams: list[StageStream] = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, microbatches)
        ops = [op for m in range(ahead) for op in _forward(stage, stages, m)]
        for m in range(microbatches - ahead):
            ops += _forward(stage, stages, ahead + m) + _backward(stage, stages, m)
        for m in range(microbatches - ahead, microbatches):
            ops += _backward(stage, stages, m)
        streams.append(ops)
    return streams


def gpipe(stages: int, microbatches: int) -> list[StageStream]:
    """GPipe: all forwards, then all backwards, the last microbatch first.

    Raises:
        ScheduleError: for fewer than one stage or microbatch.
    """
    check_size(stages, microbatches)
    return [
        [op for m in range(microbatches) for op in _forward(stage, stages, m)]
        + [op for m in reversed(range(microbatches)) for op in _backward(stage, stages, m)]
        for stage in range(stages)
    ]


def early_recomputation_1f1b(stages: int, microbatches: int) -> list[StageStream]:
    """1F1B with activation recomputation as an instruction of its own, begun before the gradient arrives (Merak).

    The kind `"recompute"` needs rows in the profile. The last stage computes its backward right after its forward and
    recomputes nothing.

    Raises:
        ScheduleError: for fewer than one stage or microbatch.
    """
    streams: list[StageStream] = []
    for stage, stream in enumerate(one_f_one_b(stages, microbatches)):
        ops: list[StreamOp] = []
        for op in stream:
            if isinstance(op, Compute) and op.kind == BACKWARD and stage < stages - 1:
                ops.insert(len(ops) - 1, Compute(RECOMPUTE, op.microbatch))  # ahead of the backward's receive
            ops.append(op)
        streams.append(ops)
    return streams


def interleaved_1f1b(stages: int, microbatches: int, chunks: int = 2) -> list[StageStream]:
    """Interleaved 1F1B (Narayanan et al., SC'21): each rank holds `chunks` model chunks.

    Raises:
        ScheduleError: for fewer than two stages, fewer than one chunk, or microbatches that are no multiple of stages.
    """
    check_size(stages, microbatches, max(1, chunks))
    if stages < 2 or chunks < 1 or microbatches % stages:
        raise ScheduleError(
            f"interleaved 1F1B: got {stages} stages, {chunks} chunks, {microbatches} microbatches; "
            "allowed: stages from 2, chunks from 1, microbatches a multiple of stages"
        )
    total = microbatches * chunks
    last = stages * chunks - 1

    def place(step: int, backward: bool) -> tuple[int, int]:
        """Chunk and microbatch of a rank's `step`-th forward or backward."""
        chunk = step % (stages * chunks) // stages
        return (chunks - 1 - chunk if backward else chunk), step // (stages * chunks) * stages + step % stages

    def forward(rank: int, step: int) -> list[StreamOp]:
        chunk, microbatch = place(step, backward=False)
        virtual = chunk * stages + rank
        ops: list[StreamOp] = [Compute(FORWARD, microbatch, chunk)]
        if virtual > 0:
            ops.insert(0, Receive((rank - 1) % stages, f"{FORWARD}{virtual}"))
        if virtual < last:
            ops.append(Send((rank + 1) % stages, blocking=False, channel=f"{FORWARD}{virtual + 1}"))
        return ops

    def backward(rank: int, step: int) -> list[StreamOp]:
        chunk, microbatch = place(step, backward=True)
        virtual = chunk * stages + rank
        ops: list[StreamOp] = [Compute(BACKWARD, microbatch, chunk)]
        if virtual < last:
            ops.insert(0, Receive((rank + 1) % stages, f"{BACKWARD}{virtual}"))
        if virtual > 0:
            ops.append(Send((rank - 1) % stages, blocking=False, channel=f"{BACKWARD}{virtual - 1}"))
        return ops

    streams: list[StageStream] = []
    for rank in range(stages):
        ahead = min(total, 2 * (stages - rank - 1) + (chunks - 1) * stages)
        if microbatches == stages:
            ahead = total  # as Megatron does: too few microbatches for a steady state
        ops = [op for step in range(ahead) for op in forward(rank, step)]
        for step in range(total - ahead):
            ops += forward(rank, ahead + step) + backward(rank, step)
        for step in range(total - ahead, total):
            ops += backward(rank, step)
        streams.append(ops)
    return streams


def _streamed(lists: Callable[..., list[list[Step]]]) -> Callable[..., list[StageStream]]:
    def schedule(stages: int, microbatches: int, *chunks: int) -> list[StageStream]:
        return list(streams_of_steps(lists(stages, microbatches, *chunks)))

    return schedule


SCHEDULES: dict[str, TextbookSchedule] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "early-recomputation-1f1b": early_recomputation_1f1b,
    "interleaved-1f1b": interleaved_1f1b,
    "interleaved-zero-bubble": _streamed(interleaved_zero_bubble),
    "zbv": _streamed(zbv),
    "dualpipev": _streamed(dualpipev),
}
"""By the name that the command line knows them by; a new one is one line here."""

OF_CHUNKS: dict[str, Callable[[int, int, int], list[StageStream]]] = {
    "interleaved-1f1b": interleaved_1f1b,
    "interleaved-zero-bubble": _streamed(interleaved_zero_bubble),
}
"""Those of them that exist for any number of model chunks per stage, which comes third."""
