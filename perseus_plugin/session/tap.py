"""What the integration's instruction hooks call on the training thread: as little as possible.

A tap knows where in the iteration it is, keeps two timestamps per instruction, tells the controller, and stretches the
instruction where the GPU is emulated. Everything else happens on the session's own thread, from the finished record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from perseus_plugin.control.boundaries import Boundaries
from perseus_plugin.control.controller import Controller
from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.iteration.timetable import Directive, FullClock

_UNSETTLED = FullClock("the GPU is not there yet")


@dataclass(slots=True)
class IterationRecord:
    """One training iteration as one rank saw it. All times are `time.monotonic()` seconds.

    Attributes:
        number: iterations since the session began, from 0.
        directive: what it runs as, settled when the GPU gets to it.
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
        applied: whether that could be done; where not (yet), full clocks ran instead.
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
    applied: bool = True

    @property
    def complete(self) -> bool:
        """Whether every operation of the schedule was seen, from beginning to end."""
        return bool(self.operations) and len(self.ends_s) == len(self.operations) == len(self.starts_s)


class Execution(Protocol):
    """The emulated GPU's side of an instruction."""

    def begin(self, operation: Compute) -> None:
        """The instruction begins."""
        ...

    def finish(self) -> bool:
        """Wait until the emulated GPU is done; returns whether the CPU took longer than that."""
        ...


class InstructionTap:
    """Called at the beginning and the end of every hooked operation.

    Args:
        boundaries: when the GPU gets there.
        controller: who turns boundaries into clock requests; None in observe mode.
        on_error: called with the exception when anything here fails; the tap is dead from then on.
    """

    def __init__(
        self, boundaries: Boundaries, controller: Controller | None, on_error: Callable[[Exception], None]
    ) -> None:
        self._reach = boundaries.reach
        self._controller = controller
        self._on_error = on_error
        self.execution: Execution | None = None
        self._record: IterationRecord | None = None

    def arm(self, record: IterationRecord) -> None:
        """Begin an iteration; `record` names its hooked operations and takes the times."""
        self._record = record

    def disarm(self) -> None:
        """The iteration is over; calls do nothing until the next `arm`."""
        self._record = None

    def begin(self) -> None:
        """A hooked operation begins."""
        record = self._record
        if record is None:
            return
        try:
            called_s = monotonic()
            self._reach(self._began, record)
            record.overhead_s += monotonic() - called_s
            if self.execution is not None:
                operation = record.operations[len(record.starts_s) - 1]
                if isinstance(operation, Compute):
                    self.execution.begin(operation)
        except Exception as error:
            self._fail(error)

    def end(self) -> None:
        """The hooked operation that began last has ended."""
        record = self._record
        if record is None:
            return
        try:
            if self.execution is not None and record.slots[len(record.ends_s)] >= 0:
                record.overran += self.execution.finish()
            self._reach(self._ended, record)
        except Exception as error:
            self._fail(error)

    def _began(self, now_s: float, record: IterationRecord) -> None:
        if len(record.starts_s) == len(record.slots):
            raise ScheduleError(f"{record.schedule} ran more instructions than the {len(record.slots)} that it names")
        slot = record.slots[len(record.starts_s)]
        record.starts_s.append(now_s)
        if slot >= 0 and self._controller is not None:
            raised_mhz = self._controller.begin(slot, now_s)
            if raised_mhz is not None:
                record.raised.append((slot, raised_mhz))

    def _ended(self, now_s: float, record: IterationRecord) -> None:
        if record.slots[len(record.ends_s)] >= 0 and self._controller is not None:
            self._controller.end(now_s)
        record.ends_s.append(now_s)

    def _fail(self, error: Exception) -> None:
        self._record = None
        self._on_error(error)


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
