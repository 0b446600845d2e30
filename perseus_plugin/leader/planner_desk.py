"""Asks the planner: one request at a time, made from all that is known of the job."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from perseus_plugin.config import PerseusConfig
from perseus_plugin.iteration.instructions import StreamOp
from perseus_plugin.iteration.replayed import InForce
from perseus_plugin.leader.rank_reports import RankReports
from perseus_plugin.leader.recent import RecentIterations
from perseus_plugin.planning.request import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.planning.work import tell_cut_short
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.stragglers.desk import Situation


class Planner(Protocol):
    """See `planner_process.PlannerProcess`."""

    @property
    def busy(self) -> bool: ...
    def submit(self, request: PlanRequest) -> None: ...
    def poll(self) -> PlanAnswer | None: ...


@dataclass(frozen=True)
class Asked:
    """What the planner works on.

    Attributes:
        request: as it was submitted.
        survey: that it was made on.
        situation: of stragglers that it is to answer; None: it is for the job's plan of a schedule.
        instead_of: schedule whose plan makes room for it, None: there is room.
        review: whether a plan in force is held against newer iterations.
    """

    request: PlanRequest
    survey: Survey
    situation: Situation | None = None
    instead_of: str | None = None
    review: bool = False


class PlannerDesk:
    """See the module's docstring.

    Args:
        config: the `perseus` block.
        planner: who plans.
        recent: the job's last iterations.
        reports: of all ranks.
        stages: of the pipeline.
    """

    def __init__(
        self, config: PerseusConfig, planner: Planner, recent: RecentIterations, reports: RankReports, stages: int
    ) -> None:
        self._config, self._planner = config, planner
        self._recent, self._reports, self._stages = recent, reports, stages
        self._asked: Asked | None = None
        self._told_cut_short = False

    @property
    def idle(self) -> bool:
        """Whether nothing is being worked on."""
        return self._asked is None and not self._planner.busy

    def ask(
        self,
        schedule: str,
        stream_of: Callable[[int], Sequence[StreamOp]],
        survey: Survey,
        margin: float,
        *,
        instead_of: str | None = None,
        situation: Situation | None = None,
        pace: PaceRequest | None = None,
        review: bool = False,
        in_force: InForce | None = None,
    ) -> bool:
        """Submit a request, if nothing is being worked on; returns whether that could be done.

        Args:
            schedule: its key.
            stream_of: the instruction stream of every stage.
            survey: what is known of the job.
            margin: the least one.
            instead_of, situation, review: see `Asked`.
            pace: of stragglers.
            in_force: the plan that is reviewed.

        Raises:
            ExchangeError: the store fails.
        """
        if not self.idle:
            return False
        streams = [stream_of(stage) for stage in range(self._stages)]
        samples = self._recent.samples(schedule, streams, survey.profile)
        if review and samples is None:
            return False
        config, limits = self._config, self._config.limits
        power_se_w = survey.blocking_power_se_w
        request = PlanRequest(
            schedule=schedule,
            streams=streams,
            constant_time_s=survey.constants_for(streams),
            profile=survey.profile,
            blocking_power_w=[survey.blocking_power_w] * self._stages,
            blocking_power_se_w=power_se_w if math.isfinite(power_se_w) else None,
            slowdown=config.slowdown,
            margin=margin,
            effort=config.effort,
            max_changes=limits.max_changes_per_iteration,
            min_dwell_s=self._reports.dwell_s if limits.dwell_s is None else limits.dwell_s,
            full_clock_only=survey.unresolved,
            pace=pace,
            samples=samples,
            quantile=config.quantile,
            # Without measured starts a rank cannot know when it usually begins, and might always think itself late.
            catch_up=config.catch_up and samples is not None,
            latency_s=self._reports.latency_s if limits.switch_latency_s is None else limits.switch_latency_s,
            in_force=in_force,
        )
        self._planner.submit(request)
        self._asked = Asked(request, survey, situation, instead_of, review)
        return True

    def answer(self) -> tuple[Asked, PlanAnswer] | None:
        """What was asked with what came of it, once; None while there is nothing."""
        answer = self._planner.poll()
        if answer is None or self._asked is None:
            return None
        asked, self._asked = self._asked, None
        if answer.cut_short and not self._told_cut_short:
            self._told_cut_short = True
            tell_cut_short()
        return asked, answer
