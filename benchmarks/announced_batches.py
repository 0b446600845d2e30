"""A job whose sequence lengths vary, announced and not: iteration time and energy as run, against no plugin.

Pipelines of two stages as threads with real sessions, helper and planner processes, on emulated GPUs
(`tests/one_job.py`). The works of microbatches vary by a factor of three within every step. The same steps run three
times at the same time on the same machine: announced, not announced, and without the plugin. Compared are iterations
from the first on that ran under a plan for its own batch.

    python benchmarks/announced_batches.py [--replicas 2] [--steps 300]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from perseus_plugin.planning.robust import error_of_mean
from perseus_plugin.reporting.record.iterations import OWN_BATCH
from tests.one_job import OneJob, Ran, Step

PLUGIN = {
    "profiling": {"warmup_steps": 2, "clocks_mhz": [1410, 1260, 1110, 960, 810], "steps_per_clock": 8, "seed": 1},
    "frontier": False,
    "log_level": "info",
}
FORWARD_S, BACKWARD_S = (0.015, 0.021), (0.030, 0.042)  # of a work of 1; works are from 1 to 3


def against(ran: Ran, plain: Ran, which: list[int]) -> str:
    """Time and energy of these iterations against the same ones without the plugin, in percent, with 95 % errors."""
    said = []
    for mine, theirs in ((ran.times_s, plain.times_s), (ran.energies_j, plain.energies_j)):
        given, usual = (np.array([values[i] for i in which]) for values in (mine, theirs))
        share = given.sum() / usual.sum() - 1
        error = error_of_mean(usual / usual.mean() * (given / usual - 1 - share))
        said.append(f"{100 * share:+.2f} +- {100 * error:.2f}")
    return " | ".join(said)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ahead", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="of all times")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    draw = random.Random(options.seed)

    def sizes() -> tuple[float, ...]:
        return tuple(draw.uniform(1.0, 3.0) for _ in range(options.microbatches))

    work = [Step(tuple(sizes() for _ in range(options.replicas))) for _ in range(options.steps)]
    times = {
        "forward_s": [options.scale * one for one in FORWARD_S],
        "backward_s": [options.scale * one for one in BACKWARD_S],
    }
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            "announced": OneJob(
                Path(folder) / "announced",
                work,
                replicas=options.replicas,
                plugin=PLUGIN,
                announced=lambda step, replica: [1000 * size for size in step.of(replica)],
                ahead=options.ahead,
                **times,
            ),
            "not announced": OneJob(Path(folder) / "not", work, replicas=options.replicas, plugin=PLUGIN, **times),
            "without": OneJob(Path(folder) / "without", work, replicas=options.replicas, **times),
        }
        threads = [threading.Thread(target=job.run) for job in jobs.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    announced, plain = jobs["announced"].ran, jobs["without"].ran
    batches = announced.summary["batches"]
    own = [i for i, state in enumerate(announced.states) if state == OWN_BATCH]
    which = [
        i
        for i in range(own[0] if own else options.steps, options.steps)
        if announced.states[i] in ("plan", OWN_BATCH) and jobs["not announced"].ran.states[i] == "plan"
    ]
    print(f"\n{len(which)} iterations, {len({*own} & {*which})} of them under plans of their own")
    if not which:
        print(f"states: {announced.states}\n{batches}")
        return
    print(f"{batches}\n\n| job | time | energy |\n|---|---|---|")
    for name in ("announced", "not announced"):
        print(f"| {name} | {against(jobs[name].ran, plain, which)} |")


if __name__ == "__main__":
    main()
