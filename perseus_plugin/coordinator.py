"""Rank 0's part of a session: from the ranks' estimates to a plan, and what to do when the plan does not hold.

Runs on the session's own thread: every method returns at once, waiting is done by being asked again.
"""

from __future__ import annotations

import enum
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.requests import DWELL_LATENCIES
from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange import Exchange
from perseus_plugin.frontier_process import BackgroundFrontier
from perseus_plugin.instructions import StreamOp
from perseus_plugin.messages import (
    NEWS,
    TROUBLE,
    News,
    Placement,
    PlanPart,
    RankEstimate,
    Recheck,
    Trouble,
    estimate_key,
    part_key,
    receive,
    recheck_key,
)
from perseus_plugin.planner_process import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.planning.plan import Plan, save_plan
from perseus_plugin.profiling.reuse import Fingerprint, save_survey
from perseus_plugin.profiling.sweep import good_enough, sweep_order, worth_trying
from perseus_plugin.reporting.events import EventLog
from perseus_plugin.straggler_desk import Answer, Situation, StragglerDesk
from perseus_plugin.straggler_external import ExternalFigures, PlannedWork, planned_work, slowed_by
from perseus_plugin.survey import Survey, misfit, rescaled, stage_estimates, survey_of
from perseus_plugin.tap import IterationRecord
from perseus_plugin.timetable import Directive, Follow, FullClock, Sweep, Timetable

logger = logging.getLogger(__name__)

_ESTIMATES_TIMEOUT_S = 120.0
_FORGIVEN_AFTER = 1000  # iterations under plans that hold, after which dropped ones do not count any more
_SWITCH_AHEAD = 2  # see `Coordinator._ahead`
_NEWS_TAKE_S = 0.2  # until the slowest rank has heard of something


class Planner(Protocol):
    """See `planner_process.PlannerProcess`."""

    @property
    def busy(self) -> bool: ...
    def submit(self, request: PlanRequest) -> None: ...
    def poll(self) -> PlanAnswer | None: ...


class State(enum.Enum):
    """What the coordinator waits for."""

    MEASURING = "measuring"
    PLANNING = "planning"
    FOLLOWING = "following"
    RECHECKING = "rechecking"
    GIVEN_UP = "given up"


