"""Rank 0's side of stragglers: reports come in, and the situation they make is told.

What answers a situation is decided in `leader.decide`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from perseus_plugin.config import StragglersConfig
from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.messages import STRAGGLERS, Placement, RankStats, Recheck, receive, stats_key
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.reporting.live.events import EventLog
from perseus_plugin.stragglers.book import DETECTION, StragglerBook, StragglerError, rounded_slowdown
from perseus_plugin.stragglers.external import ExternalFigures, ExternalJudge
from perseus_plugin.stragglers.situation import Situation

logger = logging.getLogger(__name__)


@dataclass
class ReportFigures:
    """What came in, for the summary."""

    reports: int = 0
    detections: int = 0
    refused: int = 0


class StragglerDesk:
    """See the module's docstring. `request` may be called from any thread, everything else from the worker's.

    Args:
        config: the `stragglers` block.
        exchange: to all ranks.
        world_size, stages: of the job.
        shards: ranks that work together on one stage of one replica.
        events: where everything is recorded.
        wake: called when a request has brought something new.
        now: Unix time.

    Attributes:
        book: who is slow.
        figures: what came in so far.
    """

    def __init__(
        self,
        config: StragglersConfig,
        exchange: Exchange,
        *,
        world_size: int,
        stages: int,
        shards: int = 1,
        events: EventLog,
        wake: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._exchange, self._events, self._wake = config, exchange, events, wake
        self._stages = stages
        self._replicas = world_size // (stages * shards)
        self._now = now
        self.book = StragglerBook(world_size, config.max_slowdown)
        self.figures = ReportFigures()
        self._refusal = "" if config.enabled else "perseus.stragglers.enabled is false"
        self._placements: dict[int, Placement] = {}
        self._judges: dict[str, ExternalJudge] = {}
        self._judged_under: dict[str, int] = {}
        self._said_job_slower = False
        self._refused_last = ""

    def refuse(self, why: str) -> None:
        """Every report is refused from now on."""
        self._refusal = why

    # What comes in.

    def collect(self) -> None:
        """Take what ranks have appended since the last call.

        Raises:
            ExchangeError: the store fails.
        """
        if not self._config.enabled:
            return
        for value in self._exchange.take_new(STRAGGLERS):
            try:
                self._enter(value)
            except StragglerError as error:
                # One that comes again and again is said once; events.jsonl has them all.
                again = str(error) == self._refused_last
                logger.log(logging.DEBUG if again else logging.WARNING, "a straggler report was refused: %s", error)
                self._refused_last = str(error)

    def take_external(self, figures: ExternalFigures, plans: int, slowed: Callable[[Placement], float | None]) -> None:
        """Enter what another detector's figures say.

        Args:
            figures: of iterations up to now.
            plans: number of the order that is followed; figures that span a change of plans are not looked at.
            slowed: how many times as long as at full clocks a rank's work takes by its plan; None: not known.
        """
        if figures.source not in self._judges:
            self._judges[figures.source] = ExternalJudge(self._config.threshold)
        if self._judged_under.get(figures.source) != plans:
            self._judged_under[figures.source] = plans
            return
        placed = {rank: self._placement(rank) for rank in figures.relative_time}
        planned = {rank: slowed(placement) for rank, placement in placed.items() if placement is not None}
        known = {rank: factor for rank, factor in planned.items() if factor is not None}
        for report in self._judges[figures.source].judge(figures, known):
            try:
                self._enter(report.model_dump())
            except StragglerError as error:
                logger.warning("what %r says of rank %d was refused: %s", figures.source, report.rank, error)

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request of the command line (see `leader.job_socket`).

        Raises:
            PerseusError: it is refused.
        """
        match request:
            case {"do": "report", "report": {"source": source}} if source == DETECTION:
                raise StragglerError(f"source: got {DETECTION!r}, which is the session's own")
            case {"do": "report", "report": report}:
                self._enter(report)
                self._wake()
                return {}
            case {"do": "list"}:
                return {"reports": [report.model_dump() for report in self.book.live(self._now())]}
            case {"do": "clear", "rank": int() | None as rank}:
                gone = self.book.clear(rank)
                if gone:
                    self._events.write("cleared", reports=[report.model_dump() for report in gone])
                self._wake()
                return {"cleared": len(gone)}
        raise StragglerError(
            "malformed request: allowed: report, list or clear; for targets target, targets or clear_target"
        )

    def _enter(self, value: Any) -> None:
        try:
            if self._refusal:
                raise StragglerError(self._refusal)
            report = self.book.take(value, self._now())
        except StragglerError as error:
            self.figures.refused += 1
            self._events.write("refusal", reason=str(error), report=_printable(value))
            raise
        if report.source == DETECTION:
            self.figures.detections += not report.ends
            what = f"rank {report.rank} is seen to be {report.slowdown:.3g} times as slow as it was"
            logger.info("%s", f"rank {report.rank} is seen to be back to normal" if report.ends else what)
        else:
            self.figures.reports += 1
            logger.info("rank %d is reported by %r", report.rank, report.source)
        facts = report.model_dump(exclude={"time"}, exclude_none=True)
        self._events.write("detection" if report.source == DETECTION else "report", **facts)

    # What there is to plan for.

    def current(self, schedule: str, full_clock_s: float | None) -> Situation | None:
        """The situation as it is now; None when nothing is slow.

        Args:
            schedule: the one that is planned for.
            full_clock_s: of its iterations, None: not known; an `iteration_time_s` that is reported is judged by it.
        """
        self.book.judge_by(full_clock_s)
        if not self._config.enabled:
            return None
        slowdowns: dict[int, list[float]] = {}
        untouched: set[int] = set()
        at_least_s = 0.0
        for slow in self.book.slow_ranks(self._now()):
            placement = self._placement(slow.rank)
            if placement is None:
                continue  # it has not said where it sits yet
            if slow.slowdown > 1:
                stages = slowdowns.setdefault(placement.replica, [1.0] * self._stages)
                stages[placement.stage] = max(stages[placement.stage], rounded_slowdown(slow.slowdown))
            else:
                untouched.add(placement.replica)
            at_least_s = max(at_least_s, slow.iteration_time_s)
        self._say_if_job_is_slower()
        listed = {replica: tuple(stages) for replica, stages in slowdowns.items() if max(stages) > 1}
        untouched -= listed.keys()
        if not listed and not untouched:
            return None
        others = len(listed) + len(untouched) < self._replicas
        return Situation(
            schedule, tuple(sorted(listed.items())), tuple(sorted(untouched)), at_least_s, others, self._stages
        )

    def corrected(self, rechecks: Mapping[int, Recheck]) -> list[Recheck]:
        """What ranks measured at full clocks, without the part that is known to be a straggler's."""
        known = {slow.rank: slow.slowdown for slow in self.book.slow_ranks(self._now())}
        return [
            r.model_copy(update={"time_s": {kind: t / known.get(rank, 1.0) for kind, t in r.time_s.items()}})
            for rank, r in rechecks.items()
        ]

    def _placement(self, rank: int) -> Placement | None:
        if rank not in self._placements:
            value = self._exchange.told(stats_key(rank))
            if value is not None:
                self._placements[rank] = receive(RankStats, value).placement
        return self._placements.get(rank)

    def _say_if_job_is_slower(self) -> None:
        slower = self.book.job_is_slower(self.book.live(self._now()))
        if slower and not self._said_job_slower:
            logger.info("more than half of all ranks are slower than they were: the job has changed, nobody straggles")
            self._events.write("job_is_slower")
        self._said_job_slower = slower


def _printable(value: Any) -> str:
    try:
        return repr(value)[:200]
    except (RecursionError, PerseusError):
        return f"a value of type {type(value).__name__}"
