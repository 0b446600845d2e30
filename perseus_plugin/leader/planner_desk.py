"""Asks the planner: one request at a time, made from all that is known of the job."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

from perseus_plugin.config import PerseusConfig
from perseus_plugin.leader.effects import Ask
from perseus_plugin.leader.rank_reports import RankReports
from perseus_plugin.leader.recent import RecentIterations
from perseus_plugin.planning.graphed import jitter_of
from perseus_plugin.planning.power.budget import NodeOverhead
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.planning.targets import more_than
from perseus_plugin.planning.work import tell_cut_short


class Planner(Protocol):
    """See `planning.planner_process.PlannerProcess`."""

    @property
    def busy(self) -> bool: ...
    def submit(self, request: PlanRequest) -> None: ...
    def drop(self) -> None: ...
    def poll(self) -> PlanAnswer | None: ...


class PlannerDesk:
    """See the module's docstring.

    Args:
        config: the `perseus` block.
        planner: who plans.
        recent: the job's last iterations.
        reports: of all ranks.
        stages: of the pipeline.
        pipelines: GPUs that run each stage.
        refiner: who refines plans; None: nobody.
    """

    def __init__(
        self,
        config: PerseusConfig,
        planner: Planner,
        recent: RecentIterations,
        reports: RankReports,
        stages: int,
        pipelines: int = 1,
        refiner: Planner | None = None,
    ) -> None:
        self._config, self._planner, self._refiner = config, planner, refiner
        self._recent, self._reports, self._stages = recent, reports, stages
        self._asked: tuple[Ask, PlanRequest] | None = None
        self._refined: tuple[Ask, PlanRequest] | None = None
        self._told_cut_short = False
        # As many GPUs of each stage, whichever they are.
        self._by_stage = [stage for stage in range(stages) for _ in range(pipelines)], None

    @property
    def idle(self) -> bool:
        """Whether nothing is being worked on."""
        return self._asked is None and not self._planner.busy

    @property
    def refiner_idle(self) -> bool:
        """Whether there is somebody to refine plans who works on nothing."""
        return self._refiner is not None and self._refined is None and not self._refiner.busy

    def ask(self, ask: Ask) -> None:
        """Submit a request, if nothing is being worked on, and there are iterations for a review.

        What is worked on makes room for a new target, and is asked for again by whoever still wants it.

        Raises:
            ExchangeError: the store fails.
        """
        if not (self.refiner_idle if ask.refine else self.idle):
            asked = None if ask.refine or self._asked is None else self._asked[0]
            if asked is not None and not asked.quick and (ask.quick or ask.goal != asked.goal):
                self._planner.drop()
            return
        survey = ask.survey
        streams = [ask.stream_of(stage) for stage in range(self._stages)]
        samples = None if ask.quick else self._recent.samples(ask.schedule, streams, survey.profile)
        if ask.review and samples is None:
            return
        limit = ask.goal.limit
        if limit is not None:
            placed = self._reports.placed()
            if placed is None and (limit.groups or limit.node != NodeOverhead() or limit.peaks.node_w is not None):
                return  # who is in which group, or on which node, is not known yet
            limit = limit.placed(*(placed or self._by_stage)).tightened(ask.goal.draws)
            limit = replace(limit, or_nearest=limit.or_nearest or ask.or_nearest)
        config, limits = self._config, self._config.limits
        latency_s = self._reports.latency_s if limits.switch_latency_s is None else limits.switch_latency_s
        power_se_w = survey.blocking_power_se_w
        request = PlanRequest(
            schedule=ask.schedule,
            streams=streams,
            constant_time_s=survey.constants_for(streams),
            profile=survey.profile,
            blocking_power_w=[survey.blocking_power_w] * self._stages,
            blocking_power_se_w=power_se_w if math.isfinite(power_se_w) else None,
            target=ask.goal.wish,
            limit=limit,
            margin=ask.margin,
            effort="quick" if ask.quick else more_than(config.effort) if ask.refine else config.effort,
            max_changes=limits.max_changes_per_iteration,
            min_dwell_s=self._reports.dwell_s if limits.dwell_s is None else limits.dwell_s,
            full_clock_only=survey.unresolved,
            pace=ask.pace,
            samples=samples,
            quantile=config.quantile,
            # Without measured starts a rank cannot know when it usually begins, and might always think itself late; of
            # a step that is one CUDA graph it sees none.
            catch_up=config.catch_up and samples is not None and not config.cuda_graph,
            latency_s=latency_s or None,
            lower_while_waiting=config.lower_while_waiting and not config.cuda_graph,
            in_force=ask.in_force,
            overheads=ask.overheads,
            search=not ask.quick,
            jitter=jitter_of(survey.profile) if config.cuda_graph and not ask.quick else None,
            refine_s=config.refine_s if ask.refine else 0.0,
        )
        if ask.refine:
            assert self._refiner is not None  # it is idle
            self._refiner.submit(request)
            self._refined = ask, request
        else:
            self._planner.submit(request)
            self._asked = ask, request

    def answer(self) -> tuple[Ask, PlanRequest, PlanAnswer] | None:
        """What was asked with what came of it, once; None while there is nothing."""
        answer = self._planner.poll()
        if answer is None or self._asked is None:
            return self._refiners_answer()
        (ask, request), self._asked = self._asked, None
        if answer.dropped:
            return self._refiners_answer()
        if answer.cut_short and not self._told_cut_short:
            self._told_cut_short = True
            tell_cut_short()
        return ask, request, answer

    def _refiners_answer(self) -> tuple[Ask, PlanRequest, PlanAnswer] | None:
        answer = None if self._refiner is None else self._refiner.poll()
        if answer is None or self._refined is None:
            return None
        (ask, request), self._refined = self._refined, None
        return ask, request, answer
