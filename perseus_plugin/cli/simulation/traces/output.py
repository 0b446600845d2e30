"""What is said and written of a traced job: a table, JSON, and a Perfetto trace of a step before and after. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from perseus_plugin.cli.simulation.traces.findings import Explained, SlowStage, Spread, Stragglers
from perseus_plugin.cli.simulation.traces.traced import LEAST_IN_ORDER, TracedJob
from perseus_plugin.cli.simulation.traces.worth import Estimate, Ride, Worth, clocked
from perseus_plugin.errors import figure
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.report.lanes import Lanes, timed_lanes
from perseus_plugin.reporting.report.trace import trace_of_lanes

SCHEMA = "perseus-trace-simulation"
VERSION = 1
PLAN_HEAD = ("plan", "time", "worst step", "saving", "full clocks, plan", "")
_STAGES_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """All that is known of a traced job.

    Attributes:
        job: as traced.
        power_of: where power and the curves over the clock are from, for people.
        profile: of its instructions.
        spreads, explained, stragglers, worth: see `findings` and `worth`.
    """

    job: TracedJob
    power_of: str
    profile: Profile
    spreads: Sequence[Spread]
    explained: Explained
    stragglers: Stragglers
    worth: Worth


def lines(answer: Answer) -> Iterator[str]:
    """What is said above the table of plans."""
    yield from caution_lines(answer)
    yield from job_lines(answer)
    yield from (f"  {line}" for line in spread_lines(answer))
    yield graph_line(answer)
    yield from straggler_lines(answer)
    bloat = answer.worth.bloat
    yield (
        f"Energy by {answer.power_of}: {bloat.full_j.mean:.1f} J per pipeline and iteration at full clocks. Of that, "
        f"in {bloat.iterations} iterations that were planned one by one:"
    )
    yield f"  intrinsic bloat (stages are not balanced): {_joules(bloat.intrinsic_j, bloat.intrinsic)}"
    yield f"  extrinsic bloat (a slower replica is waited for): {_joules(bloat.extrinsic_j, bloat.extrinsic)}"


def job_lines(answer: Answer) -> Iterator[str]:
    """Which job it is."""
    job = answer.job
    yield (
        f"{job.name}: {job.schedule}, {job.stages} stages, {job.microbatches} microbatches, {len(job.replicas)} "
        f"{_some(len(job.replicas), 'replica')}, {len(job.steps)} {_some(len(job.steps), 'step')}"
        + (f" ({len(job.left_out)} left out, as something is missing in them)" if job.left_out else "")
    )
    if LEAST_IN_ORDER <= job.in_order < 1:
        yield f"{job.in_order:.0%} of the iterations ran in this order; durations are taken of all"


def caution_lines(answer: Answer) -> Iterator[str]:
    """What makes all that follows doubtful."""
    job = answer.job
    if job.in_order < LEAST_IN_ORDER:
        yield (
            f"Only {job.in_order:.0%} of the iterations ran in the order of {job.schedule}: all figures are of that "
            "schedule with the traced durations, not of what ran. Give the --schedule that ran."
        )


def spread_lines(answer: Answer) -> list[str]:
    """How long instructions take."""
    return [
        f"stage {one.stage} {one.kind}: {_ms(one.mean_s)} (one in ten below {_ms(one.p10_s)}, above "
        f"{_ms(one.p90_s)}; {one.within:.1%} within an iteration)"
        for one in answer.spreads
    ]


def graph_line(answer: Answer) -> str:
    """How well the graph gives the iteration times."""
    explains = answer.explained
    if math.isnan(explains.traced_s):
        return "The trace does not say how long iterations take; what they take beside their instructions is left out."
    return (
        f"An iteration takes {explains.traced_s:.4f} s. The graph of its instructions, with "
        f"{_ms(explains.transfer_s)} per transfer and {_ms(explains.end_s)} once, is off by "
        f"{explains.error_mean:.2%} on average, {explains.error_worst:.2%} at worst."
    )


def plan_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    """Of every plan: its name, time and energy against full clocks, joules, and what it does."""
    for ride in answer.worth.rides:
        how = [f"margin {ride.margin:.1%}"] if ride.margin is not None and not ride.obstacle else []
        if ride.raised:
            how.append(f"{ride.raised:.1%} of instructions caught up")
        saving, low, high = (figure(one, ".2%") for one in (ride.saving.mean, ride.saving.low, ride.saving.high))
        yield (
            ride.name,
            figure(ride.time_ratio - 1, "+.2%"),
            figure(ride.worst_ratio - 1, "+.2%"),
            f"{saving} ({low} to {high})",
            f"{ride.full_j:.1f} J, {ride.energy_j:.1f} J",
            "full clocks, see below" if ride.obstacle else ", ".join(how),
        )


def notes(answer: Answer) -> Iterator[str]:
    """What is said below the table."""
    found = answer.worth
    yield from (f"{ride.name}: full clocks, as {ride.obstacle}" for ride in found.rides if ride.obstacle)
    over = (
        "replayed over the same, as there are too few steps to keep some apart"
        if found.planned_on == found.replayed_over
        else f"replayed over the {len(found.replayed_over)} others"
    )
    yield f"Planned from {len(found.planned_on)} steps, {over}. Energies are of one GPU per stage and replica."
    if found.left_out:
        which = ", ".join(map(str, found.left_out[:_STAGES_SHOWN])) + (", ..." if len(found.left_out) > 3 else "")
        yield f"The static plan is made without what is slow for long (replica {which}), and replayed with it."
    if answer.stragglers.sort == "rotating" and len(found.rides) == 1:
        yield (
            "No replica is slow for long, so there is nothing that a plan for stragglers could be made for; extrinsic "
            "bloat takes knowing each step's work before it runs."
        )


def as_json(answer: Answer) -> dict[str, Any]:
    """All figures as plain data; what is not known is null."""
    job, found = answer.job, answer.worth
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "source": job.name,
        "power_of": answer.power_of,
        "energies": "one GPU of each stage and replica",
        "schedule": job.schedule,
        "stages": job.stages,
        "microbatches": job.microbatches,
        "replicas": list(job.replicas),
        "steps": list(job.steps),
        "steps_left_out": list(job.left_out),
        "in_order": job.in_order,
        "durations": [asdict(one) for one in answer.spreads],
        "explained": {name: None if math.isnan(value) else value for name, value in asdict(answer.explained).items()},
        "stragglers": {
            **asdict(answer.stragglers),
            "slowest": [[replica, share] for replica, share in answer.stragglers.slowest.items()],
        },
        "bloat": asdict(found.bloat),
        "planned_on": list(found.planned_on),
        "replayed_over": list(found.replayed_over),
        "replicas_left_out": list(found.left_out),
        "plans": [
            {name: value for name, value in asdict(ride).items() if name != "clocks_mhz"} for ride in found.rides
        ],
    }


def timeline(answer: Answer) -> dict[str, Any]:
    """The step of `median_step` as a Chrome trace: as traced, and under the last plan; of all replicas."""
    several = [
        lanes_of(answer, under, median_step(answer), place)
        for under in (None, answer.worth.rides[-1])
        for place in range(len(answer.job.replicas))
    ]
    return trace_of_lanes(several, job=answer.job.name, power_of=answer.power_of)


def median_step(answer: Answer) -> int:
    """Which of the steps that were replayed is of median length."""
    job = answer.job
    graph = build_graph(job.streams, latency_s=answer.explained.transfer_s)
    places = [job.steps.index(step) for step in answer.worth.replayed_over]
    ends_s = [max(graph.iteration_time_s(took) for took in job.durations_s[place]) for place in places]
    return places[int(np.argsort(ends_s)[len(ends_s) // 2])]


def lanes_of(answer: Answer, ride: Ride | None, step: int, replica: int) -> Lanes:
    """A replica's iteration under a plan; None: as traced."""
    job = answer.job
    name = "full clocks" if ride is None else f"{ride.name} plan"
    title = f"{name}, replica {job.replicas[replica]}, step {job.steps[step]}"
    graph = build_graph(job.streams, latency_s=answer.explained.transfer_s)
    return timed_lanes(title, graph, *clocked(job, ride, answer.profile, step, replica))


