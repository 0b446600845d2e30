"""Where a report's figures come from, and why they differ from each other. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from perseus_plugin.errors import figure
from perseus_plugin.reporting.record.iterations import PLAN
from perseus_plugin.reporting.record.records import RankRecord, Series
from perseus_plugin.reporting.record.summary import Summary
from perseus_plugin.reporting.report.folder import JobFolder
from perseus_plugin.reporting.report.lanes import Lanes
from perseus_plugin.reporting.report.worth import PerIteration

_NOTICED = 0.002  # share by which two times differ that a reader would ask about


def explained(folder: JobFolder, per: PerIteration | None, run: Series | None, lanes: Sequence[Lanes]) -> list[str]:
    """What the headline is of, and why it differs from the timeline.

    Args:
        folder: of the job.
        per: the headline's figures.
        run: iterations over training.
        lanes: the timeline's rows; the iteration that ran, if any, is the last one.
    """
    summary = folder.summary
    said = []
    if summary is not None and per is not None:
        said.append(_why_predicted(folder, summary) if per.predicted else _as_run(summary))
    if summary is not None and summary.ranks_reporting < summary.ranks:
        said.append(f"{summary.ranks_reporting} of {summary.ranks} ranks had reported when the summary was written.")
    if run is not None:
        said += _energy_in_part(run)
    if per is not None and not per.predicted:
        said += _timeline(folder, per, lanes)
    return said


def _as_run(summary: Summary) -> str:
    counts, references = summary.iterations, summary.references
    of = f" of {counts.under_plans:,}" if counts.under_plans > counts.plan else ""
    if references.slowdown_percent is None:
        full = f"the mean of {counts.full_clock:,} iterations of the sweep, before there was a plan"
        if references.iterations:
            full += f"; {references.iterations:,} iterations at full clocks since then are too few to compare with"
    else:
        full = f"on the same work, by {references.iterations:,} iterations at full clocks in between"
    left = " (without the first after a switch or an evaluation, and those of earlier plans)" if of else ""
    return f"As run: the mean of {counts.plan:,}{of} iterations under plans{left}. Full clocks: {full}."


def _why_predicted(folder: JobFolder, summary: Summary) -> str:
    if summary.dry_run:
        return "Predicted: what the plan would do. In a dry run no iteration is run under it."
    if summary.iteration_time_s.measured is None:
        return f"Predicted: no iteration under the plan has been measured{folder.yet}."
    if summary.energy_j.measured is None:
        return "Predicted: the energy of iterations under the plan is not known."
    return (
        "Predicted: the job has changed since it was profiled, and too few iterations ran at full clocks since then to "
        "compare the plan with."
    )


def _energy_in_part(run: Series) -> list[str]:
    pairs = list(zip(run.stretches, run.energy_j.tolist(), strict=True))
    total = sum(stretch.count for stretch, _ in pairs)
    known = sum(stretch.count for stretch, energy_j in pairs if not math.isnan(energy_j))
    if known in (0, total):
        return []
    return [f"The energy of {known:,} of {total:,} iterations is known; in sums the others count with their mean."]


def _timeline(folder: JobFolder, per: PerIteration, lanes: Sequence[Lanes]) -> list[str]:
    ran, plan = folder.pipeline((PLAN,)), folder.plan
    if not ran or not lanes:
        return []
    number, whole_s = ran[0].number, max(sample.time_s for sample in ran)
    said = [
        f"The timeline goes from the first instruction to the last: {lanes[-1].end_s:.4f} s of iteration {number}, "
        f"which took {whole_s:.4f} s in all."
    ]
    summary = folder.summary
    if plan is None or summary is None or len(summary.planned_schedules) > 1:
        return said
    slower, full_slower = whole_s / plan.iteration_time_s - 1, per.full_s / plan.baseline_time_s - 1
    profile = (
        f"Against the profile, by which the other rows are drawn, iteration {number} took "
        f"{figure(100 * slower, '+.1f')} % time"
    )
    if summary.references.slowdown_percent is None:
        if abs(slower) > _NOTICED:
            said.append(f"{profile}: what has changed since the sweep, other than by the plan, is in that too.")
    elif max(abs(slower), abs(full_slower)) > _NOTICED:
        full = f"full clocks as run {figure(100 * full_slower, '+.1f')} %"
        said.append(f"{profile} and {full}: what both share is not due to the plan.")
    return said


def origin(folder: JobFolder) -> list[str]:
    """What was measured, what was emulated, what is a model's."""
    said = []
    if folder.emulated:
        said.append(
            "Emulated: GPU times, clocks, powers and energies. The training ran for real on the CPU; each instruction "
            "was stretched to the time that the emulated GPU would take at its clock, by a model fitted to published "
            "measurements. These figures show that the way works, not what real GPUs will save."
        )
    elif folder.emulated is False and _energies(folder.records):
        said.append(
            "Measured: iteration and instruction times on the GPUs, energies by the GPUs' own counters, clocks as they "
            "were read back."
        )
    elif folder.emulated is False:
        said.append("Measured: iteration times. No energy was measured, as no GPU could be controlled.")
    if folder.profile is not None:
        said.append(
            f"Estimated from {'the emulated' if folder.emulated else 'those'} counters: energy per instruction in the "
            "profile, with its standard error."
        )
    if folder.profile_scale != 1:
        said.append(
            f"Instructions were timed again after the profile was written: times and energies of profile.csv are shown "
            f"times {folder.profile_scale:.3g} in the timeline, as the plan takes them to be; the profile's curves are "
            "as measured."
        )
    if folder.plan is not None:
        said.append(
            "Computed by the planner: the predicted timeline, the frontier and its bound. They are of one GPU per "
            "stage, and know of what surrounds the schedule (the loss, other programs) only how long it takes."
        )
    late = None if folder.summary is None else folder.summary.catching_up
    if late is not None and late.raised_percent:
        said.append(
            f"{late.raised_percent:.1f} % of instructions began later than the plan allows and ran faster to catch up, "
            f"in up to {late.late_iterations} of {late.iterations} iterations of a rank, for about "
            f"{late.extra_energy_per_iteration_j or 0.0:.1f} J per iteration of the job (by the profile)."
        )
    waiting = None if folder.summary is None else folder.summary.waiting
    if waiting is not None and waiting.lowered_waits:
        said.append(
            f"{waiting.lowered_waits} waits were spent at a clock of their own, out of {waiting.planned_waits} planned "
            f"(the first iterations under a plan only watch how long waits are); {waiting.woken_early} ended before "
            "the clock was back, which costs at most the time of a clock change each."
        )
    limit = None if folder.summary is None else folder.summary.at_power_limit
    if limit is not None and limit.full_clock_percent:
        under = "" if limit.plan_percent is None else f", under the plan for {limit.plan_percent:.0f} %"
        said.append(
            "GPUs were held by their power limit, below the clock asked for, for "
            f"{limit.full_clock_percent:.0f} % of the time at full clocks{under}: that is what full clocks are on them."
        )
    beside = None if folder.summary is None else folder.summary.beside
    if beside is not None and beside.time_s is not None:
        said.append(
            f"{beside.time_s:.3g} s of an iteration ({beside.percent or 0.0:.1f} %) are neither computing nor loading: "
            f"by the best fit {1e3 * (beside.transfer_s or 0.0):.3g} ms per transfer between stages, and "
            f"{beside.once_s or 0.0:.3g} s once. The plan accounts for both."
        )
    if any(record.placement.replica for record in folder.records.values()):
        said.append("Timelines and clocks show the first data-parallel replica; `perseus trace` has all ranks.")
    hosts = {record.header.host for record in folder.records.values()}
    if len(hosts) > 1:
        said.append(f"Ranks ran on {len(hosts)} machines; rows line up as well as these agree on the time.")
    return said


def _energies(records: Mapping[int, RankRecord]) -> bool:
    return any(stretch.read for record in records.values() for stretch in record.stretches)
