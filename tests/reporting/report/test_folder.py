from __future__ import annotations

import copy
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.errors import PerseusError, ReportError
from perseus_plugin.profiling.kept import save_survey
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.record.recorder import record_path, samples_path, schedule_path
from perseus_plugin.reporting.report.folder import load_folder, state_of
from tests.reporting.job import Job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job") / "out", replicas=2).planned().finished()


@pytest.fixture
def job(made: Job, tmp_path: Path) -> Job:
    """A job of its own for each test."""
    mine = copy.copy(made)
    mine.folder = tmp_path / "out"
    shutil.copytree(made.folder, mine.folder)
    return mine


def test_a_finished_job_lacks_nothing(job: Job) -> None:
    folder = load_folder(job.folder)
    assert folder.missing == []
    assert (folder.world_size, folder.stages, folder.emulated, folder.gpu) == (4, 2, True, "test GPU")
    assert state_of(folder) == "finished"
    assert folder.plan == job.plan
    assert folder.graph() is not None
    assert folder.survey == job.survey
    assert sorted(folder.records) == [0, 1, 2, 3]


def test_samples_per_iteration_are_what_the_framework_says(job: Job) -> None:
    assert load_folder(job.folder).samples_per_iteration() == 3 * 4 * 2


def test_samples_are_not_guessed(tmp_path: Path) -> None:
    assert load_folder(Job(tmp_path / "a", facts={}).planned().finished().folder).samples_per_iteration() is None
    half = Job(tmp_path / "b", replicas=2, silent=(3,)).planned().finished()
    assert load_folder(half.folder).samples_per_iteration() is None


def test_the_series_adds_up_what_all_ranks_used(job: Job) -> None:
    run = load_folder(job.folder).series()
    assert run is not None
    assert [s.first for s in run.stretches] == list(range(job.number))
    total = float(run.energy_j.sum())
    assert total == pytest.approx(sum(job.counters_j), rel=1e-5)
    assert {s.sort.state for s, _ in run.of("plan")} == {"plan"}


def test_the_newest_iteration_that_all_stages_have_is_shown(job: Job) -> None:
    folder = load_folder(job.folder)
    whole = folder.pipeline(("plan",))
    assert [sample.number for sample in whole] == [job.plan_from + 8] * 2
    lines = samples_path(job.folder, 1)
    content = json.loads(lines.read_text())
    content["samples"] = content["samples"][:-1]
    lines.write_text(json.dumps(content))
    assert [s.number for s in load_folder(job.folder).pipeline(("plan",))] == [job.plan_from + 4] * 2
    assert folder.pipeline(("straggler",)) == []


