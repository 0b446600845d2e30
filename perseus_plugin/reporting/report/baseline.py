"""Full clocks by the profile: what an iteration of each schedule takes, and whether the profile is the plan's. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import StageStream
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.reporting.report.worth import FullClocks

_SAME = 0.02  # full-clock iterations within this share of each other are taken for the same
_SAME_ENERGY = 0.05  # the same for energies, of a profile that had to be scaled
_LARGEST_SCALE = 2.0


def covers(profile: Profile, graph: PipelineGraph) -> bool:
    """Whether the profile has every instruction of the graph."""
    return {(i.stage, i.kind) for i in graph.instructions if i is not None} <= set(profile.table)


def full_clocks(graph: PipelineGraph, profile: Profile, blocking_power_w: float) -> FullClocks:
    """An iteration of one pipeline, all at the profile's highest clock, waits too, as the planner reckons it.

    Args:
        graph: of the schedule.
        profile: `covers` it.
        blocking_power_w: of a GPU that waits, where the profile does not say it by clock.
    """
    top = [None if i is None else profile.table[i.stage, i.kind][0] for i in graph.instructions]
    durations_s = np.array([0.0 if m is None else m.time_s for m in top])
    time_s = graph.iteration_time_s(durations_s)
    energy_j = math.fsum(m.energy_j for m in top if m is not None)
    waiting_j = 0.0
    for stage, nodes in enumerate(graph.stage_nodes):
        clocks = [m.frequency_mhz for node in nodes.tolist() if (m := top[node]) is not None]
        power_w = profile.waiting_power(stage, blocking_power_w).at_w(max(clocks, default=0))
        waiting_j += power_w * (time_s - math.fsum(durations_s[nodes].tolist()))
    return FullClocks(energy_j + waiting_j, time_s)


def scale_to(plan: Plan, graph: PipelineGraph, survey: Survey) -> float | None:
    """What the profile has to be multiplied by to be the one that the plan was made on.

    1 as a rule; something else where instructions were timed again since, which scales the job's profile but not the
    file. None: it is of something else.
    """
    factor, power_w = 1.0, survey.blocking_power_w
    made = full_clocks(graph, survey.profile, power_w)
    if abs(made.time_s / plan.baseline_time_s - 1) <= _SAME:
        return 1.0
    for _ in range(50):  # constant-time work is not scaled, so that one division is not enough
        factor *= plan.baseline_time_s / made.time_s
        if not 1 / _LARGEST_SCALE <= factor <= _LARGEST_SCALE:
            return None
        made = full_clocks(graph, survey.profile.scaled(factor), power_w)
        if abs(made.time_s / plan.baseline_time_s - 1) < 1e-6:
            break
    # A scale can always be found; only with the right profile it explains the energy too.
    return factor if abs(made.energy_j / plan.baseline_energy_j - 1) <= _SAME_ENERGY else None


def by_schedule(
    measured: FullClocks,
    plan: Plan,
    schedules: Mapping[str, Sequence[StageStream]],
    survey: Survey | None,
    scale: float = 1.0,
    overheads: Overheads | None = None,
) -> dict[str, FullClocks]:
    """Full clocks of every schedule of which that can be told.

    Args:
        measured: of the plan's schedule.
        plan: the newest one.
        schedules: the streams of those that ran, by key.
        survey: with the profile that the plan was made on but for `scale`; None: it is not there.
        scale: see `scale_to`.
        overheads: what iterations take beside the work that is known, as the plan has it.

    Returns:
        By key; `measured` times what the model says of the schedule against the plan's.
    """
    known = {plan.schedule: measured}
    if survey is None:
        return known
    profile, beside = survey.profile.scaled(scale), overheads or Overheads()
    for key, streams in schedules.items():
        graph = build_graph(list(streams), survey.constants_for(streams), beside.transfer_s, beside.end_s)
        if key not in known and len(streams) == len(plan.stages) and covers(profile, graph):
            made = full_clocks(graph, profile, survey.blocking_power_w)
            known[key] = FullClocks(
                measured.energy_j * made.energy_j / plan.baseline_energy_j,
                measured.time_s * made.time_s / plan.baseline_time_s,
            )
    return known
