"""Jobs whose steps vary: iteration time and energy under the plans against full clocks on the same work.

Each job has two stages as threads with real sessions, helper and planner processes, on emulated GPUs
(`tests/one_job.py`). The same work runs once more without the plugin, at the same time on the same machine. Compared
are the iterations under a plan with just those iterations of the other run: in all, and for the plan alone, which is
held against the references amid it. Percent; mean (lowest to highest) over seeds.

    python benchmarks/varying_jobs.py [--seeds 4] [--steps 220] [--parallel 4] [--scenario NAME]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.one_job import OneJob, Ran, Step

MICROBATCHES = 4
PLUGIN = {
    "profiling": {"warmup_steps": 2, "clocks_mhz": [1410, 1260, 1110, 960, 810], "steps_per_clock": 4},
    "frontier": False,
    "log_level": "warning",
}
TIMES: dict[str, tuple[float, float]] = {"forward_s": (0.030, 0.042), "backward_s": (0.060, 0.084)}


def even(number: int, draw: random.Random) -> Step:
    return Step((1.0,) * MICROBATCHES)


def buckets(number: int, draw: random.Random) -> Step:
    return Step((draw.choice((1.0, 1.3, 1.6)),) * MICROBATCHES)


def log_normal(number: int, draw: random.Random) -> Step:
    return Step((draw.lognormvariate(0.0, 0.2),) * MICROBATCHES)


def curriculum(number: int, draw: random.Random) -> Step:
    return Step((1.0 + min(number, 300) / 300,) * MICROBATCHES)


def loader(number: int, draw: random.Random) -> Step:
    return Step((1.0,) * MICROBATCHES, stall_s=0.3 if number % 3 == 0 else 0.0)


def counts(number: int, draw: random.Random) -> Step:
    return Step((1.0,) * draw.randint(2, 8))


SCENARIOS: dict[str, tuple[str, Callable[[int, random.Random], Step]]] = {
    "even": ("all steps alike", even),
    "buckets": ("step sizes 1, 1.3 or 1.6", buckets),
    "log-normal": ("step sizes log-normal, 20 %", log_normal),
    "curriculum": ("sizes double in 300 steps", curriculum),
    "loader": ("the loader stalls every third step", loader),
    "counts": ("2 to 8 microbatches", counts),
}


def one(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Run one job with and without the plugin, side by side."""
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    draw = random.Random(seed)
    work = [SCENARIOS[name][1](number, draw) for number in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        block = {**PLUGIN, "profiling": {**PLUGIN["profiling"], "seed": seed}}  # type: ignore[dict-item]
        with_it = OneJob(Path(folder) / "with", work, plugin=block, **TIMES)
        without = OneJob(Path(folder) / "without", work, **TIMES)
        other = threading.Thread(target=without.run)
        other.start()
        ran = with_it.run()
        other.join()
        return compared(ran, without.ran)


def compared(ran: Ran, plain: Ran) -> dict[str, Any]:
    """Figures of the iterations under plans: against the same iterations without the plugin, and of the plan alone.

    What the plan alone does is that difference less the one of the references amid it, which run at full clocks with
    the plugin.
    """
    planned = [number for number, state in enumerate(ran.states) if state == "plan"]
    references = [number for number, state in enumerate(ran.states) if state == "reference"]
    summary = ran.summary
    figures: dict[str, Any] = {
        "planned": len(planned),
        "dropped": (summary["plan"] or {}).get("dropped_plans", 0),
        "detections": summary["stragglers"]["detections"],
        "predicted": summary["predicted_between"]["saving_percent"],
        "as_run": summary["references"]["saving_percent"],
        "slower_as_run": summary["references"]["slowdown_percent"],
        "states": sorted(set(ran.states)),
    }
    if planned and references:
        for name, mine, theirs in (
            ("time", ran.times_s, plain.times_s),
            ("energy", ran.energies_j, plain.energies_j),
        ):
            under, full = (
                sum(mine[i] for i in which) / sum(theirs[i] for i in which) for which in (planned, references)
            )
            figures |= {f"{name}_in_all": 100 * (under - 1), f"{name}_of_the_plan": 100 * (under / full - 1)}
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one(options.scenario[0], options.one, options.steps)))
        return
    names = options.scenario or list(SCENARIOS)
    jobs = [(name, seed) for name in names for seed in range(options.seeds)]

    def start(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        command = [sys.executable, __file__, "--scenario", name, "--one", str(seed), "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return {"name": name, "seed": seed, **json.loads(done.stdout)}

    with ThreadPoolExecutor(options.parallel) as pool:
        results = list(pool.map(start, jobs))
    print("| job | planned | time in all | energy in all | time, plan | energy, plan | as predicted | dropped | slow |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        row([result for result in results if result["name"] == name], SCENARIOS[name][0], options.steps)
    print("\nBy job:")
    for result in results:
        print(json.dumps(result))


def row(results: list[dict[str, Any]], what: str, steps: int) -> None:
    """One line of the table: mean (lowest to highest) over seeds."""
    planned = [result for result in results if "time_in_all" in result]
    share = 100 * sum(result["planned"] for result in results) / (steps * len(results))
    inside = [
        result["predicted"][0] <= -result["energy_of_the_plan"] <= result["predicted"][1]
        for result in planned
        if result["predicted"] is not None
    ]
    columns = (f"{of}_{part}" for part in ("in_all", "of_the_plan") for of in ("time", "energy"))
    figures = " | ".join(spread([result[column] for result in planned]) for column in columns)
    dropped, seen = (sum(result[of] for result in results) for of in ("dropped", "detections"))
    print(f"| {what} | {share:.0f} % | {figures} | {sum(inside)} of {len(inside)} | {dropped} | {seen} |")


def spread(values: list[float]) -> str:
    """Mean and range, in percent."""
    if not values:
        return "-"
    return f"{sum(values) / len(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


if __name__ == "__main__":
    main()
