"""A job whose sequence lengths vary, announced and not: iteration time and energy as run, against no plugin.

Pipelines of two stages as threads with real sessions, helper and planner processes, on emulated GPUs
(`tests/one_job.py`). The works of microbatches vary by a factor of three within every step. The same steps run three
times at the same time on the same machine, each job in a process of its own: announced, not announced, and without the
plugin. The profile is that of the emulated GPUs, so that nothing is swept.

    python benchmarks/announced_batches.py [--steps 180] [--scale 1.5]

Each iteration is compared with the one of the same batch without the plugin. All three jobs begin it together, so that
what else the machine does befalls all of them. In each process a thread that only sleeps sees stalls; iterations within
which one woke it late are left out of the second table, whatever they took. Compared are iterations from the first on
that ran under a plan for its own batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.planning.robust import error_of_mean
from perseus_plugin.profiling.profile import Measurement, Profile, save_profile
from perseus_plugin.reporting.record.iterations import OWN_BATCH
from tests.one_job import OneJob, Ran, Step

FORWARD_S, BACKWARD_S = (0.015, 0.021), (0.030, 0.042)  # of a work of 1
LEAST_WORK, MOST_WORK = 1.0, 3.0
CLOCKS_MHZ = (1410, 1335, 1260, 1185, 1110, 1035, 960, 885, 810)
NAMES = ("announced", "not announced", "without")
LOOK_S, STALL_S, WAIT_S = 0.002, 0.005, 300.0
HELD, NARROW = 0.002, 0.002  # what an iteration may be longer by, and how well the mean is to be known, as shares


@dataclass(frozen=True)
class Job:
    """One of the three, as its process is told of it."""

    name: str
    folder: Path
    steps: tuple[Step, ...]
    replicas: int
    ahead: int
    scale: float


@dataclass(frozen=True)
class Seen:
    """What a job did, when its iterations ended, and the stalls in its process (begin and end)."""

    ran: Ran
    ends_s: list[float]
    stalls_s: list[tuple[float, float]]


def write_profile(path: Path, scale: float) -> None:
    """That of a microbatch of the mean work."""
    rows = []
    for kind, of_stage in (("forward", FORWARD_S), ("backward", BACKWARD_S)):
        load = load_class(kind)
        for stage, one_s in enumerate(of_stage):
            for clock in CLOCKS_MHZ:
                time_s = scale * one_s * (LEAST_WORK + MOST_WORK) / 2 * A100.stretch(load, clock)
                rows.append((stage, kind, Measurement(clock, time_s, time_s * A100.power_w(load, clock))))
    save_profile(Profile.from_rows(rows), path)


def run(job: Job, together: Barrier, answers: multiprocessing.SimpleQueue[tuple[str, Seen]]) -> None:
    """Run one job; its iterations begin when those of the others do."""
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    ends_s, stalls_s = list[float](), list[tuple[float, float]]()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            begin_s = time.monotonic()
            time.sleep(LOOK_S)
            end_s = time.monotonic()
            if end_s - begin_s - LOOK_S > STALL_S:
                stalls_s.append((begin_s, end_s))

    def ended() -> bool:
        ends_s.append(time.monotonic())
        together.wait(WAIT_S)
        return False

    plugin: dict[str, Any] = {
        "profiling": {"load": str(job.folder / "profile.csv"), "blocking_power_w": A100.blocking_w, "warmup_steps": 2},
        "frontier": False,
        "log_level": "info",
    }

    def works(step: Step, replica: int) -> list[float]:
        return [1000 * size for size in step.of(replica)]

    one = OneJob(
        job.folder / job.name.replace(" ", "_"),
        job.steps,
        forward_s=[job.scale * each for each in FORWARD_S],
        backward_s=[job.scale * each for each in BACKWARD_S],
        replicas=job.replicas,
        plugin=None if job.name == "without" else plugin,
        until=ended,
        announced=works if job.name == "announced" else None,
        ahead=job.ahead,
    )
    looking = threading.Thread(target=look)
    looking.start()
    try:
        ran = one.run()
    except BaseException:
        together.abort()
        raise
    finally:
        over.set()
        looking.join()
    answers.put((job.name, Seen(ran, ends_s, stalls_s)))


def against(ran: Ran, other: Ran, which: list[int]) -> list[tuple[float, float]]:
    """Time and energy of these iterations against the same ones of another job, as shares, with 95 % errors."""
    said = []
    for mine, theirs in ((ran.times_s, other.times_s), (ran.energies_j, other.energies_j)):
        given, usual = (np.array([values[i] for i in which]) for values in (mine, theirs))
        share = given.sum() / usual.sum() - 1
        said.append((float(share), error_of_mean(usual / usual.mean() * (given / usual - 1 - share))))
    return said


def table(seen: dict[str, Seen], which: list[int]) -> tuple[float, float]:
    """Print it; returns the announced job's time against the one that is not announced, and its error."""
    announced, usual, without = (seen[name].ran for name in NAMES)
    told = {
        "announced, against no plugin": against(announced, without, which),
        "not announced, against no plugin": against(usual, without, which),
        "announced, against not announced": against(announced, usual, which),
    }
    iteration_s = sum(without.times_s[i] for i in which) / len(which)
    print(f"\n| iterations of {iteration_s:.2f} s | time | energy |\n|---|---|---|")
    for name, figures in told.items():
        said = [f"{100 * share:+.2f} +- {100 * error:.2f}" for share, error in figures]
        print(f"| {name} | {' | '.join(said)} |")
    return told["announced, against not announced"][0]


