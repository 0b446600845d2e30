"""A session's life in a real job: loading, traces, trouble, and what is left when processes die."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.again import hold
from tests.e2e.launching import Probe, perseus_block

pytestmark = pytest.mark.e2e

OFF = "perseus is off from here on"
PLANNED = ("nothing", "plan 1 for TrainSchedule/2x2 ready")


@pytest.mark.parametrize("block", [None, {"enabled": False}], ids=["absent", "disabled"])
def test_absent_or_disabled_leaves_no_trace(block: dict[str, Any] | None, tmp_path: Path) -> None:
    job = Probe(tmp_path, block, arguments=("--steps", "2"))
    job.run().check()
    for facts in job.facts():
        for seen in facts["looks"]:
            assert seen["stock_map"]
            assert seen["on_engine"] == []
            assert seen["threads"] == []
            assert seen["children"] == 0
            assert "ortools" not in seen["modules"]
            assert "perseus_plugin.session.session" not in seen["modules"]


def test_enable_by_hand_a_changed_number_of_microbatches_and_a_failure_of_ours(tmp_path: Path) -> None:
    block = tmp_path / "block.json"
    block.write_text(json.dumps(perseus_block(tmp_path / "out", 2)))
    # What plan.json shows is what most of the last 32 iterations ran.
    changed = [PLANNED, ("more-batches", "+8"), ("nothing", "for TrainSchedule/2x4 ready")]
    failed = [("look", "+36"), ("break-tap", "+0"), ("nothing", OFF), ("end", "+4")]
    by_hand = Probe(tmp_path, None, [*changed, *failed], ("--enable", str(block)))
    done = by_hand.run(TORCH_DEVICE_BACKEND_AUTOLOAD="0").check()
    assert len(re.findall(r"plan \d+ for TrainSchedule/2x2 ready", done.output)) == 1
    assert len(re.findall(r"plan \d+ for TrainSchedule/2x4 ready", done.output)) == 1
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["microbatches"] == 4
    assert all(len(stage) == 8 for stage in plan["stages"])
    assert by_hand.summary()["iterations"]["plan"] >= 2
    for facts in by_hand.facts():
        before, following, at_end = facts["looks"]
        assert before["on_engine"] == [], "without the entry point"
        assert following["on_engine"] != []
        # Between iterations the engine runs stock functions even while it follows a plan.
        assert following["stock_map"]
        assert at_end["stock_map"]
        assert at_end["on_engine"] == []
    assert OFF in done.output
    for rank in range(2):
        gpu = EmulatedGpu(tmp_path / "out" / "emulated_gpus" / f"rank{rank}")
        hold(gpu.locked_mhz() is None, "no clock stays locked")
    by_hand.check_identical()


def test_evaluation_and_a_number_of_microbatches_that_changes_with_every_step(tmp_path: Path) -> None:
    job = Probe(
        tmp_path,
        perseus_block(tmp_path / "out", 2),
        [*(("nothing", f"plan {number} for") for number in range(1, 4)), ("end", "+24")],
        ("--batches-from", "2,4", "--evaluate-every", "5"),
    )
    done = job.run().check()
    for count in range(2, 5):
        assert len(re.findall(rf"plan \d+ for TrainSchedule/2x{count} ready", done.output)) == 1
    summary = job.summary()
    assert summary["iterations"]["plan"] > 4
    assert sorted(summary["planned_schedules"]) == [f"TrainSchedule/2x{count}" for count in range(2, 5)]
    assert summary["plan"]["dropped_plans"] == 0
    job.check_identical()


@pytest.mark.repeated  # with helpers that are made up: tests/session/test_session.py
def test_a_profile_is_used_again_for_the_same_job_only(tmp_path: Path) -> None:
    block = perseus_block(tmp_path / "out", 2)
    first = Probe(tmp_path / "first", block, [PLANNED, ("end", "+3")]).run().check()
    assert "profiling block 5 of 5" in first.output
    again = Probe(tmp_path / "again", block, [PLANNED, ("end", "+12")]).run().check()
    assert "using the profile kept in" in again.output
    assert "profiling block 1 of 1" in again.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"]["plan"] >= 2
    another = {"train_micro_batch_size_per_gpu": 2}
    other = Probe(tmp_path / "other", block, arguments=("--steps", "3"), config=another).run().check()
    assert "profiling anew" in other.output
    assert "stage 0: microbatch size was 1 and is 2" in other.output


@pytest.mark.repeated  # from what ranks tell on: tests/leader/test_coordinator.py
def test_a_plan_that_does_not_hold_is_dropped_and_made_anew(tmp_path: Path) -> None:
    watch = {"tolerance": 0.2, "patience": 3, "reference_share": 0}  # references would be as slow as the plan
    again = [("nothing", "the job itself is slower"), ("nothing", "for TrainSchedule/2x2 ready"), ("end", "+12")]
    do = [PLANNED, ("slow", "+12"), ("nothing", "back to full clocks, measuring and planning again"), *again]
    job = Probe(tmp_path, perseus_block(tmp_path / "out", 2, watch=watch), do)
    done = job.run().check()
    for _, words in do[2:5]:
        assert words in done.output
    summary = job.summary()
    assert summary["plan"]["dropped_plans"] >= 1
    assert summary["iterations"]["plan"] >= 2


def test_a_wrong_block_stops_the_job_with_one_error(tmp_path: Path) -> None:
    job = Probe(tmp_path, {"enabled": True, "profiling": {"steps_per_clok": 3}}, arguments=("--steps", "2"))
    done = job.run()
    assert done.status != 0
    assert not list(tmp_path.glob("facts*.json"))
    errors = [line for line in done.output.splitlines() if "ConfigError:" in line]
    assert len({re.sub(r"^\[rank\d\]: ", "", line) for line in errors}) == 1
    assert "perseus.profiling.steps_per_clok: unknown key, given the value 3" in errors[0]
    assert "did you mean 'steps_per_clock'?" in errors[0]