def straggler_lines(answer: Answer) -> Iterator[str]:
    """Who is slow; what it is slow in is indented."""
    found = answer.stragglers
    if found.sort == "none":
        if len(answer.job.replicas) > 1:
            yield f"No replica makes the others wait: the slowest is {found.behind:.2%} behind the median one."
    else:
        stage, kind = found.work or (0, "")
        replica, share = next(iter(found.slowest.items()))
        who = (
            f"the same, replica {replica} in {share:.0%} of the steps"
            if found.sort == "same"
            else f"a different one from step to step, none in more than {share:.0%} of them"
        )
        yield (
            f"The slowest replica takes {1 + found.behind:.2f} times as long as the median one; it is {who}, mostly by "
            f"{kind} of stage {stage}."
        )
    for one in found.stages[:_STAGES_SHOWN]:
        yield f"  {_slow(one, len(answer.job.replicas) > 1)}"
    if len(found.stages) > _STAGES_SHOWN:
        yield f"  and {len(found.stages) - _STAGES_SHOWN} other stages of replicas, less often"


def _slow(one: SlowStage, several: bool) -> str:
    against = "the median replica" if several else "the median step"
    kinds = ", ".join(f"{kind} {times:.2f}" for kind, times in one.kinds.items())
    return (
        f"replica {one.replica}, stage {one.stage}: {one.times:.2f} times as long as in {against} in {one.steps:.0%} "
        f"of the steps" + (f" (over all steps: {kinds})" if several else "")
    )


def _joules(joules: Estimate, share: Estimate) -> str:
    own, low, high = (figure(one, ".1f") for one in (joules.mean, joules.low, joules.high))
    part, least, most = (figure(one, ".2%") for one in (share.mean, share.low, share.high))
    return f"{own} J ({low} to {high}), {part} ({least} to {most})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _some(count: int, what: str) -> str:
    return what if count == 1 else f"{what}s"
