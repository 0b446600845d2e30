"""Real jobs in which an emulated GPU becomes slow and recovers: all ranks answer, and training is bit-identical.

Times on a shared machine say little, so nothing tight is asked of them here; `benchmarks/straggler_answer.py` measures.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import REPOSITORY, Probe, perseus_block

pytestmark = pytest.mark.e2e

PLANNED = ("nothing", "plan 1 for")
ANSWERED = ("nothing", "planned for 1 slow replica(s)")
BACK = ("nothing", "no rank is slow any more")
# Iterations between a word on rank 0 and its effect on all, and some more.
A_WHILE = "+10"


def slow_job(
    folder: Path, ranks: int, stragglers: dict[str, Any], rank: int, slowdown: float, *told: str, last_s: float = 0.016
) -> Probe:
    """A job in which the GPU of a rank is slow for a while: plans may take no longer than full clocks but for that.

    `told` is what is reported when it begins and ends, `last_s` the last stage's forward, beside 0.012 s of the first.
    """
    times = {"forward_time_s": [0.012, last_s], "backward_time_s": [0.024, 2 * last_s]}
    stragglers = {"threshold": 0.1, "min_interval_s": 1.0, **stragglers}
    report, take_back = [[(what, "+0")] for what in told] or [[], []]
    do = [PLANNED, ("slow", A_WHILE), *report, ANSWERED, ("recover", A_WHILE), *take_back, BACK, ("end", A_WHILE)]
    block = perseus_block(folder / "out", 2, stragglers=stragglers, emulation=times, slowdown=0.0)
    job = Probe(folder, block, do, ("--at", str(rank), "--slowdown", str(slowdown)), ranks)
    job.run(PYTHONPATH=str(REPOSITORY)).check()
    return job


def step_of(job: Probe, what: str) -> int:
    """Before which step something was done."""
    return next(int(step) for action, step in job.facts()[0]["did"] if action == what)


def events_of(job: Probe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "out" / "events.jsonl").read_text().splitlines()]


def switches_of(job: Probe) -> list[dict[str, Any]]:
    return [event for event in events_of(job) if event["event"] == "switch"]


def check_answered(job: Probe) -> dict[str, Any]:
    """Everybody went over to plans for the slow pipeline, and back to the plan afterwards."""
    answered, back = switches_of(job)[0], switches_of(job)[-1]
    # DeepSpeed puts stage s of replica r on rank s * replicas + r; rank 3 is stage 1 of replica 1.
    ((replica, (first, second)),) = answered["slow"]
    assert (replica, first) == (1, 1.0)
    assert second > 1.1
    assert step_of(job, "slow") < answered["iteration"] < step_of(job, "recover")
    assert back["slow"] == []
    assert back["iteration"] > step_of(job, "recover")
    summary = job.summary()
    assert summary["plan"]["dropped_plans"] == 0
    figures: dict[str, Any] = summary["stragglers"]
    assert figures["energy_saved_j"] > 0
    assert figures["iterations"] >= 5
    return figures


def test_a_slow_replica_is_seen_and_answered(tmp_path: Path) -> None:
    job = slow_job(tmp_path, 4, {"detect": True}, 3, 1.25)
    figures = check_answered(job)
    assert figures["detections"] >= 1
    assert figures["reports"] == 0
    job.check_identical()


def test_a_slow_replica_is_reported_and_answered(tmp_path: Path) -> None:
    """Reported on the command line, taken back from Python; without detection there is nothing else to go by."""
    job = slow_job(tmp_path, 4, {"detect": False}, 3, 1.25, "report", "take-back")
    figures = check_answered(job)
    assert (figures["detections"], figures["reports"]) == (0, 2)
    assert not (tmp_path / "out" / "stragglers.sock").exists()
    job.check_identical()


def test_a_slow_stage_within_the_only_pipeline(tmp_path: Path) -> None:
    job = slow_job(tmp_path, 2, {"detect": True}, 0, 2.0, last_s=0.02)
    replan = next(event for event in events_of(job) if event["event"] == "replan")
    (variant,) = replan["variants"]
    slowdown, other = variant["slowdown"]
    assert slowdown > 1.5
    assert other == 1.0
    assert replan["pace_s"] < replan["without_s"], "the slow stage has to run faster than the job's plan has it"
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    before = [statistics.mean(clock for _, _, clock in stage) for stage in plan["stages"]]
    after = variant["mean_clock_mhz"]
    assert after[0] > before[0]
    assert after[1] < before[1], "its neighbour stops racing"
    assert switches_of(job)[-1]["slow"] == []
    job.check_identical()
