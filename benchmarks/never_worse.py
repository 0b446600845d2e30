"""Whether more time, more effort and more clocks are ever worse, on the published profiles with few of their clocks.

    python benchmarks/never_worse.py DATA [--gpu a40] [--microbatches 24] [--effort quick]
    python benchmarks/never_worse.py --jobs 300 --most 64 [--effort normal]

DATA holds the profiles. Without it jobs are random, of at most so many instructions: schedules, powers, times with or
without bumps, two to sixteen clocks. Every plan is made by a planner of its own, which knows of no other plan. The
fewer clocks there are, the coarser is the puzzle that rounding and searching leave, and the likelier that more of
something ends in a worse plan. Printed is the energy of each plan above the least of all that had less: less time, less
effort, or a part of the clocks. Above 0 is worse. Of random jobs only what is worse is printed; each is planned for
eight or nine slowdowns, some of them near each other, for the least energy, and with half of its clocks. Counted, too,
are the shorter deadlines, `APART` of each other, of which no lower bound says that none of their plans is better: a
plan is sure to be no worse than theirs only if all of those have been searched for its sake.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.schedules import early_recomputation_1f1b, gpipe, interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.planner import Effort, Planner, Target
from perseus_plugin.planning.targets import EFFORTS
from perseus_plugin.profiling.profile import Measurement, Profile, load_profile

BLOCKING_W = {"a100_sxm": 83.64, "a40": 70.38}
SLOWDOWNS = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12)
SHARES = (0.12, 0.25, 0.5, 0.9)
SAME = 1e-9
APART = ((0.005, 0.0005), (0.02, 0.001), (float("inf"), 0.0025))  # slowdowns, up to how much of it


def thinned(profile: Profile, share: float, seed: int) -> Profile:
    """With the highest clock and that share of the others of each stage; what a smaller share keeps is kept."""
    table = {}
    for (stage, kind), rows in profile.table.items():
        order = random.Random(f"{seed} {stage}").sample(range(1, len(rows)), len(rows) - 1)
        kept = {0, *order[: max(1, round(share * len(order)))]}
        table[stage, kind] = tuple(row for number, row in enumerate(rows) if number in kept)
    return Profile(table)


def energies(profile: Profile, gpu: str, microbatches: int, effort: Effort) -> Iterator[float]:
    """Of the plan for each slowdown."""
    for slowdown in SLOWDOWNS:
        graph = build_graph(one_f_one_b(8, microbatches))
        planner = Planner(graph, profile, blocking_power_w=BLOCKING_W[gpu], schedule="1f1b")
        yield planner.plan(Target.slowdown(slowdown), effort=effort).energy_j


def random_planners(number: int, most: int) -> tuple[Callable[[bool], Planner], random.Random]:
    """A function that makes new planners for a job, with half of its clocks or all, and the job's random numbers.

    The job has at most so many instructions, and more than a quarter of them.
    """
    drawn = random.Random(f"{number} {most}")
    while True:
        stages, microbatches = drawn.randint(1, 8), drawn.randint(1, 24)
        made = drawn.choice([one_f_one_b, gpipe, early_recomputation_1f1b, None])
        if made is None:
            streams = interleaved_1f1b(1 + stages, (1 + stages) * (1 + microbatches // 8), chunks=2)
        else:
            streams = made(stages, microbatches)
        if most / 4 < sum(isinstance(op, Compute) for stream in streams for op in stream) <= most:
            break
    kinds = sorted({op.kind for stream in streams for op in stream if isinstance(op, Compute)})
    count, bumps = drawn.choice([2, 3, 4, 5, 8, 16]), drawn.choice([0.0, 0.01, 0.03, 0.08])
    spread, alike = drawn.choice([0.0, 0.05, 0.3]), drawn.random() < 0.5
    clocks, table = list[int](), {}
    for stage in range(len(streams)):
        if not alike or not clocks:
            clocks = [1400, *drawn.sample(range(400, 1400, 15), count - 1)]
        longer = 1 + spread * drawn.random()
        for kind in kinds:
            base_s = 0.05 * longer * (2 if kind == "backward" else 1) * drawn.uniform(0.99, 1.01)
            power_w, share, rows = drawn.uniform(200, 400), drawn.uniform(0.3, 1), []
            for relative in (clock / 1400 for clock in clocks):
                seconds = base_s * (share / relative + 1 - share) * drawn.uniform(1 - bumps, 1 + bumps)
                watts = power_w * (0.3 + 0.7 * relative**3) * drawn.uniform(1 - bumps, 1 + bumps)
                rows.append(Measurement(round(1400 * relative), seconds, watts * seconds))
            table[stage, kind] = tuple(rows)
    # The highest clock is what full clocks are, and so what slowdowns are of.
    halved = {key: (rows[0], *rows[1::2]) for key, rows in table.items()}
    blocking_w = drawn.uniform(30, 90)

    def new(half: bool) -> Planner:
        return Planner(build_graph(streams), Profile(halved if half else table), blocking_power_w=blocking_w)

    return new, drawn


def shorter_than(slowdown: float) -> list[float]:
    """Slowdowns below one, rising."""
    found, one = list[float](), 0.0
    while one < slowdown - SAME:
        found.append(one)
        one += next(apart for up_to, apart in APART if one < up_to - SAME)
    return found


def not_excluded(planner: Planner, slowdown: float, energy_j: float) -> int:
    """Of how many shorter deadlines the lower bound is below the energy of a plan."""
    full_s = planner.problem.full_clock_time_s
    bounds = (planner.relaxation.solve(full_s * (1 + one)).bound_j for one in reversed(shorter_than(slowdown)))
    return sum(1 for _ in takewhile(lambda bound_j: bound_j < energy_j * (1 - SAME), bounds))


def worse_of_random(jobs: int, most: int, effort: Effort) -> None:
    """Print what is worse with more, of so many jobs, and how often."""
    plans, counts, worst, gaps = 0, dict.fromkeys(("time", "clocks", "effort"), 0), 0.0, 0.0
    left = list[int]()
    for number in range(jobs):
        new, drawn = random_planners(number, most)
        little, much = drawn.uniform(0, 0.05), drawn.uniform(0, 0.3)
        slowdowns = {0.0, little, little * 1.01, much, much + 0.0005, *drawn.sample(SLOWDOWNS[1:], 4)}
        found = list[float]()
        for slowdown in (*sorted(slowdowns), None):
            target = Target.cheapest() if slowdown is None else Target.slowdown(slowdown)
            planner = new(False)
            plan = planner.plan(target, effort=effort)
            if slowdown is not None:
                left.append(not_excluded(planner, slowdown, plan.energy_j))
            less = {"time": found}
            if slowdown in (little, much):
                with suppress(PlanError):  # with half of the clocks there may be no plan for that time
                    less["clocks"] = [new(True).plan(Target.deadline(plan.deadline_s), effort=effort).energy_j]
                lower = EFFORTS[max(0, EFFORTS.index(effort) - 1)]
                less["effort"] = [new(False).plan(target, effort=lower).energy_j]
            for kind, energies_j in less.items():
                above = plan.energy_j / min(energies_j, default=plan.energy_j) - 1
                worst = max(worst, above)
                if above > SAME:
                    counts[kind] += 1
                    at = "least energy" if slowdown is None else f"slowdown {slowdown:.4%}"
                    print(f"job {number}, more {kind}, {at}: {above:+.4%} (gap {plan.gap:.3%})", flush=True)
            found.append(plan.energy_j)
            plans, gaps = plans + 1, gaps + plan.gap
    told = ", ".join(f"{count} with more {kind}" for kind, count in counts.items())
    print(f"{jobs} jobs, {plans} plans, mean gap {gaps / plans:.3%}; worse: {told}; the worst: {worst:+.4%}")
    print(f"shorter deadlines that are not excluded: {sum(left) / len(left):.1f} a plan, {max(left)} at most")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with the published profiles")
    parser.add_argument("--jobs", type=int, default=300, help="so many random ones, without DATA")
    parser.add_argument(
        "--most", type=int, default=64, help="instructions of a random job; it has more than a quarter of them"
    )
    parser.add_argument("--gpu", choices=BLOCKING_W, action="append", help="only this one")
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--effort", choices=EFFORTS, default="quick", help="the highest one")
    parser.add_argument("--seed", type=int, default=0, help="of the clocks that are left out")
    arguments = parser.parse_args()
    if arguments.data is None:
        worse_of_random(arguments.jobs, arguments.most, arguments.effort)
        return
    print("gpu       clocks  effort  " + "".join(f"{slowdown:>8.1%}" for slowdown in SLOWDOWNS))
    worst = 0.0
    for gpu in arguments.gpu or BLOCKING_W:
        measured = load_profile(arguments.data / f"gpt3-175b-{gpu}.csv").scaled(10.0)
        fewer: dict[Effort, list[float]] = {}
        for share in SHARES:
            profile = thinned(measured, share, arguments.seed)
            for number in range(EFFORTS.index(arguments.effort) + 1):
                effort = EFFORTS[number]
                least, row = float("inf"), []
                for place, energy_j in enumerate(energies(profile, gpu, arguments.microbatches, effort)):
                    before = [least, *([fewer[effort][place]] if effort in fewer else [])]
                    row.append(energy_j)
                    above = energy_j / min(before) - 1
                    worst = max(worst, above if min(before) < float("inf") else 0.0)
                    told = "" if min(before) == float("inf") else f"{above:+.3%}"
                    print(f"{gpu:8}  {share:6.0%}  {effort:6}  " * (place == 0) + f"{told:>8}", end="", flush=True)
                    least = min(least, energy_j)
                print()
                fewer[effort] = row
    print(f"the worst: {worst:+.3%}")


if __name__ == "__main__":
    main()