def stalled(seen: dict[str, Seen]) -> set[int]:
    """Iterations within which a thread that only sleeps was woken late."""
    stalls_s = np.array(sorted(stall for one in seen.values() for stall in one.stalls_s)).reshape(-1, 2)
    found = set()
    for one in seen.values():
        for number, (end_s, took_s) in enumerate(zip(one.ends_s, one.ran.times_s, strict=True)):
            if np.any((stalls_s[:, 0] < end_s) & (stalls_s[:, 1] > end_s - took_s)):
                found.add(number)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--ahead", type=int, default=6)
    parser.add_argument("--scale", type=float, default=1.5, help="of all times")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)

    def sizes() -> tuple[float, ...]:
        return tuple(draw.uniform(LEAST_WORK, MOST_WORK) for _ in range(options.microbatches))

    steps = tuple(Step(tuple(sizes() for _ in range(options.replicas))) for _ in range(options.steps))
    fresh = multiprocessing.get_context("spawn")
    together, answers = fresh.Barrier(len(NAMES)), fresh.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        write_profile(Path(folder) / "profile.csv", options.scale)
        jobs = [Job(name, Path(folder), steps, options.replicas, options.ahead, options.scale) for name in NAMES]
        processes = [fresh.Process(target=run, args=(job, together, answers)) for job in jobs]
        for process in processes:
            process.start()
        seen: dict[str, Seen] = {}
        while len(seen) < len(NAMES) and (any(one.is_alive() for one in processes) or not answers.empty()):
            if answers.empty():
                time.sleep(0.1)
            else:
                name, of_one = answers.get()
                seen[name] = of_one
        for process in processes:
            process.join()
    if len(seen) < len(NAMES):
        sys.exit("a job failed; see above")
    announced, usual = seen["announced"].ran, seen["not announced"].ran
    own = [i for i, state in enumerate(announced.states) if state == OWN_BATCH]
    which = [
        i
        for i in range(own[0] if own else options.steps, options.steps)
        if announced.states[i] in ("plan", OWN_BATCH) and usual.states[i] == "plan"
    ]
    print(f"\n{len(which)} iterations, {len({*own} & {*which})} of them under plans of their own")
    print(announced.summary["batches"])
    if len(which) < 2:
        print(f"states: {announced.states}\n{usual.states}")
        return
    table(seen, which)
    apart = stalled(seen)
    calm = [number for number in which if number not in apart]
    print(f"\nwithout the {len(which) - len(calm)} in which a thread that only sleeps woke {1000 * STALL_S:g} ms late:")
    if len(calm) < 2:
        print("none is left: the machine is too busy")
        return
    share, error = table(seen, calm)
    narrow = "yes" if error < NARROW else "no"
    held = "yes" if share + error <= HELD else "no" if share - error > HELD else "not known"
    print(f"\ntime known to {100 * NARROW:g} %: {narrow}; at {100 * HELD:+g} % at most: {held}")


if __name__ == "__main__":
    main()
