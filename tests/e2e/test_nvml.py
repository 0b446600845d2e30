"""Real jobs whose clocks are set through NVML: the simulated library in the driver's place, pynvml unmodified."""

from __future__ import annotations

import itertools
import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.e2e.launching import ENDED_S, Probe, perseus_block, processes_naming
from tests.nvml_simulator.building import environment
from tests.waiting import came_true

pytestmark = pytest.mark.e2e

PLANNED = ("nothing", "plan 1 for")


class Simulation:
    """A machine with simulated GPUs."""

    def __init__(self, library: Path, folder: Path, count: int) -> None:
        self.paths = [folder / "gpus" / str(index) for index in range(count)]
        # Who holds a GPU is looked for on the whole machine, where other tests run beside.
        self.uuids = [f"GPU-{uuid.uuid4()}" for _ in self.paths]
        self.gpus = [EmulatedGpu.create(path, uuid=name) for path, name in zip(self.paths, self.uuids, strict=True)]
        added = environment(library, self.paths)
        self.environment = {name: added[name] for name in ("LD_LIBRARY_PATH", "PERSEUS_SIMULATED_GPUS")}
        self.environment["PERSEUS_LOCK_DIR"] = str(folder / "locks")

    def block(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        block = perseus_block(output_dir, len(self.paths), gpu={"backend": "nvml"}, **changes)
        block["emulation"]["gpus"] = [str(path) for path in self.paths]
        return block

    def job(self, folder: Path, *do: tuple[str, str], stages: int = 2, steps: int = 400) -> Probe:
        arguments = ("--stages", str(stages), "--steps", str(steps), "--gpus", str(self.paths[0].parent / "{}"))
        return Probe(folder, self.block(folder / "out"), do, arguments, stages)

    def locked(self) -> list[int | None]:
        return [gpu.locked_mhz() for gpu in self.gpus]

    def lowered(self) -> bool:
        return any(mhz not in (None, 1410) for mhz in self.locked())

    def free(self) -> bool:
        return all(mhz is None for mhz in self.locked())


def test_planned_clocks_reach_nvml_in_order(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 4)
    job = machine.job(tmp_path, PLANNED, ("end", "+20"), stages=4)
    job.run(**machine.environment).check()
    summary = job.summary()
    assert summary["backend"] == "nvml"
    followed = summary["iterations"]["plan"]
    assert followed >= 2
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert machine.locked() == [None] * 4
    for gpu, stage in zip(machine.gpus, plan["stages"], strict=True):
        events = gpu.events()
        assert events[-1].mhz == 0, "the last thing that happens to a clock is its reset"
        assert not any(event.refused for event in events)
        # Between two resets (the end of each batch) lies one iteration of the plan.
        seen = [mhz for mhz, _ in itertools.groupby(event.mhz for event in events)]
        iterations = [list(group) for is_reset, group in itertools.groupby(seen, lambda mhz: mhz == 0) if not is_reset]
        planned = [clock for clock, _ in itertools.groupby(clock for _, _, clock in stage)]
        assert iterations.count(planned) >= 2, (planned, iterations[-4:])


# What is done to rank 1's GPU or helper, when, and what is said of it.
FAULTS = {
    "kill-helper": (PLANNED, "and a second helper sets it as before"),
    "lose-gpu": (PLANNED, "lost"),
    "take-permission": (PLANNED, "permission"),
    "slow-calls": (PLANNED, None),
    # They show where clocks are lowered on both ranks: in the sweep.
    "ignore-locks": (("nothing", "1"), "MHz were asked for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_through_a_fault(fault: str, simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    moment, message = FAULTS[fault]
    told = () if message is None else (("nothing", message),)
    job = machine.job(tmp_path, moment, (fault, "+3"), *told, ("end", "+12"))
    done = job.run(**machine.environment).check()
    if message is not None:
        complaints = [line for line in done.output.splitlines() if "(rank 1)" in line and message in line]
        assert len(complaints) == 1, done.output[-3000:]
    if fault in ("lose-gpu", "take-permission"):  # the driver takes no reset either
        machine.gpus[1].set_faults(0)
    # The job has ended; a helper whose driver calls take 2 s may still be at it, one that was refused tries again.
    assert came_true(machine.free, ENDED_S), "the helper gave up too early"
    job.check_identical()


def test_an_exception_in_the_script_resets_the_clocks(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    job = machine.job(tmp_path, PLANNED, ("raise", "+12"))
    done = job.run(**machine.environment)
    assert done.status != 0
    assert "the training script failed on purpose" in done.output
    assert came_true(machine.free, ENDED_S)
    assert came_true(lambda: not processes_naming(machine.uuids[0]), ENDED_S)
    assert job.summary()["iterations"]["profiling"] > 0


def test_sigterm_resets_the_clocks(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    with machine.job(tmp_path, steps=10_000).started(**machine.environment) as job:
        assert came_true(machine.lowered, 90, 0.002)
        for pid in job.ranks():
            os.kill(pid, signal.SIGTERM)
        assert came_true(machine.free, ENDED_S)
        job.wait()


def test_two_jobs_on_one_gpu(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    with machine.job(tmp_path / "first", steps=10_000).started(**machine.environment) as first:
        assert came_true(machine.lowered, 90, 0.002)
        second = machine.job(tmp_path / "second", steps=4).run(**machine.environment).check()
        assert "observing only" in second.output
        assert any(str(pid) in second.output for pid in first.ranks()), "the message names the holder"
        assert first.poll() is None


def test_a_full_disk(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    job = machine.job(tmp_path, ("fill-disk", "4"), PLANNED, ("end", "+1"))
    done = job.run(**machine.environment).check()
    for words in ("cannot write the profile", "cannot write plan.json", "cannot write summary.json", "plan 1 for"):
        assert words in done.output, f"not said: {words}\n{done.output}"
    assert machine.locked() == [None, None]
    assert not (tmp_path / "out" / "plan.json").exists()
    job.check_identical()
