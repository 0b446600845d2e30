"""Rank 0's part of a session: from the ranks' estimates to a plan, and what to do when the plan does not hold.

Runs on the session's own thread: every method returns at once, waiting is done by being asked again. What is collected,
measured, kept and told along the way is in `measuring`, `rank_reports`, `iteration_times`, `plan_shelf` and `orders`.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from perseus_plugin.config import PerseusConfig
from perseus_plugin.exchange.messages import TROUBLE, Placement, Trouble, receive
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.files import try_to_write
from perseus_plugin.iteration.instructions import StreamOp
from perseus_plugin.iteration.replayed import Replayed
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Sweep, Timetable
from perseus_plugin.leader.expectations import Expectations
from perseus_plugin.leader.iteration_times import IterationTimes
from perseus_plugin.leader.job_schedules import MAX_PLANNED, JobSchedules
from perseus_plugin.leader.measuring import Measuring, UnusableProfileError
from perseus_plugin.leader.orders import Orders
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.leader.planner_desk import Asked, Planner, PlannerDesk
from perseus_plugin.leader.rank_reports import RankReports
from perseus_plugin.leader.recent import RecentIterations
from perseus_plugin.leader.reviews import Reviews, catches_up_otherwise, clocks_of, in_force, tell_replayed
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.plan import Plan, save_plan
from perseus_plugin.planning.process import PlanAnswer, PlanRequest
from perseus_plugin.profiling.failed import FILE, save_failure
from perseus_plugin.profiling.kept import Fingerprint
from perseus_plugin.profiling.known import profiled_as
from perseus_plugin.profiling.survey import Survey, rescaled
from perseus_plugin.reporting.live.comparison import Comparison
from perseus_plugin.reporting.live.events import EventLog
from perseus_plugin.reporting.live.summary import Predicted
from perseus_plugin.session.tap import IterationRecord
from perseus_plugin.stragglers.desk import Answer, Situation, StragglerDesk
from perseus_plugin.stragglers.external import ExternalFigures

logger = logging.getLogger(__name__)

_FORGIVEN_AFTER = 1000  # iterations under plans that hold, after which dropped ones do not count any more

_DETECTION_TAKES_S = 3.0  # ranks tell each other of their paces once a second


class State(enum.Enum):
    """What the coordinator waits for."""

    MEASURING = "measuring"
    PLANNING = "planning"
    FOLLOWING = "following"
    RECHECKING = "rechecking"
    GIVEN_UP = "given up"


class Coordinator:
    """Decides for all ranks; they hear of it through `News`.

    Args:
        config: the `perseus` block.
        exchange: to all ranks.
        planner: who plans.
        world_size, stages: of the job.
        shards: ranks that work together on one stage of one replica.
        timetable: with the first round of the sweep.
        output_dir: where profile.csv and plan.json go.
        survey: what is known already (a loaded or kept profile), None to wait for the ranks' estimates.
        fingerprint: what a measured profile is kept with.
        full_sweep_mhz: the sweep to make if a kept profile turns out not to fit.
        frontier: told of every plan's request, None where no frontier is wanted.
    """

    def __init__(
        self,
        config: PerseusConfig,
        exchange: Exchange,
        planner: Planner,
        *,
        world_size: int,
        stages: int,
        shards: int = 1,
        timetable: Timetable,
        output_dir: Path,
        survey: Survey | None = None,
        fingerprint: Fingerprint | None = None,
        full_sweep_mhz: tuple[int, ...] = (),
        frontier: BackgroundFrontier | None = None,
    ) -> None:
        self._config, self._exchange = config, exchange
        self._stages, self._output_dir, self._frontier = stages, output_dir, frontier
        self._reports = RankReports(exchange, world_size)
        self._times = IterationTimes(config.watch.patience)
        self._plans = PlanShelf(exchange, stages)
        self._expectations = Expectations(self._plans, self._times)
        self._recent = RecentIterations(exchange, world_size)
        self._desk = PlannerDesk(config, planner, self._recent, self._reports, stages)
        self._reviews = Reviews()
        self.comparison = Comparison(config.watch, exchange, world_size, self._expectations.graph_s)
        self._orders = Orders(exchange)
        self._fingerprint = fingerprint or {}
        self._measuring = Measuring(
            config.profiling,
            self._reports,
            self._order_sweep,
            stages=stages,
            timetable=timetable,
            output_dir=output_dir,
            survey=survey,
            fingerprint=self._fingerprint,
            full_sweep_mhz=full_sweep_mhz,
        )
        self.stragglers = StragglerDesk(
            config.stragglers,
            exchange,
            world_size=world_size,
            stages=stages,
            shards=shards,
            events=EventLog(output_dir),
        )
        self.survey: Survey | None = None
        self.state = State.MEASURING
        self.plan: Plan | None = None
        self.replayed: dict[str, Replayed | None] = {}
        self.planning_time_s = 0.0
        self.dropped = 0
        self._iteration = 0
        self._schedules = JobSchedules()
        self._requests: dict[str, PlanRequest] = {}
        self._made_anew = True
        self._said_too_many = False
        self._followed = 0
        self._slow_since: int | None = None
        self._strikes = self._held = 0
        self._margin = config.margin
        self._recheck_sequence = 0
        self._excess = 0.0
        self._found_by_references = False

    # What rank 0 sees of its own iterations.

    def use_schedule(self, key: str, stream_of: Callable[[int], Sequence[StreamOp]]) -> None:
        """The schedule that iterations run from now on."""
        self._schedules.use(key, stream_of)

    def saw(self, directive: Directive, record: IterationRecord, size: float = math.nan) -> None:
        """An iteration has ended on rank 0.

        Args:
            directive: what it ran as.
            record: what was seen.
            size: how much work it had, as a multiple of the profile's; NaN: not known.
        """
        duration_s = record.end_s - record.begin_s
        if record.schedule:
            self._schedules.ran(record.schedule, record.number)
        if not record.undisturbed or not record.complete:
            return
        if isinstance(directive, Sweep) and directive.kept and directive.is_full(self._measuring.top_mhz):
            self._times.add_full(record.schedule, duration_s)
        elif isinstance(directive, FullClock) and self.state is State.RECHECKING:
            self._times.add_again(record.schedule, duration_s)
        elif isinstance(directive, Follow) and self._is_current(directive):
            expected_s = None if self._has_references(directive) else self._expected_s(record.schedule)
            if expected_s is not None and math.isfinite(size):
                expected_s *= size
            self._times.add_planned(record.schedule, duration_s, expected_s)
            situation = self.stragglers.situation
            if directive.straggler and situation is not None and record.schedule == situation.schedule:
                self.stragglers.count_iteration()
            self._held += 1
            if self._held >= _FORGIVEN_AFTER:
                self._strikes = 0

    def _has_references(self, directive: Follow) -> bool:
        return self._config.watch.reference_share > 0 and not directive.straggler

    def _is_current(self, directive: Follow) -> bool:
        return self.state is State.FOLLOWING and directive.version == self._followed

    @property
    def full_clock_time_s(self) -> float | None:
        """Median iteration time at full clocks; None before it was measured."""
        return self._times.full_s

    def full_clock_scale(self) -> tuple[float, float] | None:
        """See `Expectations`."""
        return self._expectations.full_clock_scale(self.plan)

    def predicted(self) -> Predicted | None:
        """See `Expectations`."""
        return self._expectations.predicted(self.plan, self.replayed)

    @property
    def planned_schedules(self) -> Mapping[str, int]:
        """How often each schedule has run under the plans in force."""
        return dict(self._times.planned)

    def expected_time_s(self) -> float | None:
        """How long an iteration of the usual schedule may take, in measured seconds; None before it is known."""
        return None if self.plan is None else self._expected_s(self.plan.schedule)

    def _expected_s(self, schedule: str) -> float | None:
        situation, answer = self.stragglers.situation, self.stragglers.answer
        if situation is not None and situation.schedule != schedule:
            return None  # whoever is slow makes these iterations longer too, by how much is not known
        pace_s = 0.0 if answer is None or answer.pace is None else answer.pace.pace_s
        return self._expectations.planned_s(schedule, pace_s)

    # Steps.

    def step(self, iteration: int) -> None:
        """Do what can be done now; `iteration` is the one running on rank 0.

        Raises:
            ExchangeError: the store fails.
        """
        self._iteration = iteration
        self.stragglers.collect()
        if self._frontier is not None:
            self._frontier.step()
        if self.state is State.GIVEN_UP:
            return
        trouble = self._exchange.fetch(TROUBLE)
        if trouble is not None:
            told = receive(Trouble, trouble)
            self._give_up(f"rank {told.rank}: {told.reason}")
            return
        self._take_answer()
        if self.state is State.MEASURING:
            self._measure()
        elif self.state is State.PLANNING:
            self._ask_for_plan()
        elif self.state is State.FOLLOWING:
            self._watch()
        elif self.state is State.RECHECKING:
            self._judge()

    def _measure(self) -> None:
        if not self._schedules:
            return
        try:
            survey = self._measuring.step(self._iteration)
        except UnusableProfileError as error:
            if not error.lasting:
                self._give_up(str(error))
                return
            reason, fingerprint = str(error), profiled_as(self._config.profiling, self._fingerprint)
            try_to_write("why profiling failed", lambda: save_failure(reason, fingerprint, self._output_dir))
            self._give_up(reason, kept_in=FILE)
            return
        if survey is not None:
            self.survey = survey
            self.state = State.PLANNING
            self._ask_for_plan()

    def _order_sweep(self, clocks_mhz: tuple[int, ...], paired: bool) -> int:
        self._tell("sweep", clocks_mhz=clocks_mhz, paired=paired)
        assert self._orders.latest is not None  # it has just been given
        return self._orders.latest.switch

    def _ask_for_plan(self) -> None:
        """Have the planner work on the next schedule that wants a plan."""
        assert self.survey is not None  # only asked for once there is one
        following = self._schedules.next_to_plan(self._plans.schedules)
        if following is not None:
            key, instead_of = following
            stream_of = self._schedules.stream_of(key)
            self._desk.ask(key, stream_of, self.survey, self._margin, instead_of=instead_of)
        elif self._schedules.too_many and not self._said_too_many:
            self._said_too_many = True
            logger.info(
                "more than %d schedules take turns: those beyond run at full clocks. Nothing needs to be done",
                MAX_PLANNED,
            )

    def _take_answer(self) -> None:
        taken = self._desk.answer()
        if taken is None:
            return
        asked, answer = taken
        if asked.survey is not self.survey or self.state not in (State.PLANNING, State.FOLLOWING):
            return  # what it was made on does not hold any more
        if asked.situation is not None:
            self._take_pace(answer, asked.situation, asked.request.min_dwell_s)
        elif asked.review:
            self._take_review(asked, answer)
        elif answer.plan is None:
            self._go_without(asked.request.schedule, answer.error)
        else:
            self._take_plan(asked, answer, answer.plan)

    def _go_without(self, schedule: str, why: str) -> None:
        self._schedules.refuse(schedule)
        if not self._plans.schedules and self._schedules.next_to_plan(()) is None:
            self._give_up(f"there is no plan: {why} (try looser perseus.limits)")
            return
        logger.warning(
            "there is no plan for %s: %s. Its iterations run at full clocks; try looser perseus.limits", schedule, why
        )

    def _take_plan(self, asked: Asked, answer: PlanAnswer, plan: Plan) -> None:
        schedule = asked.request.schedule
        self.planning_time_s = answer.planning_time_s
        if asked.instead_of is not None:
            self._plans.take_out(asked.instead_of)
            del self._requests[asked.instead_of]
            self._recent.leave_out(asked.instead_of)
            self.replayed.pop(asked.instead_of, None)
        number = self._put(asked, plan, answer)
        self._requests[schedule] = replace(asked.request, samples=None, in_force=None, transfer_s=answer.transfer_s)
        logger.info(
            "plan %d for %s ready in %.2f s: %s",
            number,
            schedule,
            answer.planning_time_s,
            plan.promise,
        )
        if answer.replayed is not None:
            tell_replayed(number, schedule, answer.replayed, self._config.quantile)
        self._show_usual()
        self._order()
        self.state = State.FOLLOWING

    def _put(self, asked: Asked, plan: Plan, answer: PlanAnswer) -> int:
        """Put a plan onto the shelf, to be held against newer iterations from now on."""
        schedule, replayed = asked.request.schedule, answer.replayed
        self._reviews.follow(schedule, in_force(plan, answer, self._margin), self._iteration)
        self.replayed[schedule] = replayed
        return self._plans.put(schedule, plan, asked.survey.profile, answer.catch_up, asked.request.min_dwell_s)

    def _review(self) -> None:
        """Hold a plan in force against newer iterations, now and then."""
        if not self._desk.idle or self.stragglers.situation is not None:
            return
        assert self.survey is not None  # plans were made on it
        due = self._reviews.due(self._plans.schedules, self._iteration)
        if due is not None:
            stream_of, in_force = self._schedules.stream_of(due), self._reviews.in_force(due)
            self._desk.ask(due, stream_of, self.survey, self._margin, review=True, in_force=in_force)

    def _take_review(self, asked: Asked, answer: PlanAnswer) -> None:
        """The plan in force stays, perhaps with other usual delays; or another one holds better."""
        schedule = asked.request.schedule
        if answer.error or schedule not in self._plans or self.stragglers.situation is not None:
            return
        before = self._plans.of(schedule)
        if answer.plan is None:
            self.replayed[schedule] = answer.replayed
            if answer.catch_up:
                self._put(asked, before, answer)
                self._order()
        elif clocks_of(answer.plan) != clocks_of(before) or catches_up_otherwise(asked.request.in_force, answer):
            if answer.held is not None:
                kept = "there is a better one" if answer.held.kept else "it would not have kept to its time"
                logger.info("plan for %s: over the last iterations %s", schedule, kept)
            self._made_anew |= before is self.plan  # what was measured under the usual plan says nothing of this one
            self._take_plan(asked, answer, answer.plan)

    def _show_usual(self) -> None:
        """What a person looks at is the plan of the schedule that runs most."""
        before = None if self.plan is None else self.plan.schedule
        usual = self._schedules.usual(self._plans.schedules, before)
        if usual is None or self._plans.of(usual) is self.plan:
            return
        plan = self.plan = self._plans.of(usual)
        try_to_write("plan.json", lambda: save_plan(plan, self._output_dir / "plan.json"))
        if self._frontier is not None:
            self._frontier.renew(self._requests[usual])

    def _order(self) -> int:
        """All ranks follow the plans there are, and what answers the stragglers there are; returns from when on."""
        situation, answer = self.stragglers.situation, self.stragglers.answer
        if situation is None or answer is None:
            begins = self._tell("follow", version=self._plans.set_with())
        else:
            version, variants = answer.versions_in(situation, self._plans.set_with)
            begins = self._tell("follow", version=version, variants=variants, straggler=True)
        self._plans.tidy(self._orders.versions)
        return begins

    def _watch(self) -> None:
        self._show_usual()
        if self._answer_stragglers():
            return
        self._ask_for_plan()
        self._review()
        slowed = self.comparison.too_slow(self._config.slowdown) if self.comparison.collect() else None
        if slowed is not None:
            self._drop(self.comparison.said, slowed, by_references=True)
            return
        overrun, seen_s = self._times.overrun, self._times.planned_s
        if overrun is None or seen_s is None:
            return
        if overrun <= 1 + self._config.watch.tolerance_or_default:
            self._slow_since = None
        elif not self._may_be_a_straggler(seen_s):
            self._drop(
                f"iterations take {seen_s:.4g} s instead of {seen_s / overrun:.4g} s under the plan", overrun - 1
            )

    def _may_be_a_straggler(self, iteration_time_s: float) -> bool:
        """Whether to wait for what detection says of iterations that run long."""
        config = self._config.stragglers
        patience = config.window + _DETECTION_TAKES_S / iteration_time_s
        if self._slow_since is None:
            self._slow_since = self._iteration
        return config.enabled and config.detect and self._iteration - self._slow_since < patience

    # Stragglers.

    def _answer_stragglers(self) -> bool:
        """Answer a new situation; returns whether there is one, for which the plan in force was not made."""
        assert self.plan is not None  # it is followed
        schedule = self.plan.schedule
        self.stragglers.book.full_clock_s = self._expectations.full_s(schedule)
        situation = self.stragglers.current(schedule)
        if situation == self.stragglers.situation:
            return False
        if not self.stragglers.may_answer:
            return True
        answer = None if situation is None else self.stragglers.known(situation)
        if situation is None or answer is not None:
            self._switch(situation, answer)
            return True
        request = situation.request(self.plan, self._expectations.seconds_per_planned(schedule))
        assert self.survey is not None  # plans were made on it
        stream_of = self._schedules.stream_of(schedule)
        self._desk.ask(schedule, stream_of, self.survey, self._margin, situation=situation, pace=request)
        return True

    def judge_external(self, figures: ExternalFigures) -> None:
        """Enter what another detector's figures say once they are corrected for the plans in force."""
        news = self._orders.latest
        if self.state is not State.FOLLOWING or news is None:
            return

        def slowed(placement: Placement) -> float | None:
            return self._plans.slowed_by(news.version_for(placement.replica), placement.stage, figures.kinds)

        self.stragglers.take_external(figures, news.sequence, slowed)

    def _take_pace(self, answer: PlanAnswer, situation: Situation, dwell_s: float) -> None:
        """The planner has answered; the job's plan stays if it found nothing."""
        assert self.survey is not None  # it was planned on
        versions = {}
        paced = answer.pace.variants if answer.pace else ()
        catch_ups = answer.paced_catch_up or ((),) * len(paced)
        for slowdowns, planned, catch_up in zip(situation.variants, paced, catch_ups, strict=False):
            if planned.plan is not None:
                versions[slowdowns] = self._plans.keep(
                    situation.schedule, planned.plan, self.survey.profile, slowdowns, catch_up, dwell_s
                )
        if answer.pace is None:
            logger.warning(
                "stragglers are not planned for: %s. The plan stays as it is; nothing needs to be done", answer.error
            )
        made = Answer(answer.pace, versions)
        for number in self.stragglers.learn(situation, made, answer.planning_time_s, answer.error):
            self._plans.discard(number)
        if self.plan is not None and self.plan.schedule == situation.schedule:
            self._switch(situation, made)

    def _switch(self, situation: Situation | None, answer: Answer | None) -> None:
        """All ranks go over to what this situation asks for."""
        self.stragglers.situation, self.stragglers.answer = situation, answer
        begins = self._order()
        self.stragglers.switched(situation, answer, begins, self._followed)

    # When the plan does not hold.

    def _drop(self, text: str, excess: float, *, by_references: bool = False) -> None:
        self.dropped += 1
        self._strikes += 1
        self._held = 0
        self._excess, self._found_by_references = excess, by_references
        if self._strikes > self._config.watch.max_replans:
            self._give_up(
                f"{text}; plan number {self._strikes} that does not hold: raise perseus.watch.tolerance or margin"
            )
            return
        logger.warning(
            "%s: back to full clocks, measuring and planning again. If this comes back, raise perseus.watch.tolerance "
            "or perseus.margin",
            text,
        )
        self._reports.rechecks = {}
        self.stragglers.leave()
        self._times.measure_again()
        self._tell("full", reason=text, recheck=True)
        self._recheck_sequence = self._orders.sequence
        self.state = State.RECHECKING

    def _judge(self) -> None:
        if self._times.again is None:
            return
        schedule, full_s, long_enough = self._times.again
        if not self._reports.all_rechecks(self._recheck_sequence) and not long_enough:
            return
        assert self.survey is not None  # it was planned on
        self.survey = rescaled(self.survey, self.stragglers.corrected(self._reports.rechecks))
        before_s = self._expectations.full_s(schedule)
        is_slower = before_s is not None and full_s > before_s * (1 + self._config.watch.tolerance_or_default)
        if is_slower and not self._found_by_references:
            logger.warning(
                "at full clocks an iteration takes %.4g s, it took %.4g s before: the job itself is slower, not the "
                "plan; planning for that. If its batches have not grown, look at data loading and at what else runs on "
                "the nodes",
                full_s,
                before_s,
            )
        else:
            self._margin += self._excess
        self._times.use_again()
        self._plans.clear()
        self._reviews.clear()
        self._recent.forget()
        self._schedules.forget_refusals()
        self.stragglers.forget()
        self._made_anew, self.state = True, State.PLANNING
        self._ask_for_plan()

    def _give_up(self, why: str, kept_in: str = "") -> None:
        if kept_in:
            logger.warning(
                "%s. Training stays at full clocks. A restarted job of the same sort does not profile again; remove %s "
                "from the output folder to have it do so",
                why,
                kept_in,
            )
        else:
            logger.warning("%s. Training stays at full clocks. A restart of the job tries again", why)
        self.stragglers.refusal = f"the job stays at full clocks: {why}"
        self._tell("full", reason=why)
        self.state = State.GIVEN_UP

    def _tell(
        self,
        action: Literal["follow", "full", "sweep"],
        *,
        version: int = 0,
        variants: dict[int, int] | None = None,
        straggler: bool = False,
        reason: str = "",
        recheck: bool = False,
        clocks_mhz: tuple[int, ...] = (),
        paired: bool = False,
    ) -> int:
        """Order all ranks; returns the iteration from which that holds."""
        self._times.forget_planned()
        self._slow_since = None
        news = self._orders.give(
            self._iteration,
            self.full_clock_time_s,
            action=action,
            version=version,
            variants=variants or {},
            straggler=straggler,
            clocks_mhz=clocks_mhz,
            paired=paired,
            reason=reason,
            recheck=recheck,
            anew=action == "follow" and self._made_anew,
        )
        self._made_anew &= action != "follow"
        self._followed = news.version_for(0)  # rank 0 is in replica 0
        self.comparison.begin(news.since)
        return news.switch
