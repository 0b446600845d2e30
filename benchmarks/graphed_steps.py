"""What is left of a plan where a step is one CUDA graph: by instruction, and by host time.

    python benchmarks/graphed_steps.py [PROFILE.csv --blocking-power 83.64 --scale 10] [--microbatches 24]
    python benchmarks/graphed_steps.py --run [--iterations 40]
    python benchmarks/graphed_steps.py --chosen

The first plans one job with several limits on clock changes and replays each plan by host time, with durations that
vary by several shares (`planning/graphed.py`); without a profile, on one that is made up (`tests/planning/jobs.py`).
The second runs three jobs, one after the other, on emulated GPUs (`tests/one_job.py`: real sessions, helpers and
planners, the same given profile): followed by instruction, replayed as a graph from the first step on, and without the
plugin. The third is for that job again, by the model of the first: margin and number of changes as chosen for how
durations vary (`planning.process.by_time`), beside the plan for their means. Energies of the second are the emulated
GPUs' exact integrals; figures are medians over iterations under the plan.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.waiting_clocks import emulated
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.graphed import Jitter, Replayer, replays
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.plan import Plan, load_plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.process import by_time, graph_for, plan_for
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import ChangeLimits, Target
from perseus_plugin.profiling.profile import load_profile, save_profile
from tests.one_job import OneJob, Step
from tests.planning.jobs import bundled_profile

JITTERS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05)
CHANGES = (None, 16, 8, 4)
CHANGE_S, ITERATIONS = 0.01, 24
TIMES_S = {"forward": (0.040, 0.050, 0.044, 0.060), "backward": (0.080, 0.100, 0.088, 0.120)}
MICROBATCHES, MOST_CHANGES = 8, 8


def simulated(arguments: argparse.Namespace) -> None:
    """Print a line for each limit on clock changes."""
    profile = bundled_profile(8) if arguments.profile is None else load_profile(arguments.profile)
    graph = build_graph(one_f_one_b(profile.stages, arguments.microbatches))
    planner = Planner(graph, profile.scaled(arguments.scale), blocking_power_w=arguments.blocking_power)
    print("most changes | by instruction | by host time, jitter " + " | ".join(f"{100 * one:g} %" for one in JITTERS))
    for changes in CHANGES:
        plan = planner.plan(Target.slowdown(0.0), ChangeLimits(changes))
        found = [replays(planner.problem, plan, CHANGE_S, jitter) for jitter in JITTERS]
        cells = [f"{100 * one.saving:.2f} % ({100 * one.slowdown:+.2f} %)" for one in found]
        print(f"{changes or 'any':>12} | {100 * plan.saving:13.2f}% | " + " | ".join(cells))
        slower = [f"{100 * by_instruction(planner, plan, jitter):+.2f} %" for jitter in JITTERS]
        print(f"{'':>12} | {'so much slower':>14} | " + " | ".join(slower))


def by_instruction(planner: Planner, plan: Plan, jitter: float) -> float:
    """By how much a plan's iterations are slower than at full clocks where durations vary so and clocks follow them."""
    problem, drawn = planner.problem, np.random.default_rng(0)
    clocks = np.zeros(len(problem.graph), dtype=np.int64)
    for stage in plan.stages:
        for one in stage:
            clocks[problem.graph.node_of[one.instruction]] = one.frequency_mhz
    ratios = []
    for _ in range(ITERATIONS):
        sizes = np.maximum(0.1, 1 + jitter * drawn.standard_normal(len(clocks)))
        planned_s, full_s = (
            problem.graph.iteration_time_s(sizes * durations_s)
            for durations_s in (problem.planned_s(clocks), problem.full_clock_s)
        )
        ratios.append(planned_s / full_s)
    return statistics.mean(ratios) - 1


def run(way: str, iterations: int) -> tuple[float, float, float]:
    """Median time and energy of an iteration, and what the plan promised to save; way: instruction, graph or off."""
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    with tempfile.TemporaryDirectory() as name:
        folder, profile = Path(name) / "job", Path(name) / "profile.csv"
        save_profile(emulated(TIMES_S), profile)
        block: dict[str, Any] = {
            "cuda_graph": way == "graph",
            "profiling": {"load": str(profile), "warmup_steps": 2, "steps_per_clock": 6},
            "limits": {"max_changes_per_iteration": MOST_CHANGES, "switch_latency_s": 0.006},
            "lower_while_waiting": False,
            "stragglers": {"detect": False},
            "watch": {"tolerance": 1.0},
            "frontier": False,
        }
        left = count(iterations, -1)
        planned = folder / "plan.json"
        job = OneJob(
            folder,
            [Step((1.0,) * MICROBATCHES)] * (iterations if way == "off" else 400),
            forward_s=TIMES_S["forward"],
            backward_s=TIMES_S["backward"],
            plugin=None if way == "off" else block,
            is_graph=lambda iteration: way == "graph",
            until=lambda: planned.exists() and next(left) <= 0,
        )
        ran = job.run()
        counted = [at for at, state in enumerate(ran.states) if state == "plan"][-iterations // 2 :]
        counted = counted or list(range(len(ran.times_s) // 2, len(ran.times_s)))
        promised = load_plan(planned).saving if planned.exists() else 0.0
    times_s, energies_j = ([of[at] for at in counted] for of in (ran.times_s, ran.energies_j))
    return statistics.median(times_s), statistics.median(energies_j), promised


def chosen() -> None:
    """Print a line for each jitter: the plan for the means, and what is chosen for that jitter."""
    request = PlanRequest(
        schedule="1f1b",
        streams=one_f_one_b(len(TIMES_S["forward"]), MICROBATCHES),
        constant_time_s={},
        profile=emulated(TIMES_S),
        blocking_power_w=[70.0] * len(TIMES_S["forward"]),
        max_changes=MOST_CHANGES,
        latency_s=0.006,
        lower_while_waiting=False,
        search=False,
    )
    problem = build_problem(graph_for(request), request.profile, request.blocking_power_w)
    means = plan_for(request)
    print("jitter | plan for the means | chosen: margin, most changes | chosen plan")
    for jitter in (0.01, 0.02, 0.03, 0.05):
        replayer = Replayer(problem, 0.006, Jitter(jitter, jitter))
        how, plan = by_time(replace(request, jitter=(jitter, jitter)), problem)
        assert plan is not None
        cells = [f"{100 * one.saving:.2f} %, {100 * one.slowdown:+.2f} %" for one in map(replayer.under, (means, plan))]
        print(f"{100 * jitter:g} % | {cells[0]} | {100 * how.margin:g} %, {how.max_changes} | {cells[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, nargs="?")
    parser.add_argument("--blocking-power", type=float, default=70.0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("--iterations", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.chosen:
        chosen()
        return
    if not arguments.run:
        simulated(arguments)
        return
    ways = ("instruction", "graph", "off")
    found = {way: run(way, arguments.iterations) for way in ways}
    full_s, full_j, _ = found["off"]
    for way in ways:
        time_s, energy_j, promised = found[way]
        print(
            f"{way:>12}: {time_s:.4f} s ({100 * (time_s / full_s - 1):+.2f} %), {energy_j:.1f} J, "
            f"saves {100 * (1 - energy_j / full_j):.2f} %, by the plan {100 * promised:.2f} %"
        )


if __name__ == "__main__":
    main()
