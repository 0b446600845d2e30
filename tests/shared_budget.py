"""Two whole jobs, each a process of its own, under one power budget that changes; one of them is killed.

`python -m tests.shared_budget FOLDER` is one of the jobs; it ends when there is a file `over` in its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perseus_plugin.cli.sharing.member import Member
from perseus_plugin.cli.sharing.table import Round, Table
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.one_job import OneJob, Step
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
FORWARD_S, BACKWARD_S = (0.025, 0.035), (0.050, 0.070)
PLUGIN: dict[str, Any] = {
    "profiling": {
        "warmup_steps": 2,
        "clocks_mhz": [1410, 1260, 1110, 960, 810],
        "steps_per_clock": 3,
        "max_relative_error": 1.0,
        "max_time_error": 1.0,
    },
    "stragglers": {"detect": False},
    "watch": {"tolerance": 1.0},
    "log_level": "warning",
}
"""On a busy machine times are noisy: neither stragglers nor the watch shall have a say."""
SAMPLE_S = 0.5
FEWEST_SAMPLES = 8
NAMES = ("one", "other")
START_S = 900.0
LATEST_S = 60.0  # until what is told is in force


@dataclass
class Sample:
    """A moment.

    Attributes:
        time_s: of a clock that never goes back.
        phase: what the script is at.
        budget_w: in force for the table.
        held_w: the most that the jobs may draw together, as the table knows it.
        energy_j: per job, of its GPUs so far, by their exact integral.
        told_w: per job.
    """

    time_s: float
    phase: str
    budget_w: float
    held_w: float
    energy_j: tuple[float, ...]
    told_w: tuple[float, ...]


@dataclass
class Shared:
    """What came of it.

    Attributes:
        full_w: of both jobs together, by their frontiers.
        samples: every half a second.
    """

    full_w: float
    samples: list[Sample] = field(default_factory=list)

    def drawn_w(self, first: Sample, last: Sample) -> tuple[float, ...]:
        """Average power of each job from one sample to another."""
        seconds = last.time_s - first.time_s
        return tuple((b - a) / seconds for a, b in zip(first.energy_j, last.energy_j, strict=True))

    def most_w(self, samples: Sequence[Sample], over: int = 5) -> float:
        """The most that both drew together over so many samples: a busy machine lets GPUs wait, and draw less."""
        return max(sum(self.drawn_w(*pair)) for pair in zip(samples, samples[over:], strict=False))

    def of(self, phase: str) -> list[Sample]:
        """Samples of a phase from when what is told is in force."""
        found = [one for one in self.samples if one.phase == phase]
        settled = next((n for n, one in enumerate(found) if one.held_w <= one.budget_w * (1 + 1e-6)), len(found))
        return found[settled:]


@contextmanager
def job_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job, ended with the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PERSEUS_LOCK_DIR": str(folder.parent / "locks")}
    process = subprocess.Popen([sys.executable, "-m", "tests.shared_budget", str(folder)], env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        folder.mkdir(exist_ok=True)
        (folder / "over").touch()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(folder: Path, seconds: float, shares: Sequence[float] = (0.9, 0.6), lasting_s: float = 6.0) -> Shared:
    """Both jobs under a budget, a smaller one, with one job in the middle of that, and the first budget again.

    Args:
        folder: for the jobs' files.
        seconds: of each of these, at least, from when what is told is in force.
        shares: the two budgets, of what both draw at full clocks.
        lasting_s: how long what a job is told, every second, lasts.
    """
    folders = [folder / name for name in NAMES]
    with job_process(folders[0]), job_process(folders[1]) as other:
        wait_until(lambda: all((one / "frontier.json").exists() for one in folders), START_S)
        gpus = [[EmulatedGpu(one / "emulated_gpus" / f"rank{rank}") for rank in range(2)] for one in folders]
        table = Table([str(one) for one in folders], make=lambda path, weight: Member(path, weight, lasting_s))
        jobs = [look.holding.job for look in table.round(1e9).looks.values()]
        shared = Shared(sum(job.curve.full_w for job in jobs if job is not None))
        high_w, low_w = (share * shared.full_w for share in shares)

        def phase(name: str, budget_w: float, has_begun: Callable[[Round], bool] = lambda done: True) -> None:
            end_s, due_s = time.monotonic() + LATEST_S, 0.0
            done: Round | None = None
            settled = 0
            while time.monotonic() < end_s or 0 < settled < FEWEST_SAMPLES:
                if done is None or done.on_the_way or time.monotonic() >= due_s:
                    done, due_s = table.round(budget_w), time.monotonic() + 1.0
                energy_j = tuple(sum(gpu.exact_energy_j() for gpu in of_job) for of_job in gpus)
                if settled or (done.held_w <= budget_w * (1 + 1e-6) and has_begun(done)):
                    end_s = end_s if settled else time.monotonic() + seconds
                    settled += 1
                told_w = tuple(done.told_w.get(str(one), 0.0) for one in folders)
                shared.samples.append(Sample(time.monotonic(), name, budget_w, done.held_w, energy_j, told_w))
                time.sleep(SAMPLE_S)

        phase("first", high_w)
        phase("a third less", low_w)
        os.kill(other.pid, signal.SIGKILL)
        phase("one is killed", low_w, lambda done: done.looks[str(folders[1])].state == "ended")
        phase("as at first", high_w)
    return shared


def _train(folder: Path, over: Callable[[], bool]) -> None:
    steps = [Step((1.0,) * 4)] * 1_000_000
    OneJob(folder, steps, forward_s=FORWARD_S, backward_s=BACKWARD_S, plugin=PLUGIN, until=over).run()


if __name__ == "__main__":
    made = Path(sys.argv[1])
    _train(made, (made / "over").exists)
