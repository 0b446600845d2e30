"""Ends and stops each of a job's processes at each stage of the job, and prints what comes of it, one line each:

    python -m tests.e2e.kill_matrix [--who helper] [--signal STOP] [--phase plan]

Jobs of two ranks (DeepSpeed) whose clocks are set through NVML, simulated in the driver's place. What is looked at is
the state of that driver, the losses (bit by bit those of a job without the plugin) and what the job says. A signal goes
to rank 1, to its helper, or to rank 0's planner. A process that was stopped goes on after its clock has been looked at.

The exit status is 1 if a clock was not free, if the training was not right, or if nothing was said where it should be.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.launching import ENDED_S, Finished, Job, Probe
from tests.e2e.simulation import Simulation
from tests.nvml_simulator.building import build
from tests.waiting import came_true, processes_naming

TRAINER, HELPER, PLANNER = "trainer", "helper", "planner"
SIGNALS = {name: signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "KILL", "STOP")}
PHASES = ("warm-up", "sweep", "plan")
RANK = 1
FREE_WITHIN_S = 12.0
"""As docs/clock-control.md has it of a helper that is silent; all else is faster."""
PLANNERS = "perseus_plugin.planning"
TOLD = ("clock helper", "second helper", "was stopped", "asked for nothing", "perseus is off", "planner", "SM clock")


@dataclass(frozen=True)
class Combination:
    """Who is sent which signal when."""

    who: str
    signal: str
    phase: str

    @property
    def job_ends(self) -> bool:
        """Whether the job ends by it, as it would without the plugin."""
        return self.who == TRAINER and self.signal != "STOP"

    @property
    def is_told(self) -> bool:
        """Whether somebody has to say something.

        Of a trainer that is stopped nothing is said where its clock gets free by itself: a plan's rises at its
        instruction's end, and a timing of clock changes ends so.
        """
        return self.who == HELPER


def combinations(who: str | None, name: str | None, phase: str | None) -> Iterator[Combination]:
    """Those that make sense: a planner has nothing to do before there is something to plan."""
    for one in itertools.starmap(Combination, itertools.product((TRAINER, HELPER, PLANNER), SIGNALS, PHASES)):
        if one.who == PLANNER and (one.phase != "plan" or one.signal == "STOP"):
            continue
        if who in (None, one.who) and name in (None, one.signal) and phase in (None, one.phase):
            yield one


class Run:
    """One job, to which one thing is done."""

    def __init__(self, library: Path, folder: Path, one: Combination) -> None:
        self._one = one
        self._machine = Simulation(library, folder, 2)
        self._enough = folder / "enough"
        self._probe = self._machine.job(folder, ("end", str(self._enough)), steps=2000)
        self.free_after_s = float("nan")
        self.problems: list[str] = []
        self.told = ""
        self.training = ""

    def run(self, expected: list[float]) -> None:
        """Do it; `expected` are the losses of the same training without the plugin."""
        with self._probe.started(**self._machine.environment) as job:
            if not came_true(lambda: self._reached(job), 120, 0.002):
                self.problems.append(f"{self._one.phase} was never reached")
                return
            before = len(job.said())
            pid = self._target(job)
            self._send(pid)
            self._watch_clock()
            if self._one.signal == "STOP":
                if self._one.who == HELPER:
                    came_true(lambda: self._is_told(job, before), 30)
                self._goes_on(pid)
            if not self._one.job_ends:
                came_true(lambda: self._is_told(job, before), 30)
                time.sleep(1.0)  # it trains on, whatever was done to it
                self._enough.touch()
            done = job.wait()
        self._judge(done, done.output[before:], expected)

    def _reached(self, job: Job) -> bool:
        if self._one.phase == "warm-up":
            return all(processes_naming(uuid) for uuid in self._machine.uuids) and self._pids(job)
        if self._one.phase == "sweep":
            return self._lowered() and self._pids(job)
        ready = "plan 1 for" in job.said() and self._pids(job)
        return ready and (self._one.who == PLANNER or self._lowered())

    def _pids(self, job: Job) -> bool:
        return len(job.ranks()) == 2 and (self._one.who != PLANNER or bool(self._planners(job)))

    def _lowered(self) -> bool:
        return self._machine.gpus[RANK].locked_mhz() not in (None, 1410)

    def _planners(self, job: Job) -> list[int]:
        ours = f"PPid:\t{job.ranks()[0]}\n"
        found = processes_naming(PLANNERS, (PLANNERS,))
        return [pid for pid in found if ours in Path(f"/proc/{pid}/status").read_text()]

    def _target(self, job: Job) -> int:
        if self._one.who == TRAINER:
            return job.ranks()[RANK]
        if self._one.who == PLANNER:
            return self._planners(job)[0]
        return processes_naming(self._machine.uuids[RANK])[0]

    def _send(self, pid: int) -> None:
        os.kill(pid, SIGNALS[self._one.signal])
        # What is stopped at full clocks shows nothing: plans end every iteration there.
        while self._one.signal == "STOP" and self._one.phase != "warm-up" and not self._lowered():
            os.kill(pid, signal.SIGCONT)
            came_true(self._lowered, 30, 0.001)
            os.kill(pid, signal.SIGSTOP)

    def _watch_clock(self) -> None:
        """Time until the clock of the rank is free for the first time: a job that goes on locks it again."""
        begin_s = time.monotonic()
        gpu = self._machine.gpus[RANK]
        if came_true(lambda: gpu.locked_mhz() is None, FREE_WITHIN_S + 3, 0.001):
            self.free_after_s = time.monotonic() - begin_s
        if not self.free_after_s <= FREE_WITHIN_S and self._one.who != PLANNER:
            self.problems.append("its clock was not free in time")

    def _goes_on(self, pid: int) -> None:
        if self._one.who == TRAINER:
            time.sleep(1.0)
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            if self._one.who == TRAINER:
                self.problems.append("it has ended while it was stopped")

    def _is_told(self, job: Job, before: int) -> bool:
        return not self._one.is_told or bool(self._lines(job.said()[before:]))

    def _lines(self, said: str) -> list[str]:
        return [line for line in said.splitlines() if "perseus" in line and any(words in line for words in TOLD)]

    def _judge(self, done: Finished, said: str, expected: list[float]) -> None:
        one = self._one
        if one.job_ends:
            self.training = "ended" if done.status else "not ended"
            right = done.status != 0
        else:
            losses = [rank["losses"] for rank in self._probe.facts()] if done.status == 0 else []
            right = bool(losses) and all(seen == expected[: len(seen)] for seen in losses)
            self.training = f"{len(losses[0])} steps as without" if right else "WRONG"
        if not right:
            self.problems.append(f"training: status {done.status}\n{done.output[-2000:]}")
        lines = self._lines(said)
        self.told = lines[0].split("] ")[-1] if lines else "nothing"
        if one.is_told and not lines:
            self.problems.append("nothing was said")
        nobody: Callable[[], bool] = lambda: not any(processes_naming(uuid) for uuid in self._machine.uuids)  # noqa: E731
        if not came_true(lambda: self._machine.free() and nobody(), 2 * ENDED_S):
            self.problems.append(f"left behind: clocks {self._machine.locked()} MHz, or a process")


def losses_without(folder: Path, steps: int) -> list[float]:
    """What the same training loses without the plugin."""
    job = Probe(folder, None, (), ("--stages", "2", "--steps", str(steps)))
    job.run().check()
    losses: list[float] = job.facts()[0]["losses"]
    return losses


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=(TRAINER, HELPER, PLANNER))
    parser.add_argument("--signal", choices=tuple(SIGNALS))
    parser.add_argument("--phase", choices=PHASES)
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        library = build(Path(root))
        expected = losses_without(Path(root) / "without", 2000)
        for number, one in enumerate(combinations(options.who, options.signal, options.phase)):
            run = Run(library, Path(root) / str(number), one)
            run.run(expected)
            who = f"{one.who:8}{one.signal:5}{one.phase:8}"
            print(f"{who} free after {run.free_after_s:5.2f} s  {run.training:24} told: {run.told}", flush=True)
            for problem in run.problems:
                print(f"  PROBLEM: {problem}", flush=True)
            wrong += bool(run.problems)
    print(f"{wrong} of the combinations went wrong" if wrong else "all as it should be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
