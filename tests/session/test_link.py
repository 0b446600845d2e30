from __future__ import annotations

import threading
import time

import pytest

from perseus_plugin.iteration.timetable import FullClock, Round, Timetable
from perseus_plugin.session.link import FinishedIteration, Link
from tests.factories import record, stream_of


def link() -> Link:
    return Link(Timetable(Round(1, ()), 1, 2))


def finished(number: int) -> FinishedIteration:
    return FinishedIteration(FullClock(""), record(number))


def test_finished_iterations_are_taken_once_and_in_order() -> None:
    shared = link()
    assert shared.take_finished() == []
    iterations = [finished(number) for number in range(3)]
    for iteration in iterations:
        shared.finished(iteration)
    assert shared.take_finished() == iterations
    assert shared.take_finished() == []


def test_the_running_iteration_is_the_one_after_the_last_finished() -> None:
    shared = link()
    assert shared.iteration == 0
    shared.finished(finished(4))
    assert shared.iteration == 5


def test_a_finished_iteration_and_trouble_wake_the_worker() -> None:
    shared = link()
    assert not shared.wake.is_set()
    shared.finished(finished(0))
    assert shared.wake.is_set()
    shared.wake.clear()
    assert shared.trouble_reason is None
    shared.trouble("no permission")
    assert shared.wake.is_set()
    assert shared.trouble_reason == "no permission"


def test_while_iterations_are_gathered_all_else_wakes_the_worker() -> None:
    shared = link()
    shared.gather(time.monotonic() + 3600.0, 2)
    shared.finished(finished(0))
    assert not shared.wake.is_set()
    shared.finished(finished(1))
    assert shared.wake.is_set(), "the one that it is to see runs"
    shared.wake.clear()
    shared.gather(time.monotonic() + 3600.0, 9)
    shared.say({"slowdown": 0.1})
    assert shared.wake.is_set()
    shared.wake.clear()
    shared.gather(0.0, 9)
    shared.finished(finished(2))
    assert shared.wake.is_set()
    assert len(shared.take_finished()) == 3


def test_events_are_taken_in_batches_once() -> None:
    shared = link()
    shared.add_events([("a", 1.0), ("b", 2.0)])
    shared.add_events([("a", 3.0)])
    assert shared.take_events() == [[("a", 1.0), ("b", 2.0)], [("a", 3.0)]]
    assert shared.take_events() == []


@pytest.mark.parametrize("failed", [False, True])
def test_events_that_nobody_writes_are_not_kept(failed: bool) -> None:
    shared = Link(Timetable(Round(1, ()), 1, 2), writes_events=failed)
    if failed:
        shared.ended("it failed")
    shared.add_events([("a", 1.0)])
    assert shared.take_events() == []


def test_after_an_end_without_a_reason_last_events_are_written() -> None:
    shared = link()
    shared.ended("")
    shared.add_events([("a", 1.0)])
    assert shared.take_events() == [[("a", 1.0)]]
    assert shared.trouble_reason is None


def test_the_schedule_is_key_and_streams_in_one() -> None:
    shared = link()
    assert shared.schedule is None
    streams = stream_of(2, 4)
    shared.use_schedule("1F1B/2x4", streams)
    assert shared.schedule == ("1F1B/2x4", streams)


def test_nothing_is_lost_between_threads() -> None:
    shared = link()
    trainer = threading.Thread(target=lambda: [shared.finished(finished(number)) for number in range(500)])
    trainer.start()
    taken: list[int] = []
    while trainer.is_alive():
        taken += [iteration.record.number for iteration in shared.take_finished()]
    taken += [iteration.record.number for iteration in shared.take_finished()]
    assert taken == list(range(500))
