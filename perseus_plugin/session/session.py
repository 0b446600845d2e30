"""What an integration calls on the training thread while a job trains.

That thread's part is small: look up what the iteration runs at, hand requests to the helper process, keep timestamps.
All else is done by `worker.SessionWorker`.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from perseus_plugin.config import StragglersConfig
from perseus_plugin.control.boundaries import boundaries_for
from perseus_plugin.control.controller import Controller
from perseus_plugin.control.lasting import LastingHelper
from perseus_plugin.errors import shown
from perseus_plugin.exchange.messages import AnnouncedWork, Placement
from perseus_plugin.exchange.parts import part_for, with_own_plan
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.bounds import MOST_AHEAD
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOf
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Sweep
from perseus_plugin.leader.target_book import TargetError, check_say
from perseus_plugin.reporting.live.account import begin_tag, end_tag
from perseus_plugin.session.emulation import EmulatedStage
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import FinishedIteration, Link
from perseus_plugin.session.tap import InstructionTap
from perseus_plugin.stragglers.book import DETECTION, StragglerError, check_report
from perseus_plugin.stragglers.external import ExternalFigures

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
_MOST_MICROBATCHES = 10_000
_WORK_ALLOWED = "allowed: one finite number above 0 for each microbatch"
Monitor = Callable[[list[tuple[str, float]]], None]


def _guarded(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R | None]:
    """Nothing of ours may stop training: an exception ends the session instead."""

    def guarded(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        if self.closed:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
            return None

    functools.update_wrapper(guarded, method)
    return guarded


class Closing(Protocol):
    """The session's own thread, see `worker.SessionWorker`."""

    def close(self) -> None:
        """End the thread, then settle accounts."""
        ...


