"""What the integration's instruction hooks call on the training thread: as little as possible.

A tap knows where in the iteration it is, keeps two timestamps per instruction, tells the controller, and stretches the
instruction where the GPU is emulated. Everything else happens on the session's own thread, from the finished record.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from perseus_plugin.control.boundaries import Boundaries
from perseus_plugin.control.controller import Controller
from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord


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
        execution: stretches instructions where the GPU is emulated.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        controller: Controller | None,
        on_error: Callable[[Exception], None],
        execution: Execution | None = None,
    ) -> None:
        self._reach = boundaries.reach
        self._controller = controller
        self._on_error = on_error
        self._execution = execution
        self._record: IterationRecord | None = None
        self._played = 0

    def arm(self, record: IterationRecord) -> None:
        """Begin an iteration; `record` names its hooked operations and takes the times.

        Those of a replayed one nobody sees; where the GPU is emulated they take their time all the same.
        """
        self._record, self._played = record, 0

    def disarm(self) -> None:
        """The iteration is over; calls do nothing until the next `arm`."""
        self._record = None

    def begin(self) -> None:
        """A hooked operation begins."""
        record = self._record
        if record is None:
            return
        try:
            if record.replayed:
                self._play(record)
                return
            called_s = monotonic()
            self._reach(self._began, record)
            record.overhead_s += monotonic() - called_s
            if self._execution is not None:
                operation = record.operations[len(record.starts_s) - 1]
                if isinstance(operation, Compute):
                    self._execution.begin(operation)
        except Exception as error:
            self._fail(error)

    def end(self) -> None:
        """The hooked operation that began last has ended."""
        record = self._record
        if record is None:
            return
        try:
            if record.replayed:
                self._played += 1
                if self._execution is not None and record.slots[self._played - 1] >= 0:
                    record.overran += self._execution.finish()
                return
            if self._execution is not None and record.slots[len(record.ends_s)] >= 0:
                record.overran += self._execution.finish()
            self._reach(self._ended, record)
        except Exception as error:
            self._fail(error)

    def _play(self, record: IterationRecord) -> None:
        operation = record.operations[self._played] if self._played < len(record.operations) else None
        if self._execution is not None and isinstance(operation, Compute):
            self._execution.begin(operation)

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
        slot = record.slots[len(record.ends_s)]
        if slot >= 0 and self._controller is not None:
            lowered_mhz = self._controller.end(now_s)
            if lowered_mhz is not None:
                record.lowered.append((slot, lowered_mhz))
        record.ends_s.append(now_s)

    def _fail(self, error: Exception) -> None:
        self._record = None
        self._on_error(error)
