from __future__ import annotations

import math
import time

import pytest

from perseus_plugin.control.boundaries import Action, HostBoundaries
from perseus_plugin.control.controller import Controller
from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.session.tap import Execution, InstructionTap

FORWARD, BACKWARD, STEP = Compute("forward", 0), Compute("backward", 0), Constant("optimizer_step")
OPERATIONS = (FORWARD, BACKWARD, STEP)
SLOTS = [0, 1, -1]


class Noting(Controller):
    """A controller that notes what it is told; it fails at slot `fails_at`."""

    def __init__(self, fails_at: int = -1, raises: int = -1) -> None:
        self.seen: list[tuple[int, float]] = []
        self.ends: list[float] = []
        self.raises = raises
        self._fails_at = fails_at

    def begin(self, position: int, now_s: float) -> int | None:
        if position == self._fails_at:
            raise RuntimeError("the pipe is gone")
        self.seen.append((position, now_s))
        return 1410 if position == self.raises else None

    def end(self, now_s: float) -> None:
        self.ends.append(now_s)


class Stretching(Execution):
    """An emulated GPU whose every second instruction overruns."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def begin(self, operation: Compute) -> None:
        self.calls.append(operation)

    def finish(self) -> bool:
        self.calls.append("finish")
        return len(self.calls) % 4 == 0


@pytest.fixture
def errors() -> list[Exception]:
    return []


def armed(tap: InstructionTap) -> IterationRecord:
    record = IterationRecord(0, "1F1B", OPERATIONS, SLOTS, begin_s=time.monotonic())
    tap.arm(record)
    return record


def run(tap: InstructionTap, count: int = 3) -> None:
    for _ in range(count):
        tap.begin()
        tap.end()


def test_every_operation_is_timed_in_order(errors: list[Exception]) -> None:
    tap = InstructionTap(HostBoundaries(), None, errors.append)
    before_s = time.monotonic()
    record = armed(tap)
    run(tap)
    assert record.complete
    times = [t for pair in zip(record.starts_s, record.ends_s, strict=True) for t in pair]
    assert times == sorted(times)
    assert before_s <= times[0]
    assert times[-1] <= time.monotonic()
    assert not errors


def test_what_ran_faster_than_planned_is_noted_and_the_controller_hears_of_ends(errors: list[Exception]) -> None:
    noting = Noting(raises=1)
    tap = InstructionTap(HostBoundaries(), noting, errors.append)
    record = armed(tap)
    run(tap)
    assert record.raised == [(1, 1410)]
    assert noting.ends == record.ends_s[:2]
    assert not errors


def test_the_controller_hears_of_controllable_instructions_only(errors: list[Exception]) -> None:
    noting = Noting()
    tap = InstructionTap(HostBoundaries(), noting, errors.append)
    record = armed(tap)
    before_s = time.monotonic()
    run(tap)
    took_s = time.monotonic() - before_s
    assert noting.seen == [(0, record.starts_s[0]), (1, record.starts_s[1])]
    assert 0 < record.overhead_s < took_s


def test_an_emulated_gpu_stretches_controllable_instructions_only(errors: list[Exception]) -> None:
    execution = Stretching()
    tap = InstructionTap(HostBoundaries(), None, errors.append, execution)
    record = armed(tap)
    run(tap)
    assert execution.calls == [FORWARD, "finish", BACKWARD, "finish"]
    assert record.overran == 1
    assert record.complete
    assert not errors


def test_of_a_graph_nobody_sees_anything_but_the_emulated_gpu(errors: list[Exception]) -> None:
    execution, noting = Stretching(), Noting()
    tap = InstructionTap(HostBoundaries(), noting, errors.append, execution)
    for _ in range(2):
        execution.calls.clear()
        record = IterationRecord(0, "1F1B", OPERATIONS, SLOTS, begin_s=time.monotonic(), replayed=True)
        tap.arm(record)
        run(tap)
        assert execution.calls == [FORWARD, "finish", BACKWARD, "finish"]
        assert (record.starts_s, record.ends_s, record.overran) == ([], [], 1)
    assert noting.seen == noting.ends == []
    assert not errors


def test_an_end_is_taken_after_the_emulated_gpu_is_done(errors: list[Exception]) -> None:
    finished_s: list[float] = []

    class Slow(Stretching):
        def finish(self) -> bool:
            finished_s.append(time.monotonic())
            return False

    execution = Slow()
    tap = InstructionTap(HostBoundaries(), None, errors.append, execution)
    record = armed(tap)
    run(tap, 1)
    assert record.starts_s[0] <= finished_s[0] <= record.ends_s[0]


def test_without_arm_nothing_happens(errors: list[Exception]) -> None:
    noting = Noting()
    execution = Stretching()
    tap = InstructionTap(HostBoundaries(), noting, errors.append, execution)
    run(tap)
    record = armed(tap)
    tap.disarm()
    run(tap)
    assert [*noting.seen, *execution.calls, *record.starts_s, *record.ends_s, *errors] == []


def test_a_tap_serves_one_iteration_after_the_other(errors: list[Exception]) -> None:
    noting = Noting()
    tap = InstructionTap(HostBoundaries(), noting, errors.append)
    first = armed(tap)
    run(tap)
    tap.disarm()
    second = armed(tap)
    run(tap)
    assert first.complete
    assert second.complete
    assert [slot for slot, _ in noting.seen] == [0, 1, 0, 1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_record_that_misses_operations_is_incomplete(errors: list[Exception], count: int) -> None:
    tap = InstructionTap(HostBoundaries(), None, errors.append)
    record = armed(tap)
    run(tap, count)
    assert not record.complete
    assert len(record.ends_s) == count


def test_a_record_whose_last_operation_has_not_ended_is_incomplete(errors: list[Exception]) -> None:
    tap = InstructionTap(HostBoundaries(), None, errors.append)
    record = armed(tap)
    run(tap, 2)
    tap.begin()
    assert not record.complete
    tap.end()
    assert record.complete


def test_a_record_of_no_schedule_is_incomplete() -> None:
    record = IterationRecord(0, begin_s=1.0)
    assert not record.complete
    assert math.isnan(record.end_s)


def test_more_operations_than_the_schedule_has_end_the_tap(errors: list[Exception]) -> None:
    tap = InstructionTap(HostBoundaries(), None, errors.append)
    record = armed(tap)
    run(tap, 5)
    assert len(errors) == 1
    assert isinstance(errors[0], ScheduleError)
    assert len(record.starts_s) == len(record.ends_s) == 3


def test_an_error_at_a_beginning_ends_the_tap_and_goes_no_further(errors: list[Exception]) -> None:
    noting = Noting(fails_at=1)
    tap = InstructionTap(HostBoundaries(), noting, errors.append)
    record = armed(tap)
    run(tap)
    assert [str(error) for error in errors] == ["the pipe is gone"]
    assert len(noting.seen) == 1
    assert not record.complete
    tap.begin()
    assert len(errors) == 1, "a dead tap stays dead"


def test_an_error_at_an_end_ends_the_tap_and_goes_no_further(errors: list[Exception]) -> None:
    class Failing(Stretching):
        def finish(self) -> bool:
            raise OSError("the state file is gone")

    execution = Failing()
    tap = InstructionTap(HostBoundaries(), None, errors.append, execution)
    record = armed(tap)
    run(tap)
    assert [str(error) for error in errors] == ["the state file is gone"]
    assert len(record.starts_s) == 1
    assert not record.complete


class Later(HostBoundaries):
    """A GPU that gets to a boundary only when told to; Python has long gone on."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Action, tuple[object, ...]]] = []

    def reach(self, action: Action, *arguments: object) -> None:
        self.waiting.append((action, arguments))


