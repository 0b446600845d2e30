"""What a report says, gathered from an output folder; `page` and `console` only show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perseus_plugin.errors import PerseusError
from perseus_plugin.reporting.folder import JobFolder
from perseus_plugin.reporting.iterations import FULL, PLAN, PROFILING, STRAGGLER, WARM_UP, Stretch
from perseus_plugin.reporting.lanes import Lanes, full_clock_lanes, planned_lanes, recorded_lanes
from perseus_plugin.reporting.records import RankRecord, Series
from perseus_plugin.reporting.samples import Sample
from perseus_plugin.reporting.worth import HOURS_PER_YEAR, PerIteration, Projection, Rates, SoFar, project, so_far

if TYPE_CHECKING:
    from perseus_plugin.planning.curve import FrontierCurve

_TOLERANCE = 0.005
_MAX_MARKS = 40


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened, at an iteration."""

    iteration: int
    text: str


@dataclass(frozen=True)
class Options:
    """What the reader wants to know.

    Attributes:
        rates: of a kWh.
        hours, gpus: to project savings to; gpus None: those of the job.
        tokens_per_sample: None: no figure per token.
        frontier: whether to sample the frontier.
    """

    rates: Rates = field(default_factory=Rates)
    hours: float = HOURS_PER_YEAR
    gpus: int | None = None
    tokens_per_sample: int | None = None
    frontier: bool = True


@dataclass(frozen=True)
class Findings:
    """See the module's docstring.

    Attributes:
        folder: what it is all from; `folder.missing` says what is not known.
        options: see there.
        lanes: iterations to draw, above each other.
        frontier: of the schedule and profile.
        series: iterations over training.
        marks: what happened when.
        clocks: the newest planned iteration kept whole, per stage.
        per: an iteration at full clocks and under the plan.
        so_far: the run.
        projections: to a day and to the hours asked for.
        waiting_j: energy of waiting GPUs per iteration, at full clocks and under the plan, one GPU per stage.
        samples: per iteration of the job.
        origin: where the figures come from, sentence by sentence.
    """

    folder: JobFolder
    options: Options
    lanes: list[Lanes]
    frontier: FrontierCurve | None
    series: Series | None
    marks: list[Mark]
    clocks: list[Sample]
    per: PerIteration | None
    so_far: SoFar | None
    projections: list[Projection]
    waiting_j: tuple[float, float] | None
    samples: int | None
    origin: list[str]


def find(folder: JobFolder, options: Options | None = None) -> Findings:
    """Gather everything; what cannot be told is added to `folder.missing`.

    Raises:
        ConfigError: an option is wrong.
    """
    options = options or Options()
    run = folder.series()
    per = per_iteration(folder)
    lanes = _lanes(folder)
    projections = []
    if per is not None and folder.world_size:
        gpus = folder.world_size if options.gpus is None else options.gpus
        projections = [
            project(per, folder.world_size, hours, gpus, options.rates)
            for hours in dict.fromkeys((24.0, options.hours))
        ]
    return Findings(
        folder=folder,
        options=options,
        lanes=lanes,
        frontier=_frontier(folder) if options.frontier else None,
        series=run,
        marks=[] if run is None else marks(run.stretches, folder),
        clocks=folder.pipeline((PLAN, STRAGGLER)),
        per=per,
        so_far=None if run is None else so_far(run, per),
        projections=projections,
        waiting_j=_waiting(folder, lanes),
        samples=folder.samples_per_iteration(),
        origin=origin(folder),
    )


def per_iteration(folder: JobFolder) -> PerIteration | None:
    """Full clocks against the plan, as measured, or else as predicted."""
    if folder.summary is None:
        return None
    energy, time = folder.summary.energy_j, folder.summary.iteration_time_s
    if energy.full_clock is None or time.full_clock is None:
        return None
    if energy.measured is not None and time.measured is not None:
        return PerIteration(energy.full_clock, time.full_clock, energy.measured, time.measured, predicted=False)
    if energy.predicted is not None and time.predicted is not None:
        return PerIteration(energy.full_clock, time.full_clock, energy.predicted, time.predicted, predicted=True)
    return None


def _lanes(folder: JobFolder) -> list[Lanes]:
    plan, profile, graph = folder.plan, folder.profile, folder.graph()
    made = []
    if profile is not None and graph is not None:
        made.append(full_clock_lanes("Full clocks, by the profile", profile, graph))
    elif whole := folder.pipeline((FULL,)):
        made.append(recorded_lanes(f"Full clocks, as iteration {whole[0].number} ran", whole, profile, graph))
    if plan is not None:
        made.append(planned_lanes("Plan, as predicted", plan, profile, graph))
    if ran := folder.pipeline((PLAN,)):
        made.append(recorded_lanes(f"Plan, as iteration {ran[0].number} ran", ran, profile, graph))
    elif plan is not None and folder.records:
        folder.missing.append("no iteration under the plan was kept whole (yet): what ran is not drawn")
    return made


