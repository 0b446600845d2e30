"""What a report says, gathered from an output folder; `page` and `console` only show it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perseus_plugin.errors import PerseusError
from perseus_plugin.iteration.timetable import REFERENCE
from perseus_plugin.reporting.record.iterations import FULL, PLAN, PROFILING, STRAGGLER, WARM_UP, Stretch
from perseus_plugin.reporting.record.recorder import MAX_DEVIATIONS
from perseus_plugin.reporting.record.records import Series
from perseus_plugin.reporting.record.samples import Sample
from perseus_plugin.reporting.report.baseline import by_schedule
from perseus_plugin.reporting.report.budgets import BudgetAsRun, as_run
from perseus_plugin.reporting.report.folder import ONE_GRAPH_SEEN, JobFolder
from perseus_plugin.reporting.report.lanes import Lanes, full_clock_lanes, planned_lanes, recorded_lanes
from perseus_plugin.reporting.report.origin import explained, origin
from perseus_plugin.reporting.report.reigns import Reign, reigns
from perseus_plugin.reporting.report.worth import (
    HOURS_PER_YEAR,
    FullClocks,
    PerIteration,
    Projection,
    Rates,
    SoFar,
    project,
    so_far,
)

if TYPE_CHECKING:
    from perseus_plugin.planning.curve import CurveSample, FrontierCurve

_TOLERANCE = 0.005
_MAX_MARKS = 40
_sampled: dict[bytes, FrontierCurve] = {}  # the newest, by what it is made from: a page that follows a job asks again


@dataclass(frozen=True, slots=True)
class Happening:
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
        least_cost: the plan of it that costs least at the reader's prices; None: they tell nothing of time.
        series: iterations over training.
        marks: what happened when.
        reigns: what was aimed at when.
        budgets: those that were in force, against what was drawn.
        clocks: the newest planned iteration kept whole, per stage.
        per: an iteration at full clocks and under the plan.
        so_far: the run.
        projections: to a day and to the hours asked for.
        waiting_j: energy of waiting GPUs per iteration, at full clocks and under the plan, one GPU per stage.
        lowered_j: what the plan's waits save by clocks of their own, per iteration, one GPU per stage; None: nothing.
        samples: per iteration of the job.
        explained: what the headline is of, and why it differs from the timeline, sentence by sentence.
        origin: where the figures come from, sentence by sentence.
    """

    folder: JobFolder
    options: Options
    lanes: list[Lanes]
    frontier: FrontierCurve | None
    least_cost: CurveSample | None
    series: Series | None
    marks: list[Happening]
    reigns: list[Reign]
    budgets: list[BudgetAsRun]
    clocks: list[Sample]
    per: PerIteration | None
    so_far: SoFar | None
    projections: list[Projection]
    waiting_j: tuple[float, float] | None
    lowered_j: float | None
    samples: int | None
    explained: list[str]
    origin: list[str]


def find(folder: JobFolder, options: Options | None = None) -> Findings:
    """Gather everything; what cannot be told is added to `folder.missing`.

    Raises:
        ConfigError: an option is wrong.
    """
    options = options or Options()
    run = folder.series()
    per = per_iteration(folder)
    full = full_clock_figures(folder, per, run)
    lanes = _lanes(folder)
    ruled = reigns(folder.events, folder.world_size)
    projections = []
    if per is not None and folder.world_size:
        gpus = folder.world_size if options.gpus is None else options.gpus
        projections = [
            project(per, folder.world_size, hours, gpus, options.rates)
            for hours in dict.fromkeys((24.0, options.hours))
        ]
    curve, prices = _frontier(folder) if options.frontier else None, options.rates.prices
    stages = 0 if folder.plan is None else len(folder.plan.stages)
    return Findings(
        folder=folder,
        options=options,
        lanes=lanes,
        frontier=curve,
        least_cost=None if curve is None or prices is None or not stages else curve.least_cost(prices, stages),
        series=run,
        marks=[] if run is None else marks(run.stretches, folder, ruled),
        reigns=ruled,
        budgets=as_run(ruled, folder.records, folder.world_size),
        clocks=folder.pipeline((PLAN, STRAGGLER)),
        per=per,
        so_far=None if run is None else so_far(run, full),
        projections=projections,
        waiting_j=_waiting(folder, lanes),
        lowered_j=_lowered(lanes),
        samples=folder.samples_per_iteration(),
        explained=explained(folder, per, run, lanes),
        origin=origin(folder),
    )


