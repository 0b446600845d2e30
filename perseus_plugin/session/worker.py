"""The session's own thread on a rank: everything that need not happen on the training thread.

It takes finished iterations and the helper's events, keeps the account, estimates the profile after the sweep, looks
for news from rank 0, and on rank 0 gives the `leader` its turn.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from perseus_plugin.control import wire
from perseus_plugin.control.clock_log import ClockLog
from perseus_plugin.control.examination import why_not_obeyed
from perseus_plugin.control.lasting import LastingHelper
from perseus_plugin.control.lateness import extra_energy_j
from perseus_plugin.errors import ClockNotFreeError, GpuError, PerseusError
from perseus_plugin.exchange.client import ExchangeError, UnansweredError
from perseus_plugin.exchange.messages import (
    BATCHES,
    NEWS,
    TARGETS,
    TROUBLE,
    WORKS,
    BatchNews,
    BatchPart,
    CaughtUp,
    News,
    PlanPart,
    PlanParts,
    RankEstimate,
    RankStats,
    Recheck,
    Trouble,
    Waited,
    batch_key,
    durations_key,
    estimate_key,
    part_key,
    receive,
    recheck_key,
    stats_key,
)
from perseus_plugin.exchange.packing import unpacked
from perseus_plugin.exchange.parts import part_for, with_batch, with_newest
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import (
    NOT_OURS,
    Directive,
    Follow,
    FullClock,
    RanAs,
    Sweep,
    nearest_clocks,
    paired_clocks,
)
from perseus_plugin.leader.job import Job
from perseus_plugin.leader.leader import Leader
from perseus_plugin.profiling.collector import SweepCollector
from perseus_plugin.profiling.durations import KEPT as NEW_DURATIONS
from perseus_plugin.profiling.durations import DurationsLog
from perseus_plugin.profiling.estimator import estimate_stage
from perseus_plugin.profiling.observations import Tick
from perseus_plugin.reporting.live.account import (
    EVERY,
    FULL_CLOCK,
    PLAN,
    PROFILING,
    RECHECK,
    REFERENCES,
    UNDER_PLANS,
    Account,
)
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.reporting.live.windows import Windows, step_size
from perseus_plugin.reporting.record.recorder import Recorder
from perseus_plugin.reporting.record.samples import next_sampled
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import FinishedIteration, Link
from perseus_plugin.stragglers.sensing import StragglerSensing

logger = logging.getLogger(__name__)

SILENT_ITERATIONS, LEAST_SILENCE_S = 5, 5.0
"""Time that the training may ask for nothing until the clock is freed: so many of the longest recent iterations."""
RECENT_ITERATIONS = 8
_RANKS_TO_TELL = 2000.0  # as often as `Timing` says; in larger jobs each tells more rarely


@dataclass(frozen=True)
class Timing:
    """How often, and how long, the worker waits.

    Attributes:
        idle_s: at most, until it looks around.
        gather_s: from one look to the next for the sake of finished iterations alone, unless a measurement waits for
            them, or one follows that is kept whole. Where iterations are short, several are looked at together: each
            time that this thread begins to compute, the training thread waits for the interpreter.
        rarely_s: in the place of both where no plans are made, as nobody waits for what iterations show.
        rest_s: from one look to the next, whatever there is.
        ticks_after_sweep_s: the counter's last tick of the sweep shows up to a period and a lag later.
        explanation_patience_s: for the reading that tells whether a GPU is below its clock as its power limit holds it:
            they come at the ends of iterations.
        read_failure_patience_s: what broke reading may be about to end the session with a message of its own.
        stats_every_s, durations_every_s: from one message to the next, in jobs of up to 2,000 ranks that plan; where
            no plans are made, three times as long.
    """

    idle_s: float = 1.0
    gather_s: float = 1.0
    rarely_s: float = 2.0
    rest_s: float = 0.1
    ticks_after_sweep_s: float = 0.4
    read_failure_patience_s: float = 2.0
    explanation_patience_s: float = 60.0
    stats_every_s: float = 5.0
    durations_every_s: float = 20.0


class SessionWorker:
    """See the module's docstring. All methods but `start` run on the worker's thread."""

    def __init__(
        self,
        job: Job,
        *,
        link: Link,
        lifetime: Lifetime,
        helper: LastingHelper | None,
        relay: FigureRelay,
        leader: Leader | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing = timing or Timing()
        self._idle_s, self._gather_s = (
            (timing.idle_s, timing.gather_s) if job.plans else (timing.rarely_s, timing.rarely_s)
        )
        if leader is not None:
            self._idle_s = min(self._idle_s, leader.looks_every_s)
        # Without plans only the summary asks for what ranks tell, now and then.
        self._patience = max(1.0 if job.plans else 3.0, job.placement.world_size / _RANKS_TO_TELL)
        config, placement, exchange = job.config, job.placement, job.exchange
        self._config, self._placement, self._exchange = config, placement, exchange
        self._link, self._lifetime, self._helper = link, lifetime, helper
        self._relay, self._leader = relay, leader
        self._selection, self._known = job.selection, job.known
        self._top_mhz = job.top_mhz
        self._clocks = ClockLog(self._top_mhz)
        self._collector = SweepCollector(self._top_mhz)
        self._durations = DurationsLog(self._top_mhz)
        self._durations_due_s = 0.0
        about = {**job.gpu_facts, "facts": dict(job.facts or {})}
        self._recorder = Recorder(job.output_dir, placement, about, helper is not None, config.record)
        self._account = Account(helper is not None, self._take_energy)
        self._windows = Windows(exchange, placement, config.watch.reference_share, self._top_mhz)
        self._sensing = StragglerSensing(config.stragglers, placement, exchange)
        self._plans = job.plans
        self._estimated = not job.plans
        self._polling = False
        self._taken = 0  # iterations; the training thread may have finished more
        self._sweep_ended_s: float | None = None
        self._news = News(sequence=0, switch=0, action="full")
        self._heard_of_batches: Any = None
        self._newest_batch = -1
        self._recheck: dict[str, list[float]] | None = None
        self._recheck_left = 0
        self._told_trouble = self._said_graph = False
        self._in_trouble = False
        self._recent_s: deque[float] = deque(maxlen=RECENT_ITERATIONS)
        self._free_after_s = 0.0
        self._plans_since: int | None = None
        self._requests = 0
        self._deviations = 0
        self._unexplained: wire.Deviation | None = None
        self._changed_outside = self._below = self._held = self._paused = False
        self._read_failure: tuple[float, str] | None = None
        self._stats = RankStats(placement=placement, totals={})
        self._stats_due_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="perseus", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # The thread.

    def _run(self) -> None:
        try:
            timing, rested_s = self._timing, 0.0
            while not self._stop.is_set():
                self._link.wake.wait(self._idle_s)
                if monotonic() < rested_s:
                    self._stop.wait(max(0.0, rested_s - monotonic()))
                self._link.wake.clear()
                self._step()
                now_s = monotonic()
                rested_s = now_s + timing.rest_s
                near_sample = next_sampled(self._link.timetable, self._link.iteration) - 1  # read the GPU from there on
                self._link.gather(now_s + self._gather_s if self._measures_nothing else 0.0, near_sample)
        except Exception as error:
            self._lifetime.fail(error)
            self._tell_trouble()
            if self._leader is not None:
                self._leader.stop_taking_reports()
            while self._helper is not None and not self._stop.wait(self._timing.idle_s):
                for event in self._helper.drain():
                    if isinstance(event, wire.Trouble) and not event.free:
                        self._lifetime.fail(ClockNotFreeError(event.text))

    def _step(self) -> None:
        self._take_iterations()
        self._sensing.send(self._link.take_reports())
        for announced in self._link.take_announced():
            if self._plans and not self._in_trouble:  # else nobody reads it
                self._exchange.append(WORKS, announced.model_dump())
        for said in self._link.take_said():
            self._exchange.append(TARGETS, said)
        self._sensing.look(monotonic())
        self._tell_trouble()
        self._finish_sweep()
        self._look_for_trouble()
        self._look_for_news()
        self._look_for_batches()
        if self._leader is not None:
            link = self._link
            self._leader.step(link.iteration, link.schedules, link.schedule, link.take_external())
        self._record()
        if (
            (self._plans_since is not None or self._is_dry)
            and self._durations.new >= NEW_DURATIONS
            and monotonic() >= self._durations_due_s
        ):
            self._publish_durations()
        self._publish_stats()
        if self._leader is not None:
            self._leader.update_summary(self._stats)
        self._relay.look()

    def _take_iterations(self) -> None:
        """Those that have finished, after what the helper told before they did."""
        iterations = self._link.take_finished()
        self._take_helper_events()
        taken = [self._take(finished) for finished in iterations]
        if taken:
            self._account.forget_before(self._taken - 17)
            self._count(taken)

    @property
    def _measures_nothing(self) -> bool:
        """Whether nobody waits for what the next iterations show."""
        return self._estimated and self._recheck is None

    @property
    def _is_dry(self) -> bool:
        """Whether iterations run under no plan, and are of use to hold plans against all the same."""
        return self._plans and self._estimated and not self._config.enforce

    def _record(self) -> None:
        if self._leader is not None and self._leader.coordinates and self._link.schedule is not None:
            for key, stream_of in self._link.schedules.items():
                self._recorder.keep_schedule(key, stream_of, self._placement.stages)
            self._recorder.use_schedule(*self._link.schedule, self._placement.stages)
        if self._estimated and self._helper is not None:
            self._poll_energy(self._recorder.wants_readings(self._link.timetable, self._link.iteration))
        self._recorder.step()

    def _take(self, finished: FinishedIteration) -> tuple[Directive, IterationRecord]:
        """Returns what it counts as."""
        self._taken = finished.record.number + 1
        directive, record = finished.directive, self._as_it_was(finished)
        if self._selection.busy:
            directive, record = NOT_OURS, replace(record, undisturbed=False)
        duration_s = record.end_s - record.begin_s
        if record.replayed:
            self._look_at_graph(directive)
        sorts: list[str] = [EVERY]
        if isinstance(directive, Sweep):
            self._poll_energy(True)
            sorts.append(PROFILING)
            if directive.kept and record.undisturbed and directive.is_full(self._top_mhz):
                sorts.append(FULL_CLOCK)
            self._collector.add(directive, record)
        elif isinstance(directive, Follow) and record.undisturbed:
            if not directive.straggler and directive.since != self._plans_since:
                self._plans_since = directive.since
                self._account.clear(PLAN)
            sorts.append(directive.ran_as.value)
            if not directive.straggler:
                sorts.append(UNDER_PLANS)
        elif isinstance(directive, FullClock):
            if self._helper is None and directive.ran_as is not RanAs.WARM_UP and record.undisturbed:
                sorts.append(FULL_CLOCK)
            if directive.ran_as is RanAs.REFERENCE:
                sorts.append(REFERENCES)
            if self._rechecks(record):
                sorts.append(RECHECK)
                self._take_recheck(record)
        self._durations.add(directive, record, part_for(self._link.parts, directive, record))
        self._recorder.iteration(directive, record, self._link.timetable, self._link.parts)
        self._account.add(record.number, sorts, duration_s)
        self._free_when_silent(duration_s)
        self._sensing.saw(directive, record, self._link.parts)
        self._windows.saw(directive, record, self._link.parts)
        if self._leader is not None:
            part = part_for(self._link.parts, directive, record)
            size = math.nan if part is None else step_size(record, part, self._top_mhz)
            self._leader.saw(directive, record, size)
        return directive, record

    def _look_at_graph(self, directive: Directive) -> None:
        """A step was replayed as one CUDA graph: no instruction of it was seen."""
        known = self._known.profile and self._link.timetable.sweep.number == 0
        if isinstance(directive, Sweep) and not known:
            self._lifetime.fail(
                PerseusError(
                    "the training step became a CUDA graph before profiling was over: capture it once there is a plan, "
                    "or give a profile of this job (perseus.profiling.load)"
                )
            )
        elif not (self._config.cuda_graph or self._said_graph or self._lifetime.ended):
            self._said_graph = True
            logger.warning(
                "the training step is replayed as one CUDA graph, and perseus.cuda_graph is not set: such steps run at "
                "full clocks under plans (logged once)"
            )

    def _take_energy(self, number: int, energy_j: float) -> None:
        self._recorder.energy(number, energy_j)
        self._windows.energy(number, energy_j)

    def _as_it_was(self, finished: FinishedIteration) -> IterationRecord:
        """The record; where one clock was to be held and was not, for all that is known, it counts as disturbed."""
        directive, record = finished.directive, finished.record
        if self._helper is None or isinstance(directive, Follow) or not record.undisturbed:
            return record
        asked_mhz = directive.frequency_mhz if isinstance(directive, Sweep) else None
        confirmed = self._clocks.confirms(asked_mhz, record.begin_s, record.end_s)
        return record if confirmed else replace(record, undisturbed=False)

    def _count(self, taken: Sequence[tuple[Directive, IterationRecord]]) -> None:
        """Enter iterations into what this rank tells of itself, all at once: each message takes time to make."""
        stats = self._stats
        followed = [
            (part, record)
            for directive, record in taken
            if record.undisturbed
            and record.complete
            and (part := part_for(self._link.parts, directive, record)) is not None
        ]
        records = [record for _, record in taken]
        self._stats = stats.model_copy(
            update={
                "overhead_s": stats.overhead_s + math.fsum(record.overhead_s for record in records),
                "hooked_iterations": stats.hooked_iterations + sum(bool(record.ends_s) for record in records),
                "overran": stats.overran + sum(record.overran for record in records),
                "instructions": stats.instructions + sum(len(record.ends_s) for record in records),
                "caught_up": _with_lateness(
                    stats.caught_up, [(part, record) for part, record in followed if part.catch_up is not None]
                ),
                "waited": _with_waits(stats.waited, [(part, record) for part, record in followed if part.waits]),
            }
        )

    # The helper.

    def _free_when_silent(self, duration_s: float) -> None:
        """Tell how long the training may ask for nothing, unless that is configured; anew where that has changed."""
        if self._helper is None or self._config.limits.free_after_s is not None:
            return
        self._recent_s.append(duration_s)
        limit_s = max(LEAST_SILENCE_S, SILENT_ITERATIONS * max(self._recent_s))
        if not 0.8 * limit_s <= self._free_after_s <= 1.2 * limit_s:
            self._free_after_s = limit_s
            self._helper.free_after(limit_s)

    def _take_helper_events(self) -> None:
        if self._helper is None:
            return
        for event in self._helper.drain():
            self._recorder.helper_event(event)
            match event:
                case wire.Tick() if not self._estimated:
                    self._clocks.read(event.time_s, event.clock_mhz, event.capped_s)
                    tick = Tick(event.previous_poll_s, event.time_s, event.energy_j)
                    self._collector.add_tick(tick, event.capped_s)
                case wire.Mark():
                    self._clocks.read(event.time_s, event.clock_mhz, event.capped_s)
                    self._account.add_reading(event)
                case wire.Applied():
                    self._clocks.applied(event.applied_s, event.frequency_mhz)
                    self._requests += 1
                case wire.SwitchLatency():
                    self._take_latency(event)
                case wire.Trouble(free=False):
                    self._lifetime.fail(ClockNotFreeError(event.text))
                case wire.Trouble(code="read_failed"):
                    self._read_failure = (monotonic(), event.text)
                case wire.Trouble(code="read_again"):
                    logger.info("%s: energy is measured as before", event.text)
                case wire.Trouble(code="freed"):
                    logger.warning("%s; nothing needs to be done", event.text)
                case wire.Trouble(code="paused"):
                    if not self._paused:
                        self._paused = True
                        logger.warning("%s; nothing needs to be done (logged once)", event.text)
                case wire.Trouble(code="started_again"):
                    logger.warning("%s. If that one ends as well, training goes on at full clocks", event.text)
                case wire.Trouble():
                    self._lifetime.fail(GpuError(event.text))
                case wire.Deviation():
                    self._take_deviation(event)

        self._say_read_failure()
        self._explain_deviation()

    def _say_read_failure(self) -> None:
        """Said a little later, as what broke reading may be about to end the session with a message of its own."""
        if self._read_failure is None or monotonic() < self._read_failure[0] + self._timing.read_failure_patience_s:
            return
        if not self._lifetime.ended:
            logger.warning(
                "energy is not measured any more: %s. Clocks are set as before; run `perseus doctor` on this machine",
                self._read_failure[1],
            )
        self._read_failure = None

    def _take_deviation(self, deviation: wire.Deviation) -> None:
        self._collector.add_deviation(deviation.time_s)
        if deviation.read_mhz > deviation.requested_mhz:
            # Where we give way nothing is asked for again, and the helper says so as the reason why the session ends.
            if not self._changed_outside and self._config.gpu.foreign_clock != "give_way":
                self._changed_outside = True
                logger.warning(
                    "the GPU runs at %d MHz where %d MHz were asked for: somebody else sets its clock, or the driver "
                    "does not honour locks; asked again (logged once; see perseus.gpu.foreign_clock)",
                    deviation.read_mhz,
                    deviation.requested_mhz,
                )
        elif self._unexplained is None and not self._below:
            self._unexplained = deviation
        self._deviations += 1

    def _explain_deviation(self) -> None:
        """Say why the GPU is below the clock asked for, as soon as its count of time at the power limit tells."""
        deviation = self._unexplained
        if deviation is None:
            return
        held = self._clocks.held(deviation.time_s)
        if held is None and monotonic() < deviation.time_s + self._timing.explanation_patience_s:
            return
        self._unexplained = None
        if not held:
            self._below = True
            logger.warning(
                "the GPU runs at %d MHz where %d MHz were asked for (logged once). Look for a power or thermal limit "
                "(nvidia-smi -q -d PERFORMANCE) and for other programs that set clocks",
                deviation.read_mhz,
                deviation.requested_mhz,
            )
        elif not self._held:
            self._held = True
            logger.info(
                "the GPU is at its power limit: it runs at %d MHz where %d MHz were asked for (logged once)",
                deviation.read_mhz,
                deviation.requested_mhz,
            )

    def _take_latency(self, latency: wire.SwitchLatency) -> None:
        why_not = why_not_obeyed(latency)
        if why_not:
            self._lifetime.fail(GpuError(why_not))
        if not latency.p95_s > 0:  # NaN when no change showed
            return
        self._link.rise_early(latency.p95_s)
        self._stats = self._stats.model_copy(update={"switch_latency_s": (latency.p50_s, latency.p95_s)})
        logger.debug("clock changes take %.1f ms (95 %%: %.1f ms)", 1e3 * latency.p50_s, 1e3 * latency.p95_s)

    @property
    def _switch_latency_s(self) -> float | None:
        measured = self._stats.switch_latency_s
        return None if measured is None else measured[1]

    def _poll_energy(self, on: bool) -> None:
        if self._helper is not None and on != self._polling:
            self._polling = on
            self._helper.poll_energy(self._selection.poll_interval_s if on else None)

    # Profile.

    def _finish_sweep(self) -> None:
        if self._estimated or self._taken < self._link.timetable.sweep_end:
            return
        now_s = monotonic()
        if self._sweep_ended_s is None:
            self._sweep_ended_s = now_s
        if now_s - self._sweep_ended_s < self._timing.ticks_after_sweep_s:
            return
        self._poll_energy(False)
        self._estimated = True
        self._publish_durations()  # before what rank 0 waits for
        if self._known.profile and self._link.timetable.sweep.number == 0:
            self._publish_recheck(0, self._collector.top_times_s(), self._collector.top_steps)
            return
        estimate = estimate_stage(
            self._collector.runs(),
            max_relative_error=self._config.profiling.max_relative_error,
            constant_kinds=self._collector.constant_kinds,
        )
        message = RankEstimate(
            placement=self._placement,
            gpu=self._selection.name,
            estimate=estimate.to_dict(),
            constant_time_s=self._collector.constant_times_s(),
            switch_latency_s=self._switch_latency_s,
            power_limit_w=self._selection.power_limit_w,
        )
        self._exchange.tell(estimate_key(self._link.timetable.sweep.number, self._placement.rank), message.model_dump())

    def _publish_durations(self) -> None:
        """For the replay of plans."""
        self._durations_due_s = monotonic() + self._patience * self._timing.durations_every_s
        message = self._durations.message(self._placement)
        self._exchange.publish(durations_key(self._placement.rank), message.model_dump())

    # News.

    def _look_for_trouble(self) -> None:
        """Every rank looks for itself: rank 0 may be the one in trouble."""
        value = None if self._in_trouble else self._exchange.heard(TROUBLE)
        if value is not None:
            self._in_trouble = True
            told = receive(Trouble, value)
            directive = FullClock(f"rank {told.rank}: {told.reason}")
            self._link.run_by(self._link.timetable.switched(self._link.iteration + 1, directive))

    def _look_for_news(self) -> None:
        value = None if self._in_trouble else self._exchange.heard(NEWS)
        if value is None:
            return
        news = receive(News, value)
        if news.sequence <= self._news.sequence:
            return
        if news.action == "sweep":
            self._sweep_again(news)
            return
        orders = [order for order in (*news.earlier, news) if order.sequence > self._news.sequence]
        directives = [self._directive(order) for order in orders]
        for order, directive in zip(orders, directives, strict=True):
            if directive is None:
                return  # published before the news; if the store lost it, the next look finds it or newer news
            self._take_order(order, directive)

    def _directive(self, news: News) -> Directive | None:
        """What iterations run as from then on; None where this stage's parts of the plans are not there."""
        if news.action == "follow":
            version = news.version_for(self._placement.replica)
            parts = self._exchange.fetch(part_key(version, self._placement.stage))
            if parts is None:
                return None
            newest = receive(PlanParts, parts)
            self._check_clocks(newest.parts)
            self._link.use_parts(with_newest(self._link.parts, newest))
            return Follow(version, news.straggler, news.since, news.limited)
        return FullClock(news.reason)

    def _take_order(self, news: News, directive: Directive) -> None:
        self._news = news
        self._recheck = {} if news.recheck else None
        if news.recheck:
            self._account.clear(RECHECK)
        self._recheck_left = self._config.watch.patience
        late = self._link.iteration >= news.switch
        self._stats = self._stats.model_copy(update={"late": self._stats.late + late})
        self._link.run_by(self._link.timetable.switched(news.switch, directive))

    def _look_for_batches(self) -> None:
        """Iterations to come may have plans of their own."""
        value = None if self._in_trouble else self._exchange.heard(BATCHES)
        if value is None or value == self._heard_of_batches:
            return
        self._heard_of_batches = value
        place = self._placement
        for iteration in receive(BatchNews, value).iterations:
            if iteration <= self._newest_batch:
                continue
            found = self._exchange.fetch(batch_key(iteration, place.replica, place.stage))
            part = None if found is None else receive(BatchPart, unpacked(found))
            if part is None or part.iteration != iteration:
                continue  # a newer one has taken its place
            self._check_clocks([part])
            self._newest_batch = iteration
            self._link.use_parts(with_batch(self._link.parts, part))

    def _check_clocks(self, parts: Sequence[PlanPart]) -> None:
        """A part that is of another GPU, or damaged, is not followed anywhere: the other ranks are told."""
        supported = self._selection.clocks_mhz
        absent = sorted({mhz for part in parts for mhz in part.all_clocks_mhz} - {*supported})
        if absent and supported:
            raise ExchangeError(
                f"the plan runs at {absent[0]} MHz, which this GPU does not have; allowed: one of its {len(supported)} "
                f"clocks from {min(supported)} to {max(supported)} MHz"
            )

    def _sweep_again(self, news: News) -> None:
        self._news = news
        order = news.clocks_mhz
        if news.paired:
            order = paired_clocks(order[1:], order[0], self._placement.stage)
        order = nearest_clocks(self._selection.clocks_mhz, order)
        self._link.run_by(self._link.timetable.swept_again(news.switch, order, news.paired))
        self._estimated, self._sweep_ended_s = False, None
        if self._leader is not None:
            self._leader.swept_again(self._link.timetable)

    def _rechecks(self, record: IterationRecord) -> bool:
        """Whether this iteration, at full clocks, is one of those that are measured again."""
        return self._recheck is not None and record.number > self._news.switch and record.complete

    def _take_recheck(self, record: IterationRecord) -> None:
        assert self._recheck is not None  # asked before
        for operation, start_s, end_s in zip(record.operations, record.starts_s, record.ends_s, strict=True):
            if isinstance(operation, Compute):
                self._recheck.setdefault(operation.kind, []).append(end_s - start_s)
        self._recheck_left -= 1
        if self._recheck_left == 0:
            medians = {kind: statistics.median(times) for kind, times in self._recheck.items()}
            self._publish_recheck(self._news.sequence, medians, self._config.watch.patience)
            self._recheck = None

    def _publish_recheck(self, sequence: int, time_s: dict[str, float], steps: int) -> None:
        message = Recheck(
            stage=self._placement.stage, time_s=time_s, switch_latency_s=self._switch_latency_s, steps=steps
        )
        self._exchange.tell(recheck_key(sequence, self._placement.rank), message.model_dump())

    def _tell_trouble(self) -> None:
        reason = self._link.trouble_reason
        if reason is None or self._told_trouble:
            return
        self._told_trouble = True
        message = Trouble(rank=self._placement.rank, reason=reason)
        try:
            self._exchange.tell_all(TROUBLE, message.model_dump())
        except ExchangeError as error:
            logger.debug("could not tell rank 0: %s", error)

    # Statistics and the summary.

    def _publish_stats(self, final: bool = False) -> None:
        if not final and monotonic() < self._stats_due_s:
            return
        self._stats_due_s = monotonic() + self._patience * self._timing.stats_every_s
        self._stats = self._stats.model_copy(
            update={
                "totals": self._account.totals,
                "plan_since": self._plans_since,
                "requests": self._requests,
                "deviations": self._deviations,
                "final": final,
            }
        )
        self._exchange.tell(stats_key(self._placement.rank), self._stats.model_dump(), patient=not final, at_once=final)

    def close(self) -> None:
        """End the thread, then settle accounts; called on the thread that ends the session."""
        self._stop.set()
        self._link.wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)
        try:
            self._settle()
        except (PerseusError, OSError) as error:
            logger.warning("the summary may be incomplete: %s. Training is not affected", error)
        finally:
            if self._leader is not None:
                self._leader.close()

    def _settle(self) -> None:
        self._take_iterations()
        self._recorder.step(final=True)
        try:
            self._publish_stats(final=True)
        except ExchangeError as error:  # the script may have taken the process group down
            if isinstance(error, UnansweredError) and self._link.trouble_reason is None:  # else it has been said
                logger.warning("the summary may be incomplete: %s. Training is not affected", error)
            logger.debug("the last statistics did not reach rank 0: %s", error)
        if self._leader is not None:
            self._leader.finish(self._stats)


