"""Two running jobs under one power budget that drops by a third and comes back; one is killed in between.

Each job is a process: two stages as threads with real sessions, helpers and planner, on emulated GPUs. Rounds of
`perseus share` run here. Power is exact: the integral of the emulated GPUs themselves. Minutes are compressed: each
phase takes `--seconds`, and a budget lasts for six.

    python benchmarks/shared_budget.py [--seconds 20]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.shared_budget import NAMES, SAMPLE_S, Shared, run

WINDOW_S = 5.0


def highest_w(shared: Shared, phase: str) -> float:
    """The highest average of both jobs together over any window, from when what they are told is in force."""
    samples, width = shared.of(phase), round(WINDOW_S / SAMPLE_S)
    return max(
        (sum(shared.drawn_w(samples[at], samples[at + width])) for at in range(len(samples) - width)), default=0.0
    )


def main() -> None:
    """Run it and print a line per phase."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shared = run(Path(folder), options.seconds)
    print(f"both jobs at full clocks: {shared.full_w:.0f} W (emulated GPUs)")
    head = ["phase", "budget, W", "in force after, s", f"highest {WINDOW_S:g} s, W", *(f"{name}, W" for name in NAMES)]
    print("| " + " | ".join([*head, *(f"{name} told, W" for name in NAMES)]) + " |")
    print("|---" * (len(head) + len(NAMES)) + "|")
    for phase in dict.fromkeys(one.phase for one in shared.samples):
        samples = shared.of(phase)
        begun = next(one for one in shared.samples if one.phase == phase)
        if len(samples) < 2:
            print(f"| {phase} | {begun.budget_w:.0f} | never | | | | | |")
            continue
        cells = [
            phase,
            f"{begun.budget_w:.0f}",
            f"{samples[0].time_s - begun.time_s:.1f}",
            f"{highest_w(shared, phase):.0f}",
            *(f"{watts:.0f}" for watts in shared.drawn_w(samples[len(samples) // 2], samples[-1])),
            *(f"{watts:.0f}" for watts in samples[-1].told_w),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
