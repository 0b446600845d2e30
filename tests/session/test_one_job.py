"""A job of two stages with real sessions, from the sweep to the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from perseus_plugin.cli.plan import plan as plan_command
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A100, MODELS, WAITING
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.plan import Plan, load_plan
from perseus_plugin.profiling.profile import load_profile, save_profile
from perseus_plugin.reporting.record.records import load_record
from perseus_plugin.reporting.report.folder import load_folder
from tests.one_job import OneJob, Step
from tests.planning.jobs import bundled_profile

NOT_IN_TRAINING = ("click", "matplotlib", "ortools", "pandas", "plotly", "prometheus_client", "rich", "scipy", "typer")

# On a busy machine times are noisy: with room for that there is always something to save.
SHORT: dict[str, Any] = {
    "slowdown": 0.15,
    "profiling": {
        "warmup_steps": 2,
        "clocks_mhz": [1410, 1110, 810],
        "steps_per_clock": 2,
        "max_relative_error": 1.0,
        "max_time_error": 1.0,
    },
    "frontier": False,
    "stragglers": {"detect": False},
    "watch": {"tolerance": 1.0},
}
# Of two short iterations a busy machine leaves too little to tell energies apart by.
MORE: dict[str, Any] = {**SHORT, "profiling": {**SHORT["profiling"], "steps_per_clock": 6}}


def planned_again(folder: Path, *options: str) -> Plan:
    """What `perseus plan FOLDER` makes of a job."""
    app = typer.Typer()
    app.command()(plan_command)
    done = CliRunner().invoke(app, [str(folder), "-o", str(folder / "again.json"), *options])
    assert done.exit_code == 0, done.output
    return load_plan(folder / "again.json")


def test_a_job_profiles_plans_and_saves_at_the_time_of_full_clocks(tmp_path: Path) -> None:
    folder, left = tmp_path / "job", iter(range(16))

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    job = OneJob(
        folder,
        [Step()] * 10_000,
        forward_s=(0.020, 0.036),  # a tenth to save, of which a busy machine's delays leave a part
        backward_s=(0.040, 0.072),
        plugin={**MORE, "slowdown": 0.0},
        until=planned_for_a_while,
    )
    ran = job.run()
    assert len(ran.times_s) == len(ran.energies_j) == len(ran.states) < 10_000
    assert ran.states[:2] == ["warm-up"] * 2
    assert ran.states[2] == "profiling"
    planned_j = [energy_j for energy_j, state in zip(ran.energies_j, ran.states, strict=True) if state == "plan"]
    assert planned_j
    assert min(planned_j) < 0.985 * ran.energies_j[4], "which ran at the top clock"
    assert ran.summary["state"] == "finished"
    assert ran.summary["plan"]["dropped_plans"] == 0
    assert ran.summary["plan"]["saving_percent"] > 1
    assert ran.summary["slowdown_percent"]["predicted"] <= 0.5, "what a replay may be longer"
    assert planned_again(folder) == load_plan(folder / "plan.json"), "to the digit"
    slower = planned_again(folder, "--slowdown", "20%")
    assert slower.baseline_energy_j == load_plan(folder / "plan.json").baseline_energy_j
    assert slower.deadline_s == pytest.approx(1.2 * slower.baseline_time_s)
    for (stage, _), rows in load_profile(folder / "profile.csv").table.items():
        waiting_w = [row.blocking_power_w for row in rows]
        assert waiting_w == sorted(waiting_w, reverse=True), f"stage {stage}"
        for row in rows:
            error_w = abs(row.blocking_power_w - A100.power_w(WAITING, row.frequency_mhz))
            assert error_w < max(4 * row.blocking_power_se_w, 10.0), f"stage {stage} at {row.frequency_mhz} MHz"


def test_another_rank_may_lead(tmp_path: Path) -> None:
    folder, left = tmp_path / "job", iter(range(8))

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    ran = OneJob(folder, [Step()] * 10_000, plugin=SHORT, leader=1, until=planned_for_a_while).run()
    assert (ran.summary["state"], ran.summary["ranks_reporting"]) == ("finished", 2)
    assert ran.summary["iterations"]["plan"] > 0
    assert load_record(folder, 1).placement.leads
    run = load_folder(folder).series()
    assert run is not None
    assert run.stretches == load_record(folder, 1).stretches, "as the rank that leads saw iterations"


@pytest.mark.repeated  # what is decided and run then: tests/leader/test_decide_targets.py, tests/session/test_worker.py
def test_a_dry_run_says_what_its_plan_would_save_and_leaves_clocks_alone(tmp_path: Path) -> None:
    folder, left = tmp_path / "job", iter(range(8))

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    ran = OneJob(folder, [Step()] * 10_000, plugin={**MORE, "enforce": False}, until=planned_for_a_while).run()
    swept = max(number for number, state in enumerate(ran.states) if state == "profiling")
    assert set(ran.states[swept + 1 :]) == {"planning", "a dry run"}
    # A plan would take a sixth less; a busy machine makes iterations longer, and their energies higher.
    assert max(ran.energies_j[swept + 1 :]) > 0.95 * ran.summary["energy_j"]["full_clock"]
    assert ran.summary["saving_percent"]["predicted"] > 1
    assert ran.summary["saving_percent"]["measured"] is None
    assert ran.summary["iterations"]["plan"] == 0
    assert ran.summary["dry_run"] is True
    assert load_plan(folder / "plan.json").saving > 0.01


def test_a_job_keeps_the_power_budget_of_its_configuration(tmp_path: Path) -> None:
    """At the node, of whose GPUs there are two, and of each GPU; 100 W of the node are not the GPUs'."""
    folder, left, allowed_w = tmp_path / "job", iter(range(20)), 400.0

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    budget = {"power_budget_w": allowed_w + 100, "node_overhead_w": 100, "power_budget_groups_w": {"gpu": 220}}
    ran = OneJob(
        folder, [Step()] * 10_000, plugin={**SHORT, "slowdown": 0.0, **budget}, until=planned_for_a_while
    ).run()
    plan = load_plan(folder / "plan.json")
    assert planned_again(folder) == plan, "to the digit"
    assert plan.power is not None
    of_node, *of_gpus = (one.allowed_w for one in plan.power.budgets)
    # What iterations were seen to draw beyond their plan, as on a busy machine, the next one stays below.
    kept = (of_node - 100) / allowed_w
    assert 0.8 < kept <= 1 + 1e-9
    assert of_gpus == pytest.approx([220 * kept, 220 * kept])
    assert 0.8 * kept * allowed_w < plan.power.job_w - 100 <= kept * allowed_w
    assert allowed_w < plan.baseline_energy_j / plan.baseline_time_s
    assert all(one.planned_w <= 1.000001 * one.allowed_w for one in plan.power.budgets)
    at = [number for number, state in enumerate(ran.states) if state == "plan"]
    # A busy machine sets clocks late, and lets work wait: of those that took what was planned a plan can tell.
    nearest = ran.nearest(at, plan.iteration_time_s)
    assert min(ran.energies_j[number] / ran.times_s[number] for number in nearest) < 1.02 * allowed_w, "as run"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    goals = [one for one in events if one["event"] == "goal"]
    assert [one["limit"]["gpus_per_node"] for one in goals] == [2] * len(goals) != []
    assert ran.summary["plan"]["dropped_plans"] == 0


