"""The summary of a job: what full clocks take, what the plan promises, what it took. Pure figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perseus_plugin.exchange.messages import RankStats, Totals
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.plan import Plan
from perseus_plugin.reporting.live.account import (
    EVERY,
    FULL_CLOCK,
    PLAN,
    PROFILING,
    RECHECK,
    REFERENCES,
    STRAGGLER,
    UNDER_PLANS,
)
from perseus_plugin.reporting.live.bill import Bill
from perseus_plugin.reporting.live.comparison import Compared
from perseus_plugin.reporting.record.summary import (
    BatchesSection,
    BesideSection,
    CatchingUpSection,
    Changed,
    Columns,
    ConfidenceSection,
    CountsSection,
    LimitSection,
    MeasuredSection,
    OverheadSection,
    PlanSection,
    PredictedSection,
    ProfilingSection,
    ReferenceSection,
    StragglerSection,
    Summary,
    WaitingSection,
)

_SAME_JOB = 0.1
"""Share by which iterations at full clocks differ while the job is what it was."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What plans make of iterations at full clocks.

    Attributes:
        time_ratio, energy_ratio: under the plans over at full clocks.
        saving: between what the share of energy saved lies, with 95 % confidence; None: not known.
    """

    time_ratio: float
    energy_ratio: float
    saving: tuple[float, float] | None = None


def iteration_time_s(stats: Sequence[RankStats], sort: str) -> float | None:
    """Mean iteration time of this sort of iteration, as rank 0 saw it."""
    for of_rank in stats:
        if of_rank.placement.leads:
            totals = of_rank.totals.get(sort, Totals())
            return totals.time_s / totals.iterations if totals.iterations else None
    return None


def energy_per_iteration_j(stats: Sequence[RankStats], sort: str) -> float | None:
    """Mean energy of an iteration of this sort, all GPUs together; None when a rank has no figure."""
    energies_j = [of_rank.totals.get(sort, Totals()).mean_energy_j for of_rank in stats]
    known_j = [energy_j for energy_j in energies_j if energy_j is not None]
    return math.fsum(known_j) if known_j and len(known_j) == len(energies_j) else None


def build_summary(
    stats: Sequence[RankStats],
    plan: Plan | None,
    *,
    world_size: int,
    stages: int,
    gpu: str,
    emulated: bool,
    backend: str,
    state: Literal["running", "finished", "crashed"],
    planning_time_s: float,
    dropped_plans: int,
    stragglers: dict[str, Any] | None = None,
    full_clock_scale: tuple[float, float] | None = (1.0, 1.0),
    predicted: Predicted | None = None,
    compared: Compared | None = None,
    planned_schedules: Mapping[str, int] | None = None,
    overheads: Overheads | None = None,
    targets: Mapping[str, int] | None = None,
    bill: Bill | None = None,
    batches: BatchesSection | None = None,
    dry_run: bool = False,
) -> Summary:
    """The content of summary.json.

    The column predicted is the measured full-clock figure times what the plans change it by in the model (`predicted`,
    of the schedules as often as they ran; None: of `plan`), so that all three columns speak of the same thing: the
    model's own figures, which are of one GPU per stage, are in plan.json. Where other schedules have
    run under plans than were measured at full clocks, the full-clock figures are scaled by the model
    (`full_clock_scale`). Where plans were compared with references amid them (`compared`), the full-clock figures are
    those under the plan over the ratio that was found: full clocks on the same work. `planned_schedules` says how often
    each schedule has run under the plans. Where there are too few references for that, and they take another time than
    full clocks did in the sweep, the job has changed: then they are the full-clock figures, and what the plan makes of
    them is not known. Figures that do not exist (yet) are null.
    """
    compared = compared or Compared()
    swept_time_s, swept_energy_j = iteration_time_s(stats, FULL_CLOCK), energy_per_iteration_j(stats, FULL_CLOCK)
    time_scale, energy_scale = (None, None) if full_clock_scale is None else full_clock_scale
    # After a recheck that is the reference, as the job may have become another one.
    reference = RECHECK if iteration_time_s(stats, RECHECK) is not None else FULL_CLOCK
    full_time_s = _scaled(iteration_time_s(stats, reference), time_scale)
    full_energy_j = _scaled(energy_per_iteration_j(stats, reference), energy_scale)
    time_s, energy_j = iteration_time_s(stats, PLAN), energy_per_iteration_j(stats, PLAN)
    # Too few references for a comparison, but enough to see that the job is not what it was when it was profiled.
    references_s = iteration_time_s(stats, REFERENCES)
    changed = compared.time is None and _differs(references_s, full_time_s)
    if changed:
        full_time_s, full_energy_j = references_s, energy_per_iteration_j(stats, REFERENCES)
    if time_s is not None and compared.time is not None:
        full_time_s = time_s * math.exp(-compared.time.log)
    if energy_j is not None and compared.energy is not None:
        full_energy_j = energy_j * math.exp(-compared.energy.log)
    if predicted is None and plan is not None:
        predicted = Predicted(plan.iteration_time_s / plan.baseline_time_s, plan.energy_j / plan.baseline_energy_j)
    predicted_time_s = _scaled(full_time_s, None if predicted is None else predicted.time_ratio)
    predicted_energy_j = _scaled(full_energy_j, None if predicted is None else predicted.energy_ratio)
    between = None if predicted is None else predicted.saving
    return Summary(
        state=state,
        emulated=emulated,
        gpu=gpu,
        backend=backend,
        dry_run=dry_run,
        ranks=world_size,
        ranks_reporting=len(stats),
        stages=stages,
        iteration_time_s=Columns(full_clock=full_time_s, predicted=predicted_time_s, measured=time_s),
        energy_j=Columns(full_clock=full_energy_j, predicted=predicted_energy_j, measured=energy_j),
        saving_percent=Changed(
            predicted=_saving(full_energy_j, predicted_energy_j),
            measured=None if changed else _saving(full_energy_j, energy_j),
        ),
        slowdown_percent=Changed(
            predicted=_excess(full_time_s, predicted_time_s),
            measured=None if changed else _excess(full_time_s, time_s),
        ),
        predicted_between=PredictedSection(saving_percent=None if between is None else _percent(between)),
        references=_references(stats, compared, full_energy_j, energy_j),
        planned_schedules=dict(planned_schedules or {}),
        targets=dict(targets or {}),
        plan=None if plan is None else _plan_figures(plan, planning_time_s, dropped_plans),
        stragglers=None if stragglers is None else _straggler_figures(stats, stragglers),
        profiling=_profiling_cost(stats, swept_time_s, swept_energy_j),
        iterations=CountsSection(
            full_clock=_iterations(stats, FULL_CLOCK),
            profiling=_iterations(stats, PROFILING),
            plan=_iterations(stats, PLAN),
            under_plans=_iterations(stats, UNDER_PLANS),
            straggler=_iterations(stats, STRAGGLER),
            all=_iterations(stats, EVERY),
        ),
        catching_up=_catching_up(stats),
        waiting=WaitingSection(
            iterations=max((s.waited.iterations for s in stats), default=0),
            planned_waits=sum(s.waited.planned for s in stats),
            lowered_waits=sum(s.waited.lowered for s in stats),
            woken_early=sum(s.waited.woken_early for s in stats),
        ),
        at_power_limit=LimitSection(full_clock_percent=_held(stats, FULL_CLOCK), plan_percent=_held(stats, PLAN)),
        beside=_beside(overheads),
        batches=batches,
        worth=None if bill is None else bill.section(full_energy_j, _full_between_j(compared, energy_j)),
        overhead=_overhead(stats, time_s or full_time_s),
    )


def _full_between_j(compared: Compared, energy_j: float | None) -> tuple[float, float] | None:
    """Between what an iteration's energy at full clocks lies, by references: that under the plan over the ratio."""
    if compared.energy is None or energy_j is None:
        return None
    low, high = compared.energy.interval
    return energy_j / (1 + high), energy_j / (1 + low)


