"""Writes a rank's record: its iterations, its clock's deviations, and a few iterations whole.

Runs on the session's own thread. Lines are appended as iterations end, so that a job that dies leaves what it has
seen but for the last seconds; the file is written anew only when it has grown to its limit and neighbours are joined.
Nothing here raises: a folder that cannot be written, or a fault, is said once, and recording ends.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from perseus_plugin.control import wire
from perseus_plugin.errors import os_problem
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.parts import Parts, part_for
from perseus_plugin.files import append, remove, write_atomically
from perseus_plugin.iteration.instructions import StreamOf, StreamOp
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Follow, Timetable
from perseus_plugin.planning.streams import save_streams
from perseus_plugin.reporting.record.iterations import FULL, IterationLog, Sort, Stretch
from perseus_plugin.reporting.record.lines import Deviation, Header, Row
from perseus_plugin.reporting.record.samples import (
    ClockRequest,
    Reading,
    Samples,
    asked_clocks_mhz,
    is_sampled,
    sample_of,
)

logger = logging.getLogger(__name__)

FOLDER = "records"
SCHEDULES = "schedules"

_MAX_STRETCHES = 2000
MAX_DEVIATIONS = 200
_MAX_SCHEDULES = 64
_WRITE_EVERY_S = 2.0
_ENERGY_PATIENCE = 16  # iterations until an energy that has not come counts as not known
_EVENTS_TAKE_S = 0.3  # until the helper has told of the last request of an iteration


def record_path(output_dir: Path, rank: int) -> Path:
    """Where a rank's iterations stand."""
    return output_dir / FOLDER / f"rank-{rank}.jsonl"


def samples_path(output_dir: Path, rank: int) -> Path:
    """Where a rank's whole iterations stand."""
    return output_dir / FOLDER / f"rank-{rank}.samples.json"


def schedule_path(output_dir: Path, key: str) -> Path:
    """Where the streams of a schedule stand that a job ran, beside others: its key, as in an address, is the name."""
    return output_dir / FOLDER / SCHEDULES / f"{quote(key, safe='')}.json"


@dataclass(slots=True)
class _Waiting:
    """An iteration whose energy is still to come."""

    stretch: Stretch
    known: bool = False


P = ParamSpec("P")
R = TypeVar("R")


