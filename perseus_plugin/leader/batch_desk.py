"""Rank 0's side of announced batches: has the job's model learned, and each step planned for before it runs.

Only where ranks follow the job's plan for a `slowdown`: under a power budget, another target, or while there is a
straggler, iterations follow what was made for that. A plan is told only if there is time for all ranks to hear of it
before its iteration, which each of them then begins with it. Training waits for nothing here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.exchange.messages import (
    BATCHES,
    WORKS,
    AnnouncedWork,
    BatchNews,
    BatchPart,
    Placement,
    batch_key,
    durations_key,
    receive,
)
from perseus_plugin.exchange.packing import unpacked
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import REFERENCE, Directive, Follow
from perseus_plugin.leader.batch_book import BatchBook, BatchWatch
from perseus_plugin.leader.recent import FEWEST, RecentIterations, together
from perseus_plugin.leader.state import JobState, Phase
from perseus_plugin.planning.batch_process import MOST_INSTRUCTIONS, Learned, Lesson, PlannedStep, Works
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.profiling.same_work import Works as StepWorks
from perseus_plugin.reporting.record.summary import BatchesSection

logger = logging.getLogger(__name__)

_LEARN_AGAIN_S = 20.0  # as often as ranks tell of their iterations, where they are not too many
_TELL_AGAIN = 3  # iterations that are told together: who looks now and then hears of the newest word only
_MOST_FAILURES = 3
_MARGIN = 1.5  # how much longer than the last time a step's plan may take


class BatchPlannerProcess(Protocol):
    """See `planning.batch_process.BatchProcess`."""

    @property
    def busy(self) -> bool: ...
    def learn(self, lesson: Lesson) -> None: ...
    def plan(self, works: Works, iteration: int, base: int) -> None: ...
    def poll(self) -> Learned | PlannedStep | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Subject:
    """What lessons and plans are about: with anything of it different, all is learned anew.

    Attributes:
        request: of the schedule's plan.
        base: the set of plans that ranks follow.
        microbatches: of the schedule.
    """

    request: PlanRequest
    base: int
    microbatches: int


@dataclass(frozen=True)
class _Asked:
    subject: _Subject
    iteration: int | None
    at_s: float


class BatchDesk:
    """See the module's docstring.

    Args:
        exchange: to all ranks.
        placement: of rank 0.
        recent: the job's last iterations.
        tolerance: share by which iterations may be longer than they are to be.
        start: starts the process that plans; called once something is announced.
    """

    def __init__(
        self,
        exchange: Exchange,
        placement: Placement,
        recent: RecentIterations,
        tolerance: float,
        start: Callable[[], BatchPlannerProcess],
    ) -> None:
        self._exchange, self._placement, self._recent, self._start = exchange, placement, recent, start
        self._book, self._watch = BatchBook(placement.replicas), BatchWatch(tolerance)
        self._process: BatchPlannerProcess | None = None
        self._asked: _Asked | None = None
        self._subject: _Subject | None = None
        self._learned: Learned | None = None  # about the present subject
        self._before = Learned("nothing has been learned yet")
        self._learn_at_s = 0.0
        self._learned_from: Any = None  # what rank 0 had told of its iterations then
        self._plan_takes_s = 0.5
        self._planned_up_to = -1
        self._told: list[tuple[int, float]] = []  # the last iterations, and when
        self._pace_s: dict[int, tuple[float, Sequence[float]]] = {}
        self._announced = 0
        self._ended = ""
        self._was_right = False
        self._failures = 0
        self._sizes: dict[str, int] = {}  # instructions of a step, by schedule
        self._said: set[str] = set()

    @property
    def figures(self) -> BatchesSection | None:
        """For the summary; None: nothing was announced."""
        if not self._announced and self._process is None:
            return None
        learned = self._learned or self._before
        return BatchesSection(
            announced=self._announced,
            planned=self._watch.iterations,
            explained_percent=_percent(learned.explained),
            error_percent=_percent(learned.error),
            margin_percent=_percent(learned.margin),
            saving_percent=_percent(learned.saving),
            ended=self._ended or learned.why_not,
        )

    @property
    def step_works(self) -> StepWorks:
        """By replica and iteration the mean work of a microbatch, as far as it was announced."""
        return self._book.means

    def saw(self, directive: Directive, record: IterationRecord) -> None:
        """An iteration has ended on rank 0."""
        self._book.ended(record.number, record.end_s)
        counts = self._book.counts(record.number)
        self._announced += bool(counts)
        self._check_count(record, counts)
        known = self._pace_s.pop(record.number, None)
        if known is None or not (record.undisturbed and record.complete):
            return
        pace_s, predicted_s = known
        follows = isinstance(directive, Follow) and directive.batch
        if follows or directive == REFERENCE:
            self._watch.saw(record.end_s - record.begin_s, pace_s, reference=not follows)
        if follows and not record.raised:
            rows = zip(record.slots, record.starts_s, record.ends_s, strict=True)
            self._watch.timed([end_s - start_s for slot, start_s, end_s in rows if slot >= 0], predicted_s)
        against = "" if self._ended else self._watch.against
        if against:
            self._end(against)

    def _check_count(self, record: IterationRecord, counts: set[int]) -> None:
        microbatches = len({one.microbatch for one in record.operations if isinstance(one, Compute)})
        wrong = counts - {microbatches}
        if wrong and record.complete and "count" not in self._said:
            self._said.add("count")
            logger.warning(
                "announced work was of no use: %d numbers for an iteration of %d microbatches (logged once). Such "
                "iterations follow the job's usual plan; announce one number per microbatch of the rank's own pipeline",
                min(wrong),
                microbatches,
            )

    def step(self, state: JobState, now_s: float, news_take_s: float) -> None:
        """Do what can be done now.

        Raises:
            ExchangeError: the store fails.
        """
        for value in self._exchange.take_new(WORKS):
            self._book.take(receive(AnnouncedWork, value))
        if self._ended or not self._book.known:
            return
        if self._process is None:
            self._process = self._start()
        subject = self._subject_of(state)
        if subject != self._subject:
            self._before = self._learned or self._before
            self._subject, self._learned, self._learn_at_s, self._learned_from = subject, None, now_s, None
        self._take_answer(now_s, news_take_s)
        if subject is None or self._process.busy or self._ended:
            return
        if self._learned is not None and not self._learned.why_not:
            microbatches, takes_s = subject.microbatches, news_take_s + _MARGIN * self._plan_takes_s
            iteration = self._book.next_in_time(microbatches, self._planned_up_to, now_s, takes_s)
            works = None if iteration is None else self._book.of(iteration, microbatches)
            if iteration is not None and works is not None and self._may_tell(iteration, now_s, news_take_s):
                self._process.plan(works, iteration, subject.base)
                self._asked = _Asked(subject, iteration, now_s)
                return
        if now_s >= self._learn_at_s:
            self._learn_at_s = now_s + _LEARN_AGAIN_S
            self._learn(subject, state, now_s)

    def _may_tell(self, iteration: int, now_s: float, news_take_s: float) -> bool:
        """Whether all ranks can hear of one more: no word is lost, and no plan of one that is still to be heard of."""
        unheard = [one for one, told_s in self._told if told_s > now_s - news_take_s]
        keys = {batch_key(one, 0, 0) for one in unheard}
        return len(unheard) < _TELL_AGAIN and batch_key(iteration, 0, 0) not in keys

    def _subject_of(self, state: JobState) -> _Subject | None:
        """What is followed, where batches may be planned for."""
        news, newest = state.orders.latest, state.schedules.newest
        if state.phase is not Phase.FOLLOWING or state.at_full or state.fallen or state.unanswered:
            return None
        if news is None or news.action != "follow" or news.straggler or news.limited or news.variants:
            return None
        if newest not in state.plans or newest not in state.requests:
            return None
        request = state.requests[newest]
        if request.target.kind != "slowdown" or request.limit is not None or self._too_many(request):
            return None
        return _Subject(request, news.version, state.plans.of(newest).microbatches)

    def _too_many(self, request: PlanRequest) -> bool:
        """Whether a step is too large to be planned for while others run."""
        if request.schedule not in self._sizes:
            of_one = sum(isinstance(one, Compute) for stream in request.streams for one in stream)
            self._sizes[request.schedule] = of_one * self._placement.replicas
        size = self._sizes[request.schedule]
        if size > MOST_INSTRUCTIONS and "too many" not in self._said:
            self._said.add("too many")
            why = f"a step has {size} instructions in all pipelines together (most: {MOST_INSTRUCTIONS})"
            self._before = Learned(why)
            logger.warning(
                "batches are not planned for one by one: %s, and planning would take too long. Such iterations follow "
                "the job's usual plan; nothing needs to be done",
                why,
            )
        return size > MOST_INSTRUCTIONS

    def _learn(self, subject: _Subject, state: JobState, now_s: float) -> None:
        told = self._exchange.fetch(durations_key(self._placement.rank))
        if told is None or told == self._learned_from:
            return  # ranks of a large job tell more rarely; reading what all of them have told takes time
        request = subject.request
        seen = self._recent.numbered(request.schedule, request.streams, request.profile)
        works = {number: self._book.of(number, subject.microbatches) for number in seen}
        known = {
            number: (seen[number], of)
            for number, of in works.items()
            if of is not None and len(seen[number].durations_s[0]) == self._placement.replicas
        }
        if len(known) < FEWEST or self._process is None:
            return
        samples = together([sample for sample, _ in known.values()])
        asked = replace(request, samples=samples, in_force=state.reviews.in_force(request.schedule))
        self._learned_from = told
        self._process.learn(Lesson(asked, [of for _, of in known.values()]))
        self._asked = _Asked(subject, None, now_s)

    def _take_answer(self, now_s: float, news_take_s: float) -> None:
        answer = None if self._process is None else self._process.poll()
        asked, self._asked = (self._asked, None) if answer is not None else (None, self._asked)
        if answer is None or asked is None or asked.subject != self._subject:
            return
        if answer.lost:
            self._fail(answer.why_not, "see to memory on rank 0's machine", now_s)
        elif isinstance(answer, PlannedStep) and answer.why_not:
            self._fail(f"a step could not be planned for: {answer.why_not}", "nothing needs to be done", now_s)
        elif isinstance(answer, Learned):
            self._take_lesson(answer)
        elif asked.iteration is not None:
            self._plan_takes_s = now_s - asked.at_s
            if self._book.begins_s(asked.iteration) >= now_s + news_take_s:  # else some would hear of it too late
                self._tell(asked.iteration, answer, now_s)

    def _take_lesson(self, learned: Learned) -> None:
        before, self._learned = self._learned, learned
        held = before is not None and not before.why_not
        self._was_right |= not learned.why_not
        if learned.misled and self._was_right and before is not None and before.misled:  # twice: once may be a stall
            self._end(learned.why_not)
        elif learned.why_not and (held or before is None):
            self._say_not(learned)
        elif not learned.why_not and not held and learned.saving is not None and learned.time_ratio is not None:
            logger.info(
                "batches are planned for one by one: announced works explain %.0f %% of how durations vary, and %.1f "
                "%% of a duration is left; over the last iterations that saves %.1f %% (the job's plan %.1f %%) at "
                "%+.2f %% time, with a margin of %g %%",
                100 * (learned.explained or 0.0),
                100 * (learned.error or 0.0),
                100 * learned.saving,
                100 * (learned.saving_in_force or 0.0),
                100 * (learned.time_ratio - 1),
                100 * (learned.margin or 0.0),
            )

    def _say_not(self, learned: Learned) -> None:
        if learned.misled and not self._was_right and "misled" not in self._said:
            self._said.add("misled")
            logger.warning(
                "batches are not planned for one by one: %s. All iterations follow the job's usual plan; announce what "
                "the time of a microbatch goes with (tokens, their squares), or stop announcing",
                learned.why_not,
            )
        else:
            logger.info("batches are not planned for one by one: %s", learned.why_not)

    def _fail(self, why: str, advice: str, now_s: float) -> None:
        """Through no fault of what is announced: begin anew, but not for ever."""
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            self._end(f"{why}, and something of the kind {_MOST_FAILURES - 1} times before", advice)
            return
        self._before = self._learned or self._before
        self._learned, self._learn_at_s, self._learned_from = None, now_s, None
        logger.warning(
            "how to plan for single batches is learned anew: %s. Iterations follow the job's usual plan meanwhile; if "
            "it is said again, %s",
            why,
            advice,
        )

    def _end(self, why: str, advice: str = "see to what is announced, and in which order") -> None:
        """For good: what was wrong may be so again."""
        self._ended = why
        logger.warning(
            "batches are not planned for one by one any more: %s. All iterations follow the job's usual plan; %s",
            why,
            advice,
        )
        self.close()

    def _tell(self, iteration: int, step: PlannedStep, now_s: float) -> None:
        try:
            own = receive(BatchPart, unpacked(step.replicas[self._placement.replica][self._placement.stage]))
        except (ExchangeError, IndexError) as error:
            self._fail(
                f"what plans batches tells of no plan: {error}", "see to its version (perseus.planner.python)", now_s
            )
            return
        for replica, stages in enumerate(step.replicas):
            for stage, part in enumerate(stages):
                self._exchange.publish(batch_key(iteration, replica, stage), part)
        self._planned_up_to = iteration
        self._told = [*self._told, (iteration, now_s)][-_TELL_AGAIN:]
        self._exchange.tell_all(BATCHES, BatchNews(iterations=tuple(one for one, _ in self._told)).model_dump())
        self._pace_s[iteration] = own.pace_s, own.times_s

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
