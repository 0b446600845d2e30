"""Boundaries on a stand-in for CUDA events: what is done, in which order, at which time, and that nobody waits."""

from __future__ import annotations

import queue
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.control import boundaries as boundaries_module
from perseus_plugin.control.boundaries import EventBoundaries, HostBoundaries, boundaries_for


class Device:
    """A GPU whose stream stands still until `run` is called; its clock counts milliseconds of its own."""

    def __init__(self) -> None:
        self.made = 0
        self.lost = False

    def make_event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)


class FakeEvent:
    """Records; passes when the test says so, with a device time stamp."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.passed = threading.Event()
        self.stamp_ms = 0.0

    def record(self) -> None:
        self.passed.clear()
        recorded.append(self)

    def synchronize(self) -> None:
        if not self.passed.wait(10):
            raise RuntimeError("the test never let this event pass")
        if self._device.lost:
            raise RuntimeError("CUDA error: the launch timed out")

    def elapsed_time(self, end_event: Any) -> float:
        return float(end_event.stamp_ms - self.stamp_ms)


recorded: list[FakeEvent] = []


@pytest.fixture(autouse=True)
def _nothing_recorded() -> None:
    recorded.clear()


def let_pass(event: FakeEvent, stamp_ms: float) -> None:
    event.stamp_ms = stamp_ms
    event.passed.set()


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.001)


def fail(error: Exception) -> None:
    raise AssertionError(error)


def test_host_boundaries_are_reached_at_once() -> None:
    seen: list[tuple[float, str]] = []
    before_s = time.monotonic()
    HostBoundaries().reach(lambda now_s, name: seen.append((now_s, name)), "begin")
    ((now_s, name),) = seen
    assert name == "begin"
    assert before_s <= now_s <= time.monotonic()


def test_nothing_happens_before_the_event_has_passed_and_the_caller_never_waits() -> None:
    boundaries = EventBoundaries(Device().make_event, fail)
    seen: list[str] = []
    threads: set[str] = set()

    def act(now_s: float, name: str) -> None:
        seen.append(name)
        threads.add(threading.current_thread().name)

    for name in ("a", "b", "c"):
        boundaries.reach(act, name)  # returns although no event has passed
    time.sleep(0.05)
    assert seen == []
    let_pass(recorded[1], 2.0)  # out of order: the stream's order is what counts
    time.sleep(0.05)
    assert seen == []
    let_pass(recorded[0], 1.0)
    let_pass(recorded[2], 3.0)
    wait_for(lambda: seen == ["a", "b", "c"])
    assert threads == {"perseus-boundaries"}
    boundaries.close()


def test_times_are_the_devices_own() -> None:
    boundaries = EventBoundaries(Device().make_event, fail)
    times: list[float] = []
    stamps_ms = [100.0, 130.0, 190.0, 700.0]
    for _ in stamps_ms:
        boundaries.reach(times.append)
    let_pass(recorded[0], stamps_ms[0])
    wait_for(lambda: len(times) == 1)
    time.sleep(0.65)  # the waiter sees the others late; spans come from the stamps all the same
    for event, stamp_ms in zip(recorded[1:], stamps_ms[1:], strict=True):
        let_pass(event, stamp_ms)
    wait_for(lambda: len(times) == 4)
    assert [round(1e3 * (t - times[0]), 3) for t in times] == [0.0, 30.0, 90.0, 600.0]
    boundaries.close()


def test_a_passed_time_is_never_in_the_future() -> None:
    boundaries = EventBoundaries(Device().make_event, fail)
    times: list[tuple[float, float]] = []
    for _ in range(2):
        boundaries.reach(lambda now_s: times.append((now_s, time.monotonic())))
    let_pass(recorded[0], 0.0)
    let_pass(recorded[1], 900.0)  # a device clock that runs away
    wait_for(lambda: len(times) == 2)
    assert all(said_s <= now_s for said_s, now_s in times)
    boundaries.close()


@pytest.mark.parametrize(
    ("drift", "late_s", "off_s"),
    [
        (0.0, [0.0002, *[0.00003] * 49], 0.00003),  # the first wake-up, which all begins with, is the latest
        (-3e-5, [0.00003, 0.0003], 0.0001),  # an event's clock that runs slow, as seen on a H200
        (3e-5, [0.00003, 0.0003], 0.0001),
        (0.0, [0.005], 0.005),  # wake-ups that are all late: Python computes
    ],
)
def test_times_stay_tied_to_the_hosts_clock(
    monkeypatch: pytest.MonkeyPatch, drift: float, late_s: list[float], off_s: float
) -> None:
    """A minute of boundaries: after the first three seconds none is off by more than this."""
    host: queue.SimpleQueue[float] = queue.SimpleQueue()
    monkeypatch.setattr(boundaries_module, "monotonic", host.get)
    boundaries = EventBoundaries(Device().make_event, fail)
    said: list[float] = []
    count = 600
    for number in range(count):
        boundaries.reach(said.append)
        passed_s = 100 + 0.1 * number
        host.put(passed_s + late_s[number % len(late_s)])
        let_pass(recorded[-1], 1e3 * (1 + drift) * passed_s)
        wait_for(lambda wanted=number + 1: len(said) == wanted)
    errors_s = [time_s - (100 + 0.1 * number) for number, time_s in enumerate(said)]
    assert max(map(abs, errors_s[30:])) <= off_s + 1e-9
    boundaries.close()


def test_events_are_used_again() -> None:
    device = Device()
    boundaries = EventBoundaries(device.make_event, fail)
    count = []
    for step in range(50):
        boundaries.reach(count.append)
        let_pass(recorded[-1], float(step))
        wait_for(lambda wanted=step + 1: len(count) == wanted)
    assert device.made <= 4
    boundaries.close()


def test_a_failing_device_ends_it_with_one_error_and_the_caller_goes_on() -> None:
    device, errors = Device(), []
    boundaries = EventBoundaries(device.make_event, errors.append)
    seen: list[float] = []
    for _ in range(3):
        boundaries.reach(seen.append)
    device.lost = True
    for event in list(recorded):
        let_pass(event, 0.0)
    wait_for(lambda: len(errors) == 1)
    boundaries.reach(seen.append)
    time.sleep(0.05)
    assert seen == []
    assert "launch timed out" in str(errors[0])
    boundaries.close()


def test_a_failing_action_ends_it_with_one_error() -> None:
    errors: list[Exception] = []
    boundaries = EventBoundaries(Device().make_event, errors.append)

    def act(now_s: float) -> None:
        raise ValueError("broken")

    boundaries.reach(act)
    let_pass(recorded[0], 0.0)
    wait_for(lambda: len(errors) == 1)
    boundaries.close()


def test_close_does_not_wait_for_a_device_that_hangs() -> None:
    boundaries = EventBoundaries(Device().make_event, fail)
    boundaries.reach(fail)
    begin_s = time.monotonic()
    boundaries.close(timeout_s=0.1)
    assert time.monotonic() - begin_s < 5.0
    let_pass(recorded[0], 0.0)


def test_cpu_devices_get_the_hosts_time() -> None:
    assert isinstance(boundaries_for("cpu", fail), HostBoundaries)


def test_no_other_place_of_the_package_waits_for_the_device() -> None:
    """What a person runs aside: no command is part of a job."""
    package = Path(boundaries_module.__file__).parents[1]
    in_a_job = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "cli"]
    waiting = [path.name for path in in_a_job if re.search(r"\bsynchronize\(", path.read_text())]
    assert waiting == ["boundaries.py"]
