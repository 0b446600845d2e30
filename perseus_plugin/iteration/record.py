"""What one rank saw of one iteration. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.iteration.timetable import Directive, FullClock

_UNSETTLED = FullClock("the GPU is not there yet")


@dataclass(slots=True)
class IterationRecord:
    """One training iteration as one rank saw it. All times are `time.monotonic()` seconds.

    Attributes:
        number: iterations since the session began, from 0.
        schedule: key of the schedule that ran.
        operations: the hooked operations in program order (compute and constant).
        slots: for each of them its position among the compute ones, -1 for constants.
        undisturbed: the iteration before it ran alike, and nothing came between them.
        begin_s, end_s: the whole iteration, end-of-batch work and loss exchange included.
        starts_s, ends_s: per hooked operation.
        overran: emulated instructions for which the CPU was too slow.
        overhead_s: time spent at the beginnings of controllable instructions, emulation not counted.
        directive: what it is to run as, settled when the GPU gets to it.
        raised: (position among the controllable ones, clock) of instructions that ran faster than planned, being late.
        lowered: (position of the controllable instruction before, -1 for none; clock) of waits spent at a clock of
            their own.
        woken_early: how many of those ended before the clock was back.
        applied: whether that could be done; where not (yet), full clocks ran instead.
        replayed: its schedule ran as one CUDA graph, so that no operation of it was seen.
    """

    number: int
    schedule: str = ""
    operations: Sequence[Compute | Constant] = ()
    slots: Sequence[int] = ()
    undisturbed: bool = False
    begin_s: float = math.nan
    end_s: float = math.nan
    starts_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    overran: int = 0
    overhead_s: float = 0.0
    directive: Directive = _UNSETTLED
    raised: list[tuple[int, int]] = field(default_factory=list)
    lowered: list[tuple[int, int]] = field(default_factory=list)
    woken_early: int = 0
    applied: bool = True
    replayed: bool = False

    @property
    def complete(self) -> bool:
        """Whether every operation of the schedule was seen, from beginning to end."""
        return bool(self.operations) and len(self.ends_s) == len(self.operations) == len(self.starts_s)

    @property
    def timed(self) -> bool:
        """Whether its time is that of the whole schedule, its operations seen or not."""
        return self.replayed or self.complete


def hooked_operations(stream: Sequence[StreamOp]) -> tuple[tuple[Compute | Constant, ...], list[int]]:
    """The operations of a stream that are hooked, and their positions among the compute ones (-1 for constants)."""
    operations = tuple(op for op in stream if isinstance(op, (Compute, Constant)))
    slots: list[int] = []
    compute = 0
    for operation in operations:
        if isinstance(operation, Compute):
            slots.append(compute)
            compute += 1
        else:
            slots.append(-1)
    return operations, slots
