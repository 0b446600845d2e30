from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.errors import PerseusError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.planning.plan import save_plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.profiling.derived import with_rows_for
from perseus_plugin.profiling.profile import Profile, save_profile
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.phrases import comparison
from perseus_plugin.reporting.report.timeline import draw_timeline, lanes_of, textbook_graph
from tests.factories import BLOCKING_W, profile
from tests.reporting.job import Job

SCHEDULE_NAMES = ("1f1b", "gpipe", "interleaved-1f1b", "zbv")


def planned(folder: Path, schedule: str) -> Path:
    """A folder with a plan and its profile, as `perseus plan` leaves it."""
    streams = SCHEDULES[schedule](2, 4)
    table = profile(2)
    full = with_rows_for(table, streams)
    save_plan(plan_for(PlanRequest(schedule, streams, {}, full, [BLOCKING_W] * 2)), folder / "plan.json")
    save_profile(table, folder / "profile.csv")
    return folder


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_plans_of_every_schedule_are_drawn_beside_full_clocks(tmp_path: Path, schedule: str) -> None:
    plan, (full, made) = lanes_of(load_folder(planned(tmp_path, schedule)))
    graph = build_graph(SCHEDULES[schedule](2, 4))
    assert {block.instruction for block in full.blocks} == set(graph.node_of)
    assert {block.clock_mhz for block in full.blocks} == {1410}
    assert full.end_s == pytest.approx(plan.baseline_time_s)
    assert [block.clock_mhz for block in made.rows[0]] == plan.clocks_mhz(0)
    for path in ("timeline.png", "-"):
        assert draw_timeline(tmp_path, Path(path)).startswith(b"\x89PNG")


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_jobs_picture_says_of_energy_what_its_table_says(tmp_path: Path, replicas: int) -> None:
    job = Job(tmp_path, replicas=replicas).planned().replayed(0.9, (0.08, 0.12)).finished()
    table = {name: cells for name, *cells in comparison(load_folder(tmp_path))}
    full_j, plan_j, _ = table["energy"]
    _, saved, _ = table["energy saved"]
    assert saved.startswith("10.00 % ")
    assert 100 * job.plan.saving != pytest.approx(10, abs=0.5), "the model says something else"
    which = " on 4 GPUs" if replicas == 2 else ""
    assert [one.title for one in lanes_of(load_folder(tmp_path))[1]] == [
        f"every instruction at full clock: {full_j}{which}",
        f"plan: {plan_j}{which}, predicted (-10.00 %)",
    ]
    # The plan is newer than the summary.
    newer = replace(job.plan, energy_j=job.plan.energy_j - 1.0)
    save_plan(newer, tmp_path / "plan.json")
    assert [one.title for one in lanes_of(load_folder(tmp_path))[1]] == [
        f"every instruction at full clock: {newer.baseline_energy_j:,.1f} J",
        f"plan: {newer.energy_j:,.1f} J, by the profile ({-100 * newer.saving:+.2f} %)",
    ]


def test_without_rows_for_what_it_runs_a_plan_is_drawn_alone(tmp_path: Path) -> None:
    planned(tmp_path, "1f1b")
    others = ((stage, "recompute", row) for stage, _, row in profile(2, ("forward",)).rows())
    save_profile(Profile.from_rows(others), tmp_path / "profile.csv")
    assert len(lanes_of(load_folder(tmp_path))[1]) == 1


def test_a_schedule_of_nobodys_textbook_is_drawn_alone(tmp_path: Path) -> None:
    streams = [list(stream) for stream in SCHEDULES["gpipe"](2, 4)]
    backward = [number for number, op in enumerate(streams[0]) if getattr(op, "kind", "") == "backward"]
    streams[0][backward[0] - 1 : backward[-1] + 1] = [
        op for number in reversed(backward) for op in streams[0][number - 1 : number + 1]
    ]
    last = [number for number, op in enumerate(streams[1]) if getattr(op, "kind", "") == "backward"]
    streams[1][last[0] : last[-1] + 2] = [op for number in reversed(last) for op in streams[1][number : number + 2]]
    plan = plan_for(PlanRequest("reversed", streams, {}, profile(2), [BLOCKING_W] * 2))
    assert textbook_graph(plan) is None
    save_plan(plan, tmp_path / "plan.json")
    save_profile(profile(2), tmp_path / "profile.csv")
    _, lanes = lanes_of(load_folder(tmp_path))
    assert [one.title.split(":")[0] for one in lanes] == ["plan"]
    assert draw_timeline(tmp_path, tmp_path / "timeline.svg").startswith(b"<?xml")


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(PerseusError, match=r"plan\.json"):
        draw_timeline(tmp_path, tmp_path / "timeline.png")
