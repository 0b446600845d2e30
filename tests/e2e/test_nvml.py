"""Real jobs whose clocks are set through NVML: the simulated library in the driver's place, pynvml unmodified."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.e2e.launching import (
    BASE_CONFIG,
    PROBE,
    SMALL,
    TRAIN,
    perseus_block,
    processes_naming,
    run_job,
    started_job,
    wait_until,
)
from tests.nvml_simulator.building import environment

pytestmark = pytest.mark.e2e


class Simulation:
    """A machine with simulated GPUs."""

    def __init__(self, library: Path, folder: Path, count: int) -> None:
        self.paths = [folder / "gpus" / str(index) for index in range(count)]
        self.gpus = [EmulatedGpu.create(path, uuid=f"GPU-{index}") for index, path in enumerate(self.paths)]
        added = environment(library, self.paths)
        self.environment = {name: added[name] for name in ("LD_LIBRARY_PATH", "PERSEUS_SIMULATED_GPUS")}
        self.environment["PERSEUS_LOCK_DIR"] = str(folder / "locks")

    def block(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        block = perseus_block(output_dir, len(self.paths), gpu={"backend": "nvml"}, **changes)
        block["emulation"]["gpus"] = [str(path) for path in self.paths]
        return block

    def locked(self) -> list[int | None]:
        return [gpu.locked_mhz() for gpu in self.gpus]


def test_planned_clocks_reach_nvml_in_order(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 4)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    run_job(TRAIN, 4, config, tmp_path, *SMALL, "--stages", "4", "--steps", "40", **machine.environment).check()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
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
        assert iterations.count(planned) >= followed / 2, (planned, iterations[-4:])


FAULTS = {
    "helper-killed": r"the clock helper ended with status -9",
    "gpu-lost": r"lost",
    "no-permission": r"permission",
    "slow-calls": None,
    "locks-ignored": r"MHz were asked for",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_through_a_fault(fault: str, simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    # Locks that are ignored show where clocks are lowered on both ranks: in the sweep.
    moment = "4" if fault == "locks-ignored" else "30"
    arguments = ("--steps", "60", "--fault", fault, "--fault-at", moment)
    done = run_job(PROBE, 2, config, tmp_path, *arguments, **machine.environment).check()
    message = FAULTS[fault]
    if message is not None:
        complaints = [line for line in done.output.splitlines() if "(rank 1)" in line and re.search(message, line)]
        assert len(complaints) == 1, done.output[-3000:]
    if fault not in ("gpu-lost", "no-permission"):  # there the driver takes no reset either
        # The job has ended; a helper whose driver calls take 2 s may still be at it.
        assert wait_until(lambda: machine.locked() == [None, None], 10.0 if fault == "slow-calls" else 1.0)
    else:
        machine.gpus[1].set_faults(0)
        assert wait_until(lambda: machine.locked() == [None, None], 10.0), "the helper gave up too early"
    assert losses_of(tmp_path) == reference_losses(tmp_path, 60)


def test_an_exception_in_the_script_resets_the_clocks(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    done = run_job(PROBE, 2, config, tmp_path, "--steps", "60", "--raise-at", "40", **machine.environment)
    assert done.status != 0
    assert "the training script failed on purpose" in done.output
    assert wait_until(lambda: machine.locked() == [None, None], 1.0)
    assert not processes_naming("GPU-0")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["profiling"] > 0


def test_sigterm_resets_the_clocks(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    arguments = (*SMALL, "--stages", "2", "--steps", "10000")
    with started_job(TRAIN, 2, config, tmp_path, *arguments, **machine.environment) as job:
        assert wait_until(lambda: any(mhz not in (None, 1410) for mhz in machine.locked()), 90, 0.002)
        for pid in processes_naming(str(tmp_path), among=(TRAIN.name,)):
            os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: machine.locked() == [None, None], 1.0)
        job.wait(timeout=60)


def test_two_jobs_on_one_gpu(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    arguments = (*SMALL, "--stages", "2", "--steps", "10000")
    with started_job(TRAIN, 2, config, tmp_path / "first", *arguments, **machine.environment) as first:
        assert wait_until(lambda: any(mhz not in (None, 1410) for mhz in machine.locked()), 90, 0.002)
        second_config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "second_out")}
        second = run_job(PROBE, 2, second_config, tmp_path / "second", "--steps", "4", **machine.environment).check()
        assert "observing only" in second.output
        holders = processes_naming(str(tmp_path / "first"), among=(TRAIN.name,))
        assert any(str(pid) in second.output for pid in holders), "the message names the holder"
        assert first.poll() is None


def test_a_full_disk(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    config = {**BASE_CONFIG, "perseus": machine.block(tmp_path / "out")}
    arguments = ("--steps", "400", "--full-disk-at", "4", "--until-said", "plan 1 for")
    done = run_job(PROBE, 2, config, tmp_path, *arguments, **machine.environment).check()
    for words in ("cannot write the profile", "cannot write plan.json", "cannot write summary.json", "plan 1 for"):
        assert words in done.output, f"not said: {words}\n{done.output}"
    assert machine.locked() == [None, None]
    losses = losses_of(tmp_path)
    assert losses == reference_losses(tmp_path, len(losses))
    assert not (tmp_path / "out" / "plan.json").exists()


def losses_of(folder: Path) -> Sequence[float]:
    losses: list[float] = json.loads((folder / "facts0.json").read_text())["losses"]
    return losses


_references: dict[int, Sequence[float]] = {}


def reference_losses(folder: Path, steps: int) -> Sequence[float]:
    """Losses of the probe without the plugin."""
    if steps not in _references:
        run_job(PROBE, 2, BASE_CONFIG, folder / "reference", "--steps", str(steps)).check()
        _references[steps] = losses_of(folder / "reference")
    return _references[steps]
