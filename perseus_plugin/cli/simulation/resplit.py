"""The profile that another split of the layers would have, from a measured one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.profile import Measurement, Profile

Split = tuple[int, ...]
"""Layers of each stage."""


def resplit(profile: Profile, before: Split, after: Split) -> Profile:
    """Time and energy of each stage with `after` layers, from a profile measured with `before`.

    What a layer takes is the mean of the middle stages, per kind and clock. What the first and the last stage take
    beyond their layers (embedding, output) stays with the first and the last stage; where they take less, nothing does.

    Raises:
        ProfileError: there is no middle stage, the splits do not fit, or stages have different clocks.
    """
    if len(before) != profile.stages or min(before) < 0:
        raise ProfileError(
            f"layers: got {list(before)}; allowed: layers of each of the profile's {profile.stages} stages"
        )
    if sum(after) != sum(before) or min(after) < 0:
        raise ProfileError(
            f"split: got {list(after)}, together {sum(after)}; allowed: layers of each stage, together {sum(before)}"
        )
    if profile.stages < 3 or min(before[1:-1]) < 1:
        raise ProfileError(
            f"split: got a profile of {profile.stages} stages; allowed: from 3, with layers in all between the first "
            "and the last, as what a layer takes is seen there"
        )
    rows = []
    for kind in profile.kinds:
        without = [stage for stage in range(profile.stages) if (stage, kind) not in profile.table]
        if without:
            raise ProfileError(
                f"split: stage {without[0]} has no row for instruction {kind!r}; allowed: the same instructions in all "
                "stages, as what a layer takes is their mean"
            )
        stages = [profile.table[stage, kind] for stage in range(profile.stages)]
        if any([m.frequency_mhz for m in stage] != [m.frequency_mhz for m in stages[0]] for stage in stages):
            raise ProfileError(
                f"split: stages have different clocks for {kind}; allowed: the same clocks in all stages"
            )
        figures = np.array([[(m.time_s, m.energy_j) for m in stage] for stage in stages])  # stages x clocks x 2
        layer = np.mean(figures[1:-1] / np.array(before[1:-1])[:, None, None], axis=0)
        first, last = (np.maximum(figures[at] - before[at] * layer, 0.0) for at in (0, -1))
        for stage, layers in enumerate(after):
            taken = layers * layer
            if stage == 0:
                taken = taken + first
            if stage == len(after) - 1:
                taken = taken + last
            rows += [(stage, kind, _with(m, *of_clock)) for m, of_clock in zip(stages[0], taken.tolist(), strict=True)]
    return Profile.from_rows(rows)


def _with(measurement: Measurement, time_s: float, energy_j: float) -> Measurement:
    return replace(measurement, time_s=time_s, energy_j=energy_j, samples=0, time_se_s=np.nan, energy_se_j=np.nan)
