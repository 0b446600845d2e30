"""A session's life in a real job: loading, traces, trouble, and what is left when processes die."""

from __future__ import annotations

import json
import os
import re
import signal
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

pytestmark = pytest.mark.e2e


def facts_of(folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("block", [None, {"enabled": False}])
def test_absent_or_disabled_leaves_no_trace(block: dict[str, Any] | None, tmp_path: Path) -> None:
    config = dict(BASE_CONFIG) if block is None else {**BASE_CONFIG, "perseus": block}
    run_job(PROBE, 2, config, tmp_path, "--steps", "2").check()
    for facts in facts_of(tmp_path):
        for moment in ("at_start", "at_end"):
            seen = facts[moment]
            assert seen["stock_map"]
            assert seen["on_engine"] == []
            assert seen["threads"] == []
            assert seen["children"] == 0
            assert "ortools" not in seen["modules"]
            assert "perseus_plugin.session.session" not in seen["modules"]


def test_enable_by_hand_and_a_changed_number_of_microbatches(tmp_path: Path) -> None:
    block = tmp_path / "block.json"
    block.write_text(json.dumps(perseus_block(tmp_path / "out", 2)))
    arguments = ("--steps", "80", "--change-batch-at", "50", "--enable", str(block))
    done = run_job(PROBE, 2, BASE_CONFIG, tmp_path, *arguments, TORCH_DEVICE_BACKEND_AUTOLOAD="0").check()
    assert len(re.findall(r"plan \d+ for TrainSchedule/2x4 ready", done.output)) == 1
    assert len(re.findall(r"plan \d+ for TrainSchedule/2x6 ready", done.output)) == 1
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["microbatches"] == 6
    assert all(len(stage) == 12 for stage in plan["stages"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["plan"] >= 2
    # Between iterations the engine runs stock functions even while a plan is followed.
    assert all(facts["at_end"]["stock_map"] for facts in facts_of(tmp_path))

    reference = tmp_path / "reference"
    run_job(PROBE, 2, BASE_CONFIG, reference, *arguments[:4]).check()
    assert facts_of(tmp_path)[0]["losses"] == facts_of(reference)[0]["losses"]


def test_a_number_of_microbatches_that_changes_with_every_step(tmp_path: Path) -> None:
    block = perseus_block(tmp_path / "out", 2)
    arguments = ("--steps", "110", "--batches-from", "2,5")
    done = run_job(PROBE, 2, {**BASE_CONFIG, "perseus": block}, tmp_path, *arguments).check()
    for count in range(2, 6):
        assert len(re.findall(rf"plan \d+ for TrainSchedule/2x{count} ready", done.output)) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["iterations"]["plan"] > 30
    assert sorted(summary["planned_schedules"]) == [f"TrainSchedule/2x{count}" for count in range(2, 6)]
    assert summary["saving_percent"]["predicted"] > 1
    assert summary["plan"]["dropped_plans"] == 0
    run_job(PROBE, 2, BASE_CONFIG, tmp_path / "reference", *arguments).check()
    assert facts_of(tmp_path)[0]["losses"] == facts_of(tmp_path / "reference")[0]["losses"]


def test_a_profile_is_used_again_for_the_same_job_only(tmp_path: Path) -> None:
    config = {**BASE_CONFIG, "perseus": perseus_block(tmp_path / "out", 2)}
    first = run_job(PROBE, 2, config, tmp_path / "first", "--steps", "40").check()
    assert "profiling clock 5 of 5" in first.output
    again = run_job(PROBE, 2, config, tmp_path / "again", "--steps", "40").check()
    assert "using the profile kept in" in again.output
    assert "profiling clock 1 of 1" in again.output
    assert "plan 1 for TrainSchedule/2x4 ready" in again.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["plan"] >= 2
    other = run_job(
        PROBE, 2, {**config, "train_micro_batch_size_per_gpu": 2}, tmp_path / "other", "--steps", "3"
    ).check()
    assert "profiling anew" in other.output
    assert "stage 0: microbatch size was 1 and is 2" in other.output


def test_a_plan_that_does_not_hold_is_dropped_and_made_anew(tmp_path: Path) -> None:
    watch = {"tolerance": 0.2, "patience": 3, "reference_share": 0}  # references would be as slow as the plan
    block = perseus_block(tmp_path / "out", 2, watch=watch)
    done = run_job(
        PROBE, 2, {**BASE_CONFIG, "perseus": block}, tmp_path, "--steps", "90", "--slow-gpu-at", "50"
    ).check()
    assert "back to full clocks, measuring and planning again" in done.output
    assert "the job itself is slower" in done.output
    assert "plan 2 for TrainSchedule/2x4 ready" in done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["plan"]["dropped_plans"] >= 1
    assert summary["iterations"]["plan"] >= 2


def test_a_wrong_block_stops_the_job_with_one_error(tmp_path: Path) -> None:
    config = {**BASE_CONFIG, "perseus": {"enabled": True, "profiling": {"steps_per_clok": 3}}}
    done = run_job(PROBE, 2, config, tmp_path, "--steps", "2")
    assert done.status != 0
    assert not list(tmp_path.glob("facts*.json"))
    errors = [line for line in done.output.splitlines() if "ConfigError:" in line]
    assert len({re.sub(r"^\[rank\d\]: ", "", line) for line in errors}) == 1
    assert "perseus.profiling.steps_per_clok: unknown key, given the value 3" in errors[0]
    assert "did you mean 'steps_per_clock'?" in errors[0]


def test_a_failure_of_ours_does_not_stop_training(tmp_path: Path) -> None:
    config = {**BASE_CONFIG, "perseus": perseus_block(tmp_path / "out", 2)}
    done = run_job(PROBE, 2, config, tmp_path, "--steps", "20", "--break-tap-at", "8").check()
    assert "perseus is off from here on" in done.output
    reference = tmp_path / "reference"
    run_job(PROBE, 2, BASE_CONFIG, reference, "--steps", "20").check()
    assert facts_of(tmp_path)[0]["losses"] == facts_of(reference)[0]["losses"]
    for rank in range(2):
        assert EmulatedGpu(tmp_path / "out" / "emulated_gpus" / f"rank{rank}").locked_mhz() is None
    assert all(facts["at_end"]["on_engine"] == [] for facts in facts_of(tmp_path))


def test_sigkill_leaves_no_helper_and_no_locked_clock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = {**BASE_CONFIG, "perseus": perseus_block(out, 2)}
    paths = [out / "emulated_gpus" / f"rank{rank}" for rank in range(2)]

    def locked() -> bool:
        return all(path.exists() for path in paths) and all(
            EmulatedGpu(path).locked_mhz() not in (None, 1410) for path in paths
        )

    with started_job(TRAIN, 2, config, tmp_path, *SMALL, "--stages", "2", "--steps", "10000") as job:
        assert wait_until(locked, 90, 0.002), "no clock was ever lowered"
        assert len(processes_naming(str(out))) == 2
        trainers = processes_naming(str(tmp_path), among=(TRAIN.name,))
        for pid in trainers:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not processes_naming(str(out)), 1.0), "a helper lives on"
        assert [EmulatedGpu(path).locked_mhz() for path in paths] == [None, None]
        job.wait(timeout=30)
