"""Our graph, forecasts and plans held against runs that were measured on real GPUs.

    python benchmarks/measured_runs.py DATA [--only times|forecast|plans|baselines]

DATA is a folder with `runs.csv` and `instructions.csv.gz` in the format of `tests/data/measured-runs/README.md`. Each
question prints one table:

times       iteration time of every plan: the measured durations of its instructions in our graph
forecast    time and energy of plans of which nothing but the clocks is given, learnt from a few others
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.measured_runs import LOAD, Row, Run, load_runs, of_clocks, smallest_with

LEARNT_FROM = 8
MOST_TRANSFER_S = 0.1
FloatArray = npt.NDArray[np.float64]
Key = tuple[int, str]  # stage and kind


def transfer_of(full: Run) -> float:
    """How long a transfer takes, by the run at full clocks alone: its iteration time tells one number."""
    return smallest_with(full.graph_s, full.time_s, MOST_TRANSFER_S)


def spread(errors: Sequence[float]) -> str:
    """Mean and largest size, in percent."""
    sizes = 100 * np.abs(errors)
    return f"{sizes.mean():.2f}, {sizes.max():.2f}"


# Iteration times.


def times(workloads: dict[str, list[Run]]) -> None:
    """Print the table of iteration times."""
    print("Iteration time from the measured durations, error in percent, mean and largest over the plans\n")
    print("| workload | plans | graph alone | and a constant | s | and a transfer | ms |")
    print("|---|---|---|---|---|---|---|")
    for workload, runs in workloads.items():
        full, plans = of_clocks(runs)
        end_s, transfer_s = full.time_s - full.graph_s(), transfer_of(full)
        alone = [run.graph_s() / run.time_s - 1 for run in plans]
        constant = [(run.graph_s() + end_s) / run.time_s - 1 for run in plans]
        transfers = [run.graph_s(transfer_s) / run.time_s - 1 for run in plans]
        cells = [spread(alone), spread(constant), f"{end_s:.2f}", spread(transfers), f"{1e3 * transfer_s:.1f}"]
        print(f"| {workload} | {len(plans)} | " + " | ".join(cells) + " |", flush=True)


# Times and energies by the clock.


@dataclass(frozen=True)
class Fitted:
    """What was learnt from some runs.

    Attributes:
        at: per (stage, kind), clocks in MHz and mean times there.
        first: per (stage, kind), how long the iteration's first one takes, over the others.
        loads_s: per stage, its loads in order.
        power: what `parts` is multiplied by, see `parts`.
    """

    at: dict[Key, tuple[FloatArray, FloatArray]]
    first: dict[Key, float]
    loads_s: tuple[tuple[float, ...], ...]
    power: FloatArray

    def time_s(self, key: Key, frequency_mhz: float | Sequence[float]) -> FloatArray:
        """Of an instruction: between the clocks that were run."""
        clocks, means = self.at[key]
        return np.asarray(np.interp(frequency_mhz, clocks, means), dtype=np.float64)

    def speed(self, key: Key, frequency_mhz: float | Sequence[float]) -> FloatArray:
        """Against that at the highest clock."""
        speeds: FloatArray = self.at[key][1][-1] / self.time_s(key, frequency_mhz)
        return speeds

    def forecast(self, run: Run) -> Run:
        """The run with times as its clocks say."""
        stages = []
        for stage, rows in enumerate(run.stages):
            seen: set[str] = set()
            loads = iter(self.loads_s[stage])
            told: list[Row] = []
            for row in rows:
                if row.kind == LOAD:
                    told.append(replace(row, time_s=next(loads)))
                    continue
                key = stage, row.kind
                factor = 1.0 if row.kind in seen else self.first[key]
                seen.add(row.kind)
                told.append(replace(row, time_s=factor * self.time_s(key, row.frequency_mhz).item()))
            stages.append(tuple(told))
        return replace(run, stages=tuple(stages))

    def parts(self, run: Run, kinds: Sequence[str]) -> FloatArray:
        """Per rank what its energy is linear in: shape (ranks, parts).

        Power while working is quadratic in the speed, for each kind, and higher or lower by so much in each stage: the
        speed, not the clock, as a GPU at its power limit is at neither the clock nor the power that a clock stands for.
        Power while waiting is linear in the clock.
        """
        rows = []
        for stage, own in enumerate(run.compute):
            part: list[float] = []
            for kind in kinds:
                of_kind = [row for row in own if row.kind == kind]
                seconds = np.array([row.time_s for row in of_kind])
                speeds = self.speed((stage, kind), [row.frequency_mhz for row in of_kind])
                part += [float((seconds * speeds**power).sum()) for power in range(3)]
            busy_s = sum(row.time_s for row in own)
            wait_s = run.time_s - busy_s
            part += [wait_s, wait_s * run.mean_clock_mhz(stage) / 1000]
            part += [busy_s if stage == other else 0.0 for other in range(1, len(run.compute))]
            rows.append(part)
        return np.array(rows)

    def energy_j(self, run: Run) -> FloatArray:
        """By rank."""
        energy: FloatArray = self.parts(run, kinds_of(run)) @ self.power
        return energy


def kinds_of(run: Run) -> list[str]:
    """Kinds of instructions."""
    return sorted({row.kind for stage in run.compute for row in stage})


def learnt(runs: Sequence[Run]) -> Fitted:
    """Times by the clock, and power, from these runs."""
    steady: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    begins: dict[Key, list[tuple[int, float]]] = defaultdict(list)
    loads: dict[int, list[list[float]]] = defaultdict(list)
    for run in runs:
        for stage, rows in enumerate(run.stages):
            seen: set[str] = set()
            loads[stage].append([row.time_s for row in rows if row.kind == LOAD])
            for row in run.compute[stage]:
                if row.kind in seen:
                    steady[stage, row.kind][row.frequency_mhz].append(row.time_s)
                else:
                    begins[stage, row.kind].append((row.frequency_mhz, row.time_s))
                seen.add(row.kind)
    at = {
        key: (np.array(sorted(clocks), dtype=float), np.array([np.mean(clocks[clock]) for clock in sorted(clocks)]))
        for key, clocks in steady.items()
    }
    mean_loads = tuple(tuple(np.mean(loads[stage], axis=0).tolist()) for stage in sorted(loads))
    times_only = Fitted(at, {}, mean_loads, np.zeros(0))
    first = {
        key: float(np.mean([time_s / times_only.time_s(key, clock).item() for clock, time_s in seen]))
        for key, seen in begins.items()
    }
    kinds = kinds_of(runs[0])
    parts = np.concatenate([times_only.parts(run, kinds) for run in runs])
    energy = np.concatenate([run.energy_j for run in runs])
    power = np.linalg.lstsq(parts / energy[:, None], np.ones(len(energy)), rcond=1e-10)[0]
    return Fitted(at, first, mean_loads, power)


def forecast(workloads: dict[str, list[Run]]) -> None:
    """Print the table of forecasts."""
    print(f"\nTime and energy of the other plans, learnt from {LEARNT_FROM}: error in percent, mean and largest\n")
    print("| workload | plans forecast | time | energy |")
    print("|---|---|---|---|")
    totals: list[tuple[float, float]] = []
    for workload, runs in workloads.items():
        full, plans = of_clocks(runs)
        plans = [full, *plans]
        if len(plans) <= LEARNT_FROM:
            continue
        spaced = {round(at) for at in np.linspace(0, len(plans) - 1, LEARNT_FROM)}
        known = learnt([plans[at] for at in sorted(spaced)])
        transfer_s = transfer_of(full)
        errors = []
        for run in (run for at, run in enumerate(plans) if at not in spaced):
            told = known.forecast(run)
            told = replace(told, time_s=told.graph_s(transfer_s))
            errors.append((told.time_s / run.time_s - 1, float(known.energy_j(told).sum()) / run.total_j - 1))
        by_time, by_energy = zip(*errors, strict=True)
        totals.append((float(np.abs(by_time).mean()), float(np.abs(by_energy).mean())))
        print(f"| {workload} | {len(errors)} | {spread(by_time)} | {spread(by_energy)} |", flush=True)
    if totals:
        of_time, of_energy = 100 * np.mean(totals, axis=0)
        print(f"| mean of workloads | | {of_time:.2f} | {of_energy:.2f} |")


QUESTIONS: dict[str, Callable[[dict[str, list[Run]]], None]] = {"times": times, "forecast": forecast}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of runs.csv and instructions.csv.gz")
    parser.add_argument("--only", choices=QUESTIONS, help="one of the questions")
    arguments = parser.parse_args()
    for name in ("runs.csv", "instructions.csv.gz"):
        if not (arguments.data / name).exists():
            parser.error(f"{arguments.data}: no {name} in it")
    workloads = load_runs(arguments.data)
    for name, answer in QUESTIONS.items():
        if arguments.only in (None, name):
            answer(workloads)


if __name__ == "__main__":
    main()
