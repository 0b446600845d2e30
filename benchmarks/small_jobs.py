"""Plans of random tiny jobs beside the best of all choices of clocks, for every target.

    python benchmarks/small_jobs.py [--jobs 200] [--seed 1] [--effort quick --effort normal]

A job is *missed* where its plan is more than 0.1 % worse than the best: more energy for a deadline, a straggler and
the energy minimum, more time for an energy or a power budget, a higher cost for money. Jobs have up to 60,000 choices
of clocks.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.schedules import gpipe, one_f_one_b
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.planning.replay import finishes
from perseus_plugin.planning.targets import EFFORTS, Effort, Prices
from perseus_plugin.profiling.profile import Measurement, Profile

MOST_CHOICES = 60_000
MISSED = 1e-3
SAME = 1e-9
PRICES = Prices(per_kwh=0.1, per_gpu_hour=2.0)


@dataclass(frozen=True)
class Tiny:
    """A job with all that its choices of clocks take.

    Attributes:
        planner: a fresh one.
        time_s, energy_j: shape (choices,), blocking until the end included.
    """

    planner: Planner
    time_s: FloatArray
    energy_j: FloatArray


def tiny_jobs(count: int, seed: int) -> Iterator[Tiny]:
    """Random jobs small enough to try everything."""
    random = np.random.default_rng(seed)
    while count:
        stages, microbatches = int(random.integers(1, 4)), int(random.integers(1, 4))
        streams = (one_f_one_b if random.random() < 0.7 else gpipe)(stages, microbatches)
        table = {}
        for stage in range(stages):
            clocks = sorted(random.choice(np.arange(300, 1500, 15), int(random.integers(2, 6)), replace=False))[::-1]
            for kind in ("forward", "backward"):
                base_s, watts, share = random.uniform(0.01, 2), random.uniform(100, 400), random.uniform(0.2, 1)
                rows = []
                for clock in clocks:
                    relative = clock / clocks[0]
                    seconds = base_s * (share / relative + 1 - share) * random.uniform(0.97, 1.03)
                    power_w = watts * (0.3 + 0.7 * relative**3) * random.uniform(0.97, 1.03)
                    rows.append(Measurement(int(clock), seconds, power_w * seconds))
                table[stage, kind] = tuple(rows)
        blocking_w = random.uniform(0, 90, stages).tolist()
        graph = build_graph(streams)
        planner = Planner(graph, Profile(table), blocking_power_w=blocking_w)
        problem = planner.problem
        options = [len(problem.measured[k]) for k in problem.class_of[problem.instruction_nodes].tolist()]
        if np.prod(options) > MOST_CHOICES:
            continue
        count -= 1
        yield _tried(planner)


def _tried(planner: Planner) -> Tiny:
    problem = planner.problem
    nodes = problem.instruction_nodes
    rows = [list(problem.measured[k].values()) for k in problem.class_of[nodes].tolist()]
    choices = np.array(list(itertools.product(*(range(len(one)) for one in rows)))).T
    durations_s = np.repeat(problem.graph.constant_s[:, None], choices.shape[1], axis=1)
    effective_j = np.zeros(choices.shape[1])
    for node, one, chosen in zip(nodes.tolist(), rows, choices, strict=True):
        table = np.array(one)
        durations_s[node] = table[chosen, 0]
        effective_j += table[chosen, 1]
    time_s = finishes(problem.graph, durations_s).max(axis=0)
    return Tiny(planner, time_s, effective_j + problem.total_blocking_w * time_s)


def measures(job: Tiny, random: np.random.Generator) -> Iterator[tuple[str, Target, float, int]]:
    """Every target with the best that can be had, and what of a plan that is: energy (0), time (1) or cost (2)."""
    problem = job.planner.problem
    full_s, blocking_w = problem.full_clock_time_s, problem.total_blocking_w
    for name, slowdown in (("slowdown 0", 0.0), ("slowdown", random.uniform(0, 0.6))):
        best_j = job.energy_j[job.time_s <= full_s * (1 + slowdown) * (1 + SAME)].min()
        yield name, Target.slowdown(slowdown), float(best_j), 0
    until_s = full_s * random.uniform(1, 2)
    in_time = job.time_s <= until_s * (1 + SAME)
    waited_j = job.energy_j[in_time] + blocking_w * (until_s - job.time_s[in_time])
    yield "straggler", Target.straggler(until_s), float(waited_j.min()), 0
    yield "cheapest", Target.cheapest(), float(job.energy_j.min()), 0
    most_j = float(job.energy_j[job.time_s.argmin()])
    budget_j = job.energy_j.min() + random.uniform(0.001, 1) * (most_j - job.energy_j.min())
    yield "energy budget", Target.energy_budget(budget_j), float(job.time_s[job.energy_j <= budget_j].min()), 1
    full_w, least_w = problem.full_clock_energy_j / full_s, float((job.energy_j / job.time_s).min())
    budget_w = least_w + random.uniform(0.001, 1) * (full_w - least_w)
    within_s = job.time_s[job.energy_j <= budget_w * job.time_s]
    yield "power budget", Target.power_budget(budget_w), float(within_s.min()), 1
    cost_j = job.energy_j + PRICES.gpu_w * problem.graph.stages * job.time_s
    yield "money", Target.money(PRICES), float(cost_j.min()), 2


def _of(plan: Plan, which: int, stages: int) -> float:
    cost_j = plan.energy_j + PRICES.gpu_w * stages * plan.iteration_time_s
    return (plan.energy_j, plan.iteration_time_s, cost_j)[which]


def main() -> None:
    """Parse the command line, plan and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--effort", choices=EFFORTS, action="append", default=[])
    arguments = parser.parse_args()
    jobs = list(tiny_jobs(arguments.jobs, arguments.seed))
    efforts: list[Effort] = arguments.effort or ["quick", "normal"]
    print(f"{len(jobs)} jobs; worse than the best of all choices by more than {MISSED:.1%}")
    print("effort   target         missed   no plan   worst     CPU s per plan")
    for effort in efforts:
        random = np.random.default_rng(arguments.seed)
        worse: dict[str, list[float]] = {}
        spent_s: dict[str, float] = {}
        for job in jobs:
            problem = job.planner.problem
            for name, target, best, which in measures(job, random):
                planner, begin_s = Planner.of(problem), time.process_time()
                try:
                    got = _of(planner.plan(target, effort=effort), which, problem.graph.stages)
                except PlanError:
                    got = np.inf
                spent_s[name] = spent_s.get(name, 0.0) + time.process_time() - begin_s
                worse.setdefault(name, []).append(got / best - 1)
        for name, shares in worse.items():
            found = [share for share in shares if np.isfinite(share)]
            missed = sum(share > MISSED for share in found)
            print(
                f"{effort:8} {name:14} {missed / len(jobs):6.1%}   {len(shares) - len(found):7}   "
                f"{max(found):7.3%}   {spent_s[name] / len(jobs):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
