"""What the training thread and the session's own thread share."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from perseus_plugin.exchange.messages import AnnouncedWork
from perseus_plugin.exchange.parts import Parts
from perseus_plugin.iteration.instructions import StreamOf
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Timetable
from perseus_plugin.stragglers.book import Report
from perseus_plugin.stragglers.external import ExternalFigures

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


class Link:
    """What the training thread and the worker share. Each value is replaced whole, by the one thread that may.

    Args:
        timetable: with the first round of the sweep.
        writes_events: whether this rank's training thread takes events.

    Attributes:
        iteration: the one that runs.
        schedule: key and streams of the newest one; None before the first.
        schedules: all that have run, by key.
        trouble_reason: why this rank controls its GPU no more; None while it does.
        wake: set when there is something for the worker.
    """

    def __init__(self, timetable: Timetable, *, writes_events: bool = True) -> None:
        self.iteration = 0
        self.schedule: tuple[str, StreamOf] | None = None
        self.schedules: Mapping[str, StreamOf] = {}
        self.trouble_reason: str | None = None
        self.wake = threading.Event()
        self._timetable = timetable
        self._parts: Parts = {}
        self._rise_lead_s = 0.0
        self._writes_events = writes_events
        self._gather_until_s, self._gather_to = 0.0, 0
        self._finished: queue.SimpleQueue[FinishedIteration] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[list[tuple[str, float]]] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._announced: queue.SimpleQueue[AnnouncedWork] = queue.SimpleQueue()
        self._external: queue.SimpleQueue[ExternalFigures] = queue.SimpleQueue()

    # What the worker decides and the training thread does.

    @property
    def timetable(self) -> Timetable:
        """What each iteration runs as."""
        return self._timetable

    def run_by(self, timetable: Timetable) -> None:
        """Iterations run as this says from now on."""
        self._timetable = timetable

    @property
    def parts(self) -> Parts:
        """This stage's parts of the newest plans."""
        return self._parts

    def use_parts(self, parts: Parts) -> None:
        """There are newer plans."""
        self._parts = parts

    @property
    def rise_lead_s(self) -> float:
        """How early a rising clock is asked for."""
        return self._rise_lead_s

    def rise_early(self, lead_s: float) -> None:
        """Ask for rising clocks so much earlier, from the next plan on."""
        self._rise_lead_s = lead_s

    # What the training thread has to tell.

    def use_schedule(self, key: str, stream_of: StreamOf) -> None:
        """Iterations run this schedule from now on."""
        self.schedule = (key, stream_of)
        if key not in self.schedules:
            self.schedules = {**self.schedules, key: stream_of}

    def finished(self, iteration: FinishedIteration) -> None:
        """Hand an iteration over."""
        self.iteration = iteration.record.number + 1
        self._finished.put(iteration)
        if self.iteration >= self._gather_to or monotonic() >= self._gather_until_s:
            self.wake.set()

    def gather(self, until_s: float, to: int) -> None:
        """Finished iterations alone do not wake the worker before then (`time.monotonic()`), or before `to` runs."""
        self._gather_until_s, self._gather_to = until_s, to

    def trouble(self, reason: str) -> None:
        """This rank controls its GPU no more."""
        self.trouble_reason = reason
        self.wake.set()

    def ended(self, reason: str) -> None:
        """The session has ended: by failing, if there is a reason, and then nothing more is written."""
        if reason:
            self.trouble(reason)
            self._writes_events = False

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

    def say(self, said: Mapping[str, Any]) -> None:
        """Have the worker send to rank 0 what the job is to aim at."""
        self._said.put(said)
        self.wake.set()

    def take_said(self) -> list[Mapping[str, Any]]:
        """What is to be sent now of what the job is to aim at."""
        return _drain(self._said)

    def announce(self, work: AnnouncedWork) -> None:
        """Have the worker send to rank 0 how much work a batch is."""
        self._announced.put(work)
        self.wake.set()

    def take_announced(self) -> list[AnnouncedWork]:
        """What is to be sent now of batches to come."""
        return _drain(self._announced)

    def add_external(self, figures: ExternalFigures) -> None:
        """Have the worker of rank 0 look at another detector's figures."""
        self._external.put(figures)
        self.wake.set()

    def take_external(self) -> list[ExternalFigures]:
        """Figures to look at now."""
        return _drain(self._external)

    def add_events(self, events: list[tuple[str, float]]) -> None:
        """Events for the framework's monitor, which only the training thread may touch; dropped if there is none."""
        if self._writes_events:
            self._events.put(events)

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
