"""How well the estimator finds the energy of instructions, on a simulated GPU with energy counters like real ones.

The simulation is `tests/profiling/sensor.py`: 1F1B training on 4 stages, 8 microbatches, 9 clocks, executions that
differ in duration (0.5 ms) and power (1 %). Beside the estimator, on the same data, two usual methods: subtracting
the counter's values read at the beginning and at the end of each instruction, and the same with the counter
interpolated between its ticks.

    python benchmarks/estimator_accuracy.py [--seeds 50] [--iterations 10] [--variations-seeds 10]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from perseus_plugin.profiling.estimator import ClockRun, estimate_stage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "profiling"))
import sensor
from sensor import A100, EXACT, H100, V100, Counter, Job, Truth, two_kinds

COUNTERS = {"exact, 20 ms": EXACT, "V100-like": V100, "A100-like": A100, "H100-like": H100}
FORWARDS_S = (0.010, 0.030, 0.100)


@dataclass
class Errors:
    """Relative errors of energy per (kind, clock) over seeds, and what else is reported."""

    energy: list[float] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)
    subtracted: list[float] = field(default_factory=list)
    interpolated: list[float] = field(default_factory=list)
    windows_s: list[float] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    unresolved: int = 0


def measure(job: Job, counter: Counter, seeds: Sequence[int], clocks: Sequence[int] = sensor.CLOCKS_MHZ) -> Errors:
    """Simulate and estimate once per seed."""
    errors = Errors()
    for seed in seeds:
        runs, truth = sensor.simulate(job, counter, seed, clocks)
        began = time.process_time()
        estimate = estimate_stage(runs)
        errors.seconds.append(time.process_time() - began)
        for row in estimate.instructions:
            true_j = truth.energy_j[row.kind, row.frequency_mhz]
            errors.energy.append(row.energy_j / true_j - 1)
            errors.inside.append(abs(row.energy_j - true_j) <= 1.96 * row.energy_se_j)
        errors.blocking.append(estimate.blocking_power_w / truth.blocking_w - 1)
        errors.windows_s.append(estimate.window_s)
        errors.lags_s.append(estimate.lag_s)
        errors.unresolved += bool(estimate.unresolved)
        errors.subtracted += differences(runs, truth, shown)
        errors.interpolated += differences(runs, truth, interpolated)
    return errors


def shown(run: ClockRun, times_s: np.ndarray) -> np.ndarray:
    """What the counter shows: its value at the last tick."""
    ticks_s = np.array([tick.time_s for tick in run.ticks])
    values = np.array([tick.energy_j for tick in run.ticks])
    last = np.searchsorted(ticks_s, times_s, side="right") - 1
    return np.where(last >= 0, values[last], np.nan)


def interpolated(run: ClockRun, times_s: np.ndarray) -> np.ndarray:
    """The counter as a straight line from tick to tick."""
    ticks_s = np.array([(tick.previous_poll_s + tick.time_s) / 2 for tick in run.ticks])
    values = np.array([tick.energy_j for tick in run.ticks])
    return np.interp(times_s, ticks_s, values, left=np.nan, right=np.nan)


def differences(
    runs: Sequence[ClockRun], truth: Truth, read: Callable[[ClockRun, np.ndarray], np.ndarray]
) -> list[float]:
    """Relative errors per (kind, clock) of the mean difference of the counter over the executions."""
    found: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        starts = read(run, np.array([a.start_s for a in run.activities]))
        ends = read(run, np.array([a.end_s for a in run.activities]))
        for activity, energy_j in zip(run.activities, ends - starts, strict=True):
            if np.isfinite(energy_j):
                found.setdefault((activity.kind, run.frequency_mhz), []).append(float(energy_j))
    return [float(np.mean(values)) / truth.energy_j[key] - 1 for key, values in found.items()]


def spread(values: Sequence[float]) -> str:
    """Bias and standard deviation in percent."""
    return f"{100 * np.mean(values):+.1f} ± {100 * np.std(values):.1f} %"


def magnitude(values: Sequence[float]) -> str:
    """Mean and 95th percentile of the absolute error in percent."""
    absolute = 100 * np.abs(values)
    return f"{absolute.mean():.2f} / {np.quantile(absolute, 0.95):.2f} %"


HEADER = (
    "estimator: mean / p95 error",
    "bias",
    "95 % intervals cover",
    "blocking power",
    "window, lag found (ms)",
    "begin minus end",
    "interpolated",
)


def cells(errors: Errors) -> list[str]:
    """One row of the table."""
    return [
        magnitude(errors.energy),
        f"{100 * np.mean(errors.energy):+.2f} %",
        f"{100 * np.mean(errors.inside):.0f} %",
        f"{100 * np.mean(np.abs(errors.blocking)):.2f} %",
        f"{1e3 * np.median(errors.windows_s):.1f}, {1e3 * np.median(errors.lags_s):.1f}",
        spread(errors.subtracted),
        spread(errors.interpolated),
    ]


def print_row(*values: str) -> None:
    """A row of a Markdown table, shown at once."""
    print("| " + " | ".join(values) + " |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--variations-seeds", type=int, default=10)
    options = parser.parse_args()
    seconds: list[float] = []
    print_row("counter", "forward/backward (ms)", *HEADER)
    print_row(*["---"] * (2 + len(HEADER)))
    for name, counter in COUNTERS.items():
        for forward_s in FORWARDS_S:
            errors = measure(two_kinds(forward_s, iterations=options.iterations), counter, range(options.seeds))
            seconds += errors.seconds
            print_row(name, f"{1e3 * forward_s:.0f}/{2e3 * forward_s:.0f}", *cells(errors))
    print(f"\nCPU time of one estimate: median {np.median(seconds):.2f} s, at most {max(seconds):.2f} s\n")
    if options.variations_seeds:
        print_row("variation", *HEADER)
        print_row(*["---"] * (1 + len(HEADER)))
        for name, (job, counter, clocks) in variations(options.iterations).items():
            print_row(name, *cells(measure(job, counter, range(options.variations_seeds), clocks)))


def variations(iterations: int) -> dict[str, tuple[Job, Counter, Sequence[int]]]:
    """Conditions that are worse than in the first table, one at a time."""

    def job(forward_s: float, **options: float) -> Job:
        return two_kinds(forward_s, **{"iterations": iterations, **options})

    every = sensor.CLOCKS_MHZ
    return {
        "exact 20 ms, 40/80 ms, 4 iterations": (job(0.04, iterations=4), EXACT, every),
        "the same, polled every 10 ms": (job(0.04, iterations=4), replace(EXACT, poll_s=0.010), every),
        "the same, polled every 30 ms": (job(0.04, iterations=4), replace(EXACT, poll_s=0.030), every),
        "10 of 20 ms sampled, 30/60 ms": (job(0.03), Counter(0.020, 0.010, lag_s=0.003), every),
        "V100-like, 30/60 ms, ticks jitter by 4 ms": (job(0.03), replace(V100, jitter_s=0.004), every),
        "A100-like, 30/60 ms, lag of 80 ms": (job(0.03), replace(A100, lag_s=0.080), every),
        "A100-like, 30/60 ms, last stage (hardly waits)": (job(0.03, stage=3), A100, every),
        "A100-like, 30/60 ms, power rises 6 % over the sweep": (job(0.03, drift=0.06), A100, every),
        "H100-like, 10/20 ms, 4 iterations": (job(0.01, iterations=4), H100, every),
        "H100-like, 30/60 ms, executions differ by 5 % in power": (job(0.03, power_spread=0.05), H100, every),
        "H100-like, 30/60 ms, executions differ by 5 ms": (job(0.03, jitter_s=0.005), H100, every),
        "V100-like, 30/60 ms, executions ramp from -30 % to +30 %": (job(0.03, ramp=0.3), V100, every),
        "H100-like, 30/60 ms, executions ramp from -30 % to +30 %": (job(0.03, ramp=0.3), H100, every),
        "V100-like, 30/60 ms, 5 ms idle in each execution": (job(0.03, dip=True), V100, every),
        "H100-like, 30/60 ms, 5 ms idle in each execution": (job(0.03, dip=True), H100, every),
        "H100-like, 30/60 ms, 3 clocks": (job(0.03), H100, (705, 1095, 1410)),
        "A100-like, 2/4 ms, 3 times the iterations": (
            job(0.002, jitter_s=0.0001, iterations=3 * iterations),
            A100,
            every,
        ),
    }


if __name__ == "__main__":
    main()
