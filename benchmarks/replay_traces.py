"""Plans held against the real durations of real jobs: every forward and backward of published operation traces.

A plan is made from the means of some of a trace's steps, with the emulated A100's curve of time and power over the
clock, and replayed over the real durations of the others; an iteration ends with its slowest replica. The first table
has plans with a fixed margin, made from and replayed over all steps. The second has the plan that the planner chooses
by itself from the steps it is given, with and without ranks that catch up, and the fixed margin that saves most among
those that are no slower. The third has all replicas, faulty ones too, under that plan, under plans for stragglers, and
under a plan for each step's own batch: with durations known exactly, and as a model tells them from one number per
microbatch. Traces hold no sequence lengths; what a microbatch's forward took in the first stage stands for that number.

    python benchmarks/replay_traces.py DATA

DATA is a folder of `trace-*.csv.gz` with the columns dp_rank, stage, step, optype, mb_id and duration (seconds).
Replicas with a stage more than a tenth slower than in the median replica have a fault of their own, which is not what
the first two tables are about: they are left out, and their number is said.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perseus_plugin.cli.simulation.description import profile_on, waiting_on
from perseus_plugin.cli.simulation.traces.findings import FAULTY, LASTING, explained, faulty_replicas, stage_paces
from perseus_plugin.cli.simulation.traces.table import load_table
from perseus_plugin.cli.simulation.traces.traced import TracedJob
from perseus_plugin.cli.simulation.traces.worth import Asked, mean_times_s, worth
from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.iteration.graph import FloatArray, PipelineGraph
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.planning.batches import BatchPlanner, choose, joined, outcome_of, sizes_of
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.process import answer_to, graph_for, plan_for, with_margin
from perseus_plugin.planning.replay import CatchUp, Outcome, Replay, by_node, clocks_of
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.robust import Promise
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.work_model import WorkModel, fitted

MARGINS = (0.0, 0.01, 0.03, 0.05, 0.1)
FINE_MARGINS = (0.0, 0.005, *(m / 100 for m in range(1, 31)))
SAMPLED = 12
LATENCY_S = 0.01
LOWEST_MHZ = 705  # half of the highest, as the sweep goes by default


@dataclass(frozen=True)
class Trace:
    """A job's durations.

    Attributes:
        name: of the trace.
        job: as it was read; all ran 1F1B.
        durations_s: shape (steps, replicas, nodes of the graph), those of faulty replicas left out.
        left_out: how many replicas were.
    """

    name: str
    job: TracedJob
    durations_s: npt.NDArray[np.float64]
    left_out: int

    @property
    def graph(self) -> PipelineGraph:
        """Of an iteration."""
        return self.job.graph


def load(path: Path) -> Trace:
    """Read a trace; ranks that do the same work are averaged."""
    job = load_table(path)
    name = path.name.removeprefix("trace-").removesuffix(".csv.gz")
    healthy = ~faulty_replicas(job)
    return Trace(name, job, job.durations_s[:, healthy], int((~healthy).sum()))


def profile_of(trace: Trace, steps: npt.NDArray[np.int64]) -> Profile:
    """Means of these steps at the highest clock; the emulated A100's curve below it."""
    means = trace.durations_s[steps].mean(axis=(0, 1))
    of_kind: dict[tuple[int, str], list[float]] = defaultdict(list)
    for node, one in enumerate(trace.graph.instructions):
        assert one is not None  # see `load`
        of_kind[one.stage, one.kind].append(float(means[node]))
    rows = []
    for (stage, kind), times in of_kind.items():
        for clock in A100.clocks_mhz():
            if clock >= LOWEST_MHZ:
                time_s = float(np.mean(times)) * A100.stretch(load_class(kind), clock)
                energy_j = time_s * A100.power_w(load_class(kind), clock)
                rows.append((stage, kind, Measurement(clock, time_s, energy_j)))
    return Profile.from_rows(rows)


def request(trace: Trace, profile: Profile, margin: float) -> PlanRequest:
    """What the planner is asked."""
    power_w = [A100.blocking_w] * trace.job.stages
    return PlanRequest("1F1B", trace.job.streams, {}, profile, power_w, margin=margin, latency_s=LATENCY_S)


def samples_of(trace: Trace, steps: npt.NDArray[np.int64]) -> Samples:
    """Steps as ranks publish them."""
    graph = trace.graph
    durations = tuple(
        tuple(tuple(tuple(replica[nodes].tolist()) for nodes in graph.stage_nodes) for replica in step)
        for step in trace.durations_s[steps]
    )
    return Samples(durations)


def figures(outcome: Outcome, full: Outcome) -> tuple[float, float]:
    """Time added and energy saved against full clocks, in percent."""
    return (
        100 * float(outcome.time_s.sum() / full.time_s.sum() - 1),
        100 * float(1 - outcome.energy_j.sum() / full.energy_j.sum()),
    )


def with_fixed_margin(
    trace: Trace, problem: PlanningProblem, profile: Profile, replay: Replay, margin: float
) -> tuple[float, float]:
    """Time and energy of a plan with this margin."""
    plan = plan_for(request(trace, profile, margin))
    return figures(replay.under(clocks_of(plan, problem.graph)), replay.at_full_clocks)


