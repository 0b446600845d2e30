"""Plans for the pipelines of one job that wait for each other while some of them are slower than they were.

The job's pace is the iteration time of its slowest pipeline at full clocks. Every other pipeline has until then: it
waits for the slow one in any case, so its plan counts blocking power until the pace (`Target.straggler`), and stops
slowing down by itself where that saves nothing any more (T* in the paper). A slow pipeline plans with the times of its
slow stages scaled, so that those run at full clocks and their neighbours have more time.

Source: Chung et al., "Reducing Energy Bloat in Large Model Training", SOSP 2024, section 3.2.2 (extrinsic bloat).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import PipelineGraph
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.paced import Pace, PacedPlan, Slowdowns
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target
from perseus_plugin.profiling.profile import Profile

_SAME = 1e-6


def plan_pace(
    graph: PipelineGraph,
    profile: Profile,
    variants: Sequence[Slowdowns],
    *,
    clocks_mhz: Sequence[Sequence[int]],
    blocking_power_w: Sequence[float],
    slowdown: float = 0.0,
    at_least_s: float = 0.0,
    planned_on: Callable[[Profile], Profile] = lambda profile: profile,
    limits: ChangeLimits | None = None,
    effort: Effort = "quick",
    full_clock_only: Collection[tuple[int, str]] = (),
    schedule: str = "custom",
    switch_latency_s: float | None = None,
    brake_s: float = math.inf,
) -> Pace:
    """Plan every sort of pipeline for the pace of the slowest.

    Args:
        graph: of one pipeline.
        profile: as measured while nothing was slow.
        variants: which stages are slow, per sort of pipeline; all ones for those that are not.
        clocks_mhz: the job's plan, per stage.
        blocking_power_w: one per stage.
        slowdown: what the job's plan was allowed against full clocks, as a share.
        at_least_s: the pace is known to be at least this, whatever the profile says.
        planned_on: what the planner makes of a profile (a margin).
        limits, effort, full_clock_only, schedule, switch_latency_s: as for `make_plan`.
        brake_s: for how long clocks may be searched for, all variants together.

    Raises:
        PlanError: a variant does not name every stage, the clocks do not fit the graph, or there is no plan.
    """
    for variant in variants:
        if len(variant) != graph.stages or min(variant) < 1:
            raise PlanError(f"slowdowns: got {variant}; allowed: one from 1 for each of {graph.stages} stages")
    seen = [slowed(profile, variant) for variant in variants]
    planners = [
        Planner(
            graph,
            planned_on(of_variant),
            blocking_power_w=blocking_power_w,
            full_clock_only=full_clock_only,
            schedule=schedule,
            switch_latency_s=switch_latency_s,
            brake_s=brake_s / len(variants),
        )
        for of_variant in seen
    ]
    problems = [build_problem(graph, of_variant, blocking_power_w) for of_variant in seen]
    unslowed_s = build_problem(graph, profile, blocking_power_w).full_clock_time_s
    target_s = unslowed_s * (1 + slowdown)
    forced_s = max([at_least_s, *(planner.problem.full_clock_time_s for planner in planners)])
    pace_s = max(target_s, forced_s)
    forced = forced_s > target_s * (1 + _SAME)
    target = Target.straggler(pace_s) if forced else Target.deadline(pace_s)
    plans = [
        planner.plan(target, limits, effort) if forced or max(variant) > 1 else None
        for planner, variant in zip(planners, variants, strict=True)
    ]
    ran = [
        _Run(problem, clocks_mhz if plan is None else _clocks(plan))
        for problem, plan in zip(problems, plans, strict=True)
    ]
    left = [_Run(problem, clocks_mhz) for problem in problems]
    ends_s = max([pace_s if forced else 0.0, *(run.time_s for run in ran)])
    without_s = max([at_least_s, *(run.time_s for run in left)])
    how = switch_latency_s, limits or ChangeLimits()
    return Pace(
        pace_s,
        without_s,
        tuple(
            PacedPlan(plan, one.energy_until_j(ends_s, *how), before.energy_until_j(without_s, *how))
            for plan, one, before in zip(plans, ran, left, strict=True)
        ),
    )


def slowed(profile: Profile, slowdowns: Slowdowns) -> Profile:
    """The profile with times and energies of slow stages scaled: a slow GPU draws its power for longer."""
    return profile.scaled({(stage, kind): slowdowns[stage] for stage, kind in profile.table})


def _clocks(plan: Plan) -> list[list[int]]:
    return [plan.clocks_mhz(stage) for stage in range(len(plan.stages))]


class _Run:
    """One pipeline's iteration at given clocks, per stage.

    Attributes:
        time_s: what it takes, without waiting for others.
    """

    def __init__(self, problem: PlanningProblem, clocks_mhz: Sequence[Sequence[int]]) -> None:
        self._problem, graph = problem, problem.graph
        self._mhz = np.zeros(len(graph), dtype=np.int64)
        for stage, nodes in enumerate(graph.stage_nodes):
            own = nodes[~graph.is_constant[nodes]]
            if len(own) != len(clocks_mhz[stage]):
                raise PlanError(
                    f"clocks: got {len(clocks_mhz[stage])} in stage {stage}; allowed: one for each of its "
                    f"{len(own)} instructions"
                )
            self._mhz[own] = clocks_mhz[stage]
        duration_s, watts = problem.at_clocks(self._mhz)
        self._effective_j = float(duration_s @ watts)
        self._start_s, self._finish_s = graph.times(duration_s)
        self.time_s = float(self._finish_s.max())

    def energy_until_j(self, end_s: float, switch_latency_s: float | None, limits: ChangeLimits) -> float:
        """With the wait until `end_s`."""
        waits = self._problem.waiting_costs.decide(
            self._mhz, self._start_s, self._finish_s, end_s, switch_latency_s, limits
        )
        return self._effective_j + self._problem.total_blocking_w * end_s + waits.extra_j
