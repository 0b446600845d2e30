"""Plans for the pipelines of one job that wait for each other while some of them are slower than they were.

The job's pace is the iteration time of its slowest pipeline at full clocks. Every other pipeline has until then: it
waits for the slow one in any case, so its plan counts blocking power until the pace (`Target.straggler`), and stops
slowing down by itself where that saves nothing any more (T* in the paper). A slow pipeline plans with the times of its
slow stages scaled, so that those run at full clocks and their neighbours have more time.

Source: Chung et al., "Reducing Energy Bloat in Large Model Training", SOSP 2024, section 3.2.2 (extrinsic bloat).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import PipelineGraph
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
        limits, effort, full_clock_only, schedule: as for `make_plan`.

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
        )
        for of_variant in seen
    ]
    unslowed_s = Planner(graph, profile, blocking_power_w=blocking_power_w).problem.full_clock_time_s
    target_s = unslowed_s * (1 + slowdown)
    forced_s = max([at_least_s, *(planner.problem.full_clock_time_s for planner in planners)])
    pace_s = max(target_s, forced_s)
    forced = forced_s > target_s * (1 + _SAME)
    target = Target.straggler(pace_s) if forced else Target.deadline(pace_s)
    plans = [
        planner.plan(target, limits, effort) if forced or max(variant) > 1 else None
        for planner, variant in zip(planners, variants, strict=True)
    ]
    power_w = float(np.sum(blocking_power_w))
    ran = [
        _run(graph, of_variant, blocking_power_w, clocks_mhz if plan is None else _clocks(plan))
        for of_variant, plan in zip(seen, plans, strict=True)
    ]
    left = [_run(graph, of_variant, blocking_power_w, clocks_mhz) for of_variant in seen]
    ends_s = max([pace_s if forced else 0.0, *(time_s for time_s, _ in ran)])
    without_s = max([at_least_s, *(time_s for time_s, _ in left)])
    return Pace(
        pace_s,
        without_s,
        tuple(
            PacedPlan(plan, effective_j + power_w * ends_s, left_j + power_w * without_s)
            for plan, (_, effective_j), (_, left_j) in zip(plans, ran, left, strict=True)
        ),
    )


def slowed(profile: Profile, slowdowns: Slowdowns) -> Profile:
    """The profile with times and energies of slow stages scaled: a slow GPU draws its power for longer."""
    return profile.scaled({(stage, kind): slowdowns[stage] for stage, kind in profile.table})


def _clocks(plan: Plan) -> list[list[int]]:
    return [plan.clocks_mhz(stage) for stage in range(len(plan.stages))]


def _run(
    graph: PipelineGraph, profile: Profile, blocking_power_w: Sequence[float], clocks_mhz: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Iteration time, and energy without that of waiting until its end, when instructions run at these clocks."""
    measured = {(stage, kind, m.frequency_mhz): m for stage, kind, m in profile.rows()}
    duration_s = np.array(graph.constant_s, dtype=np.float64)
    energy_j = 0.0
    for stage, nodes in enumerate(graph.stage_nodes):
        instructions = [node for node in nodes.tolist() if graph.instructions[node] is not None]
        if len(instructions) != len(clocks_mhz[stage]):
            raise PlanError(
                f"clocks: got {len(clocks_mhz[stage])} in stage {stage}; allowed: one for each of its "
                f"{len(instructions)} instructions"
            )
        for node, clock in zip(instructions, clocks_mhz[stage], strict=True):
            instruction = graph.instructions[node]
            assert instruction is not None  # filtered above
            try:
                at_clock = measured[stage, instruction.kind, clock]
            except KeyError:
                raise PlanError(f"clocks: {clock} MHz in stage {stage} is not in the profile") from None
            duration_s[node] = at_clock.time_s
            energy_j += at_clock.energy_j - blocking_power_w[stage] * at_clock.time_s
    return graph.iteration_time_s(duration_s), energy_j