def _with_lateness(before: CaughtUp, seen: Sequence[tuple[PlanPart, IterationRecord]]) -> CaughtUp:
    if not seen:
        return before
    durations_s = [
        [
            end_s - start_s
            for slot, start_s, end_s in zip(record.slots, record.starts_s, record.ends_s, strict=True)
            if slot >= 0
        ]
        for _, record in seen
    ]
    extra_j = [extra_energy_j(part, record.raised, of) for (part, record), of in zip(seen, durations_s, strict=True)]
    return CaughtUp(
        iterations=before.iterations + len(seen),
        instructions=before.instructions + sum(map(len, durations_s)),
        late_iterations=before.late_iterations + sum(bool(record.raised) for _, record in seen),
        raised=before.raised + sum(len(record.raised) for _, record in seen),
        extra_energy_j=before.extra_energy_j + sum(extra_j),
    )


def _with_waits(before: Waited, seen: Sequence[tuple[PlanPart, IterationRecord]]) -> Waited:
    if not seen:
        return before
    return Waited(
        iterations=before.iterations + len(seen),
        planned=before.planned + sum(len(part.waits) for part, _ in seen),
        lowered=before.lowered + sum(len(record.lowered) for _, record in seen),
        woken_early=before.woken_early + sum(record.woken_early for _, record in seen),
    )