def test_times_and_requests_are_those_of_the_gpu_not_of_python(errors: list[Exception]) -> None:
    gpu, noting = Later(), Noting()
    tap = InstructionTap(gpu, noting, errors.append)
    record = armed(tap)
    run(tap)
    tap.disarm()
    assert not record.complete
    assert not noting.seen
    for at_s, (action, arguments) in enumerate(gpu.waiting):
        action(float(at_s), *arguments)
    assert record.complete
    assert (record.starts_s, record.ends_s) == ([0.0, 2.0, 4.0], [1.0, 3.0, 5.0])
    assert noting.seen == [(0, 0.0), (1, 2.0)]
    assert not errors


def test_an_operation_that_raised_leaves_the_record_incomplete(errors: list[Exception]) -> None:
    """Its hook never calls `end`."""
    tap = InstructionTap(HostBoundaries(), None, errors.append)
    record = armed(tap)
    tap.begin()
    run(tap, 2)
    assert not record.complete
    assert not errors


def test_hooked_operations_are_those_that_take_time() -> None:
    stream = [Constant("load"), Receive(0), FORWARD, Send(2), BACKWARD, Send(0), STEP, Compute("weight", 0)]
    operations, slots = hooked_operations(stream)
    assert operations == (Constant("load"), FORWARD, BACKWARD, STEP, Compute("weight", 0))
    assert slots == [-1, 0, 1, -1, 2]
    assert hooked_operations([Send(1)]) == ((), [])