def _held(stats: Sequence[RankStats], sort: str) -> float | None:
    """For how much of the time of these iterations the power limit held GPUs, in percent; None where none tells."""
    told_s = math.fsum(s.totals[sort].told_s for s in stats if sort in s.totals)
    held_s = math.fsum(s.totals[sort].held_s for s in stats if sort in s.totals)
    return 100 * held_s / told_s if told_s > 0 else None


def _differs(now_s: float | None, before_s: float | None) -> bool:
    return now_s is not None and before_s is not None and abs(now_s - before_s) > _SAME_JOB * before_s


def _references(
    stats: Sequence[RankStats], compared: Compared, full_energy_j: float | None, energy_j: float | None
) -> ReferenceSection:
    """What references amid iterations under the plan have shown, with 95 % intervals, and what they cost."""
    count = _iterations(stats, REFERENCES)
    saved_j = None if full_energy_j is None or energy_j is None else full_energy_j - energy_j
    saving, slowdown = compared.energy, compared.time
    return ReferenceSection(
        iterations=count,
        blocks=0 if slowdown is None else slowdown.blocks,
        saving_percent=None if saving is None else (-100 * saving.interval[1], -100 * saving.interval[0]),
        slowdown_percent=None if slowdown is None else _percent(slowdown.interval),
        energy_not_saved_j=None if saved_j is None else count * saved_j,
    )