def per_iteration(folder: JobFolder) -> PerIteration | None:
    """Full clocks against the plan, as measured where that can be told, else as predicted."""
    if folder.summary is None:
        return None
    summary = folder.summary
    energy, time = summary.energy_j, summary.iteration_time_s
    if energy.full_clock is None or time.full_clock is None:
        return None
    # Where the job has changed, what was measured is not of the same work as full clocks: no share of them is known.
    known = summary.saving_percent.measured is not None
    if energy.measured is not None and time.measured is not None and known:
        between = summary.references.saving_percent
        return PerIteration(energy.full_clock, time.full_clock, energy.measured, time.measured, False, between)
    if energy.predicted is not None and time.predicted is not None:
        between = summary.predicted_between.saving_percent
        return PerIteration(energy.full_clock, time.full_clock, energy.predicted, time.predicted, True, between)
    return None


def full_clock_figures(folder: JobFolder, per: PerIteration | None, run: Series | None) -> dict[str, FullClocks]:
    """What an iteration at full clocks takes in each schedule, as far as known: measured, then by the model."""
    if per is None or folder.plan is None:
        return {}
    measured = FullClocks(per.full_j, per.full_s)
    of_summary = folder.summary.plan.schedule if folder.summary is not None and folder.summary.plan is not None else ""
    if of_summary in ("", folder.plan.schedule):
        full = by_schedule(
            measured, folder.plan, folder.schedules, folder.survey, folder.profile_scale, folder.overheads
        )
        full = _as_often(full, measured, {} if folder.summary is None else folder.summary.planned_schedules)
    else:  # the summary is a little older than the plan
        full = {of_summary: measured}
    if run is not None and not any(stretch.sort.schedule for stretch in run.stretches):
        full[""] = measured  # a record that does not tell schedules
    elif folder.summary is not None and len(folder.summary.planned_schedules) > 1:
        full[""] = measured  # stretches of several schedules
    return full


def _as_often(full: dict[str, FullClocks], measured: FullClocks, planned: Mapping[str, int]) -> dict[str, FullClocks]:
    """Figures per schedule such that their mean over iterations under the plan is what was measured of all of them."""
    counts = {key: count for key, count in planned.items() if key in full}
    total = sum(counts.values())
    if not total:
        return full
    energy = measured.energy_j * total / math.fsum(count * full[key].energy_j for key, count in counts.items())
    time = measured.time_s * total / math.fsum(count * full[key].time_s for key, count in counts.items())
    return {key: FullClocks(one.energy_j * energy, one.time_s * time) for key, one in full.items()}


def _lanes(folder: JobFolder) -> list[Lanes]:
    plan, graph = folder.plan, folder.graph()
    profile = None if folder.profile is None else folder.profile.scaled(folder.profile_scale)
    power_w = math.nan if folder.survey is None else folder.survey.blocking_power_w
    made = []
    if profile is not None and graph is not None:
        title = "Full clocks, by the profile"
        if folder.profile_scale != 1:
            title += f" times {folder.profile_scale:.3g}"
        made.append(full_clock_lanes(title, profile, graph, power_w))
    elif whole := folder.pipeline((FULL,)):
        made.append(recorded_lanes(f"Full clocks, as iteration {whole[0].number} ran", whole, profile, graph, power_w))
    if plan is not None:
        made.append(planned_lanes("Plan, as predicted", plan, profile, graph, power_w))
    if ran := folder.pipeline((PLAN,)):
        made.append(recorded_lanes(f"Plan, as iteration {ran[0].number} ran", ran, profile, graph, power_w))
    elif plan is not None and folder.one_graph:
        folder.missing.append(f"{ONE_GRAPH_SEEN}: what ran is not drawn{_as_a_whole(folder)}")
    elif plan is not None and folder.records and not folder.dry_run:
        folder.missing.append(f"no iteration under the plan was kept whole{folder.yet}: what ran is not drawn")
    return made


def _as_a_whole(folder: JobFolder) -> str:
    """What is known of iterations all the same."""
    if folder.summary is None:
        return ""
    time_s, energy_j = folder.summary.iteration_time_s.measured, folder.summary.energy_j.measured
    took = "" if time_s is None else f"; under the plan they took {time_s:.4g} s each"
    return took + (f" and {energy_j:.4g} J" if took and energy_j is not None else "")


