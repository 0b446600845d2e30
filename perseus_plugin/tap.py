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

from perseus_plugin.control.controller import Controller
from perseus_plugin.instructions import Compute, Constant, StreamOp


@dataclass(slots=True)
class IterationRecord:
    """One training iteration as one rank saw it. All times are `time.monotonic()` seconds.

    Attributes:
        number: iterations since the session began, from 0.
        schedule: key of the schedule that ran.
        operations: the hooked operations in program order (compute and constant).
        begin_s, end_s: the whole iteration, end-of-batch work and loss exchange included.
        starts_s, ends_s: per hooked operation.
        overran: emulated instructions for which the CPU was too slow.
        overhead_s: time spent at the beginnings of controllable instructions, emulation not counted.
    """

    number: int
    begin_s: float
    schedule: str = ""
    operations: Sequence[Compute | Constant] = ()
    end_s: float = math.nan
    starts_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    overran: int = 0
    overhead_s: float = 0.0

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
        controller: who turns boundaries into clock requests; None in observe mode.
        on_error: called with the exception when anything here fails; the tap is dead from then on.
    """

    def __init__(self, controller: Controller | None, on_error: Callable[[Exception], None]) -> None:
        self._controller = controller
        self._on_error = on_error
        self.execution: Execution | None = None
        self._record: IterationRecord | None = None
        self._slots: list[int] = []
        self._operations: Sequence[Compute | Constant] = ()

    def arm(
        self, record: IterationRecord, operations: Sequence[Compute | Constant], slots: list[int]
    ) -> None:
        """Begin an iteration whose hooked operations are these.

        Args:
            record: where the timestamps go.
            operations: the hooked operations in program order.
            slots: for each of them its position among the compute operations, -1 for constants.
        """
        self._operations, self._slots, self._record = operations, slots, record

    def disarm(self) -> None:
        """The iteration is over; calls do nothing until the next `arm`."""
        self._record = None

    def begin(self) -> None:
        """A hooked operation begins."""
        record = self._record
        if record is None:
            return
        now_s = monotonic()
        try:
            starts = record.starts_s
            position = len(starts)
            starts.append(now_s)
            slot = self._slots[position]
            if slot >= 0:
                if self._controller is not None:
                    self._controller.begin(slot, now_s)
                record.overhead_s += monotonic() - now_s
                if self.execution is not None:
                    self.execution.begin(self._operations[position])  # type: ignore[arg-type]
        except Exception as error:
            self._fail(error)

    def end(self) -> None:
        """The hooked operation that began last has ended."""
        record = self._record
        if record is None:
            return
        try:
            if self.execution is not None and self._slots[len(record.ends_s)] >= 0:
                record.overran += self.execution.finish()
            record.ends_s.append(monotonic())
        except Exception as error:
            self._fail(error)

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
