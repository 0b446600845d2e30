"""Writes a rank's record: its iterations, its clock's deviations, and a few iterations whole.

Runs on the session's own thread. Lines are appended as iterations end, so that a job that dies leaves what it has
seen; the file is written anew only when it has grown to its limit and neighbours are joined. Nothing here raises: a
folder that cannot be written is said once, and recording ends.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseus_plugin.control import wire
from perseus_plugin.files import write_atomically
from perseus_plugin.instructions import StreamOp
from perseus_plugin.link import StreamOf
from perseus_plugin.messages import Placement, PlanPart
from perseus_plugin.reporting.iterations import IterationLog, Sort, Stretch
from perseus_plugin.reporting.samples import (
    ClockRequest,
    Reading,
    Samples,
    asked_clocks_mhz,
    is_sampled,
    sample_of,
)
from perseus_plugin.schedules import save_streams
from perseus_plugin.tap import IterationRecord
from perseus_plugin.timetable import Directive, Follow, Timetable

logger = logging.getLogger(__name__)

FOLDER = "records"
RECORD_SCHEMA = "perseus-record"
RECORD_VERSION = 1

_MAX_STRETCHES = 2000
_MAX_DEVIATIONS = 200
_ENERGY_PATIENCE = 16  # iterations until an energy that has not come counts as not known
_EVENTS_TAKE_S = 0.3  # until the helper has told of the last request of an iteration


def record_path(output_dir: Path, rank: int) -> Path:
    """Where a rank's iterations stand."""
    return output_dir / FOLDER / f"rank-{rank}.jsonl"


def samples_path(output_dir: Path, rank: int) -> Path:
    """Where a rank's whole iterations stand."""
    return output_dir / FOLDER / f"rank-{rank}.samples.json"


@dataclass(slots=True)
class _Waiting:
    """An iteration whose energy is still to come."""

    stretch: Stretch
    known: bool = False


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
        self._header = {
            "schema": RECORD_SCHEMA,
            "version": RECORD_VERSION,
            "placement": placement.model_dump(),
            "started_s": round(time.time(), 3),
            "host": socket.gethostname(),
            **about,
        }
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

    # What comes in.

    def iteration(
        self, directive: Directive, record: IterationRecord, timetable: Timetable, parts: Mapping[int, PlanPart]
    ) -> None:
        """An iteration has ended.

        Args:
            directive: what it ran as.
            record: what was seen.
            timetable: in force.
            parts: of the newest plans, by version.
        """
        if not self._on:
            return
        time_s = record.end_s - record.begin_s
        if not (math.isfinite(time_s) and time_s > 0):
            return
        begin_s = record.begin_s + self._offset_s
        self._waiting[record.number] = _Waiting(
            Stretch.single(record.number, begin_s, time_s, None, Sort.of(directive)),
            known=not self._measures_energy,
        )
        if record.complete and record.undisturbed and is_sampled(timetable, record.number):
            part = parts.get(directive.version) if isinstance(directive, Follow) else None
            asked = asked_clocks_mhz(directive, record, () if part is None else part.clocks_mhz)
            self._pending.append((time.monotonic() + _EVENTS_TAKE_S, Sort.of(directive), record, asked))

    def energy(self, number: int, energy_j: float) -> None:
        """The energy of an iteration is known; before or after `iteration`, in order of the iterations."""
        waiting = self._waiting.get(number)
        if waiting is not None:
            one = waiting.stretch
            waiting.stretch = Stretch.single(one.first, one.begin_s, one.time_s, energy_j, one.sort)
            waiting.known = True

    def helper_event(self, event: wire.Event) -> None:
        """Something the clock helper told."""
        if not self._on:
            return
        match event:
            case wire.Applied():
                self._requests.append(ClockRequest(event.applied_s, event.frequency_mhz or 0))
            case wire.Tick():
                self._readings.append(Reading(event.time_s, event.clock_mhz, event.energy_j))
            case wire.Deviation() if len(self._deviations) < _MAX_DEVIATIONS:
                self._deviations.append(
                    _line(
                        {
                            "event": "deviation",
                            "time_s": round(event.time_s + self._offset_s, 3),
                            "asked_mhz": event.requested_mhz,
                            "read_mhz": event.read_mhz,
                        }
                    )
                )

    def wants_readings(self, timetable: Timetable, iteration: int) -> bool:
        """Whether the counter shall be polled: the running iteration or the next one is kept whole."""
        return self._on and any(is_sampled(timetable, number) for number in (iteration, iteration + 1))

    def use_schedule(self, key: str, stream_of: StreamOf, stages: int) -> None:
        """Rank 0: iterations run this schedule from now on."""
        if not self._on or key == self._schedule:
            return
        self._schedule = key
        streams: list[list[StreamOp]] = [list(stream_of(stage)) for stage in range(stages)]
        self._write("schedule.json", lambda: save_streams(streams, self._output_dir / "schedule.json"))

    # What goes out.

    def step(self, final: bool = False) -> None:
        """Write what is settled; `final`: everything."""
        if not self._on:
            return
        changed = self._settle(final)
        path = record_path(self._output_dir, self._rank)
        self._write(path.name, lambda: self._write_record(path, changed or self._written < 0, final))
        if self._pending and (final or self._pending[0][0] <= time.monotonic()):
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
            lines = [_line(self._header), *self._deviations, *(_line(one.to_dict()) for one in stretches)]
            self._begin_file(path, "".join(lines))
        else:
            lines = self._deviations[self._deviations_written :]
            lines += [_line(one.to_dict()) for one in stretches[self._written :]]
            if lines:
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
        self._written, self._deviations_written = len(stretches), len(self._deviations)

    def _write_samples(self, path: Path, final: bool) -> None:
        now_s = time.monotonic()
        while self._pending and (final or self._pending[0][0] <= now_s):
            _, sort, record, asked = self._pending.popleft()
            self._samples.add(sample_of(sort, record, asked, self._offset_s, self._requests, self._readings))
        write_atomically(path, self._samples.to_json(self._rank))

    def _begin_file(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._written < 0:  # what an earlier run kept whole is not of this one
            samples_path(self._output_dir, self._rank).unlink(missing_ok=True)
        write_atomically(path, text)

    def _write(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a report is not worth a job's session
            self._on = False
            logger.warning("cannot write %s: %s; nothing more is recorded, training goes on", name, error)


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"


def _unix_offset_s() -> float:
    """Unix time minus `time.monotonic()`, from the try that was interrupted least."""
    tries = []
    for _ in range(5):
        before_s = time.monotonic()
        unix_s = time.time()
        after_s = time.monotonic()
        tries.append((after_s - before_s, unix_s - (before_s + after_s) / 2))
    return min(tries)[1]
