"""Who is slow as far as plans depend on it, what answers that, and what has come of it. Pure."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.paced import Pace, PacedPlan, Slowdowns
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.request import PaceRequest
from perseus_plugin.planning.work import SMALL, WORTH_REFINING

_SAME = 1e-6
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
        asked: what the planner was asked; None: not known.
        overheads: what iterations were taken to take beside the work that is known.
        refined: better plans need not be searched for any more.
    """

    pace: Pace | None
    versions: Mapping[Slowdowns, int]
    asked: PaceRequest | None = None
    overheads: Overheads | None = None
    refined: bool = False

    @property
    def to_refine(self) -> PaceRequest | None:
        """What to ask a planner that searches for longer, for the same pace; None: it would hardly find anything."""
        if self.refined or self.pace is None or self.asked is None:
            return None
        plans = [planned.plan for planned in self.pace.variants if planned.plan is not None]
        if not any(plan.gap > WORTH_REFINING and sum(map(len, plan.stages)) > SMALL for plan in plans):
            return None
        return replace(self.asked, at_least_s=max(self.asked.at_least_s, self.pace.pace_s))

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


@dataclass(frozen=True)
class AnswerFigures:
    """What has come of answers, for the summary. Energies and times are estimates from the profile."""

    replans: int = 0
    switches: int = 0
    iterations: int = 0
    energy_saved_j: float = 0.0
    time_saved_s: float = 0.0


class Answers:
    """The answers there are, and the one in force.

    Args:
        stages: of the pipeline.
        replicas: of the job.
        shards: ranks that work together on one stage of one replica.
        min_interval_s: from one answer to the next.

    Attributes:
        situation, answer: in force; None while nothing is slow.
        refine_at: iteration from which plans of the answer in force may be refined.
        figures: what happened so far.
    """

    def __init__(self, *, stages: int, replicas: int, shards: int = 1, min_interval_s: float = 0.0) -> None:
        self._stages, self._replicas, self._shards = stages, replicas, shards
        self._min_interval_s = min_interval_s
        self.situation: Situation | None = None
        self.answer: Answer | None = None
        self.refine_at = 0
        self.figures = AnswerFigures()
        self._answers: OrderedDict[object, Answer] = OrderedDict()
        self._answered_s = float("-inf")

    def copy(self) -> Answers:
        """One that changes by itself."""
        made = Answers(
            stages=self._stages, replicas=self._replicas, shards=self._shards, min_interval_s=self._min_interval_s
        )
        made.situation, made.answer, made.figures = self.situation, self.answer, self.figures
        made.refine_at = self.refine_at
        made._answers, made._answered_s = self._answers.copy(), self._answered_s
        return made

    def may_answer(self, now_s: float) -> bool:
        """Whether the last answer is long enough ago; `now_s` by a clock that never goes back."""
        return now_s - self._answered_s >= self._min_interval_s

    def known(self, situation: Situation) -> Answer | None:
        """The answer to such a situation, if there has been one."""
        if situation.identity in self._answers:
            self._answers.move_to_end(situation.identity)
        return self._answers.get(situation.identity)

    def learn(self, situation: Situation, answer: Answer) -> list[int]:
        """Keep an answer; returns numbers of plans that nobody will need any more."""
        self._answers[situation.identity] = answer
        self.figures = replace(self.figures, replans=self.figures.replans + 1)
        if len(self._answers) <= _ANSWERS_KEPT:
            return []
        _, oldest = self._answers.popitem(last=False)
        return list(oldest.versions.values()) if oldest is not self.answer else []

    def facts(self, situation: Situation, answer: Answer) -> dict[str, Any]:
        """An answer for the event log; it has plans, or none were needed."""
        assert answer.pace is not None  # the planner found something
        return {
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

    def put_in_force(self, situation: Situation | None, answer: Answer | None, now_s: float) -> None:
        """This is in force from now on; None: the job's plan is, as nothing is slow."""
        self.situation, self.answer, self._answered_s = situation, answer, now_s
        self.figures = replace(self.figures, switches=self.figures.switches + 1)

    def saves_more(self, pace: Pace) -> bool:
        """Whether all pipelines together take enough less at this pace than by the answer in force, which has one."""
        assert self.answer is not None  # it is asked about
        assert self.answer.pace is not None
        before = self.answer.pace
        if abs(pace.pace_s - before.pace_s) > _SAME * before.pace_s:
            return False  # for another pace
        return self._energy_j(pace) < (1 - WORTH_REFINING) * self._energy_j(before)

    def improve(self, answer: Answer) -> None:
        """In the place of the answer in force, for the same situations; whoever becomes slow is answered as soon."""
        assert self.situation is not None  # it is answered
        self.answer = self._answers[self.situation.identity] = answer

    def leave(self) -> None:
        """No answer is in force any more, for another reason than that nothing is slow."""
        self.situation = self.answer = None

    def forget(self) -> None:
        """The profile has changed: no answer holds any more."""
        self._answers.clear()
        self.leave()

    @property
    def slow_replicas(self) -> int:
        """How many pipelines are slow in the situation in force."""
        return 0 if self.situation is None else len(self.situation.slow) + len(self.situation.untouched)

    def count_iteration(self) -> None:
        """An iteration has run under the answer in force."""
        figures = replace(self.figures, iterations=self.figures.iterations + 1)
        if self.answer is not None and self.situation is not None and self.answer.pace is not None:
            # A plan's energy is that of one GPU per stage.
            saved_j = figures.energy_saved_j + self._shards * self._saved_j(self.answer.pace)
            saved_s = figures.time_saved_s + self.answer.pace.without_s - self.answer.pace.pace_s
            figures = replace(figures, energy_saved_j=saved_j, time_saved_s=saved_s)
        self.figures = figures

    def _energy_j(self, pace: Pace) -> float:
        return sum(count * planned.energy_j for count, planned in self._counted(pace))

    def _saved_j(self, pace: Pace) -> float:
        return sum(count * (planned.without_j - planned.energy_j) for count, planned in self._counted(pace))

    def _counted(self, pace: Pace) -> Iterator[tuple[int, PacedPlan]]:
        """How many pipelines there are of every sort, with its plan."""
        assert self.situation is not None  # it is answered
        of_slow = [slowdowns for _, slowdowns in self.situation.slow]
        for variant, planned in zip(self.situation.variants, pace.variants, strict=True):
            yield self._replicas - self.slow_replicas if max(variant) == 1 else of_slow.count(variant), planned
