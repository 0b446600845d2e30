"""Planning time and plan quality beside lowtime, the solver of the published Perseus system, in one run.

    pip install lowtime
    python benchmarks/planner_vs_lowtime.py DATA --size 4x8 --size 8x96
    python benchmarks/planner_vs_lowtime.py --model examples/simulate/gpt3-175b.yaml --size 4x8

DATA holds `gpt3-175b-a100_sxm.csv`; with a model's description the profile is that of `perseus simulate`. Both start
from profile and schedule in memory and plan for zero slowdown.
lowtime starts at the slowest iteration and cuts one time unit per step (a thousandth of a second of the unscaled
profile), so reaching zero slowdown takes it through its whole frontier; that time also stands beside our frontier.
Its clocks are run through the same simulation as ours. CPU seconds are given beside wall-clock seconds because both
solvers use one thread and the machine may be shared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from perseus_plugin.cli.simulation.description import even_split, load_description, modelled_profile
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.frontier import make_frontier
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.profiling.profile import Profile, load_profile

BLOCKING_W = 83.64
SCALE = 10.0
T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float, float]:
    """Result, wall-clock seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def rounded(planner: Planner) -> Plan:
    """Ours without a search in windows."""
    return planner.to_plan(planner.solve(Target.slowdown(), search=False))


def lowtime_plan(planner: Planner, profile: Profile) -> tuple[float, float, int]:
    """Run lowtime to its fastest point; realised iteration time, realised energy, steps."""
    import networkx as nx
    from lowtime.cost_model import ExponentialModel
    from lowtime.operation import CandidateExecutionOptions, DummyOperation, ExecutionOption, OperationSpec
    from lowtime.perseus.instruction import Backward, Forward
    from lowtime.solver import PhillipsDessouky

    graph = planner.problem.graph
    specs: dict[tuple[int, str], Any] = {}
    for key, rows in profile.table.items():
        candidates = CandidateExecutionOptions(
            options=[
                ExecutionOption(m.time_s, SCALE * 1e-3, m.energy_j - BLOCKING_W * m.time_s, m.frequency_mhz)
                for m in rows
            ]
        )
        specs[key] = OperationSpec(options=candidates, cost_model=ExponentialModel(candidates))
    dag = nx.DiGraph()
    operations = []
    for node, instruction in enumerate(graph.instructions):
        assert instruction is not None  # 1F1B without constant-time work
        make = Forward if instruction.kind == "forward" else Backward
        spec = specs[instruction.stage, instruction.kind]
        operation = make(spec=spec, stage_id=instruction.stage, micro_batch_id=instruction.microbatch)
        operations.append(operation)
        dag.add_node(node, op=operation)
    dag.add_edges_from(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True))
    source, sink = len(graph), len(graph) + 1
    sources = [node for node in range(len(graph)) if dag.in_degree(node) == 0]
    sinks = [node for node in range(len(graph)) if dag.out_degree(node) == 0]
    dag.add_node(source, op=DummyOperation())
    dag.add_node(sink, op=DummyOperation())
    dag.add_edges_from((source, node) for node in sources)
    dag.add_edges_from((node, sink) for node in sinks)
    dag.graph.update(source_node=source, sink_node=sink)
    steps, last = 0, time.perf_counter()
    for result in PhillipsDessouky(dag).run():
        steps += 1
        if time.perf_counter() - last > 60:
            last = time.perf_counter()
            print(f"  lowtime: step {steps}, at {result.real_time:.2f} s", file=sys.stderr, flush=True)
    duration, energy = np.zeros(len(graph)), 0.0
    for node, operation in enumerate(operations):
        rows = profile.table[operation.stage_id, type(operation).__name__.lower()]
        row = next(m for m in rows if m.frequency_mhz == operation.assigned_knob)
        duration[node] = row.time_s
        energy += row.energy_j - BLOCKING_W * row.time_s
    end = graph.iteration_time_s(duration)
    return end, energy + planner.problem.total_blocking_w * end, steps


def compare(profile: Profile, stages: int, microbatches: int, tolerance: float) -> None:
    """One size: both solvers, then the table."""
    chosen = Profile({key: rows for key, rows in profile.table.items() if key[0] < stages})
    graph = build_graph(one_f_one_b(stages, microbatches))
    graph.times(np.zeros(len(graph)))  # the schedule in memory includes the graph's index arrays

    def make() -> Planner:
        return Planner(graph, chosen, blocking_power_w=BLOCKING_W, schedule="1f1b")

    rounded(make())  # imports and caches
    runs = [timed(lambda: rounded(make())) for _ in range(5)]
    plan = runs[0][0]
    wall, cpu = (sorted(run[i] for run in runs)[len(runs) // 2] for i in (1, 2))
    frontier, frontier_wall, frontier_cpu = timed(lambda: make_frontier(make(), tolerance=tolerance))
    print(f"\n{stages} stages x {microbatches} microbatches, 1F1B, zero slowdown", flush=True)
    print(f"  ours: {wall:.4f} s wall, {cpu:.4f} s CPU (median of {len(runs)})")
    print(f"    time {plan.slowdown:+.3%} of full clocks, saving {plan.saving:.3%}, gap to bound {plan.gap:.3%}")
    print(
        f"  ours, frontier to {tolerance:.1%} with {len(frontier.points)} plans: {frontier_wall:.2f} s wall, "
        f"{frontier_cpu:.2f} s CPU",
        flush=True,
    )
    (end, energy, steps), low_wall, low_cpu = timed(lambda: lowtime_plan(make(), chosen))
    print(f"  lowtime, {steps} steps: {low_wall:.2f} s wall, {low_cpu:.2f} s CPU")
    print(
        f"    time {end / plan.baseline_time_s - 1:+.3%} of full clocks, "
        f"saving {1 - energy / plan.baseline_energy_j:.3%}"
    )
    print(f"  ratio, plan: {low_wall / wall:,.0f} by wall clock, {low_cpu / cpu:,.0f} by CPU")
    print(
        f"  ratio, frontier: {low_wall / frontier_wall:,.0f} by wall clock, {low_cpu / frontier_cpu:,.0f} by CPU",
        flush=True,
    )


def modelled(description: Path) -> Profile:
    """The model on A100s; a time unit is then about the same share of an instruction as with the published profile."""
    model = load_description(description)
    split = model.own_split or even_split(model.layers, model.stages or 8)
    profile = modelled_profile(model, split, "a100", ("forward", "backward"))
    return profile.scaled(1.0 / statistics.mean(rows[0].time_s for rows in profile.table.values()))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with the published profiles")
    parser.add_argument("--model", type=Path, help="model description, instead of published profiles")
    parser.add_argument("--size", action="append", help="STAGESxMICROBATCHES, may be repeated (default: 4x8)")
    parser.add_argument("--tolerance", type=float, default=0.002, help="of the frontier")
    arguments = parser.parse_args()
    if arguments.model is not None:
        profile = modelled(arguments.model)
    elif arguments.data is not None:
        profile = load_profile(arguments.data / "gpt3-175b-a100_sxm.csv").scaled(SCALE)
    else:
        parser.error("got neither DATA nor --model")
    for size in arguments.size or ["4x8"]:
        stages, microbatches = (int(part) for part in size.split("x"))
        compare(profile, stages, microbatches, arguments.tolerance)


if __name__ == "__main__":
    main()
