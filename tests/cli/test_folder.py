"""A job's output folder in the place of a profile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.cli.destinations import OF_JOBS
from perseus_plugin.cli.job import request_of_folder
from perseus_plugin.iteration.instructions import Constant
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.inputs import INPUTS_FILE, load_inputs, save_inputs
from perseus_plugin.planning.plan import load_plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.streams import save_streams
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.report.palette import BLUE, BOUND, RED, SERIES
from tests.cli.commands import OF_AXES, Perseus, colours
from tests.planning.jobs import bundled_profile
from tests.reporting.job import Job

STREAMS = [[*stream, Constant("step")] for stream in one_f_one_b(2, 3)]
REQUEST = PlanRequest(
    schedule="as the job calls it",
    streams=STREAMS,
    constant_time_s={(0, "step"): 0.0123, (1, "step"): 0.0456},
    profile=bundled_profile(2).scaled(1.01),
    blocking_power_w=[61.0, 62.0],
    target=Target.slowdown(0.07),
    margin=0.013,
    max_changes=2,
    min_dwell_s=0.001,
    full_clock_only=frozenset({(1, "forward")}),
    latency_s=0.004,
    overheads=Overheads(0.002, 0.003),
    search=False,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_inputs(REQUEST, tmp_path / INPUTS_FILE)
    save_streams(STREAMS, tmp_path / "schedule.json")
    return tmp_path


def test_everything_that_a_plan_depends_on_is_kept(folder: Path) -> None:
    again = load_inputs(folder / INPUTS_FILE, STREAMS)
    rows = [[(s, k, m.to_row()) for s, k, m in one.profile.rows()] for one in (again, REQUEST)]
    assert rows[0] == rows[1]
    assert replace(again, profile=REQUEST.profile) == REQUEST


def test_options_go_before_what_the_folder_says(perseus: Perseus, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert perseus("plan", folder, "-o", out).returncode == 0
    assert load_plan(out) == plan_for(REQUEST), "the job's own, whose clocks were rounded"
    for options, wanted in (
        (("--slowdown", "20%"), replace(REQUEST, target=Target.slowdown(0.2), search=True)),
        (("--latency", "0.01"), replace(REQUEST, overheads=Overheads(0.01, 0.003), search=True)),
        (("--power-budget", "900"), replace(REQUEST, target=Target.power_budget(900.0), margin=0.0, search=True)),
    ):
        done = perseus("plan", folder, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        made, plan = plan_for(wanted), load_plan(out)
        assert (plan.stages, plan.energy_j, plan.deadline_s) == (made.stages, made.energy_j, made.deadline_s), options


def test_frontier_and_simulation_are_of_the_jobs_schedule(perseus: Perseus, folder: Path, tmp_path: Path) -> None:
    full = plan_for(replace(REQUEST, target=Target.full()))
    done = perseus("frontier", folder, "--tolerance", "0.2", "--json", "-o", tmp_path / "other.json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["baseline"]["energy_j"] == pytest.approx(full.baseline_energy_j)
    done = perseus("simulate", folder, "--json")
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)["outcomes"]
    assert outcome["slowdown_allowed"] == 0.07
    assert (outcome["schedule"], outcome["microbatches"]) == (REQUEST.schedule, 3)
    assert outcome["full_clock_j"] == pytest.approx(full.baseline_energy_j)
    save_inputs(replace(REQUEST, target=Target.deadline(2 * full.baseline_time_s)), folder / INPUTS_FILE)
    done = perseus("simulate", folder, "--json")
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)["outcomes"]
    assert outcome["deadline_s"] == pytest.approx(2 * full.baseline_time_s)
    assert outcome["slowdown_allowed"] is None
    assert "deadline of the job" in perseus("simulate", folder).stdout
    other = perseus("simulate", folder, "--microbatches", 2, "--json")
    assert json.loads(other.stdout)["outcomes"][0]["slowdown_allowed"] == 0
    assert json.loads(other.stdout)["outcomes"][0]["schedule"] == "1f1b"


def test_without_what_a_plan_was_made_from_a_folder_is_still_planned_on(perseus: Perseus, tmp_path: Path) -> None:
    job = Job(tmp_path / "job").planned().finished().folder
    assert not (job / INPUTS_FILE).exists()
    done = perseus("plan", job, "-o", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    plan, again = load_plan(job / "plan.json"), load_plan(tmp_path / "again.json")
    assert again.schedule == plan.schedule
    assert again.baseline_energy_j == pytest.approx(plan.baseline_energy_j, rel=0.05)
    kept = json.loads((job / "profile.json").read_text())
    (job / "profile.json").write_text(json.dumps({**kept, "blocking_power_se_w": 0.25}))
    assert request_of_folder(job).blocking_power_se_w == 0.25, "without it no plan says how well it is known"


def test_no_command_takes_the_place_of_what_it_reads(
    perseus: Perseus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "job").planned().finished().folder
    save_inputs(REQUEST, job / INPUTS_FILE)
    own = {path: path.read_bytes() for path in job.iterdir() if path.is_file()}
    assert {path.name for path in own} <= OF_JOBS
    monkeypatch.chdir(job)
    for arguments, path in (
        (("plan", "."), "plan.json"),
        (("frontier", "."), "frontier.json"),
        (("plan", ".", "-o", "-", "--zeus", "../job/schedule.json"), "../job/schedule.json"),
        (("simulate", job, "-o", "summary.json"), "summary.json"),
        (("report", job, "--html", "events.jsonl"), "events.jsonl"),
        (("trace", ".", "-o", "profile.json"), "profile.json"),
        (("timeline", ".", "-o", "plan-inputs.json"), "plan-inputs.json"),
    ):
        done = perseus(*arguments)
        assert done.returncode == 2
        assert f"got {path}, which is the job's own; allowed: another file" in done.stderr
    done = perseus("plan", "profile.csv", "--microbatches", 2, "-o", job / "profile.csv")
    assert f"got {job / 'profile.csv'}, which is what is read; allowed: another file" in done.stderr
    assert {path: path.read_bytes() for path in job.iterdir() if path.is_file()} == own


def test_what_is_no_jobs_folder_is_refused(perseus: Perseus, tmp_path: Path) -> None:
    for command in ("plan", "frontier", "simulate"):
        done = perseus(command, tmp_path)
        assert done.returncode == 2
        assert "is no output folder of perseus" in done.stderr
    (tmp_path / INPUTS_FILE).write_text('{"schema": "perseus-plan-inputs", "version": 2}')
    assert "version: got 2; allowed: 1" in perseus("plan", tmp_path).stderr


def test_what_the_job_predicts_of_its_plan_stands_beside_what_the_profile_says(
    perseus: Perseus, tmp_path: Path
) -> None:
    job, out = Job(tmp_path), tmp_path / "again.json"
    job.survey = replace(job.survey, blocking_power_se_w=0.5)
    job.profiled()
    save_inputs(request_of_folder(tmp_path), tmp_path / INPUTS_FILE)

    def rows(*options: object) -> dict[str, str]:
        done = perseus("plan", tmp_path, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        cells = (re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines())
        return {name: found[-1] for name, *found in cells if found}

    alone = rows()
    job.plan = load_plan(out)
    out.rename(tmp_path / "plan.json")
    job.replayed(0.9, (0.08, 0.12)).finished()
    beside = rows()
    assert beside["saving, by the profile"] == alone["saving, by the profile"] == f"{job.plan.saving:.3%}"
    assert "by its errors alone (95%)" in beside
    assert {name: cell for name, cell in beside.items() if name not in alone} == {
        "saving, predicted by the job": "10.00%",
        "as its iterations vary (95%)": "8.00% to 12.00%",
    }
    assert rows("--slowdown", "30%").keys() == alone.keys(), "another plan, of which the job predicts nothing"
    (tmp_path / "summary.json").write_text("{")
    assert rows() == alone


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("frontier", ("--tolerance", 0.05, "-o", "-")),
        ("simulate", ("--microbatches", 2, "--microbatches", 3, "--slowdown", 0, "--slowdown", "10%")),
    ],
)
def test_a_picture_says_of_what_gpus_it_is_in_the_colours_of_all_pictures(
    perseus: Perseus, tmp_path: Path, command: str, options: tuple[object, ...]
) -> None:
    pytest.importorskip("matplotlib")

    def drawn(emulated: bool) -> str:
        folder, picture = (
            Job(tmp_path / str(emulated), emulated=emulated).planned(2).finished().folder,
            tmp_path / "a.svg",
        )
        done = perseus(command, folder, *options, "--plot", picture)
        assert done.returncode == 0, done.stderr
        return picture.read_text()

    picture = drawn(emulated=True)
    assert "emulated GPUs" in picture
    assert {BLUE, RED} <= colours(picture) <= {*SERIES, BOUND, *OF_AXES}
    assert "emulated" not in drawn(emulated=False)
