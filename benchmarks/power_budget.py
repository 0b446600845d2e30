"""More training at the same power: measured plans against power limits, and our plans against one clock for all.

    python benchmarks/power_budget.py DATA [--only measured|plans] [--microbatches 24] [--effort quick]

DATA holds `sosp24-runs-a100` (`runs.csv`, see its README) and `sosp24` (the GPT-3 175B profiles). Two tables:

measured    real A100 GPUs: one power limit for all, and the fastest of the plans measured there that drew no more
plans       for each power that one clock for all draws, our fastest plan at that power, and the bound on any plan's
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.planner_quality import planner_for
from perseus_plugin.errors import PlanError
from perseus_plugin.planning.options import Assignment
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.targets import Effort

EVERY = 0.05  # share of full power from one row to the next


def measured(folder: Path) -> None:
    """Print the table of measured runs; medians of iterations, all GPUs of the job together."""
    ranks: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    with (folder / "runs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ranks[row["workload"], row["system"], int(row["plan"])].append(row)
    runs: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    for (workload, system, plan), rows in sorted(ranks.items()):
        if (system, plan) == ("perseus", 0):
            continue  # a cold start
        time_s = max(float(row["iteration_time_s"]) for row in rows)
        power_w = sum(float(row["iteration_energy_j"]) for row in rows) / time_s
        runs[workload, system].append((power_w / len(rows), time_s, rows[0]["power_limit_w"]))
    print("Measured on 4 A100: one power limit for all GPUs, and the fastest measured plan that drew no more\n")
    print("| workload | limit, W | drawn, W per GPU | iteration, s | plan: drawn, W | iteration, s | faster |")
    print("|---|---|---|---|---|---|---|")
    for workload in sorted({workload for workload, _ in runs}):
        limited = runs[workload, "zeus_global"]
        highest = max(float(limit) for *_, limit in limited)
        for power_w, time_s, limit in limited:
            within = [(t, w) for w, t, _ in runs[workload, "perseus"] if w <= power_w]
            if float(limit) == highest or not within:
                continue
            plan_s, plan_w = min(within)
            print(
                f"| {workload} | {limit} | {power_w:.1f} | {time_s:.2f} | {plan_w:.1f} | {plan_s:.2f} | "
                f"{time_s / plan_s - 1:+.1%} |"
            )


def one_clock(planner: Planner, clock_mhz: int) -> tuple[float, float]:
    """Time and power of an iteration with everything at this clock."""
    problem = planner.problem
    clocks = np.where(problem.graph.is_constant, 0, clock_mhz)
    time_s, watts = problem.at_clocks(clocks)
    relaxed = planner.relaxation.cheapest()
    run = planner.priced(relaxed, Assignment(clocks, time_s, float(time_s @ watts)), math.inf, ChangeLimits())
    return run.iteration_time_s, run.energy_j / run.iteration_time_s


def plans(data: Path, gpu: str, microbatches: int, effort: Effort) -> None:
    """Print the table of one GPU's profile."""
    planner = planner_for(data, gpu, microbatches)
    full = planner.plan(Target.full())
    print(f"\nGPT-3 175B on {gpu}, 8 stages, {microbatches} microbatches, one GPU per stage; effort {effort}:")
    print(f"{full.power_w:.0f} W at full clocks\n")
    print("| power | one clock, MHz | its iteration, s | plan, s | bound, s | above the bound | faster |")
    print("|---|---|---|---|---|---|---|")
    common = set.intersection(*(set(rows) for rows in planner.problem.measured))
    below = math.inf
    for clock in sorted(common, reverse=True):
        time_s, power_w = one_clock(planner, clock)
        share = power_w / full.power_w
        if share > below - EVERY and clock != min(common):
            continue
        below = share
        plan = planner.plan(Target.power_budget(power_w), effort=effort)
        assert plan.power is not None
        assert plan.power_w <= power_w * (1 + 1e-6)
        bound_s = plan.power.time_lower_bound_s
        print(
            f"| {share:.1%} | {clock} | {time_s:.3f} | {plan.iteration_time_s:.3f} | {bound_s:.3f} | "
            f"{plan.iteration_time_s / bound_s - 1:.2%} | {time_s / plan.iteration_time_s - 1:+.2%} |",
            flush=True,
        )
    try:
        planner.plan(Target.power_budget(0.05 * full.power_w))
    except PlanError as error:
        print(f"\n{error}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=["measured", "plans"])
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--effort", choices=["quick", "normal", "thorough"], default="quick")
    arguments = parser.parse_args()
    if arguments.only != "plans":
        measured(arguments.data / "sosp24-runs-a100")
    if arguments.only != "measured":
        for gpu in ("a100_sxm", "a40"):
            plans(arguments.data / "sosp24", gpu, arguments.microbatches, arguments.effort)


if __name__ == "__main__":
    main()
