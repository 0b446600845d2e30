"""Real jobs whose clocks are set through NVML: the simulated library in the driver's place, pynvml unmodified."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from tests.again import hold
from tests.e2e.launching import ENDED_S, JOB_TIMEOUT_S
from tests.e2e.observed import STAGES, Observed, look_at_the_observed_job
from tests.e2e.simulation import Simulation
from tests.waiting import came_true, processes_naming

# All in one process, where what they are forked from is there once.
pytestmark = [pytest.mark.e2e, look_at_the_observed_job]

PLANNED = ("nothing", "plan 1 for")


def test_planned_clocks_reach_nvml_in_order(observed: Observed) -> None:
    assert observed.probe.summary()["backend"] == "nvml"
    plan = json.loads((observed.out / "plan.json").read_text())
    assert observed.machine.free()
    for number, (gpu, stage) in enumerate(zip(observed.machine.gpus, plan["stages"], strict=True)):
        events = gpu.events()
        hold(events[-1].mhz == 0, "the last thing that happens to a clock is its reset")
        assert not any(event.refused for event in events)
        # Between two resets (the end of each batch) lies one iteration of the plan.
        seen = [mhz for mhz, _ in itertools.groupby(event.mhz for event in events)]
        iterations = [list(group) for is_reset, group in itertools.groupby(seen, lambda mhz: mhz == 0) if not is_reset]
        clocks = [[clock] for _, _, clock in stage]
        waiting: list[list[int]] = [[], *clocks]
        for after, clock, _, _ in plan.get("waits", [[]] * STAGES)[number]:
            waiting[after + 1] = [*waiting[after + 1], clock]
        # Waits have clocks of their own once it is known how long they are.
        planned = [[clock for clock, _ in itertools.groupby(itertools.chain(*of))] for of in (clocks, waiting)]
        assert sum(iterations.count(one) for one in planned) >= 2, (planned, iterations[-4:])


# What is done to rank 1's GPU or helper, when, and what is said of it.
FAULTS = {
    "kill-helper": (PLANNED, "and a second helper sets it as before"),
    "lose-gpu": (PLANNED, "lost"),
    "take-permission": (PLANNED, "permission"),
    "slow-calls": (PLANNED, None),
    # They show where clocks are lowered on both ranks: in the sweep.
    "ignore-locks": (("nothing", "1"), "MHz were asked for"),
}


# Like one of the others, and where something else is looked at too: test_megatron.py, tests/session/test_faults.py.
REPEATED = ("kill-helper", "lose-gpu", "take-permission", "slow-calls")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.repeated] if fault in REPEATED else []) for fault in FAULTS]
)
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
    # Clocks are being tried by then.
    job = machine.job(tmp_path, ("raise", "10"))
    done = job.run(**machine.environment)
    assert done.status != 0
    assert "the training script failed on purpose" in done.output
    assert all(any(0 < event.mhz < 1410 for event in gpu.events()) for gpu in machine.gpus)
    assert came_true(machine.free, ENDED_S)
    assert came_true(lambda: not processes_naming(machine.uuids[0]), ENDED_S)
    assert job.summary()["iterations"]["profiling"] > 0


def test_a_second_job_only_observes_and_sigterm_resets_the_clocks(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    with machine.job(tmp_path / "first", steps=10_000).started(**machine.environment) as first:
        assert came_true(machine.lowered, JOB_TIMEOUT_S, 0.002)
        second = machine.job(tmp_path / "second", steps=4).run(**machine.environment).check()
        assert "observing only" in second.output
        assert any(str(pid) in second.output for pid in first.ranks()), "the message names the holder"
        assert first.poll() is None
        assert came_true(machine.lowered, JOB_TIMEOUT_S, 0.002)
        for pid in first.ranks():
            os.kill(pid, signal.SIGTERM)
        assert came_true(machine.free, ENDED_S)
        first.wait()


def test_a_full_disk(simulated_nvml: Path, tmp_path: Path) -> None:
    machine = Simulation(simulated_nvml, tmp_path, 2)
    job = machine.job(tmp_path, ("fill-disk", "4"), PLANNED, ("end", "+1"))
    done = job.run(**machine.environment).check()
    for words in ("cannot write the profile", "cannot write plan.json", "cannot write summary.json", "plan 1 for"):
        assert words in done.output, f"not said: {words}\n{done.output}"
    hold(machine.locked() == [None, None], "no clock stays locked")
    assert not (tmp_path / "out" / "plan.json").exists()
    job.check_identical()
