"""Real jobs in which an emulated GPU becomes slow and recovers: all ranks answer, and training is bit-identical.

Times on a shared machine say little, so nothing tight is asked of them here; `benchmarks/straggler_answer.py` measures.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import BASE_CONFIG, REPOSITORY, perseus_block, run_job

pytestmark = pytest.mark.e2e

PROBE = Path(__file__).with_name("straggler_probe.py")
SLOW_AT, RECOVER_AT, STEPS = 36, 54, 66
# DeepSpeed puts stage s of replica r on rank s * replicas + r.
FAST, SLOW = (0, 2), (1, 3)


def run(folder: Path, ranks: int, stragglers: dict[str, Any] | None, *arguments: str) -> list[dict[str, Any]]:
    """Every rank's facts; without the plugin if `stragglers` is None."""
    config = dict(BASE_CONFIG)
    if stragglers is not None:
        times = {"forward_time_s": [0.012, 0.016], "backward_time_s": [0.024, 0.032]}
        stragglers = {"threshold": 0.1, "min_interval_s": 1.0, **stragglers}
        config["perseus"] = perseus_block(folder / "out", 2, stragglers=stragglers, emulation=times)
    steps = ("--steps", str(STEPS), "--slow-at", str(SLOW_AT), "--recover-at", str(RECOVER_AT))
    run_job(PROBE, ranks, config, folder, *steps, *arguments, PYTHONPATH=str(REPOSITORY)).check()
    return [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(ranks)]


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "events.jsonl").read_text().splitlines()]


def energy_j(facts: list[dict[str, Any]], ranks: tuple[int, ...], first: int, end: int) -> float:
    """Median energy of an iteration of some ranks' GPUs."""
    kept = [facts[rank]["energy_j"] for rank in ranks]
    return statistics.median(sum(e[i + 1] - e[i] for e in kept) for i in range(first, end))


def switches_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "switch"]


def check_answered(folder: Path, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """The fast replica saved energy while the other one was slow, and all went back to the plan afterwards."""
    events = events_of(folder)
    answered, back = switches_of(events)[0], switches_of(events)[-1]
    assert answered["slow"] == [[1, [1.0, pytest.approx(1.25, abs=0.06)]]]
    assert SLOW_AT < answered["iteration"] < RECOVER_AT
    assert back["slow"] == []
    assert RECOVER_AT < back["iteration"] <= RECOVER_AT + 10
    before_j = energy_j(facts, FAST, SLOW_AT, answered["iteration"] - 1)
    after_j = energy_j(facts, FAST, answered["iteration"] + 1, RECOVER_AT)
    assert after_j < 0.9 * before_j
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["plan"]["dropped_plans"] == 0
    figures: dict[str, Any] = summary["stragglers"]
    assert figures["energy_saved_j"] > 0
    assert figures["iterations"] >= 5
    return figures


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the job of four ranks without the plugin."""
    made: list[float] = run(tmp_path_factory.mktemp("without"), 4, None)[0]["losses"]
    return made


def test_a_slow_replica_is_seen_and_answered(tmp_path: Path, losses: list[float]) -> None:
    facts = run(tmp_path, 4, {"detect": True}, "--slow-rank", "3")
    figures = check_answered(tmp_path, facts)
    assert figures["detections"] >= 1
    assert figures["reports"] == 0
    assert facts[0]["losses"] == losses


def test_a_slow_replica_is_reported_and_answered(tmp_path: Path, losses: list[float]) -> None:
    """Reported on the command line, taken back from Python; without detection there is nothing else to go by."""
    facts = run(tmp_path, 4, {"detect": False}, "--slow-rank", "3", "--report")
    figures = check_answered(tmp_path, facts)
    assert (figures["detections"], figures["reports"]) == (0, 2)
    assert switches_of(events_of(tmp_path))[0]["iteration"] <= SLOW_AT + 6
    assert facts[0]["losses"] == losses
    assert not (tmp_path / "out" / "stragglers.sock").exists()


def test_a_slow_stage_within_the_only_pipeline(tmp_path: Path) -> None:
    facts = run(tmp_path, 2, {"detect": True}, "--slow-rank", "0", "--slowdown", "1.8")
    events = events_of(tmp_path)
    replan = next(event for event in events if event["event"] == "replan")
    (variant,) = replan["variants"]
    assert variant["slowdown"] == [pytest.approx(1.8, abs=0.1), 1.0]
    assert replan["pace_s"] < replan["without_s"], "the slow stage has to run faster than the job's plan has it"
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    before = [statistics.mean(clock for _, _, clock in stage) for stage in plan["stages"]]
    after = variant["mean_clock_mhz"]
    assert after[0] > before[0]
    assert after[1] < before[1], "its neighbour stops racing"
    assert switches_of(events)[-1]["slow"] == []
    without = run(tmp_path / "without", 2, None)
    assert len(without[0]["losses"]) == STEPS
    assert facts[0]["losses"] == without[0]["losses"]
