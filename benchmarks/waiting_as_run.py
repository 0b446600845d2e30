"""What waiting at lower clocks saves as run: the same job with and without, on emulated GPUs, at the same time.

    python benchmarks/waiting_as_run.py [--job 4x8] [--job 8x12] [--job 8x96] [--iterations 30]
    python benchmarks/waiting_as_run.py --straggler 1.2 [--job 4x8] [--job 8x12] [--margin 0.04]

Each job is ranks as threads with real sessions, helper and planner processes (`tests/one_job.py`) that load the
emulated A100's own profile of uneven stages. Three run, side by side: with `lower_while_waiting`,
without it, and without the plugin. Energies are the emulated GPUs' exact integrals over iterations under the plan, all
GPUs together, against the job without the plugin. With `--straggler` there is a second pipeline whose ranks are all so
many times as slow, and are reported once there is a plan; energies are then of the first pipeline, which waits for it.
Figures are medians over iterations, as whatever else runs on the machine disturbs single ones.
Predicted is what the job itself said: its replay of measured iterations, and for a straggler the answer to it.
A job chooses its margin by its own iterations; `--margin` is the least one of both, so that jobs which a busy machine
disturbs differently still differ by their waits alone. With `--in-turn` jobs run one after another: many ranks at once
would hold each other up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.waiting_clocks import LARGE_S, SMALL_S, emulated
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.leader.job_socket import ask
from perseus_plugin.planning.options import build_problem
from perseus_plugin.profiling.profile import save_profile
from tests.one_job import OneJob, Ran, Step

SCALES = {"4x8": 1.0, "8x12": 0.6, "8x96": 0.35}
"""Of the times of `waiting_clocks.py`, by stages x microbatches, so that a job ends in some minutes."""
WAYS = ("with", "without", "off")
_PLAIN = 20  # iterations without the plugin, the first of which are not counted: other processes start meanwhile


def one(job: str, way: str, straggler: float, iterations: int, margin: float) -> dict[str, Any]:
    """Run one of them, and return its figures."""
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    stages, microbatches = map(int, job.split("x"))
    times_s = times(job)
    with tempfile.TemporaryDirectory() as name:
        folder, profile = Path(name) / "job", Path(name) / "profile.csv"
        save_profile(emulated(times_s), profile)
        block: dict[str, Any] = {
            "profiling": {"load": str(profile), "warmup_steps": 2, "steps_per_clock": 6},
            "lower_while_waiting": way == "with",
            "margin": margin,
            "stragglers": {"detect": False, "min_interval_s": 0.0},
            "frontier": False,
            "log_level": "warning",
        }
        plugin = None if way == "off" else block
        over = iter([False] * (_PLAIN - 1) + [True]) if way == "off" else _over(folder, straggler, stages, iterations)
        events = folder / "events.jsonl"

        def slow(rank: int, iteration: int) -> float:
            return straggler if rank >= stages and (way == "off" or (folder / "plan.json").exists()) else 1.0

        ran = OneJob(
            folder,
            [Step((1.0,) * microbatches)] * 10_000,
            forward_s=times_s["forward"],
            backward_s=times_s["backward"],
            replicas=2 if straggler > 1 else 1,
            plugin=plugin,
            slow=slow,
            until=lambda: next(over),
        ).run()
        written = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        return figures(job, ran, way, straggler, written)


def _over(folder: Path, straggler: float, stages: int, iterations: int) -> Iterator[bool]:
    """Whether a job is over, asked after each iteration: so many after what is looked at has begun.

    A straggler is reported here, once there is a plan.
    """
    while not (folder / "plan.json").exists():
        yield False
    for rank in range(stages, 2 * stages) if straggler > 1 else ():
        ask(folder, {"do": "report", "report": {"rank": rank, "slowdown": straggler, "source": "benchmark"}})
    for number in count():
        yield number >= iterations


def figures(job: str, ran: Ran, way: str, straggler: float, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the iterations that are looked at, and what the job predicted."""
    state = "straggler" if straggler > 1 else "plan"
    numbers = [number for number, one in enumerate(ran.states) if one == state]
    if straggler > 1:
        numbers = numbers[2:]  # as the pace of the first is not yet everybody's
    if way == "off":
        numbers = list(range(5, len(ran.times_s)))
    told: dict[str, Any] = {
        "iterations": len(numbers),
        "time_s": statistics.median(ran.times_s[number] for number in numbers),
        "energy_j": statistics.median(ran.by_replica_j[number][0] for number in numbers),
        "states": {one: ran.states.count(one) for one in dict.fromkeys(ran.states)},
    }
    if way != "off":
        summary = ran.summary
        told |= {one: summary[one] for one in ("waiting", "plan", "overhead", "catching_up", "beside")}
        told["predicted_j"] = summary["energy_j"]["predicted"]
        told["predicted_full_j"] = summary["energy_j"]["full_clock"]
    replans = [event for event in events if event["event"] == "replan"]
    if replans:
        told["predicted_j"] = next(one["energy_j"] for one in replans[-1]["variants"] if max(one["slowdown"]) == 1)
        told["predicted_full_j"] = _full_j(job, replans[-1]["pace_s"])
    return told


