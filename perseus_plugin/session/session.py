"""One job's life on one rank: warm-up, profile, plan, run, replan; the module that knows all others.

`Session` is what an integration calls on the training thread. It keeps that thread's part small: look up what the
iteration runs at, hand requests to the helper process, keep timestamps. All else is done by `worker.SessionWorker`.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from perseus_plugin.config import PerseusConfig, StragglersConfig
from perseus_plugin.control.boundaries import boundaries_for
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.controller import Controller
from perseus_plugin.control.examination import why_not_planned
from perseus_plugin.control.selection import Selection, emulates, select_gpu, with_facts
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import ConfigError, GpuError, PerseusError, os_problem
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.store import Exchange, open_exchange
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.timetable import (
    Directive,
    FullClock,
    Round,
    Sweep,
    Timetable,
    nearest_clocks,
)
from perseus_plugin.profiling.known import given_profile, kept_profile
from perseus_plugin.profiling.sweep import choose_clocks, sweep_order
from perseus_plugin.reporting.live.account import begin_tag, end_tag
from perseus_plugin.reporting.live.log import set_up_logging
from perseus_plugin.session.emulation import EmulatedStage
from perseus_plugin.session.link import FinishedIteration, Link, StreamOf, part_for
from perseus_plugin.session.tap import InstructionTap, IterationRecord, hooked_operations
from perseus_plugin.session.worker import SessionWorker
from perseus_plugin.stragglers.book import DETECTION, StragglerError, check_report
from perseus_plugin.stragglers.external import ExternalFigures

__all__ = ["Placement", "Session", "start_session"]

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 20.0

P = ParamSpec("P")
R = TypeVar("R")
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


class Session:
    """What an integration calls on the training thread; made by `start_session`.

    Attributes:
        tap: hooks call its `begin` and `end` around every hooked operation.
        rank: in the job.
        folder: what it writes its files to, None once that is over (or for none).
    """

    def __init__(
        self,
        placement: Placement,
        link: Link,
        helper: ClockHelper | None,
        emulated: EmulatedStage | None,
        exchange: Exchange,
        monitor: Monitor | None,
        stragglers: StragglersConfig | None = None,
        folder: Path | None = None,
    ) -> None:
        self.rank, self.folder = placement.rank, folder
        self._closing = threading.Lock()
        self.closed = False
        self._pid = os.getpid()
        self._on_close: list[Callable[[], None]] = []
        self._placement = placement
        self._stragglers = stragglers or StragglersConfig()
        self._link = link
        self._helper = helper
        self._controller = None if helper is None else Controller(helper)
        self._emulated = emulated
        self._exchange = exchange
        self._monitor = monitor
        link.writes_events = monitor is not None
        with self._closing:  # a boundary's thread that fails at once waits until all is there
            self._boundaries = boundaries_for(placement.device, self.fail)
            self.tap = InstructionTap(self._boundaries, self._controller, self.fail)
            self.tap.execution = emulated
        self._iteration = 0
        self._record: IterationRecord | None = None
        self._held: tuple[object] | None = None
        self._followed: tuple[object, str] | None = None
        self._schedule = ""
        self._operations: dict[str, tuple[tuple[Compute | Constant, ...], list[int]]] = {}

    @property
    def controller(self) -> Controller | None:
        """Who turns instruction boundaries into clock requests; None in observe mode."""
        return self._controller

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call this when the session ends or fails; it puts the framework back as it was."""
        self._on_close.append(callback)

    @_guarded
    def begin_iteration(self) -> None:
        """A training iteration begins."""
        emulated = self._emulated
        if emulated is not None and emulated.needs_calibration and self._iteration >= self._link.timetable.sweep.first:
            emulated.calibrate(self._exchange)
        self._record = IterationRecord(self._iteration)
        self._boundaries.reach(self._begins, self._record)

    def begin_schedule(self, key: str, stream_of: StreamOf) -> bool:
        """The iteration's schedule begins.

        Args:
            key: known schedules are known by it.
            stream_of: the instruction stream of a stage.

        Returns:
            Whether hooked operations shall be hooked at all.
        """
        return bool(self._begin_schedule(key, stream_of))

    @_guarded
    def _begin_schedule(self, key: str, stream_of: StreamOf) -> bool:
        record = self._record
        if record is None:
            return False
        if key != self._schedule:
            if key not in self._operations:
                self._operations[key] = hooked_operations(stream_of(self._placement.stage))
            self._schedule = key
            self._link.use_schedule(key, stream_of)
        record.schedule = key
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
        held, self._held = self._held, (record.directive.identity,)
        wanted = (record.directive.identity, record.schedule)
        if wanted != self._followed:
            self._followed = wanted if self._control(record.directive, record) else None
        if self._controller is not None:
            self._controller.start(record.begin_s)
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
        if part is not None and len(part.clocks_mhz) == 1 + max(record.slots):
            self._controller.rise_lead_s = self._link.rise_lead_s
            self._controller.follow(part.clocks_mhz, part.times_s, part.catch_up)
            return True
        self._controller.hold(None)
        return isinstance(directive, FullClock)

    @_guarded
    def end_schedule(self) -> None:
        """The iteration's schedule is done; the loss is still to be exchanged."""
        self.tap.disarm()

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

    def report_straggler(self, **report: Any) -> str:
        """Send a straggler report to rank 0; see `perseus_plugin.report_straggler`.

        Returns:
            Why it is refused, or nothing. What only rank 0 can tell (a replay) is said in its log.
        """
        if self.closed:
            return "the session has ended"
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

    def external_figures(self, figures: ExternalFigures) -> None:
        """What another straggler detector has measured; of use on rank 0 only, which knows everybody's plan."""
        if not self.closed and self._stragglers.enabled and self._placement.leads:
            self._link.add_external(figures)

    def fail(self, error: Exception) -> None:
        """End the session because of an error: full clocks, one message, training goes on."""
        if not self._end():
            return
        if isinstance(error, GpuError):
            logger.warning(
                "perseus is off from here on: %s. Training goes on at full clocks; run `perseus doctor` on this "
                "machine",
                error,
            )
        elif isinstance(error, PerseusError):
            logger.warning(
                "perseus is off from here on: %s. Training goes on at full clocks; a restart of the job tries again",
                error,
            )
        else:
            logger.error(
                "perseus is off from here on; training goes on at full clocks. This is a fault of perseus_plugin: "
                "please report it with what follows",
                exc_info=error,
            )
        self._link.trouble(str(error) or repr(error))
        self._link.writes_events = False
        self._release()

    def _end(self) -> bool:
        """The clock is given up for good; False if it was already."""
        with self._closing:
            ended, self.closed = self.closed, True
        if not ended and self._helper is not None:
            self._helper.retire()
        return not ended

    def close(self) -> None:
        """End the session: reset clocks, write the summary, end helper, planner and thread. Idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child: everything here belongs to its parent
        if self._end():
            self._release()
        with self._closing:
            callback, self._link.close = self._link.close, lambda: None
        try:
            callback()
        except Exception as error:  # a script that destroys its engine goes on, and the helper is still to be ended
            logger.warning("the summary may be incomplete: %r. Training is not affected", error)
        self.folder = None
        atexit.unregister(self.close)  # else every session of a long process would be kept
        if self._helper is not None:
            self._helper.close(timeout_s=2.0)
        try:
            self._write_events()
        except Exception as error:  # the framework may have taken its monitor down already
            logger.debug("last events not written: %r", error)

    def _write_events(self) -> None:
        if self._monitor is not None:
            for events in self._link.take_events():
                self._monitor(events)

    def _release(self) -> None:
        self.tap.disarm()
        self._boundaries.close()
        for callback in self._on_close:
            callback()


def start_session(
    config: PerseusConfig,
    placement: Placement,
    monitor: Monitor | None = None,
    facts: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    exchange: Exchange | None = None,
) -> Session:
    """Start a session on this rank.

    Args:
        config: the `perseus` block, enabled.
        placement: where this rank sits.
        monitor: writes (name, value) events; only where the framework has somewhere to write them.
        facts: what makes this rank's part of the job what it is (model, microbatch size, versions); a profile kept
            from an earlier run is used only if they are the same.
        about: further facts for the records alone, which may change without making a kept profile another job's.
        exchange: to the job's other ranks; None: through its default store.

    Raises:
        ConfigError: something in the block does not fit this job; raised on every rank, before training starts.
    """
    set_up_logging(config.log_level, placement)
    output_dir = _own_folder(Path(config.output_dir), placement.rank)
    if placement.leads or emulates(config, placement):
        _make(output_dir)
    known = given_profile(config, placement)
    _check_emulation(config, placement)
    if exchange is None:
        exchange = open_exchange(_next_name())
    # Emulated GPUs lie in the configured folder: as real ones do, they outlive a session, and several may meet there.
    selection, helper = _take_gpu(config, select_gpu(config, placement, Path(config.output_dir)))
    try:
        if known is None:
            known = kept_profile(config, placement, selection, facts or {}, exchange, output_dir)
        if known.failed and helper is not None:
            helper.close(timeout_s=1.0)
            helper, selection = None, replace(selection, spec=None, clocks_mhz=(), why_not=known.failed)
        sweep = full_sweep = _sweep(config, selection)
        if known.profile:
            sweep = full_sweep[:1]  # the top clock all the same, as the reference that the plan must keep to
        profiling = config.profiling
        first_round = Round(profiling.warmup_steps, sweep)
        timetable = Timetable(
            first_round,
            profiling.settle_steps,
            profiling.steps_per_clock,
            reference_share=config.watch.reference_share,
        )
        link = Link(timetable)
        if helper is None:
            _observe_only(selection, link, placement)
        elif config.limits.switch_latency_s is None:
            helper.measure_latency()
        else:
            link.rise_lead_s = config.limits.switch_latency_s
        worker = SessionWorker(
            config=config,
            placement=placement,
            link=link,
            helper=helper,
            exchange=exchange,
            output_dir=output_dir,
            selection=selection,
            known=known,
            full_sweep_mhz=full_sweep,
            writes_figures=monitor is not None,
            facts={**(facts or {}), **(about or {})},
        )
        emulated = None
        if selection.emulated_gpu is not None:
            emulated = EmulatedStage(selection.emulated_gpu, config.emulation, placement)
        session = Session(placement, link, helper, emulated, exchange, monitor, config.stragglers, output_dir)
    except BaseException:
        if helper is not None:
            helper.close(timeout_s=1.0)
        raise
    worker.start(session)
    live_sessions.add(session)
    atexit.register(session.close)
    return session


def _take_gpu(config: PerseusConfig, selection: Selection) -> tuple[Selection, ClockHelper | None]:
    """Start the helper of the selected GPU; without one if it cannot set clocks."""
    if selection.spec is None:
        return selection, None
    gives_way = config.gpu.foreign_clock == "give_way"
    helper = ClockHelper.start(selection.spec, min_dwell_s=config.limits.dwell_s, gives_way=gives_way)
    device = helper.wait_ready(_READY_TIMEOUT_S)
    if device is not None and device.leftover:
        logger.warning("the SM clock was %s; it is free again, nothing needs to be done", device.leftover)
    if device is not None and device.foreign:
        logger.warning("the SM clock %s", device.foreign)
    selection = with_facts(selection, device)
    if device is not None and selection.spec is not None:
        why_not = _why_not_planned(config, selection, device)
        if why_not:
            selection = replace(selection, spec=None, clocks_mhz=(), why_not=why_not)
    if selection.spec is None:
        helper.close(timeout_s=1.0)
        return selection, None
    return selection, helper


def _why_not_planned(config: PerseusConfig, selection: Selection, device: DeviceFacts) -> str:
    """Why a sweep could not lead to a plan on this GPU, known before it begins; empty if it could."""
    given = config.profiling.load is not None
    if not given and config.profiling.clocks_mhz is not None and len(set(selection.clocks_mhz)) > 1:
        tried = set(nearest_clocks(selection.clocks_mhz, config.profiling.clocks_mhz))
        if len(tried) < 2:
            return (
                f"perseus.profiling.clocks_mhz: {list(config.profiling.clocks_mhz)} are all {tried.pop()} MHz on this "
                f"GPU; allowed: clocks from {min(selection.clocks_mhz)} to {max(selection.clocks_mhz)} MHz that differ"
            )
    return why_not_planned(selection.clocks_mhz, device.counter, has_profile=given)


live_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
"""Sessions of this process."""
_sessions = 0


def _next_name() -> str:
    """Every rank makes its engines in the same order, so a count names the same session everywhere."""
    global _sessions
    _sessions += 1
    return str(_sessions)


def _own_folder(configured: Path, rank: int) -> Path:
    """The folder for a session's files: a further session of a rank, beside one that lives, has one of its own.

    Sessions that have failed keep theirs until they are closed, so all ranks choose alike.
    """
    taken = {session.folder for session in live_sessions if session.rank == rank}
    folder, number = configured, 1
    while folder in taken:
        number += 1
        folder = configured / f"session-{number}"
    if number > 1:
        logger.info("this is session %d of this process; its files are in %s", number, folder)
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"perseus.output_dir: got '{folder}'; allowed: a folder that can be written: {os_problem(error)}"
        ) from error


def _check_emulation(config: PerseusConfig, placement: Placement) -> None:
    for key in ("forward_time_s", "backward_time_s"):
        times = getattr(config.emulation, key)
        if times is not None and len(times) != placement.stages:
            raise ConfigError(
                f"perseus.emulation.{key}: got {len(times)} numbers; allowed: one per stage, {placement.stages} here"
            )
    measured = config.emulation.forward_time_s is None
    if emulates(config, placement) and measured and config.profiling.warmup_steps < 2:
        raise ConfigError(
            f"perseus.profiling.warmup_steps: got {config.profiling.warmup_steps}; allowed: a whole number from 2 "
            "when emulated times are taken from the CPU's (or give perseus.emulation.forward_time_s and "
            "backward_time_s)"
        )


def _observe_only(selection: Selection, link: Link, placement: Placement) -> None:
    """No clock will be set on this rank: say why; the other ranks must not plan on it."""
    if selection.backend == "off":
        if placement.leads:
            logger.info("observing only, as the gpu backend is off")
        return
    # What is missing mostly is missing on a whole machine: one line each. Any other rank's reason is told by rank 0.
    level = logging.WARNING if placement.local_rank == 0 else logging.DEBUG
    reason = selection.why_not
    logger.log(level, "observing only, no clock will be set: %s. `perseus doctor` tells more", reason)
    link.trouble(selection.why_not)


def _sweep(config: PerseusConfig, selection: Selection) -> tuple[int, ...]:
    """The clocks to profile in order; none without control. As many on every rank, whatever its GPU supports."""
    profiling, supported = config.profiling, selection.clocks_mhz
    if not supported:
        return ()
    if profiling.clocks_mhz is None:
        lowest_mhz = round(max(supported) * profiling.lowest_clock)
        return sweep_order(choose_clocks(supported, profiling.clock_count, lowest_mhz), profiling.seed)
    return nearest_clocks(supported, sweep_order(profiling.clocks_mhz, profiling.seed))