def _plan_figures(plan: Plan, planning_time_s: float, dropped_plans: int) -> PlanSection:
    known = plan.confidence
    return PlanSection(
        schedule=plan.schedule,
        saving_percent=100 * plan.saving,
        gap_percent=100 * plan.gap,
        confidence=None
        if known is None
        else ConfidenceSection(
            level_percent=100 * known.level,
            saving_percent=_percent(known.saving),
            gap_at_most_percent=100 * known.gap_at_most,
        ),
        planning_time_s=planning_time_s,
        clock_changes_per_iteration=[plan.clock_changes(stage) for stage in range(len(plan.stages))],
        dropped_plans=dropped_plans,
    )


def _straggler_figures(stats: Sequence[RankStats], figures: Mapping[str, Any]) -> StragglerSection:
    """What happened, and what was measured per iteration meanwhile; savings are estimated from the profile."""
    measured = MeasuredSection(
        iteration_time_s=iteration_time_s(stats, STRAGGLER), energy_j=energy_per_iteration_j(stats, STRAGGLER)
    )
    return StragglerSection(**figures, measured=measured)


def _profiling_cost(
    stats: Sequence[RankStats], full_time_s: float | None, full_energy_j: float | None
) -> ProfilingSection:
    """What the sweep cost against running the same iterations at full clocks."""
    count = _iterations(stats, PROFILING)
    time_s, energy_j = iteration_time_s(stats, PROFILING), energy_per_iteration_j(stats, PROFILING)
    return ProfilingSection(
        extra_time_s=None if time_s is None or full_time_s is None else count * (time_s - full_time_s),
        extra_energy_j=None if energy_j is None or full_energy_j is None else count * (energy_j - full_energy_j),
    )


def _catching_up(stats: Sequence[RankStats]) -> CatchingUpSection:
    """How often ranks were late and ran faster than planned, and what that took; all ranks together."""
    instructions = sum(s.caught_up.instructions for s in stats)
    iterations = max((s.caught_up.iterations for s in stats), default=0)
    extra_j = math.fsum(s.caught_up.extra_energy_j for s in stats)
    raised = sum(s.caught_up.raised for s in stats)
    return CatchingUpSection(
        late_iterations=max((s.caught_up.late_iterations for s in stats), default=0),
        iterations=iterations,
        raised_instructions=raised,
        raised_percent=100 * raised / instructions if instructions else None,
        extra_energy_per_iteration_j=extra_j / iterations if iterations else None,
    )


def _beside(overheads: Overheads | None) -> BesideSection:
    if overheads is None or overheads.share is None:
        return BesideSection()
    return BesideSection(
        time_s=overheads.beside_s,
        percent=100 * overheads.share,
        transfer_s=overheads.transfer_s,
        once_s=overheads.end_s,
    )


def _overhead(stats: Sequence[RankStats], time_s: float | None) -> OverheadSection:
    iterations = sum(s.hooked_iterations for s in stats)
    hook_s = sum(s.overhead_s for s in stats) / iterations if iterations else None
    latencies = [s.switch_latency_s for s in stats if s.switch_latency_s is not None]
    return OverheadSection(
        hook_time_per_iteration_s=hook_s,
        hook_time_percent=None if hook_s is None or not time_s else 100 * hook_s / time_s,
        # Of the slowest GPU; None where no GPU's was measured.
        switch_latency_p50_s=max((p50_s for p50_s, _ in latencies), default=None),
        switch_latency_p95_s=max((p95_s for _, p95_s in latencies), default=None),
        clock_requests=sum(s.requests for s in stats),
        late_switches=sum(s.late for s in stats),
        emulated_instructions=sum(s.instructions for s in stats),
        emulated_instructions_overrun=sum(s.overran for s in stats),
    )


def _percent(shares: tuple[float, float]) -> tuple[float, float]:
    return 100 * shares[0], 100 * shares[1]


def _iterations(stats: Sequence[RankStats], sort: str) -> int:
    return max((s.totals[sort].iterations for s in stats if sort in s.totals), default=0)


def _scaled(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _saving(reference: float | None, value: float | None) -> float | None:
    return None if reference is None or reference <= 0 or value is None else 100 * (1 - value / reference)


def _excess(reference: float | None, value: float | None) -> float | None:
    return None if reference is None or reference <= 0 or value is None else 100 * (value / reference - 1)