class Session:
    """What an integration calls on the training thread; made by `start.start_session`.

    Attributes:
        tap: hooks call its `begin` and `end` around every hooked operation.
        rank: in the job.
        folder: what it writes its files to, None once that is over (or for none).
    """

    def __init__(
        self,
        placement: Placement,
        *,
        lifetime: Lifetime,
        link: Link,
        exchange: Exchange,
        helper: LastingHelper | None = None,
        emulated: EmulatedStage | None = None,
        monitor: Monitor | None = None,
        stragglers: StragglersConfig | None = None,
        folder: Path | None = None,
        worker: Closing | None = None,
    ) -> None:
        self.rank, self.folder = placement.rank, folder
        self._lifetime = lifetime
        self._closing = threading.Lock()
        self._pid = os.getpid()
        self._placement = placement
        self._stragglers = stragglers or StragglersConfig()
        self._link = link
        self._helper = helper
        self._controller = None if helper is None else Controller(helper)
        self._emulated = emulated
        self._exchange = exchange
        self._monitor = monitor
        self._worker = worker
        self._boundaries = boundaries_for(placement.device, lifetime.fail)
        self.tap = InstructionTap(self._boundaries, self._controller, lifetime.fail, emulated)
        lifetime.on_end(self._release)
        self._iteration = 0
        self._record: IterationRecord | None = None
        self._held: tuple[object] | None = None
        self._followed: tuple[object, ...] | None = None
        self._schedule = ""
        self._operations: dict[str, tuple[tuple[Compute | Constant, ...], list[int]]] = {}

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._lifetime.ended

    @property
    def controller(self) -> Controller | None:
        """Who turns instruction boundaries into clock requests; None in observe mode."""
        return self._controller

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call this when the session ends or fails; it puts the framework back as it was."""
        self._lifetime.on_end(lambda reason: callback())

    @_guarded
    def begin_iteration(self) -> None:
        """A training iteration begins."""
        emulated = self._emulated
        if emulated is not None and emulated.needs_calibration and self._iteration >= self._link.timetable.sweep.first:
            emulated.calibrate(self._exchange)
        self._record = IterationRecord(self._iteration)
        self._boundaries.reach(self._begins, self._record)

    def begin_schedule(self, key: str, stream_of: StreamOf, *, replayed: bool = False) -> bool:
        """The iteration's schedule begins.

        Args:
            key: known schedules are known by it.
            stream_of: the instruction stream of a stage.
            replayed: it runs as one CUDA graph, launched from now on.

        Returns:
            Whether hooked operations shall be hooked at all.
        """
        return bool(self._begin_schedule(key, stream_of, replayed))

    @_guarded
    def _begin_schedule(self, key: str, stream_of: StreamOf, replayed: bool) -> bool:
        record = self._record
        if record is None:
            return False
        if key != self._schedule:
            if key not in self._operations:
                self._operations[key] = hooked_operations(stream_of(self._placement.stage))
            self._schedule = key
            self._link.use_schedule(key, stream_of)
        record.schedule, record.replayed = key, replayed
        record.operations, record.slots = self._operations[key]
        self._boundaries.reach(self._apply, record)
        self.tap.arm(record)
        return True

    def _begins(self, now_s: float, record: IterationRecord) -> None:
        # Settled here, not where Python is: ranks' Python may be several iterations apart, their GPUs are not.
        record.directive = self._link.timetable.at(record.number)
        record.begin_s = now_s
        if self._helper is not None:
            self._helper.mark(begin_tag(record.number))

    def _apply(self, now_s: float, record: IterationRecord) -> None:
        """The GPU gets to the schedule: have the controller do what the directive says, unless it does already."""
        # Whatever the schedule, an iteration under a plan ends at full clocks, and one at a single clock at that clock:
        # the next one of the same sort finds the clock as it was.
        if not record.replayed:
            record.directive = with_own_plan(record.directive, self._link.parts, record)
        held, self._held = self._held, (record.directive.identity,)
        own = record.number if isinstance(record.directive, Follow) and record.directive.batch else None
        wanted = (record.directive.identity, record.schedule, own, record.replayed)
        if wanted != self._followed:
            self._followed = wanted if self._control(record.directive, record) else None
        if self._controller is not None:
            lowered_mhz = self._controller.start(record.begin_s)
            if lowered_mhz is not None:
                record.lowered.append((-1, lowered_mhz))
            if record.replayed:
                self._controller.launched(now_s)
        record.applied = self._followed is not None
        record.undisturbed = record.applied and held == self._held

    def _control(self, directive: Directive, record: IterationRecord) -> bool:
        """False if what the directive says cannot be done (yet): full clocks then."""
        if self._controller is None:
            return True
        if isinstance(directive, Sweep):
            self._controller.hold(directive.frequency_mhz)
            return True
        part = part_for(self._link.parts, directive, record)
        lead_s = self._link.rise_lead_s
        if record.replayed:
            if part is not None and part.phases is not None and lead_s > 0:  # 0: not known, and rises would come late
                self._controller.follow_by_time(part.phases, lead_s=lead_s)
                return True
        elif part is not None and len(part.clocks_mhz) == 1 + max(record.slots):
            self._controller.follow(part.clocks_mhz, part.times_s, part.catch_up, part.waits, rise_lead_s=lead_s)
            return True
        self._controller.hold(None)
        return isinstance(directive, FullClock)

    @_guarded
    def end_schedule(self) -> None:
        """The iteration's schedule is done; the loss is still to be exchanged."""
        self.tap.disarm()
        if self._controller is not None and self._record is not None and self._record.replayed:
            self._boundaries.reach(self._controller.replayed)

    @_guarded
    def end_iteration(self) -> None:
        """A training iteration has ended."""
        record, self._record = self._record, None
        if record is None:
            return
        self.tap.disarm()
        self._iteration += 1
        self._boundaries.reach(self._ended, record)
        self._write_events()

    def _ended(self, now_s: float, record: IterationRecord) -> None:
        record.end_s = now_s
        if self._controller is not None:
            record.woken_early = self._controller.finish(now_s)
        if self._helper is not None:
            self._helper.mark(end_tag(record.number))
        self._link.finished(FinishedIteration(record.directive, record))

    @_guarded
    def evaluation(self) -> None:
        """Something that is no training iteration runs: full clocks, and no part of any measurement.

        An iteration in the midst of which it runs is no part of any measurement either.
        """
        self._boundaries.reach(self._interrupt, self._record)

    def _interrupt(self, now_s: float, record: IterationRecord | None) -> None:
        if record is not None:
            record.undisturbed = False
        if self._controller is not None:
            self._controller.hold(None)
        self._held = self._followed = None

    @property
    def _takes_nothing(self) -> str:
        """Why nothing can be said to this session; empty: it can."""
        if os.getpid() != self._pid:
            return "this process was forked from the training process (a data loader's worker?), which is to say it"
        return "the session has ended" if self.closed else ""

    def report_straggler(self, **report: Any) -> str:
        """Send a straggler report to rank 0; see `perseus_plugin.report_straggler`.

        Returns:
            Why it is refused, or nothing. What only rank 0 can tell (a replay) is said in its log.
        """
        if self._takes_nothing:
            return self._takes_nothing
        if not self._stragglers.enabled:
            return "perseus.stragglers.enabled is false"
        if report.get("source") == DETECTION:
            return f"source: got {DETECTION!r}, which is the session's own"
        try:
            self._link.report(
                check_report(report, self._placement.world_size, self._stragglers.max_slowdown, time.time())
            )
        except StragglerError as error:
            return str(error)
        return ""

    def set_target(self, **said: Any) -> str:
        """Send rank 0 what the job is to aim at; see `perseus_plugin.set_target`.

        Returns:
            Why it is refused, or nothing. What only rank 0 can tell is said in its log.
        """
        if self._takes_nothing:
            return self._takes_nothing
        now_s = time.time()
        try:
            checked = check_say(said, now_s)
        except TargetError as error:
            return str(error)
        until = checked.until if checked.for_s is None else now_s + checked.for_s
        self._link.say(checked.model_copy(update={"until": until, "for_s": None}).model_dump(mode="json"))
        return ""

    def announce(self, work: Iterable[float], ahead: int, *, of_this: bool = False) -> str:
        """Send rank 0 how much work each microbatch of a batch is; see `perseus_plugin.announce`.

        With `of_this`, `ahead` counts from the step that is running, if one is.

        Returns:
            Why it is refused, or nothing.
        """
        if self._takes_nothing:
            return self._takes_nothing
        try:
            steps = operator.index(ahead)
        except TypeError:
            steps = -1
        if not 0 <= steps <= MOST_AHEAD:
            return f"ahead: got {shown(ahead)}; allowed: a whole number from 0 to {MOST_AHEAD}"
        on_gpu = "work: got a tensor on a GPU, which would have to be waited for; allowed: numbers on the CPU"
        if getattr(work, "is_cuda", False):
            return on_gpu
        try:
            numbers = list(islice(work, _MOST_MICROBATCHES + 1))
            if any(getattr(one, "is_cuda", False) for one in numbers):
                return on_gpu
            given = tuple(float(one) for one in numbers)
        except Exception as error:  # whatever is iterated over
            return f"work: {error}; {_WORK_ALLOWED}"
        if len(given) > _MOST_MICROBATCHES:  # tokens themselves: reading them takes time, and they fit in no message
            return f"work: got more than {_MOST_MICROBATCHES} numbers; {_WORK_ALLOWED}"
        wrong = next((one for one in given if not 0 < one < math.inf), None)
        if wrong is not None or not given:
            return f"work: got {'nothing' if wrong is None else wrong}; {_WORK_ALLOWED}"
        following = self._iteration + (self._record is not None and not of_this)
        self._link.announce(AnnouncedWork(iteration=following + steps, replica=self._placement.replica, work=given))
        return ""

    def external_figures(self, figures: ExternalFigures) -> None:
        """What another straggler detector has measured; of use on rank 0 only, which knows everybody's plan."""
        if not self.closed and self._stragglers.enabled and self._placement.leads:
            self._link.add_external(figures)

    def fail(self, error: Exception) -> None:
        """See `Lifetime.fail`."""
        self._lifetime.fail(error)

    def close(self) -> None:
        """End the session: reset clocks, write the summary, end helper, planner and thread. Idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child: everything here belongs to its parent
        self._lifetime.end()
        with self._closing:
            worker, self._worker = self._worker, None
        try:
            if worker is not None:
                worker.close()
        except Exception as error:  # a script that destroys its engine goes on, and the helper is still to be ended
            logger.warning("the summary may be incomplete: %r. Training is not affected", error)
        self.folder = None
        atexit.unregister(self.close)  # else every session of a long process would be kept
        if self._helper is not None:
            self._helper.close(timeout_s=2.0)
        self._exchange.close()
        try:
            self._write_events()
        except Exception as error:  # the framework may have taken its monitor down already
            logger.debug("last events not written: %r", error)

    def _write_events(self) -> None:
        if self._monitor is not None:
            for events in self._link.take_events():
                self._monitor(events)

    def _release(self, reason: str) -> None:
        self.tap.disarm()
        self._boundaries.close()
