"""Jobs whose steps vary in size, as their ranks see them in a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from perseus_plugin.profiling.observations import StepMean

CLOCKS_MHZ = (1410, 1320, 1230, 1140, 1050, 960, 870, 780, 705)
KINDS = {"forward": (0.010, 0.75), "backward": (0.020, 0.65)}  # time at the top clock, share that scales with it
StepSize = Callable[[np.random.Generator, int], float]

SIZES: dict[str, StepSize] = {
    "even": lambda rng, step: 1.0,
    "buckets": lambda rng, step: float(rng.choice([1.0, 1.3, 1.6])),
    "log-normal": lambda rng, step: math.exp(0.2 * rng.standard_normal()),
    "curriculum": lambda rng, step: 1 + step / 150,
    "curriculum and buckets": lambda rng, step: (1 + step / 300) * float(rng.choice([1.0, 1.3, 1.6])),
    "two stages of a curriculum": lambda rng, step: 1.0 if step < 40 else 2.0,
}


def slowed(kind: str, clock_mhz: int) -> float:
    """How much longer an instruction takes than at the top clock."""
    share = KINDS[kind][1]
    return share * CLOCKS_MHZ[0] / clock_mhz + 1 - share


def sweep(
    size: StepSize,
    seed: int,
    *,
    paired: bool,
    stages: int = 4,
    steps_per_clock: int = 5,
    noise: float = 0.004,
    sensitivities: Sequence[float] | None = None,
) -> dict[int, list[StepMean]]:
    """By stage what one replica sees in a round at common clocks and, if `paired`, a paired one after it."""
    rng = np.random.default_rng(seed)
    top = CLOCKS_MHZ[0]
    order = [int(clock) for clock in rng.permutation(CLOCKS_MHZ[1:])]
    blocks = [[clock] * stages for clock in (top, *order[:4], top, *order[4:], top)]
    if paired:
        for clock in (int(clock) for clock in rng.permutation(CLOCKS_MHZ[1:])):
            blocks += [[clock if stage % 2 == turn else top for stage in range(stages)] for turn in (0, 1)]
    seen: dict[int, list[StepMean]] = {stage: [] for stage in range(stages)}
    step = 0
    for block in blocks:
        step += 1  # the clock settles
        for _ in range(steps_per_clock):
            work = size(rng, step)
            for stage in range(stages):
                own = work ** (1.0 if sensitivities is None else sensitivities[stage])
                for kind, (time_s, _) in KINDS.items():
                    jitter = math.exp(noise * rng.standard_normal())
                    mean_s = time_s * (1 + 0.1 * stage) * slowed(kind, block[stage]) * own * jitter
                    seen[stage].append(StepMean(step, block[stage], kind, mean_s, 8, 0.02))
            step += 1
    return seen