def _frontier(folder: JobFolder) -> FrontierCurve | None:
    """As the job has left it; computed here where it had no time to."""
    known, plan = folder.frontier, folder.plan
    # The one that is kept may be of another schedule's plan.
    if known is not None and plan is not None and math.isclose(known.baseline_energy_j, plan.baseline_energy_j):
        return known
    graph, survey = folder.graph(), folder.survey
    if graph is None or survey is None or plan is None:
        return None
    # With lower clocks in waits if the plan has them.
    latency_s = folder.summary.overhead.switch_latency_p95_s if folder.summary is not None and plan.waits else None
    profile = survey.profile.scaled(folder.profile_scale)
    made_from = folder.streams, folder.overheads, survey, folder.profile_scale, plan.schedule, latency_s
    key = hashlib.sha256(repr(made_from).encode()).digest()  # NaN, which figures may be, is not equal to itself
    if key not in _sampled:
        # Loads OR-Tools, which the rest of a report does without.
        from perseus_plugin.planning.frontier import make_frontier
        from perseus_plugin.planning.planner import Planner

        try:
            planner = Planner(
                graph,
                profile,
                blocking_power_w=survey.blocking_power_w,
                full_clock_only=survey.unresolved,
                schedule=plan.schedule,
                switch_latency_s=latency_s,
            )
            curve = make_frontier(planner, tolerance=_TOLERANCE).curve()
        except PerseusError as error:
            folder.missing.append(f"there is no frontier: {error}")
            return None
        _sampled.clear()
        _sampled[key] = curve
    return _sampled[key]


def _waiting(folder: JobFolder, lanes: Sequence[Lanes]) -> tuple[float, float] | None:
    if folder.survey is None or len(lanes) < 2:
        return None
    return lanes[0].waiting_j, lanes[1].waiting_j


def _lowered(lanes: Sequence[Lanes]) -> float | None:
    saved = [wait.saved_j for wait in lanes[1].waits if wait.own] if len(lanes) > 1 else []
    return math.fsum(saved) if saved and not any(map(math.isnan, saved)) else None


# What happened.


def marks(stretches: Sequence[Stretch], folder: JobFolder, ruled: Sequence[Reign] = ()) -> list[Happening]:
    """What happened when: changes of what iterations ran as and aim at, stragglers, clocks that were not held."""
    # What the configuration says is what a job usually aims at.
    found = [Happening(reign.first, f"target: {reign.says}") for reign in ruled[1:]]
    last: Stretch | None = None
    for stretch in stretches:
        if stretch.sort.reason == REFERENCE.reason:
            continue  # they come and go for as long as a plan is followed
        text = _change(last, stretch)
        if text:
            found.append(Happening(stretch.first, text))
        last = stretch
    for event in folder.events:
        if event["event"] in ("report", "detection"):
            who = f"rank {event['rank']}" if "rank" in event else "a rank"
            said = "is reported" if event["event"] == "report" else "is seen to be"
            what = "back to normal" if event.get("slowdown") == 1 else "slow"
            found.append(Happening(_at(stretches, event["time"]), f"{who} {said} {what}"))
    for rank, record in folder.records.items():
        if record.deviations:
            first = record.deviations[0]
            count = len(record.deviations)
            times = f"at least {count} times" if count >= MAX_DEVIATIONS else f"{count} times"
            text = f"rank {rank} capped: {first.read_mhz} MHz where {first.asked_mhz} were asked for ({times})"
            found.append(Happening(_at(stretches, first.time_s), text))
    return _fewer(sorted(found, key=lambda mark: mark.iteration))


def _fewer(found: list[Happening]) -> list[Happening]:
    """The first and the newest ones, and between them how many are left out."""
    if len(found) <= _MAX_MARKS:
        return found
    first, newest = found[: _MAX_MARKS // 2], found[-(_MAX_MARKS // 2) :]
    left = found[len(first)]
    return [*first, Happening(left.iteration, f"{len(found) - len(first) - len(newest)} more, left out here"), *newest]


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
        case "unknown":
            return now.sort.reason
    return ""


def _at(stretches: Sequence[Stretch], time_s: float) -> int:
    """The iteration that ran at a Unix time."""
    found = stretches[0].first
    for stretch in stretches:
        if stretch.begin_s <= time_s:
            into = (time_s - stretch.begin_s) / stretch.time_s
            found = stretch.first + min(stretch.count - 1, max(0, math.floor(into)))
    return found
