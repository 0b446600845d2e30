"""Time and memory for large jobs: more stages and microbatches than the published profiles have.

    python benchmarks/planner_large.py DATA --size 16x256 --size 64x512 [--slowdown 0.05]
    python benchmarks/planner_large.py DATA --size 8x144 --chunks 8 --pair-ms 15 [--dwell-ms 20]

DATA holds `gpt3-175b-a100_sxm.csv`. All stages but the last have the rows of its first stage, slowed by up to a
tenth at random (seeded); the last stage has those of its last. With `--pair-ms` a forward and a backward of the first
stage take so long together at full clocks.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from pathlib import Path

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD
from perseus_plugin.iteration.schedules import interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.profiling.profile import Profile, load_profile


def widened(profile: Profile, stages: int) -> Profile:
    """The profile with this many stages."""
    chance = random.Random(0)
    last = profile.stages - 1
    table = {}
    for stage in range(stages):
        factor = 1.0 if stage == stages - 1 else chance.uniform(0.9, 1.0)
        for kind in profile.kinds:
            rows = profile.table[last if stage == stages - 1 else 0, kind]
            table[stage, kind] = tuple(m.scaled(factor) for m in rows)
    return Profile(table)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the published profiles")
    parser.add_argument("--size", action="append", help="STAGESxMICROBATCHES, may be repeated (default: 16x256)")
    parser.add_argument("--chunks", type=int, default=1, help="of each stage, interleaved")
    parser.add_argument("--slowdown", type=float, default=0.0)
    parser.add_argument("--dwell-ms", type=float, default=0.0, help="shortest time between two clock changes")
    parser.add_argument(
        "--pair-ms", type=float, help="a forward and a backward together (default: as profiled, times 10)"
    )
    arguments = parser.parse_args()
    profile = load_profile(arguments.data / "gpt3-175b-a100_sxm.csv")
    pair_s = sum(profile.table[0, kind][0].time_s for kind in (FORWARD, BACKWARD))
    profile = profile.scaled(10 if arguments.pair_ms is None else arguments.pair_ms / 1000 / pair_s)
    for size in arguments.size or ["16x256"]:
        stages, microbatches = (int(part) for part in size.split("x"))
        chosen = widened(profile, stages)
        wall, cpu = time.perf_counter(), time.process_time()
        chunks = arguments.chunks
        streams = interleaved_1f1b(stages, microbatches, chunks) if chunks > 1 else one_f_one_b(stages, microbatches)
        graph = build_graph(streams)
        graph_s = time.perf_counter() - wall
        planner = Planner(graph, chosen, blocking_power_w=83.64)
        limits = ChangeLimits(None, arguments.dwell_ms / 1000)
        plan = planner.to_plan(planner.solve(Target.slowdown(arguments.slowdown), limits, search=False))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(
            f"{size}, slowdown {arguments.slowdown}: {len(graph)} instructions; graph {graph_s:.2f} s; graph and plan "
            f"{wall:.2f} s wall, {cpu:.2f} s CPU, {memory:.2f} GiB; saving {plan.saving:.2%}, gap {plan.gap:.3%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
