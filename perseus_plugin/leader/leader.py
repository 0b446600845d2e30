"""What only rank 0 has: coordinator, planner, frontier, straggler socket, progress, publishers and summary."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Protocol

from perseus_plugin.errors import os_problem
from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.exchange.messages import STRAGGLERS, TARGETS, WORKS, RankStats, receive, stats_key
from perseus_plugin.iteration.instructions import StreamOf
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, Timetable
from perseus_plugin.leader.coordinator import Coordinator
from perseus_plugin.leader.job import Job
from perseus_plugin.leader.job_socket import JobSocket
from perseus_plugin.leader.planner_desk import Planner
from perseus_plugin.leader.target_book import described
from perseus_plugin.leader.target_figures import target_figures
from perseus_plugin.planning.batch_process import BatchProcess
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner_process import PlannerProcess
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.reporting.live.bill import Bill
from perseus_plugin.reporting.live.comparison import Compared
from perseus_plugin.reporting.live.power import Drawn, PowerMeter
from perseus_plugin.reporting.live.progress import Progress
from perseus_plugin.reporting.live.publishers import Publishers
from perseus_plugin.reporting.live.reporter import Reporter, events_of
from perseus_plugin.stragglers.external import ExternalFigures

logger = logging.getLogger(__name__)

Tell = Callable[[list[tuple[str, float]]], None]

_SUMMARY_EVERY_S = 30.0
_POWER_EVERY_S, _POWER_PER_RANK_S = 5.0, 0.1  # as often as ranks tell, more rarely where there are many to ask
_CRASH_TIMEOUT_S = 0.5


class ClosablePlanner(Planner, Protocol):
    """A planner that ends with the job."""

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class PlanningProcesses:
    """What plans beside the job.

    Attributes:
        planner: of its plans.
        refiner: of better ones; None: plans are not refined.
        frontier: None: there is to be none.
        batches: makes the one for announced batches.
    """

    planner: ClosablePlanner
    refiner: ClosablePlanner | None
    frontier: BackgroundFrontier | None
    batches: Callable[[], BatchProcess]

    @classmethod
    def of(cls, job: Job, wake: Callable[[], None], planner: ClosablePlanner | None = None) -> PlanningProcesses:
        """Those of a job, all of them in the Python that its configuration names.

        Args:
            job: what the session is about.
            wake: called from other threads when one has answered.
            planner: which is then the only one; None: it is started.
        """
        python, refiner = job.config.planner.python, None
        # It may be lost: there is a plan already, and nobody waits for a better one.
        if planner is None and job.config.refine_s:
            refiner = PlannerProcess(pauses_s=(), wake=wake, ahead=False, python=python)
        frontier = BackgroundFrontier(job.output_dir, python) if job.config.frontier else None
        # Last, as it is the only one that runs from now on.
        planner = planner or PlannerProcess(wake=wake, python=python)
        return cls(planner, refiner, frontier, lambda: BatchProcess(wake, python))


class Leader:
    """Rank 0's share of the session's thread.

    Args:
        job: what the session is about.
        tell: takes (name, value) figures, for the framework's monitor and others.
        wake: called when there is something to be done, from any thread.
        publishers: closed with the leader.
        planner: who plans; closed with the leader. None: a process that is started for it, and one that refines.
        final_stats_timeout_s: how long a job that ends waits for what its ranks tell last.

    Attributes:
        coordinates: whether plans will be made; not where no clock can be set.
        looks_every_s: how often it is to be given its turn at least, as something is looked at by the clock.
    """

    def __init__(
        self,
        job: Job,
        tell: Tell,
        *,
        wake: Callable[[], None],
        publishers: Publishers | None = None,
        planner: ClosablePlanner | None = None,
        final_stats_timeout_s: float = 5.0,
    ) -> None:
        self._placement, self._exchange, self._tell = job.placement, job.exchange, tell
        self._reporter = Reporter(job.output_dir, {**job.summary_facts, "dry_run": not job.config.enforce})
        self._progress = Progress(job.timetable)
        self._publishers = publishers
        self._signals, self._said_in_vain, self._refused_in_vain = job.signals, False, False
        self._bill = None if job.signals is None else Bill()
        self._heard: dict[int, RankStats] = {}
        self._summary_due_s = monotonic() + _SUMMARY_EVERY_S
        self._told_of: tuple[Plan | None, int] = (None, 0)
        self._meter = PowerMeter(job.placement.world_size)
        self._drawn: Drawn | None = None
        self._power_due_s = 0.0
        self._planner = planner
        self._processes: PlanningProcesses | None = None
        self._final_stats_timeout_s = final_stats_timeout_s
        self._coordinator: Coordinator | None = None
        self._socket: JobSocket | None = None
        if job.plans:
            with ExitStack() as undone:
                undone.callback(self.close)  # nobody else knows of the processes that are started here
                self._plan_with(job, planner, tell, wake)
                undone.pop_all()
        elif (limit := PowerBudget.configured(job.config)) is not None:
            logger.warning(
                "the power budget (%s) cannot be kept, as no clock is set. See the reason above, or limit the power of "
                "the GPUs (nvidia-smi -pl)",
                described(limit),
            )

    def _plan_with(self, job: Job, planner: ClosablePlanner | None, tell: Tell, wake: Callable[[], None]) -> None:
        """Start what plans, and what decides."""
        self._processes = processes = PlanningProcesses.of(job, wake, planner)
        self._coordinator = Coordinator(
            job,
            processes.planner,
            refiner=processes.refiner,
            frontier=processes.frontier,
            batch_process=processes.batches,
            tell=tell,
            wake=wake,
        )
        self._socket = _socket(job, self._coordinator.request)

    @property
    def coordinates(self) -> bool:
        """See the class."""
        return self._coordinator is not None

    @property
    def looks_every_s(self) -> float:
        """See the class."""
        return math.inf if self._coordinator is None else self._coordinator.targets.looks_every_s

    def saw(self, directive: Directive, record: IterationRecord, size: float) -> None:
        """An iteration has ended on this rank; see `Coordinator.saw`."""
        if record.schedule:  # one that is not followed is not profiled
            self._progress.iteration(directive, record)
        if self._coordinator is not None:
            self._coordinator.saw(directive, record, size)

    def swept_again(self, timetable: Timetable) -> None:
        """The timetable has another sweep."""
        self._progress.swept_again(timetable)

    def step(
        self,
        iteration: int,
        schedules: Mapping[str, StreamOf],
        newest: tuple[str, StreamOf] | None,
        external: Sequence[ExternalFigures] = (),
    ) -> None:
        """Do what can be done now.

        Args:
            iteration: the one that runs.
            schedules: all that have run.
            newest: the one that runs.
            external: figures of other straggler detectors that have come.

        Raises:
            ExchangeError: the store fails.
        """
        if self._coordinator is None:
            self._exchange.take_new(WORKS)  # of ranks that do not know that nothing is planned, and would pile up
            self._refuse_in_vain()
            self._look_in_vain()
            return
        if newest is not None:
            self._coordinator.use_schedules(schedules, newest)
        for figures in external:
            self._coordinator.judge_external(figures)
        self._coordinator.step(iteration)

    def update_summary(self, own: RankStats) -> None:
        """Now and then: a job that dies leaves a summary of how far it came."""
        stats = self._read_power(own)
        told_of = self._plan, 0 if self._coordinator is None else self._coordinator.state.reigns.changes
        if monotonic() < self._summary_due_s and self._told_of[0] is told_of[0] and self._told_of[1] == told_of[1]:
            return
        self._told_of = told_of
        self._summary_due_s = monotonic() + _SUMMARY_EVERY_S
        stats = stats or self._all_stats(own)
        self._account_for(stats)
        summary = self._reporter.update(stats, "running", **self._plan_facts())
        self._tell([*events_of(summary), *self._target_figures()])

    def finish(self, own: RankStats) -> None:
        """Write the last summary, once all ranks have told their last figures or have had time to.

        Raises:
            OSError: the output folder cannot be written.
        """
        deadline_s = monotonic() + (_CRASH_TIMEOUT_S if _crashing() else self._final_stats_timeout_s)
        stats = self._all_stats(own)
        while not (len(stats) == self._placement.world_size and all(s.final for s in stats)):
            if monotonic() > deadline_s:
                break
            sleep(0.05)
            stats = self._all_stats(own)
        self._take_last_references()
        self._account_for(stats)
        summary = self._reporter.finish(stats, "crashed" if _crashing() else "finished", **self._plan_facts())
        self._tell([*events_of(summary), *self._target_figures()])

    def _read_power(self, own: RankStats) -> list[RankStats]:
        """Now and then: a site that gives a budget wants to see what is drawn; returns what it has read for that."""
        if self._coordinator is None or monotonic() < self._power_due_s:
            return []
        of_all_s = _POWER_PER_RANK_S * self._placement.world_size
        self._power_due_s = monotonic() + min(max(_POWER_EVERY_S, of_all_s), _SUMMARY_EVERY_S)
        stats = self._all_stats(own)
        self._drawn = self._meter.read(stats) or self._drawn
        self._coordinator.drew(stats)
        self._coordinator.targets.measured(self._drawn)
        return stats

    def _target_figures(self) -> list[tuple[str, float]]:
        if self._coordinator is None:
            return []
        return target_figures(self._coordinator.state, self._drawn, self._placement.world_size)

    def _refuse_in_vain(self) -> None:
        """Where no clock is set: nothing that the job is told can be done, which is said once."""
        told = [*self._exchange.take_new(TARGETS), *self._exchange.take_new(STRAGGLERS)]
        if told and not self._refused_in_vain:
            self._refused_in_vain = True
            logger.warning(
                "targets and straggler reports are refused, as no clock is set (logged once). See the reason above; "
                "this job takes the time and energy that it takes without them"
            )

    def _look_in_vain(self) -> None:
        """Where no clock is set: what signals ask for cannot be done, which is said once."""
        asked = None if self._signals is None or self._said_in_vain else self._signals.look()
        if asked is None or (asked.wish is None and asked.limit is None):
            return
        self._said_in_vain = True
        logger.warning(
            "what perseus.signals ask for (%s) cannot be done, as no clock is set. See the reason above; energy is "
            "accounted for where it is measured",
            " and ".join(described(of) for of in (asked.wish, asked.limit) if of is not None),
        )

    def _account_for(self, stats: Sequence[RankStats]) -> None:
        """What energy has been taken since the last time had the value that held meanwhile."""
        if self._signals is not None and self._bill is not None:
            self._bill.add(stats, self._signals.worths())

    def _take_last_references(self) -> None:
        if self._coordinator is not None:
            try:
                self._coordinator.comparison.collect(at_once=True)
            except ExchangeError as error:  # the script may have taken the process group down
                logger.debug("the last references are missing: %s", error)

    def stop_taking_reports(self) -> None:
        """The session has failed: nobody shall be told that the job listens."""
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        """End what was started."""
        self.stop_taking_reports()
        made, batches = self._processes, None if self._coordinator is None else self._coordinator.batches
        planning = (self._planner,) if made is None else (made.planner, made.refiner, made.frontier)
        for part in (*planning, batches, self._publishers):
            if part is not None:
                part.close()

    def _all_stats(self, own: RankStats) -> list[RankStats]:
        """What is known of all ranks; of those that cannot be asked any more what they said last."""
        self._heard[self._placement.rank] = own
        try:
            for rank in range(self._placement.world_size):
                value = self._exchange.told(stats_key(rank))
                if value is not None:
                    self._heard[rank] = receive(RankStats, value)
        except ExchangeError as error:
            logger.debug("statistics of some ranks are missing: %s", error)
        return [self._heard[rank] for rank in sorted(self._heard)]

    @property
    def _plan(self) -> Plan | None:
        return None if self._coordinator is None else self._coordinator.plan

    def _plan_facts(self) -> dict[str, Any]:
        coordinator = self._coordinator
        return {
            "plan": self._plan,
            "planning_time_s": 0.0 if coordinator is None else coordinator.state.planning_time_s,
            "full_clock_scale": (1.0, 1.0) if coordinator is None else coordinator.full_clock_scale(),
            "predicted": None if coordinator is None else coordinator.predicted(),
            "overheads": None if coordinator is None else coordinator.overheads,
            "planned_schedules": {} if coordinator is None else coordinator.planned_schedules,
            "targets": {} if coordinator is None else dict(coordinator.state.reigns.iterations),
            "compared": Compared() if coordinator is None else coordinator.comparison.compared,
            "dropped_plans": 0 if coordinator is None else coordinator.state.dropped,
            "bill": self._bill,
            "batches": None if coordinator is None or coordinator.batches is None else coordinator.batches.figures,
            "stragglers": None if coordinator is None else coordinator.straggler_figures(),
        }


def _socket(job: Job, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> JobSocket | None:
    """Where `perseus target` and `perseus straggler` reach the job; None if they cannot, or are not wanted."""
    if not job.config.stragglers.socket:
        return None
    try:
        return JobSocket(job.output_dir, answer)
    except OSError as error:
        logger.warning(
            "`perseus target` and `perseus straggler` cannot reach this job: %s; all else goes on. Give the job a "
            "perseus.output_dir of its own with a short path, or set perseus.stragglers.socket to false",
            os_problem(error),
        )
        return None


def _crashing() -> bool:
    """Whether the interpreter ends because of an exception; the other ranks are then not waited for long.

    At a prompt an exception ends nothing.
    """
    return getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
