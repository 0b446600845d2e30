"""Rank 0 between the job and its decisions: observes, has `decide` decide, and does what that asks for.

Runs on the session's own thread: every method returns at once, waiting is done by being asked again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perseus_plugin.exchange.messages import NEWS, TROUBLE, Placement, RankStats, Trouble, part_key, receive
from perseus_plugin.files import try_to_write
from perseus_plugin.iteration.instructions import StreamOf
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.iteration.timetable import Directive
from perseus_plugin.leader.batch_desk import BatchDesk, BatchPlannerProcess
from perseus_plugin.leader.decide import decide, with_ended
from perseus_plugin.leader.effects import (
    Ask,
    Effect,
    ForgetIterations,
    Order,
    PublishSet,
    Record,
    RefuseReports,
    SaveFailure,
    SaveProfile,
    Say,
    Show,
    ShowPlan,
    WithdrawSet,
)
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.job import Job
from perseus_plugin.leader.measuring import SweepInForce
from perseus_plugin.leader.observed import (
    Answered,
    Checked,
    Drew,
    DrewAtFull,
    Due,
    Ended,
    Measured,
    NotMeasured,
    Observed,
    Placed,
    Rechecked,
    Runs,
    Situated,
    Targeted,
    Troubled,
    Turned,
    Watched,
)
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.leader.planner_desk import Planner, PlannerDesk
from perseus_plugin.leader.rank_reports import RankReports
from perseus_plugin.leader.recent import RecentIterations
from perseus_plugin.leader.state import JobState, Phase, Rules
from perseus_plugin.leader.target_book import Goal, TargetBook
from perseus_plugin.leader.target_desk import REQUESTS, TargetDesk
from perseus_plugin.leader.target_figures import in_force
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.inputs import INPUTS_FILE, save_inputs
from perseus_plugin.planning.plan import Plan, save_plan
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.failed import save_failure
from perseus_plugin.profiling.kept import save_survey
from perseus_plugin.profiling.known import profiled_as
from perseus_plugin.reporting.live.comparison import Comparison
from perseus_plugin.reporting.live.events import EventLog
from perseus_plugin.reporting.live.power import at_full_clocks, under_plan
from perseus_plugin.reporting.live.summary import Predicted
from perseus_plugin.stragglers.desk import StragglerDesk
from perseus_plugin.stragglers.external import ExternalFigures
from perseus_plugin.stragglers.situation import Answers

logger = logging.getLogger(__name__)

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING}


class Coordinator:
    """See the module's docstring; ranks hear of what is decided through `News`.

    Args:
        job: what the session is about.
        planner: who plans.
        refiner: who refines plans in force, None: nobody.
        frontier: told of every plan's request, None where no frontier is wanted.
        batch_process: starts who plans for single batches, None: nobody does.
        tell: takes (name, value) figures.
        wake: called when a straggler report has come, from any thread.
        monotonic: a clock that never goes back.
        now: Unix time.

    Attributes:
        stragglers: where reports come in.
        targets: where comes in what the job is to aim at.
        batches: where batches are announced and planned for; None: nobody plans for them.
        comparison: of the plans with full clocks.
    """

    def __init__(
        self,
        job: Job,
        planner: Planner,
        *,
        refiner: Planner | None = None,
        frontier: BackgroundFrontier | None = None,
        batch_process: Callable[[], BatchPlannerProcess] | None = None,
        tell: Callable[[list[tuple[str, float]]], None] = lambda figures: None,
        wake: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        config, placement, timetable = job.config, job.placement, job.timetable
        pipelines = placement.replicas * placement.shards
        self._job, self._exchange, self._frontier = job, job.exchange, frontier
        self._tell, self._monotonic, self._now = tell, monotonic, now
        self._frontier_of: PlanRequest | None = None
        self._events = EventLog(job.output_dir)
        self._reports = RankReports(job.exchange, placement.world_size)
        self._recent = RecentIterations(job.exchange, placement.world_size)
        self._desk = PlannerDesk(config, planner, self._recent, self._reports, placement.stages, pipelines, refiner)
        self.stragglers = StragglerDesk(
            config.stragglers,
            job.exchange,
            world_size=placement.world_size,
            stages=placement.stages,
            shards=placement.shards,
            events=self._events,
            wake=wake,
        )
        self.targets = TargetDesk(
            job.exchange,
            signals=job.signals if config.enforce else None,
            complete=lambda limit: limit.completed(config),
            file=None if config.target_file is None else Path(config.target_file),
            wake=wake,
        )
        self.batches = (
            None
            if batch_process is None
            else BatchDesk(job.exchange, placement, self._recent, config.watch.tolerance_against_sweep, batch_process)
        )
        self._rules = Rules(
            config,
            placement.stages,
            timetable.steps_per_block,
            job.top_mhz,
            job.full_sweep_mhz or timetable.sweep.clocks_mhz,
            placement.replica,
            pipelines,
        )
        configured = Goal(Target.configured(config), PowerBudget.configured(config))
        self._ended: list[Ended] = []
        self._decided = JobState(
            times=IterationTimes(config.watch.patience),
            plans=PlanShelf(placement.stages, by_time=config.cuda_graph),
            answers=Answers(
                stages=placement.stages,
                replicas=placement.replicas,
                shards=placement.shards,
                min_interval_s=config.stragglers.min_interval_s,
            ),
            sweep=SweepInForce(timetable.sweep.clocks_mhz, timetable.sweep_end),
            margin=config.margin,
            known=job.known.survey,
            targets=TargetBook(configured.wish, configured.limit),
            goal=configured,
        )
        self.comparison = Comparison(
            config.watch, job.exchange, placement.world_size, self._graph_s, leader=placement.leader
        )

    def _graph_s(self, schedule: str) -> float:
        return self.state.expectations.graph_s(schedule)

    # What rank 0 sees of its own iterations.

    def use_schedule(self, key: str, stream_of: StreamOf) -> None:
        """The schedule that iterations run from now on."""
        if key != self.state.schedules.newest:
            self._observe(Runs(key, stream_of))

    def use_schedules(self, all_by_key: Mapping[str, StreamOf], newest: tuple[str, StreamOf]) -> None:
        """The schedules that have run so far, and the one that iterations run from now on.

        Several may have begun since the last time. One that is known has not run again for being among them.
        """
        for key, stream_of in all_by_key.items():
            if key not in self.state.schedules:
                self.use_schedule(key, stream_of)
        self.use_schedule(*newest)

    def saw(self, directive: Directive, record: IterationRecord, size: float = math.nan) -> None:
        """An iteration has ended on rank 0.

        Args:
            directive: what it ran as.
            record: what was seen.
            size: how much work it had, as a multiple of the profile's; NaN: not known.
        """
        counts = record.undisturbed and record.timed
        time_s = record.end_s - record.begin_s
        self._ended.append(Ended(record.number, directive, record.schedule, time_s, counts, size))
        if self.batches is not None:
            self.batches.saw(directive, record)

    def judge_external(self, figures: ExternalFigures) -> None:
        """Enter what another detector's figures say once they are corrected for the plans in force."""
        news = self.state.orders.latest
        if self.state.phase is not Phase.FOLLOWING or news is None:
            return
        plans = self.state.plans

        def slowed(placement: Placement) -> float | None:
            return plans.slowed_by(news.version_for(placement.replica), placement.stage, figures.kinds)

        self.stragglers.take_external(figures, news.sequence, slowed)

    def drew(self, stats: Sequence[RankStats]) -> None:
        """What ranks tell of the power that their GPUs have drawn."""
        full = at_full_clocks(stats, self._job.placement.world_size)
        if full is not None:
            self._observe(DrewAtFull(full.power_w, full.iterations))
        news = self.state.orders.latest
        if news is None or news.action != "follow":
            return
        drawn = under_plan(stats, self._job.placement.world_size, news.since)
        if drawn is not None:
            self._observe(Drew(drawn.power_w, drawn.iterations, drawn.over_s))

    # The loop: observe, decide, do.

    def step(self, iteration: int) -> None:
        """Do what can be done now; `iteration` is the one running on rank 0.

        Raises:
            ExchangeError: the store fails.
        """
        self.stragglers.collect()
        if self._frontier is not None:
            self._frontier.step()
        if self.phase is not Phase.GIVEN_UP:
            self._look(iteration)
        if self.batches is not None:
            self.batches.step(self.state, self._monotonic(), self._exchange.news_take_s)
        self._look_for_targets(iteration)

    def _look(self, iteration: int) -> None:
        self._observe(Turned(iteration, self._exchange.news_take_s, self._monotonic()))
        trouble = self._exchange.heard(TROUBLE)
        if trouble is not None:
            told = receive(Trouble, trouble)
            self._observe(Troubled(told.rank, told.reason))
            return
        if not self.state.gpus_per_node and (placed := self._reports.placed()) is not None:
            self._observe(Placed(placed[1]))
        answered = self._desk.answer()
        if answered is not None:
            self._observe(Answered(*answered, self._monotonic()))
        self._observe(Due())
        if self.phase is Phase.MEASURING:
            self._look_for_measurements(iteration)
        elif self.phase is Phase.FOLLOWING:
            self._look_for_stragglers()
            self._look_at_references()
        elif self.phase is Phase.RECHECKING and self.state.times.again is not None:  # as soon as ranks can have told
            complete = self._reports.all_rechecks(self.state.recheck_sequence)
            self._observe(Rechecked(self.stragglers.corrected(self._reports.rechecks), complete))

    def _look_for_targets(self, iteration: int) -> None:
        said, unix_s = self.targets.collect(), self._now()
        if said or unix_s >= self.state.targets.next_end:
            self._observe(Targeted(said, unix_s))
        state = self.state
        self.targets.show(state.targets, in_force(state), state.phase.value, iteration, state.draws)

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request of the job's socket; on any thread.

        Raises:
            PerseusError: it is refused.
        """
        desk = self.targets if request.get("do") in REQUESTS else self.stragglers
        return desk.request(request)

    def _look_for_measurements(self, iteration: int) -> None:
        if not self.state.schedules or iteration < self.state.sweep.end:
            return
        overdue = self._reports.overdue
        if self.state.known is not None:
            if self._reports.all_rechecks(0) or overdue:
                self._observe(Checked(list(self._reports.rechecks.values())))
            return
        estimates = self._reports.all_estimates()
        if estimates is not None:
            self._observe(Measured(estimates, {} if self.batches is None else self.batches.step_works))
        elif overdue:
            self._observe(NotMeasured(self._reports.missing))

    def _look_for_stragglers(self) -> None:
        assert self.plan is not None  # it is followed
        schedule = self.plan.schedule
        situation = self.stragglers.current(schedule, self.state.expectations.full_s(schedule))
        self._observe(Situated(situation, self._monotonic()))

    def _look_at_references(self) -> None:
        if self.phase is not Phase.FOLLOWING or self.state.unanswered:
            return
        slowed = self.comparison.too_slow(self.state.plans.allowed_slowdown) if self.comparison.collect() else None
        said = "" if slowed is None else self.comparison.said
        self._observe(Watched(slowed, said, self._desk.idle, self._desk.refiner_idle))

    def _observe(self, observed: Observed) -> None:
        self._decided, effects = decide(self.state, observed, self._rules)
        for effect in effects:
            self._do(effect)

    def _do(self, effect: Effect) -> None:
        job = self._job
        match effect:
            case Say():
                logger.log(_LEVELS[effect.level], effect.text, *effect.values)
            case Order(news):
                if news.action == "sweep":
                    self._reports.next_round()
                if news.action == "sweep" or news.recheck:
                    self._reports.recheck_again()
                self._exchange.tell_all(NEWS, news.model_dump())
                self.comparison.begin(news.since)
            case PublishSet(version, parts):
                for stage, of_stage in enumerate(parts):
                    self._exchange.publish(part_key(version, stage), of_stage.model_dump())
            case WithdrawSet(version):
                for stage in range(job.placement.stages):
                    self._exchange.withdraw(part_key(version, stage))
            case Ask():
                self._desk.ask(effect)
            case SaveProfile(survey):
                try_to_write("the profile", lambda: save_survey(survey, job.known.fingerprint, job.output_dir))
            case SaveFailure(reason):
                fingerprint = profiled_as(job.config.profiling, job.known.fingerprint)
                try_to_write("why profiling failed", lambda: save_failure(reason, fingerprint, job.output_dir))
            case ShowPlan(plan, request):
                try_to_write("plan.json", lambda: save_plan(plan, job.output_dir / "plan.json"))
                inputs = request.as_made()
                try_to_write(INPUTS_FILE, lambda: save_inputs(inputs, job.output_dir / INPUTS_FILE))
                # A frontier is of all targets.
                of = replace(
                    request,
                    target=Target.slowdown(),
                    limit=None,
                    margin=0.0,
                    effort="quick",
                    catch_up=False,
                    made=None,
                )
                if self._frontier is not None and of != self._frontier_of:
                    self._frontier_of = of
                    self._frontier.renew(request)
            case ForgetIterations(schedule):
                self._recent.forget(schedule)
            case RefuseReports(reason):
                self.stragglers.refuse(reason)
            case Record(kind, facts):
                self._events.write(kind, **facts)
            case Show(figures):
                self._tell(list(figures))

    # For the summary.

    @property
    def phase(self) -> Phase:
        """What is waited for."""
        return self.state.phase

    @property
    def plan(self) -> Plan | None:
        """Of the schedule that runs most; None before the first."""
        return self.state.plan

    @property
    def state(self) -> JobState:
        """What is known, of all iterations that have ended."""
        if self._ended:  # entered together: to copy what is known takes longer than an iteration is worth
            ended, self._ended = self._ended, []
            self._decided = with_ended(self._decided, ended, self._rules)
        return self._decided

    def full_clock_scale(self) -> tuple[float, float] | None:
        """See `Expectations`."""
        return self.state.expectations.full_clock_scale(self.plan)

    def predicted(self) -> Predicted | None:
        """See `Expectations`."""
        return self.state.expectations.predicted(self.plan, self.state.replayed)

    @property
    def overheads(self) -> Overheads | None:
        """What iterations of the usual schedule take beside the work that is known; None before the first plan."""
        request = None if self.plan is None else self.state.requests.get(self.plan.schedule)
        return None if request is None else request.overheads

    @property
    def planned_schedules(self) -> Mapping[str, int]:
        """How often each schedule has run under the plans in force."""
        return dict(self.state.times.planned)

    def straggler_figures(self) -> dict[str, Any]:
        """What came in, and what came of it."""
        return {**asdict(self.stragglers.figures), **asdict(self.state.answers.figures)}
