"""Real jobs in which an emulated GPU becomes slow and recovers: all ranks answer, and training is bit-identical.

Times on a shared machine say little, so nothing tight is asked of them here; `benchmarks/straggler_answer.py` measures.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import MIXED, Probe, perseus_block

pytestmark = pytest.mark.e2e

PLANNED = ("nothing", "plan 1 for")
ANSWERED = ("nothing", "planned for 1 slow replica(s)")
BACK = ("nothing", "no rank is slow any more")
IN_FORCE = ("nothing", "is in force from iteration")
# Iterations between a word on rank 0 and its effect on all, and some more.
A_WHILE = "+10"


def slow_job(
    folder: Path,
    ranks: int,
    stragglers: dict[str, Any],
    rank: int,
    slowdown: float,
    do: Sequence[tuple[str, str]],
    last_s: float = 0.016,
    config: dict[str, Any] | None = None,
) -> Probe:
    """A job in which the GPU of a rank is slow for a while: plans may take no longer than full clocks but for that.

    `last_s` is the last stage's forward, beside 0.012 s of the first, `config` what else DeepSpeed is told. With fewer
    microbatches neighbours never wait, and iterations are so short that many pass until an answer is in force.
    """
    times = {"forward_time_s": [0.012, last_s], "backward_time_s": [0.024, 2 * last_s]}
    stragglers = {"threshold": 0.1, "min_interval_s": 1.0, **stragglers}
    block = perseus_block(folder / "out", 2, stragglers=stragglers, emulation=times, slowdown=0.0)
    config = {"gradient_accumulation_steps": 4, **(config or {})}
    job = Probe(folder, block, do, ("--at", str(rank), "--slowdown", str(slowdown)), ranks, config)
    job.run().check()
    return job


def steps_of(job: Probe, what: str) -> list[int]:
    """Before which steps something was done."""
    return [int(step) for action, step in job.facts()[0]["did"] if action == what]


def events_of(job: Probe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "out" / "events.jsonl").read_text().splitlines()]


def switches_of(job: Probe) -> list[dict[str, Any]]:
    return [event for event in events_of(job) if event["event"] == "switch"]


def check_answered(job: Probe, begin: str, end: str, then: str = "end") -> dict[str, Any]:
    """Between two things that were done everybody ran plans for the slow pipeline, then the plan until a third."""
    (begun,), (ended,), (until,) = (steps_of(job, what) for what in (begin, end, then))
    answered, *others = [switch for switch in switches_of(job) if begun < switch["iteration"] <= until]
    # DeepSpeed puts stage s of replica r on rank s * replicas + r; rank 3 is stage 1 of replica 1.
    ((replica, (first, second)),) = answered["slow"]
    assert (replica, first) == (1, 1.0)
    assert second > 1.1
    assert answered["iteration"] < ended
    # Others may look slow for a moment on a busy machine, before or after.
    assert any(switch["slow"] == [] and switch["iteration"] > ended for switch in others)
    summary = job.summary()
    assert summary["plan"]["dropped_plans"] == 0
    figures: dict[str, Any] = summary["stragglers"]
    assert figures["energy_saved_j"] > 0
    assert figures["iterations"] >= 5
    return figures


def test_a_slow_replica_is_answered_when_it_is_seen_and_when_it_is_reported(tmp_path: Path) -> None:
    """Reported on the command line, when the GPU has recovered; taken back from Python. Mixed precision, ZeRO-1.

    Then the job is told to aim at something else: from Python, and on the command line.
    """
    seen = [("slow", A_WHILE), ANSWERED, ("recover", A_WHILE), BACK]
    reported = [("report", A_WHILE), ANSWERED, ("take-back", A_WHILE), BACK]
    aimed = [("aim-lower", A_WHILE), IN_FORCE, ("aim-at-full", A_WHILE), IN_FORCE]
    do = [PLANNED, *seen, *reported, *aimed, ("end", A_WHILE)]
    job = slow_job(tmp_path, 4, {"detect": True}, 3, 1.25, do, config=MIXED)
    check_answered(job, "slow", "recover", "report")
    figures = check_answered(job, "report", "take-back", "aim-lower")
    assert figures["detections"] >= 1
    assert figures["reports"] == 2
    (lower,), (at_full,) = steps_of(job, "aim-lower"), steps_of(job, "aim-at-full")
    begins = {e["says"]: e["iteration"] for e in events_of(job) if e["event"] == "target" and e["state"] == "in force"}
    assert lower < begins["slowdown 20 %"] <= at_full < begins["full clocks"]
    assert job.summary()["targets"].keys() >= {"slowdown 0 %", "slowdown 20 %", "full clocks"}
    assert not (tmp_path / "out" / "stragglers.sock").exists()
    job.check_identical()


@pytest.mark.repeated
def test_a_slow_replica_is_reported_and_answered(tmp_path: Path) -> None:
    """Without detection there is nothing else to go by."""
    reported = [("slow", A_WHILE), ("report", "+0"), ANSWERED, ("recover", A_WHILE), ("take-back", "+0"), BACK]
    job = slow_job(tmp_path, 4, {"detect": False}, 3, 1.25, [PLANNED, *reported, ("end", A_WHILE)])
    figures = check_answered(job, "report", "take-back")
    assert (figures["detections"], figures["reports"]) == (0, 2)
    job.check_identical()


@pytest.mark.repeated  # from what ranks tell on: tests/stragglers/test_answers.py
def test_a_slow_stage_within_the_only_pipeline(tmp_path: Path) -> None:
    seen = [("slow", A_WHILE), ANSWERED, ("recover", A_WHILE), BACK]
    job = slow_job(tmp_path, 2, {"detect": True}, 0, 2.0, [PLANNED, *seen, ("end", A_WHILE)], last_s=0.02)
    replan = next(event for event in events_of(job) if event["event"] == "replan")
    (variant,) = replan["variants"]
    slowdown, other = variant["slowdown"]
    assert slowdown > 1.5
    assert other == 1.0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    before = [statistics.mean(clock for _, _, clock in stage) for stage in plan["stages"]]
    after = variant["mean_clock_mhz"]
    # Where a machine is busy, the energy of a stage may stay unknown, so that every plan leaves it at full clocks, or
    # iterations may vary so much that the job's plan is full clocks: then the slow stage cannot run faster than that.
    inputs = json.loads((tmp_path / "out" / "plan-inputs.json").read_text())
    unknown = {stage for stage, _ in inputs["full_clock_only"]}
    if before[0] < max(float(row["frequency"]) for row in csv.DictReader(inputs["profile"].splitlines())):
        assert replan["pace_s"] < replan["without_s"], "the slow stage has to run faster than the job's plan has it"
        assert after[0] > before[0]
    else:
        assert replan["pace_s"] <= replan["without_s"]
        assert variant["energy_j"] < variant["without_j"] or unknown == {0, 1}, (
            "waits that cannot be made shorter are used"
        )
    assert after[1] <= before[1] if 1 in unknown else after[1] < before[1], "its neighbour stops racing"
    assert switches_of(job)[-1]["slow"] == []
    job.check_identical()
