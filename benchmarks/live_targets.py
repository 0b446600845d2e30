"""A running job whose target changes at random: how soon each change is in force on all ranks, and that none is lost.

Ranks are threads with real sessions, helper and planner processes, on emulated GPUs (`tests/one_job.py`); what is said
goes through the job's socket, as `perseus target` says it. Latency: iterations from the one that ran when it was said
to the first one under it.

    python benchmarks/live_targets.py [--changes 100] [--stages 4] [--seed 0] [--pause 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.live_targets import change_at_random


def main() -> None:
    """Run the job and print what came of the changes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=3.0, help="Seconds from one change to the next, at most.")
    chosen = parser.parse_args()
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    stages = chosen.stages
    forward_s = tuple(0.030 * (1 + 0.1 * (stage % 3)) for stage in range(stages))
    backward_s = tuple(2 * one for one in forward_s)
    with tempfile.TemporaryDirectory() as folder:
        changed = change_at_random(
            Path(folder) / "job",
            chosen.changes,
            seed=chosen.seed,
            pause_s=lambda draw: draw.uniform(0.0, chosen.pause),
            forward_s=forward_s,
            backward_s=backward_s,
        )
    states = Counter(outcome["state"] for outcome in changed.outcomes.values())
    ran = changed.by_rank
    apart = [number for number in ran[0] if len({of_rank.get(number) for of_rank in ran}) > 1]
    times_s = sorted(changed.ran.times_s)
    print(f"{stages} stages, {len(changed.ran.times_s)} iterations of {times_s[len(times_s) // 2]:.3f} s (median)")
    print(f"changes: {len(changed.said)} said, {len(changed.outcomes)} answered:", dict(states))
    print("iterations until in force:", dict(sorted(Counter(changed.latencies).items())))
    print(f"iterations that ranks ran as different things: {len(apart)} of {len(ran[0])}")
    print(f"switches that a rank heard of too late: {changed.summary['overhead']['late_switches']}")


if __name__ == "__main__":
    main()