def _full_j(job: str, pace_s: float) -> float:
    """Energy of one pipeline that runs at full clocks and then waits, as a plan would predict it."""
    stages, microbatches = map(int, job.split("x"))
    graph = build_graph(one_f_one_b(stages, microbatches))
    return build_problem(graph, emulated(times(job)), 0.0).full_clock_energy_until_j(pace_s)


def times(job: str) -> dict[str, tuple[float, ...]]:
    """Full-clock times per stage."""
    usual: Mapping[str, tuple[float, ...]] = SMALL_S if job.startswith("4x") else LARGE_S
    return {kind: tuple(SCALES[job] * t for t in per_stage) for kind, per_stage in usual.items()}


def row(job: str, ran: dict[str, dict[str, Any]]) -> str:
    """A line of the table."""
    off, columns, points = ran["off"], [], []
    for way in ("without", "with"):
        one = ran[way]
        shares = 100 * (1 - one["predicted_j"] / one["predicted_full_j"]), 100 * (1 - one["energy_j"] / off["energy_j"])
        points.append(shares)
        columns += [f"{share:.2f}" for share in shares] + [f"{100 * (one['time_s'] / off['time_s'] - 1):+.2f}"]
    columns += [f"{after - before:+.2f}" for before, after in zip(*points, strict=True)]
    waits = ran["with"]["waiting"]
    columns.append(f"{waits['lowered_waits'] / max(1, waits['planned_waits']):.0%}")
    return " | ".join([f"| {job}", *columns]) + f" | {ran['with']['iterations']} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=SCALES, action="append")
    parser.add_argument("--straggler", type=float, default=1.0)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    jobs = given.job or list(SCALES)
    if given.one is not None:
        print(json.dumps(one(jobs[0], given.one, given.straggler, given.iterations, given.margin)))
        return
    print(
        "| job | without: predicted, % | as run | time | with: predicted | as run | time | points predicted | as run |",
        end="",
    )
    print(" waits lowered | iterations |\n" + "|---" * 11 + "|", flush=True)
    for job in jobs:

        def started(way: str, job: str = job) -> dict[str, Any]:
            more = ["--job", job, "--straggler", str(given.straggler), "--iterations", str(given.iterations)]
            more += ["--margin", str(given.margin)]
            command = [sys.executable, __file__, "--one", way, *more]
            told: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            return told

        with ThreadPoolExecutor(1 if given.in_turn else len(WAYS)) as pool:
            ran = dict(zip(WAYS, pool.map(started, WAYS), strict=True))
            print(json.dumps(ran), file=sys.stderr)
            print(row(job, ran), flush=True)


if __name__ == "__main__":
    main()