@dataclass
class _Schedule:
    key: str
    stream_of: Callable[[int], Sequence[StreamOp]]


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
        self._config = config
        self._exchange = exchange
        self._planner = planner
        self._world_size, self._stages = world_size, stages
        self._sweep_mhz = timetable.sweep.clocks_mhz
        self._full_sweep_mhz = full_sweep_mhz or timetable.sweep.clocks_mhz
        self._sweep_end, self._steps_per_block = timetable.sweep_end, timetable.steps_per_block
        self._top_mhz = max(timetable.sweep.clocks_mhz)
        self._round = 0
        self._output_dir = output_dir
        self._frontier = frontier
        self.survey = survey
        self._fingerprint = fingerprint or {}
        self.state = State.MEASURING
        self.plan: Plan | None = None
        self.planning_time_s = 0.0
        self.dropped = 0
        self.stragglers = StragglerDesk(
            config.stragglers,
            exchange,
            world_size=world_size,
            stages=stages,
            shards=shards,
            events=EventLog(output_dir),
        )
        self._asked: Situation | None = None
        self._followed = 0
        self._slow_since: int | None = None
        self._strikes = self._held = 0
        self._plans: dict[str, tuple[int, Plan]] = {}
        self._work: dict[int, PlannedWork] = {}
        self._told: News | None = None
        self._version = 0
        self._sequence = 0
        self._schedule: _Schedule | None = None
        self._requested: PlanRequest | None = None
        self._estimates: dict[int, RankEstimate] = {}
        self._estimates_due_s: float | None = None
        self._full_clock_s: list[float] = []
        self._full_clock_schedule = ""
        self._margin = config.margin
        self._recent: deque[float] = deque(maxlen=config.watch.patience)
        self._recheck_sequence = 0
        self._recheck_s: list[float] = []
        self._recheck_schedule = ""
        self._rechecks: dict[int, Recheck] = {}
        self._excess = 0.0

    # What rank 0 sees of its own iterations.

    def use_schedule(self, key: str, stream_of: Callable[[int], Sequence[StreamOp]]) -> None:
        """The schedule that iterations run from now on."""
        if self._schedule is None or self._schedule.key != key:
            self._schedule = _Schedule(key, stream_of)

    def saw(self, directive: Directive, record: IterationRecord) -> None:
        """An iteration has ended on rank 0.

        Args:
            directive: what it ran as.
            record: what was seen.
        """
        duration_s = record.end_s - record.begin_s
        if not record.undisturbed or not record.complete:
            return
        if isinstance(directive, Sweep) and directive.kept and directive.frequency_mhz == self._top_mhz:
            if record.schedule != self._full_clock_schedule:
                self._full_clock_s, self._full_clock_schedule = [], record.schedule
            self._full_clock_s.append(duration_s)
        elif isinstance(directive, FullClock) and self.state is State.RECHECKING:
            if record.schedule == self._recheck_schedule:
                self._recheck_s.append(duration_s)
        elif isinstance(directive, Follow) and self._is_current(directive, record):
            self._recent.append(duration_s)
            if directive.straggler:
                self.stragglers.count_iteration()
            self._held += 1
            if self._held >= _FORGIVEN_AFTER:
                self._strikes = 0

    @property
    def full_clock_time_s(self) -> float | None:
        """Median iteration time at full clocks; None before it was measured."""
        return statistics.median(self._full_clock_s) if self._full_clock_s else None

    def full_clock_scale(self) -> tuple[float, float] | None:
        """What full-clock time and energy have to be multiplied by where the plan is for another schedule.

        1 for the schedule they were measured in; None where that is not known.
        """
        if self.plan is None or self.plan.schedule == self._full_clock_schedule:
            return 1.0, 1.0
        if self._full_clock_schedule not in self._plans:
            return None
        _, reference = self._plans[self._full_clock_schedule]
        return (
            self.plan.baseline_time_s / reference.baseline_time_s,
            self.plan.baseline_energy_j / reference.baseline_energy_j,
        )

    # Steps.

    def step(self, iteration: int) -> None:
        """Do what can be done now; `iteration` is the one running on rank 0.

        Raises:
            ExchangeError: the store fails.
        """
        self.stragglers.collect()
        if self._frontier is not None:
            self._frontier.step()
        if self.state is State.GIVEN_UP:
            return
        trouble = self._exchange.fetch(TROUBLE)
        if trouble is not None:
            told = receive(Trouble, trouble)
            self._give_up(iteration, f"rank {told.rank}: {told.reason}")
        elif self.state is State.MEASURING:
            self._collect(iteration)
        elif self.state is State.PLANNING:
            self._take_answer(iteration)
        elif self.state is State.FOLLOWING:
            self._watch(iteration)
        elif self.state is State.RECHECKING:
            self._judge(iteration)

    def _collect(self, iteration: int) -> None:
        if iteration < self._sweep_end or self._schedule is None:
            return
        if self.survey is None and not self._all_estimates(iteration):
            return
        if self.survey is not None and not self._fits(iteration, self.survey):
            return
        if self.survey is None:
            ordered = [self._estimates[rank] for rank in range(self._world_size)]
            try:
                survey = survey_of(ordered, self._stages)
            except PerseusError as error:
                self._give_up(iteration, f"the profile cannot be used: {error} (try more steps_per_clock)")
                return
            if self._sweep_again(iteration, ordered):
                return
            self.survey = survey
            self._try_to_write("the profile", lambda: save_survey(survey, self._fingerprint, self._output_dir))
            self._report_survey(survey)
        self._request_plan(iteration)

    def _sweep_again(self, iteration: int, estimates: Sequence[RankEstimate]) -> bool:
        """Order another round of the sweep if the estimates are not good enough yet."""
        profiling = self._config.profiling
        if self._round + 1 >= profiling.rounds or len(set(self._sweep_mhz)) < 2:
            return False
        stages = stage_estimates(estimates, self._stages)
        if good_enough(stages, profiling.max_relative_error):
            return False
        clocks = sorted({self._top_mhz, *worth_trying(stages, sorted(set(self._sweep_mhz)))})
        logger.info("energies are not known well enough yet: profiling once more, at %d clocks", len(clocks))
        self._sweep_over(iteration, sweep_order(clocks, profiling.seed + self._round + 1))
        return True

    def _sweep_over(self, iteration: int, order: tuple[int, ...]) -> None:
        self._round += 1
        self._estimates, self._estimates_due_s = {}, None
        self._sweep_mhz = order
        self._tell(iteration, "sweep", clocks_mhz=order)
        self._sweep_end = iteration + self._ahead + self._steps_per_block * len(order)

    def _fits(self, iteration: int, survey: Survey) -> bool:
        """Whether a profile from elsewhere is this job's, by what all ranks measured at full clocks; False: not yet."""
        if self._estimates_due_s is None:
            self._estimates_due_s = time.monotonic() + _ESTIMATES_TIMEOUT_S
        if not self._all_rechecks(0) and time.monotonic() < self._estimates_due_s:
            return False
        why_not = misfit(survey, list(self._rechecks.values()))
        if why_not and self._config.profiling.load is not None:
            self._give_up(iteration, f"the profile of perseus.profiling.load is not of this job: {why_not}")
            return False
        if why_not:
            logger.warning("profiling anew, as the kept profile does not fit: %s. Nothing needs to be done", why_not)
            self.survey, self._rechecks = None, {}
            self._sweep_over(iteration, self._full_sweep_mhz)
            return False
        self.survey = rescaled(survey, list(self._rechecks.values()))
        return True

    def _all_rechecks(self, sequence: int) -> bool:
        for rank in range(self._world_size):
            if rank not in self._rechecks:
                value = self._exchange.fetch(recheck_key(sequence, rank))
                if value is not None:
                    self._rechecks[rank] = receive(Recheck, value)
        return len(self._rechecks) == self._world_size

    def _all_estimates(self, iteration: int) -> bool:
        if self._estimates_due_s is None:
            self._estimates_due_s = time.monotonic() + _ESTIMATES_TIMEOUT_S
        for rank in range(self._world_size):
            if rank not in self._estimates:
                value = self._exchange.fetch(estimate_key(self._round, rank))
                if value is not None:
                    self._estimates[rank] = receive(RankEstimate, value)
        missing = self._world_size - len(self._estimates)
        if missing and time.monotonic() > self._estimates_due_s:
            first = next(rank for rank in range(self._world_size) if rank not in self._estimates)
            self._give_up(
                iteration,
                f"{missing} of {self._world_size} ranks sent no measurements within {_ESTIMATES_TIMEOUT_S:.0f} s "
                f"(first missing: rank {first}); see that rank's log",
            )
            return False
        return not missing

    def _report_survey(self, survey: Survey) -> None:
        for stage, kind in sorted(survey.unresolved):
            logger.warning(
                "stage %d: the energy of %s is not known to within %.0f %%; it stays at full clock "
                "(more perseus.profiling.steps_per_clock would help)",
                stage,
                kind,
                100 * self._config.profiling.max_relative_error,
            )

    def _request_plan(self, iteration: int, pace: PaceRequest | None = None) -> None:
        assert self.survey is not None  # only asked for once there is one
        assert self._schedule is not None
        schedule = self._schedule
        streams = [schedule.stream_of(stage) for stage in range(self._stages)]
        limits = self._config.limits
        self._requested = PlanRequest(
            schedule=schedule.key,
            streams=streams,
            constant_time_s=self.survey.constants_for(streams),
            profile=self.survey.profile,
            blocking_power_w=[self.survey.blocking_power_w] * self._stages,
            slowdown=self._config.slowdown,
            margin=self._margin,
            effort=self._config.effort,
            max_changes=limits.max_changes_per_iteration,
            min_dwell_s=self._dwell_s,
            full_clock_only=self.survey.unresolved,
            pace=pace,
        )
        self._planner.submit(self._requested)
        self.state = State.PLANNING

    @property
    def _dwell_s(self) -> float:
        """The shortest time between two clock changes; if not set, by the slowest GPU's switch latency."""
        configured = self._config.limits.dwell_s
        if configured is not None:
            return configured
        estimated = [one.switch_latency_s for one in self._estimates.values()]
        checked = [one.switch_latency_s for one in self._rechecks.values()]
        return DWELL_LATENCIES * max((latency_s or 0.0 for latency_s in (*estimated, *checked)), default=0.0)

    def _take_answer(self, iteration: int) -> None:
        answer = self._planner.poll()
        if answer is None:
            return
        if self._asked is not None:
            self._take_pace(answer, self._asked, iteration)
            return
        if answer.plan is None:
            self._give_up(iteration, f"there is no plan: {answer.error} (try looser perseus.limits)")
            return
        assert self._requested is not None  # it was submitted
        schedule = self._requested.schedule
        self.planning_time_s = answer.planning_time_s
        self._version += 1
        self._plans[schedule] = (self._version, answer.plan)
        self._publish_parts(self._version, schedule, answer.plan)
        logger.info(
            "plan %d for %s ready in %.2f s: %.1f %% less energy predicted, at most %.2f %% above the optimum",
            self._version,
            schedule,
            answer.planning_time_s,
            100 * answer.plan.saving,
            100 * answer.plan.gap,
        )
        self._follow(schedule, iteration)
        if self._frontier is not None:
            self._frontier.renew(self._requested)

    def _publish_parts(self, version: int, schedule: str, plan: Plan, slowdowns: Sequence[float] | None = None) -> None:
        assert self.survey is not None  # it was planned on
        time_s = {(stage, kind, m.frequency_mhz): m.time_s for stage, kind, m in self.survey.profile.rows()}
        self._work[version] = planned_work(plan, time_s)
        for stage, planned in enumerate(plan.stages):
            slowdown = 1.0 if slowdowns is None else slowdowns[stage]
            part = PlanPart(
                version=version,
                schedule=schedule,
                clocks_mhz=tuple(p.frequency_mhz for p in planned),
                # As measured: the plan's own times hold the margin.
                times_s=tuple(slowdown * time_s[stage, p.instruction.kind, p.frequency_mhz] for p in planned),
                slowdown=slowdown,
            )
            self._exchange.publish(part_key(version, stage), part.model_dump())

    def _follow(self, schedule: str, iteration: int) -> None:
        version, plan = self._plans[schedule]
        self.plan = plan
        self._try_to_write("plan.json", lambda: save_plan(plan, self._output_dir / "plan.json"))
        self.stragglers.leave()
        self._tell(iteration, "follow", version=version)
        self.state = State.FOLLOWING

    def _watch(self, iteration: int) -> None:
        assert self._schedule is not None  # there is a plan for one
        if self._schedule.key not in self._plans:
            logger.info("the schedule is now %s: full clocks until there is a plan for it", self._schedule.key)
            self._request_plan(iteration)
            return
        if self._plans[self._schedule.key][1] is not self.plan:
            self._follow(self._schedule.key, iteration)
            return
        if self._answer_stragglers(iteration):
            return
        expected_s = self.expected_time_s()
        if expected_s is None or len(self._recent) < self._config.watch.patience:
            return
        seen_s = statistics.median(self._recent)
        if seen_s <= expected_s * (1 + self._config.watch.tolerance):
            self._slow_since = None
        elif not self._may_be_a_straggler(iteration):
            self._drop(iteration, seen_s, expected_s)

    def _may_be_a_straggler(self, iteration: int) -> bool:
        """Whether to wait for what detection says of iterations that run long."""
        config = self._config.stragglers
        if self._slow_since is None:
            self._slow_since = iteration
        return config.enabled and config.detect and iteration - self._slow_since < config.window

    # Stragglers.

    def _answer_stragglers(self, iteration: int) -> bool:
        """Answer a new situation; returns whether there is one, for which the plan in force was not made."""
        assert self._schedule is not None  # there is a plan for one
        self.stragglers.book.full_clock_s = self.full_clock_time_s
        situation = self.stragglers.current(self._schedule.key)
        if situation == self.stragglers.situation:
            return False
        if not self.stragglers.may_answer:
            return True
        answer = None if situation is None else self.stragglers.known(situation)
        if situation is None or answer is not None:
            self._switch(situation, answer, iteration)
            return True
        assert self.plan is not None  # it is followed
        self._asked = situation
        self._request_plan(iteration, situation.request(self.plan, self._seconds_per_planned))
        return True

    def judge_external(self, figures: ExternalFigures) -> None:
        """Enter what another detector's figures say once they are corrected for the plans in force."""
        if self.state is not State.FOLLOWING:
            return
        news = self._told
        assert news is not None  # of the plan that is followed

        def slowed(placement: Placement) -> float | None:
            return slowed_by(self._work.get(news.version_for(placement.replica)), placement.stage, figures.kinds)

        self.stragglers.take_external(figures, news.sequence, slowed)

    def _take_pace(self, answer: PlanAnswer, situation: Situation, iteration: int) -> None:
        """The planner has answered; the job's plan stays if it found nothing."""
        self._asked = None
        versions = {}
        for slowdowns, planned in zip(situation.variants, answer.pace.variants if answer.pace else (), strict=False):
            if planned.plan is not None:
                self._version += 1
                versions[slowdowns] = self._version
                self._publish_parts(self._version, situation.schedule, planned.plan, slowdowns)
        if answer.pace is None:
            logger.warning(
                "stragglers are not planned for: %s. The plan stays as it is; nothing needs to be done", answer.error
            )
        made = Answer(answer.pace, versions)
        for version in self.stragglers.learn(situation, made, answer.planning_time_s, answer.error):
            self._work.pop(version, None)
            for stage in range(self._stages):
                self._exchange.publish(part_key(version, stage), None)  # the store shall not grow with every answer
        self.state = State.FOLLOWING
        assert self._schedule is not None  # there is a plan for one
        if self._schedule.key == situation.schedule:
            self._switch(situation, made, iteration)

    def _switch(self, situation: Situation | None, answer: Answer | None, iteration: int) -> None:
        """All ranks go over to what this situation asks for."""
        assert self._schedule is not None  # there is a plan for one
        version, _ = self._plans[self._schedule.key]
        if situation is None or answer is None:
            self._tell(iteration, "follow", version=version)
        else:
            version, variants = answer.versions_in(situation, version)
            self._tell(iteration, "follow", version=version, variants=variants, straggler=True)
        self.stragglers.switched(situation, answer, iteration + self._ahead, self._followed)

    def expected_time_s(self) -> float | None:
        """How long an iteration under the current plan may take, in measured seconds; None before it is known.

        The graph knows nothing of what surrounds the schedule, so the plan's deadline is scaled by what iterations at
        full clocks took against what the graph says they take.
        """
        per_planned = self._seconds_per_planned
        if self.plan is None or per_planned is None:
            return None
        answer = self.stragglers.answer
        pace_s = 0.0 if answer is None or answer.pace is None else answer.pace.pace_s
        return max(pace_s, self.plan.deadline_s) * per_planned

    @property
    def _seconds_per_planned(self) -> float | None:
        """Measured seconds per second of the graph; None before the schedule that was measured has a plan."""
        measured_s = self.full_clock_time_s
        if measured_s is None or self._full_clock_schedule not in self._plans:
            return None
        _, reference = self._plans[self._full_clock_schedule]
        return measured_s / reference.baseline_time_s

    def _full_clock_time_of(self, schedule: str) -> float | None:
        """Iteration time at full clocks that this schedule should have; None if that is not known."""
        per_planned = self._seconds_per_planned
        if per_planned is None or schedule not in self._plans:
            return None
        return self._plans[schedule][1].baseline_time_s * per_planned

    def _drop(self, iteration: int, seen_s: float, expected_s: float) -> None:
        self.dropped += 1
        self._strikes += 1
        self._held = 0
        self._excess = seen_s / expected_s - 1
        text = f"iterations take {seen_s:.4g} s instead of {expected_s:.4g} s under the plan"
        if self._strikes > self._config.watch.max_replans:
            self._give_up(
                iteration,
                f"{text}; plan number {self._strikes} that does not hold: raise perseus.watch.tolerance or margin",
            )
            return
        logger.warning(
            "%s: back to full clocks, measuring and planning again. If this comes back, raise perseus.watch.tolerance "
            "or perseus.margin",
            text,
        )
        self._recheck_s, self._rechecks = [], {}
        self.stragglers.leave()
        self._recheck_schedule = self._schedule.key if self._schedule is not None else ""
        self._tell(iteration, "full", reason=text, recheck=True)
        self._recheck_sequence = self._sequence
        self.state = State.RECHECKING

    def _judge(self, iteration: int) -> None:
        assert self._schedule is not None  # a plan was followed
        if self._schedule.key != self._recheck_schedule:
            self._recheck_s, self._recheck_schedule = [], self._schedule.key
        if len(self._recheck_s) < self._config.watch.patience:
            return
        patient = len(self._recheck_s) < 4 * self._config.watch.patience
        if not self._all_rechecks(self._recheck_sequence) and patient:
            return
        assert self.survey is not None  # it was planned on
        self.survey = rescaled(self.survey, self.stragglers.corrected(self._rechecks))
        full_s, before_s = statistics.median(self._recheck_s), self._full_clock_time_of(self._recheck_schedule)
        if before_s is not None and full_s > before_s * (1 + self._config.watch.tolerance):
            logger.warning(
                "at full clocks an iteration now takes %.4g s: the job itself is slower; planning for that. If it "
                "should not be, look at data loading and at what else runs on the nodes",
                full_s,
            )
        else:
            self._margin += self._excess
        self._full_clock_s = list(self._recheck_s)
        self._full_clock_schedule = self._recheck_schedule
        self._plans.clear()
        self.stragglers.forget()
        self._request_plan(iteration)

    def _give_up(self, iteration: int, why: str) -> None:
        logger.warning("%s. Training stays at full clocks. A restart of the job tries again", why)
        self.stragglers.refusal = f"the job stays at full clocks: {why}"
        self._tell(iteration, "full", reason=why)
        self.state = State.GIVEN_UP

    def _tell(
        self,
        iteration: int,
        action: Literal["follow", "full", "sweep"],
        *,
        version: int = 0,
        variants: dict[int, int] | None = None,
        straggler: bool = False,
        reason: str = "",
        recheck: bool = False,
        clocks_mhz: tuple[int, ...] = (),
    ) -> None:
        self._sequence += 1
        self._recent.clear()
        self._slow_since = None
        news = News(
            sequence=self._sequence,
            switch=iteration + self._ahead,
            action=action,
            version=version,
            variants=variants or {},
            straggler=straggler,
            clocks_mhz=clocks_mhz,
            reason=reason,
            recheck=recheck,
        )
        self._told = news
        self._followed = news.version_for(0)  # rank 0 is in replica 0
        self._exchange.publish(NEWS, news.model_dump())

    @property
    def _ahead(self) -> int:
        """Iterations between saying and doing: every rank looks for news at least once per iteration."""
        time_s = self.full_clock_time_s
        return _SWITCH_AHEAD if time_s is None else max(_SWITCH_AHEAD, 1 + math.ceil(_NEWS_TAKE_S / time_s))

    def _is_current(self, directive: Follow, record: IterationRecord) -> bool:
        return self.state is State.FOLLOWING and directive.version == self._followed

    def _try_to_write(self, what: str, write: Callable[[], None]) -> None:
        """A full disk must not cost the plan."""
        try:
            write()
        except (OSError, PerseusError) as error:
            logger.warning(
                "cannot write %s: %s; training and the plan go on. See to space and permissions of perseus.output_dir",
                what,
                error,
            )