def test_stages_that_run_different_instructions_are_profiled_and_planned(tmp_path: Path) -> None:
    """Two chunks per rank and split backwards, of which the model's first stage computes no gradient of its input."""
    folder, left = tmp_path / "job", iter(range(10))

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    # Where few changes are allowed, a plan of so many short instructions is a long search.
    plugin = {**MORE, "limits": {"min_dwell_s": 0}}
    ran = OneJob(folder, [Step()] * 10_000, plugin=plugin, schedule="zbv", until=planned_for_a_while).run()
    assert "plan" in ran.states
    assert ran.summary["state"] == "finished"
    assert ran.summary["plan"]["saving_percent"] > 1
    kinds = [{kind for of, kind in load_profile(folder / "profile.csv").table if of == stage} for stage in range(2)]
    assert kinds[1] - kinds[0] == {"input_backward"}
    assert len(kinds[1]) == 6


def test_the_same_work_runs_without_the_plugin(tmp_path: Path) -> None:
    steps = [Step((1.0, 2.0)), Step((1.0,)), Step((1.0, 1.0), stall_s=0.05)]
    ran = OneJob(tmp_path / "job", steps).run()
    assert ran.states == []
    # One after the other: forwards of 10 and 14 ms, backwards of 20 and 28 ms.
    assert ran.times_s[0] >= 0.144, "two microbatches, one of them twice as large"
    assert ran.times_s[1] >= 0.072
    assert ran.times_s[2] >= 0.05 + 0.072


