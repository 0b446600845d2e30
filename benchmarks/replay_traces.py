"""Plans held against the real durations of real jobs: every forward and backward of published operation traces.

A plan is made from the means of some of a trace's steps, with the emulated A100's curve of time and power over the
clock, and replayed over the real durations of the others; an iteration ends with its slowest replica. The first table
has plans with a fixed margin, made from and replayed over all steps. The second has the plan that the planner chooses
by itself from the steps it is given, with and without ranks that catch up, and the fixed margin that saves most among
those that are no slower.

    python benchmarks/replay_traces.py DATA

DATA is a folder of `trace-*.csv.gz` with the columns dp_rank, stage, step, optype, mb_id and duration (seconds).
Replicas with a stage more than a tenth slower than in the median replica have a fault of their own, which is not what
this is about: they are left out, and their number is said.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perseus_plugin.cli.simulation.traces.findings import faulty_replicas
from perseus_plugin.cli.simulation.traces.table import load_table
from perseus_plugin.cli.simulation.traces.traced import TracedJob
from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.iteration.graph import PipelineGraph
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.process import answer_to, plan_for
from perseus_plugin.planning.replay import CatchUp, Outcome, Replay, by_node, clocks_of
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.profiling.profile import Measurement, Profile

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of trace-*.csv.gz")
    arguments = parser.parse_args()
    paths = sorted(arguments.data.glob("trace-*.csv.gz"))
    if not paths:
        parser.error(f"{arguments.data}: no trace-*.csv.gz in it")
    begin_s = time.perf_counter()
    traces = [load(path) for path in paths]
    loaded_s = time.perf_counter()
    fixed_margins(traces)
    chosen(traces)
    print(f"\nread in {loaded_s - begin_s:.1f} s, planned and replayed in {time.perf_counter() - loaded_s:.1f} s")


if __name__ == "__main__":
    main()
