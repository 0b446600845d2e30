"""Megatron's pipeline schedules as instruction streams. Pure: no Megatron, no torch.

The order of forwards and backwards, and which transfers a stage waits for between them, are those of
`megatron.core.pipeline_parallel.schedules`; the tests run that module's own functions beside this one. Megatron posts
sends and receives in groups and waits for a whole group before it goes on, or, with `overlap_p2p_comm`, posts them
early and waits late: see `StageProgram`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute, Constant, StreamOp, of_chunk, of_pair
from perseus_plugin.iteration.stage_program import ACTIVATION, GRADIENT, StageProgram

END_OF_BATCH = "end_of_batch"
"""Gradient reduction and optimizer, from the last backward to the end of the training step."""


class Id(NamedTuple):
    """What tells an instruction from the others of its stage."""

    kind: str
    microbatch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Shape:
    """All that an iteration's schedule depends on.

    Attributes:
        stages: pipeline ranks.
        microbatches: per iteration.
        chunks: model chunks (virtual stages) per pipeline rank; None without virtual stages.
        group_size: microbatches that a chunk runs in a row (`microbatch_group_size_per_vp_stage`).
        overlap: transfers of the steady phase overlap with compute (`overlap_p2p_comm`).
        overlap_ends: those of warm-up and cool-down too (`overlap_p2p_comm_warmup_flush`).
        waits_for_sends: with overlap, a stage waits for each activation that it sends (megatron-core from 0.18 on,
            with `deallocate_pipeline_outputs`).
        pairs: a forward and a backward run as one (`overlap_moe_expert_parallel_comm`).
    """

    stages: int
    microbatches: int
    chunks: int | None = None
    group_size: int = 0
    overlap: bool = False
    overlap_ends: bool = False
    waits_for_sends: bool = False
    pairs: bool = False

    @property
    def key(self) -> str:
        """Different for shapes with different schedules; for people too."""
        size = f"{self.stages}x{self.microbatches}"
        pairs = "-pairs" if self.pairs else ""
        if self.stages == 1:
            return f"no-pipelining{pairs}/{size}"
        if self.chunks is None:
            return f"1F1B/{size}"
        overlap = ("-overlap" if self.overlap else "") + ("-ends" if self.overlap_ends else "")
        waits = "-waits" if self.overlap and self.waits_for_sends else ""
        return f"interleaved-1F1B{pairs}{overlap}{waits}/{size}x{self.chunks}g{self.group_size}"


def stream(shape: Shape, stage: int) -> list[StreamOp]:
    """The operations of one stage in program order.

    Raises:
        ScheduleError: a shape that Megatron has no schedule for.
    """
    if shape.stages == 1:
        operations = _no_pipelining(shape)
    elif shape.chunks is None:
        if shape.pairs:
            raise ScheduleError("Megatron pairs forwards and backwards only with virtual stages or without a pipeline")
        operations = _one_f_one_b(shape, stage)
    else:
        operations = _Interleaved(shape, stage).stream()
    return [*operations, Constant(END_OF_BATCH, collective=True)]


@functools.cache
def forward_id(microbatch: int, chunk: int) -> Id:
    """Of a forward."""
    return Id(of_chunk(FORWARD, chunk), microbatch, chunk)


@functools.cache
def backward_id(microbatch: int, chunk: int) -> Id:
    """Of a backward."""
    return Id(of_chunk(BACKWARD, chunk), microbatch, chunk)


@functools.cache
def pair_id(forward: Id, backward: Id) -> Id:
    """Of a forward and a backward that run as one; known by the forward's microbatch."""
    return Id(of_pair(forward.kind, backward.kind), forward.microbatch, forward.chunk)


def ids(operations: Iterable[StreamOp]) -> list[Id]:
    """The instructions of a stream, in program order."""
    return [Id(op.kind, op.microbatch, op.chunk) for op in operations if isinstance(op, Compute)]


