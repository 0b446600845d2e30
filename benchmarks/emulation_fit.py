"""Fit the emulated GPUs' constants to published profiles and print them with the errors of the fit.

    python benchmarks/emulation_fit.py DATA_FOLDER

`DATA_FOLDER` holds `gpt3-175b-a100_sxm.csv` and `gpt3-175b-a40.csv` (columns
stage,instruction,frequency,time,energy) of the Perseus artifact (SOSP'24). Needs scipy. The errors of the
constants that are in the package are printed too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from perseus_plugin.gpus.emulated.physics import A40, A100, GpuModel, LoadModel, load_class
from perseus_plugin.profiling.profile import Profile, load_profile

Array = NDArray[np.float64]
KINDS = ("forward", "backward")
FILES = {"A100": (A100, "gpt3-175b-a100_sxm.csv"), "A40": (A40, "gpt3-175b-a40.csv")}
POWER_WEIGHT = 0.5  # the plan depends on time more than on power: an error in time also costs the deadline


def with_parameters(model: GpuModel, p: Array) -> GpuModel:
    """The model with its constants replaced: n, knee, slope, sharpness, per kind share, limit, dynamic_w."""
    n, knee, slope, sharpness = (float(x) for x in p[:4])
    forward, backward = (LoadModel(*(float(x) for x in p[4 + 3 * i : 7 + 3 * i])) for i in range(2))
    return replace(
        model,
        limit_sharpness=n,
        knee=knee,
        slope=slope,
        sharpness=sharpness,
        forward=forward,
        backward=backward,
    )


def parameters(model: GpuModel) -> Array:
    """Inverse of `with_parameters`."""
    loads = [x for m in (model.forward, model.backward) for x in (m.compute_share, m.limit, m.dynamic_w)]
    return np.array([model.limit_sharpness, model.knee, model.slope, model.sharpness, *loads])


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


def fit(model: GpuModel, profile: Profile) -> GpuModel:
    """Least squares of the relative errors of time and power."""

    def residuals(p: Array) -> Array:
        candidate = with_parameters(model, p)
        errors = [relative_errors(candidate, profile, kind) for kind in KINDS]
        return np.concatenate([e for time, power, _ in errors for e in (time, POWER_WEIGHT * power)])

    start = parameters(model)
    low = [2, 0.3, 0, 1] + [0.02, 0.5, 10] * 2
    high = [300, 1, 20, 300] + [1, 1.2, 1000] * 2
    found = least_squares(residuals, start, x_scale=np.abs(start), bounds=(low, high))
    return with_parameters(model, found.x)


def report(title: str, model: GpuModel, profile: Profile) -> None:
    """Print the constants and the errors."""
    print(f"{title}: n {model.limit_sharpness:.2f}, knee {model.knee:.4f}, slope {model.slope:.4f}, ", end="")
    print(f"sharpness {model.sharpness:.2f}")
    for kind in KINDS:
        m = model.load(load_class(kind))
        print(f"  {kind:8} compute_share={m.compute_share:.4f} limit={m.limit:.4f} dynamic_w={m.dynamic_w:.1f}")
        for what, e in zip(("time", "power", "energy"), relative_errors(model, profile, kind), strict=True):
            print(f"    {what:6} rms {np.sqrt(np.mean(e**2)):.2%}  largest {np.abs(e).max():.2%}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="fit the emulated GPUs to published profiles")
    parser.add_argument("data_folder", type=Path)
    folder = parser.parse_args().data_folder
    for name, (model, file) in FILES.items():
        profile = load_profile(folder / file)
        report(f"{name}, as in the package", model, profile)
        report(f"{name}, fitted now", fit(model, profile), profile)


if __name__ == "__main__":
    main()