def test_on_gpus_that_never_reach_their_top_clock_plans_are_made_and_energies_known(tmp_path: Path) -> None:
    """As a power limit holds them: at most 1,110 of 1,410 MHz, in a job with iterations of 0.2 s."""
    folder, left = tmp_path / "job", iter(range(12))
    for rank in range(2):
        EmulatedGpu.create(folder / "emulated_gpus" / f"rank{rank}").set_cap(1110)

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    ran = OneJob(folder, [Step()] * 10_000, plugin={**MORE, "slowdown": 0.4}, until=planned_for_a_while).run()
    assert "plan" in ran.states
    assert ran.summary["plan"]["saving_percent"] > 1
    assert ran.summary["overhead"]["switch_latency_p50_s"] is not None, "timed at clocks that they do reach"
    first = [stretch for stretch in load_record(folder, 0).stretches if stretch.first < 5]
    assert sum(stretch.read for stretch in first) >= 4, "a helper that times clock changes reads the counter meanwhile"


@pytest.mark.e2e
@pytest.mark.repeated  # in virtual time: tests/profiling/test_at_limit.py
@pytest.mark.parametrize("model", ["H100", "B300"])
def test_on_gpus_at_their_power_limit_plans_are_made_of_what_was_read_back(
    tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, left, card = tmp_path / "job", iter(range(25)), MODELS[model.lower()]
    profiling = {**MORE["profiling"], "clocks_mhz": None, "clock_count": 4, "steps_per_clock": 10}
    plugin = {**MORE, "profiling": profiling}

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    # Changes and the counter as fast as on the other emulated GPUs, so that short iterations do.
    emulation = {"model": model, "switch_latency_s": 0.005, "counter_period_s": 0.02}
    ran = OneJob(
        folder,
        [Step()] * 10_000,
        forward_s=(0.030, 0.042),
        backward_s=(0.060, 0.084),
        plugin=plugin,
        emulation=emulation,
        until=planned_for_a_while,
    ).run()
    assert "plan" in ran.states
    summary, plan = ran.summary, load_plan(folder / "plan.json")
    assert card.name in summary["gpu"]
    limit = summary["at_power_limit"]
    assert limit["full_clock_percent"] > limit["plan_percent"] >= 0
    assert summary["plan"]["dropped_plans"] == 0
    said = capfd.readouterr().err
    assert "Look for a power or thermal limit" not in said
    # A busy machine makes iterations longer, and their energies higher: that counts which it has disturbed least.
    # At full clocks as the limit makes them.
    full_j = min(ran.energies_j[3:9])
    assert plan.baseline_energy_j == pytest.approx(full_j, rel=0.15)
    planned_j = min(j for j, state in zip(ran.energies_j, ran.states, strict=True) if state == "plan")
    assert planned_j < 0.98 * full_j


def test_transfers_and_what_is_there_once_are_found_and_planned_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An iteration is 0.36 s, of which almost half is neither computing nor loading."""
    folder, left = tmp_path / "job", iter(range(10))

    def planned_for_a_while() -> bool:
        return (folder / "plan.json").exists() and next(left, None) is None

    job = OneJob(folder, [Step()] * 10_000, plugin=SHORT, transfer_s=0.02, end_s=0.12, until=planned_for_a_while)
    ran = job.run()
    beside, plan = ran.summary["beside"], load_plan(folder / "plan.json")
    # On a busy machine sleep is longer, never shorter.
    assert 0.015 < beside["transfer_s"] < 0.06
    assert beside["once_s"] > 0.1
    assert beside["percent"] > 30
    assert "are neither computing nor loading: look at the network" in capfd.readouterr().err
    graph, profile = build_graph(one_f_one_b(2, 4)), load_profile(folder / "profile.csv").table
    computing_s = [
        0.0 if one is None else min(row.time_s for row in profile[one.stage, one.kind]) for one in graph.instructions
    ]
    # Two transfers at least are waited for: of the first forward and of the last backward.
    least_s = graph.times(computing_s)[1].max() + 2 * 0.02 + 0.12
    assert plan.baseline_time_s > 0.97 * least_s, "the plan's own iterations have it"
    assert max(stage[-1].finish_s for stage in plan.stages) < plan.iteration_time_s - 0.9 * 0.12
    assert ran.summary["plan"]["dropped_plans"] == 0


def test_the_planner_lives_in_another_environment_and_training_needs_nothing_of_it(tmp_path: Path) -> None:
    """The job runs without all that only planner, command line and pictures need; another Python has the solver."""
    python, ran = tmp_path / "python", tmp_path / "ran"
    python.write_text(f'#!/bin/sh\necho "$2" >> {ran}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    block = {**SHORT, "frontier": True, "planner": {"python": str(python)}}
    code = f"""
import sys
sys.modules.update(dict.fromkeys({list(NOT_IN_TRAINING)!r}))  # what importing one then meets is an ImportError
from pathlib import Path
from perseus_plugin.reporting.report.folder import load_folder
from tests.one_job import OneJob, Step
from tests.planning.jobs import bundled_profile

NOT_IN_TRAINING = ("click", "matplotlib", "ortools", "pandas", "plotly", "prometheus_client", "rich", "scipy", "typer")
folder, ran = Path({str(tmp_path / "job")!r}), Path({str(ran)!r})
planned = lambda: (folder / "plan.json").exists() and "frontier" in ran.read_text()
OneJob(folder, [Step()] * 10_000, plugin={block!r}, until=planned).run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert load_plan(tmp_path / "job" / "plan.json").saving > 0
    assert "energy saved" in done.stderr, "the table at the end"
    tried, *started = ran.read_text().split()
    assert tried == "perseus_plugin.planning.planner", "before the job began"
    assert set(started) == {"perseus_plugin.planning.process", "perseus_plugin.planning.frontier_process"}


@pytest.mark.parametrize("given", [False, True], ids=["measured", "given"])
def test_without_a_planner_a_job_runs_at_full_clocks_and_says_so_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    block: dict[str, Any] = {**SHORT, "planner": {"python": str(tmp_path / "gone")}}
    if given:
        save_profile(bundled_profile(2), tmp_path / "given.csv")
        block["profiling"] = {"load": str(tmp_path / "given.csv"), "blocking_power_w": 60.0}
    ran = OneJob(tmp_path / "job", [Step()] * 8, plugin=block).run()
    assert len(ran.times_s) == 8
    assert "plan" not in ran.states
    assert given or "profiling" not in ran.states
    assert not (tmp_path / "job" / "plan.json").exists()
    said, *others = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perseus: ")]
    assert len(others) == 1, "the table's"
    assert said.startswith(
        f'perseus: observing only, no clock will be set: perseus.planner.python: "{tmp_path / "gone"}" cannot run the '
        "planner (No such file or directory); allowed: a Python from 3.10 on"
    )
