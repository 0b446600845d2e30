"""Rank 0's side of stragglers: reports come in, the situation they make is told, and answers to it are kept.

The coordinator decides when to plan and when to switch; what there is to plan for, and what that has brought, is here.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from perseus_plugin.config import StragglersConfig
from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.messages import STRAGGLERS, Placement, RankStats, Recheck, receive, stats_key
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.planning.paced import Pace, Slowdowns
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import PaceRequest
from perseus_plugin.reporting.live.events import EventLog
from perseus_plugin.stragglers.book import DETECTION, StragglerBook, StragglerError, rounded_slowdown
from perseus_plugin.stragglers.external import ExternalFigures, ExternalJudge

logger = logging.getLogger(__name__)

_ANSWERS_KEPT = 32


@dataclass(frozen=True)
class Situation:
    """Who is slow, as far as plans depend on it.

    Attributes:
        schedule: key of the schedule that is planned.
        slow: replicas with slow stages, and how slow each of their stages is.
        untouched: replicas that are known to be slow, but not where: they keep the job's plan.
        at_least_s: longest iteration time that was reported, 0.0 for none.
        others: whether there are replicas besides those.
    """

    schedule: str
    slow: tuple[tuple[int, Slowdowns], ...]
    untouched: tuple[int, ...]
    at_least_s: float
    others: bool
    stages: int

    @property
    def variants(self) -> tuple[Slowdowns, ...]:
        """The sorts of pipeline that need a plan; replicas in the same situation share one."""
        distinct = sorted({slowdowns for _, slowdowns in self.slow})
        return (*([self.unslowed] if self.others else []), *distinct)

    @property
    def unslowed(self) -> Slowdowns:
        """A pipeline in which nothing is slow."""
        return (1.0,) * self.stages

    def request(self, plan: Plan, seconds_per_planned: float | None) -> PaceRequest:
        """What the planner has to be asked.

        Args:
            plan: the job's.
            seconds_per_planned: measured seconds per second of the graph; None: not known.
        """
        clocks_mhz = tuple(tuple(plan.clocks_mhz(stage)) for stage in range(self.stages))
        at_least_s = 0.0 if seconds_per_planned is None else self.at_least_s / seconds_per_planned
        return PaceRequest(self.variants, clocks_mhz, at_least_s)

    @property
    def identity(self) -> object:
        """Equal where the same plans do, whichever replicas they are for."""
        return (self.schedule, self.variants, self.at_least_s)


@dataclass(frozen=True)
class Answer:
    """Plans for one kind of situation.

    Attributes:
        pace: what the planner said; None if it found nothing, so that the job's plan stays.
        versions: numbers of plans by sort of pipeline; sorts for which the job's plan holds are missing.
    """

    pace: Pace | None
    versions: Mapping[Slowdowns, int]

    def versions_in(self, situation: Situation, set_with: Callable[[int | None], int]) -> tuple[int, dict[int, int]]:
        """The version of the set of plans of most replicas, and those of the replicas that have another one.

        Args:
            situation: a situation that this answers.
            set_with: the set that has the plan of this number in the place of the job's; None: the job's own set.
        """
        version = set_with(None)
        sets = {slowdowns: set_with(number) for slowdowns, number in self.versions.items()}
        for_others = sets.get(situation.unslowed, version)
        variants = {replica: sets.get(slowdowns, version) for replica, slowdowns in situation.slow}
        variants.update(dict.fromkeys(situation.untouched, version))
        return for_others, {replica: own for replica, own in variants.items() if own != for_others}


@dataclass
class StragglerFigures:
    """What happened, for the summary. Energies and times are estimates from the profile."""

    reports: int = 0
    detections: int = 0
    refused: int = 0
    replans: int = 0
    switches: int = 0
    iterations: int = 0
    energy_saved_j: float = 0.0
    time_saved_s: float = 0.0


class StragglerDesk:
    """See the module's docstring. `request` may be called from any thread, everything else from the worker's.

    Args:
        config: the `stragglers` block.
        exchange: to all ranks.
        world_size, stages: of the job.
        shards: ranks that work together on one stage of one replica.
        events: where everything is recorded.
        now, monotonic: clocks.

    Attributes:
        book: who is slow.
        figures: what happened so far.
        situation, answer: in force; None while nothing is slow.
        refusal: why every report is refused; empty if it is not.
        monitor: takes (name, value) events; set by who has somewhere to write them.
        wake: called when there is something new; set by who runs `collect`.
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
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._exchange, self._events = config, exchange, events
        self._stages, self._shards = stages, shards
        self._replicas = world_size // (stages * shards)
        self._now, self._monotonic = now, monotonic
        self.book = StragglerBook(world_size, config.max_slowdown)
        self.monitor: Callable[[list[tuple[str, float]]], None] = lambda events: None
        self.wake: Callable[[], None] = lambda: None
        self.refusal = "" if config.enabled else "perseus.stragglers.enabled is false"
        self.figures = StragglerFigures()
        self.situation: Situation | None = None
        self.answer: Answer | None = None
        self._answers: OrderedDict[object, Answer] = OrderedDict()
        self._placements: dict[int, Placement] = {}
        self._judges: dict[str, ExternalJudge] = {}
        self._judged_under: dict[str, int] = {}
        self._answered_s = float("-inf")
        self._said_job_slower = False
        self._refused_last = ""

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
        """Answer a request of the command line (see `straggler_socket`).

        Raises:
            PerseusError: it is refused.
        """
        match request:
            case {"do": "report", "report": {"source": source}} if source == DETECTION:
                raise StragglerError(f"source: got {DETECTION!r}, which is the session's own")
            case {"do": "report", "report": report}:
                self._enter(report)
                self.wake()
                return {}
            case {"do": "list"}:
                return {"reports": [report.model_dump() for report in self.book.live(self._now())]}
            case {"do": "clear", "rank": int() | None as rank}:
                gone = self.book.clear(rank)
                if gone:
                    self._events.write("cleared", reports=[report.model_dump() for report in gone])
                self.wake()
                return {"cleared": len(gone)}
        raise StragglerError("malformed request: allowed: report, list or clear")

    def _enter(self, value: Any) -> None:
        try:
            if self.refusal:
                raise StragglerError(self.refusal)
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

    def current(self, schedule: str) -> Situation | None:
        """The situation as it is now; None when nothing is slow."""
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
            value = self._exchange.fetch(stats_key(rank))
            if value is not None:
                self._placements[rank] = receive(RankStats, value).placement
        return self._placements.get(rank)

    def _say_if_job_is_slower(self) -> None:
        slower = self.book.job_is_slower(self.book.live(self._now()))
        if slower and not self._said_job_slower:
            logger.info("more than half of all ranks are slower than they were: the job has changed, nobody straggles")
            self._events.write("job_is_slower")
        self._said_job_slower = slower

    # Answers.

    @property
    def may_answer(self) -> bool:
        """Whether the last answer is long enough ago."""
        return self._monotonic() - self._answered_s >= self._config.min_interval_s

    def known(self, situation: Situation) -> Answer | None:
        """The answer to such a situation, if there has been one."""
        if situation.identity in self._answers:
            self._answers.move_to_end(situation.identity)
        return self._answers.get(situation.identity)

    def learn(self, situation: Situation, answer: Answer, planning_time_s: float, error: str = "") -> list[int]:
        """Keep an answer; returns numbers of plans that nobody will need any more."""
        self._answers[situation.identity] = answer
        self.figures.replans += 1
        facts: dict[str, Any] = {"error": error}
        if answer.pace is not None:
            facts = {
                "pace_s": answer.pace.pace_s,
                "without_s": answer.pace.without_s,
                "variants": [
                    {
                        "slowdown": variant,
                        "version": answer.versions.get(variant),
                        "energy_j": planned.energy_j,
                        "without_j": planned.without_j,
                        "mean_clock_mhz": None
                        if planned.plan is None
                        else [round(statistics.mean(planned.plan.clocks_mhz(s))) for s in range(self._stages)],
                    }
                    for variant, planned in zip(situation.variants, answer.pace.variants, strict=True)
                ],
            }
        self._events.write("replan", planning_time_s=planning_time_s, **facts)
        if len(self._answers) <= _ANSWERS_KEPT:
            return []
        _, oldest = self._answers.popitem(last=False)
        return list(oldest.versions.values()) if oldest is not self.answer else []

    def forget(self) -> None:
        """The profile has changed: no answer holds any more."""
        self._answers.clear()
        self.leave()

    def leave(self) -> None:
        """No answer is in force any more, for another reason than that nothing is slow."""
        self.situation = self.answer = None

    def switched(self, situation: Situation | None, answer: Answer | None, iteration: int, version: int) -> None:
        """This is in force from `iteration` on; None: the job's plan is, as nothing is slow."""
        self.situation, self.answer = situation, answer
        self._answered_s = self._monotonic()
        self.figures.switches += 1
        if situation is None:
            logger.info("no rank is slow any more: back to the job's plan")
        else:
            logger.info("planned for %d slow replica(s)", self.slow_replicas)
        slow = [] if situation is None else [[replica, list(stages)] for replica, stages in situation.slow]
        pace_s = None if answer is None or answer.pace is None else answer.pace.pace_s
        self._events.write("switch", iteration=iteration, version=version, slow=slow, pace_s=pace_s)
        self.monitor(
            [
                ("Perseus/straggler/slow_replicas", float(self.slow_replicas)),
                ("Perseus/straggler/switches", float(self.figures.switches)),
                ("Perseus/straggler/energy_saved_j", self.figures.energy_saved_j),
            ]
        )

    @property
    def slow_replicas(self) -> int:
        """How many pipelines are slow in the situation in force."""
        return 0 if self.situation is None else len(self.situation.slow) + len(self.situation.untouched)

    def count_iteration(self) -> None:
        """An iteration has run under the answer in force."""
        self.figures.iterations += 1
        if self.answer is None or self.situation is None or self.answer.pace is None:
            return
        of_slow = [slowdowns for _, slowdowns in self.situation.slow]
        for variant, planned in zip(self.situation.variants, self.answer.pace.variants, strict=True):
            count = self._replicas - self.slow_replicas if max(variant) == 1 else of_slow.count(variant)
            # A plan's energy is that of one GPU per stage.
            self.figures.energy_saved_j += self._shards * count * (planned.without_j - planned.energy_j)
        self.figures.time_saved_s += self.answer.pace.without_s - self.answer.pace.pace_s


def _printable(value: Any) -> str:
    try:
        return repr(value)[:200]
    except (RecursionError, PerseusError):
        return f"a value of type {type(value).__name__}"