def _frontier(folder: JobFolder) -> FrontierCurve | None:
    """As the job has left it; computed here where it had no time to."""
    known, plan = folder.frontier, folder.plan
    # The one that is kept may be of another schedule's plan.
    if known is not None and plan is not None and math.isclose(known.baseline_energy_j, plan.baseline_energy_j):
        return known
    graph, survey, plan = folder.graph(), folder.survey, folder.plan
    if graph is None or survey is None or plan is None:
        return None
    # Loads OR-Tools, which the rest of a report does without.
    from perseus_plugin.planning.frontier import make_frontier
    from perseus_plugin.planning.planner import Planner

    try:
        planner = Planner(
            graph,
            survey.profile,
            blocking_power_w=survey.blocking_power_w,
            full_clock_only=survey.unresolved,
            schedule=plan.schedule,
        )
        return make_frontier(planner, tolerance=_TOLERANCE).curve()
    except PerseusError as error:
        folder.missing.append(f"there is no frontier: {error}")
        return None


def _waiting(folder: JobFolder, lanes: Sequence[Lanes]) -> tuple[float, float] | None:
    if folder.survey is None or len(lanes) < 2:
        return None
    power_w = folder.survey.blocking_power_w
    return lanes[0].waiting_s * power_w, lanes[1].waiting_s * power_w


# What happened.


def marks(stretches: Sequence[Stretch], folder: JobFolder) -> list[Mark]:
    """What happened when: changes of what iterations ran as, straggler events, clocks that could not be held."""
    found: list[Mark] = []
    last: Stretch | None = None
    for stretch in stretches:
        text = _change(last, stretch)
        if text:
            found.append(Mark(stretch.first, text))
        last = stretch
    for event in folder.events:
        if event["event"] in ("report", "detection"):
            who = f"rank {event['rank']}" if "rank" in event else "a rank"
            said = "is reported slow" if event["event"] == "report" else "is seen to be slow"
            found.append(Mark(_at(stretches, event["time"]), f"{who} {said}"))
    for rank, record in folder.records.items():
        if record.deviations:
            first = record.deviations[0]
            count = len(record.deviations)
            text = f"rank {rank} capped: {first.read_mhz} MHz where {first.asked_mhz} were asked for ({count} times)"
            found.append(Mark(_at(stretches, first.time_s), text))
    return sorted(found, key=lambda mark: mark.iteration)[:_MAX_MARKS]


def _change(last: Stretch | None, now: Stretch) -> str:
    before = None if last is None else (last.sort.state, last.sort.plan)
    if before == (now.sort.state, now.sort.plan):
        return ""
    match now.sort.state:
        case "profiling":
            return "profiling"
        case "plan":
            return f"plan {now.sort.plan}"
        case "straggler":
            return f"plan {now.sort.plan} for a straggler's pace"
        case "full" if now.sort.reason and last is not None and last.sort.state != WARM_UP:
            reason = "" if now.sort.reason == "planning" and last.sort.state == PROFILING else f": {now.sort.reason}"
            return f"full clocks{reason}" if reason else "profiled"
    return ""


def _at(stretches: Sequence[Stretch], time_s: float) -> int:
    """The iteration that ran at a Unix time."""
    found = stretches[0].first
    for stretch in stretches:
        if stretch.begin_s <= time_s:
            into = (time_s - stretch.begin_s) / stretch.time_s
            found = stretch.first + min(stretch.count - 1, max(0, math.floor(into)))
    return found


# Where figures come from.


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
    if folder.plan is not None:
        said.append(
            "Computed by the planner: the predicted timeline, the frontier and its bound. They are of one GPU per "
            "stage, and know nothing of what surrounds the schedule (data loading, other programs)."
        )
    if any(record.placement.replica for record in folder.records.values()):
        said.append("Timelines and clocks show the first data-parallel replica; `perseus trace` has all ranks.")
    hosts = {record.header.host for record in folder.records.values()}
    if len(hosts) > 1:
        said.append(f"Ranks ran on {len(hosts)} machines; rows line up as well as these agree on the time.")
    return said


def _energies(records: Mapping[int, RankRecord]) -> bool:
    return any(stretch.read for record in records.values() for stretch in record.stretches)