def supports_waiting_for_sends(version: str) -> bool:
    """Whether this version of megatron-core has `Shape.waits_for_sends`."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return numbers >= [0, 18]


def _only(*named: tuple[str, bool]) -> list[str]:
    return [name for name, wanted in named if wanted]


def _no_pipelining(shape: Shape) -> list[StreamOp]:
    forwards = [forward_id(m, 0) for m in range(shape.microbatches)]
    backwards = [backward_id(m, 0) for m in range(shape.microbatches)]
    if not shape.pairs:
        return [Compute(*i) for both in zip(forwards, backwards, strict=True) for i in both]
    pairs = [pair_id(f, b) for f, b in zip(forwards[1:], backwards[:-1], strict=True)]
    return [Compute(*i) for i in (forwards[0], *pairs, backwards[-1])]


def _one_f_one_b(shape: Shape, stage: int) -> list[StreamOp]:
    program = StageProgram(shape.stages, stage)
    ahead = min(shape.stages - stage - 1, shape.microbatches)
    steady = shape.microbatches - ahead
    receives = _only((ACTIVATION, not program.is_first))
    sends = _only((ACTIVATION, not program.is_last))
    receives_back = _only((GRADIENT, not program.is_last))
    sends_back = _only((GRADIENT, not program.is_first))
    for m in range(ahead):
        program.exchange([], receives)
        program.compute(*forward_id(m, 0))
        program.exchange(sends, [])
    if steady:
        program.exchange([], receives)
    for m in range(steady):
        program.compute(*forward_id(ahead + m, 0))
        program.exchange(sends, receives_back)
        program.compute(*backward_id(m, 0))
        program.exchange(sends_back, receives if m < steady - 1 else [])
    for m in range(steady, shape.microbatches):
        program.exchange([], receives_back)
        program.compute(*backward_id(m, 0))
        program.exchange(sends_back, [])
    return program.operations


class _Interleaved:
    """One stage of the schedule with virtual stages. Steps count forwards, or backwards, over all chunks."""

    def __init__(self, shape: Shape, stage: int) -> None:
        chunks, size = shape.chunks or 1, shape.group_size
        if not shape.stages <= size <= shape.microbatches or 0 < shape.microbatches % size < shape.stages:
            raise ScheduleError(
                f"microbatch_group_size_per_vp_stage: got {size} with {shape.stages} stages and {shape.microbatches} "
                "microbatches; allowed: from the number of stages to that of microbatches, with a remainder of 0 or at "
                "least the number of stages"
            )
        self._shape, self._chunks = shape, chunks
        self._order = [
            (microbatch, chunk)
            for first in range(0, shape.microbatches, size)
            for chunk in range(chunks)
            for microbatch in range(first, min(first + size, shape.microbatches))
        ]
        self._total = len(self._order)
        ahead = 2 * (shape.stages - stage - 1) + (chunks - 1) * size + shape.pairs
        self._ahead = min(ahead, self._total)
        self._program = StageProgram(shape.stages, stage)
        # What has been posted and not been waited for yet.
        self._receiving = {ACTIVATION: 0, GRADIENT: 0}
        self._sending = {ACTIVATION: 0, GRADIENT: 0}

    def stream(self) -> list[StreamOp]:
        self._warm_up()
        for step in range(self._total - self._ahead):
            self._steady(step)
        self._cool_down()
        for channel, count in reversed(self._sending.items()):
            for _ in range(count):
                self._program.wait_send(channel)
        return self._program.operations

    def _forward(self, step: int) -> Id:
        return forward_id(*self._order[step])

    def _backward(self, step: int) -> Id:
        microbatch, chunk = self._order[step]
        return backward_id(microbatch, self._chunks - 1 - chunk)

    def _sends(self, channel: str, step: int) -> bool:
        """Whether what this step computes goes to another stage."""
        chunk = self._order[step][1]  # backwards count chunks from the last one
        is_end = self._program.is_last if channel == ACTIVATION else self._program.is_first
        return not (is_end and chunk == self._chunks - 1)

    def _needs(self, channel: str, step: int) -> bool:
        """Whether this step computes on what comes from another stage."""
        is_start = self._program.is_first if channel == ACTIVATION else self._program.is_last
        return not (is_start and self._order[step][1] == 0)

    def _receives(self, channel: str, step: int) -> bool:
        """Whether something is received together with what this step sends: for the next step, or for a later one."""
        is_start = self._program.is_first if channel == ACTIVATION else self._program.is_last
        if step == self._total - 1:
            return False
        if not is_start:
            return True
        # What the pipeline's other end computes meanwhile comes back as the input of the next chunk.
        at_end = step - (self._shape.stages - 1)
        return at_end >= 0 and self._order[at_end][1] < self._chunks - 1

    def _warm_up(self) -> None:
        program, overlap_ends = self._program, self._shape.overlap_ends
        program.exchange([], _only((ACTIVATION, not program.is_first)))
        has_steady = self._ahead < self._total
        for step in range(self._ahead):
            receives = self._receives(ACTIVATION, step)
            is_last = step == self._ahead - 1 and has_steady
            gradient_next = is_last and not program.is_last
            if overlap_ends:
                self._overlapped(ACTIVATION, step, self._forward(step), receives, waits=step > 0)
            else:
                program.compute(*self._forward(step))
                program.exchange(
                    _only((ACTIVATION, self._sends(ACTIVATION, step))),
                    _only((ACTIVATION, receives), (GRADIENT, gradient_next and not self._shape.overlap)),
                )
            if gradient_next and self._shape.overlap:
                self._post_receive(GRADIENT)

    def _steady(self, step: int) -> None:
        forward, last = self._ahead + step, step == self._total - self._ahead - 1
        receives = self._receives(ACTIVATION, forward) and not last
        receives_back = self._receives(GRADIENT, step)
        if not self._shape.overlap:
            self._compute_both(forward, step)
            self._program.exchange(
                _only((ACTIVATION, self._sends(ACTIVATION, forward)), (GRADIENT, self._sends(GRADIENT, step))),
                _only((ACTIVATION, receives), (GRADIENT, receives_back)),
            )
            return
        self._wait_for_input(ACTIVATION, forward)
        if self._shape.pairs:
            self._wait_for_input(GRADIENT, step)
            self._compute_both(forward, step)
        else:
            self._program.compute(*self._forward(forward))
        self._post(ACTIVATION, forward, receives)
        if not self._shape.pairs:
            self._wait_for_input(GRADIENT, step)
            self._program.compute(*self._backward(step))
        self._post(GRADIENT, step, receives_back)

    def _compute_both(self, forward: int, backward: int) -> None:
        if self._shape.pairs:
            self._program.compute(*pair_id(self._forward(forward), self._backward(backward)))
        else:
            self._program.compute(*self._forward(forward))
            self._program.compute(*self._backward(backward))

    def _cool_down(self) -> None:
        program, steady = self._program, self._total - self._ahead
        if not steady:
            program.exchange([], _only((GRADIENT, not program.is_last)))
        for step in range(steady, self._total):
            receives = self._receives(GRADIENT, step)
            if self._shape.overlap_ends:
                self._overlapped(GRADIENT, step, self._backward(step), receives, waits=step > 0)
                continue
            if step > 0:
                self._wait_for_input(GRADIENT, step)
            program.compute(*self._backward(step))
            program.exchange(
                _only((GRADIENT, self._sends(GRADIENT, step))),
                _only((GRADIENT, receives)),
            )

    def _overlapped(self, channel: str, step: int, instruction: Id, receives: bool, waits: bool) -> None:
        """A step of warm-up or cool-down whose transfers overlap with it: most stages receive before they compute."""
        is_start = self._program.is_first if channel == ACTIVATION else self._program.is_last
        if waits:
            self._wait_for_input(channel, step)
        if receives and not is_start:
            self._post_receive(channel)
        self._program.compute(*instruction)
        self._post(channel, step, receives and is_start)

    def _wait_for_input(self, channel: str, step: int) -> None:
        if self._needs(channel, step) and self._receiving[channel]:
            self._receiving[channel] -= 1
            self._program.wait_receive(channel)

    def _post_receive(self, channel: str) -> None:
        self._receiving[channel] += 1
        self._program.post_receive(channel)

    def _post(self, channel: str, step: int, receives: bool) -> None:
        """Post this step's transfers; the send before it is waited for only now."""
        waited, self._sending[channel] = self._sending[channel], 0
        if self._sends(channel, step):
            self._program.post_send(channel)
            self._sending[channel] = 1
        if receives:
            self._post_receive(channel)
        for _ in range(waited):
            self._program.wait_send(channel)
        if channel == ACTIVATION and self._shape.waits_for_sends and self._sending[channel]:
            self._sending[channel] = 0
            self._program.wait_send(channel)
