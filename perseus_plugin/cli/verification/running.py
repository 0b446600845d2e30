"""Running the sweep's pattern and long steady runs, hooked as training is, while the counter is watched."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from perseus_plugin.cli.verification.arithmetic import Step, gaps_s, pattern
from perseus_plugin.cli.verification.bench import Bench
from perseus_plugin.control.boundaries import Boundaries, boundaries_for
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.wire import Applied, DeviceFacts, Tick, Trouble
from perseus_plugin.errors import GpuError
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.session.tap import InstructionTap

_READY_S = 60.0
_REACHED_S = 30.0
_CHANGES = 12  # of the counter in what a mean power is taken over; the first third does not count


class Watch:
    """The helper process, which polls the energy counter as it does for a job; without control it only reads.

    Args:
        spec: of the GPU, see `gpus.registry`.
        poll_s: time between two polls.
        control: whether it may set clocks; then it frees the clock first, as it does for a job.

    Raises:
        GpuError: the GPU cannot be read.
    """

    def __init__(self, spec: str, poll_s: float, *, control: bool) -> None:
        self.helper = ClockHelper.start(spec, read_only=not control)
        self._ticks: list[Tick] = []
        self._applied: list[Applied] = []
        self.troubles: list[str] = []
        facts = self.helper.wait_ready(_READY_S)
        if facts is None:
            self._look()
            self.helper.close()
            raise GpuError("; ".join(self.troubles) or f"verify: the helper process did not start in {_READY_S:.0f} s")
        self.facts: DeviceFacts = facts
        self._poll_s = poll_s
        self.go_on()

    def pause(self) -> None:
        """Read nothing until `go_on`."""
        self.helper.poll_energy(None)

    def go_on(self) -> None:
        """Poll the counter."""
        self.helper.poll_energy(self._poll_s)

    def long_enough_s(self, seconds: float) -> float:
        """So long, but no shorter than a mean power takes: a dozen changes of the counter."""
        return max(seconds, _CHANGES * statistics.median(gaps_s(self.ticks()) or [0.0]))

    def ticks(self) -> list[Tick]:
        """All ticks so far."""
        self._look()
        return self._ticks

    def applied(self) -> list[Applied]:
        """All clock requests that have reached the driver so far."""
        self._look()
        return self._applied

    def _look(self) -> None:
        for event in self.helper.drain():
            if isinstance(event, Tick):
                self._ticks.append(event)
            elif isinstance(event, Applied):
                self._applied.append(event)
            elif isinstance(event, Trouble):
                self.troubles.append(event.text)


@contextmanager
def bounded(bench: Bench) -> Iterator[Boundaries]:
    """Boundaries of the bench's device; what goes wrong on their thread is raised at the end.

    Raises:
        GpuError: waiting for a boundary failed.
    """
    errors: list[Exception] = []
    boundaries = boundaries_for(bench.device, errors.append)
    try:
        yield boundaries
    finally:
        boundaries.close()
        if errors:
            raise GpuError(f"verify: waiting for an instruction failed: {errors[0]}") from errors[0]


@dataclass(frozen=True)
class SteadyRun:
    """A long run of one thing: when it was steady, and how long one execution took (0 for waiting)."""

    begin_s: float
    end_s: float
    time_s: float


def run_steadily(bench: Bench, kind: str | None, seconds: float) -> SteadyRun:
    """Nothing but instructions of one kind, or nothing but waiting; the first fifth does not count."""
    bench.settle()
    begin_s = time.monotonic()
    if kind is None:
        bench.queue_wait(seconds)
        bench.settle()
        end_s, count = time.monotonic(), 0
    else:
        count = 0
        while time.monotonic() - begin_s < seconds or not count:
            bench.queue(kind)
            count += 1
        end_s = bench.done_s()
    return SteadyRun(begin_s + 0.2 * (end_s - begin_s), end_s, (end_s - begin_s) / count if count else 0.0)


class PatternRunner:
    """Runs iterations of the pattern through the hooks of a job.

    Args:
        bench: where.
        boundaries: when the GPU gets where.
        times_s: how long an instruction of each kind takes, about.
    """

    def __init__(self, bench: Bench, boundaries: Boundaries, times_s: Mapping[str, float]) -> None:
        self._bench, self._boundaries = bench, boundaries
        self.errors: list[Exception] = []
        self._tap = InstructionTap(boundaries, None, self.errors.append)
        self._steps, self._after_s = pattern(times_s)
        self._operations = tuple(Compute(step.kind, step.microbatch) for step in self._steps)
        self._number = 0

    @property
    def waiting_s(self) -> float:
        """How long it waits in an iteration."""
        return self._after_s + sum(step.wait_s for step in self._steps)

    def iteration(self) -> IterationRecord:
        """Run one, to its end.

        Raises:
            GpuError: the hooks failed, or the end never came.
        """
        bench, tap = self._bench, self._tap
        record = IterationRecord(
            self._number,
            operations=self._operations,
            slots=tuple(range(len(self._operations))),
            undisturbed=True,
        )
        self._number += 1
        ended = threading.Event()

        def begin(now_s: float) -> None:
            record.begin_s = now_s

        def end(now_s: float) -> None:
            record.end_s = now_s
            ended.set()

        self._boundaries.reach(begin)
        tap.arm(record)
        for step in self._steps:
            self._run(step)
        tap.disarm()
        self._wait(self._after_s)
        self._boundaries.reach(end)
        bench.settle()
        if not ended.wait(_REACHED_S) or self.errors:
            raise GpuError(f"verify: an iteration did not end: {self.errors[:1] or 'its last boundary never came'}")
        return record

    def _run(self, step: Step) -> None:
        self._wait(step.wait_s)
        self._tap.begin()
        self._bench.queue(step.kind)
        self._tap.end()

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._bench.queue_wait(seconds)