def fixed_margins(traces: list[Trace]) -> None:
    """Print the first table."""
    print("Fixed margin, no catching up; all steps: time against full clocks, energy saved, in percent\n")
    print("| trace | " + " | ".join(f"{100 * margin:g} %" for margin in MARGINS) + " |")
    print("|---|" + "---|" * len(MARGINS))
    for trace in traces:
        steps = np.arange(len(trace.durations_s))
        profile = profile_of(trace, steps)
        problem = build_problem(trace.graph, profile, A100.blocking_w)
        replay = Replay(problem, trace.durations_s)
        cells = [with_fixed_margin(trace, problem, profile, replay, margin) for margin in MARGINS]
        print(f"| {label(trace)} | " + " | ".join(f"{time:+.2f}, {saved:.1f}" for time, saved in cells) + " |")


def label(trace: Trace) -> str:
    """The trace's name, and what was left out."""
    return trace.name + (f" ({trace.left_out} faulty replica left out)" if trace.left_out else "")


def chosen(traces: list[Trace]) -> None:
    """Print the second table."""
    print(
        f"\nChosen by the planner from {SAMPLED} steps, replayed over the others: time against full clocks, energy "
        "saved, in percent\n"
    )
    print(
        "| trace | steps planned on | without catching up | with catching up | raised | best fixed margin no slower |"
    )
    print("|---|---|---|---|---|---|")
    for trace in traces:
        count = len(trace.durations_s)
        for name, steps in (
            (f"the first {SAMPLED}", np.arange(min(SAMPLED, count // 2))),
            (f"{SAMPLED} spread evenly", np.unique(np.linspace(0, count - 1, min(SAMPLED, count // 2)).astype(int))),
        ):
            others = np.setdiff1d(np.arange(count), steps)
            profile = profile_of(trace, steps)
            problem = build_problem(trace.graph, profile, A100.blocking_w)
            replay = Replay(problem, trace.durations_s[others])
            cells, worst, raised = [], 0.0, 0.0
            for catch_up in (False, True):
                wanted = replace(request(trace, profile, 0.01), samples=samples_of(trace, steps), catch_up=catch_up)
                answer = answer_to(wanted)
                assert answer.plan is not None  # else it would have raised
                assert answer.replayed is not None  # there were samples
                rule = None
                if answer.catch_up:
                    latest = by_node(problem.graph, [stage.latest_starts_s for stage in answer.catch_up])
                    rule = CatchUp(latest, LATENCY_S, answer.catch_up[0].size_weight)
                outcome = replay.under(clocks_of(answer.plan, problem.graph), rule)
                added, saved = figures(outcome, replay.at_full_clocks)
                worst, raised = added, 100 * outcome.raised
                how = "full clocks" if answer.replayed.obstacle else f"margin {100 * answer.replayed.margin:g} %"
                cells.append(f"{added:+.2f}, {saved:.1f} ({how})")
            fixed = [
                (saved, added, margin)
                for margin in FINE_MARGINS
                for added, saved in [with_fixed_margin(trace, problem, profile, replay, margin)]
                if added <= worst + 0.005
            ]
            saved, added, margin = max(fixed, default=(0.0, 0.0, 1.0))
            cells += [f"{raised:.0f} %", f"{added:+.2f}, {saved:.1f} ({100 * margin:g} %)" if fixed else "none"]
            print(f"| {label(trace)} | {name} | " + " | ".join(cells) + " |", flush=True)


def each_step(traces: list[Trace]) -> None:
    """Print the third table."""
    print(
        f"\nAll replicas; {SAMPLED} steps spread evenly to plan on and to fit the model to, replayed over the others: "
        "time against full clocks (of the step that it lengthens most), energy saved, in percent\n"
    )
    print(
        "| trace | static | straggler-aware | per batch, durations known | margin | per batch, by the model | margin |"
    )
    print("|---|---|---|---|---|---|---|")
    said = []
    for trace in traces:
        count = len(trace.job.durations_s)
        steps = np.unique(np.linspace(0, count - 1, min(SAMPLED, count // 2)).astype(int))
        explains = explained(trace.job)
        profile = profile_on(A100, mean_times_s(trace.job), waiting_on(A100))  # as `perseus simulate` has it
        rides = worth(trace.job, explains, profile, Asked((A100.blocking_w,) * trace.job.stages)).rides
        cells = [
            f"{100 * (ride.time_ratio - 1):+.2f} ({100 * (ride.worst_ratio - 1):+.2f}), {100 * ride.saving.mean:.1f}"
            for ride in rides
        ]
        cells += ["-"] * (2 - len(rides))
        asked = replace(request(trace, profile, 0.0), overheads=explains.overheads)
        model, works, slow = work_model(trace, steps)
        for known in (True, False):
            cells += per_batch(trace, asked, steps, None if known else model, works, slow)
        print(f"| {trace.name} | " + " | ".join(cells) + " |", flush=True)
        said.append(
            f"{trace.name}: works explain {100 * model.explained:.0f} % of the variance, and {100 * model.error:.1f} % "
            f"of a duration is left; a pipeline's plan takes {1e3 * plan_seconds(trace, asked):.0f} ms"
        )
    print("\n" + "\n".join(said))


def work_model(trace: Trace, steps: npt.NDArray[np.int64]) -> tuple[WorkModel, FloatArray, FloatArray]:
    """What a job would know: the model, every microbatch's work, and how slow stages are that are so for long.

    Returns:
        The model; shape (steps, replicas, microbatches); shape (replicas, stages).
    """
    job, graph = trace.job, trace.graph
    paces = stage_paces(job)[steps]
    slow = np.where((paces > FAULTY).mean(axis=0) >= LASTING, np.median(paces, axis=0), 1.0)
    healthy_s = job.durations_s / slow[:, [one.stage for one in graph.instructions if one is not None]]
    first = {one.microbatch: node for one, node in graph.node_of.items() if (one.stage, one.kind) == (0, "forward")}
    works = healthy_s[:, :, [first[microbatch] for microbatch in sorted(first)]]
    observed: dict[tuple[int, str], tuple[list[FloatArray], list[FloatArray]]] = defaultdict(lambda: ([], []))
    for one, node in graph.node_of.items():
        of_kind = observed[one.stage, one.kind]
        of_kind[0].append(works[steps][:, :, one.microbatch].ravel())
        of_kind[1].append(healthy_s[steps][:, :, node].ravel())
    model = fitted({key: (np.concatenate(x), np.concatenate(y)) for key, (x, y) in observed.items()})
    assert model is not None  # there are enough
    return model, works, slow


def batch_planner(asked: PlanRequest, margin: float) -> BatchPlanner:
    """As a job would have it."""
    graph = graph_for(asked)
    problem, planned_on = (
        build_problem(graph, profile, asked.blocking_power_w)
        for profile in (asked.profile, with_margin(asked.profile, margin, asked.blocking_power_w))
    )
    return BatchPlanner(problem, planned_on, latency_s=LATENCY_S, lower_while_waiting=False)


def per_batch(
    trace: Trace,
    asked: PlanRequest,
    steps: npt.NDArray[np.int64],
    model: WorkModel | None,
    works: FloatArray,
    slow: FloatArray,
) -> list[str]:
    """Every step planned for its own batch: by the model, or (None) for the durations that it really has."""
    planners: dict[float, BatchPlanner] = {}

    def planner_with(margin: float) -> BatchPlanner:
        return planners.setdefault(margin, batch_planner(asked, margin))

    problem = planner_with(0.0).problem
    stage_of = problem.graph.stage
    durations_s = [
        np.array([by_node(problem.graph, [of[nodes] for nodes in trace.graph.stage_nodes]) for of in step])
        for step in trace.job.durations_s
    ]
    predicted = [
        [
            took_s / problem.full_clock_s.clip(1e-9)
            if model is None
            else sizes_of(problem, model.of, of.tolist()) * slow[replica, stage_of]
            for replica, (took_s, of) in enumerate(zip(step, of_step, strict=True))
        ]
        for step, of_step in zip(durations_s, works, strict=True)
    ]
    on = steps.tolist()
    chosen = choose(planner_with, [predicted[i] for i in on], [durations_s[i] for i in on], Promise(), LATENCY_S)
    if chosen.planner is None:
        return ["full clocks", "none"]
    others = np.setdiff1d(np.arange(len(durations_s)), steps).tolist()
    ran = [outcome_of(chosen.planner.step(predicted[i]), durations_s[i], LATENCY_S) for i in others]
    under, full = joined([one for one, _ in ran]), joined([one for _, one in ran])
    added, saved = figures(under, full)
    worst = 100 * float((under.time_s / full.time_s).max() - 1)
    return [f"{added:+.2f} ({worst:+.2f}), {saved:.1f}", f"{100 * chosen.replayed.margin:g} %"]


def plan_seconds(trace: Trace, asked: PlanRequest) -> float:
    """Processor time of a plan."""
    planner = batch_planner(asked, 0.0)
    sizes = [np.ones(len(planner.problem.graph))] * len(trace.job.replicas)
    begin_s = time.process_time()
    planner.step(sizes)
    return (time.process_time() - begin_s) / len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of trace-*.csv.gz")
    parser.add_argument("--per-batch", action="store_true", help="the third table alone")
    arguments = parser.parse_args()
    paths = sorted(arguments.data.glob("trace-*.csv.gz"))
    if not paths:
        parser.error(f"{arguments.data}: no trace-*.csv.gz in it")
    begin_s = time.perf_counter()
    traces = [load(path) for path in paths]
    loaded_s = time.perf_counter()
    if not arguments.per_batch:
        fixed_margins(traces)
        chosen(traces)
    each_step(traces)
    print(f"\nread in {loaded_s - begin_s:.1f} s, planned and replayed in {time.perf_counter() - loaded_s:.1f} s")


if __name__ == "__main__":
    main()
