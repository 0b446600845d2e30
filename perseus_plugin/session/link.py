"""What the training thread and the session's own thread share."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perseus_plugin.exchange.messages import PlanPart
from perseus_plugin.iteration.instructions import StreamOp
from perseus_plugin.iteration.timetable import Directive, Follow, Timetable
from perseus_plugin.session.tap import IterationRecord
from perseus_plugin.stragglers.book import Report
from perseus_plugin.stragglers.external import ExternalFigures

StreamOf = Callable[[int], Sequence[StreamOp]]
Parts = Mapping[tuple[int, str], PlanPart]
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class FinishedIteration:
    """One iteration as the training thread leaves it.

    Attributes:
        directive: what it ran as.
        record: what was seen.
    """

    directive: Directive
    record: IterationRecord


def part_for(parts: Parts, directive: Directive, record: IterationRecord) -> PlanPart | None:
    """The part that an iteration follows; None where there is none (yet), or it follows no plan."""
    return parts.get((directive.version, record.schedule)) if isinstance(directive, Follow) else None


class Link:
    """What the training thread and the worker share; single attributes, replaced whole.

    Attributes:
        timetable: what each iteration runs as; the worker replaces it.
        parts: this stage's parts of the newest plans, by version of the set and schedule.
        schedule: the newest one.
        schedules: all that have run, by key.
        rise_lead_s: how early a rising clock is asked for.
        close: set by the worker; ends it.
        writes_events: whether this rank's training thread takes events; set by the session.
        publish: what else is told of events, on the thread that adds them.
    """

    def __init__(self, timetable: Timetable) -> None:
        self.timetable = timetable
        self.parts: Parts = {}
        self.rise_lead_s = 0.0
        self.close: Callable[[], None] = lambda: None
        self.publish: Callable[[list[tuple[str, float]]], None] = lambda events: None
        self.iteration = 0
        self.schedule: tuple[str, StreamOf] | None = None
        self.schedules: Mapping[str, StreamOf] = {}
        self.trouble_reason: str | None = None
        self._finished: queue.SimpleQueue[FinishedIteration] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[list[tuple[str, float]]] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._external: queue.SimpleQueue[ExternalFigures] = queue.SimpleQueue()
        self.wake = threading.Event()
        self.writes_events = True

    def use_schedule(self, key: str, stream_of: StreamOf) -> None:
        """Iterations run this schedule from now on."""
        self.schedule = (key, stream_of)
        if key not in self.schedules:
            self.schedules = {**self.schedules, key: stream_of}

    def finished(self, iteration: FinishedIteration) -> None:
        """Hand an iteration over."""
        self.iteration = iteration.record.number + 1
        self._finished.put(iteration)
        self.wake.set()

    def trouble(self, reason: str) -> None:
        """This rank controls its GPU no more."""
        self.trouble_reason = reason
        self.wake.set()

    def take_finished(self) -> list[FinishedIteration]:
        """Iterations handed over since the last call."""
        return _drain(self._finished)

    def report(self, report: Report) -> None:
        """Have the worker send a straggler report to rank 0."""
        self._reports.put(report)
        self.wake.set()

    def take_reports(self) -> list[Report]:
        """Straggler reports to be sent now."""
        return _drain(self._reports)

    def add_external(self, figures: ExternalFigures) -> None:
        """Have the worker of rank 0 look at another detector's figures."""
        self._external.put(figures)
        self.wake.set()

    def take_external(self) -> list[ExternalFigures]:
        """Figures to look at now."""
        return _drain(self._external)

    def add_events(self, events: list[tuple[str, float]]) -> None:
        """Events for the framework's monitor, which only the training thread may touch; dropped if there is none."""
        if self.writes_events:
            self._events.put(events)
        self.publish(events)

    def take_events(self) -> list[list[tuple[str, float]]]:
        """Events to be written now."""
        return _drain(self._events)


def _drain(source: queue.SimpleQueue[ItemT]) -> list[ItemT]:
    items: list[ItemT] = []
    while True:
        try:
            items.append(source.get_nowait())
        except queue.Empty:
            return items
