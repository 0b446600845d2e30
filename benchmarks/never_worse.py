"""Whether more time, more effort and more clocks are ever worse, on the published profiles with few of their clocks.

    python benchmarks/never_worse.py DATA [--gpu a40] [--microbatches 24] [--effort quick]

DATA holds the profiles. Every plan is made by a planner of its own, which knows of no other plan. The fewer clocks
there are, the coarser is the puzzle that rounding and searching leave, and the likelier that more of something ends in
a worse plan. Printed is the energy of each plan above the least of all that had less: less time, less effort, or a part
of the clocks. Above 0 is worse.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.planner import Effort, Planner, Target
from perseus_plugin.planning.targets import EFFORTS
from perseus_plugin.profiling.profile import Profile, load_profile

BLOCKING_W = {"a100_sxm": 83.64, "a40": 70.38}
SLOWDOWNS = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12)
SHARES = (0.12, 0.25, 0.5, 0.9)


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


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the published profiles")
    parser.add_argument("--gpu", choices=BLOCKING_W, action="append", help="only this one")
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--effort", choices=EFFORTS, default="quick", help="the highest one")
    parser.add_argument("--seed", type=int, default=0, help="of the clocks that are left out")
    arguments = parser.parse_args()
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
