"""A running job that is given power budgets: what it draws, how fast it is, and the same job at one clock for all.

Four stages as threads with real sessions, helper and planner processes, on emulated GPUs (`tests/one_job.py`). Budgets
are shares of what the job draws at full clocks, set over its socket while it trains. Power as run is exact: the
emulated GPUs' own integral over the time that passed. "Predicted" is the plan's iteration time over that of full clocks
in its graph, times what full clocks took as run. One clock for all is run by the same job without the plugin at several
clocks; its iteration time at the power that the plan drew is interpolated between the two beside it.

    python benchmarks/live_budget.py [--seconds 45] [--shares 0.85 0.7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.leader.job_socket import ask
from perseus_plugin.planning.plan import Plan, load_plan
from tests.live_targets import wait_for_plan
from tests.one_job import OneJob, Step

TIMES: dict[str, tuple[float, ...]] = {
    "forward_s": (0.030, 0.033, 0.030, 0.038),
    "backward_s": (0.060, 0.066, 0.060, 0.076),
}
STAGES, MICROBATCHES = 4, 8
PLUGIN: dict[str, Any] = {
    "profiling": {"warmup_steps": 2, "clocks_mhz": [1410, 1305, 1200, 1095, 990, 885, 780], "steps_per_clock": 8},
    "frontier": False,
    "stragglers": {"detect": False},
    "log_level": "warning",
}
UNIFORM_MHZ = (1410, 1350, 1290, 1230, 1170, 1110, 1050, 990)
WINDOW_S, SETTLING = 10.0, 2


class Watched(OneJob):
    """A job that says when each iteration ended, and ends when it is told to."""

    def __init__(self, folder: Path, plugin: dict[str, Any] | None) -> None:
        self.stamps_s: list[float] = []
        self.over = threading.Event()
        steps = [Step((1.0,) * MICROBATCHES)] * 100_000
        super().__init__(folder, steps, plugin=plugin, until=self._ended, **TIMES)  # type: ignore[arg-type]

    def _ended(self) -> bool:
        self.stamps_s.append(time.monotonic())
        return self.over.is_set()

    def run_beside(self, control: Any) -> None:
        """Run it while `control` does what it does in a thread of its own."""

        def controlled() -> None:
            try:
                control()
            finally:
                self.over.set()

        thread = threading.Thread(target=controlled)
        thread.start()
        self.run()
        thread.join()

    def figures(self, first: int, end: int) -> tuple[float, float]:
        """Mean iteration time and power over iterations from `first` to before `end`."""
        taken_s = self.stamps_s[end - 1] - self.stamps_s[first - 1]
        return taken_s / (end - first), sum(self.ran.energies_j[first:end]) / taken_s

    def windows_w(self, first: int, end: int) -> list[float]:
        """Average power in every window of iterations that take `WINDOW_S` or just longer."""
        found = []
        for begin in range(first, end):
            last = next((n for n in range(begin, end) if self.stamps_s[n] - self.stamps_s[begin - 1] >= WINDOW_S), None)
            if last is not None:
                found.append(self.figures(begin, last + 1)[1])
        return found


@dataclass
class Phase:
    """Iterations under one target.

    Attributes:
        first, end: which.
        plan: that was followed; None: full clocks.
        budget_w: None: none.
    """

    first: int
    end: int
    plan: Plan | None
    budget_w: float | None = None


def with_the_plugin(folder: Path, shares: Sequence[float], seconds: float) -> tuple[Watched, list[Phase]]:
    """Full clocks, then the budgets one after the other."""
    job, phases = Watched(folder, PLUGIN), list[Phase]()

    def phase(said: dict[str, Any], budget_w: float | None = None) -> None:
        number = ask(folder, {"do": "target", "target": {**said, "source": "benchmark"}})["number"]
        while True:
            outcomes = {one["number"]: one for one in ask(folder, {"do": "targets"})["outcomes"]}
            if number in outcomes and outcomes[number]["state"] != "waiting":
                break
            time.sleep(0.05)
        first = outcomes[number]["iteration"]
        if first is None:
            raise SystemExit(f"{said}: {outcomes[number]}")
        time.sleep(seconds)
        plan = None if budget_w is None else load_plan(folder / "plan.json")
        phases.append(Phase(first, len(job.stamps_s), plan, budget_w))

    def control() -> None:
        wait_for_plan(folder)
        phase({"full": True})
        full = phases[0]
        taken_s = job.stamps_s[full.end - 1] - job.stamps_s[full.first - 1]
        before, after = job._energy_j[full.first], job._energy_j[full.end]
        full_w = (sum(after) - sum(before)) / taken_s
        for share in shares:
            phase({"power_budget_w": share * full_w}, share * full_w)

    job.run_beside(control)
    return job, phases


def at_one_clock(folder: Path, seconds: float) -> list[tuple[float, float]]:
    """Iteration time and power at each of the clocks, by rising power."""
    job, phases = Watched(folder, None), list[Phase]()

    def control() -> None:
        while len(job.stamps_s) < 2:
            time.sleep(0.1)
        gpus = [EmulatedGpu(folder / "emulated_gpus" / f"rank{rank}") for rank in range(STAGES)]
        for clock in UNIFORM_MHZ:
            for gpu in gpus:
                gpu.lock_clock(clock)
            first = len(job.stamps_s) + SETTLING
            time.sleep(seconds)
            phases.append(Phase(first, len(job.stamps_s), None))

    job.run_beside(control)
    return sorted((job.figures(one.first, one.end) for one in phases), key=lambda figures: figures[1])


def main() -> None:
    """Run both jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.85, 0.7])
    chosen = parser.parse_args()
    sys.setswitchinterval(0.0005)  # many threads in one interpreter, where a real job has a process per rank
    with tempfile.TemporaryDirectory() as folder:
        job, phases = with_the_plugin(Path(folder) / "job", chosen.shares, chosen.seconds)
        uniform = at_one_clock(Path(folder) / "uniform", chosen.seconds / 3)
    full_s, full_w = job.figures(phases[0].first, phases[0].end)
    print(
        f"{STAGES} stages, {MICROBATCHES} microbatches, emulated A100: at full clocks {full_s:.3f} s and {full_w:.0f} W"
    )
    print("| budget | W | drawn, W | in 10 s, most | iteration | predicted | off | one clock | faster | promised |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    assert all(before[1] < after[1] for before, after in pairwise(uniform)), "more power at a higher clock"
    for phase in phases[1:]:
        assert phase.plan is not None
        assert phase.budget_w is not None
        time_s, watts = job.figures(phase.first, phase.end)
        most_w = max(job.windows_w(phase.first, phase.end))
        predicted_s = phase.plan.iteration_time_s / phase.plan.baseline_time_s * full_s
        one_clock_s, promised_s = (
            float(np.interp(at_w, [of_w for _, of_w in uniform], [of_s for of_s, _ in uniform]))
            for at_w in (
                watts,
                phase.plan.power_w / (phase.plan.baseline_energy_j / phase.plan.baseline_time_s) * full_w,
            )
        )
        print(
            f"| {100 * phase.budget_w / full_w:.0f} % | {phase.budget_w:.0f} | {watts:.0f} "
            f"| {100 * (most_w / phase.budget_w - 1):+.1f} % | {time_s:.3f} s | {predicted_s:.3f} s "
            f"| {100 * (time_s / predicted_s - 1):+.1f} % | {one_clock_s:.3f} s "
            f"| {100 * (one_clock_s / time_s - 1):+.1f} % | {100 * (promised_s / predicted_s - 1):+.1f} % |"
        )


if __name__ == "__main__":
    main()
