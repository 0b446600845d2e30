"""How long detection takes to find a straggler, and how often it cries wolf, on simulated traces.

Every iteration's slowdown is drawn from a log-normal distribution with the noise given as its standard deviation.
Traces of `--iterations` iterations without a straggler count false alarms; traces with one count iterations from its
beginning to its detection (of those within 200), and from its end until it is taken back.

    python benchmarks/straggler_detection.py
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator

from perseus_plugin.stragglers.detection import StragglerDetector

BEFORE, LONGEST = 300, 200


def trace(rng: random.Random, noise: float, slowdown: float = 1.0) -> Iterator[float]:
    """Slowdowns of iterations."""
    while True:
        yield slowdown * rng.lognormvariate(0.0, noise)


def false_alarms(noise: float, iterations: int, seed: int) -> int:
    """Alarms on one trace without a straggler."""
    detector, normal = StragglerDetector(), trace(random.Random(seed), noise)
    return sum(detector.add(next(normal)) is not None for _ in range(iterations))


def delays(noise: float, slowdown: float, seed: int) -> tuple[int | None, int | None, float]:
    """Iterations to detection and to recovery (None: not within `LONGEST`), and the level that was told."""
    rng = random.Random(seed)
    detector = StragglerDetector()
    normal, slow = trace(rng, noise), trace(rng, noise, slowdown)
    for _ in range(BEFORE):
        detector.add(next(normal))
    found = next((n for n in range(1, LONGEST + 1) if detector.add(next(slow)) is not None), None)
    if found is None:
        return None, None, 1.0
    for _ in range(20):
        detector.add(next(slow))
    level = detector.level
    gone = next((n for n in range(1, LONGEST + 1) if detector.add(next(normal)) == 1.0), None)
    return found, gone, level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=20, help="traces without a straggler")
    parser.add_argument("--traces", type=int, default=1000, help="traces with one")
    arguments = parser.parse_args()
    print(
        "| noise | false alarms | straggler | found | iterations: median, 99 %, most | level told | taken back after |"
    )
    print("|---|---|---|---|---|---|---|")
    for noise in (0.003, 0.01, 0.03, 0.05):
        alarms = sum(false_alarms(noise, arguments.iterations, seed) for seed in range(arguments.ranks))
        alarm_cell = f"{alarms} in {arguments.ranks} x {arguments.iterations:,} iterations"
        for slowdown in (1.05, 1.10, 1.25, 1.50):
            made = [delays(noise, slowdown, seed) for seed in range(arguments.traces)]
            found = sorted(n for n, _, _ in made if n is not None)
            gone = sorted(n for n, m, _ in made if n is not None for n in [LONGEST if m is None else m])
            levels = [level for n, _, level in made if n is not None]
            told = back = "-"
            counts = "-"
            if found:
                counts = f"{statistics.median(found):.0f}, {found[int(0.99 * (len(found) - 1))]}, {found[-1]}"
                told = f"{statistics.mean(levels):.3f}"
                back = f"{statistics.median(gone):.0f} ({gone[int(0.99 * (len(gone) - 1))]})"
            print(
                f"| {100 * noise:g} % | {alarm_cell} | {100 * (slowdown - 1):.0f} % | "
                f"{100 * len(found) / len(made):.1f} % | {counts} | {told} | {back} |",
                flush=True,
            )
            alarm_cell = ""


if __name__ == "__main__":
    main()
