"""What only rank 0 has: coordinator, planner, frontier, straggler socket, progress, publishers and summary."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.selection import Selection
from perseus_plugin.errors import os_problem
from perseus_plugin.exchange.messages import Placement, RankStats, receive, stats_key
from perseus_plugin.exchange.store import Exchange, ExchangeError
from perseus_plugin.iteration.timetable import Directive
from perseus_plugin.leader.coordinator import Coordinator
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import PlannerProcess
from perseus_plugin.profiling.known import Known
from perseus_plugin.reporting.live.comparison import Compared
from perseus_plugin.reporting.live.progress import Progress
from perseus_plugin.reporting.live.publishers import Publishers
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.reporting.live.reporter import Reporter, events_of
from perseus_plugin.session.link import Link
from perseus_plugin.session.tap import IterationRecord
from perseus_plugin.stragglers.desk import StragglerDesk
from perseus_plugin.stragglers.socket import StragglerSocket

logger = logging.getLogger(__name__)

_SUMMARY_EVERY_S = 30.0
_FINAL_STATS_TIMEOUT_S = 5.0
_CRASH_TIMEOUT_S = 0.5


class Leader:
    """Rank 0's share of the session's thread.

    Args:
        config, placement, link, exchange, output_dir, selection, known, full_sweep_mhz: as for `SessionWorker`.
        relay: where figures for the framework's monitor go.

    Attributes:
        coordinates: whether plans will be made; not where no clock can be set.
    """

    def __init__(
        self,
        *,
        config: PerseusConfig,
        placement: Placement,
        link: Link,
        exchange: Exchange,
        output_dir: Path,
        selection: Selection,
        known: Known,
        full_sweep_mhz: tuple[int, ...],
        relay: FigureRelay,
    ) -> None:
        self._config, self._placement = config, placement
        self._link, self._exchange, self._relay = link, exchange, relay
        facts = {
            "world_size": placement.world_size,
            "stages": placement.stages,
            "gpu": selection.name,
            "emulated": selection.emulated,
            "backend": selection.backend,
        }
        self._reporter = Reporter(output_dir, facts)
        self._progress = Progress(link.timetable)
        self._publishers = Publishers(config, facts)
        link.publish = self._publishers
        self._heard: dict[int, RankStats] = {}
        self._summary_due_s = monotonic() + _SUMMARY_EVERY_S
        self._plan_told: Plan | None = None
        self._planner: PlannerProcess | None = None
        self._frontier: BackgroundFrontier | None = None
        self._coordinator: Coordinator | None = None
        self._socket: StragglerSocket | None = None
        if link.timetable.sweep.clocks_mhz:
            self._planner = PlannerProcess()
            self._frontier = BackgroundFrontier(output_dir) if config.frontier else None
            self._coordinator = Coordinator(
                config,
                exchange,
                self._planner,
                world_size=placement.world_size,
                stages=placement.stages,
                shards=placement.shards,
                timetable=link.timetable,
                output_dir=output_dir,
                survey=known.survey,
                fingerprint=known.fingerprint,
                full_sweep_mhz=full_sweep_mhz,
                frontier=self._frontier,
            )
            self._take_reports(self._coordinator.stragglers, output_dir)

    @property
    def coordinates(self) -> bool:
        """See the class."""
        return self._coordinator is not None

    def _take_reports(self, desk: StragglerDesk, output_dir: Path) -> None:
        desk.monitor, desk.wake = self._relay.tell, self._link.wake.set
        if not (self._config.stragglers.enabled and self._config.stragglers.socket):
            return
        try:
            self._socket = StragglerSocket(output_dir, desk.request)
        except OSError as error:
            logger.warning(
                "`perseus straggler` cannot reach this job: %s; all else goes on. Give the job a perseus.output_dir of "
                "its own with a short path, or set perseus.stragglers.socket to false",
                os_problem(error),
            )

    def saw(self, directive: Directive, record: IterationRecord, size: float) -> None:
        """An iteration has ended on this rank; see `Coordinator.saw`."""
        if record.schedule:  # one that is not followed is not profiled
            self._progress.iteration(directive, record)
        if self._coordinator is not None:
            self._coordinator.saw(directive, record, size)

    def swept_again(self) -> None:
        """The timetable has another sweep."""
        self._progress.timetable = self._link.timetable

    def step(self) -> None:
        """Do what can be done now.

        Raises:
            ExchangeError: the store fails.
        """
        if self._coordinator is None:
            return
        newest = self._link.schedule
        for key, stream_of in self._link.schedules.items():
            if newest is not None and key != newest[0]:
                self._coordinator.use_schedule(key, stream_of)
        if newest is not None:
            self._coordinator.use_schedule(*newest)
        for figures in self._link.take_external():
            self._coordinator.judge_external(figures)
        self._coordinator.step(self._link.iteration)

    def update_summary(self, own: RankStats) -> None:
        """Now and then: a job that dies leaves a summary of how far it came."""
        if monotonic() < self._summary_due_s and self._plan_told is self._plan:
            return
        self._plan_told = self._plan
        self._summary_due_s = monotonic() + _SUMMARY_EVERY_S
        summary = self._reporter.update(self._all_stats(own), "running", **self._plan_facts())
        self._relay.tell(events_of(summary))

    def finish(self, own: RankStats) -> None:
        """Write the last summary, once all ranks have told their last figures or have had time to.

        Raises:
            OSError: the output folder cannot be written.
        """
        deadline_s = monotonic() + (_CRASH_TIMEOUT_S if _crashing() else _FINAL_STATS_TIMEOUT_S)
        stats = self._all_stats(own)
        while not (len(stats) == self._placement.world_size and all(s.final for s in stats)):
            if monotonic() > deadline_s:
                break
            sleep(0.05)
            stats = self._all_stats(own)
        self._take_last_references()
        summary = self._reporter.finish(stats, "crashed" if _crashing() else "finished", **self._plan_facts())
        self._relay.tell(events_of(summary))

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
        for part in (self._planner, self._frontier, self._publishers):
            if part is not None:
                part.close()

    def _all_stats(self, own: RankStats) -> list[RankStats]:
        """What is known of all ranks; of those that cannot be asked any more what they said last."""
        self._heard[self._placement.rank] = own
        try:
            for rank in range(self._placement.world_size):
                value = self._exchange.fetch(stats_key(rank))
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
            "planning_time_s": 0.0 if coordinator is None else coordinator.planning_time_s,
            "full_clock_scale": (1.0, 1.0) if coordinator is None else coordinator.full_clock_scale(),
            "predicted": None if coordinator is None else coordinator.predicted(),
            "planned_schedules": {} if coordinator is None else coordinator.planned_schedules,
            "compared": Compared() if coordinator is None else coordinator.comparison.compared,
            "dropped_plans": 0 if coordinator is None else coordinator.dropped,
            "stragglers": None if coordinator is None else asdict(coordinator.stragglers.figures),
        }


def _crashing() -> bool:
    """Whether the interpreter ends because of an exception; the other ranks are then not waited for long.

    At a prompt an exception ends nothing.
    """
    return getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