def test_ranks_whose_record_lies_elsewhere_are_named(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", replicas=2, silent=(1, 3)).planned().finished()
    folder = load_folder(job.folder)
    assert any("2 of 4 ranks have no record here (first: rank 1)" in text for text in folder.missing)
    run = folder.series()
    assert run is not None
    assert all(value != value for value in run.energy_j.tolist())  # NaN: not known
    assert folder.pipeline(("plan",)) == []


def test_a_job_that_has_only_begun(tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    job.iterate(1)
    for recorder in job.recorders:
        recorder.step()
    folder = load_folder(job.folder)
    assert state_of(folder) == "started"
    assert folder.world_size == 2
    for name in ("summary.json", "plan.json", "profile.csv", "profile.json"):
        assert any(name in text for text in folder.missing), name


def test_a_job_that_died_is_told_from_one_that_runs(job: Job) -> None:
    job.summarise("running")
    now_s = time.time()
    assert load_folder(job.folder, now_s + 10).missing == []
    told = load_folder(job.folder, now_s + 3600).missing
    assert len(told) == 1
    assert "it has probably died" in told[0]


def test_a_line_that_was_cut_off_is_no_damage(job: Job) -> None:
    path = record_path(job.folder, 1)
    path.write_text(path.read_text() + '{"first":99,"beg')
    folder = load_folder(job.folder)
    assert folder.missing == ["the record of rank 1 ends in the middle of a line: the job was killed"]
    assert len(folder.records[1].stretches) == len(folder.records[0].stretches)


def test_files_of_an_earlier_run_are_left_out(job: Job) -> None:
    old_s = time.time() - 5000
    for name in ("summary.json", "plan.json"):
        os.utime(job.folder / name, (old_s, old_s))
    folder = load_folder(job.folder)
    assert folder.summary is None
    assert folder.plan is None
    assert any("plan.json is of an earlier run" in text for text in folder.missing)


def test_records_of_an_earlier_run_are_left_out(job: Job) -> None:
    path = record_path(job.folder, 2)
    header, *rest = path.read_text().splitlines()
    changed = json.loads(header)
    changed["started_s"] -= 5000
    path.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    folder = load_folder(job.folder)
    assert sorted(folder.records) == [0, 1, 3]
    assert "the record of rank 2 is of an earlier run and left out" in folder.missing


def test_a_plan_for_another_schedule_has_no_graph(tmp_path: Path, job: Job) -> None:
    other = Job(tmp_path / "other", stages=2, microbatches=3).planned().finished()
    (job.folder / "schedule.json").write_text((other.folder / "schedule.json").read_text())
    assert load_folder(job.folder).graph() is not None, "the plan's schedule is kept beside the one that ran last"
    schedule_path(job.folder, job.plan.schedule).unlink()
    folder = load_folder(job.folder)
    assert folder.graph() is None
    assert any("another schedule" in text for text in folder.missing)


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def _foreign(path: Path) -> None:
    path.write_text('{"schema": "something", "version": 7}\n')


def _binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x01" * 50)


def _empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("damage", [_cut, _foreign, _binary, _empty])
@pytest.mark.parametrize("name", ["summary.json", "plan.json", "schedule.json", "profile.csv", "profile.json"])
def test_a_damaged_file_is_named(job: Job, name: str, damage: Callable[[Path], None]) -> None:
    damage(job.folder / name)
    with pytest.raises(PerseusError) as error:
        load_folder(job.folder)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [_foreign, _binary, _empty])
def test_a_damaged_record_is_named(job: Job, damage: Callable[[Path], None]) -> None:
    damage(record_path(job.folder, 1))
    with pytest.raises(ReportError, match=r"rank-1\.jsonl"):
        load_folder(job.folder)


@pytest.mark.parametrize("damage", [_cut, _foreign, _binary, _empty])
def test_damaged_samples_are_named(job: Job, damage: Callable[[Path], None]) -> None:
    damage(samples_path(job.folder, 1))
    with pytest.raises(ReportError, match=r"rank-1\.samples\.json") as error:
        load_folder(job.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ['{"first":-1,"begin_s":0,"time_s":1,"energy_j":1,"state":"plan"}', "{}", "[]", '{"event":"deviation"}']
)
def test_a_line_in_the_middle_that_is_none_is_named(job: Job, line: str) -> None:
    path = record_path(job.folder, 1)
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, line, *rest]) + "\n")
    with pytest.raises(ReportError, match="line 2"):
        load_folder(job.folder)


def test_a_record_of_another_rank_is_refused(job: Job) -> None:
    record_path(job.folder, 1).write_text(record_path(job.folder, 0).read_text())
    with pytest.raises(ReportError, match=r"rank-1\.jsonl: line 1: is of rank 0"):
        load_folder(job.folder)