def _guarded(method: Callable[Concatenate[Recorder, P], R]) -> Callable[Concatenate[Recorder, P], R | None]:
    """A report is not worth a job's session: an exception ends recording instead."""

    def guarded(self: Recorder, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        if not self._on:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self._end("records of iterations", error)
            return None

    functools.update_wrapper(guarded, method)
    return guarded


class Recorder:
    """See the module's docstring. All methods are called by the worker.

    Args:
        output_dir: of the job.
        placement: of the rank.
        about: what else the header says (`gpu`, `backend`, `emulated`, `facts`).
        measures_energy: whether energies will come.
        enabled: False: nothing is written.
    """

    def __init__(
        self,
        output_dir: Path,
        placement: Placement,
        about: Mapping[str, Any],
        measures_energy: bool,
        enabled: bool = True,
    ) -> None:
        self._output_dir = output_dir
        self._rank = placement.rank
        self._on = enabled
        self._measures_energy = measures_energy
        self._offset_s = _unix_offset_s()
        self._header = Header(
            schema="perseus-record",
            version=1,
            placement=placement,
            started_s=round(time.time(), 3),
            host=socket.gethostname(),
            **about,
        )
        self._log = IterationLog(_MAX_STRETCHES)
        self._written = -1  # stretches in the file; below 0: there is no file of this run yet
        self._waiting: dict[int, _Waiting] = {}
        self._deviations: list[str] = []
        self._deviations_written = 0
        self._requests: deque[ClockRequest] = deque(maxlen=4096)
        self._readings: deque[Reading] = deque(maxlen=4096)
        self._samples = Samples()
        self._pending: deque[tuple[float, Sort, IterationRecord, list[int]]] = deque(maxlen=8)
        self._schedule = ""
        self._schedule_due_s = 0.0
        self._schedules: set[str] = set()
        self._changed = False  # lines of the file, by joining
        self._write_due_s = 0.0

    # What comes in.

    @_guarded
    def iteration(self, directive: Directive, record: IterationRecord, timetable: Timetable, parts: Parts) -> None:
        """An iteration has ended.

        Args:
            directive: what it ran as.
            record: what was seen.
            timetable: in force.
            parts: see `Link.parts`.
        """
        time_s = record.end_s - record.begin_s
        if not (math.isfinite(time_s) and time_s > 0):
            return
        begin_s = record.begin_s + self._offset_s
        part = part_for(parts, directive, record)
        sort = _sort_of(directive, record, parts)
        self._waiting[record.number] = _Waiting(
            Stretch.single(record.number, begin_s, time_s, None, sort),
            known=not self._measures_energy,
        )
        if record.complete and record.undisturbed and is_sampled(timetable, record.number):
            followed = record.applied and part is not None
            asked = asked_clocks_mhz(directive, record, part.clocks_mhz if part is not None and followed else ())
            self._pending.append((time.monotonic() + _EVENTS_TAKE_S, sort, record, asked))

    @_guarded
    def energy(self, number: int, energy_j: float) -> None:
        """The energy of an iteration is known; before or after `iteration`, in order of the iterations."""
        waiting = self._waiting.get(number)
        if waiting is not None:
            one = waiting.stretch
            waiting.stretch = Stretch.single(one.first, one.begin_s, one.time_s, energy_j, one.sort)
            waiting.known = True

    @_guarded
    def helper_event(self, event: wire.Event) -> None:
        """Something the clock helper told."""
        match event:
            case wire.Applied():
                self._requests.append(ClockRequest(event.applied_s, event.frequency_mhz or 0))
            case wire.Tick():
                self._readings.append(Reading(event.time_s, event.clock_mhz, event.energy_j))
            case wire.Deviation() if len(self._deviations) < MAX_DEVIATIONS:
                self._deviations.append(
                    Deviation(
                        event="deviation",
                        time_s=round(event.time_s + self._offset_s, 3),
                        asked_mhz=event.requested_mhz,
                        read_mhz=event.read_mhz,
                    ).to_line()
                )

    def wants_readings(self, timetable: Timetable, iteration: int) -> bool:
        """Whether the counter shall be polled: the running iteration or the next one is kept whole."""
        return bool(self._is_near_sample(timetable, iteration))

    @_guarded
    def _is_near_sample(self, timetable: Timetable, iteration: int) -> bool:
        return any(is_sampled(timetable, number) for number in (iteration, iteration + 1))

    @_guarded
    def use_schedule(self, key: str, stream_of: StreamOf, stages: int) -> None:
        """Rank 0: iterations run this schedule from now on."""
        if key == self._schedule:
            return
        if not self.keep_schedule(key, stream_of, stages):
            now_s = time.monotonic()
            if now_s < self._schedule_due_s:
                return  # a schedule that changes with every iteration is not written with every iteration
            self._schedule_due_s = now_s + _WRITE_EVERY_S
        self._schedule = key
        streams: list[list[StreamOp]] = [list(stream_of(stage)) for stage in range(stages)]
        self._write("schedule.json", lambda: save_streams(streams, self._output_dir / "schedule.json"))

    @_guarded
    def keep_schedule(self, key: str, stream_of: StreamOf, stages: int) -> bool:
        """Rank 0: iterations have run this schedule; returns whether it is a new one, which is written then."""
        if key in self._schedules or len(self._schedules) >= _MAX_SCHEDULES:
            return False
        self._schedules.add(key)
        streams: list[list[StreamOp]] = [list(stream_of(stage)) for stage in range(stages)]
        kept = schedule_path(self._output_dir, key)
        self._write(kept.name, lambda: save_streams(streams, kept, make=True))
        return True

    # What goes out.

    @_guarded
    def step(self, final: bool = False) -> None:
        """Write what is settled, every few seconds; `final`: everything."""
        self._changed |= self._settle(final)
        now_s = time.monotonic()
        has_sample = bool(self._pending) and (final or self._pending[0][0] <= now_s)
        if final or has_sample or self._written < 0 or now_s >= self._write_due_s:
            self._write_due_s = now_s + _WRITE_EVERY_S
            path = record_path(self._output_dir, self._rank)
            self._write(path.name, lambda: self._write_record(path, self._changed or self._written < 0, final))
            self._changed = False
        if has_sample:
            whole = samples_path(self._output_dir, self._rank)
            self._write(whole.name, lambda: self._write_samples(whole, final))

    def _settle(self, final: bool) -> bool:
        """Move iterations whose energy is known, or will not come any more, to the log; True if older lines changed."""
        changed = False
        newest = max(self._waiting, default=0)
        for number in sorted(self._waiting):
            waiting = self._waiting[number]
            if not (waiting.known or final or number < newest - _ENERGY_PATIENCE):
                break
            changed |= self._log.add(self._waiting.pop(number).stretch)
        return changed

    def _write_record(self, path: Path, anew: bool, final: bool) -> None:
        stretches = self._log.stretches if final else self._log.closed
        if anew:
            lines = [self._header.to_line(), *self._deviations, *(Row.of(one).to_line() for one in stretches)]
            self._begin_file(path, "".join(lines))
        else:
            lines = self._deviations[self._deviations_written :]
            lines += [Row.of(one).to_line() for one in stretches[self._written :]]
            if lines:
                append(path, "".join(lines))
        self._written, self._deviations_written = len(stretches), len(self._deviations)

    def _write_samples(self, path: Path, final: bool) -> None:
        now_s = time.monotonic()
        while self._pending and (final or self._pending[0][0] <= now_s):
            _, sort, record, asked = self._pending.popleft()
            self._samples.add(sample_of(sort, record, asked, self._offset_s, self._requests, self._readings))
        write_atomically(path, self._samples.to_json(self._rank))

    def _begin_file(self, path: Path, text: str) -> None:
        if self._written < 0:  # what an earlier run kept whole is not of this one
            remove(samples_path(self._output_dir, self._rank))
        write_atomically(path, text, make=True)

    def _write(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._end(name, error)

    def _end(self, what: str, error: Exception) -> None:
        if self._on:
            self._on = False
            problem = os_problem(error) if isinstance(error, OSError) else str(error) or repr(error)
            logger.warning("cannot write %s: %s; nothing more is recorded, training goes on", what, problem)


def _sort_of(directive: Directive, record: IterationRecord, parts: Parts) -> Sort:
    """What an iteration really ran as: full clocks where its plan could not be followed."""
    if record.applied or not isinstance(directive, Follow):
        return Sort.of(directive, record.schedule)
    if part_for(parts, directive, record) is None and any(version == directive.version for version, _ in parts):
        why = "there was no plan for this schedule"
    else:
        why = f"plan {directive.version} was not there yet"
    return Sort(FULL, reason=why, schedule=record.schedule)


def _unix_offset_s() -> float:
    """Unix time minus `time.monotonic()`, from the try that was interrupted least."""
    tries = []
    for _ in range(5):
        before_s = time.monotonic()
        unix_s = time.time()
        after_s = time.monotonic()
        tries.append((after_s - before_s, unix_s - (before_s + after_s) / 2))
    return min(tries)[1]
