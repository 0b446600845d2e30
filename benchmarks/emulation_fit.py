"""Fit the emulated GPUs' constants to published profiles and print them with the errors of the fit.

    python benchmarks/emulation_fit.py PROFILES_FOLDER RUNS_FOLDER

`PROFILES_FOLDER` holds `gpt3-175b-a100_sxm.csv` and `gpt3-175b-a40.csv` (columns
stage,instruction,frequency,time,energy) of the Perseus artifact (SOSP'24). `RUNS_FOLDER` holds `iterations.csv.gz`
(columns system, workload, plan, rank, median_setting, iteration_time_s, busy_s, energy_j) of the artifact's runs on
A100: what a waiting GPU draws. Needs scipy. The errors of the constants that are in the package are printed too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from perseus_plugin.gpus.emulated.physics import A40, A100, WAITING, GpuModel, LoadModel, load_class
from perseus_plugin.profiling.profile import Profile, load_profile

Array = NDArray[np.float64]
KINDS = ("forward", "backward")
FILES = {"A100": (A100, "gpt3-175b-a100_sxm.csv"), "A40": (A40, "gpt3-175b-a40.csv")}
POWER_WEIGHT = 0.5  # the plan depends on time more than on power: an error in time also costs the deadline
WAITING_WEIGHT = 5.0  # a handful of figures beside hundreds of rows
WAITING_W = {"A40": {1150: 66.0, 1400: 72.0, 1600: 77.0, 1740: 92.0}}  # from runs like those in RUNS_FOLDER
_SWINGS_S = 0.3  # iterations of a run whose waiting varies by this much show what it draws
_GPUS_DIFFER_W = 5.0
_BINS_MHZ = ((0, 1055), (1055, 1100), (1100, 1175))


def with_parameters(model: GpuModel, p: Array) -> GpuModel:
    """The model with its constants replaced: n, knee, slope, sharpness, static_w, dynamic_w while waiting, and per
    kind share, limit, dynamic_w."""
    n, knee, slope, sharpness, static_w, waiting_w = (float(x) for x in p[:6])
    forward, backward = (LoadModel(*(float(x) for x in p[6 + 3 * i : 9 + 3 * i])) for i in range(2))
    return replace(
        model,
        limit_sharpness=n,
        knee=knee,
        slope=slope,
        sharpness=sharpness,
        static_w=static_w,
        waiting=replace(model.waiting, dynamic_w=waiting_w),
        forward=forward,
        backward=backward,
    )


def parameters(model: GpuModel) -> Array:
    """Inverse of `with_parameters`."""
    loads = [x for m in (model.forward, model.backward) for x in (m.compute_share, m.limit, m.dynamic_w)]
    common = [model.limit_sharpness, model.knee, model.slope, model.sharpness, model.static_w, model.waiting.dynamic_w]
    return np.array([*common, *loads])


def relative_errors(model: GpuModel, profile: Profile, kind: str) -> tuple[Array, Array, Array]:
    """Relative errors of time, power and energy over all stages and clocks, each stage scaled by its own
    level.

    A stage's full-clock time is what the user of the model gives, so one factor per stage is free: its mean
    ratio.
    """
    load = load_class(kind)
    times: list[Array] = []
    powers: list[Array] = []
    for (_, row_kind), rows in profile.table.items():
        if row_kind != kind:
            continue
        seen = np.array([m.time_s for m in rows])
        said = np.array([model.stretch(load, m.frequency_mhz) for m in rows])
        times.append(said * np.exp(np.mean(np.log(seen / said))) / seen - 1.0)
        power = np.array([m.energy_j / m.time_s for m in rows])
        powers.append(np.array([model.power_w(load, m.frequency_mhz) for m in rows]) / power - 1.0)
    time_error, power_error = np.concatenate(times), np.concatenate(powers)
    return time_error, power_error, (1 + time_error) * (1 + power_error) - 1


def waiting_errors(model: GpuModel, waiting_w: dict[int, float]) -> Array:
    """Relative errors of the power while waiting."""
    return np.array([model.power_w(WAITING, clock) / watts - 1.0 for clock, watts in waiting_w.items()])


def measured_waiting_w(folder: Path) -> dict[int, float]:
    """Power while waiting by clock: by how much the energy of a run's iterations grows with their waiting alone.

    Runs under a power limit leave the clock to the GPU, which waits at its highest one.
    """
    runs: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    with gzip.open(folder / "iterations.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            busy_s = float(row["busy_s"])
            figures = [float(row["iteration_time_s"]) - busy_s, busy_s, float(row["energy_j"])]
            key = (row["system"], row["workload"], row["plan"], row["rank"])
            runs[key].append([*figures, float(row["median_setting"])])
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for (system, *_), listed in runs.items():
        waited, busy, energy, setting = np.array(listed).T
        if len(listed) < 8 or waited.std() < _SWINGS_S:
            continue
        clock = float(np.median(setting)) if system == "perseus" else float(A100.max_clock_mhz)
        within = [one for one in (*_BINS_MHZ, (A100.max_clock_mhz - 1, A100.max_clock_mhz)) if one[0] < clock <= one[1]]
        if not within or (system == "perseus" and clock == A100.max_clock_mhz):  # a median says little of those
            continue
        table = np.column_stack([waited - waited.mean(), busy - busy.mean()])
        slopes, *_ = np.linalg.lstsq(table, energy - energy.mean(), rcond=None)
        left = energy - energy.mean() - table @ slopes
        error2 = left @ left / (len(listed) - 3) * np.linalg.pinv(table.T @ table)[0, 0]
        found[within[0]].append((clock, float(slopes[0]), 1 / (error2 + _GPUS_DIFFER_W**2)))
    means = {}
    for figures in found.values():
        clocks, watts, weights = np.array(figures).T
        means[round(float(weights @ clocks / weights.sum()))] = float(weights @ watts / weights.sum())
    return means


def fit(model: GpuModel, profile: Profile, waiting_w: dict[int, float]) -> GpuModel:
    """Least squares of the relative errors of time and power."""

    def residuals(p: Array) -> Array:
        candidate = with_parameters(model, p)
        errors = [relative_errors(candidate, profile, kind) for kind in KINDS]
        of_work = [e for time, power, _ in errors for e in (time, POWER_WEIGHT * power)]
        return np.concatenate([*of_work, WAITING_WEIGHT * waiting_errors(candidate, waiting_w)])

    start = parameters(model)
    low = [2, 0.3, 0, 1, 10, 1] + [0.02, 0.5, 10] * 2
    high = [300, 1, 20, 300, 90, 100] + [1, 1.2, 1000] * 2
    found = least_squares(residuals, start, x_scale=np.abs(start), bounds=(low, high))
    return with_parameters(model, found.x)


def report(title: str, model: GpuModel, profile: Profile, waiting_w: dict[int, float]) -> None:
    """Print the constants and the errors."""
    print(f"{title}: n {model.limit_sharpness:.2f}, knee {model.knee:.4f}, slope {model.slope:.4f}, ", end="")
    print(f"sharpness {model.sharpness:.2f}, static {model.static_w:.2f} W")
    said = "  ".join(f"{model.power_w(WAITING, c):.1f} W at {c} MHz ({w:.1f} seen)" for c, w in waiting_w.items())
    error = waiting_errors(model, waiting_w)
    print(f"  waiting  dynamic_w={model.waiting.dynamic_w:.2f}: {said}")
    print(f"    power  rms {np.sqrt(np.mean(error**2)):.2%}  largest {np.abs(error).max():.2%}")
    for kind in KINDS:
        m = model.load(load_class(kind))
        print(f"  {kind:8} compute_share={m.compute_share:.4f} limit={m.limit:.4f} dynamic_w={m.dynamic_w:.1f}")
        for what, e in zip(("time", "power", "energy"), relative_errors(model, profile, kind), strict=True):
            print(f"    {what:6} rms {np.sqrt(np.mean(e**2)):.2%}  largest {np.abs(e).max():.2%}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="fit the emulated GPUs to published profiles")
    parser.add_argument("profiles_folder", type=Path)
    parser.add_argument("runs_folder", type=Path)
    given = parser.parse_args()
    waiting_w = {"A100": measured_waiting_w(given.runs_folder), **WAITING_W}
    for name, (model, file) in FILES.items():
        profile = load_profile(given.profiles_folder / file)
        report(f"{name}, as in the package", model, profile, waiting_w[name])
        report(f"{name}, fitted now", fit(model, profile, waiting_w[name]), profile, waiting_w[name])


if __name__ == "__main__":
    main()