def test_events_of_this_run_are_read(job: Job) -> None:
    now_s = time.time() + 1
    rows = [{"time": 5.0, "event": "report", "rank": 1}, {"time": now_s, "event": "detection", "rank": 0}]
    (job.folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"tim')
    assert [event["event"] for event in load_folder(job.folder).events] == ["detection"]


def test_lines_that_are_no_events_are_counted_and_left_out(job: Job) -> None:
    event = json.dumps({"time": time.time() + 1, "event": "detection", "rank": 0}) + "\n"
    (job.folder / "events.jsonl").write_text('{"time": 17, "ev' + event + "[]\n" + event + '{"time": "x"}\n')
    folder = load_folder(job.folder)
    assert [one["event"] for one in folder.events] == ["detection"]
    assert [text for text in folder.missing if "events.jsonl" in text] == [
        "3 lines of events.jsonl are no events (a run was killed while it wrote) and left out"
    ]


def _times(job: Job, factor: float, kinds: dict[str, str] | None = None) -> None:
    """Another profile.csv: all times and energies times a factor, or other names of kinds."""
    table = {
        (stage, (kinds or {}).get(kind, kind)): rows for (stage, kind), rows in job.profile.scaled(factor).table.items()
    }
    save_survey(replace(job.survey, profile=Profile(table)), {}, job.folder)


def test_a_profile_that_was_scaled_since_is_recognised(job: Job) -> None:
    _times(job, 1 / 1.1)
    folder = load_folder(job.folder)
    assert folder.missing == []
    assert folder.profile_scale == pytest.approx(1.1, rel=1e-4)


@pytest.mark.parametrize("factor", [0.1, 0.4, 3.0, 1000.0])
def test_a_profile_of_another_model_is_left_out(job: Job, factor: float) -> None:
    _times(job, factor)
    folder = load_folder(job.folder)
    assert (folder.profile, folder.survey, folder.profile_scale) == (None, None, 1.0)
    assert any("profile.csv is not the profile that plan.json was made on" in text for text in folder.missing)


def test_a_profile_with_other_energies_is_left_out(job: Job) -> None:
    """A scale can make its times fit; its energies tell."""
    rows = ((stage, kind, replace(m, time_s=m.time_s / 1.2)) for stage, kind, m in job.profile.rows())
    save_survey(replace(job.survey, profile=Profile.from_rows(rows)), {}, job.folder)
    assert load_folder(job.folder).profile is None


def test_a_profile_without_the_plans_instructions_is_left_out(job: Job) -> None:
    _times(job, 1.0, {"backward": "recompute"})
    folder = load_folder(job.folder)
    assert folder.profile is None
    assert len(folder.missing) == 1


def test_a_profile_alone_is_checked_as_far_as_it_can_be(job: Job) -> None:
    (job.folder / "profile.json").unlink()
    assert load_folder(job.folder).profile is not None
    _times(job, 1.5)
    (job.folder / "profile.json").unlink()
    assert load_folder(job.folder).profile is None


def test_schedules_that_ran_are_read_by_their_key(job: Job) -> None:
    job.recorders[0].use_schedule("Train/2x4", job.streams.__getitem__, job.stages)
    folder = load_folder(job.folder)
    assert sorted(folder.schedules) == ["1F1B"]
    made = Job(job.folder.parent / "other").planned()
    made.recorders[0].use_schedule("Train/2x4", job.streams.__getitem__, job.stages)
    assert sorted(load_folder(made.finished().folder).schedules) == ["1F1B", "Train/2x4"]


def test_samples_per_iteration_may_be_told(tmp_path: Path) -> None:
    facts = {"microbatch size": "3", "samples per iteration": "96"}
    job = Job(tmp_path / "out", facts=facts, silent=(1,)).planned().finished()
    assert load_folder(job.folder).samples_per_iteration() == 96


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is no output folder of perseus"):
        load_folder(tmp_path)
    with pytest.raises(ReportError, match="is no folder"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["plan.json", "profile.json", "events.jsonl", "summary.json"])
def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(job: Job, name: str) -> None:
    (job.folder / name).unlink(missing_ok=True)
    os.mkfifo(job.folder / name)
    with pytest.raises(ReportError, match="is no file"):
        load_folder(job.folder)


def test_a_pipe_in_place_of_a_record_is_none(job: Job) -> None:
    for path in (record_path(job.folder, 1), samples_path(job.folder, 0)):
        path.unlink()
        os.mkfifo(path)
    found = load_folder(job.folder)
    assert 1 not in found.records
    assert found.records[0].samples == ()


def test_a_record_that_claims_a_hundred_million_iterations_takes_no_memory_for_them(job: Job) -> None:
    path = record_path(job.folder, 1)
    with path.open("a") as file:
        row = {"first": 10**8, "count": 10**8, "begin_s": 0.0, "time_s": 1.0, "energy_j": 5.0, "state": "full"}
        file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    found = load_folder(job.folder).series()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert most < 50e6
